import { isDeepStrictEqual } from "node:util";
import initSqlJs, { type Database as SqlDatabase, type SqlValue } from "sql.js";
import { EXIT, SyncError } from "./errors.ts";
import * as files from "./file.ts";
import { columnValue, FIELDS, type Value } from "./mapping.ts";

const SCHEMA_VERSION = 1;

// Whose customers a file holds, marked in its header ("SQC" and a number) before the first is in it.
const MARKS: Record<string, number> = {
  sandbox: 0x53514301,
  production: 0x53514302,
  offline: 0x53514303,
};

// Grows with every row and table that a step touches: a step that touched none needs no new file.
const TOUCHED = `SELECT total_changes(), schema_version, user_version
  FROM pragma_schema_version, pragma_user_version`;

/** Refuses a database by throwing. */
export type Check = (db: SqlDatabase, path: string) => void;

/** A row of a query, by column name. */
export type Row = Record<string, SqlValue>;

/** A database file that is locked for this script until it is closed. */
export interface Database {
  read<T>(step: (db: SqlDatabase) => T): T;
  /**
   * Runs a step in one transaction and puts the result on disk. When another program changed the file
   * meanwhile, its version is read and the step runs again on that.
   * @throws SyncError, or what the step threw, with the file as it was
   */
  change<T>(step: (db: SqlDatabase) => T): Promise<T>;
  close(): void;
}

/**
 * Locks and reads a database file.
 * @param check runs whenever the file is read
 * @throws SyncError when the file is busy, damaged, refused, or missing and not `mayBeNew`
 */
export async function openDatabase(
  name: string,
  stop: AbortSignal,
  check: Check,
  mayBeNew: boolean,
): Promise<Database> {
  const path = files.toRealPath(name);
  if (!mayBeNew && files.isMissing(path))
    throw new SyncError(`Cannot open "${name}": no such file`, EXIT.usage, toInit(name));
  const lock = await files.lockFile(path, stop);
  let db: SqlDatabase | undefined;
  let stamp = "";

  async function load(): Promise<SqlDatabase> {
    if (db !== undefined && files.stampOf(path) === stamp) return db;
    const { Database } = await initSqlJs();
    const file = await files.readDatabaseFile(path, stop);
    db?.close();
    db = new Database(file.bytes);
    stamp = file.stamp;
    let health: unknown;
    try {
      // Damage shows only at the page that has it: look at all of them before building on any.
      health = readRows(db, "PRAGMA quick_check(1)")[0]?.quick_check;
    } catch (error) {
      health = error;
    }
    if (health !== "ok")
      throw new SyncError(
        `Cannot open "${name}": it is damaged, or no SQLite database`,
        EXIT.failed,
        `sqlite3 "${name}" "PRAGMA integrity_check", or a backup`,
        health,
      );
    check(db, name);
    return db;
  }

  async function change<T>(step: (db: SqlDatabase) => T): Promise<T> {
    for (let attempt = 1; attempt <= 20; attempt++) {
      const current = await load();
      const before = readRows(current, TOUCHED);
      const from = stamp;
      stamp = ""; // from here on, what is in memory is not what is on disk
      current.run("BEGIN");
      const result = step(current);
      current.run("COMMIT");
      const isSame = isDeepStrictEqual(readRows(current, TOUCHED), before);
      const saved = isSame ? from : files.replaceDatabaseFile(path, current.export(), from, lock);
      if (saved === undefined) continue;
      stamp = saved;
      return result;
    }
    throw new SyncError(
      `Cannot save "${name}": another program keeps changing it`,
      EXIT.later,
      "run it again when the other program is done",
    );
  }

  function close(): void {
    db?.close();
    lock.release();
  }

  try {
    await load();
  } catch (error) {
    close();
    throw error;
  }
  return {
    read: (step) => {
      if (db === undefined) throw new Error("the database is not open");
      return step(db);
    },
    change,
    close,
  };
}

/** Refuses a file of a later version: an older script would not know what it breaks. */
export const checkVersion: Check = (db, path) => {
  const version = readNumber(db, "PRAGMA user_version");
  if (version > SCHEMA_VERSION)
    throw new SyncError(
      `Cannot use "${path}": its schema has version ${version}, and this kit knows ${SCHEMA_VERSION}`,
      EXIT.usage,
      "a newer version of the kit",
    );
};

/** Refuses a file that init-db has not made ready, or that belongs to another Square. */
export function checkReady(environment: string): Check {
  return (db, path) => {
    checkVersion(db, path);
    const tables = "SELECT count(*) FROM sqlite_master WHERE name IN ('customers', 'sync_runs')";
    if (readNumber(db, "PRAGMA user_version") < SCHEMA_VERSION || readNumber(db, tables) < 2)
      throw new SyncError(
        `Cannot use "${path}": the tables of this kit are not in it`,
        EXIT.usage,
        toInit(path),
      );
    const mark = readNumber(db, "PRAGMA application_id");
    const runs = readRows(db, "SELECT DISTINCT environment FROM sync_runs");
    const owners = runs.map((run) => String(run.environment));
    owners.push(...Object.keys(MARKS).filter((name) => MARKS[name] === mark));
    const other = owners.find((name) => name !== environment);
    // The ids of one Square mean nothing to another: every customer would be doubled.
    if (other !== undefined)
      throw new SyncError(
        `Cannot use "${path}": it holds customers of ${toThe(other)}, and this run is for ${toThe(environment)}`,
        EXIT.usage,
        "another file with --db, or the other SQUARE_ENVIRONMENT",
      );
  };
}

