/**
 * Checks that a file has the tables that the scripts need. All scripts run this check, including
 * init-db. So if init-db reports a file as ready, every script can use it.
 */
import type { Database } from "sql.js";
import type { RunContext } from "./context.ts";
import { messageOf, SyncError } from "./errors.ts";
import { joinWords } from "./report.ts";
import { listColumns, listDeclaredColumns, quoteName, readNumber, readRows } from "./sql.ts";
import { is2018Table } from "./upgrade-2018.ts";

/** The `user_version` that schema.sql sets. */
export const SCHEMA_VERSION = 2;

/** What the scripts expect of a file. */
export interface ExpectedSchema {
  /** The name of the customers table. */
  table: string;
  /** The columns of the customers table that hold fields of Square, as lib/mapping.ts lists them. */
  columns: readonly string[];
  /** The path of the file, as the user wrote it. It is used only in messages. */
  path: string;
}

export interface SchemaProblem {
  /** The end of the message `Cannot use "database.db": …`. */
  problem: string;
  /** True if init-db can repair the file. */
  isRepairable: boolean;
  /**
   * What to do after init-db has run. For a problem that is not repairable, it is a step for the
   * user. For a repairable one, it names what lib/schema.sql lacks, because init-db has run that
   * file and the problem is still there.
   */
  nextStep: string;
}

/** What the scripts need of a table. */
export interface TableRules {
  name: string;
  /** The columns that the table must have. */
  columns: readonly string[];
  /** A table without these columns belongs to another program. */
  markers: readonly string[];
  /** The column that must be the INTEGER PRIMARY KEY. SQLite numbers new rows in it. */
  integerKey: string;
  /** Each of these columns must have a UNIQUE index. */
  uniqueColumns: readonly string[];
}

/** The columns of the customers table that the scripts use under exactly these names. */
export const SCRIPT_COLUMNS: readonly string[] = [
  "local_id",
  "id",
  "version",
  "source",
  "synced_at",
  "idempotency_key",
  "push_error",
  "deleted_at",
  "merged_into",
];

const RUN_COLUMNS = [
  "id",
  "script",
  "environment",
  "started_at",
  "finished_at",
  "since",
  "until",
  "watermark",
  "fetched",
  "inserted",
  "updated",
  "unchanged",
  "linked",
  "deleted",
  "merged",
  "created",
  "refused",
  "held",
  "requests",
  "retries",
];

const ACCOUNT_COLUMNS = [
  "only_row",
  "environment",
  "merchant_id",
  "token_hash",
  "token_scopes",
  "token_expires_at",
  "checked_at",
];

/** Lists the tables that the scripts need. */
export function listTables({ table, columns }: ExpectedSchema): TableRules[] {
  return [
    {
      name: table,
      columns: [...new Set([...SCRIPT_COLUMNS, ...columns])],
      markers: ["local_id", "id"],
      integerKey: "local_id",
      uniqueColumns: ["id", "idempotency_key"],
    },
    {
      name: "sync_runs",
      columns: RUN_COLUMNS,
      markers: ["script", "watermark"],
      integerKey: "id",
      uniqueColumns: [],
    },
    {
      name: "square_account",
      columns: ACCOUNT_COLUMNS,
      markers: ["only_row", "environment"],
      integerKey: "only_row",
      uniqueColumns: [],
    },
  ];
}

/** Finds the first reason why the scripts cannot use a file. The file stays unchanged. */
export function findSchemaProblem(
  db: Database,
  expected: ExpectedSchema,
): SchemaProblem | undefined {
  // A user can edit lib/mapping.ts. Without these two columns, no file is usable.
  const missingField = ["id", "version"].find((column) => !expected.columns.includes(column));
  if (missingField !== undefined)
    return {
      problem: `lib/mapping.ts has no column named ${missingField}`,
      isRepairable: false,
      nextStep: `call it ${missingField} again: the scripts find and compare customers by it`,
    };

  const version = readNumber(db, "PRAGMA user_version");
  if (version > SCHEMA_VERSION)
    return {
      problem: `its schema has version ${version}, and these scripts know versions up to ${SCHEMA_VERSION}`,
      isRepairable: false,
      nextStep: "a newer version of the scripts, or another file with --db",
    };

  const tables = listTables(expected);
  return (
    findForeignTable(db, tables) ??
    findMissingTables(db, tables, expected.table) ??
    findOldVersion(db, version, expected.table) ??
    findMissingColumn(db, tables) ??
    findMissingConstraint(db, tables) ??
    findReplacingConstraint(db, tables, expected.path) ??
    findBrokenStatement(db, tables, expected.path)
  );
}

/**
 * Checks that a file is ready for a script.
 * @throws SyncError (usage) if it is not
 */
export function requireReady(
  db: Database,
  context: RunContext,
  table: string,
  columns: readonly string[],
): void {
  const path = context.databasePath;
  const found = findSchemaProblem(db, { table, columns, path });
  if (found === undefined) return;
  const { problem, isRepairable, nextStep } = found;
  if (!isRepairable) throw createSchemaError(path, problem, nextStep);
  const repair = context.commandFor("init-db") ?? "the script that created the file";
  throw createSchemaError(path, problem, repair);
}

