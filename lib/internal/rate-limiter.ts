/**
 * Limits the requests of a run: at most `concurrency` at a time, and after a 429 also at a lower
 * rate. Square does not publish its rate limit. So the limiter measures it: after a 429, it sends
 * as many requests a second as Square accepted in the second before.
 *
 * Libraries such as p-throttle or bottleneck need a fixed rate, so they do not fit.
 */
import { setTimeout as sleep } from "node:timers/promises";

// The gap is 5 % longer than the measured one, so that the run stays below the rate limit.
const SAFETY_FACTOR = 1.05;

// The pause after a 429 without Retry-After. Square does not document that header.
const DEFAULT_PAUSE_MS = 1_000;

// Without another 429, the gap shrinks to about a third in this time.
const RECOVERY_MS = 35_000;

export interface RateLimiter {
  /** Waits until a request may be sent. Every `acquire` needs one `release`. */
  acquire(): Promise<void>;
  /**
   * Reports that a request has ended. After a 429, this pauses all requests, and lowers the rate of
   * those that follow.
   * @param result `accepted` if Square executed the request; for a 429 the time of Retry-After, or
   *   0 without that header; `failed` after any other failure
   */
  release(result: "accepted" | "failed" | { pauseMs: number }): void;
}

/**
 * Creates the rate limiter of a run. All requests share it, because Square limits the requests of
 * an account together.
 * @param concurrency how many requests may run at the same time
 * @param readClock in milliseconds. The default does not change when the computer's clock is set
 */
export function createRateLimiter(
  concurrency: number,
  readClock: () => number = () => performance.now(),
): RateLimiter {
  const waiting: (() => void)[] = [];
  let active = 0;
  // The time between the starts of two requests. It is 0 until the first 429.
  let gapMs = 0;
  let nextStartAt = 0;
  let pausedUntil = 0;
  // The times at which the accepted requests ended. Only those of the last second matter.
  let acceptedAt: number[] = [];

  const listLastSecond = (now: number) => acceptedAt.filter((time) => time > now - 1_000);

  function slowDown(now: number, pauseMs: number): void {
    // Requests that were sent together are rate-limited together. Only the first 429 sets the gap.
    // The others arrive during the pause, when few requests are accepted, and would set it far too
    // long.
    if (now >= pausedUntil)
      gapMs = (1_000 / Math.max(listLastSecond(now).length, 1)) * SAFETY_FACTOR;
    pausedUntil = Math.max(pausedUntil, now + (pauseMs || DEFAULT_PAUSE_MS));
  }

  return {
    async acquire() {
      while (active >= concurrency) await new Promise<void>((resolve) => waiting.push(resolve));
      active++;
      let now = readClock();
      // Another request can move both times while this one sleeps, so compare them again.
      while (Math.max(nextStartAt, pausedUntil) > now) {
        await sleep(Math.max(nextStartAt, pausedUntil) - now);
        now = readClock();
      }
      nextStartAt = now + gapMs;
      // A long gap has few requests and shrinks much with each, a short gap has many and shrinks
      // little with each. So every gap shrinks by the same factor in the same time: to about a
      // third (1/e) within RECOVERY_MS.
      gapMs *= 1 - gapMs / RECOVERY_MS;
    },
    release(result) {
      const now = readClock();
      if (result === "accepted") acceptedAt = [...listLastSecond(now), now];
      else if (result !== "failed") slowDown(now, result.pauseMs);
      active--;
      waiting.shift()?.();
    },
  };
}
