/** Time windows: which window a run reads, and where the next run continues. */
import { SyncError } from "./internal/errors.ts";
import { formatTime, parseTime } from "./internal/time.ts";

/**
 * Square's search does not show a new or changed customer at once, but after some seconds, and
 * sometimes minutes. A customer is expected to be in the search after this time.
 *
 * Each window therefore starts this much before the watermark: this is the overlap. A window that
 * started at the watermark would never show a customer that appeared in the search late. Reading a
 * customer twice is harmless, because rows are matched by id.
 */
export const SEARCH_LAG_MS = 5 * 60_000;

/**
 * A span of time. `null` means that it has no start or no end.
 *
 * These times, and the watermark, are texts like 2026-08-01T00:00:00.000Z. In this form, the order
 * of the texts is the order of the times, so they are compared with `<` and `>`.
 */
export interface Window {
  since: string | null;
  until: string | null;
}

/**
 * Works out the window of a run.
 * @param options.since `last` (continue at the watermark), `all`, or a time such as `24h` or
 *   `2026-08-01`; parseTime lists all forms
 * @param options.until a time in the same forms; undefined = no end
 * @param watermark the time up to which earlier runs have read everything; null = no such time yet
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
  if (options.since === "last") since = computeSinceLast(watermark, startedAt);
  else if (options.since !== "all") since = parseTime("--since", options.since, startedAt);
  if (since !== null && since >= (until ?? formatTime(startedAt)))
    throw new SyncError(
      "usage",
      `Cannot use this window: ${since} is not before ${until ?? "now"}`,
      "an earlier start, or a later end",
    );
  return { since, until };
}

/**
 * Computes the watermark to save after a run that has read all of `window`.
 * @param watermark the watermark before the run
 * @param startedAt when the run began, before its first request, in milliseconds since 1970
 */
export function computeNextWatermark(
  window: Window,
  watermark: string | null,
  startedAt: number,
): string | null {
  // A window that starts too late leaves a gap: `--since 5m` after a day without runs leaves almost
  // a day unread. The watermark then stays where it is, so that the next run reads the gap. Without
  // a watermark, everything before the window is unread, and no watermark is saved.
  const sinceLast = computeSinceLast(watermark, startedAt);
  const hasGap = window.since !== null && (sinceLast === null || window.since > sinceLast);
  if (hasGap) return watermark;

  const started = formatTime(startedAt);
  const end = window.until !== null && window.until < started ? window.until : started;
  // With --until, the window can end before the old watermark. Keep the old watermark then, because
  // everything up to it has been read. Exception: a watermark in the future was saved with a wrong
  // clock, so it is replaced.
  const isInFuture = watermark !== null && watermark > started;
  if (watermark !== null && !isInFuture && watermark > end) return watermark;
  return end;
}

/**
 * Builds the TimeRange of a SearchCustomers filter. A side without a limit is left out.
 * @see https://developer.squareup.com/reference/square/objects/TimeRange
 */
export function buildTimeRange({ since, until }: Window): { startAt?: string; endAt?: string } {
  return { ...(since !== null && { startAt: since }), ...(until !== null && { endAt: until }) };
}

// Computes where `--since last` starts. null means that everything has to be read.
function computeSinceLast(watermark: string | null, startedAt: number): string | null {
  // A watermark in the future was saved with a wrong clock. It proves nothing, so read everything.
  if (watermark === null || Date.parse(watermark) > startedAt) return null;
  return formatTime(Date.parse(watermark) - SEARCH_LAG_MS);
}
