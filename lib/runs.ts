/** The table sync_runs: a log of all runs, and the watermarks from which the next runs continue. */
import type { Database, SqlValue } from "sql.js";
import type { RunContext } from "./internal/context.ts";
import { SyncError } from "./internal/errors.ts";
import { readNumber, readRows } from "./internal/sql.ts";
import { formatTime } from "./internal/time.ts";
import { TABLE } from "./mapping.ts";

const HOUR_MS = 3_600_000;

// A push warns if the last complete pull is older than this.
const OLD_PULL_MS = 24 * HOUR_MS;

// In a file with fewer customers, a person may have removed most of them on purpose.
const MIN_COMPARED = 20;

/** The columns of sync_runs that a script sets. {@linkcode recordRun} sets the others. */
export interface RunRecord {
  since?: string | null;
  until?: string | null;
  watermark?: string | null;
  fetched?: number;
  inserted?: number;
  updated?: number;
  unchanged?: number;
  linked?: number;
  deleted?: number;
  merged?: number;
  created?: number;
  refused?: number;
  held?: number;
}

/** Adds the current run to sync_runs. Call it in the step that saves the customers of the run. */
export function recordRun(
  db: Database,
  context: Pick<RunContext, "script" | "square" | "startedAt" | "traffic">,
  record: RunRecord,
): void {
  const run: Record<string, SqlValue> = {
    script: context.script,
    environment: context.square.environment,
    started_at: formatTime(context.startedAt),
    finished_at: formatTime(Date.now()),
    requests: context.traffic.requests,
    retries: context.traffic.retries,
    ...record,
  };
  const columns = Object.keys(run);
  db.run(
    `INSERT INTO sync_runs (${columns.join(", ")}) VALUES (${columns.map(() => "?").join(", ")})`,
    Object.values(run),
  );
}

/**
 * Reads the watermark of a script: the time up to which it has read everything.
 * @returns RFC 3339; null before the first complete run
 */
export function readWatermark(db: Database, script: string): string | null {
  return readTime(
    db,
    `SELECT watermark AS time FROM sync_runs
     WHERE script = ? AND watermark IS NOT NULL ORDER BY id DESC LIMIT 1`,
    script,
  );
}

/** Reads the oldest watermark of a script, which its first complete run has saved. */
export function readOldestWatermark(db: Database, script: string): string | null {
  return readTime(db, "SELECT min(watermark) AS time FROM sync_runs WHERE script = ?", script);
}

function readTime(db: Database, sql: string, script: string): string | null {
  const time = readRows(db, sql, [script])[0]?.time;
  return isZonedTime(time) ? formatTime(Date.parse(time)) : null;
}

// Another program can have stored something else. A time without a zone would be read as local
// time, hours away from what was meant. So it proves nothing, and is ignored.
function isZonedTime(value: SqlValue | undefined): value is string {
  return (
    typeof value === "string" &&
    /^\d{4}-\d\d-\d\dT.*(Z|[+-]\d\d:\d\d)$/.test(value) &&
    !Number.isNaN(Date.parse(value))
  );
}

// ---- Checks before a script relies on an earlier pull ----

/**
 * Requires that a pull has read all customers of Square. Without them, the file does not
 * show which customers exist, and a push would create them a second time.
 * @param pull the name of the script that reads them
 * @throws SyncError (usage)
 */
export function requireCompletePull(db: Database, context: RunContext, pull: string): void {
  // A run that has read everything saves its own start as the watermark. Other runs save an earlier
  // time: with --until in the past, they save that time. With a gap, for example after --since 5m,
  // they keep the watermark of an earlier run.
  const completeRuns = readRows(
    db,
    "SELECT watermark FROM sync_runs WHERE script = ? AND watermark = started_at",
    [pull],
  );
  // A watermark in the future was saved with a wrong clock. It proves nothing.
  const isValid = ({ watermark }: Record<string, SqlValue>) =>
    isZonedTime(watermark) && Date.parse(watermark) <= context.startedAt;
  if (!completeRuns.some(isValid))
    throw new SyncError(
      "usage",
      `Cannot run ${context.script}: ${pull} has not read all customers of Square into "${context.databasePath}" yet`,
      context.commandFor(pull) ?? `run ${pull} first`,
    );
}

/**
 * Requires that the file shows which customers are in Square, before a push. Warns if the last
 * complete pull is old.
 * @param pull the name of the script that reads all customers
 * @throws SyncError (usage)
 */
export function requirePullForPush(db: Database, context: RunContext, pull: string): void {
  requireCompletePull(db, context, pull);
  requireRowsOfPull(db, context, pull);
  warnOfOldPull(db, context, pull);
}

/**
 * Requires that most of the customers that a complete pull has saved are still in the file. After
 * `DELETE FROM customers`, sync_runs still lists that pull, but a push would create every customer
 * a second time.
 * @throws SyncError (usage)
 */
function requireRowsOfPull(db: Database, context: RunContext, pull: string): void {
  // The last run that read everything in one window fetched all customers of Square. Files of
  // version 1 may have no such run. Then count what the runs have inserted.
  const [last] = readRows(
    db,
    `SELECT fetched FROM sync_runs
     WHERE script = ? AND since IS NULL AND watermark = started_at ORDER BY id DESC LIMIT 1`,
    [pull],
  );
  const inserted = readNumber(db, "SELECT sum(inserted) FROM sync_runs WHERE script = ?", [pull]);
  const saved = Number(last?.fetched ?? inserted);
  const existing = readNumber(db, `SELECT count(*) FROM ${TABLE} WHERE id IS NOT NULL`);
  // Fewer than half of them are suspicious, except in a small file or if the number is not certain.
  const isCertain = last !== undefined && saved >= MIN_COMPARED;
  if (isCertain ? existing < saved / 2 : existing === 0 && saved > 0)
    throw new SyncError(
      "usage",
      `Cannot run ${context.script}: "${context.databasePath}" has only ${existing} of the ${saved} customers that were saved in it`,
      `${context.commandFor(pull, "--since all") ?? `run ${pull} --since all`}; or --skip-pull-check, if they were removed on purpose`,
    );
}

/**
 * Warns if the watermark of the pull is more than a day old. The file does not have the customers
 * that were created in Square since then, so a push can create them a second time.
 */
function warnOfOldPull(db: Database, context: RunContext, pull: string): void {
  const watermark = readWatermark(db, pull);
  if (watermark === null) return;
  const ageMs = context.startedAt - Date.parse(watermark);
  if (ageMs > OLD_PULL_MS)
    context.warn(
      `the last complete ${pull} began ${formatAge(ageMs)} ago: customers created in Square since then can be created again`,
    );
}

function formatAge(ms: number): string {
  const hours = Math.floor(ms / HOUR_MS);
  return hours < 48 ? `${hours} hours` : `${Math.floor(hours / 24)} days`;
}
