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
   * Reports that a request has ended.
   * @param wasAccepted true if Square executed it; false after a rate limit or another failure
   */
  release(wasAccepted: boolean): void;
  /**
   * Pauses all requests after a 429, and lowers the rate of those that follow.
   * @param waitMs the time of Retry-After, or 0 without that header
   */
  slowDown(waitMs: number): void;
}

/**
 * Creates the rate limiter of a run. All requests share it, because Square limits the requests of
 * an account together.
 * @param concurrency how many requests may run at the same time
 */
export function createRateLimiter(concurrency: number): RateLimiter {
  const waiting: (() => void)[] = [];
  let active = 0;
  // The time between the starts of two requests. It is 0 until the first 429.
  let gapMs = 0;
  let nextStartAt = 0;
  let pausedUntil = 0;
  // The times at which the accepted requests ended. Only those of the last second matter.
  let acceptedAt: number[] = [];

  const listLastSecond = (now: number) => acceptedAt.filter((time) => time > now - 1_000);

  return {
    async acquire() {
      while (active >= concurrency) await new Promise<void>((resolve) => waiting.push(resolve));
      active++;
      let now = Date.now();
      // Another request can move both times while this one sleeps, so compare them again.
      while (Math.max(nextStartAt, pausedUntil) > now) {
        await sleep(Math.max(nextStartAt, pausedUntil) - now);
        now = Date.now();
      }
      nextStartAt = now + gapMs;
      // Each request shortens the gap by the fraction gapMs / RECOVERY_MS. A long gap has few
      // requests with large steps, a short one many with small steps. So every gap shrinks to about
      // a third within RECOVERY_MS.
      gapMs *= 1 - gapMs / RECOVERY_MS;
    },
    release(wasAccepted) {
      const now = Date.now();
      if (wasAccepted) acceptedAt = [...listLastSecond(now), now];
      active--;
      waiting.shift()?.();
    },
    slowDown(waitMs) {
      const now = Date.now();
      // Requests that were sent together are rate-limited together. Only the first 429 sets the gap.
      // The others arrive during the pause, when few requests are accepted, and would set it far too
      // long.
      if (now >= pausedUntil)
        gapMs = (1_000 / Math.max(listLastSecond(now).length, 1)) * SAFETY_FACTOR;
      pausedUntil = Math.max(pausedUntil, now + (waitMs || DEFAULT_PAUSE_MS));
    },
  };
}
