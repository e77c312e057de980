import { EXIT, SyncError } from "./errors.ts";

/** A stretch of time, RFC 3339 in UTC with milliseconds; null = open on that side. */
export interface Window {
  since: string | null;
  until: string | null;
}

// Square's search lags its writes, mostly by seconds, in a bad hour by a minute or more. A window that
// began just where the last one ended would miss for ever what was indexed late.
const OVERLAP_MS = 5 * 60_000;

const UNIT_MS = { s: 1_000, m: 60_000, h: 3_600_000, d: 86_400_000, w: 604_800_000 };

// RFC 3339 writes a year with four digits.
const YEAR_0_MS = Date.parse("0000-01-01T00:00:00Z");
const YEAR_10000_MS = Date.UTC(10_000, 0);

const FORMS = "a duration (90s, 5m, 24h, 1d, 2w), a date (2026-08-01) or an RFC 3339 time";

/**
 * The window of a run: a pure function of the options, the watermark and a clock that is handed in.
 * @param since `last`, `all`, or a time as {@linkcode toInstant} takes it
 * @param until a time, or undefined for an open end
 * @param watermark up to here everything is known to have been read; null = nothing yet
 * @param now when the run began, in milliseconds since 1970
 * @throws SyncError with exit code 2 when a word is not a time, or the window is empty
 */
export function toWindow(
  since: string,
  until: string | undefined,
  watermark: string | null,
  now: number,
): Window {
  const start =
    since === "all"
      ? null
      : since === "last"
        ? toNextStart(watermark, now)
        : toInstant("--since", since, now);
  const end = until === undefined ? null : toInstant("--until", until, now);
  if (since !== "last" && start !== null && Date.parse(start) >= now)
    throw usage(`Cannot use --since ${JSON.stringify(since)}: it is not in the past`);
  if (start !== null && end !== null && start >= end)
    throw usage(`Cannot use --until ${JSON.stringify(until)}: it is not after the window's start`);
  return { since: start, until: end };
}

/** Where a run that carries on from `watermark` begins; null = from the beginning of time. */
export function toNextStart(watermark: string | null, now: number): string | null {
  if (watermark === null) return null;
  return new Date(Math.min(Date.parse(watermark), now) - OVERLAP_MS).toISOString();
}

/**
 * The watermark after a run that read all of `window`. It moves only when the window reaches back to
 * where `--since last` would have begun; else there would be a hole that no later run fills.
 * @param fixedAt when the run was fixed, before its first request, in milliseconds since 1970
 */
export function toWatermark(
  window: Window,
  watermark: string | null,
  fixedAt: number,
): string | null {
  const nextStart = toNextStart(watermark, fixedAt);
  const reachesBack = window.since === null || (nextStart !== null && window.since <= nextStart);
  if (!reachesBack) return watermark;
  const fixed = new Date(fixedAt).toISOString();
  const end = window.until !== null && window.until < fixed ? window.until : fixed;
  return watermark !== null && watermark > end ? watermark : end;
}

/**
 * When a run was fixed: the earlier of our clock at its start and Square's at its first answer, since a
 * watermark from a clock that is ahead would skip what is created until the true time gets there.
 * @param clock Square's clock and ours at the same moment; undefined when Square does not say
 */
export function toFixedAt(
  startedAt: number,
  clock: { square: number; local: number } | undefined,
): { fixedAt: number; warning: string | undefined } {
  const offBy = clock ? Math.round((clock.local - clock.square) / 1_000) : 0;
  return {
    fixedAt: Math.min(startedAt, clock?.square ?? startedAt),
    warning:
      Math.abs(offBy) > 60
        ? `this machine's clock is ${Math.abs(offBy)} s ${offBy > 0 ? "ahead of" : "behind"} Square's`
        : undefined,
  };
}

/**
 * One point in time as RFC 3339 in UTC: a duration back from `now`, a date (midnight local time,
 * which is what a person means by a date), or an RFC 3339 time.
 * @throws SyncError with exit code 2
 */
export function toInstant(option: string, text: string, now: number): string {
  const duration = /^(\d+)([smhdw])$/.exec(text);
  const date = /^(\d{4})-(\d\d)-(\d\d)$/.exec(text);
  const time = /^(\d{4}-\d\d-\d\d)T\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$/i.exec(text);
  let instant = Number.NaN;
  if (duration) instant = now - Number(duration[1]) * UNIT_MS[duration[2] as keyof typeof UNIT_MS];
  // Months count from 0, and both Date and Date.parse turn 30 February into 2 March: refuse it.
  if (date && isDay(text))
    instant = new Date(Number(date[1]), Number(date[2]) - 1, Number(date[3])).getTime();
  if (time && isDay(time[1])) instant = Date.parse(text);
  if (!(instant >= YEAR_0_MS && instant < YEAR_10000_MS))
    throw usage(`Cannot use ${option} ${JSON.stringify(text)}: it is not ${FORMS}`);
  return new Date(instant).toISOString();
}

function isDay(day = ""): boolean {
  const time = Date.parse(`${day}T00:00:00Z`);
  return !Number.isNaN(time) && new Date(time).toISOString().startsWith(day);
}

function usage(message: string): SyncError {
  return new SyncError(message, { exitCode: EXIT.usage, next: "--help shows every form" });
}