/** Creates the error for a file that a script cannot use. */
export function createSchemaError(path: string, problem: string, nextStep: string): SyncError {
  return new SyncError("usage", `Cannot use "${path}": ${problem}`, nextStep);
}

// A table of another program can have the same name by chance. Its rows must not be sent to Square.
function findForeignTable(db: Database, tables: TableRules[]): SchemaProblem | undefined {
  const nextStep = "another file with --db";
  for (const { name, markers } of tables) {
    // Check for a view or virtual table first, because sql.js cannot read the columns of all of
    // them.
    const sql = `SELECT iif(type = 'view', 'view', 'virtual table') AS kind FROM sqlite_master
      WHERE lower(name) = lower(?) AND (type = 'view' OR sql LIKE 'CREATE VIRTUAL%')`;
    const [other] = readRows(db, sql, [name]);
    if (other !== undefined) {
      const problem = `its ${name} is a ${other.kind}, not a table`;
      return { problem, isRepairable: false, nextStep };
    }
    const columns = listColumns(db, name);
    const isMissing = columns.length === 0;
    const isOurs = markers.every((marker) => columns.includes(marker)) || is2018Table(columns);
    if (!isMissing && !isOurs) {
      const problem = `its table ${name} belongs to another program`;
      return { problem, isRepairable: false, nextStep };
    }
  }
  return undefined;
}

function findMissingTables(
  db: Database,
  tables: TableRules[],
  customersTable: string,
): SchemaProblem | undefined {
  const missing = tables
    .map(({ name }) => name)
    .filter((name) => listColumns(db, name).length === 0);
  if (missing.length === 0) return undefined;
  const names = joinWords(missing);
  const noun = missing.length > 1 ? "tables" : "table";
  let problem = `it has no ${noun} named ${names}`;
  if (missing.length === tables.length) problem = "it has no tables of these scripts";
  const reason = missing.includes(customersTable)
    ? `: lib/mapping.ts expects ${customersTable}`
    : "";
  const nextStep = `let lib/schema.sql create ${names}${reason}`;
  return { problem, isRepairable: true, nextStep };
}

function findOldVersion(db: Database, version: number, table: string): SchemaProblem | undefined {
  const is2018 = is2018Table(listColumns(db, table));
  if (!is2018 && version === SCHEMA_VERSION) return undefined;
  const state = is2018 ? `its table ${table} is from 2018` : `its schema has version ${version}`;
  return {
    problem: `${state}, and these scripts need version ${SCHEMA_VERSION}`,
    isRepairable: true,
    nextStep: `let lib/schema.sql end with PRAGMA user_version = ${SCHEMA_VERSION};`,
  };
}

// The case of the letters counts: SQLite returns a value under the name that was declared, and the
// scripts would not find Email_Address under email_address.
function findMissingColumn(db: Database, tables: TableRules[]): SchemaProblem | undefined {
  for (const { name, columns } of tables) {
    const existing = listDeclaredColumns(db, name);
    const missing = columns.find((column) => !existing.includes(column));
    if (missing === undefined) continue;
    return {
      problem: `its table ${name} has no column named ${missing}`,
      isRepairable: true,
      nextStep: `add a line for the column ${missing} to the table ${name} in lib/schema.sql`,
    };
  }
  return undefined;
}

function findMissingConstraint(db: Database, tables: TableRules[]): SchemaProblem | undefined {
  for (const table of tables) {
    const [column] = listMissingConstraints(db, table);
    if (column === undefined) continue;
    const isIntegerKey = column === table.integerKey;
    const constraint = isIntegerKey ? "INTEGER PRIMARY KEY" : "UNIQUE index";
    const declaration = isIntegerKey ? "INTEGER PRIMARY KEY" : "UNIQUE";
    return {
      problem: `its table ${table.name} has no ${constraint} on ${column}`,
      isRepairable: true,
      nextStep: `declare ${column} in lib/schema.sql as it was: ${declaration}`,
    };
  }
  return undefined;
}

// With this clause of a UNIQUE or PRIMARY KEY constraint, saving one customer silently deletes the
// row of another one. A NOT NULL constraint can have the clause too, and deletes nothing.
const REPLACING_CONSTRAINT =
  /\b(UNIQUE|PRIMARY\s+KEY(\s+(ASC|DESC))?)(\s*\([^)]*\))?\s+ON\s+CONFLICT\s+REPLACE\b/i;

function findReplacingConstraint(
  db: Database,
  tables: TableRules[],
  path: string,
): SchemaProblem | undefined {
  const sql = "SELECT sql FROM sqlite_master WHERE type = 'table' AND lower(name) = lower(?)";
  const table = tables.find(({ name }) =>
    REPLACING_CONSTRAINT.test(String(readRows(db, sql, [name])[0]?.sql).replace(/--.*/g, "")),
  );
  if (table === undefined) return undefined;
  return {
    problem: `its table ${table.name} has a constraint with ON CONFLICT REPLACE, which deletes other rows`,
    isRepairable: false,
    nextStep: `create the table again without that clause: sqlite3 "${path}" ".schema ${table.name}"`,
  };
}

