/**
 * Times and time windows: which window a run reads, and where the next run continues. Everywhere
 * else, a time is RFC 3339 text in UTC, or milliseconds since 1970.
 */
import { SyncError } from "./internal/errors.ts";

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
 * @param watermark the watermark before the run
 * @param startedAt when the run began, before its first request, in milliseconds since 1970
 * @returns null if the run proves nothing new
 */
export function computeNextWatermark(
  window: Window,
  watermark: string | null,
  startedAt: number,
): string | null {
  // A window that starts too late leaves a gap: `--since 5m` after a day without runs leaves almost
  // a day unread. The watermark then stays where it is, so that the next run reads the gap. Without
  // a watermark, everything before the window is unread.
  const sinceLast = computeSinceLast(watermark);
  const hasGap = window.since !== null && (sinceLast === null || window.since > sinceLast);
  if (hasGap) return null;
  const started = formatTime(startedAt);
  return window.until !== null && window.until < started ? window.until : started;
}

/**
 * Builds the TimeRange of a SearchCustomers filter. A side without a limit is left out.
 * @see https://developer.squareup.com/reference/square/objects/TimeRange
 */
export function buildTimeRange({ since, until }: Window): { startAt?: string; endAt?: string } {
  return { ...(since !== null && { startAt: since }), ...(until !== null && { endAt: until }) };
}

// Computes where `--since last` starts. null means that everything has to be read.
function computeSinceLast(watermark: string | null): string | null {
  return watermark === null ? null : formatTime(Date.parse(watermark) - SEARCH_LAG_MS);
}

// ---- Times ----

const UNIT_MS: Record<string, number> = {
  s: 1_000,
  m: 60_000,
  h: 3_600_000,
  d: 86_400_000,
  w: 604_800_000,
};

const DURATION = /^(\d{1,6})([smhdw])$/;
const DATE_OR_TIME = /^([1-9]\d{3}-\d\d-\d\d)(T\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d))?$/i;

/**
 * Parses the value of an option that takes a time.
 * @param option the name of the option, for the error message
 * @param text a duration before `now` (`90s`, `5m`, `24h`, `1d`, `2w`), a date (midnight in the
 *   local time zone), or an RFC 3339 time
 * @param now in milliseconds since 1970
 * @returns the time as RFC 3339 in UTC with milliseconds
 * @throws SyncError (usage) for any other text
 */
export function parseTime(option: string, text: string, now: number): string {
  const [, amount, unit = ""] = DURATION.exec(text) ?? [];
  const ms = amount === undefined ? parseDate(text) : now - Number(amount) * (UNIT_MS[unit] ?? 0);
  // Times are compared as text, and a year before 0 would be sorted wrongly.
  if (ms >= Date.parse("0000-01-01")) return formatTime(ms);
  throw new SyncError(
    "usage",
    `Cannot use ${option} ${JSON.stringify(text)}: expected a duration (90s, 5m, 24h, 1d, 2w), a date (2026-08-01) or an RFC 3339 time`,
    `${option} 1d, ${option} 2026-08-01, or see --help`,
  );
}

/** Formats milliseconds since 1970 as RFC 3339 in UTC, for example 2026-08-01T00:00:00.000Z. */
export function formatTime(ms: number): string {
  return new Date(ms).toISOString();
}

/** @returns milliseconds since 1970; NaN for a text that is not a date or time that exists */
function parseDate(text: string): number {
  // Date.parse reads a time without Z or an offset as local time. So a date alone is local
  // midnight.
  const [, date = "", time = "T00:00:00"] = DATE_OR_TIME.exec(text) ?? [];
  // Date.parse reads 30 February as 2 March. Formatting the date again shows the difference.
  const day = new Date(`${date}T00:00:00Z`);
  const exists = !Number.isNaN(day.getTime()) && formatTime(day.getTime()).startsWith(date);
  return exists ? Date.parse(date + time) : Number.NaN;
}
