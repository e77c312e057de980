/**
 * Brings the tables of an earlier version up to date without losing a row. It works in two halves: one before
 * schema.sql is run and one after. The first half renames a table that has to be replaced, schema.sql creates
 * the new one, and the second half moves the rows.
 */
import type { Database } from "sql.js";
import { messageOf, SyncError } from "./errors.ts";
import {
  createSchemaError,
  type ExpectedSchema,
  listMissingKeys,
  listTables,
  SCHEMA_VERSION,
  type TableRules,
} from "./schema-check.ts";
import { joinWords, listColumns, quoteName, readNumber, readRows } from "./sql.ts";
import { is2018Table, move2018Rows } from "./upgrade-2018.ts";

/** What the first half did. */
export interface Upgrade {
  /** The tables that did not exist, and that schema.sql creates. */
  created: string[];
  /** The columns that were added, for example `customers.deleted_at`. */
  addedColumns: string[];
  replaced: ReplacedTable[];
  oldVersion: number;
}

interface ReplacedTable {
  table: TableRules;
  oldName: string;
  oldColumns: string[];
  is2018: boolean;
  /** The statements that create the indexes and triggers of the old table. */
  statements: string[];
}

/** The first half: adds missing columns, and renames the tables that have to be replaced. */
export function beginUpgrade(db: Database, schema: string, expected: ExpectedSchema): Upgrade {
  const upgrade: Upgrade = {
    created: [],
    addedColumns: [],
    replaced: [],
    oldVersion: readNumber(db, "PRAGMA user_version"),
  };
  for (const table of listTables(expected)) {
    const columns = listColumns(db, table.name);
    const is2018 = is2018Table(columns);
    if (columns.length === 0) upgrade.created.push(table.name);
    else if (is2018 || listMissingKeys(db, table).includes(table.rowNumber))
      upgrade.replaced.push(renameTable(db, table, columns, is2018));
    else upgrade.addedColumns.push(...addMissingColumns(db, schema, table.name, columns));
  }
  return upgrade;
}

/**
 * Creates the tables that do not exist. Between the two halves.
 * @throws SyncError (usage) for a mistake in schema.sql
 */
export function runSchema(db: Database, schema: string): void {
  try {
    db.exec(schema);
  } catch (error) {
    const message = `Cannot run lib/schema.sql: ${messageOf(error)}`;
    throw new SyncError("usage", message, "correct it in lib/schema.sql", error);
  }
}

/**
 * The second half: moves rows, restores UNIQUE indexes, and records the Square account.
 * @returns what was done to existing tables, for a person
 * @throws SyncError (usage) when rows are in the way, such as two with the same id
 */
export function finishUpgrade(db: Database, expected: ExpectedSchema, upgrade: Upgrade): string[] {
  const { created, addedColumns, replaced, oldVersion } = upgrade;
  const changes: string[] = [];
  if (addedColumns.length > 0)
    changes.push(
      `added the ${addedColumns.length > 1 ? "columns" : "column"} ${joinWords(addedColumns)}`,
    );
  for (const old of replaced) changes.push(moveRows(db, old, expected.path));
  for (const table of listTables(expected))
    for (const column of listMissingKeys(db, table).filter((key) => key !== table.rowNumber))
      changes.push(restoreUniqueIndex(db, table.name, column, expected.path));
  if (created.includes("square_account")) changes.push(...recordAccount(db, expected.path));
  if (created.includes(expected.table)) changes.push(...clearWatermarks(db));
  if (changes.length === 0 && created.length === 0 && oldVersion !== SCHEMA_VERSION)
    changes.push(`set the schema version from ${oldVersion} to ${SCHEMA_VERSION}`);
  return changes;
}

/** The columns of a table in schema.sql, each with the rest of its line: its type and rules. */
export function readSchemaColumns(schema: string, table: string): Map<string, string> {
  const [, body = ""] = new RegExp(`EXISTS ${table} \\((.*?)\n\\);`, "s").exec(schema) ?? [];
  const columns = new Map<string, string>();
  for (const [, name = "", rest = ""] of body.matchAll(/^ {2}(\w+) (.*)$/gm)) {
    if (["CHECK", "CONSTRAINT", "FOREIGN", "PRIMARY", "UNIQUE"].includes(name)) continue;
    const [definition = ""] = rest.split("--");
    columns.set(name, definition.trim().replace(/,$/, ""));
  }
  return columns;
}

