/**
 * Checks that a file has the tables that the scripts work on. The script that creates the tables runs the
 * same check as all others. So it never reports a file as ready that another script then refuses.
 */
import type { Database } from "sql.js";
import type { RunContext } from "./context.ts";
import { messageOf, SyncError } from "./errors.ts";
import { joinWords, listColumns, quoteName, readNumber, readRows } from "./sql.ts";
import { is2018Table } from "./upgrade-2018.ts";

/** The `user_version` that schema.sql sets. */
export const SCHEMA_VERSION = 2;

/** What the mapping defines of the schema, and the name of the file for commands in messages. */
export interface ExpectedSchema {
  /** The name of the customers table. */
  table: string;
  /** The columns of the customers table that hold fields of Square. */
  columns: readonly string[];
  /** The SQLite file, as the user named it. */
  path: string;
}

export interface SchemaProblem {
  /** Completes the sentence `Cannot use "database.db": …`. */
  problem: string;
  /** True when the script that creates the tables can repair it. */
  isRepairable: boolean;
  /** What a person can do about it when that script cannot. */
  nextStep: string;
}

/** What the scripts need of a table. */
export interface TableRules {
  name: string;
  /** The columns that the scripts use under exactly these names. */
  columns: readonly string[];
  /** An existing table that has these columns is a table of this kit. */
  markers: readonly string[];
  /** The column that SQLite fills with the number of the row: INTEGER PRIMARY KEY. */
  rowNumber: string;
  /** The columns that have a UNIQUE index each. */
  uniqueColumns: readonly string[];
}

const COUNTS =
  "fetched inserted updated unchanged linked deleted merged created refused held requests retries";

/** The tables of the kit. */
export function listTables({ table, columns }: Omit<ExpectedSchema, "path">): TableRules[] {
  const own =
    "local_id id version source synced_at idempotency_key push_error deleted_at merged_into";
  return [
    {
      name: table,
      columns: [...new Set([...own.split(" "), ...columns])],
      markers: ["local_id", "id"],
      rowNumber: "local_id",
      uniqueColumns: ["id", "idempotency_key"],
    },
    {
      name: "sync_runs",
      columns: `id script environment started_at finished_at since until watermark ${COUNTS}`.split(
        " ",
      ),
      markers: ["script", "watermark"],
      rowNumber: "id",
      uniqueColumns: [],
    },
    {
      name: "square_account",
      columns:
        "only_row environment merchant_id token_hash token_scopes token_expires_at checked_at".split(
          " ",
        ),
      markers: ["only_row", "environment"],
      rowNumber: "only_row",
      uniqueColumns: [],
    },
  ];
}

/** Finds the first reason why the scripts cannot work on a file. Changes nothing in it. */
export function findSchemaProblem(
  db: Database,
  expected: ExpectedSchema,
): SchemaProblem | undefined {
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
  const foreign = tables.map(({ name, markers }) => findForeignTable(db, name, markers));
  const missing = tables.filter(({ name }) => listColumns(db, name).length === 0);
  return (
    foreign.find((problem) => problem !== undefined) ??
    describeMissingTables(missing, expected, tables.length) ??
    describeOldVersion(db, version, expected.table) ??
    findMissingColumn(db, tables) ??
    findMissingKey(db, tables) ??
    findBrokenStatement(db, tables, expected.path)
  );
}

/**
 * Refuses a file that is not ready.
 * @throws SyncError (usage)
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

/** Builds the error of a problem, with the step that helps the person who ran the script. */
export function createSchemaError(path: string, problem: string, nextStep: string): SyncError {
  return new SyncError("usage", `Cannot use "${path}": ${problem}`, nextStep);
}

// A table of another program can have the same name by chance. Its rows must not be sent to Square.
function findForeignTable(
  db: Database,
  name: string,
  markers: readonly string[],
): SchemaProblem | undefined {
  const nextStep = "another file with --db";
  // The columns of a view or virtual table cannot always be read here, so they come before the columns.
  const sql = `SELECT iif(type = 'view', 'view', 'virtual table') AS kind FROM sqlite_master
    WHERE lower(name) = lower(?) AND (type = 'view' OR sql LIKE 'CREATE VIRTUAL%')`;
  const [other] = readRows(db, sql, [name]);
  if (other)
    return {
      problem: `its ${name} is a ${other.kind}, not a table`,
      isRepairable: false,
      nextStep,
    };
  const columns = listColumns(db, name);
  const isOurs = markers.every((marker) => columns.includes(marker)) || is2018Table(columns);
  if (columns.length === 0 || isOurs) return undefined;
  const problem = `its table ${name} belongs to another program`;
  return { problem, isRepairable: false, nextStep };
}

function describeMissingTables(
  missing: TableRules[],
  { table }: ExpectedSchema,
  all: number,
): SchemaProblem | undefined {
  if (missing.length === 0) return undefined;
  const names = missing.map(({ name }) => name);
  const problem =
    missing.length === all
      ? "it has no tables of these scripts"
      : `it has no ${names.length > 1 ? "tables" : "table"} named ${joinWords(names)}`;
  // If the tables are still missing after schema.sql was run, then schema.sql does not create them.
  const source = names.includes(table) ? `: lib/mapping.ts expects ${table}` : "";
  const nextStep = `let lib/schema.sql create ${joinWords(names)}${source}`;
  return { problem, isRepairable: true, nextStep };
}

