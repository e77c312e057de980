import assert from "node:assert/strict";
import { test } from "node:test";
import { toInstant, toWatermark, toWindow } from "./window.ts";

const NOW = Date.parse("2026-08-06T12:00:00.000Z");
const MARK = "2026-08-05T03:00:00.000Z";
const NEXT = "2026-08-05T02:55:00.000Z";

test("--since takes every form that it promises", () => {
  const start = (since: string) => toWindow(since, undefined, MARK, NOW).since;
  assert.equal(start("last"), NEXT);
  assert.equal(start("all"), null);
  assert.equal(start("90s"), "2026-08-06T11:58:30.000Z");
  assert.equal(start("5m"), "2026-08-06T11:55:00.000Z");
  assert.equal(start("24h"), "2026-08-05T12:00:00.000Z");
  assert.equal(start("1d"), "2026-08-05T12:00:00.000Z");
  assert.equal(start("2w"), "2026-07-23T12:00:00.000Z");
  assert.equal(start("2026-08-01"), new Date(2026, 7, 1).toISOString());
  assert.equal(start("2026-08-01T10:00:00Z"), "2026-08-01T10:00:00.000Z");
  assert.equal(start("2026-08-01T10:00:00.5+02:00"), "2026-08-01T08:00:00.500Z");
  assert.equal(start("1970-01-01"), new Date(1970, 0, 1).toISOString());
});

test("without a watermark, last is everything", () => {
  assert.deepEqual(toWindow("last", undefined, null, NOW), { since: null, until: null });
});

test("nonsense is refused: other words, days that are none, times without a zone, the future", () => {
  for (const text of ["", "5", "m5", "5 m", "-5m", "1.5h", "1y", "yesterday", "LAST", "2026-8-1"])
    assert.throws(() => toWindow(text, undefined, MARK, NOW), /^Error: Cannot use --since/, text);
  for (const text of ["2026-02-30", "2026-13-01", "2026-08-01T25:00:00Z", "2026-08-01T10:00:00"])
    assert.throws(() => toInstant("--until", text, NOW), /^Error: Cannot use --until/, text);
  for (const text of ["99999999w", "2026-08-06T12:00:00Z", "2027-01-01", "0s"])
    assert.throws(() => toWindow(text, undefined, MARK, NOW), /^Error: Cannot use/, text);
  for (const text of ["last", "all"])
    assert.throws(() => toWindow("all", text, MARK, NOW), /^Error: Cannot use --until/, text);
  assert.throws(() => toWindow("1d", "2d", MARK, NOW), /is not before/);
});

test("the watermark moves to when the run was fixed, or to the window's end", () => {
  const at = (since: string | null, until: string | null = null) =>
    toWatermark({ since, until }, MARK, NOW);
  assert.equal(at(null), "2026-08-06T12:00:00.000Z");
  assert.equal(at(NEXT), "2026-08-06T12:00:00.000Z");
  assert.equal(at(NEXT, "2026-08-06T00:00:00.000Z"), "2026-08-06T00:00:00.000Z");
  assert.equal(at(null, "2027-01-01T00:00:00.000Z"), "2026-08-06T12:00:00.000Z");
});

test("the watermark never moves over a hole, nor back", () => {
  assert.equal(toWatermark({ since: "2026-08-05T02:55:00.001Z", until: null }, MARK, NOW), MARK);
  assert.equal(toWatermark({ since: "2026-08-06T11:55:00.000Z", until: null }, null, NOW), null);
  assert.equal(toWatermark({ since: null, until: "2026-08-01T00:00:00.000Z" }, MARK, NOW), MARK);
});

test("a watermark of a clock that was ahead is not believed: everything is read, and it is put right", () => {
  const ahead = "2030-01-01T00:00:00.000Z";
  const window = toWindow("last", undefined, ahead, NOW);
  assert.deepEqual(window, { since: null, until: null });
  assert.equal(toWatermark(window, ahead, NOW), "2026-08-06T12:00:00.000Z");
  assert.equal(toWatermark({ since: NEXT, until: null }, ahead, NOW), ahead);
});
