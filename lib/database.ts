import { isDeepStrictEqual } from "node:util";
import initSqlJs, { type Database as SqlDatabase, type SqlValue } from "sql.js";
import { EXIT, SyncError } from "./errors.ts";
import { lockFile, readDatabaseFile, replaceDatabaseFile, stampOf, toRealPath } from "./file.ts";
import { columnValue, FIELDS, type Row, type Value } from "./mapping.ts";

export const SCHEMA_VERSION = 1;

/** Which Square a file belongs to, as SQLite's application id: "SQC" and a number, from the first save on. */
const APPLICATION_IDS: Record<string, number> = {
  sandbox: 0x53514301,
  production: 0x53514302,
  offline: 0x53514303,
};

// Grows with every row and every table that a step touches: a step that touched none needs no new file.
const CHANGES =
  "SELECT total_changes(), schema_version, user_version FROM pragma_schema_version, pragma_user_version";

/** A database file that is locked for this script until it is closed. */
export interface Database {
  path: string;
  read<T>(step: (db: SqlDatabase) => T): T;
  /**
   * Runs a step in one transaction and puts the result on disk. When another program has changed the
   * file meanwhile, its version is read and the step runs again on that: a step must be repeatable.
   * @throws SyncError, or what the step threw, with the file as it was
   */
  change<T>(step: (db: SqlDatabase) => T): Promise<T>;
  close(): void;
}

/**
 * Locks and reads a database file.
 * @param check refuses the database by throwing; runs whenever the file is read
 * @throws SyncError when the file is busy, damaged, missing (unless `mayBeNew`) or refused
 */
export async function openDatabase(
  name: string,
  stop: AbortSignal,
  check: Check,
  mayBeNew = false,
): Promise<Database> {
  const path = toRealPath(name);
  // Before the lock, so that a mistyped path leaves nothing behind.
  if (!mayBeNew && stampOf(path) === "missing") throw missing(name);
  const lock = await lockFile(path, stop);
  let db: SqlDatabase | undefined;
  let stamp = "";

  async function load(): Promise<SqlDatabase> {
    if (db !== undefined && stampOf(path) === stamp) return db;
    db?.close();
    db = undefined;
    const file = await readDatabaseFile(path, stop);
    if (file === undefined && !mayBeNew) throw missing(name);
    const { Database } = await initSqlJs();
    const fresh = new Database(file?.bytes);
    try {
      // Damage shows only at the page that has it: look at all pages before anything is built on them.
      const result = fresh.exec("PRAGMA quick_check(1)")[0]?.values[0]?.[0];
      if (result !== "ok") throw new Error(String(result));
    } catch (cause) {
      fresh.close();
      throw new SyncError(`Cannot open "${name}": it is damaged, or not an SQLite database`, {
        next: `look at it with: sqlite3 "${name}" "PRAGMA integrity_check", or restore a backup`,
        cause,
      });
    }
    try {
      check(fresh, name);
    } catch (error) {
      fresh.close();
      throw error;
    }
    stamp = file?.stamp ?? "missing";
    db = fresh;
    return fresh;
  }

  async function change<T>(step: (db: SqlDatabase) => T): Promise<T> {
    for (let attempt = 1; attempt <= 20; attempt++) {
      const current = await load();
      try {
        const before = readRows(current, CHANGES);
        current.run("BEGIN");
        const result = step(current);
        current.run("COMMIT");
        if (isDeepStrictEqual(readRows(current, CHANGES), before)) return result;
        const saved = replaceDatabaseFile(path, current.export(), stamp, lock);
        if (saved !== undefined) {
          stamp = saved;
          return result;
        }
      } catch (error) {
        stamp = ""; // what is in memory is not what is on disk: never build on it
        throw error;
      }
      stamp = "";
    }
    throw new SyncError(`Cannot save "${name}": another program keeps changing it`, {
      exitCode: EXIT.later,
      next: "run it again when the other program is done",
    });
  }

  try {
    await load();
  } catch (error) {
    lock.release();
    throw error;
  }
  return {
    path,
    read: (step) => {
      if (db === undefined) throw new Error("The database is closed");
      return step(db);
    },
    change,
    close() {
      db?.close();
      db = undefined;
      lock.release();
    },
  };
}

