/** Builds what the scripts report at the end of a run. */
import type { RunContext } from "./context.ts";
import { SyncError } from "./errors.ts";

/** The counts of the summary line. --json and sync_runs use the same names. */
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

/** Lists counts in the given order, without zeros: `10 inserted, 2 unchanged`. */
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

/** Joins words as in a sentence: `a`, `a and b`, `a, b and c`. */
export function joinWords(words: readonly string[]): string {
  const last = words.at(-1) ?? "";
  return words.length < 2 ? last : `${words.slice(0, -1).join(", ")} and ${last}`;
}

/**
 * Converts a local_id for --json. A number above 2^53 stays a text, because a JavaScript number
 * would name another row.
 */
export function convertLocalId(localId: string): number | string {
  const number = Number(localId);
  return Number.isSafeInteger(number) ? number : localId;
}

/** A changed row, as --verbose lists it. */
interface ReportedChange {
  localId: string;
  id: string;
  outcome: string;
  columns: readonly string[];
  /** The columns of a linked row in which Square's value has replaced another one. */
  replaced?: readonly string[];
}

/**
 * One line of --verbose. It names the changed columns and contains no values, which are personal
 * data.
 */
function formatChange({ localId, id, outcome, columns }: ReportedChange): string {
  const changed = columns.length > 0 ? `: ${columns.join(", ")}` : "";
  return `row ${localId}, customer ${id}: ${outcome}${changed}`;
}

/** The result of saving customers. */
interface Saved {
  inserted: number;
  updated: number;
  unchanged: number;
  linked: number;
  changes: readonly ReportedChange[];
  rejected: readonly { id: string; reason: string }[];
}

// ---- pull-created and pull-updated ----

/** The start and end of a time window as RFC 3339; null = open on that side. */
interface ReportedWindow {
  since: string | null;
  until: string | null;
}

interface PullResult {
  /** What the pull searches for. */
  action: "created" | "updated";
  window: ReportedWindow;
  fetched: number;
  saved: Saved;
  /** How many customers Square counted and did not return. */
  missingCount: number;
}

/** Warns of each row that was linked to a customer with other values, which the save has replaced. */
function warnOfReplacedValues(context: RunContext, changes: readonly ReportedChange[]): void {
  for (const { localId, id, replaced = [] } of changes)
    if (replaced.length > 0)
      context.warn(
        `row ${localId} was linked to customer ${id}: Square's value replaced ${replaced.join(", ")}`,
      );
}

/** Builds the result of pull-created or pull-updated. Also warns of replaced values. */
export function describePull(
  context: RunContext,
  { action, window, fetched, saved, missingCount }: PullResult,
) {
  const { inserted, updated, unchanged, linked } = saved;
  const counts = { inserted, updated, unchanged, linked };
  warnOfReplacedValues(context, saved.changes);
  const span = formatWindow(window);
  return {
    summary:
      fetched === 0
        ? `no customers ${action} ${span}`
        : `${formatNumber(fetched, "customer")} fetched ${span}: ${formatCounts(counts) || "none was saved"}`,
    json: {
      ...window,
      fetched,
      ...counts,
      requests: context.traffic.requests,
      retries: context.traffic.retries,
    },
    details: saved.changes.map(formatChange),
    error: joinErrors(
      createMissingCustomersError(missingCount),
      createRejectedError(saved.rejected),
    ),
  };
}

function formatWindow({ since, until }: ReportedWindow): string {
  const start = since === null ? "since the beginning" : `since ${formatMinute(since)}`;
  return until === null ? start : `${start} until ${formatMinute(until)}`;
}

// Shortens 2026-11-24T02:55:31.123Z to 2026-11-24T02:55Z. A person needs no seconds.
function formatMinute(time: string): string {
  return `${time.slice(0, "2026-11-24T02:55".length)}Z`;
}

/**
 * The error of a run in which Square returned fewer customers than it counted. Such a run has
 * failed, although each page looked complete.
 */
