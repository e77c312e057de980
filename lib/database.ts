/**
 * Opens the SQLite file for one step. No script keeps it open or remembers its content between two
 * steps, so other programs and scripts may change it then.
 */
import { existsSync } from "node:fs";
import initSqlJs, { type Database, type SqlJsStatic, type SqlValue } from "sql.js";
import { messageOf, SyncError } from "./internal/errors.ts";
import { changeFile, readFile } from "./internal/file.ts";
import { readValue } from "./internal/sql.ts";
import { compareSchema, type Difference, readSchema, requireSchema } from "./schema.ts";

/**
 * Reads the file in one step. What the step writes is lost, which a dry run uses.
 * @throws SyncError (usage) for a file that is missing or lacks a table or column; (failed) for a
 *   damaged one; (temporary) for one that another program has open
 */
export async function readDatabase<T>(path: string, step: (db: Database) => T): Promise<T> {
  if (!existsSync(path))
    throw new SyncError(
      "usage",
      `Cannot open "${path}": no such file`,
      "init-db, which creates it; or the folder of your file, or its path with --db",
    );
  return runInCopy(await initSqlJs(), await readFile(path), path, (db, differences) => {
    requireSchema(differences, path);
    return step(db);
  });
}

/**
 * Changes the file in one step: locks it, reads its newest content, runs `step` in a transaction,
 * and replaces the file. If the script is killed, the file has either its old or its new content.
 * A step is short and makes no request, so no other script waits long. It can run twice, so it has
 * no effects outside the database. If it throws, the file is unchanged.
 */
export async function updateDatabase<T>(path: string, step: (db: Database) => T): Promise<T> {
  return await createOrUpdateDatabase(path, (db, differences) => {
    requireSchema(differences, path);
    return step(db);
  });
}

/** The same for init-db: the file may be missing, or differ from schema.sql. */
export async function createOrUpdateDatabase<T>(
  path: string,
  step: (db: Database, differences: Difference[]) => T,
): Promise<T> {
  const SQL = await initSqlJs();
  return await changeFile(path, (bytes) =>
    runInCopy(SQL, bytes, path, (db, differences) => {
      const before = countChanges(db);
      db.run("BEGIN");
      const result = step(db, differences);
      // Fails after a trigger of your own with ROLLBACK, which has undone everything.
      db.run("COMMIT");
      return { result, content: countChanges(db) === before ? undefined : db.export() };
    }),
  );
}

function runInCopy<T>(
  SQL: SqlJsStatic,
  bytes: Uint8Array,
  path: string,
  step: (db: Database, differences: Difference[]) => T,
): T {
  const db = new SQL.Database(bytes);
  const reference = new SQL.Database();
  try {
    requireUndamaged(db, path);
    reference.exec(readSchema());
    return step(db, compareSchema(db, reference));
  } finally {
    db.close();
    reference.close();
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

// Counts changed rows, and changes of the tables and of the version.
function countChanges(db: Database): SqlValue {
  const sql = `SELECT total_changes() + schema_version + user_version
    FROM pragma_schema_version, pragma_user_version`;
  return readValue(db, sql);
}
