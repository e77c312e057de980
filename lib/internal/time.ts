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

/**
 * Parses the value of an option that takes a time.
 * @param option the name of the option, for the error message
 * @param text a duration back from `now` (`90s`, `5m`, `24h`, `1d`, `2w`), a date (midnight local time,
 *   which is what a person means by it), or an RFC 3339 time
 * @param now in milliseconds since 1970
 * @returns the time as RFC 3339 in UTC with milliseconds
 * @throws SyncError (usage) when the text has none of these forms
 */
export function parseTime(option: string, text: string, now: number): string {
  const [, amount, unit = ""] = DURATION.exec(text) ?? [];
  const [, day = "", time = "T00:00:00"] = DATE_OR_TIME.exec(text) ?? [];
  let ms = now - Number(amount) * (UNIT_MS[unit] ?? Number.NaN);
  // Date.parse reads 30 February as 2 March. So use a day only if it is still the same when formatted again.
  if (day && new Date(`${day}T00:00Z`).toJSON()?.startsWith(day)) ms = Date.parse(day + time);
  // Times are compared as text. A year before 0 or with five digits would sort wrongly.
  if (ms >= Date.parse("0000-01-01") && ms < Date.UTC(10_000, 0)) return formatTime(ms);
  throw new SyncError(
    "usage",
    `Cannot use ${option} ${JSON.stringify(text)}: expected a duration (90s, 5m, 24h, 1d, 2w), a date (2026-08-01) or an RFC 3339 time`,
    `${option} 1d, ${option} 2026-08-01, or see --help`,
  );
}

/** Formats milliseconds since 1970 as RFC 3339 in UTC with milliseconds, for example 2026-08-01T00:00:00.000Z. */
export function formatTime(ms: number): string {
  return new Date(ms).toISOString();
}
