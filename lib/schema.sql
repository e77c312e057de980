-- The whole schema, version 1. init-db runs it; so can you: sqlite3 database.db < lib/schema.sql
-- Names are Square's own wherever Square has one. Times are UTC, such as 2026-08-01T00:00:00.000Z.
-- init-db reads the columns from these lines: two spaces, then the column's name, one a line.

CREATE TABLE IF NOT EXISTS customers (
  local_id INTEGER PRIMARY KEY,           -- this file's own name for the row
  id TEXT UNIQUE CHECK (id <> ''),        -- Square's customer id; NULL = not in Square yet
  created_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  updated_at TEXT,
  version INTEGER,
  creation_source TEXT,
  given_name TEXT,
  family_name TEXT,
  company_name TEXT,
  nickname TEXT,
  email_address TEXT,
  phone_number TEXT,
  birthday TEXT,                          -- YYYY-MM-DD; year 0000 = not known
  note TEXT,
  reference_id TEXT,
  tax_ids_eu_vat TEXT,
  address_line_1 TEXT,
  address_line_2 TEXT,
  address_line_3 TEXT,
  locality TEXT,
  sublocality TEXT,
  administrative_district_level_1 TEXT,
  postal_code TEXT,
  country TEXT,                           -- two letters, such as US
  group_ids TEXT DEFAULT '[]',            -- a JSON array
  segment_ids TEXT DEFAULT '[]',          -- a JSON array
  email_unsubscribed INTEGER DEFAULT 0,
  source TEXT,                            -- your own word for where a local row came from
  synced_at TEXT,                         -- when this row last agreed with Square
  idempotency_key TEXT UNIQUE,            -- set before the first attempt to create it
  push_error TEXT                         -- why the last attempt refused it
);

-- The history that a person reads, and the state that --since last uses: a row for each finished run.
CREATE TABLE IF NOT EXISTS sync_runs (
  id INTEGER PRIMARY KEY,
  script TEXT NOT NULL,
  environment TEXT NOT NULL,
  started_at TEXT NOT NULL,
  finished_at TEXT NOT NULL,
  since TEXT,                             -- NULL = everything
  until TEXT,                             -- NULL = no end
  watermark TEXT,                         -- up to here everything is known to have been read
  fetched INTEGER NOT NULL DEFAULT 0,
  inserted INTEGER NOT NULL DEFAULT 0,
  updated INTEGER NOT NULL DEFAULT 0,
  unchanged INTEGER NOT NULL DEFAULT 0,
  linked INTEGER NOT NULL DEFAULT 0,
  created INTEGER NOT NULL DEFAULT 0,
  refused INTEGER NOT NULL DEFAULT 0,
  requests INTEGER NOT NULL DEFAULT 0,
  retries INTEGER NOT NULL DEFAULT 0
);

PRAGMA user_version = 1;
