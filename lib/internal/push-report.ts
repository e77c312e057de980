/** Builds what push-new reports at the end of a run. */
import { isUncheckedToken, type StoredAccount } from "./account.ts";
import type { RunContext } from "./context.ts";
import { SyncError } from "./errors.ts";
import { convertLocalId, formatCounts, formatNumber, formatTable } from "./report.ts";

/** The part of a pushed row that is reported. */
interface ReportedRow {
  localId: string;
  /** `later`: the row was not sent, or Square did not answer for it. A later run tries again. */
  outcome: "ready" | "created" | "linked" | "refused" | "held" | "later";
  /**
   * Why a row is on hold. It decides what the report suggests. `edited`: the row was changed after
   * it was sent. `not saved`: the customer is in Square, but the table rejected it.
   */
  holdReason: "duplicate" | "opt-out" | "edited" | "not saved" | null;
  /** It was sent before and its outcome is unknown, so a push looks it up first. */
  inDoubt: boolean;
  id: string | null;
  reason: string | null;
  customer: {
    givenName?: string | null;
    familyName?: string | null;
    companyName?: string | null;
    emailAddress?: string | null;
    phoneNumber?: string | null;
  };
}

// The words of each outcome in a sentence. The counts use the names of --json and sync_runs.
const OUTCOME_WORDS = {
  ready: "ready",
  created: "created",
  linked: "linked",
  refused: "rejected",
  held: "on hold",
  later: "not done yet",
};

/** Counts the rows by outcome. */
export function countOutcomes(rows: readonly ReportedRow[]) {
  const counts = { ready: 0, created: 0, linked: 0, refused: 0, held: 0, later: 0 };
  for (const { outcome } of rows) counts[outcome]++;
  return counts;
}

/**
 * Builds the result of a push. Also prints a warning for each row whose edit was replaced.
 * @param rowsWithOwnId the local_id of each row whose id was written by the user, and not by Square
 */
export function describePush(
  context: RunContext,
  rows: readonly ReportedRow[],
  rowsWithOwnId: readonly string[],
) {
  const { created, linked, refused, held, later } = countOutcomes(rows);
  const outcomes = formatCounts({ created, linked, refused, held }) || "none is done";
  const selected = formatNumber(rows.length, "row");
  const done = rows.filter(isDone);
  // A created or linked row has a reason only if somebody edited it after it was sent, and Square's
  // value replaced the edit. That is a warning, so it is printed with --quiet too.
  for (const row of done) if (row.reason !== null) context.warn(formatReason(row, row.reason));
  return {
    ...describeWaitingRows(context, rows, rowsWithOwnId),
    summary: rows.length === 0 ? "no rows to push" : `${selected} selected: ${outcomes}`,
    json: buildJson(context, rows, false),
    details: done.map(({ localId, id, outcome }) => `row ${localId}, customer ${id}: ${outcome}`),
    error:
      later === 0
        ? undefined
        : new SyncError(
            "temporary",
            `Cannot create ${later} of ${selected} yet: Square did not answer for them, or another program changed them`,
            "run it again later: these rows keep their idempotency keys",
          ),
  };
}

/**
 * Builds the result of a dry run, with a table of the rows that would be sent.
 * @param account the account of the file; undefined = no script has recorded it yet
 */
export function describeDryRun(
  context: RunContext,
  rows: readonly ReportedRow[],
  rowsWithOwnId: readonly string[],
  account: StoredAccount | undefined,
) {
  if (isUncheckedToken(account, context.square.token))
    context.warn(
      "a dry run sends no request, so it is not checked whether this token belongs to the seller of this file",
    );
  const { ready, refused, held } = countOutcomes(rows);
  const lookedUp = rows.filter(({ outcome, inDoubt }) => outcome === "ready" && inDoubt).length;
  const planned = [
    { count: ready - lookedUp, words: "would be created" },
    { count: lookedUp, words: "would be looked up" },
    { count: refused, words: "refused" },
    { count: held, words: "held" },
  ];
  const outcomes = planned
    .filter(({ count }) => count > 0)
    .map(({ count, words }) => `${count} ${words}`);
  const header = ["row", "plan", "name", "email", "phone"];
  const table = rows.map((row) => [row.localId, describePlan(row), ...describeCustomer(row)]);
  return {
    ...describeWaitingRows(context, rows, rowsWithOwnId),
    lines: rows.length === 0 ? [] : formatTable(header, table),
    summary:
      rows.length === 0
        ? "dry run: no rows to push"
        : `dry run: ${formatNumber(rows.length, "row")} selected: ${outcomes.join(", ")}; nothing was sent or saved`,
    json: buildJson(context, rows, true),
  };
}