/** Up to where a script is known to have read everything; null = it never has. */
export function readWatermark(db: SqlDatabase, script: string): string | null {
  const [last] = readRows(
    db,
    "SELECT max(watermark) AS watermark FROM sync_runs WHERE script = ?",
    [script],
  );
  // What was changed before the first complete pull-created was fixed, that run has read already.
  const [first] = readRows(
    db,
    `SELECT watermark FROM sync_runs
     WHERE script = 'pull-created' AND ? = 'pull-updated' AND watermark IS NOT NULL
     ORDER BY id LIMIT 1`,
    [script],
  );
  const watermark = last?.watermark ?? first?.watermark;
  return typeof watermark === "string" ? watermark : null;
}

const COLUMNS = FIELDS.map(({ column }) => column);
const SET = COLUMNS.filter((column) => column !== "id");

// A search can answer with less than a push has just returned: a lower version never overwrites. A row
// that is the same already is not written, so that "unchanged" is true of the file.
const UPSERT = `
  INSERT INTO customers (${COLUMNS.join(", ")}, synced_at)
  VALUES (${COLUMNS.map(() => "?").join(", ")}, ?)
  ON CONFLICT (id) DO UPDATE SET
    ${SET.map((column) => `${column} = excluded.${column}`).join(", ")},
    synced_at = excluded.synced_at
  WHERE coalesce(excluded.version >= customers.version, TRUE)
    AND (${SET.map((column) => `customers.${column} IS NOT excluded.${column}`).join(" OR ")})`;

/**
 * Puts customers of Square's into the file. One whose reference_id is that of exactly one row that is
 * not in Square yet *is* that row, and is linked to it.
 * @param customers as {@linkcode toValues} makes them
 */
export function saveCustomers(db: SqlDatabase, customers: Iterable<Value[]>, now: string) {
  const counts = { inserted: 0, updated: 0, unchanged: 0, linked: 0 };
  const countRows = () => readNumber(db, "SELECT count(*) FROM customers");
  const before = countRows();
  const unpushed = readUnpushed(db);
  const known = db.prepare("SELECT local_id FROM customers WHERE id = ?");
  const upsert = db.prepare(UPSERT);
  for (const values of customers) {
    const id = columnValue(values, "id");
    const localId = unpushed.get(columnValue(values, "reference_id"));
    const isNew = known.get([id]).length === 0;
    const isLink = localId !== undefined && isNew && linkRow(db, "local_id", localId, id);
    if (isLink) counts.linked++;
    upsert.run([...values, now]);
    if (db.getRowsModified() === 0) counts.unchanged++;
    else if (!isLink) counts.updated++;
  }
  known.free();
  upsert.free();
  counts.inserted = countRows() - before;
  counts.updated -= counts.inserted;
  return counts;
}

/** Gives a row its id in Square, unless it has one; what else Square says of it is saved after that. */
export function linkRow(
  db: SqlDatabase,
  column: "local_id" | "idempotency_key",
  name: Value,
  id: Value,
): boolean {
  const sql = `UPDATE customers SET id = ?, push_error = NULL WHERE ${column} = ? AND id IS NULL`;
  return db.run(sql, [id, name]).getRowsModified() === 1;
}

/**
 * Which row that Square lacks goes by a reference_id: its own, or the key that push-new gave it. What
 * several rows share, in Square or not, is the name of none of them.
 */
export function readUnpushed(db: SqlDatabase): Map<Value, number> {
  // NULL is nobody's name either, and NULL NOT IN (nothing) is true.
  const rows = readRows(
    db,
    `SELECT reference, min(local_id) AS local_id FROM (
       SELECT reference_id AS reference, local_id FROM customers WHERE id IS NULL
       UNION SELECT idempotency_key, local_id FROM customers WHERE id IS NULL)
     WHERE reference IS NOT NULL AND reference NOT IN (
       SELECT reference_id FROM customers WHERE id IS NOT NULL AND reference_id IS NOT NULL)
     GROUP BY reference HAVING count(*) = 1`,
  );
  return new Map(rows.map((row) => [String(row.reference), Number(row.local_id)]));
}

/**
 * Adds a finished run to the history, in the same save as its customers.
 * @param run a row of sync_runs, by column name
 */
export function recordRun(db: SqlDatabase, run: Record<string, string | number | null>): void {
  markEnvironment(db, String(run.environment));
  const names = Object.keys(run);
  const values = names.map(() => "?").join(", ");
  db.run(`INSERT INTO sync_runs (${names.join(", ")}) VALUES (${values})`, Object.values(run));
}

/** Marks whose customers the file holds, unless another program has put a mark of its own there. */
export function markEnvironment(db: SqlDatabase, environment: string): void {
  if (readNumber(db, "PRAGMA application_id") === 0)
    db.run(`PRAGMA application_id = ${MARKS[environment] ?? 0}`);
}

/** All rows of a query. */
export function readRows(db: SqlDatabase, sql: string, values: SqlValue[] = []): Row[] {
  const statement = db.prepare(sql, values);
  const rows: Row[] = [];
  while (statement.step()) rows.push(statement.getAsObject());
  statement.free();
  return rows;
}

/** The first value of a query, as a number. */
export function readNumber(db: SqlDatabase, sql: string): number {
  return Number(db.exec(sql)[0]?.values[0]?.[0] ?? 0);
}

function toInit(path: string): string {
  return `init-db --db "${path}"`;
}

function toThe(environment: string): string {
  if (environment === "production") return environment;
  return environment === "offline" ? "the offline Square" : `the ${environment}`;
}
