import { setTimeout as sleep } from "node:timers/promises";

const CAUTION = 1.05; // stay this much below what Square was seen to take
const RECOVERY_MS = 35_000; // without a refusal, the gap shrinks to a third of it in so long

/**
 * The pace that all requests of a run share. Square does not publish its limits, so the pace is what
 * it was seen to take: after a refusal, as many requests a second as it accepted in the second before.
 * @param workers how many requests may be under way at a time
 */
export function makePace(workers: number) {
  const waiting: (() => void)[] = [];
  let underWay = 0;
  let gapMs = 0;
  let nextAt = 0;
  let pausedUntil = 0;
  let acceptedAt: number[] = [];

  return {
    /** Waits for a request's turn; {@linkcode over} must follow. */
    async turn(stop: AbortSignal): Promise<void> {
      while (underWay >= workers) await new Promise<void>((resolve) => waiting.push(resolve));
      stop.throwIfAborted();
      underWay++;
      let now = Date.now();
      for (; Math.max(nextAt, pausedUntil) > now; now = Date.now())
        await sleep(Math.max(nextAt, pausedUntil) - now, undefined, { signal: stop });
      nextAt = now + gapMs;
      // A turn takes gapMs, so a step of this size makes the pace of recovery the same for every gap.
      gapMs *= 1 - gapMs / RECOVERY_MS;
    },
    over(wasAccepted: boolean): void {
      if (wasAccepted) acceptedAt.push(Date.now());
      underWay--;
      waiting.shift()?.();
    },
    /** Square refused a request for its rate: everybody pauses, and goes on more slowly. */
    limited(waitMs: number): void {
      const now = Date.now();
      acceptedAt = acceptedAt.filter((at) => at > now - 1_000);
      // Requests that were under way together are refused together: that is one refusal.
      if (now >= pausedUntil) gapMs = (1_000 / Math.max(acceptedAt.length, 1)) * CAUTION;
      pausedUntil = Math.max(pausedUntil, now + waitMs);
    },
  };
}
