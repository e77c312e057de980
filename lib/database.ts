import { existsSync } from "node:fs";
import initSqlJs, { type Database as SqlDatabase, type SqlValue } from "sql.js";
import { EXIT, messageOf, SyncError, usageError } from "./errors.ts";
import * as files from "./file.ts";
import { FIELDS, type Row } from "./mapping.ts";

const SCHEMA_VERSION = 1;

// Whose customers a file can hold. The place in this list is marked in the file's header before the first
// customer is in it: a new name goes to the end, or old files change their owner.
const SQUARES: Record<string, string> = {
  sandbox: "the sandbox",
  production: "production",
  offline: "the offline Square",
};
const FIRST_MARK = 0x53514301; // "SQC" and a number

// Grows with every row, table, column and version that a step touches: where it touched none, no new
// file is needed.
const TOUCHED = `SELECT total_changes() + schema_version + user_version
  FROM pragma_schema_version, pragma_user_version`;

/** Refuses a database by throwing. */
export type Check = (db: SqlDatabase, path: string) => void;

export type Database = Awaited<ReturnType<typeof openDatabase>>;

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
) {
  const path = files.toRealPath(name);
  if (!mayBeNew && !existsSync(path))
    throw usageError(`Cannot open "${name}": no such file`, toInit(name));
  const { Database } = await initSqlJs();
  const isHeld = await files.lockFile(path, stop);
  let db = new Database();
  let stamp = ""; // of the file that is in memory

  async function load(): Promise<void> {
    const file = await files.readFile(path, stop);
    db.close();
    db = new Database(file.bytes);
    try {
      // Damage shows only at the page that has it: look at all of them before building on any.
      const health = readValue(db, "PRAGMA quick_check(1)");
      if (health !== "ok") throw new Error(String(health));
    } catch (cause) {
      throw new SyncError(
        `Cannot open "${name}": it is damaged, or no SQLite database (${messageOf(cause)})`,
        EXIT.failed,
        `sqlite3 "${name}" "PRAGMA integrity_check", or a backup`,
        cause,
      );
    }
    check(db, name);
    stamp = file.stamp;
  }

  /**
   * Runs a step in one transaction and puts the result on disk. When another program changed the file
   * meanwhile, its version is read and the step runs again on that.
   * @throws SyncError, or what the step threw, with the file as it was
   */
  async function change<T>(step: (db: SqlDatabase) => T): Promise<T> {
    for (let attempt = 1; attempt <= 20; attempt++) {
      if (files.stampOf(path) !== stamp) await load().catch(failLate);
      const from = stamp;
      const before = readNumber(db, TOUCHED);
      // From here on, memory is not what is on disk: when the step throws, the next one reads the file anew.
      stamp = "";
      db.run("BEGIN");
      const result = step(db);
      db.run("COMMIT");
      const isSame = readNumber(db, TOUCHED) === before;
      const saved = isSame ? from : files.replaceFile(path, db.export(), from, isHeld);
      if (saved === undefined) continue;
      stamp = saved;
      return result;
    }
    throw files.busy(name, "another program keeps changing it");
  }

  await load();
  return { name, read: <T>(step: (db: SqlDatabase) => T): T => step(db), change };
}

/** Refuses a file of a later version: an older script would not know what it breaks. */
export const checkVersion: Check = (db, path) => {
  const version = readNumber(db, "PRAGMA user_version");
  const state = `its schema has version ${version}, and this kit knows ${SCHEMA_VERSION}`;
  if (version > SCHEMA_VERSION) throw refusal(path, state, "a newer version of the kit");
};

/** Refuses a file that init-db has not made ready, or that belongs to another Square. */
export function checkReady(environment: string): Check {
  return (db, path) => {
    checkVersion(db, path);
    const tables = "SELECT count(*) FROM sqlite_master WHERE name IN ('customers', 'sync_runs')";
    const version = readNumber(db, "PRAGMA user_version");
    if (version !== SCHEMA_VERSION || readNumber(db, tables) < 2)
      throw refusal(path, "the tables of this kit are not in it", toInit(path));
    try {
      // A field that was added to mapping.ts may have no column yet: after a call that is too late to learn.
      db.prepare(UPSERT).free();
    } catch (error) {
      throw refusal(path, messageOf(error), toInit(path));
    }
    // The ids of one Square mean nothing to another: every customer would be there twice.
    const marked = Object.keys(SQUARES)[readNumber(db, "PRAGMA application_id") - FIRST_MARK];
    const runs = readRows(db, "SELECT DISTINCT environment FROM sync_runs");
    const owners = [marked ?? environment, ...runs.map((run) => String(run.environment))];
    const other = owners.find((name) => name !== environment);
    if (other === undefined) return;
    const [theirs, ours] = [other, environment].map((name) => SQUARES[name] ?? name);
    const state = `it holds customers of ${theirs}, and this run is for ${ours}`;
    const next = "SQUARE_ENVIRONMENT and SQUARE_BASE_URL as they were; or another file with --db";
    throw refusal(path, state, next);
  };
}

/** Up to where a script is known to have read everything; null = it never has. */
export function readWatermark(db: SqlDatabase, script: string): string | null {
  // What was changed before the first complete pull-created was fixed, that run has read already.
  const sql = `SELECT coalesce(
      (SELECT watermark FROM sync_runs WHERE script = ?1 AND watermark IS NOT NULL ORDER BY id DESC LIMIT 1),
      (SELECT min(watermark) FROM sync_runs WHERE script = 'pull-created' AND ?1 = 'pull-updated'))`;
  const watermark = readValue(db, sql, [script]);
  return Number.isNaN(Date.parse(String(watermark))) ? null : String(watermark);
}

