/**
 * Upgrades the tables of an earlier version without losing a row, in three steps:
 *
 *   1. `beginUpgrade` adds missing columns, and renames each table that has to be replaced.
 *   2. `runSchema` creates the tables that do not exist, including the new table for a renamed one.
 *   3. `finishUpgrade` moves the rows from the renamed tables to the new ones.
 */
import type { Database } from "sql.js";
import { messageOf, SyncError } from "./errors.ts";
import { joinWords } from "./report.ts";
import {
  createSchemaError,
  type ExpectedSchema,
  listMissingConstraints,
  listTables,
  SCHEMA_VERSION,
  type TableRules,
} from "./schema-check.ts";
import {
  findFreeName,
  listColumns,
  listDeclaredColumns,
  quoteName,
  readNumber,
  readRows,
} from "./sql.ts";
import { is2018Table, move2018Rows } from "./upgrade-2018.ts";

/** What `beginUpgrade` found and did. */
export interface Upgrade {
  /** The tables that do not exist yet. schema.sql creates them. */
  missingTables: string[];
  /** The columns that were added, with their tables, for example `customers.deleted_at`. */
  addedColumns: string[];
  /**
   * The columns that were renamed because they differed from schema.sql only in upper and lower
   * case, under their old names, for example `customers.Email_Address`.
   */
  recasedColumns: string[];
  renamedTables: RenamedTable[];
  oldVersion: number;
}

interface RenamedTable {
  table: TableRules;
  oldName: string;
  oldColumns: string[];
  is2018: boolean;
  /** The statements that create the indexes and triggers of the old table. */
  statements: string[];
}

// A table with these columns is a customers table, whatever its name is. All versions have them.
const RECOGNIZED_BY = ["local_id", "id", "synced_at", "idempotency_key", "push_error"];

/**
 * The columns that this kit creates for fields that are sent, and for the opt-out. It is not
 * derived from lib/mapping.ts, where a user can have renamed them. Other columns with names of
 * Square's API are the user's own.
 */
export const KIT_COLUMNS: ReadonlySet<string> = new Set([
  ...["given_name", "family_name", "company_name", "nickname", "email_address", "phone_number"],
  ...["birthday", "note", "reference_id", "tax_ids_eu_vat", "address_line_1", "address_line_2"],
  ...["address_line_3", "locality", "sublocality", "administrative_district_level_1"],
  ...["postal_code", "country", "email_unsubscribed"],
]);

// Version 1 stored the environment in the application_id of the file, as this number plus the index
// in ENVIRONMENTS. In ASCII, the number is "SQC" and 1.
const FIRST_APPLICATION_ID = 0x53514301;
const ENVIRONMENTS = ["sandbox", "production", "offline"];

/**
 * Adds missing columns, and renames the tables that have to be replaced.
 * @param apiNames for each column, the name of its field in Square's API
 * @throws SyncError (usage) if the file has the customers table, or one of its columns, under
 *   another name than lib/mapping.ts
 */
export function beginUpgrade(
  db: Database,
  schema: string,
  expected: ExpectedSchema,
  apiNames: ReadonlyMap<string, string> = new Map(),
): Upgrade {
  const upgrade: Upgrade = {
    missingTables: [],
    addedColumns: [],
    recasedColumns: [],
    renamedTables: [],
    oldVersion: readNumber(db, "PRAGMA user_version"),
  };
  rejectRenamedTable(db, expected);
  for (const table of listTables(expected)) {
    if (table.name === expected.table) rejectRenamedColumns(db, expected, apiNames);
    upgrade.recasedColumns.push(...recaseColumns(db, schema, table.name, expected.path));
    const columns = listColumns(db, table.name);
    const is2018 = is2018Table(columns);
    if (columns.length === 0) {
      upgrade.missingTables.push(table.name);
    } else if (is2018 || listMissingConstraints(db, table).includes(table.integerKey)) {
      // SQLite cannot add an INTEGER PRIMARY KEY to an existing table.
      upgrade.renamedTables.push(renameTable(db, table, columns, is2018));
    } else {
      upgrade.addedColumns.push(...addMissingColumns(db, schema, table.name, columns));
    }
  }
  return upgrade;
}

/**
 * Creates the tables that do not exist.
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
 * Moves the rows of renamed tables, restores UNIQUE indexes, records the Square account, and clears
 * watermarks that the rows of the file do not prove anymore.
 * @returns the changes to existing tables, as phrases for a person
 * @throws SyncError (usage) if the rows do not allow it, for example two rows with the same id
 */
