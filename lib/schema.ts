/**
 * Compares a file with schema.sql. SQLite itself says what differs: schema.sql runs in an empty
 * database, and SQLite lists the tables of both. The file may have more, for example columns and
 * tables of your own.
 */
import { readFileSync } from "node:fs";
import type { Database, SqlValue } from "sql.js";
import { SyncError } from "./internal/errors.ts";
import { type Row, readRows, readValue } from "./internal/sql.ts";

/** Reads the statements of schema.sql. */
export function readSchema(): string {
  return readFileSync(new URL("./schema.sql", import.meta.url), "utf8");
}

/** Something that schema.sql makes and that the file does not have. */
export interface Difference {
  /** For example `customers has no column email_address`. */
  text: string;
  /** The statement with which init-db adds it. Without one, schema.sql itself adds it. */
  statement?: string;
  /**
   * What a person can do, if only a person knows. For example, a missing column that holds a field
   * of Square may have been renamed, and an empty second one would hide its values from every check.
   */
  advice?: string;
}

// The columns of customers that an older file lacks. They hold the kit's own state, so init-db adds
// them.
const STATE_COLUMNS = ["deleted_at", "merged_into", "edited_at"];

/**
 * Compares a file with the reference, a database in which only schema.sql has run.
 * @returns an empty list if the scripts can use the file
 */
export function compareSchema(db: Database, reference: Database): Difference[] {
  const [version, knownVersion] = [db, reference].map((one) =>
    Number(readValue(one, "PRAGMA user_version")),
  );
  if (Number(version) > Number(knownVersion))
    return [
      {
        text: "a newer version of the scripts has made it",
        advice: "the newer scripts, or another file with --db",
      },
    ];
  const tables = readRows(
    reference,
    "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'",
  );
  return tables.flatMap(({ name }) => {
    const table = String(name);
    const actual = describeTable(db, table);
    if (actual.columns.length === 0) return [{ text: `it has no table ${table}` }];
    return compareTable(table, actual, describeTable(reference, table));
  });
}

/**
 * Requires that the scripts can use a file.
 * @param mayAdd accepts differences that init-db removes
 * @throws SyncError (usage) with what differs, and what would cure it
 */
export function requireSchema(differences: Difference[], path: string, mayAdd = false): void {
  const forPerson = differences.filter(({ advice }) => advice !== undefined);
  const rejected = forPerson.length > 0 || mayAdd ? forPerson : differences;
  if (rejected.length === 0) return;
  const advice = rejected.map((one) => one.advice ?? "init-db, which adds what is missing");
  throw new SyncError(
    "usage",
    `Cannot use "${path}": ${rejected.map(({ text }) => text).join("; ")}`,
    [...new Set(advice)].join("; "),
  );
}

/** The columns of a table, those with a UNIQUE index, and the triggers, as SQLite lists them. */
function describeTable(db: Database, table: string) {
  const read = (sql: string) => readRows(db, sql, [table]);
  return {
    columns: read(
      'SELECT name, upper(type) AS type, pk, "notnull", dflt_value FROM pragma_table_xinfo(?)',
    ),
    unique: read(
      `SELECT max(info.name) AS name
       FROM pragma_index_list(?) AS list, pragma_index_info(list.name) AS info
       WHERE list."unique" AND NOT list.partial GROUP BY list.name HAVING count(*) = 1`,
    ),
    triggers: read("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' AND tbl_name = ?"),
  };
}

type Table = ReturnType<typeof describeTable>;

function compareTable(table: string, actual: Table, expected: Table): Difference[] {
  const find = (rows: Row[], name: SqlValue | undefined) => rows.find((row) => row.name === name);
  for (const { name, pk } of expected.columns)
    if (pk !== 0 && find(actual.columns, name)?.pk !== pk)
      return [
        {
          text: `its table ${table} is not from init-db: ${name} is not its primary key`,
          advice: 'another file with --db, then "Rows of another table" in README.md',
        },
      ];

  const differences: Difference[] = [];
  const added = actual.columns.filter(({ name }) => !find(expected.columns, name));
  for (const { name, type, notnull, dflt_value: value } of expected.columns) {
    const column = find(actual.columns, name);
    const alter = `ALTER TABLE ${table}`;
    const add = `${alter} ADD COLUMN ${name} ${type}`;
    if (column === undefined) {
      const text = `${table} has no column ${name}`;
      const isState = table !== "customers" || STATE_COLUMNS.includes(String(name));
      const rest = `${notnull ? " NOT NULL" : ""}${value === null ? "" : ` DEFAULT ${value}`}`;
      const oldName = added.length === 1 ? added[0]?.name : `<${listNames(added)}>`;
      const rename = `${alter} RENAME COLUMN ${oldName} TO ${name}`;
      if (isState) differences.push({ text, statement: `${add}${rest}` });
      else differences.push({ text, advice: `${rename} if it was renamed; ${add} if it is new` });
    } else if (column.type !== type) {
      const copy = `UPDATE ${table} SET ${name} = old_${name}`;
      differences.push({
        text: `${table}.${name} has the type ${column.type || "(none)"} instead of ${type}`,
        advice: `${alter} RENAME COLUMN ${name} TO old_${name}; ${add}; ${copy}`,
      });
    }
  }
  for (const { name } of expected.unique)
    if (find(actual.columns, name) && !find(actual.unique, name))
      differences.push({
        text: `${table}.${name} has no UNIQUE index`,
        statement: `CREATE UNIQUE INDEX ${table}_${name} ON ${table} (${name})`,
      });
  for (const { name, sql } of expected.triggers) {
    const trigger = find(actual.triggers, name);
    if (trigger === undefined) differences.push({ text: `${table} has no trigger ${name}` });
    else if (normalizeSql(trigger.sql) !== normalizeSql(sql))
      differences.push({
        text: `the trigger ${name} differs from lib/schema.sql`,
        advice: `DROP TRIGGER ${name}, then init-db`,
      });
  }
  return differences;
}

function listNames(rows: Row[]): string {
  return rows.map(({ name }) => name).join(" or ") || "its old name";
}

// SQLite rewrites names in a trigger when a column is renamed, and may put quotes around them.
function normalizeSql(sql: SqlValue | undefined): string {
  return String(sql).replace(/["\s]+/g, "");
}