function describeOldVersion(
  db: Database,
  version: number,
  table: string,
): SchemaProblem | undefined {
  const nextStep = `let lib/schema.sql end with PRAGMA user_version = ${SCHEMA_VERSION};`;
  const needed = `these scripts need version ${SCHEMA_VERSION}`;
  if (is2018Table(listColumns(db, table)))
    return {
      problem: `its table ${table} is from 2018, and ${needed}`,
      isRepairable: true,
      nextStep,
    };
  if (version === SCHEMA_VERSION) return undefined;
  return {
    problem: `its schema has version ${version}, and ${needed}`,
    isRepairable: true,
    nextStep,
  };
}

function findMissingColumn(db: Database, tables: TableRules[]): SchemaProblem | undefined {
  for (const { name, columns } of tables) {
    const existing = listColumns(db, name);
    const missing = columns.find((column) => !existing.includes(column.toLowerCase()));
    if (missing === undefined) continue;
    return {
      problem: `its table ${name} has no column named ${missing}`,
      isRepairable: true,
      nextStep: `add a line for the column ${missing} to the table ${name} in lib/schema.sql`,
    };
  }
  return undefined;
}

function findMissingKey(db: Database, tables: TableRules[]): SchemaProblem | undefined {
  for (const table of tables) {
    const [key] = listMissingKeys(db, table);
    if (key === undefined) continue;
    const rule = key === table.rowNumber ? "INTEGER PRIMARY KEY" : "UNIQUE index";
    return {
      problem: `its table ${table.name} has no ${rule} on ${key}`,
      isRepairable: true,
      nextStep: `declare ${key} in lib/schema.sql as it was: ${rule === "UNIQUE index" ? "UNIQUE" : rule}`,
    };
  }
  return undefined;
}

/**
 * Lists the columns of a table that have lost their key, for example in a table that was copied with
 * `CREATE TABLE … AS SELECT`, which copies the rows and no keys.
 */
export function listMissingKeys(db: Database, table: TableRules): string[] {
  const { name, rowNumber, uniqueColumns } = table;
  // SQLite numbers new rows only in a column that is an INTEGER PRIMARY KEY. For every other kind of primary
  // key, such as INT PRIMARY KEY, it keeps an index, which the second query finds.
  const isNumbered =
    readNumber(db, "SELECT pk = 1 FROM pragma_table_xinfo(?) WHERE lower(name) = ?", [
      name,
      rowNumber,
    ]) === 1 &&
    readNumber(db, "SELECT count(*) FROM pragma_index_list(?) WHERE origin = 'pk'", [name]) === 0;
  const missing = uniqueColumns.filter((column) => {
    // Preparing the statement does not run it. SQLite refuses it without a matching UNIQUE index.
    const sql = `INSERT INTO ${name} (${column}) VALUES (NULL) ON CONFLICT (${column}) DO NOTHING`;
    return tryPrepare(db, sql)?.includes("ON CONFLICT") === true;
  });
  return isNumbered ? missing : [rowNumber, ...missing];
}

/**
 * Finds a trigger, index or rule of the user's own that SQLite in this script cannot run, for example because
 * it calls a function that another program defines, or needs FTS5, which sql.js does not have. Without this
 * check the save would fail after customers were created in Square. Preparing a statement compiles all
 * triggers that it can fire, and runs nothing.
 */
function findBrokenStatement(
  db: Database,
  tables: TableRules[],
  path: string,
): SchemaProblem | undefined {
  for (const { name, columns, rowNumber } of tables) {
    const marks = columns.map(() => "?").join(", ");
    const written = columns.filter((column) => column !== rowNumber);
    const statements = [
      `SELECT ${columns.join(", ")} FROM ${name}`,
      `INSERT INTO ${name} (${columns.join(", ")}) VALUES (${marks})`,
      `UPDATE ${name} SET ${written.map((column) => `${column} = ?`).join(", ")} WHERE ${rowNumber} = ?`,
      `DELETE FROM ${name} WHERE ${rowNumber} = ?`,
    ];
    for (const statement of statements) {
      const reason = tryPrepare(db, statement);
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
  const drop = `DROP ${type.toUpperCase()} ${/^\w+$/.test(name) ? name : quoteName(name)}`;
  return {
    problem: `the ${type} ${name} of its table ${table} cannot run in this script: ${reason}`,
    isRepairable: false,
    nextStep: `write the ${type} without that, or remove it: sqlite3 "${path}" '${drop}'`,
  };
}

// The reason that SQLite gives does not name the trigger or index. So they are dropped one after the other
// until the statement can be prepared. The one that was dropped last is broken. A rollback to the savepoint
// restores all of them.
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
    for (const { type, name } of candidates) {
      db.run(`DROP ${type} ${quoteName(String(name))}`);
      if (tryPrepare(db, statement) === undefined)
        return { type: String(type), name: String(name) };
    }
    return undefined;
  } finally {
    db.run("ROLLBACK TO find_culprit; RELEASE find_culprit");
  }
}

/** Compiles a statement without running it. Returns the reason why that is not possible. */
function tryPrepare(db: Database, sql: string): string | undefined {
  try {
    db.prepare(sql).free();
    return undefined;
  } catch (error) {
    return messageOf(error);
  }
}
