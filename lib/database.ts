/**
 * Opens the SQLite file for a moment. No script keeps it open, and no script remembers its content
 * from one step to the next. So other programs and scripts may change it between two steps.
 */
import { existsSync } from "node:fs";
import type { Database, SqlJsStatic } from "sql.js";
import { messageOf, SyncError } from "./internal/errors.ts";
import { changeFile, readFile } from "./internal/file.ts";
import { readValue } from "./internal/sql.ts";
import { compareSchema, type Difference, readSchema, requireSchema } from "./schema.ts";

/**
 * Reads the file in one step. The step works on a copy in memory, so what it writes is lost. A dry
 * run uses that.
 * @throws SyncError (usage) for a file that is missing or lacks a table or column; (failed) for a
 *   damaged one; (temporary) for one that another program has open
 */
export async function readDatabase<T>(path: string, step: (db: Database) => T): Promise<T> {
  requireExistingFile(path);
  const SQL = await loadSqlite();
  const bytes = await readFile(path);
  return runInCopy(SQL, bytes, path, (db, differences) => {
    requireSchema(differences, path);
    return step(db);
  });
}

/**
 * Changes the file in one step: locks it, reads its newest content, runs `step` in a transaction,
 * and replaces the file. If the script is killed, the file has either its old or its new content.
 * A step is short and makes no request, so no other script waits long. It can run twice, so it has
 * no effects outside the database.
 * @throws SyncError as {@linkcode readDatabase} does, or the error of the step; the file is then
 *   unchanged
 */
export async function updateDatabase<T>(path: string, step: (db: Database) => T): Promise<T> {
  return await createOrUpdateDatabase(path, (db, differences) => {
    requireSchema(differences, path);
    return step(db);
  });
}

/**
 * Changes the file like {@linkcode updateDatabase}, but does not require that it exists and has
 * the tables. init-db uses it.
 * @param step its second parameter is what differs from schema.sql
 */
export async function createOrUpdateDatabase<T>(
  path: string,
  step: (db: Database, differences: Difference[]) => T,
): Promise<T> {
  const SQL = await loadSqlite();
  return await changeFile(path, (bytes) =>
    runInCopy(SQL, bytes, path, (db, differences) => {
      const before = countChanges(db);
      db.run("BEGIN");
      const result = step(db, differences);
      // Fails after a trigger of your own with ROLLBACK, which has undone everything. The file then
      // stays as it is.
      db.run("COMMIT");
      const isChanged = countChanges(db) !== before;
      return { result, content: isChanged ? db.export() : undefined };
    }),
  );
}

/** Loads SQLite, which --help does not need. */
async function loadSqlite(): Promise<SqlJsStatic> {
  const { default: initSqlJs } = await import("sql.js");
  return await initSqlJs();
}

function requireExistingFile(path: string): void {
  if (!existsSync(path))
    throw new SyncError(
      "usage",
      `Cannot open "${path}": no such file`,
      "init-db, which creates it; or the folder of your file, or its path with --db",
    );
}

/** Opens a copy of the file in memory for one step. */
function runInCopy<T>(
  SQL: SqlJsStatic,
  bytes: Uint8Array,
  path: string,
  step: (db: Database, differences: Difference[]) => T,
): T {
  const db = new SQL.Database(bytes);
  try {
    requireUndamaged(db, path);
    return step(db, compareSchema(db, getReference(SQL)));
  } finally {
    db.close();
  }
}

// SQLite reports a damaged page only when it reads that page. Check all pages now, so that a script
// does not find the damage after it has sent requests.
function requireUndamaged(db: Database, path: string): void {
  let reason: string;
  try {
    reason = String(readValue(db, "PRAGMA quick_check(1)"));
  } catch (error) {
    reason = messageOf(error);
  }
  if (reason !== "ok")
    throw new SyncError(
      "failed",
      `Cannot open "${path}": it is damaged, or not an SQLite database (${reason})`,
      "a backup; PRAGMA integrity_check in sqlite3 lists the damage",
    );
}

let reference: Database | undefined;

/** Returns a database in which only schema.sql has run. It is made once, because it never changes. */
function getReference(SQL: SqlJsStatic): Database {
  if (reference === undefined) {
    reference = new SQL.Database();
    reference.exec(readSchema());
  }
  return reference;
}

// Counts changed rows, and changes of the tables and of the version.
function countChanges(db: Database): number {
  const sql = `SELECT total_changes() + schema_version + user_version
    FROM pragma_schema_version, pragma_user_version`;
  return Number(readValue(db, sql));
}
