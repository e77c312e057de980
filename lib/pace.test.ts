import assert from "node:assert/strict";
import { syncBuiltinESMExports } from "node:module";
import { mock, test } from "node:test";
import { setImmediate as nextTurn, setTimeout as sleep } from "node:timers/promises";
import { makePace } from "./pace.ts";

const LATENCY_MS = 60;
const TICK_MS = 10;

/** Runs a task by a clock that does not wait. */
async function inMockTime(task: () => Promise<void>): Promise<void> {
  mock.timers.enable({ apis: ["setTimeout", "Date"], now: 1_000_000 });
  syncBuiltinESMExports(); // imports by name see the mock, too
  try {
    let isOver = false;
    const ended = task().finally(() => {
      isOver = true;
    });
    ended.catch(() => {});
    for (; !isOver; mock.timers.tick(TICK_MS)) await nextTurn();
    await ended;
  } finally {
    mock.timers.reset();
    syncBuiltinESMExports();
  }
}

type Take = (now: number) => boolean;

/** So many requests in any one second; in real time, that is what the offline Square does. */
function makeSlidingLimit(perSecond: number): Take {
  let taken: number[] = [];
  return (now) => {
    taken = taken.filter((at) => now - at < 1000);
    return taken.length < perSecond && taken.push(now) > 0;
  };
}

/** So many a second by the clock on the wall. */
function makeWindowLimit(perSecond: number): Take {
  const taken = new Map<number, number>();
  return (now) => {
    const second = Math.floor(now / 1000);
    taken.set(second, (taken.get(second) ?? 0) + 1);
    return (taken.get(second) ?? 0) <= perSecond;
  };
}

/** So many a second on average; who was quiet may take twice as many at once. */
function makeBucketLimit(perSecond: number): Take {
  let [tokens, filledAt] = [2 * perSecond, 0];
  return (now) => {
    tokens = Math.min(2 * perSecond, tokens + ((now - filledAt) / 1000) * perSecond);
    filledAt = now;
    if (tokens < 1) return false;
    tokens--;
    return true;
  };
}

/** Sends so many requests as the client does, and tells when each was sent and whether it was taken. */
async function sendAll(count: number, workers: number, take: Take, retryAfterMs?: number) {
  const pace = makePace(workers);
  const sent: { at: number; isTaken: boolean }[] = [];
  let [underWay, mostUnderWay] = [0, 0];
  const started = Date.now();
  async function send(): Promise<void> {
    for (let backoffMs = 500; ; backoffMs *= 2) {
      await pace.turn(new AbortController().signal);
      const isTaken = take(Date.now());
      sent.push({ at: Date.now() - started, isTaken });
      mostUnderWay = Math.max(mostUnderWay, ++underWay);
      await sleep(LATENCY_MS);
      underWay--;
      pace.over(isTaken);
      if (isTaken) return;
      pace.limited(retryAfterMs ?? backoffMs * (0.5 + Math.random()));
    }
  }
  await Promise.all(Array.from({ length: count }, send));
  const refused = sent.filter(({ isTaken }) => !isTaken).length;
  return { sent, refused, mostUnderWay, seconds: (Date.now() - started) / 1e3 };
}

for (const workers of [1, 4, 8])
  test(`a pace without refusals keeps ${workers} requests under way`, () =>
    inMockTime(async () => {
      const { mostUnderWay, seconds } = await sendAll(80, workers, () => true);
      assert.equal(mostUnderWay, workers);
      assert.ok(seconds <= (80 / workers) * ((LATENCY_MS + TICK_MS) / 1e3), `${seconds} s`);
    }));

for (const [name, makeLimit] of [
  ["in any second", makeSlidingLimit],
  ["by the clock", makeWindowLimit],
  ["on average", makeBucketLimit],
] as const)
  for (const workers of [4, 8])
    for (const retryAfterMs of [undefined, 1000])
      test(`${workers} workers waste at most a third of 10 requests a second ${name}, ${retryAfterMs ?? "no"} Retry-After`, () =>
        inMockTime(async () => {
          const { refused, seconds } = await sendAll(400, workers, makeLimit(10), retryAfterMs);
          assert.ok(seconds <= 60, `${seconds} s for what the limit allows in 40 s`);
          assert.ok(refused <= 400 / 10, `${refused} refused`);
        }));

test("a refusal makes all workers pause, and go on more slowly", () =>
  inMockTime(async () => {
    let count = 0;
    const { sent, mostUnderWay } = await sendAll(60, 4, () => ++count !== 20, 2000);
    const refusedAt = sent[19]?.at ?? 0;
    const underWay = sent.filter(({ at }) => at > refusedAt && at < refusedAt + 2000 + LATENCY_MS);
    assert.ok(underWay.length <= 3, `${underWay.length} sent in the pause`);
    const after = sent.filter(({ at }) => at >= refusedAt + 2000);
    assert.ok(after.length >= 37);
    const gaps = after.slice(1).map(({ at }, n) => at - (after[n]?.at ?? 0));
    assert.ok(Math.min(...gaps) > 20, `${Math.min(...gaps)} ms apart`);
    assert.equal(mostUnderWay, 4);
  }));

test("a pace recovers when Square takes more again", () =>
  inMockTime(async () => {
    const limit = makeSlidingLimit(5);
    const { sent } = await sendAll(2000, 4, (now) => now > 1_010_000 || limit(now));
    const perSecond = (from: number) =>
      sent.filter(({ at }) => at >= from && at < from + 1000).length;
    const last = (sent.at(-1)?.at ?? 0) - 1500;
    assert.ok(perSecond(8_000) <= 6, `${perSecond(8_000)} in second 8`);
    assert.ok(perSecond(last) >= 40, `${perSecond(last)} at the end`);
  }));

test("a stopped run waits for no turn", () =>
  inMockTime(async () => {
    const stop = new AbortController();
    const pace = makePace(1);
    await pace.turn(stop.signal);
    const second = pace.turn(stop.signal);
    stop.abort(new Error("stopped"));
    pace.limited(60_000);
    pace.over(false);
    await assert.rejects(second, /stopped/);
  }));