/** Refuses a database by throwing. */
export type Check = (db: SqlDatabase, path: string) => void;

/** Refuses a file that init-db has not made ready, or that belongs to another Square. */
export function checkReady(environment: string): Check {
  return (db, path) => {
    const version = readNumber(db, "PRAGMA user_version");
    if (version > SCHEMA_VERSION) throw newer(path, version);
    const tables = readRows(
      db,
      "SELECT name FROM sqlite_master WHERE name IN ('customers', 'sync_runs')",
    );
    if (version < SCHEMA_VERSION || tables.length < 2)
      throw new SyncError(`Cannot use "${path}": it has no tables of this kit yet, or old ones`, {
        exitCode: EXIT.usage,
        next: `init-db --db "${path}"`,
      });
    const id = readNumber(db, "PRAGMA application_id");
    const marked = Object.keys(APPLICATION_IDS).find((name) => APPLICATION_IDS[name] === id);
    const runs = readRows(db, "SELECT DISTINCT environment FROM sync_runs");
    const other = [marked, ...runs.map((row) => String(row.environment))].find(
      (name) => name !== undefined && name !== environment,
    );
    // Ids of one Square mean nothing to another: every customer would be doubled.
    if (other !== undefined)
      throw new SyncError(
        `Cannot use "${path}": it holds customers of ${toThe(other)}, and this run is for ${toThe(environment)}`,
        { exitCode: EXIT.usage, next: "--db with another file, or the other SQUARE_ENVIRONMENT" },
      );
  };
}

/** The error for a file of a later version of the kit: an older script would not know what it breaks. */
export function newer(path: string, version: number): SyncError {
  return new SyncError(
    `Cannot use "${path}": its schema is version ${version}, newer than this kit's ${SCHEMA_VERSION}`,
    { exitCode: EXIT.usage, next: "a newer version of the kit" },
  );
}

/** The error for a file that is not there. */
function missing(path: string): SyncError {
  return new SyncError(`Cannot open "${path}": no such file`, {
    exitCode: EXIT.usage,
    next: `init-db --db "${path}"`,
  });
}

/** Up to where a pull is known to have read everything; null = it never has. */
export function readWatermark(db: SqlDatabase, script: string): string | null {
  const [row] = readRows(db, "SELECT max(watermark) AS w FROM sync_runs WHERE script = ?", [
    script,
  ]);
  if (typeof row?.w === "string") return row.w;
  if (script !== "pull-updated") return null;
  // What was updated before the first complete pull-created was fixed, that pull has read already.
  const [first] = readRows(
    db,
    `SELECT watermark AS w FROM sync_runs WHERE script = 'pull-created' AND watermark IS NOT NULL
     ORDER BY id LIMIT 1`,
  );
  return typeof first?.w === "string" ? first.w : null;
}

const COLUMNS = FIELDS.map(({ column }) => column);
const OWNED = COLUMNS.filter((column) => column !== "id");

// Search results can be older than what a push just returned, so a lower version never overwrites.
// An unchanged row is not written at all, so that what a run changed can be told from the file.
const UPSERT = `
  INSERT INTO customers (${COLUMNS.join(", ")}, synced_at)
  VALUES (${COLUMNS.map(() => "?").join(", ")}, ?)
  ON CONFLICT (id) DO UPDATE SET
    ${OWNED.map((column) => `${column} = excluded.${column}`).join(", ")},
    synced_at = excluded.synced_at
  WHERE coalesce(excluded.version >= customers.version, 1)
    AND (${OWNED.map((column) => `customers.${column} IS NOT excluded.${column}`).join(" OR ")})`;

export interface Saved {
  inserted: number;
  updated: number;
  unchanged: number;
  linked: number;
}

/**
 * Puts customers from Square into the file: new ones are inserted, known ones updated, and one whose
 * reference_id names exactly one row that is not in Square yet *is* that row.
 */
