/** Times and time windows: which window a run reads, and where the next run continues. */
import { SyncError } from "./internal/errors.ts";

/**
 * Square's search does not show a new or changed customer at once, but after some seconds, and
 * sometimes minutes. A window that started at the watermark would never show a customer that
 * appeared in the search late. So each window starts this much before it: this is the overlap.
 */
export const SEARCH_LAG_MS = 5 * 60_000;

/**
 * A span of time; null = no start, no end. Such times are texts like 2026-08-01T00:00:00.000Z. The
 * order of the texts is the order of the times.
 */
export interface Window {
  since: string | null;
  until: string | null;
}

/**
 * Works out the window of a run.
 * @param options.since `last` (continue at the watermark), `all`, or a time for parseTime
 * @throws SyncError (usage) when a time has an unknown form, or the window is empty
 */
export function resolveWindow(
  options: { since: string; until?: string | undefined },
  watermark: string | null,
  startedAt: number,
): Window {
  const until = options.until === undefined ? null : parseTime("--until", options.until, startedAt);
  let since: string | null = null;
  if (options.since === "last") since = computeSinceLast(watermark);
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
 * @returns null if the run proves nothing new
 */
export function computeNextWatermark(window: Window, watermark: string | null, startedAt: number) {
  // A window that starts too late leaves a gap: `--since 5m` after a day without runs leaves almost
  // a day unread. The watermark then stays where it is, so that the next run reads the gap.
  const sinceLast = computeSinceLast(watermark);
  if (window.since !== null && (sinceLast === null || window.since > sinceLast)) return null;
  const started = formatTime(startedAt);
  return window.until !== null && window.until < started ? window.until : started;
}

/** @see https://developer.squareup.com/reference/square/objects/TimeRange */
export function buildTimeRange({ since, until }: Window): { startAt?: string; endAt?: string } {
  return { ...(since !== null && { startAt: since }), ...(until !== null && { endAt: until }) };
}

function computeSinceLast(watermark: string | null): string | null {
  return watermark === null ? null : formatTime(Date.parse(watermark) - SEARCH_LAG_MS);
}

const UNIT_SECONDS: Record<string, number> = { s: 1, m: 60, h: 3_600, d: 86_400, w: 604_800 };
const DURATION = /^(\d{1,6})([smhdw])$/;
const DATE_OR_TIME = /^([1-9]\d{3}-\d\d-\d\d)(T\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d))?$/i;

/**
 * Parses the value of an option that takes a time.
 * @param text a duration before `now` (`90s`, `5m`, `24h`, `1d`, `2w`), a date (midnight in the
 *   local time zone), or an RFC 3339 time
 * @returns the time as RFC 3339 in UTC with milliseconds
 * @throws SyncError (usage) for any other text
 */
export function parseTime(option: string, text: string, now: number): string {
  const [, amount, unit = ""] = DURATION.exec(text) ?? [];
  const seconds = Number(amount) * (UNIT_SECONDS[unit] ?? 0);
  const ms = amount === undefined ? parseDate(text) : now - seconds * 1_000;
  // Times are compared as text, and a year before 0 would be sorted wrongly.
  if (ms !== undefined && ms >= Date.parse("0000-01-01")) return formatTime(ms);
  throw new SyncError(
    "usage",
    `Cannot use ${option} ${JSON.stringify(text)}: expected a duration (90s, 5m, 24h, 1d, 2w), a date (2026-08-01) or an RFC 3339 time`,
    `${option} 1d, ${option} 2026-08-01, or see --help`,
  );
}

export function formatTime(ms: number): string {
  return new Date(ms).toISOString();
}

/** @returns milliseconds since 1970; undefined for a date or time that does not exist */
function parseDate(text: string): number | undefined {
  // Date.parse reads a time without Z or an offset as local time.
  const [, date = "", time = "T00:00:00"] = DATE_OR_TIME.exec(text) ?? [];
  const ms = Date.parse(date + time);
  if (Number.isNaN(ms)) return undefined;
  // Date.parse reads 30 February as 2 March. Formatting the date again shows the difference.
  return formatTime(Date.parse(`${date}T00:00:00Z`)).startsWith(date) ? ms : undefined;
}
