-- The tables of the kit, schema version 2. The script init-db runs this file.
-- The sqlite3 program can run it too: sqlite3 database.db < lib/schema.sql
-- A column has the name that Square's API uses, where Square has such a field.
-- Times are UTC with milliseconds, for example 2026-08-01T00:00:00.000Z.
-- init-db reads the columns of each table from the lines below: two spaces, then the column's name,
-- one column a line. Keep that form when you add a column.

CREATE TABLE IF NOT EXISTS customers (
  local_id INTEGER PRIMARY KEY AUTOINCREMENT, -- the row's number in this file; never given to another row
  id TEXT UNIQUE CHECK (id <> ''),        -- Square's customer id; NULL = not in Square yet
  created_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  updated_at TEXT,
  version INTEGER,                        -- Square increases it with every change of the customer
  creation_source TEXT,
  given_name TEXT,
  family_name TEXT,
  company_name TEXT,
  nickname TEXT,
  email_address TEXT,
  phone_number TEXT,
  birthday TEXT,                          -- YYYY-MM-DD; the year is 0000 when it is unknown
  note TEXT,
  reference_id TEXT,                      -- your number for the customer, or the idempotency key
  tax_ids_eu_vat TEXT,
  address_line_1 TEXT,
  address_line_2 TEXT,
  address_line_3 TEXT,
  locality TEXT,
  sublocality TEXT,
  administrative_district_level_1 TEXT,
  postal_code TEXT,
  country TEXT,                           -- two letters, for example US
  group_ids TEXT DEFAULT '[]',            -- a JSON array
  segment_ids TEXT DEFAULT '[]',          -- a JSON array
  email_unsubscribed INTEGER DEFAULT 0,   -- 1 = the customer wants no marketing email
  source TEXT,                            -- your label for where an unpushed row came from
  synced_at TEXT,                         -- when the row was last saved from a reply of Square
  idempotency_key TEXT UNIQUE,            -- stored before the row is sent to Square for the first time
  push_error TEXT,                        -- why the last push rejected the row or put it on hold
  deleted_at TEXT,                        -- when the customer was found deleted in Square; NULL = exists
  merged_into TEXT                        -- id of the customer that this one was merged into in Square
);

-- One row for each finished run: a log for you, and the state that --since last continues from.
CREATE TABLE IF NOT EXISTS sync_runs (
  id INTEGER PRIMARY KEY,
  script TEXT NOT NULL,
  environment TEXT NOT NULL,              -- sandbox, production, or offline for SQUARE_BASE_URL
  started_at TEXT NOT NULL,
  finished_at TEXT NOT NULL,
  since TEXT,                             -- start of the time window; NULL = everything
  until TEXT,                             -- end of the time window; NULL = no end
  watermark TEXT,                         -- the time up to which everything has been read
  fetched INTEGER NOT NULL DEFAULT 0,
  inserted INTEGER NOT NULL DEFAULT 0,
  updated INTEGER NOT NULL DEFAULT 0,
  unchanged INTEGER NOT NULL DEFAULT 0,
  linked INTEGER NOT NULL DEFAULT 0,
  deleted INTEGER NOT NULL DEFAULT 0,
  merged INTEGER NOT NULL DEFAULT 0,
  created INTEGER NOT NULL DEFAULT 0,
  refused INTEGER NOT NULL DEFAULT 0,
  held INTEGER NOT NULL DEFAULT 0,
  requests INTEGER NOT NULL DEFAULT 0,
  retries INTEGER NOT NULL DEFAULT 0
);

-- The Square account that the customers belong to. Ids of one account mean nothing in another.
CREATE TABLE IF NOT EXISTS square_account (
  only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
  environment TEXT NOT NULL,              -- sandbox, production, or offline for SQUARE_BASE_URL
  merchant_id TEXT,
  token_hash TEXT,                        -- SHA-256 of the access token that was checked last
  token_scopes TEXT,                      -- its permissions, separated by blanks
  token_expires_at TEXT,
  checked_at TEXT
);

PRAGMA user_version = 2;
