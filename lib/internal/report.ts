/** What the scripts report at the end of a run. */
import type { RunContext } from "./context.ts";
import { SyncError } from "./errors.ts";

/** The counts of the summary line, of --json and of sync_runs, under the same names, in this order. */
export type Counts = Partial<
  Record<
    | "created"
    | "inserted"
    | "updated"
    | "unchanged"
    | "linked"
    | "deleted"
    | "merged"
    | "refused"
    | "held",
    number
  >
>;

/** Lists counts without zeros, for example `10 inserted, 2 unchanged`. */
export function formatCounts(counts: Counts): string {
  return Object.entries(counts)
    .filter(([, count]) => count > 0)
    .map(([name, count]) => `${count} ${name}`)
    .join(", ");
}

/** For example `1 customer`, `2 customers`. */
export function formatNumber(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** One changed row for --verbose: number, id and columns, never a value. */
export function formatChange(change: {
  localId: string;
  id: string;
  outcome: string;
  columns: readonly string[];
}): string {
  const columns = change.columns.length > 0 ? `: ${change.columns.join(", ")}` : "";
  return `row ${change.localId}, customer ${change.id}: ${change.outcome}${columns}`;
}

interface Saved {
  inserted: number;
  updated: number;
  unchanged: number;
  linked: number;
  changes: readonly { localId: string; id: string; outcome: string; columns: readonly string[] }[];
  rejected: readonly { id: string; reason: string }[];
}

/**
 * Builds the result of a pull.
 * @param action what the pull looks for: `created` or `updated`
 * @param window with the text for the summary, such as `since 2026-11-24T02:55Z`
 * @param missingCount how many customers Square counted and did not return
 */
export function describePull(
  context: RunContext,
  action: string,
  window: { since: string | null; until: string | null },
  fetched: number,
  saved: Saved,
  missingCount: number,
) {
  const { inserted, updated, unchanged, linked, changes, rejected } = saved;
  const counts = { inserted, updated, unchanged, linked };
  const span = formatWindow(window);
  return {
    summary:
      fetched === 0
        ? `no customers ${action} ${span}`
        : `${formatNumber(fetched, "customer")} fetched ${span}: ${formatCounts(counts)}`,
    json: {
      ...window,
      fetched,
      ...counts,
      requests: context.traffic.requests,
      retries: context.traffic.retries,
    },
    details: changes.map(formatChange),
    error: describeMissing(missingCount) ?? describeRejected(rejected),
  };
}

// 2026-11-24T02:55:31.123Z is shortened to 2026-11-24T02:55Z, which is precise enough for a person.
function formatWindow({ since, until }: { since: string | null; until: string | null }): string {
  const shorten = (time: string) => `${time.slice(0, "2026-11-24T02:55".length)}Z`;
  const start = since === null ? "since the beginning" : `since ${shorten(since)}`;
  return until === null ? start : `${start} until ${shorten(until)}`;
}

// Square counts what it finds. If it returns fewer, the run has failed although every page looked complete.
function describeMissing(missingCount: number): SyncError | undefined {
  if (missingCount === 0) return undefined;
  return new SyncError(
    "failed",
    `Cannot read all customers: Square counted ${missingCount} more than it returned`,
    "run it again: the customers that arrived are saved, and the next run reads the same window",
  );
}

/** The error for customers that a constraint or trigger of the table rejected. */
export function describeRejected(rejected: Saved["rejected"]): SyncError | undefined {
  if (rejected.length === 0) return undefined;
  const shown = rejected.slice(0, 5).map(({ id, reason }) => `${id} (${reason})`);
  const more = rejected.length > shown.length ? `, and ${rejected.length - shown.length} more` : "";
  return new SyncError(
    "failed",
    `Cannot save ${formatNumber(rejected.length, "customer")} that a constraint or trigger of the table rejects: ${shown.join(", ")}${more}`,
    "change the constraint or trigger, or the row that is in the way, and run it again; the other customers are saved",
  );
}

/** Formats a table for a person: columns of equal width, two blanks between them. */
export function formatTable(
  header: readonly string[],
  rows: readonly (readonly string[])[],
): string[] {
  const all = [header, ...rows];
  const widths = header.map((_, column) =>
    Math.max(...all.map((row) => (row[column] ?? "").length)),
  );
  return all.map((row) =>
    row
      .map((cell, column) => cell.padEnd(widths[column] ?? 0))
      .join("  ")
      .trimEnd(),
  );
}

/** The error of the seat belt: too many customers would be marked as deleted. */
export function refuseToMark(
  context: RunContext,
  count: number,
  total: number,
  limit: number,
): SyncError {
  const command = context.commandFor(context.script, `--max-delete ${count}`);
  return new SyncError(
    "failed",
    `Cannot mark ${count} of ${formatNumber(total, "customer")} as deleted or merged: that is more than ${limit}, so nothing was marked`,
    `--dry-run to list them; if they are really gone from Square, ${command ?? `--max-delete ${count}`}`,
  );
}

interface DeletionResult {
  deleted: number;
  merged: number;
  inserted: number;
  saved: Saved;
  marked: readonly {
    localId: string;
    id: string;
    outcome: string;
    columns: readonly string[];
    mergedInto?: string | null;
  }[];
}

/** Builds the result of pull-deleted. */
export function describeDeletions(
  context: RunContext,
  checked: number,
  { deleted, merged, inserted, saved, marked }: DeletionResult,
  isDryRun: boolean,
) {
  const { requests, retries } = context.traffic;
  // A row is updated when its customer was restored, or lost its name, email address and phone number.
  const { updated, linked } = saved;
  const changes = formatCounts({ inserted, updated, linked, deleted, merged });
  const mode = isDryRun ? "dry run: " : "";
  const table = marked.map(({ localId, id, outcome, mergedInto }) => [
    localId,
    id,
    outcome,
    mergedInto ?? "",
  ]);
  const header = ["row", "customer", "is", "merged into"];
  return {
    summary: `${mode}${formatNumber(checked, "customer")} checked: ${changes || "nothing was deleted or merged"}${isDryRun && changes !== "" ? "; nothing was saved" : ""}`,
    lines: isDryRun && marked.length > 0 ? formatTable(header, table) : [],
    json: {
      checked,
      deleted,
      merged,
      inserted,
      requests,
      retries,
      dryRun: isDryRun,
      rows: marked.map(({ localId, id, outcome, mergedInto }) => ({
        local_id: Number(localId),
        id,
        outcome,
        merged_into: mergedInto ?? null,
      })),
    },
    details: [...saved.changes, ...marked].map(formatChange),
    error: describeRejected(saved.rejected),
  };
}
