import { setTimeout as sleep } from "node:timers/promises";

// Hand-written: libraries such as p-throttle or bottleneck want a fixed rate, and Square publishes none. So
// the rate is measured: after a 429, as many requests a second as Square accepted in the second before.

const SAFETY_FACTOR = 1.05; // stay 5 % below the rate that Square was seen to accept
const DEFAULT_PAUSE_MS = 1_000; // when a 429 comes without Retry-After, which Square does not document
const RECOVERY_MS = 35_000; // without another 429, the gap shrinks to about a third in this time

export interface RateLimiter {
  /** Waits until a request may be sent. Call `release` when it has ended. */
  acquire(): Promise<void>;
  /** @param wasAccepted whether Square answered the request, instead of rate-limiting or losing it */
  release(wasAccepted: boolean): void;
  /** Pauses all requests after a 429 and slows them down. @param waitMs from Retry-After; 0 if there was none */
  slowDown(waitMs: number): void;
}

/**
 * Limits the requests of a run: at most `concurrency` at a time, and after a 429 at a slower rate. All
 * requests share the limit, because Square limits the account and not the single request.
 */
export function createRateLimiter(concurrency: number): RateLimiter {
  const waiting: (() => void)[] = [];
  let active = 0;
  let gapMs = 0; // between the starts of two requests; 0 until the first 429
  let nextStartAt = 0;
  let pausedUntil = 0;
  let acceptedAt: number[] = []; // when the requests of the last second were accepted

  return {
    async acquire() {
      while (active >= concurrency) await new Promise<void>((resolve) => waiting.push(resolve));
      active++;
      let now = Date.now();
      while (Math.max(nextStartAt, pausedUntil) > now) {
        await sleep(Math.max(nextStartAt, pausedUntil) - now);
        now = Date.now();
      }
      nextStartAt = now + gapMs;
      // A slower rate starts fewer requests. Shrinking the gap by its own share makes the rate recover in the
      // same time whatever the gap is.
      gapMs *= 1 - gapMs / RECOVERY_MS;
    },
    release(wasAccepted) {
      const now = Date.now();
      if (wasAccepted) acceptedAt.push(now);
      if (acceptedAt.length > 100) acceptedAt = acceptedAt.filter((at) => at > now - 1_000);
      active--;
      waiting.shift()?.();
    },
    slowDown(waitMs) {
      const now = Date.now();
      const acceptedInLastSecond = acceptedAt.filter((at) => at > now - 1_000).length;
      // Requests that were sent together are rate-limited together. Only the first one changes the rate.
      if (now >= pausedUntil) gapMs = (1_000 / Math.max(acceptedInLastSecond, 1)) * SAFETY_FACTOR;
      pausedUntil = Math.max(pausedUntil, now + (waitMs || DEFAULT_PAUSE_MS));
    },
  };
}