export function finishUpgrade(db: Database, expected: ExpectedSchema, upgrade: Upgrade): string[] {
  const { missingTables, addedColumns, recasedColumns, renamedTables, oldVersion } = upgrade;
  const { path } = expected;
  const changes: string[] = [];
  if (addedColumns.length > 0) {
    const noun = addedColumns.length > 1 ? "columns" : "column";
    changes.push(`added the ${noun} ${joinWords(addedColumns)}`);
  }
  if (recasedColumns.length > 0)
    changes.push(`changed the case of ${joinWords(recasedColumns)} to that of lib/schema.sql`);
  for (const old of renamedTables) changes.push(moveRows(db, old, path));
  for (const table of listTables(expected))
    for (const column of listMissingConstraints(db, table))
      if (column !== table.integerKey) changes.push(restoreUniqueIndex(db, table, column, path));
  changes.push(...recordAccount(db, path));
  const isReplaced = renamedTables.some(({ table }) => table.name === expected.table);
  if (missingTables.includes(expected.table) || isReplaced) changes.push(...clearWatermarks(db));
  // schema.sql has set the version. Report that if nothing else has changed.
  if (changes.length === 0 && missingTables.length === 0 && oldVersion !== SCHEMA_VERSION)
    changes.push(`set the schema version from ${oldVersion} to ${SCHEMA_VERSION}`);
  return changes;
}

/**
 * Reads the columns of a table from the text of schema.sql. In that file, a table begins with
 * `EXISTS <table> (`. Each column is one line that begins with two spaces. A line `);` ends the
 * table.
 * @returns the definition of each column: its type and its constraints
 */
export function readSchemaColumns(schema: string, table: string): Map<string, string> {
  const [, body = ""] = new RegExp(`EXISTS ${table} \\((.*?)\n\\);`, "s").exec(schema) ?? [];
  const columns = new Map<string, string>();
  for (const [, name = "", rest = ""] of body.matchAll(/^ {2}(\w+) (.*)$/gm)) {
    // A line that begins with one of these words is a constraint of the table.
    if (["CHECK", "CONSTRAINT", "FOREIGN", "PRIMARY", "UNIQUE"].includes(name)) continue;
    const [definition = ""] = rest.split("--"); // without the comment
    columns.set(name, definition.trim().replace(/,$/, ""));
  }
  return columns;
}

// If lib/mapping.ts has a new name for the customers table, and the file still has the old one, the
// new table would be empty, and the rows of the old table would be neither updated nor pushed.
function rejectRenamedTable(db: Database, { table, path }: ExpectedSchema): void {
  if (listColumns(db, table).length > 0) return;
  const tables = readRows(db, "SELECT name FROM sqlite_master WHERE type = 'table'");
  for (const name of tables.map((row) => String(row.name))) {
    const columns = listColumns(db, name);
    if (!RECOGNIZED_BY.every((column) => columns.includes(column))) continue;
    throw createSchemaError(
      path,
      `it has no table named ${table}, but its table ${name} has the same columns`,
      `sqlite3 "${path}" 'ALTER TABLE ${quoteName(name)} RENAME TO ${table}'; or set TABLE in lib/mapping.ts to ${name}`,
    );
  }
}

// If lib/mapping.ts has a new name for a column, and the file still has the old one, the new column
// would be empty, and a push would send unpushed rows without its values. The old name is known if
// it is the name in Square's API.
function rejectRenamedColumns(
  db: Database,
  { table, columns, path }: ExpectedSchema,
  apiNames: ReadonlyMap<string, string>,
): void {
  const existing = listColumns(db, table);
  for (const [column, apiName] of apiNames) {
    const isRenamed = !existing.includes(column.toLowerCase()) && existing.includes(apiName);
    if (!isRenamed || columns.includes(apiName) || !KIT_COLUMNS.has(apiName)) continue;
    throw createSchemaError(
      path,
      `its table ${table} still has the column ${apiName}, which lib/mapping.ts calls ${column}`,
      `sqlite3 "${path}" "ALTER TABLE ${table} RENAME COLUMN ${apiName} TO ${column}"; if ${apiName} is a column of your own, rename it to something else`,
    );
  }
}

/**
 * Renames each column that differs from schema.sql only in upper and lower case, for example
 * Email_Address to email_address.
 */
