/** The SQLite file: opened once per run, changed in whole steps. */
import { existsSync } from "node:fs";
import initSqlJs, { type Database } from "sql.js";
import {
  readAccount,
  requireSameAccount,
  type StoredAccount,
  saveAccount,
} from "./internal/account.ts";
import type { RunContext } from "./internal/context.ts";
import { messageOf, SyncError } from "./internal/errors.ts";
import {
  checkReplaceable,
  readDatabaseFile,
  readFingerprint,
  replaceDatabaseFile,
  resolveDatabasePath,
} from "./internal/file.ts";
import { acquireLock } from "./internal/lock.ts";
import { requireReady } from "./internal/schema-check.ts";
import { countWrites, readNumber, readRows } from "./internal/sql.ts";
import { COLUMNS, TABLE } from "./mapping.ts";

/** A database file that this run has locked. */
export interface DatabaseFile {
  /** The path, as the user named it. */
  path: string;
  /** Whose customers the file holds. The next update saves it. */
  account: StoredAccount | undefined;
  /** Reads from the copy in memory. `step` must not write. */
  query<T>(step: (db: Database) => T): T;
  /** Runs a step that writes, and undoes it. Nothing reaches the file. */
  simulate<T>(step: (db: Database) => T): T;
  /**
   * Runs a step in one transaction and saves the result to the file. If another program has changed the file
   * since it was read, the file is read again and the step runs again, so `step` must not keep state.
   * @throws SyncError, or what the step threw; the file is then unchanged
   */
  update<T>(step: (db: Database) => T): Promise<T>;
}

const MAX_ATTEMPTS = 20; // to save while another program keeps changing the file

// Grows with every table, column and version that a step changes.
const VERSIONS = `SELECT schema_version + user_version
  FROM pragma_schema_version, pragma_user_version`;

/**
 * Locks a database file until the script ends, and reads it. sql.js works on a copy in memory, so nothing
 * reaches the file before an update.
 * @param options.check decides whether the file can be used; by default, whether init-db has made it ready
 * @param options.mayCreate true for init-db: a missing file is then an empty database
 * @throws SyncError (usage) for a missing, unknown or unready file, and for one of another Square account;
 *   (temporary) for a file that another program uses; (failed) for a damaged file
 */
export async function openDatabase(
  context: RunContext,
  options: { check?: (db: Database, path: string) => void; mayCreate?: boolean } = {},
): Promise<DatabaseFile> {
  const { databasePath: name, square } = context;
  const path = resolveDatabasePath(name);
  if (!options.mayCreate && !existsSync(path))
    throw new SyncError(
      "usage",
      `Cannot open "${name}": no such file`,
      context.commandFor("init-db"),
    );
  const check = options.check ?? ((db: Database) => requireReady(db, context, TABLE, COLUMNS));
  const SQL = await initSqlJs();
  const lock = await acquireLock(path);
  checkReplaceable(path);
  let db = new SQL.Database();
  let fingerprint = ""; // of the file that is in memory

  async function load(): Promise<void> {
    const file = await readDatabaseFile(path);
    db.close();
    db = new SQL.Database(file.bytes);
    requireUndamaged(db, name);
    check(db, name);
    // init-db works without an account: its environment is empty.
    if (square.environment !== "") {
      const stored = options.mayCreate && isEmpty(db) ? undefined : readAccount(db, name);
      const merchantId = database.account?.merchantId ?? null;
      requireSameAccount(name, stored, { environment: square.environment, merchantId });
      database.account ??= stored;
    }
    fingerprint = file.fingerprint;
  }

  const database: DatabaseFile = {
    path: name,
    account: undefined,
    query: (step) => step(db),
    simulate(step) {
      db.run("BEGIN");
      try {
        return step(db);
      } finally {
        db.run("ROLLBACK");
      }
    },
    async update(step) {
      for (let attempt = 1; attempt <= MAX_ATTEMPTS; attempt++) {
        if (readFingerprint(path) !== fingerprint) await load().catch(throwAsFailed);
        const before = fingerprint;
        const changes = countChanges(db);
        // From here on, the copy in memory differs from the file. If the step throws, the next one reads the file.
        fingerprint = "";
        db.run("BEGIN");
        const result = step(db);
        if (database.account !== undefined) saveAccount(db, name, database.account);
        db.run("COMMIT");
        const isUnchanged = countChanges(db) === changes;
        const saved = isUnchanged
          ? before
          : replaceDatabaseFile(path, db.export(), before, lock, context.warn);
        if (saved === undefined) continue;
        fingerprint = saved;
        return result;
      }
      throw new SyncError(
        "temporary",
        `Cannot save "${name}": another program keeps changing it`,
        "run it again when that program has finished",
      );
    },
  };

  await load();
  return database;
}

function countChanges(db: Database): number {
  return countWrites(db) + readNumber(db, VERSIONS);
}

// A damaged page is only noticed when it is read. So all pages are checked before anything builds on them.
function requireUndamaged(db: Database, name: string): void {
  let reason: string;
  try {
    reason = String(readRows(db, "PRAGMA quick_check(1)")[0]?.quick_check);
  } catch (error) {
    reason = messageOf(error);
  }
  if (reason !== "ok")
    throw new SyncError(
      "failed",
      `Cannot open "${name}": it is damaged, or not an SQLite database (${reason})`,
      `sqlite3 "${name}" "PRAGMA integrity_check", or a backup`,
    );
}

function isEmpty(db: Database): boolean {
  return readNumber(db, "SELECT count(*) FROM sqlite_master") === 0;
}

// A file that cannot be used is a usage error at the start of a run. Later, something has been tried already.
function throwAsFailed(error: unknown): never {
  if (!(error instanceof SyncError) || error.kind !== "usage") throw error;
  throw new SyncError("failed", error.message, error.nextStep, error);
}