/** Builds the part of the result that is about rows that wait for a person or for a later run. */
function describeWaitingRows(
  context: RunContext,
  rows: readonly ReportedRow[],
  rowsWithOwnId: readonly string[],
) {
  const reasons: string[] = [];
  for (const row of rows)
    if (row.reason !== null && !isDone(row)) reasons.push(formatReason(row, row.reason));
  if (rowsWithOwnId.length > 0) {
    const shown = rowsWithOwnId.slice(0, 10).join(", ");
    const more = rowsWithOwnId.length > 10 ? `, … (${rowsWithOwnId.length} rows)` : "";
    reasons.push(`not sent, because their id is not from Square: row ${shown}${more}`);
  }

  const { refused, held } = countOutcomes(rows);
  const waiting: string[] = [];
  if (refused + held > 0) waiting.push(formatCounts({ refused, held }));
  if (rowsWithOwnId.length > 0)
    waiting.push(`${rowsWithOwnId.length} not sent because of their id`);
  const nextSteps = listNextSteps(context, rows, rowsWithOwnId);
  return {
    reasons,
    waiting: waiting.join(", "),
    nextStep: nextSteps.length > 0 ? nextSteps.join("; ") : undefined,
  };
}

function isDone({ outcome }: ReportedRow): boolean {
  return outcome === "created" || outcome === "linked";
}

function formatReason({ localId, outcome }: ReportedRow, reason: string): string {
  return `row ${localId} is ${OUTCOME_WORDS[outcome]}: ${reason}`;
}

function listNextSteps(
  context: RunContext,
  rows: readonly ReportedRow[],
  rowsWithOwnId: readonly string[],
): string[] {
  const pullAll = context.commandFor("pull-created", "--since all") ?? "a pull of all customers";
  const holdReasons = new Set(rows.map(({ holdReason }) => holdReason));
  const steps: string[] = [];
  if (rows.some(({ outcome }) => outcome === "refused"))
    steps.push("correct the rejected rows and run it again");
  if (holdReasons.has("duplicate"))
    steps.push("change or delete the rows on hold, or send them with --allow-duplicates");
  if (holdReasons.has("opt-out"))
    steps.push(
      "add --allow-subscribe to create the customers with email_unsubscribed = 1 as subscribed",
    );
  if (holdReasons.has("edited"))
    steps.push(
      "run it again in a few minutes: it links an edited row when search returns it (if the customer was deleted in Square, set idempotency_key to NULL)",
    );
  if (holdReasons.has("not saved"))
    steps.push(
      "remove the reason why the file does not accept the customer, then run the pulls and this script again",
    );
  if (rowsWithOwnId.length > 0)
    steps.push(
      `${pullAll}, which recognizes ids of Square; then move your own numbers from id to reference_id, and set id to NULL`,
    );
  return steps;
}

function buildJson(context: RunContext, rows: readonly ReportedRow[], isDryRun: boolean) {
  const { created, linked, refused, held } = countOutcomes(rows);
  const { requests, retries } = context.traffic;
  return {
    selected: rows.length,
    created,
    linked,
    refused,
    held,
    requests,
    retries,
    dryRun: isDryRun,
    rows: rows.map(({ localId, id, outcome, reason, inDoubt }) => {
      // Only a dry run leaves rows that are still ready.
      const plan = inDoubt ? "would-look-up" : "would-create";
      return {
        local_id: convertLocalId(localId),
        outcome: outcome === "ready" ? plan : outcome,
        id,
        reason,
      };
    }),
  };
}

/** The word in the column `plan` of a dry run. */
function describePlan({ outcome, inDoubt }: ReportedRow): string {
  if (outcome === "ready") return inDoubt ? "look up" : "create";
  return OUTCOME_WORDS[outcome];
}

/** The columns `name`, `email` and `phone` of a dry run. */
function describeCustomer({ customer }: ReportedRow): string[] {
  const { givenName, familyName, companyName, emailAddress, phoneNumber } = customer;
  const name = [givenName, familyName].filter(Boolean).join(" ") || companyName;
  return [name ?? "", emailAddress ?? "", phoneNumber ?? ""];
}
