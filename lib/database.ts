/** Opens the SQLite file once per run, and changes it in complete steps. */
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
import { countWrites, isInTransaction, readNumber, readRows } from "./internal/sql.ts";
import { COLUMNS, TABLE } from "./mapping.ts";

/** A database file that this run has locked. */
export interface DatabaseFile {
  /**
   * The Square account that the customers of the file belong to; undefined if the file has no
   * customers yet. A script can set it, and the next update saves it.
   */
  account: StoredAccount | undefined;
  /** Runs a step that only reads. */
  query<T>(step: (db: Database) => T): T;
  /** Runs a step that writes, and then undoes it. The file does not change. */
  simulate<T>(step: (db: Database) => T): T;
  /**
   * Runs a step in one transaction, and saves the result to the file. If another program has
   * changed the file since it was read, the file is read again and the step runs again. A step can
   * therefore run twice. Outside the database, it may assign to a variable, but it must not
   * increase a counter or add to an array.
   * @throws SyncError, or the error that the step threw; the file is then unchanged
   */
  update<T>(step: (db: Database) => T): Promise<T>;
}

// How often an update runs its step while another program keeps changing the file.
const MAX_ATTEMPTS = 20;

/**
 * Locks a database file until the script ends, and reads it. sql.js works on a copy in memory, so
 * the file itself only changes when an update saves the copy.
 * @param options.check throws an error if the file cannot be used; by default it accepts a file
 *   that init-db has made ready
 * @param options.mayCreate if the file does not exist, start with an empty database
 * @throws SyncError (usage) for a file that is missing, not ready, or of another Square account;
 *   (temporary) for a file that another program uses; (failed) for a damaged file
 */
export async function openDatabase(
  context: RunContext,
  options: { check?: (db: Database) => void; mayCreate?: boolean } = {},
): Promise<DatabaseFile> {
  // Messages show the path as the user wrote it. If it is a symbolic link, `path` is its target.
  const { databasePath: shownPath } = context;
  const { environment } = context.square;
  const path = resolveDatabasePath(shownPath);
  const { mayCreate = false } = options;
  if (!mayCreate && !existsSync(path))
    throw new SyncError(
      "usage",
      `Cannot open "${shownPath}": no such file`,
      context.commandFor("init-db"),
    );
  const check = options.check ?? ((db: Database) => requireReady(db, context, TABLE, COLUMNS));
  const SQL = await initSqlJs();
  const lock = await acquireLock(path);
  checkReplaceable(path);

  let db = new SQL.Database();
  // Identifies the content of the file that is in memory. It is empty while the copy in memory has
  // changes that are not in the file.
  let fingerprint = "";

  // Reads the file into memory and checks it. This happens at the start, and again before an update
  // if another program has changed the file.
  async function load(): Promise<void> {
    const file = await readDatabaseFile(path);
    db.close();
    db = new SQL.Database(file.bytes);
    requireUndamaged(db, shownPath);
    check(db);
    // A script that works without a Square account has no environment.
    if (environment !== "") database.account = checkAccountOfFile();
    fingerprint = file.fingerprint;
  }

  // Reads the account of the file, and compares it with the account of this run. At the first load,
  // only the environment of this run is known. At a later load, the seller of the token is known
  // too: a file that another program has put in the place of the first one must belong to the same
  // seller.
  function checkAccountOfFile(): StoredAccount | undefined {
    // A new file has no tables yet, so it has no account either.
    const stored = mayCreate && isEmpty(db) ? undefined : readAccount(db, shownPath);
    const current = database.account;
    const merchantId = current?.merchantId ?? null;
    requireSameAccount(shownPath, stored, { environment, merchantId });
    return current ?? stored;
  }

  // Runs a step on the copy in memory, and returns whether the step has changed it. If the step
  // throws an error, its transaction stays open: the next update reads the file again, into another
  // copy.
  function runStep<T>(step: (db: Database) => T): { result: T; hasChanges: boolean } {
    const before = countChanges(db);
    db.run("BEGIN");
    const result = step(db);
    if (database.account !== undefined) saveAccount(db, shownPath, database.account);
    db.run("COMMIT");
    return { result, hasChanges: countChanges(db) !== before };
  }

  const database: DatabaseFile = {
    account: undefined,
    query: (step) => step(db),
    simulate(step) {
      db.run("BEGIN");
      try {
        return step(db);
      } finally {
        // A trigger with ROLLBACK can have ended the transaction already.
        if (isInTransaction(db)) db.run("ROLLBACK");
      }
    },
    async update(step) {
      for (let attempt = 1; attempt <= MAX_ATTEMPTS; attempt++) {
        if (readFingerprint(path) !== fingerprint) await load().catch(throwAsFailed);
        const loadedFingerprint = fingerprint;
        // If the step throws an error, the fingerprint stays empty. The next update then reads the
        // file again, and the unfinished changes in memory are lost, as they should be.
        fingerprint = "";
        const { result, hasChanges } = runStep(step);
        const savedFingerprint = hasChanges
          ? replaceDatabaseFile(path, db.export(), loadedFingerprint, lock, context.warn)
          : loadedFingerprint;
        // undefined = nothing was saved, because another program has changed the file meanwhile.
        if (savedFingerprint === undefined) continue;
        fingerprint = savedFingerprint;
        return result;
      }
      throw new SyncError(
        "temporary",
        `Cannot save "${shownPath}": another program keeps changing it`,
        "run it again when that program has finished",
      );
    },
  };

  await load();
  return database;
}

// countWrites counts changed rows. CREATE TABLE and ALTER TABLE increase schema_version, and
// init-db also sets user_version. None of the three decreases during a step, so an equal sum means
// that the step has changed nothing.
function countChanges(db: Database): number {
  const versions = `SELECT schema_version + user_version
    FROM pragma_schema_version, pragma_user_version`;
  return countWrites(db) + readNumber(db, versions);
}

// SQLite reports a damaged page only when it reads that page. Check all pages now, so that a script
// does not find the damage after it has sent requests.
function requireUndamaged(db: Database, shownPath: string): void {
  let reason: string;
  try {
    reason = String(readRows(db, "PRAGMA quick_check(1)")[0]?.quick_check);
  } catch (error) {
    reason = messageOf(error);
  }
  if (reason !== "ok")
    throw new SyncError(
      "failed",
      `Cannot open "${shownPath}": it is damaged, or not an SQLite database (${reason})`,
      `sqlite3 "${shownPath}" "PRAGMA integrity_check", or a backup`,
    );
}

function isEmpty(db: Database): boolean {
  return readNumber(db, "SELECT count(*) FROM sqlite_master") === 0;
}

// A usage error means that nothing was tried. When an update reads the file again, the script may
// have sent requests already, so the same problem is then reported as a failure.
function throwAsFailed(error: unknown): never {
  if (!(error instanceof SyncError) || error.kind !== "usage") throw error;
  throw new SyncError("failed", error.message, error.nextStep, error);
}
