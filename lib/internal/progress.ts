/** Shows a progress bar on stderr. */

const FORMAT = "{bar} {status}";

// The bar appears after this time, because a shorter run needs none.
const DELAY_MS = 1_000;

export interface Progress {
  /** Draws the bar, or updates it. */
  show(done: number, total: number): void;
  /** Removes the bar, so that other text can be printed. The next call of `show` draws it again. */
  hide(): void;
}

/**
 * Creates the progress bar. No bar is drawn with --quiet, when stderr is not a terminal, and on a
 * terminal that cannot move its cursor (TERM=dumb).
 */
export async function createProgress(isQuiet: boolean): Promise<Progress> {
  const canDraw = process.stderr.isTTY && process.env.TERM !== "dumb";
  if (isQuiet || !canDraw) return { show() {}, hide() {} };

  // Loaded here, because most runs have no terminal and draw no bar, for example scheduled ones.
  const { default: cliProgress } = await import("cli-progress");
  const bar = new cliProgress.SingleBar(
    { format: FORMAT, clearOnComplete: true },
    cliProgress.Presets.shades_classic,
  );
  const startedAt = performance.now();
  return {
    show(done, total) {
      const elapsedMs = performance.now() - startedAt;
      if (elapsedMs < DELAY_MS) return;
      // Square can return more customers than it counted, for example new ones during the search.
      const all = Math.max(done, total);
      const payload = { status: formatStatus(done, all, elapsedMs / 1_000) };
      if (!bar.isActive) bar.start(all, done, payload);
      bar.setTotal(all);
      bar.update(done, payload);
    },
    hide() {
      if (bar.isActive) bar.stop();
    },
  };
}

/** Formats the text next to the bar, for example `300/1200 customers, 25 a second, 36 s left`. */
export function formatStatus(done: number, total: number, seconds: number): string {
  const counts = `${done}/${total} customers`;
  // Before the first customers arrive, the rate is 0, and the remaining time would be infinite.
  if (done === 0 || seconds === 0) return counts;
  const rate = done / seconds;
  const roundedRate = rate < 10 ? rate.toFixed(1) : Math.round(rate);
  const remaining = formatDuration((total - done) / rate);
  return `${counts}, ${roundedRate} a second, ${remaining} left`;
}

function formatDuration(seconds: number): string {
  if (seconds < 60) return `${Math.ceil(seconds)} s`;
  const minutes = Math.ceil(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