function addMissingColumns(
  db: Database,
  schema: string,
  table: string,
  existing: readonly string[],
): string[] {
  const added: string[] = [];
  for (const [name, definition] of readSchemaColumns(schema, table)) {
    if (existing.includes(name.toLowerCase())) continue;
    try {
      db.run(`ALTER TABLE ${table} ADD COLUMN ${name} ${definition}`);
    } catch {
      // To a table with rows, SQLite cannot add a column that is UNIQUE or has a computed default. Without
      // type and rules the column stores any value. A UNIQUE index is added in the second half.
      db.run(`ALTER TABLE ${table} ADD COLUMN ${name}`);
    }
    added.push(`${table}.${name}`);
  }
  return added;
}

function renameTable(
  db: Database,
  table: TableRules,
  oldColumns: string[],
  is2018: boolean,
): ReplacedTable {
  const { name } = table;
  const sql = `SELECT sql FROM sqlite_master
    WHERE lower(tbl_name) = lower(?) AND type IN ('index', 'trigger') AND sql IS NOT NULL`;
  const statements = readRows(db, sql, [name]).map((row) => String(row.sql));

  // The name can be taken by a table, a view or an index.
  let oldName = is2018 ? `${name}_2018` : `${name}_old`;
  const isTaken = "SELECT count(*) FROM sqlite_master WHERE lower(name) = lower(?)";
  while (readNumber(db, isTaken, [oldName]) > 0) oldName += "_";

  // A rename normally changes views, triggers and foreign keys that use the table, so that they would go on
  // using the old one. With legacy_alter_table they keep the name and use the new table.
  db.run("PRAGMA legacy_alter_table = ON");
  db.run(`ALTER TABLE ${name} RENAME TO ${oldName}`);
  db.run("PRAGMA legacy_alter_table = OFF");
  return { table, oldName, oldColumns, is2018, statements };
}

function moveRows(db: Database, old: ReplacedTable, path: string): string {
  const { table, oldName, oldColumns } = old;
  if (old.is2018) {
    move2018Rows(db, table.name, oldName, oldColumns);
    const isKept = listColumns(db, oldName).length > 0;
    return `moved the rows of the 2018 table${isKept ? `, which is kept as ${oldName}` : ""}`;
  }
  for (const column of [table.rowNumber, ...table.uniqueColumns])
    if (oldColumns.includes(column)) requireDifferentValues(db, table, oldName, column, path);
  copyOwnColumns(db, table.name, oldName, path);
  const names = oldColumns.map(quoteName);
  const values = oldColumns.map((column) =>
    table.uniqueColumns.includes(column) ? blankAsNull(column) : quoteName(column),
  );
  const number = oldColumns.includes(table.rowNumber) ? table.rowNumber : "NULL";
  try {
    // Rows without a number come last and get the next ones.
    db.run(`INSERT INTO ${table.name} (${names.join(", ")})
      SELECT ${values.join(", ")} FROM ${oldName} ORDER BY ${number} IS NULL, ${number}`);
    db.run(`DROP TABLE ${oldName}`);
    for (const statement of old.statements) db.run(statement);
  } catch (error) {
    throw createSchemaError(
      path,
      `the key of its table ${table.name} cannot be restored: ${messageOf(error)}`,
      `correct the values in that column: sqlite3 "${path}" "SELECT * FROM ${table.name}"`,
    );
  }
  return `restored the INTEGER PRIMARY KEY on ${table.name}.${table.rowNumber}`;
}

// Adds the columns of the user's own to the new table, with their types and defaults.
function copyOwnColumns(db: Database, table: string, oldName: string, path: string): void {
  const existing = listColumns(db, table);
  const sql = `SELECT name, type, "notnull" AS required, dflt_value, hidden FROM pragma_table_xinfo(?)`;
  for (const { name, type, required, dflt_value, hidden } of readRows(db, sql, [oldName])) {
    if (existing.includes(String(name).toLowerCase())) continue;
    // SQLite does not return the expression of a generated column, so it cannot be copied.
    if (Number(hidden) > 1)
      throw createSchemaError(
        path,
        `the key of its table ${table} cannot be restored: ${name} is a generated column`,
        `drop that column and run this again: sqlite3 "${path}" 'ALTER TABLE ${table} DROP COLUMN ${name}'`,
      );
    const rules = [
      type,
      required ? "NOT NULL" : "",
      dflt_value === null ? "" : `DEFAULT (${dflt_value})`,
    ];
    db.run(`ALTER TABLE ${table} ADD COLUMN ${quoteName(String(name))} ${rules.join(" ")}`);
  }
}