export function saveCustomers(
  db: SqlDatabase,
  customers: Iterable<Value[]>,
  syncedAt: string,
): Saved {
  const counts: Saved = { inserted: 0, updated: 0, unchanged: 0, linked: 0 };
  const total = () => readNumber(db, "SELECT count(*) FROM customers");
  const before = total();
  const unpushed = readUnpushed(db);
  const upsert = db.prepare(UPSERT);
  const known = db.prepare("SELECT 1 FROM customers WHERE id = ?");
  const isKnown = (id: string) => known.getAsObject([id])["1"] === 1;
  let changed = 0;
  try {
    for (const values of customers) {
      const id = String(columnValue(values, "id"));
      const localId = unpushed.get(String(columnValue(values, "reference_id")));
      if (localId !== undefined && !isKnown(id)) {
        linkRow(db, localId, id);
        upsert.run([...values, syncedAt]);
        for (const [reference, row] of unpushed) if (row === localId) unpushed.delete(reference);
        counts.linked++;
        continue;
      }
      upsert.run([...values, syncedAt]);
      if (db.getRowsModified() > 0) changed++;
      else counts.unchanged++;
    }
  } finally {
    upsert.free();
    known.free();
  }
  counts.inserted = total() - before;
  counts.updated = changed - counts.inserted;
  return counts;
}

/** Gives a local row its id in Square. Its other columns follow with {@linkcode saveCustomers}. */
export function linkRow(db: SqlDatabase, localId: number, id: string): void {
  db.run("UPDATE customers SET id = ?, push_error = NULL WHERE local_id = ? AND id IS NULL", [
    id,
    localId,
  ]);
}

// The rows that Square may know by a reference_id: their own, or the key that push-new gave them. A
// reference that several rows share, in Square or not, is no name for any one of them.
function readUnpushed(db: SqlDatabase): Map<string, number | undefined> {
  const unpushed = new Map<string, number | undefined>();
  const rows = readRows(
    db,
    `SELECT local_id, reference_id, idempotency_key FROM customers WHERE id IS NULL
       AND (reference_id IS NULL OR reference_id NOT IN
         (SELECT reference_id FROM customers WHERE id IS NOT NULL AND reference_id IS NOT NULL))`,
  );
  for (const { local_id, reference_id, idempotency_key } of rows)
    for (const reference of new Set([reference_id, idempotency_key]))
      if (typeof reference === "string")
        unpushed.set(reference, unpushed.has(reference) ? undefined : Number(local_id));
  return unpushed;
}

/** A row of sync_runs, by column name. */
export type Run = Record<string, string | number | null>;

/** Adds a finished run to the history, in the same save as its customers; marks whose file this is. */
export function recordRun(db: SqlDatabase, run: Run): void {
  markEnvironment(db, String(run.environment));
  const names = Object.keys(run);
  db.run(
    `INSERT INTO sync_runs (${names.join(", ")}) VALUES (${names.map(() => "?").join(", ")})`,
    Object.values(run),
  );
}

/** Marks the file as belonging to one Square, before anything of that Square is in it. */
export function markEnvironment(db: SqlDatabase, environment: string): void {
  // Another program's mark on its own file stays.
  if (readNumber(db, "PRAGMA application_id") === 0)
    db.run(`PRAGMA application_id = ${APPLICATION_IDS[environment] ?? 0}`);
}

/** All rows of a query, by column name. */
export function readRows(db: SqlDatabase, sql: string, parameters: SqlValue[] = []): Row[] {
  const statement = db.prepare(sql, parameters);
  const rows: Row[] = [];
  while (statement.step()) rows.push(statement.getAsObject());
  statement.free();
  return rows;
}

/** The first value of a query, as a number. */
export function readNumber(db: SqlDatabase, sql: string): number {
  return Number(db.exec(sql)[0]?.values[0]?.[0] ?? 0);
}

function toThe(environment: string): string {
  return environment === "offline"
    ? "the offline Square"
    : environment === "production"
      ? environment
      : `the ${environment}`;
}
