import { setTimeout as sleep } from "node:timers/promises";

const MEASURE_MS = 1_000; // how far back a pace is measured
const CAUTION = 1.05; // stay this much below what Square was seen to take
const RECOVERY_MS = 5_000; // so long without a refusal, and the pace rises…
const RECOVERY = 0.85; // …by leaving this much of the gap

/** The pace that all requests of a run share. */
export interface Pace {
  /** Waits for this request's turn; {@linkcode over} ends it. */
  turn(stop: AbortSignal): Promise<void>;
  /** The request is over. `accepted`: Square took it. */
  over(accepted: boolean): void;
  /** Square refused a request for its rate: everybody pauses for `waitMs`, and goes on more slowly. */
  limited(waitMs: number): void;
}

/**
 * Square does not publish its limits, so the pace is what it was seen to take: at a refusal, as many
 * requests a second as it accepted in the last one. Until there is a refusal, there is no limit.
 */
export function makePace(workers: number): Pace {
  let underWay = 0;
  const waiting: (() => void)[] = [];
  let gapMs = 0;
  let nextAt = 0;
  let pausedUntil = 0;
  let changedAt = 0;
  let acceptedAt: number[] = [];

  return {
    async turn(stop) {
      while (underWay >= workers) await new Promise<void>((resolve) => waiting.push(resolve));
      underWay++;
      for (;;) {
        stop.throwIfAborted();
        const now = Date.now();
        const at = Math.max(nextAt, pausedUntil);
        if (at <= now) break;
        await sleep(at - now, undefined, { signal: stop });
      }
      const now = Date.now();
      if (gapMs > 0 && now - changedAt > RECOVERY_MS) {
        gapMs = gapMs > 1 ? gapMs * RECOVERY : 0;
        changedAt = now;
      }
      nextAt = Math.max(nextAt, now - gapMs) + gapMs;
    },
    over(accepted) {
      if (accepted) acceptedAt.push(Date.now());
      underWay--;
      waiting.shift()?.();
    },
    limited(waitMs) {
      const now = Date.now();
      acceptedAt = acceptedAt.filter((at) => at > now - MEASURE_MS);
      // Requests that were on their way together are refused together: that is one refusal.
      if (now >= pausedUntil) {
        gapMs = (MEASURE_MS / Math.max(acceptedAt.length, 1)) * CAUTION;
        changedAt = now;
      }
      pausedUntil = Math.max(pausedUntil, now + waitMs);
    },
  };
}
