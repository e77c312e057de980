/** The table sync_runs: the log of all runs, and the state from which the next run continues. */
import type { Database, SqlValue } from "sql.js";
import type { RunContext } from "./internal/context.ts";
import { SyncError } from "./internal/errors.ts";
import { readNumber, readRows } from "./internal/sql.ts";
import { formatTime } from "./internal/time.ts";
import { TABLE } from "./mapping.ts";

// After a day without a pull, customers that were created in Square meanwhile are missing in the file.
const STALE_PULL_MS = 86_400_000;

/** What a script may record about its run, next to what {@linkcode recordRun} knows by itself. */
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

/** Adds a run that ends now to sync_runs, in the same save as its customers. */
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
 * @returns RFC 3339, or null if the script has not read everything yet
 */
export function readWatermark(db: Database, script: string): string | null {
  return readTime(
    db,
    `SELECT watermark AS time FROM sync_runs
     WHERE script = ? AND watermark IS NOT NULL ORDER BY id DESC LIMIT 1`,
    script,
  );
}

/** Reads the watermark of the first complete run of a script. */
export function readFirstWatermark(db: Database, script: string): string | null {
  return readTime(db, "SELECT min(watermark) AS time FROM sync_runs WHERE script = ?", script);
}

function readTime(db: Database, sql: string, script: string): string | null {
  const time = readRows(db, sql, [script])[0]?.time;
  // A watermark that is not a time, for example after an edit by hand, proves nothing.
  return typeof time === "string" && !Number.isNaN(Date.parse(time)) ? time : null;
}

// ---- Checks before a script relies on the file ----

/**
 * Requires that the customers which a pull saved are still in the file. After `DELETE FROM customers`, for example,
 * the log of the runs still has a complete pull, and a push would create every customer a second time.
 * @throws SyncError (usage)
 */
export function requirePulledCustomers(db: Database, context: RunContext, pull: string): void {
  const saved = readNumber(db, "SELECT sum(inserted) FROM sync_runs WHERE script = ?", [pull]);
  const kept = readNumber(db, `SELECT count(*) FROM ${TABLE} WHERE id IS NOT NULL`);
  if (saved > 0 && kept === 0)
    throw new SyncError(
      "usage",
      `Cannot run ${context.script}: the customers that ${pull} saved are no longer in "${context.databasePath}"`,
      context.commandFor(pull, "--since all") ?? `run ${pull} --since all first`,
    );
}

/**
 * Requires that a pull has read all customers of Square. Otherwise the file does not know which customers exist,
 * and a push would create them a second time.
 * @param pull the name of the script that reads them
 * @throws SyncError (usage)
 */
export function requireCompletePull(db: Database, context: RunContext, pull: string): void {
  // A pull with --until has not read the customers after that time.
  const [complete] = readRows(
    db,
    `SELECT 1 FROM sync_runs WHERE script = ? AND julianday(watermark) IS NOT NULL
       AND (until IS NULL OR until > watermark)`,
    [pull],
  );
  if (complete === undefined)
    throw new SyncError(
      "usage",
      `Cannot run ${context.script}: ${pull} has not read all customers of Square into "${context.databasePath}" yet`,
      context.commandFor(pull) ?? `run ${pull} first`,
    );
}

/** Warns when the last complete pull is older than a day. A push does not see customers created since then. */
export function warnOfOldPull(db: Database, context: RunContext, pull: string): void {
  const watermark = readWatermark(db, pull);
  const ageMs = context.startedAt - Date.parse(watermark ?? "");
  if (ageMs > STALE_PULL_MS)
    context.warn(
      `the last complete ${pull} began ${formatAge(ageMs)} ago: customers created in Square since then can be created again`,
    );
}

function formatAge(ms: number): string {
  const hours = Math.floor(ms / 3_600_000);
  return hours < 48 ? `${hours} hours` : `${Math.floor(hours / 24)} days`;
}
