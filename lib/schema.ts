/**
 * Compares a file with schema.sql, which runs in an empty database. SQLite lists the tables of both.
 * The file may have more, for example columns and tables of your own.
 */
import { readFileSync } from "node:fs";
import type { Database, SqlValue } from "sql.js";
import { SyncError } from "./internal/errors.ts";
import { type Row, readRows, readValue } from "./internal/sql.ts";

export function readSchema(): string {
  return readFileSync(new URL("./schema.sql", import.meta.url), "utf8");
}

export interface Difference {
  text: string;
  /** The statement with which init-db adds it. Without one, schema.sql itself adds it. */
  statement?: string;
  /**
   * For what only a person can decide. For example, a missing column that holds a field of Square may
   * have been renamed, and an empty second one would hide its values from every check.
   */
  advice?: string;
}

// Columns that an older file lacks. They hold the kit's own state, so init-db adds them.
const STATE_COLUMNS = ["deleted_at", "merged_into", "edited_at"];

/** @param reference a database in which only schema.sql has run */
export function compareSchema(db: Database, reference: Database): Difference[] {
  const readVersion = (one: Database) => Number(readValue(one, "PRAGMA user_version"));
  if (readVersion(db) > readVersion(reference)) {
    const text = "a newer version of the scripts has made it";
    return [{ text, advice: "the newer scripts, or another file with --db" }];
  }
  const sql = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'";
  const tables = readRows(reference, sql);
  return tables.flatMap(({ name }) => compareTable(String(name), db, reference));
}

/** @throws SyncError (usage) with what differs, and what would cure it */
export function requireSchema(differences: Difference[], path: string): void {
  if (differences.length === 0) return;
  const forPerson = differences.filter(({ advice }) => advice !== undefined);
  const shown = forPerson.length > 0 ? forPerson : differences;
  const advice = shown.map((one) => one.advice ?? "init-db, which adds what is missing");
  throw new SyncError(
    "usage",
    `Cannot use "${path}": ${shown.map(({ text }) => text).join("; ")}`,
    [...new Set(advice)].join("; "),
  );
}

function describeTable(db: Database, table: string) {
  const read = (sql: string) => readRows(db, sql, [table]);
  return {
    columns: read(
      'SELECT name, upper(type) AS type, pk, "notnull", dflt_value FROM pragma_table_xinfo(?)',
    ),
    unique: read(
      `SELECT info.name FROM pragma_index_list(?) AS list, pragma_index_info(list.name) AS info
       WHERE list."unique" AND NOT list.partial
         AND (SELECT count(*) FROM pragma_index_info(list.name)) = 1`,
    ),
    triggers: read("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' AND tbl_name = ?"),
  };
}

function compareTable(table: string, db: Database, reference: Database): Difference[] {
  const actual = describeTable(db, table);
  const expected = describeTable(reference, table);
  const find = (rows: Row[], name: SqlValue | undefined) => rows.find((row) => row.name === name);
  if (actual.columns.length === 0) return [{ text: `it has no table ${table}` }];
  for (const { name, pk } of expected.columns)
    if (pk !== 0 && find(actual.columns, name)?.pk !== pk) {
      const text = `its table ${table} is not from init-db: ${name} is not its primary key`;
      const advice = 'another file with --db, then "Rows of another table" in README.md';
      return [{ text, advice }];
    }

  const differences: Difference[] = [];
  const others = actual.columns.filter(({ name }) => !find(expected.columns, name));
  for (const column of expected.columns) {
    const type = find(actual.columns, column.name)?.type;
    if (type === undefined) differences.push(describeMissingColumn(table, column, others));
    else if (type !== column.type) {
      const alter = `ALTER TABLE ${table}`;
      const { name } = column;
      differences.push({
        text: `${table}.${name} has the type ${type || "(none)"} instead of ${column.type}`,
        advice: `${alter} RENAME COLUMN ${name} TO old_${name}; ${alter} ADD COLUMN ${name} ${column.type}; UPDATE ${table} SET ${name} = old_${name}`,
      });
    }
  }
  for (const { name } of expected.unique)
    if (find(actual.columns, name) && !find(actual.unique, name))
      differences.push({
        text: `${table}.${name} has no UNIQUE index`,
        statement: `CREATE UNIQUE INDEX ${table}_${name} ON ${table} (${name})`,
      });
  // SQLite rewrites names in a trigger when a column is renamed, and may put quotes around them.
  const normalize = (sql: SqlValue | undefined) => String(sql).replace(/["\s]+/g, "");
  for (const { name, sql } of expected.triggers) {
    const trigger = find(actual.triggers, name);
    if (trigger === undefined) differences.push({ text: `${table} has no trigger ${name}` });
    else if (normalize(trigger.sql) !== normalize(sql))
      differences.push({
        text: `the trigger ${name} differs from lib/schema.sql`,
        advice: `DROP TRIGGER ${name}, then init-db`,
      });
  }
  return differences;
}

/** @param others the columns that schema.sql does not have: one of them may be the renamed column */
function describeMissingColumn(table: string, column: Row, others: Row[]): Difference {
  const { name, type, notnull, dflt_value: value } = column;
  const text = `${table} has no column ${name}`;
  const add = `ALTER TABLE ${table} ADD COLUMN ${name} ${type}`;
  if (table !== "customers" || STATE_COLUMNS.includes(String(name))) {
    const rest = `${notnull ? " NOT NULL" : ""}${value === null ? "" : ` DEFAULT ${value}`}`;
    return { text, statement: add + rest };
  }
  const names = others.map((other) => other.name).join(" or ") || "its old name";
  const oldName = others.length === 1 ? names : `<${names}>`;
  const rename = `ALTER TABLE ${table} RENAME COLUMN ${oldName} TO ${name}`;
  return { text, advice: `${rename} if it was renamed; ${add} if it is new` };
}
