import { usageError } from "./errors.ts";

/** A stretch of time, RFC 3339 in UTC with milliseconds; null = open on that side. */
export type Window = { since: string | null; until: string | null };

// Square's search lags its writes, by seconds mostly, by minutes in a bad hour. A window that began
// where the last one ended would miss for ever what was indexed late.
const OVERLAP_MS = 5 * 60_000;

const UNIT_MS: Record<string, number> = { s: 1e3, m: 6e4, h: 3.6e6, d: 8.64e7, w: 6.048e8 };

/**
 * The window of a run.
 * @param since `last`, `all`, or a time as {@linkcode toInstant} takes it
 * @param until a time, or undefined for an open end
 * @param watermark up to here everything is known to have been read; null = nothing yet
 * @param now when the run began, in milliseconds since 1970
 * @throws SyncError (usage) when a word is no time, or the window is empty
 */
export function toWindow(
  since: string,
  until: string | undefined,
  watermark: string | null,
  now: number,
): Window {
  let start: string | null = null;
  if (since === "last") start = toNextStart(watermark, now);
  else if (since !== "all") start = toInstant("--since", since, now);
  const end = until === undefined ? null : toInstant("--until", until, now);
  if (start !== null && start >= (end ?? new Date(now).toISOString()))
    throw usageError(
      `Cannot use this window: ${start} is not before ${end ?? "now"}`,
      "an earlier start, or a later end",
    );
  return { since: start, until: end };
}

/**
 * The watermark after a run that read all of `window`. It moves only when the window reaches back to
 * where `--since last` would have begun: else it would pass over a hole that no later run fills.
 * @param fixedAt when the run began, in milliseconds since 1970: before its first request
 */
export function toWatermark({ since, until }: Window, watermark: string | null, fixedAt: number) {
  const start = toNextStart(watermark, fixedAt);
  if (since !== null && (start === null || since > start)) return watermark;
  const fixed = new Date(fixedAt).toISOString();
  const end = until !== null && until < fixed ? until : fixed;
  // Never back: --until may end before the watermark. But one that is still to come is put right.
  return watermark !== null && watermark > end && watermark <= fixed ? watermark : end;
}

/**
 * One point in time as RFC 3339 in UTC: a duration back from `now`, a date (midnight local time, which
 * is what a person means by it), or an RFC 3339 time.
 * @throws SyncError (usage)
 */
export function toInstant(option: string, text: string, now: number): string {
  const [, amount, unit = ""] = /^(\d+)([smhdw])$/.exec(text) ?? [];
  const [, day = "", time = "T00:00:00"] =
    /^(\d{4}-\d\d-\d\d)(T\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d))?$/i.exec(text) ?? [];
  let instant = now - Number(amount) * (UNIT_MS[unit] ?? Number.NaN);
  // Date.parse turns 30 February into 2 March, and takes a time without a zone to be local.
  if (day && new Date(`${day}T00:00Z`).toJSON()?.startsWith(day)) instant = Date.parse(day + time);
  // Times are compared as text, and a year of five digits, or one before 0, would not sort.
  if (instant >= Date.parse("0000-01-01") && instant < Date.UTC(10_000, 0))
    return new Date(instant).toISOString();
  const forms = "a duration (90s, 5m, 24h, 1d, 2w), a date (2026-08-01) or an RFC 3339 time";
  throw usageError(`Cannot use ${option} ${JSON.stringify(text)}: it is not ${forms}`, "--help");
}

function toNextStart(watermark: string | null, now: number): string | null {
  // Up to a time that is still to come nothing has been read: a clock was wrong, and nobody knows since when.
  if (watermark === null || Date.parse(watermark) > now) return null;
  return new Date(Date.parse(watermark) - OVERLAP_MS).toISOString();
}