function restoreUniqueIndex(db: Database, table: string, column: string, path: string): string {
  const rules = { name: table, rowNumber: "local_id" };
  requireDifferentValues(db, rules, table, column, path);
  // Several blank cells would violate the index. They count as NULL everywhere else too.
  const blank = `trim(${column}) = ''`;
  if (readNumber(db, `SELECT count(*) FROM ${table} WHERE ${blank}`) > 1)
    db.run(`UPDATE ${table} SET ${column} = NULL WHERE ${blank}`);
  let name = `${table}_${column}`;
  const isTaken = "SELECT count(*) FROM sqlite_master WHERE lower(name) = lower(?)";
  while (readNumber(db, isTaken, [name]) > 0) name += "_";
  db.run(`CREATE UNIQUE INDEX ${name} ON ${table} (${column})`);
  return `restored the UNIQUE index on ${table}.${column}`;
}

// Refuses rows that cannot both stay. Only a person can decide which of them is right.
function requireDifferentValues(
  db: Database,
  { name, rowNumber }: Pick<TableRules, "name" | "rowNumber">,
  currentName: string,
  column: string,
  path: string,
): void {
  const sql = `SELECT ${column} AS value, group_concat(coalesce(${rowNumber}, 'NULL'), ', ') AS numbers
    FROM ${currentName} WHERE trim(${column}) <> '' GROUP BY ${column} HAVING count(*) > 1 LIMIT 1`;
  const [twice] = readRows(db, sql);
  if (twice === undefined) return;
  const value = String(twice.value);
  const where = column === rowNumber ? "" : ` (${rowNumber} ${twice.numbers})`;
  const look = `"SELECT * FROM ${name} WHERE ${column} = '${value.replaceAll("'", "''")}'"`;
  // A NULL in local_id becomes a new number. A row without an id would be sent to Square as a new customer.
  const isOptional = column === "idempotency_key" || column === "local_id";
  const advice = isOptional
    ? `set ${column} to NULL in all of them except one`
    : "delete all of them except one";
  throw createSchemaError(
    path,
    `several rows of its table ${name} have the same ${column} ${value}${where}`,
    `${advice}: sqlite3 "${path}" ${look}`,
  );
}

function blankAsNull(column: string): string {
  return `iif(trim(${column}) = '', NULL, ${column})`;
}

// Version 1 kept the environment in the header of the file: "SQC" and the number of the environment.
const FIRST_MARK = 0x53514301;
const ENVIRONMENTS = ["sandbox", "production", "offline"];

/** Moves the environment of a version 1 file from its header and its log to the table square_account. */
function recordAccount(db: Database, path: string): string[] {
  const marked = ENVIRONMENTS[readNumber(db, "PRAGMA application_id") - FIRST_MARK];
  const runs = readRows(db, "SELECT DISTINCT environment FROM sync_runs").map((run) =>
    String(run.environment),
  );
  const [environment, ...others] = new Set(marked === undefined ? runs : [marked, ...runs]);
  if (environment === undefined) return [];
  if (others.length > 0)
    throw createSchemaError(
      path,
      `it holds customers of ${joinWords([environment, ...others])}`,
      "another file with --db, which then holds the customers of one of them",
    );
  db.run("INSERT INTO square_account (only_row, environment) VALUES (1, ?)", [environment]);
  // A mark that another program has put there stays.
  if (marked !== undefined) db.run("PRAGMA application_id = 0");
  return [`recorded that its customers are from ${environment}`];
}

// A customers table that was just created is empty, whatever earlier runs have read. With the old watermarks,
// these customers would never be read again, and a push could create them twice.
function clearWatermarks(db: Database): string[] {
  db.run("UPDATE sync_runs SET watermark = NULL WHERE watermark IS NOT NULL");
  return db.getRowsModified() > 0
    ? ["cleared the watermarks, so that the next pulls read everything"]
    : [];
}