function recaseColumns(db: Database, schema: string, table: string, path: string): string[] {
  const respelled: string[] = [];
  const names = [...readSchemaColumns(schema, table).keys()];
  for (const declared of listDeclaredColumns(db, table)) {
    const name = names.find((name) => name.toLowerCase() === declared.toLowerCase());
    if (name === undefined || name === declared) continue;
    try {
      db.run(`ALTER TABLE ${table} RENAME COLUMN ${quoteName(declared)} TO ${name}`);
    } catch (error) {
      // For example, a view of the user is broken, and SQLite checks all views.
      throw createSchemaError(
        path,
        `its column ${table}.${declared} cannot be renamed to ${name}: ${messageOf(error)}`,
        "correct or drop what the message names, and run this again",
      );
    }
    respelled.push(`${table}.${declared}`);
  }
  return respelled;
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
      // SQLite cannot add a column that is UNIQUE or has a computed default to a table with rows.
      // So add it with its type only. finishUpgrade adds the UNIQUE index.
      const [type] = definition.split(" ");
      db.run(`ALTER TABLE ${table} ADD COLUMN ${name} ${type}`);
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
): RenamedTable {
  const { name } = table;
  const sql = `SELECT sql FROM sqlite_master
    WHERE lower(tbl_name) = lower(?) AND type IN ('index', 'trigger') AND sql IS NOT NULL`;
  const statements = readRows(db, sql, [name]).map((row) => String(row.sql));
  const oldName = findFreeName(db, is2018 ? `${name}_2018` : `${name}_old`);

  // A rename normally also renames the table in views, triggers and foreign keys, which would then
  // use the old table. With legacy_alter_table they keep the name and use the new table.
  db.run("PRAGMA legacy_alter_table = ON");
  db.run(`ALTER TABLE ${name} RENAME TO ${oldName}`);
  db.run("PRAGMA legacy_alter_table = OFF");
  return { table, oldName, oldColumns, is2018, statements };
}

function moveRows(db: Database, old: RenamedTable, path: string): string {
  const { table, oldName, oldColumns } = old;
  if (old.is2018) {
    const isKept = move2018Rows(db, table.name, oldName, oldColumns);
    return `moved the rows of the 2018 table${isKept ? `, which is kept as ${oldName}` : ""}`;
  }

  for (const column of [table.integerKey, ...table.uniqueColumns])
    if (oldColumns.includes(column)) requireDifferentValues(db, table, oldName, column, path);
  const userColumns = copyUserColumns(db, table.name, oldName, path);
  const names = oldColumns.map(quoteName);
  const values = oldColumns.map((column) =>
    table.uniqueColumns.includes(column) ? buildBlankAsNull(column) : quoteName(column),
  );
  // Insert the rows whose key is NULL last, so that SQLite gives them keys that no other row has.
  // If the old table has no such column, SQLite numbers all rows, and the order does not matter.
  const { integerKey } = table;
  const order = oldColumns.includes(integerKey)
    ? `ORDER BY ${integerKey} IS NULL, ${integerKey}`
    : "";
  try {
    db.run(`INSERT INTO ${table.name} (${names.join(", ")})
      SELECT ${values.join(", ")} FROM ${oldName} ${order}`);
    db.run(`DROP TABLE ${oldName}`);
    for (const statement of old.statements) db.run(statement);
  } catch (error) {
    throw createSchemaError(
      path,
      `the key of its table ${table.name} cannot be restored: ${messageOf(error)}`,
      `correct the values that the table does not accept: sqlite3 "${path}" "SELECT * FROM ${table.name}"`,
    );
  }
  const note =
    userColumns.length > 0 ? ` (add the constraints of ${joinWords(userColumns)} again)` : "";
  return `restored the INTEGER PRIMARY KEY on ${table.name}.${table.integerKey}${note}`;
}

// Adds the columns that the user has added to the old table, with their types and defaults. Their
// other constraints are only in the text of the old CREATE TABLE, and are not copied.
function copyUserColumns(db: Database, table: string, oldName: string, path: string): string[] {
  const existing = listColumns(db, table);
  const copied: string[] = [];
  const sql = `SELECT name, type, "notnull" AS required, dflt_value, hidden FROM pragma_table_xinfo(?)`;
  for (const { name, type, required, dflt_value, hidden } of readRows(db, sql, [oldName])) {
    if (existing.includes(String(name).toLowerCase())) continue;
    // For a generated column, hidden is 2 or 3. SQLite does not return its expression, so the
    // column cannot be copied.
    if (Number(hidden) > 1)
      throw createSchemaError(
        path,
        `the key of its table ${table} cannot be restored: ${name} is a generated column`,
        `drop that column and run this again: sqlite3 "${path}" 'ALTER TABLE ${table} DROP COLUMN ${name}'`,
      );
    const notNull = required ? "NOT NULL" : "";
    const defaultValue = dflt_value === null ? "" : `DEFAULT (${dflt_value})`;
    const definition = `${quoteName(String(name))} ${type} ${notNull} ${defaultValue}`;
    db.run(`ALTER TABLE ${table} ADD COLUMN ${definition}`);
    copied.push(String(name));
  }
  return copied;
}