/**
 * Lists the columns of a table that lack their INTEGER PRIMARY KEY or UNIQUE index. For example, a
 * table that was copied with `CREATE TABLE … AS SELECT` has the same rows and no constraints.
 */
export function listMissingConstraints(db: Database, table: TableRules): string[] {
  const { name, integerKey, uniqueColumns } = table;
  const missing = uniqueColumns.filter((column) => {
    // Without a UNIQUE index on the column, SQLite cannot prepare this statement. It is never run.
    const sql = `INSERT INTO ${name} (${column}) VALUES (NULL) ON CONFLICT (${column}) DO NOTHING`;
    return findPrepareError(db, sql)?.startsWith("ON CONFLICT clause does not match") === true;
  });
  return isIntegerPrimaryKey(db, name, integerKey) ? missing : [integerKey, ...missing];
}

// SQLite numbers new rows only in an INTEGER PRIMARY KEY. Any other primary key, such as INT
// PRIMARY KEY, has an index with the origin pk.
function isIntegerPrimaryKey(db: Database, table: string, column: string): boolean {
  const keySql = "SELECT pk = 1 FROM pragma_table_xinfo(?) WHERE lower(name) = ?";
  const isPrimaryKey = readNumber(db, keySql, [table, column]) === 1;
  const indexSql = "SELECT count(*) FROM pragma_index_list(?) WHERE origin = 'pk'";
  const hasIndex = readNumber(db, indexSql, [table]) > 0;
  return isPrimaryKey && !hasIndex;
}

/**
 * Finds a trigger, index or constraint of the user that sql.js cannot run. For example, it calls a
 * function that another program defines, or needs FTS5, which sql.js does not have. Without this
 * check, the save would fail after customers were created in Square. Preparing a statement compiles
 * all triggers that it can fire, and runs nothing.
 */
function findBrokenStatement(
  db: Database,
  tables: TableRules[],
  path: string,
): SchemaProblem | undefined {
  for (const { name, columns, integerKey } of tables) {
    const placeholders = columns.map(() => "?").join(", ");
    const assignments = columns
      .filter((column) => column !== integerKey)
      .map((column) => `${column} = ?`)
      .join(", ");
    const statements = [
      `SELECT ${columns.join(", ")} FROM ${name}`,
      `INSERT INTO ${name} (${columns.join(", ")}) VALUES (${placeholders})`,
      `UPDATE ${name} SET ${assignments} WHERE ${integerKey} = ?`,
      `DELETE FROM ${name} WHERE ${integerKey} = ?`,
    ];
    for (const statement of statements) {
      const reason = findPrepareError(db, statement);
      if (reason !== undefined) return describeBroken(db, name, statement, reason, path);
    }
  }
  return undefined;
}

function describeBroken(
  db: Database,
  table: string,
  statement: string,
  reason: string,
  path: string,
): SchemaProblem {
  const culprit = findCulprit(db, table, statement);
  if (culprit === undefined)
    return {
      problem: `its table ${table} cannot be written by this script: ${reason}`,
      isRepairable: false,
      nextStep: `compare its columns and rules with lib/schema.sql: sqlite3 "${path}" ".schema ${table}"`,
    };
  const { type, name } = culprit;
  const isPlainName = /^\w+$/.test(name);
  const drop = `DROP ${type.toUpperCase()} ${isPlainName ? name : quoteName(name)}`;
  return {
    problem: `the ${type} ${name} of its table ${table} cannot run in this script: ${reason}`,
    isRepairable: false,
    nextStep: `change the ${type} so that it needs only what SQLite has built in, or remove it: sqlite3 "${path}" '${drop}'`,
  };
}

// Finds the trigger or index that makes a statement fail, because SQLite's reason does not name it.
// Drops them one after the other until SQLite can prepare the statement. The last one was the
// cause. Then restores all of them with a rollback.
function findCulprit(
  db: Database,
  table: string,
  statement: string,
): { type: string; name: string } | undefined {
  const sql = `SELECT type, name FROM sqlite_master
    WHERE lower(tbl_name) = lower(?) AND type IN ('trigger', 'index') AND sql IS NOT NULL
    ORDER BY type DESC, rowid`;
  const candidates = readRows(db, sql, [table]);
  db.run("SAVEPOINT find_culprit");
  try {
    for (const candidate of candidates) {
      const type = String(candidate.type);
      const name = String(candidate.name);
      db.run(`DROP ${type} ${quoteName(name)}`);
      if (findPrepareError(db, statement) === undefined) return { type, name };
    }
    return undefined;
  } finally {
    db.run("ROLLBACK TO find_culprit; RELEASE find_culprit");
  }
}

/** Compiles a statement without running it. Returns SQLite's reason if that fails. */
function findPrepareError(db: Database, sql: string): string | undefined {
  try {
    db.prepare(sql).free();
    return undefined;
  } catch (error) {
    return messageOf(error);
  }
}
