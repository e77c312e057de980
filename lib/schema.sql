-- The three tables, schema version 2. The script init-db runs this file.
-- The sqlite3 program can run it too: sqlite3 database.db < lib/schema.sql
--
-- A column that holds a field of Square has the name of that field in Square's API.
-- All times are UTC with milliseconds, for example 2026-08-01T00:00:00.000Z.
--
-- To add a column, write it on its own line: two spaces, then the name, then the type.
-- init-db finds the columns by this form, and adds the missing ones to an older file.

CREATE TABLE IF NOT EXISTS customers (
  local_id INTEGER PRIMARY KEY AUTOINCREMENT, -- the row's number in this file; never reused
  id TEXT UNIQUE CHECK (id <> ''),        -- Square's customer id; NULL = not in Square yet
  -- A row that you insert gets the current time. Once it is in Square, it gets Square's time.
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
  -- Your own number for the customer. If it is empty, push-new copies the idempotency key into it,
  -- because Square's search finds a customer by reference_id, and not by idempotency key.
  reference_id TEXT,
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
  idempotency_key TEXT UNIQUE,            -- stored before the row is first sent to Square
  -- Why the last push rejected the row or put it on hold. Also a note on a row that was created with
  -- --allow-subscribe: email_unsubscribed is 1 in the row, but Square has the customer as subscribed.
  push_error TEXT,
  deleted_at TEXT,                        -- when it was found deleted in Square; NULL = it exists
  merged_into TEXT                        -- id of the customer that it was merged into in Square
);

-- One row for each finished run: a log, and the state from which --since last continues.
CREATE TABLE IF NOT EXISTS sync_runs (
  id INTEGER PRIMARY KEY,
  script TEXT NOT NULL,
  environment TEXT NOT NULL,              -- sandbox, production, or offline (SQUARE_BASE_URL is set)
  started_at TEXT NOT NULL,
  finished_at TEXT NOT NULL,
  since TEXT,                             -- start of the time window; NULL = everything
  until TEXT,                             -- end of the time window; NULL = no end
  watermark TEXT,                         -- everything up to this time has been read (push-new: pushed)
  fetched INTEGER NOT NULL DEFAULT 0,     -- customers that Square returned
  inserted INTEGER NOT NULL DEFAULT 0,    -- customers that became new rows
  updated INTEGER NOT NULL DEFAULT 0,     -- rows that changed
  unchanged INTEGER NOT NULL DEFAULT 0,   -- rows that were already the same
  linked INTEGER NOT NULL DEFAULT 0,      -- unpushed rows that existed in Square already
  deleted INTEGER NOT NULL DEFAULT 0,     -- rows that were marked as deleted
  merged INTEGER NOT NULL DEFAULT 0,      -- rows that were marked as merged
  created INTEGER NOT NULL DEFAULT 0,     -- rows that were created in Square
  refused INTEGER NOT NULL DEFAULT 0,     -- rows that Square or our validation rejected
  held INTEGER NOT NULL DEFAULT 0,        -- rows that were put on hold until a person decides
  requests INTEGER NOT NULL DEFAULT 0,    -- requests to Square
  retries INTEGER NOT NULL DEFAULT 0      -- requests that repeated a failed one
);

-- The Square account that the customers belong to. Ids of one account mean nothing in another.
CREATE TABLE IF NOT EXISTS square_account (
  only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
  environment TEXT NOT NULL,              -- sandbox, production or offline, as in sync_runs
  merchant_id TEXT,
  token_hash TEXT,                        -- SHA-256 of the access token that was checked last
  token_scopes TEXT,                      -- its permissions, separated by spaces
  token_expires_at TEXT,
  checked_at TEXT
);

PRAGMA user_version = 2;
