#!/usr/bin/env tsx
/**
 * Makes the database file that the other scripts work on, or brings an older one up to date.
 *
 * Reads and writes the file. Asks Square for nothing, and needs no token.
 *
 *     npx tsx scripts/init-db.ts
 *     deno run --no-prompt --ignore-env --allow-env=DATABASE_PATH --allow-read=. \
 *       --allow-write=database.db,database.db.tmp,database.db.lock scripts/init-db.ts
 *
 * Exit codes: 0 done, 1 failed, 2 wrong usage, 75 file busy, 130/143 stopped.
 * Safe to run again: it adds what is missing and drops nothing.
 */
import { readFileSync } from "node:fs";
import type { Database as SqlDatabase } from "sql.js";
import { runScript } from "../lib/command.ts";
import { type Check, checkVersion, readNumber, readRows } from "../lib/database.ts";
import { EXIT, SyncError } from "../lib/errors.ts";
import { FIELDS } from "../lib/mapping.ts";

// Plain SQL in a file of its own, which the sqlite3 program can run too.
const SCHEMA = readFileSync(new URL("../lib/schema.sql", import.meta.url), "utf8");

// The table of Square's 2018 post. It had no key, so customers can be in it twice.
const COLUMNS_2018 =
  "id created_at updated_at synced_at given_name family_name email_address creation_source".split(
    " ",
  );

// A column without a type keeps whatever it is given, which is what an added one needs.
const WANTED = FIELDS.map(({ column }) => column).concat(
  "source",
  "synced_at",
  "idempotency_key",
  "push_error",
);

const manual = {
  name: "init-db",
  purpose: "makes the database file, or brings an older one up to date",
  options: {},
  examples: [
    ["init-db", "make database.db"],
    ["init-db --db shop.db", "make a file of another name"],
    ["init-db --json", "tell a program what was made"],
  ],
  exitCodes: "0 done, 1 failed, 2 wrong usage, 75 file busy, 130/143 stopped",
  needsSquare: false,
} as const;

await runScript(manual, async (run) => {
  // Refuse before anything is touched: a schema from the future, or a table that somebody else needs.
  const check: Check = (db, path) => {
    checkVersion(db, path);
    const columns = columnsOf(db, "customers");
    const is2018 = COLUMNS_2018.every((name) => columns.includes(name));
    if (columns.length > 0 && !columns.includes("local_id") && !is2018)
      throw new SyncError(
        `Cannot use "${path}": its table customers is another program's`,
        EXIT.usage,
        "another file with --db",
      );
  };
  const database = await run.openDatabase(check, true);

  // All in one transaction and one save: killed half way, it leaves the file as it was.
  const { created, upgraded } = await database.change((db) => {
    const before = tablesOf(db);
    const old = columnsOf(db, "customers");
    const is2018 = old.length > 0 && !old.includes("local_id");
    const kept = freeName(before);
    // In the old way of ALTER TABLE, a view that reads customers goes on to read customers.
    if (is2018) db.run(`PRAGMA legacy_alter_table = ON; ALTER TABLE customers RENAME TO ${kept}`);
    const missing = is2018 || old.length === 0 ? [] : WANTED.filter((name) => !old.includes(name));
    for (const name of missing) db.run(`ALTER TABLE customers ADD COLUMN ${name}`);
    db.exec(SCHEMA);
    if (is2018) moveRows(db, kept, old);
    const created = tablesOf(db).filter((name) => !before.includes(name) && name !== kept);
    return { created, upgraded: is2018 || missing.length > 0 };
  });

  const done = upgraded ? ["upgraded"] : [];
  if (created.length > 0) done.push(`made ${created.join(" and ")}`);
  return {
    text: `init-db: ${run.databasePath} is ready; ${done.join(", ") || "nothing was missing"}`,
    json: { script: "init-db", database: run.databasePath, created, upgraded },
  };
});

/**
 * Carries the rows of the 2018 post's table over. Of rows with the same id the one changed last goes
 * whole: half of one and half of another would be a customer who never was. Where that leaves anything
 * out, the old table stays under its other name.
 */
function moveRows(db: SqlDatabase, old: string, columns: string[]): void {
  const time = (name: string) =>
    `coalesce(iif(${name} LIKE '____-__-__%', strftime('%Y-%m-%dT%H:%M:%fZ', ${name}), NULL), ${name})`;
  const values = COLUMNS_2018.map((name) => (name.endsWith("_at") ? time(name) : name));
  values[0] = "nullif(id, '')";
  db.run(`INSERT INTO customers (${COLUMNS_2018.join(", ")})
    SELECT ${values.join(", ")} FROM (
      SELECT *, rowid AS place, max(coalesce(${time("updated_at")}, '')) FROM ${old}
      GROUP BY coalesce(nullif(id, ''), rowid)
    ) ORDER BY place`);
  const [moved, all] = ["customers", old].map((table) =>
    readNumber(db, `SELECT count(*) FROM ${table}`),
  );
  const own = `SELECT count(*) FROM sqlite_master WHERE tbl_name = '${old}'`; // it, its indexes, triggers
  if (moved === all && columns.length === COLUMNS_2018.length && readNumber(db, own) === 1)
    db.run(`DROP TABLE ${old}`);
}

function tablesOf(db: SqlDatabase): string[] {
  return readRows(db, "SELECT name FROM sqlite_master WHERE type = 'table'").map(
    (row) => `${row.name}`,
  );
}

function columnsOf(db: SqlDatabase, table: string): string[] {
  return readRows(db, `SELECT name FROM pragma_table_info('${table}')`).map((row) => `${row.name}`);
}

function freeName(taken: string[]): string {
  let name = "customers_2018";
  while (taken.includes(name)) name += "_";
  return name;
}

/*
Against the offline Square (npm run square):

$ npx tsx scripts/init-db.ts
init-db: database.db is ready; made customers and sync_runs
$ npx tsx scripts/init-db.ts
init-db: database.db is ready; nothing was missing
*/
