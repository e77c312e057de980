/** What push-new reports at the end of a run. */
import { isUncheckedToken, type StoredAccount } from "./account.ts";
import type { RunContext } from "./context.ts";
import { SyncError } from "./errors.ts";
import { formatCounts, formatNumber, formatTable } from "./report.ts";

/** The part of a pushed row that is reported. */
interface ReportedRow {
  localId: string;
  outcome: "ready" | "created" | "linked" | "refused" | "held" | "later";
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

// How an outcome reads in a sentence. The counts keep the short names of --json and sync_runs.
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

/** Builds the result of a push. */
export function describePush(
  context: RunContext,
  rows: readonly ReportedRow[],
  rowsWithOwnId: readonly string[],
) {
  const { created, linked, refused, held, later } = countOutcomes(rows);
  const counts = { created, linked, refused, held };
  const selected = `${formatNumber(rows.length, "row")} selected`;
  const outcomes = formatCounts(counts) || "none was sent";
  return {
    ...describeRows(context, rows, rowsWithOwnId),
    summary: rows.length === 0 ? "no rows to push" : `${selected}: ${outcomes}`,
    json: buildJson(context, rows, false),
    details: rows
      .filter(({ outcome }) => outcome === "created" || outcome === "linked")
      .map(({ localId, id, outcome }) => `row ${localId}, customer ${id}: ${outcome}`),
    error:
      later === 0
        ? undefined
        : new SyncError(
            "temporary",
            `Cannot create ${later} of ${formatNumber(rows.length, "row")} yet: Square did not answer for them, or another program changed them`,
            "run it again later: these rows keep their idempotency keys, and the others are done",
          ),
  };
}

/** Builds the result of a dry run: a table of what would be sent. */
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
  const { refused, held } = countOutcomes(rows);
  const ready = rows.filter(({ outcome }) => outcome === "ready");
  const lookedUp = ready.filter(({ inDoubt }) => inDoubt).length;
  const planned = [
    [ready.length - lookedUp, "would be created"],
    [lookedUp, "would be looked up"],
    [refused, "refused"],
    [held, "held"],
  ] as const;
  const outcomes = planned
    .filter(([count]) => count > 0)
    .map(([count, word]) => `${count} ${word}`);
  const table = rows.map((row) => [row.localId, describePlan(row), ...describeCustomer(row)]);
  return {
    ...describeRows(context, rows, rowsWithOwnId),
    lines: rows.length === 0 ? [] : formatTable(["row", "plan", "name", "email", "phone"], table),
    summary:
      rows.length === 0
        ? "dry run: no rows to push"
        : `dry run: ${formatNumber(rows.length, "row")} selected: ${outcomes.join(", ")}; nothing was sent or saved`,
    json: buildJson(context, rows, true),
  };
}

/** Warns about each row that a person has to look at. */
function describeRows(
  context: RunContext,
  rows: readonly ReportedRow[],
  rowsWithOwnId: readonly string[],
) {
  for (const { localId, outcome, reason } of rows)
    if (reason !== null) context.warn(`row ${localId} is ${OUTCOME_WORDS[outcome]}: ${reason}`);
  if (rowsWithOwnId.length > 0) {
    const shown = rowsWithOwnId.slice(0, 10).join(", ");
    const more = rowsWithOwnId.length > 10 ? `, … (${rowsWithOwnId.length} rows)` : "";
    context.warn(`not sent, because no pull has brought their id: row ${shown}${more}`);
  }
  const { refused, held } = countOutcomes(rows);
  return {
    hasWaitingRows: refused + held + rowsWithOwnId.length > 0,
    waitingText: [
      formatCounts({ refused, held }),
      rowsWithOwnId.length > 0 && `${rowsWithOwnId.length} not sent because of their id`,
    ]
      .filter(Boolean)
      .join(", "),
    nextStep: listNextSteps(rows, rowsWithOwnId).join("; ") || undefined,
  };
}

function listNextSteps(rows: readonly ReportedRow[], rowsWithOwnId: readonly string[]): string[] {
  const steps: string[] = [];
  const held = rows.filter(({ outcome }) => outcome === "held");
  if (rows.some(({ outcome }) => outcome === "refused"))
    steps.push("correct the rejected rows and run it again");
  if (held.some(({ reason }) => reason?.startsWith("same ")))
    steps.push("change or delete the rows on hold, or send them with --allow-duplicates");
  if (held.some(({ reason }) => reason?.includes("subscribed")))
    steps.push(
      "send rows with email_unsubscribed with --allow-subscribe, which creates them as subscribed",
    );
  if (rowsWithOwnId.length > 0)
    steps.push(
      "your own number belongs in reference_id: UPDATE customers SET reference_id = id, id = NULL WHERE local_id IN (…)",
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
      const planned = inDoubt ? "would-look-up" : "would-create";
      return {
        local_id: Number(localId),
        outcome: outcome === "ready" ? planned : outcome,
        id,
        reason,
      };
    }),
  };
}

function describePlan({ outcome, inDoubt }: ReportedRow): string {
  if (outcome === "held" || outcome === "refused") return OUTCOME_WORDS[outcome];
  if (outcome !== "ready") return outcome;
  return inDoubt ? "look up" : "create";
}

function describeCustomer({ customer }: ReportedRow): string[] {
  const { givenName, familyName, companyName, emailAddress, phoneNumber } = customer;
  const name = [givenName, familyName].filter(Boolean).join(" ") || companyName;
  return [name ?? "", emailAddress ?? "", phoneNumber ?? ""];
}
