/** Time windows: which part of Square's history a run reads, and where the next run continues. */
import { SyncError } from "./internal/errors.ts";
import { formatTime, parseTime } from "./internal/time.ts";

/** A span of time. Both ends are RFC 3339 in UTC with milliseconds; null means open on that side. */
export interface Window {
  since: string | null;
  until: string | null;
}

// Square's search index lags behind its writes: usually for seconds, sometimes for minutes. A window that
// starts exactly where the last one ended would never see a customer that was indexed late. So every window
// starts five minutes earlier. Reading a customer twice is harmless, because rows are matched by id.
const OVERLAP_MS = 5 * 60_000;

/**
 * Works out the window of a run.
 * @param options.since `last` (continue at the watermark), `all`, or a time as {@linkcode parseTime} reads it
 * @param options.until a time, or undefined for an open end
 * @param watermark the time up to which everything has been read; null before the first complete run
 * @param startedAt when the run began, in milliseconds since 1970
 * @throws SyncError (usage) when a time has an unknown form, or the window is empty
 */
export function resolveWindow(
  options: { since: string; until?: string | undefined },
  watermark: string | null,
  startedAt: number,
): Window {
  const until = options.until === undefined ? null : parseTime("--until", options.until, startedAt);
  let since: string | null = null;
  if (options.since === "last") since = startOfNextWindow(watermark, startedAt);
  else if (options.since !== "all") since = parseTime("--since", options.since, startedAt);
  if (since !== null && since >= (until ?? formatTime(startedAt)))
    throw new SyncError(
      "usage",
      `Cannot use this window: ${since} is not before ${until ?? "now"}`,
      "an earlier --since, or a later --until",
    );
  return { since, until };
}

/**
 * Returns the watermark to save after a run that read all of `window`: the time at which the run began, or
 * the end of the window if that is earlier. A window that does not reach back to the old watermark does not
 * move it. For example, `--since 5m` after a day without runs leaves almost a day unread.
 * @param startedAt when the run began, before its first request, in milliseconds since 1970
 */
export function nextWatermark(
  window: Window,
  watermark: string | null,
  startedAt: number,
): string | null {
  const start = startOfNextWindow(watermark, startedAt);
  const reachesBack = window.since === null || (start !== null && window.since <= start);
  if (!reachesBack) return watermark;
  const started = formatTime(startedAt);
  const end = window.until !== null && window.until < started ? window.until : started;
  // With --until, the window can end before the old watermark. Moving it back would only repeat work. A
  // watermark in the future is replaced, because it was saved with a wrong clock.
  const isAhead = watermark !== null && watermark > end && watermark <= started;
  return isAhead ? watermark : end;
}

/**
 * Converts a window to the TimeRange of a SearchCustomers filter. An open end is left out.
 * @see https://developer.squareup.com/reference/square/objects/TimeRange
 */
export function toTimeRange({ since, until }: Window): { startAt?: string; endAt?: string } {
  return { ...(since !== null && { startAt: since }), ...(until !== null && { endAt: until }) };
}

function startOfNextWindow(watermark: string | null, startedAt: number): string | null {
  // A watermark in the future was saved with a wrong clock. It proves nothing, so read everything.
  if (watermark === null || Date.parse(watermark) > startedAt) return null;
  return formatTime(Date.parse(watermark) - OVERLAP_MS);
}
