/** The progress bar on stderr. */

const FORMAT = "{bar} {status}";

// A run that ends sooner needs no bar.
const DELAY_MS = 1_000;

export interface Progress {
  /** Draws the bar, or moves it. */
  show(done: number, total: number): void;
  /** Removes the bar, so that its line can take other text. The next `show` draws it again. */
  hide(): void;
}

/**
 * Prepares the progress bar. It stays invisible with --quiet, when stderr is not a terminal, and on a
 * terminal that cannot move its cursor (TERM=dumb).
 */
export async function createProgress(isQuiet: boolean): Promise<Progress> {
  const hasTerminal = process.stderr.isTTY && process.env.TERM !== "dumb";
  if (isQuiet || !hasTerminal) return { show() {}, hide() {} };

  // Loaded here because most runs, such as those from cron, have no terminal and do not need it.
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
      // More can arrive than Square counted, for example customers created during the search.
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

/** For example `300/1200 customers, 25 a second, 36 s left`. */
export function formatStatus(done: number, total: number, seconds: number): string {
  const counts = `${done}/${total} customers`;
  // Before the first customers arrive there is no rate, and the time left would be infinite.
  if (done === 0 || seconds === 0) return counts;
  const rate = done / seconds;
  const left = formatDuration((total - done) / rate);
  return `${counts}, ${rate < 10 ? rate.toFixed(1) : Math.round(rate)} a second, ${left} left`;
}

function formatDuration(seconds: number): string {
  if (seconds < 60) return `${Math.ceil(seconds)} s`;
  const minutes = Math.ceil(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