function createMissingCustomersError(missingCount: number): SyncError | undefined {
  if (missingCount === 0) return undefined;
  return new SyncError(
    "failed",
    `Cannot read all customers: Square counted ${missingCount} more than it returned`,
    "run it again: the customers that arrived are saved, and the next run reads the same window",
  );
}

/** The error for customers that a constraint or trigger of the table rejected. */
function createRejectedError(rejected: Saved["rejected"]): SyncError | undefined {
  if (rejected.length === 0) return undefined;
  const shown = rejected.slice(0, 5).map(({ id, reason }) => `${id} (${reason})`);
  const more = rejected.length > shown.length ? `, and ${rejected.length - shown.length} more` : "";
  return new SyncError(
    "failed",
    `Cannot save ${formatNumber(rejected.length, "customer")} that a constraint or trigger of the table rejects: ${shown.join(", ")}${more}`,
    "change the constraint or trigger, or the row that is in the way, and run it again (pull-deleted marks a row that is gone from Square); the other customers are saved",
  );
}

/** Joins two errors of kind `failed`. */
function joinErrors(first: SyncError | undefined, second: SyncError | undefined) {
  if (first === undefined || second === undefined) return first ?? second;
  const nextStep = `${first.nextStep}; ${second.nextStep}`;
  return new SyncError("failed", `${first.message}. ${second.message}`, nextStep);
}

// ---- pull-deleted ----

/** The error of a run that would mark more customers as deleted or merged than its limit allows. */
export function createTooManyMarksError(
  context: RunContext,
  count: number,
  total: number,
  limit: number,
): SyncError {
  const option = `--max-delete ${count}`;
  const command = context.commandFor(context.script, option) ?? option;
  return new SyncError(
    "failed",
    `Cannot mark ${count} of ${formatNumber(total, "customer")} as deleted or merged: that is more than ${limit}, so nothing was marked`,
    `--dry-run to list them; if they are really gone from Square, ${command}`,
  );
}

interface DeletionResult {
  deleted: number;
  merged: number;
  /**
   * The customers that still exist and were saved. The script looks up each customer that search
   * did not return. Search omits a customer that has neither a name nor a company, email address or
   * phone number, so such a customer can still exist.
   */
  saved: Omit<Saved, "rejected">;
  /** The rows that were marked as deleted or merged. */
  marked: readonly (ReportedChange & { mergedInto?: string | null })[];
  /** The customers that a constraint or trigger of the table did not allow to save or to mark. */
  rejected: Saved["rejected"];
}

/**
 * Builds the result of pull-deleted. Also warns of replaced values.
 * @param checked how many customers of the file were compared with Square
 */
export function describeDeletions(
  context: RunContext,
  checked: number,
  { deleted, merged, saved, marked, rejected }: DeletionResult,
  isDryRun: boolean,
) {
  const { requests, retries } = context.traffic;
  if (!isDryRun) warnOfReplacedValues(context, saved.changes);
  // Of these three counts, --json has only `inserted`, as it is documented. --verbose lists all
  // rows.
  const { inserted, updated, linked } = saved;
  const changes = formatCounts({ inserted, updated, linked, deleted, merged });
  const prefix = isDryRun ? "dry run: " : "";
  const suffix = isDryRun && changes !== "" ? "; nothing was saved" : "";
  const header = ["row", "customer", "is", "merged into"];
  const table = marked.map(({ localId, id, outcome, mergedInto }) => [
    localId,
    id,
    outcome,
    mergedInto ?? "",
  ]);
  return {
    summary: `${prefix}${formatNumber(checked, "customer")} checked: ${changes || "nothing was deleted or merged"}${suffix}`,
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
        local_id: convertLocalId(localId),
        id,
        outcome,
        merged_into: mergedInto ?? null,
      })),
    },
    details: [...saved.changes, ...marked].map(formatChange),
    error: createRejectedError(rejected),
  };
}

// ---- Tables ----

/** Formats a table for a person: columns of equal width, separated by two spaces. */
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
