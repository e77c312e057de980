-- The tables, schema version 3. The script init-db runs this file.
-- The sqlite3 program can run it too: sqlite3 database.db ".read lib/schema.sql"
--
-- A column that holds a field of Square has the name of that field in Square's API.
-- All times are UTC with milliseconds, for example 2026-08-01T00:00:00.000Z.

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
  push_error TEXT,                        -- why the last push refused or held the row
  deleted_at TEXT,                        -- when it was found deleted in Square; NULL = it exists
  merged_into TEXT,                       -- id of the customer that it was merged into, or linked to
  edited_at TEXT                          -- when somebody edited the row of a customer in Square
);

-- Notes an edit of a customer that is in Square, so that no save replaces it without a word. The
-- scripts set synced_at in the same UPDATE, and so are told apart. The columns are those that
-- FIELDS in lib/mapping.ts sends, and email_unsubscribed.
CREATE TRIGGER IF NOT EXISTS customers_edited AFTER UPDATE ON customers
WHEN OLD.id IS NOT NULL AND NEW.synced_at IS OLD.synced_at AND (
  NEW.given_name IS NOT OLD.given_name OR NEW.family_name IS NOT OLD.family_name
  OR NEW.company_name IS NOT OLD.company_name OR NEW.nickname IS NOT OLD.nickname
  OR NEW.email_address IS NOT OLD.email_address OR NEW.phone_number IS NOT OLD.phone_number
  OR NEW.birthday IS NOT OLD.birthday OR NEW.note IS NOT OLD.note
  OR NEW.reference_id IS NOT OLD.reference_id OR NEW.tax_ids_eu_vat IS NOT OLD.tax_ids_eu_vat
  OR NEW.address_line_1 IS NOT OLD.address_line_1 OR NEW.address_line_2 IS NOT OLD.address_line_2
  OR NEW.address_line_3 IS NOT OLD.address_line_3 OR NEW.locality IS NOT OLD.locality
  OR NEW.sublocality IS NOT OLD.sublocality
  OR NEW.administrative_district_level_1 IS NOT OLD.administrative_district_level_1
  OR NEW.postal_code IS NOT OLD.postal_code OR NEW.country IS NOT OLD.country
  OR NEW.email_unsubscribed IS NOT OLD.email_unsubscribed)
BEGIN
  UPDATE customers SET edited_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
  WHERE local_id = NEW.local_id;
END;

-- One row for each finished run: a log, and the state from which --since last continues.
CREATE TABLE IF NOT EXISTS sync_runs (
  id INTEGER PRIMARY KEY,
  script TEXT NOT NULL,
  environment TEXT NOT NULL,              -- sandbox, production, or offline (SQUARE_BASE_URL is set)
  started_at TEXT NOT NULL,
  finished_at TEXT NOT NULL,
  since TEXT,                             -- start of the time window; NULL = everything
  until TEXT,                             -- end of the time window; NULL = no end
  watermark TEXT,                         -- everything up to this time has been read
  complete INTEGER NOT NULL DEFAULT 0,    -- 1 = everything up to started_at has been read
  fetched INTEGER NOT NULL DEFAULT 0,     -- customers that Square returned
  inserted INTEGER NOT NULL DEFAULT 0,    -- customers that became new rows
  updated INTEGER NOT NULL DEFAULT 0,     -- rows that changed
  unchanged INTEGER NOT NULL DEFAULT 0,   -- rows that were already the same
  linked INTEGER NOT NULL DEFAULT 0,      -- unpushed rows whose customer existed in Square already
  deleted INTEGER NOT NULL DEFAULT 0,     -- rows that were marked as deleted
  merged INTEGER NOT NULL DEFAULT 0,      -- rows that were marked as merged
  created INTEGER NOT NULL DEFAULT 0,     -- rows that were created in Square
  refused INTEGER NOT NULL DEFAULT 0,     -- rows that Square or our checks do not accept
  held INTEGER NOT NULL DEFAULT 0,        -- rows that wait for a person
  requests INTEGER NOT NULL DEFAULT 0,    -- requests to Square
  retries INTEGER NOT NULL DEFAULT 0      -- requests that repeated a failed one
);

-- The Square account that the customers belong to. Ids of one account mean nothing in another.
CREATE TABLE IF NOT EXISTS square_account (
  only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
  environment TEXT NOT NULL,              -- sandbox, production or offline, as in sync_runs
  merchant_id TEXT,
  token_hash TEXT,                        -- SHA-256 of the access token that was checked last
  token_expires_at TEXT
);

PRAGMA user_version = 3;
