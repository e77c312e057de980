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
import { usageError } from "../lib/errors.ts";

// Plain SQL in a file of its own, which the sqlite3 program can run too.
const SCHEMA = readFileSync(new URL("../lib/schema.sql", import.meta.url), "utf8");

// Our tables, and the columns by which one that is there already is known to be ours.
const OURS = { customers: ["local_id", "id"], sync_runs: ["script", "watermark"] };

// The table of Square's 2018 post. It had no key, so customers can be in it twice.
const COLUMNS_2018 =
  "id created_at updated_at synced_at given_name family_name email_address creation_source".split(
    " ",
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
    for (const [table, names] of Object.entries(OURS)) {
      const columns = columnsOf(db, table);
      const isOurs = names.every((name) => columns.includes(name)) || is2018(columns);
      if (columns.length > 0 && !isOurs)
        throw usageError(
          `Cannot use "${path}": its table ${table} is another program's`,
          "another file with --db",
        );
    }
  };
  const database = await run.openDatabase(check, true);

  // All in one transaction and one save: killed half way, it leaves the file as it was.
  const { created, upgraded } = await database.change((db) => {
    const created = Object.keys(OURS).filter((table) => columnsOf(db, table).length === 0);
    const columns = columnsOf(db, "customers");
    const isOld = is2018(columns);
    let kept = "customers_2018";
    const isTaken = "SELECT count(*) FROM sqlite_master WHERE lower(name) = "; // an index's name counts too
    while (readNumber(db, `${isTaken}'${kept}'`) > 0) kept += "_";
    // A rename would also turn your views to the old table; the old way of ALTER TABLE leaves them alone.
    if (isOld) db.run(`PRAGMA legacy_alter_table = ON; ALTER TABLE customers RENAME TO ${kept}`);
    // A column without a type keeps whatever it is given, which is what an added one needs.
    const added = Object.keys(OURS).flatMap((table) => {
      const found = columnsOf(db, table);
      const missing = wantedIn(table).filter((name) => !found.includes(name));
      return found.length === 0 ? [] : missing.map((name) => `${table} ADD COLUMN ${name}`);
    });
    for (const what of added) db.run(`ALTER TABLE ${what}`);
    db.exec(SCHEMA);
    if (isOld) moveRows(db, kept, columns);
    return { created, upgraded: isOld || added.length > 0 };
  });

  const done = upgraded ? ["upgraded"] : [];
  if (created.length > 0) done.push(`made ${created.join(" and ")}`);
  return {
    text: `${database.name} is ready; ${done.join(", ") || "nothing was missing"}`,
    json: { created, upgraded },
  };
});

/**
 * Carries the rows of the 2018 post's table over. Of rows with the same id the one changed last goes
 * whole: half of one and half of another would be a customer who never was. Where that leaves anything
 * out, the old table stays under its other name.
 */
function moveRows(db: SqlDatabase, old: string, columns: string[]): void {
  // Only what looks like a date: a text such as 2018 would be a Julian day to strftime. The rest stays.
  const time = (name: string) =>
    `coalesce(iif(${name} LIKE '____-__-__%', strftime('%Y-%m-%dT%H:%M:%fZ', ${name}), NULL), ${name})`;
  const id = "nullif(trim(id), '')"; // a blank one is none, and its rows are not one customer
  const values = COLUMNS_2018.slice(1).map((name) => (name.endsWith("_at") ? time(name) : name));
  // Beside max(), SQLite takes all other columns of a group from the row that has the maximum.
  db.run(`INSERT INTO customers (${COLUMNS_2018.join(", ")})
    SELECT ${[id, ...values].join(", ")} FROM (
      SELECT *, _rowid_ AS place, max(coalesce(${time("updated_at")}, '')) FROM ${old}
      GROUP BY coalesce(${id}, _rowid_)
    ) ORDER BY place`);
  const [moved, all] = ["customers", old].map((table) =>
    readNumber(db, `SELECT count(*) FROM ${table}`),
  );
  const own = `SELECT count(*) FROM sqlite_master WHERE tbl_name = '${old}'`; // it, its indexes, triggers
  if (moved === all && columns.length === COLUMNS_2018.length && readNumber(db, own) === 1)
    db.run(`DROP TABLE ${old}`);
}

function is2018(columns: string[]): boolean {
  return !columns.includes("local_id") && COLUMNS_2018.every((name) => columns.includes(name));
}

// The columns that schema.sql gives a table: the words that its lines begin with.
function wantedIn(table: string): string[] {
  const [, body = ""] = new RegExp(`EXISTS ${table} \\((.*?)\n\\);`, "s").exec(SCHEMA) ?? [];
  return [...body.matchAll(/^ {2}(\w+) /gm)].map(([, name = ""]) => name);
}

// In small letters: to SQLite, names that differ in case only are the same. None = no such table.
function columnsOf(db: SqlDatabase, table: string): string[] {
  const sql = `SELECT lower(name) AS name FROM pragma_table_xinfo('${table}')`;
  return readRows(db, sql).map(({ name }) => String(name));
}

/*
Against the offline Square (npm run square):

$ npx tsx scripts/init-db.ts
init-db: database.db is ready; made customers and sync_runs
$ npx tsx scripts/init-db.ts
init-db: database.db is ready; nothing was missing
*/