function restoreUniqueIndex(db: Database, table: TableRules, column: string, path: string): string {
  requireDifferentValues(db, table, table.name, column, path);
  // Two blank cells would violate the index, so store NULL. The scripts treat both in the same way.
  const isBlank = `trim(${column}) = ''`;
  if (readNumber(db, `SELECT count(*) FROM ${table.name} WHERE ${isBlank}`) > 1)
    db.run(`UPDATE ${table.name} SET ${column} = NULL WHERE ${isBlank}`);
  const indexName = findFreeName(db, `${table.name}_${column}`);
  db.run(`CREATE UNIQUE INDEX ${indexName} ON ${table.name} (${column})`);
  return `restored the UNIQUE index on ${table.name}.${column}`;
}

/**
 * Checks that no two rows have the same value in a column. Only a person can decide which of them
 * to keep.
 * @param currentName the name that the table has now, which is another one after renameTable
 * @throws SyncError (usage) for the first value that several rows have
 */
function requireDifferentValues(
  db: Database,
  { name, integerKey }: TableRules,
  currentName: string,
  column: string,
  path: string,
): void {
  const sql = `SELECT ${column} AS value, group_concat(coalesce(${integerKey}, 'NULL'), ', ') AS numbers
    FROM ${currentName} WHERE trim(${column}) <> '' GROUP BY ${column} HAVING count(*) > 1 LIMIT 1`;
  const [duplicate] = readRows(db, sql);
  if (duplicate === undefined) return;
  const value = String(duplicate.value);
  const rowNumbers = column === integerKey ? "" : ` (${integerKey} ${duplicate.numbers})`;
  // A row whose number or idempotency key is NULL gets a new one. The id of a customer must not be
  // set to NULL: the row would be sent to Square as a new customer.
  const canBeNull = column === "idempotency_key" || column === integerKey;
  const advice = canBeNull
    ? `set ${column} to NULL in all of them except one`
    : "delete all of them except one";
  // The command has the name before the rename, because this error leaves the file unchanged.
  const query = `"SELECT * FROM ${name} WHERE ${column} = '${value.replaceAll("'", "''")}'"`;
  throw createSchemaError(
    path,
    `several rows of its table ${name} have the same ${column} ${value}${rowNumbers}`,
    `${advice}: sqlite3 "${path}" ${query}`,
  );
}

// Builds SQL that returns NULL for a blank cell. A UNIQUE index allows any number of NULLs.
function buildBlankAsNull(column: string): string {
  return `iif(trim(${column}) = '', NULL, ${column})`;
}

/**
 * Moves the environment of a version 1 file to the table square_account. It is in the
 * application_id of the file, and in the log of the runs.
 */
function recordAccount(db: Database, path: string): string[] {
  if (readNumber(db, "SELECT count(*) FROM square_account") > 0) return [];
  const applicationId = readNumber(db, "PRAGMA application_id");
  const fromHeader = ENVIRONMENTS[applicationId - FIRST_APPLICATION_ID];
  const runs = readRows(
    db,
    "SELECT DISTINCT environment FROM sync_runs WHERE environment IS NOT NULL",
  );
  const environments = new Set(runs.map((run) => String(run.environment)));
  if (fromHeader !== undefined) environments.add(fromHeader);
  const [environment, ...others] = environments;
  if (environment === undefined) return [];
  if (others.length > 0)
    throw createSchemaError(
      path,
      `it holds customers of ${joinWords([environment, ...others])}`,
      "a new file with --db for each of them, and then the pulls",
    );
  db.run("INSERT INTO square_account (only_row, environment) VALUES (1, ?)", [environment]);
  // Another program can have stored its own application_id, which stays.
  if (fromHeader !== undefined) db.run("PRAGMA application_id = 0");
  return [`recorded that its customers are from ${environment}`];
}

// Clears the watermarks in two cases: the customers table was missing and is now empty, or it had
// no INTEGER PRIMARY KEY and can therefore be an old copy. In both cases, customers from before the
// watermark can be missing. They would never be read again, and a push could create them a second
// time.
function clearWatermarks(db: Database): string[] {
  db.run("UPDATE sync_runs SET watermark = NULL WHERE watermark IS NOT NULL");
  return db.getRowsModified() > 0
    ? ["cleared the watermarks, so that the next pulls read everything"]
    : [];
}
