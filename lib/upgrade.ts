import type { Database as SqlDatabase } from "sql.js";
import { type Check, newer, readNumber, readRows, SCHEMA_VERSION } from "./database.ts";
import { SyncError } from "./errors.ts";
import { FIELDS, toTime } from "./mapping.ts";

/** The columns of the table in the 2018 post, which had no key: rows could be there twice. */
const COLUMNS_2018 = [
  "id",
  "created_at",
  "updated_at",
  "synced_at",
  "given_name",
  "family_name",
  "email_address",
  "creation_source",
];

/** Refuses a newer schema, and a `customers` table that is neither ours nor the 2018 post's. */
export const checkUpgradable: Check = (db, path) => {
  const version = readNumber(db, "PRAGMA user_version");
  if (version > SCHEMA_VERSION) throw newer(path, version);
  const columns = columnsOf(db, "customers");
  const isOurs = columns.includes("local_id");
  if (columns.length > 0 && !isOurs && !COLUMNS_2018.every((name) => columns.includes(name)))
    throw new SyncError(`Cannot use "${path}": its table customers is another program's`, {
      next: "--db with another file",
    });
};

/**
 * Makes what is missing and drops nothing; may be run again at any time.
 * @param schema the text of schema.sql
 * @returns the tables made, and whether a table was brought up to date
 */
export function initialise(
  db: SqlDatabase,
  schema: string,
): { created: string[]; upgraded: boolean } {
  const before = tablesOf(db);
  const old = columnsOf(db, "customers");
  const is2018 = old.length > 0 && !old.includes("local_id");
  const kept = is2018 ? freeName(before) : "";
  if (is2018) db.run(`ALTER TABLE customers RENAME TO ${kept}`);
  const added = is2018 ? [] : addColumns(db, schema);
  db.exec(schema);
  if (is2018) moveRows(db, kept, old);
  const created = tablesOf(db).filter((name) => !before.includes(name) && name !== kept);
  return { created, upgraded: is2018 || added.length > 0 };
}

// SQLite can add a column, but not a UNIQUE one: the rule follows as an index.
function addColumns(db: SqlDatabase, schema: string): string[] {
  const added: string[] = [];
  for (const table of ["customers", "sync_runs"]) {
    const present = columnsOf(db, table);
    const [, body = ""] =
      new RegExp(`TABLE IF NOT EXISTS ${table} \\(([^;]*)\\n\\);`).exec(schema) ?? [];
    for (const [, name = "", type = ""] of body.matchAll(/^ {2}(\w+) (.*?),? *(?:--.*)?$/gm)) {
      if (present.length === 0 || present.includes(name)) continue;
      // A default that is not a constant cannot be added either.
      const plain = type
        .replace(/ UNIQUE| DEFAULT \(.*\)/g, "")
        .replace(/NOT NULL$/, "NOT NULL DEFAULT ''");
      db.run(`ALTER TABLE ${table} ADD COLUMN ${name} ${plain}`);
      if (type.includes("UNIQUE"))
        db.run(`CREATE UNIQUE INDEX ${table}_${name} ON ${table} (${name})`);
      added.push(name);
    }
  }
  return added;
}

// Of rows with the same id the one updated last is carried over, whole: half of one and half of
// another would be a customer that never was. The old table stays where that left a row or a column out.
function moveRows(db: SqlDatabase, old: string, columns: string[]): void {
  const rows = readRows(db, `SELECT * FROM ${old} ORDER BY rowid`);
  const newest = new Map<unknown, (typeof rows)[number]>();
  rows.forEach((row, place) => {
    for (const name of ["created_at", "updated_at", "synced_at"])
      if (typeof row[name] === "string") row[name] = toTime(row[name]);
    const id = row.id === "" || row.id === null ? null : String(row.id);
    row.id = id;
    const other = newest.get(id);
    if (id === null) newest.set(place, row);
    else if (other === undefined || String(row.updated_at) >= String(other.updated_at))
      newest.set(id, row);
  });
  const known = [...FIELDS.map(({ column }) => column), "synced_at"];
  const carried = columns.filter((name) => known.includes(name));
  const insert = db.prepare(
    `INSERT INTO customers (${carried.join(", ")}) VALUES (${carried.map(() => "?").join(", ")})`,
  );
  for (const row of newest.values())
    insert.run(carried.map((name) => row[name] as string | number | null));
  insert.free();
  if (newest.size === rows.length && carried.length === columns.length) db.run(`DROP TABLE ${old}`);
}

function tablesOf(db: SqlDatabase): string[] {
  return readRows(db, "SELECT name FROM sqlite_master WHERE type = 'table'").map(({ name }) =>
    String(name),
  );
}

function columnsOf(db: SqlDatabase, table: string): string[] {
  return readRows(db, `SELECT name FROM pragma_table_info('${table}')`).map(({ name }) =>
    String(name),
  );
}

function freeName(taken: string[]): string {
  for (let number = 0; ; number++) {
    const name = number === 0 ? "customers_2018" : `customers_2018_${number}`;
    if (!taken.includes(name)) return name;
  }
}
