/** The table sync_runs: a log of all runs, and the watermarks from which the next runs continue. */
import type { Database } from "sql.js";
import { computeStartTime } from "./client.ts";
import type { SaveResult } from "./customers.ts";
import { formatNumber, type RunContext } from "./internal/cli.ts";
import { SyncError } from "./internal/errors.ts";
import { readValue } from "./internal/sql.ts";
import { formatTime } from "./window.ts";

// The counts of a run: in sync_runs, in --json, and without zeros in the summary line.
const NO_COUNTS = {
  fetched: 0,
  inserted: 0,
  updated: 0,
  unchanged: 0,
  linked: 0,
  deleted: 0,
  merged: 0,
  created: 0,
  refused: 0,
  held: 0,
};

export type Counts = typeof NO_COUNTS;

export interface RunRecord extends Counts {
  since: string | null;
  until: string | null;
  /** The time up to which everything has been read; null if this run proves nothing new. */
  watermark: string | null;
}

/** Adds a run to sync_runs. Call it in the step that saves the customers of the run. */
export function recordRun(
  db: Database,
  context: RunContext,
  values: Partial<RunRecord>,
  { changes, unchanged }: Pick<SaveResult, "changes" | "unchanged"> = { changes: [], unchanged: 0 },
): RunRecord {
  const record = { since: null, until: null, watermark: null, ...NO_COUNTS, unchanged, ...values };
  for (const { outcome } of changes) record[outcome]++;
  const startedAt = formatTime(computeStartTime(context));
  const run = {
    script: context.script,
    environment: context.square.environment,
    started_at: startedAt,
    finished_at: formatTime(Date.now()),
    // The watermark of a run with --until is earlier than its start.
    complete: record.watermark === startedAt ? 1 : 0,
    requests: context.traffic.requests,
    retries: context.traffic.retries,
    ...record,
  };
  const columns = Object.keys(run).join(", ");
  const places = Object.keys(run).map(() => "?");
  db.run(`INSERT INTO sync_runs (${columns}) VALUES (${places.join(", ")})`, Object.values(run));
  return record;
}

export function pickCounts(record: RunRecord): Counts {
  const { since, until, watermark, ...counts } = record;
  return counts;
}

/** Lists counts without zeros, for example `10 inserted, 2 unchanged`. */
export function formatCounts(counts: Record<string, number>): string {
  return Object.entries(counts)
    .filter(([name, count]) => count > 0 && name !== "fetched")
    .map(([name, count]) => `${count} ${name}`)
    .join(", ");
}

/**
 * Reads the watermark of a script: the time up to which it has read everything. A run that proves
 * nothing new saves none, so the latest one counts. One in the future was saved with a wrong clock,
 * and proves nothing.
 * @returns RFC 3339; null before the first complete run
 */
export function readWatermark(db: Database, script: string, which: "max" | "min" = "max") {
  const sql = `SELECT ${which}(watermark) FROM sync_runs
    WHERE script = ? AND watermark <= strftime('%Y-%m-%dT%H:%M:%fZ', 'now')`;
  const time = readValue(db, sql, [script]);
  return time === null ? null : String(time);
}

/**
 * Reads the watermark of a script that searches for updates. Before its first complete run, it is
 * the oldest watermark of pull-created. Later runs of pull-created did not read old customers again,
 * so their watermarks prove nothing about edits.
 */
export function readUpdateWatermark(db: Database, script: string): string | null {
  return readWatermark(db, script) ?? readWatermark(db, "pull-created", "min");
}

/** @param action what the pull searches for: `created` or `updated` */
export function describePull(action: string, record: RunRecord, missingCount: number) {
  const { since, until, fetched } = record;
  const counts = pickCounts(record);
  // A person needs no seconds: 2026-11-24T02:55Z.
  const format = (time: string) => `${time.slice(0, 16)}Z`;
  const start = since === null ? "since the beginning" : `since ${format(since)}`;
  const span = until === null ? start : `${start} until ${format(until)}`;
  const done = `${formatNumber(fetched, "customer")} fetched ${span}: ${formatCounts(counts) || "none was saved"}`;
  const error = new SyncError(
    "failed",
    `Cannot read all customers: Square counted ${missingCount} more than it returned`,
    "run it again: what arrived is saved, and the next run reads the same window",
  );
  return {
    summary: fetched === 0 ? `no customers ${action} ${span}` : done,
    json: { since, until, ...counts },
    ...(missingCount > 0 && { error }),
  };
}