const COLUMNS = FIELDS.map(({ column }) => column);
const SET = COLUMNS.filter((column) => column !== "id");
const toSet = (table: string) => SET.map((column) => `${table}.${column}`).join(", ");

// A search can answer with less than a push has just returned: a lower version never overwrites. A row
// that is the same already is not written, so that "unchanged" is true of the file; but one that was never
// marked as read is.
const UPSERT = `
  INSERT INTO customers (${COLUMNS.join(", ")}, synced_at)
  VALUES (${COLUMNS.map(() => "?").join(", ")}, ?)
  ON CONFLICT (id) DO UPDATE SET
    (${SET.join(", ")}, synced_at) = (${toSet("excluded")}, excluded.synced_at)
  WHERE coalesce(excluded.version, -1) >= coalesce(customers.version, -1)
    AND (customers.synced_at IS NULL OR (${toSet("customers")}) IS NOT (${toSet("excluded")}))`;

/**
 * Puts customers of Square's into the file. One whose reference_id is that of exactly one row that is
 * not in Square yet *is* that row, and is linked to it.
 * @param customers as {@linkcode toRow} makes them
 */
export function saveCustomers(db: SqlDatabase, customers: Row[], now = toNow()) {
  const counts = { inserted: 0, updated: 0, unchanged: 0, linked: 0 };
  const unpushed = readUnpushed(db);
  // A reference_id that two of these customers share is the name of no row.
  const references = new Set<unknown>();
  for (const { reference_id } of customers) {
    if (references.has(reference_id)) unpushed.delete(reference_id);
    references.add(reference_id);
  }
  const find = db.prepare("SELECT 1 FROM customers WHERE id = ?");
  const upsert = db.prepare(UPSERT);
  for (const customer of customers) {
    const { id = null, reference_id } = customer;
    const localId = unpushed.get(reference_id);
    const isKnown = find.get([id]).length > 0;
    const isLinked = !isKnown && localId !== undefined && linkRow(db, "local_id", localId, id);
    upsert.run([...COLUMNS.map((column) => customer[column] ?? null), now]);
    if (isLinked) counts.linked++;
    else if (!isKnown) counts.inserted++;
    else if (db.getRowsModified() > 0) counts.updated++;
    else counts.unchanged++;
  }
  find.free();
  upsert.free();
  return counts;
}

/**
 * Gives a row its id in Square, unless it has one, or another row has that id. What else Square says of
 * it is saved after that; a version left from another profile would keep that out.
 */
export function linkRow(db: SqlDatabase, column: string, name: string, id: SqlValue): boolean {
  const sql = `UPDATE OR IGNORE customers SET id = ?, version = NULL, push_error = NULL
    WHERE ${column} = ? AND id IS NULL`;
  return db.run(sql, [id, name]).getRowsModified() === 1;
}

/**
 * Which row that Square lacks goes by a reference_id: its own, or the key that push-new gave it. What
 * several rows share, in Square or not, is the name of none of them.
 */
export function readUnpushed(db: SqlDatabase): Map<unknown, string> {
  // NULL is nobody's name either, and NULL NOT IN (nothing) is true.
  const rows = readRows(
    db,
    `SELECT reference, CAST(min(local_id) AS TEXT) AS local_id FROM (
       SELECT reference_id AS reference, local_id FROM customers WHERE id IS NULL
       UNION SELECT idempotency_key, local_id FROM customers WHERE id IS NULL)
     WHERE reference IS NOT NULL AND reference NOT IN (
       SELECT reference_id FROM customers WHERE id IS NOT NULL AND reference_id IS NOT NULL)
     GROUP BY reference HAVING count(*) = 1`,
  );
  return new Map(rows.map((row) => [String(row.reference), String(row.local_id)]));
}

/** Adds a run that ends now to the history, in the same save as its customers. */
export function recordRun(
  db: SqlDatabase,
  { script, environment, startedAt }: { script: string; environment: string; startedAt: number },
  said: Row,
): void {
  markEnvironment(db, environment);
  const started_at = new Date(startedAt).toISOString();
  const run: Row = { script, environment, started_at, finished_at: toNow(), ...said };
  const names = Object.keys(run);
  const values = names.map(() => "?").join(", ");
  db.run(`INSERT INTO sync_runs (${names.join(", ")}) VALUES (${values})`, Object.values(run));
}

/** Marks whose customers the file holds, unless another program has put a mark of its own there. */
export function markEnvironment(db: SqlDatabase, environment: string): void {
  if (readNumber(db, "PRAGMA application_id") === 0)
    db.run(`PRAGMA application_id = ${FIRST_MARK + Object.keys(SQUARES).indexOf(environment)}`);
}

export function readRows(db: SqlDatabase, sql: string, values: SqlValue[] = []): Row[] {
  const statement = db.prepare(sql, values);
  const rows: Row[] = [];
  while (statement.step()) rows.push(statement.getAsObject());
  statement.free();
  return rows;
}

/** The first value of the first row; undefined when there is none. */
export function readValue(db: SqlDatabase, sql: string, values: SqlValue[] = []) {
  return db.exec(sql, values)[0]?.values[0]?.[0];
}

export function readNumber(db: SqlDatabase, sql: string): number {
  return Number(readValue(db, sql) ?? 0);
}

function refusal(path: string, state: string, next: string): SyncError {
  return usageError(`Cannot use "${path}": ${state}`, next);
}

// What would have been wrong usage at the beginning is a failure now: something was tried.
function failLate(error: unknown): never {
  if (!(error instanceof SyncError) || error.exitCode !== EXIT.usage) throw error;
  throw new SyncError(error.message, EXIT.failed, error.next, error);
}

const toNow = () => new Date().toISOString();

const toInit = (path: string) => `npx tsx scripts/init-db.ts --db "${path}"`;
