/** Parses and formats times. Everywhere else, a time is RFC 3339 text in UTC or milliseconds. */
import { SyncError } from "./errors.ts";

const UNIT_MS: Record<string, number> = {
  s: 1_000,
  m: 60_000,
  h: 3_600_000,
  d: 86_400_000,
  w: 604_800_000,
};

const DURATION = /^(\d+)([smhdw])$/;
const DATE_OR_TIME = /^(\d{4}-\d\d-\d\d)(T\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d))?$/i;

// Times are compared as text. A year before 0 or after 9999 would be sorted wrongly.
const FIRST_MS = Date.parse("0000-01-01");
const LAST_MS = Date.parse("9999-12-31T23:59:59.999Z");

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
  const duration = parseDuration(text);
  const ms = duration === undefined ? parseDate(text) : now - duration;
  if (ms !== undefined && ms >= FIRST_MS && ms <= LAST_MS) return formatTime(ms);
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

/**
 * Whether a date in the form YYYY-MM-DD exists. Date.parse alone does not find out, because it
 * reads 30 February as 2 March.
 */
export function isRealDate(date: string): boolean {
  const parsed = new Date(`${date}T00:00:00Z`);
  return !Number.isNaN(parsed.getTime()) && parsed.toISOString().startsWith(date);
}

/** @returns milliseconds, or undefined if the text is not a duration */
function parseDuration(text: string): number | undefined {
  const match = DURATION.exec(text);
  if (match === null) return undefined;
  const [, amount, unit = ""] = match;
  return Number(amount) * (UNIT_MS[unit] ?? 0); // DURATION accepts only units that exist.
}

/** @returns milliseconds since 1970, or undefined if the text is not a date or time that exists */
function parseDate(text: string): number | undefined {
  // Date.parse reads a time without Z or an offset as local time. So a date alone is local
  // midnight.
  const [, date, time = "T00:00:00"] = DATE_OR_TIME.exec(text) ?? [];
  if (date === undefined || !isRealDate(date)) return undefined;
  const ms = Date.parse(date + time);
  return Number.isNaN(ms) ? undefined : ms;
}
