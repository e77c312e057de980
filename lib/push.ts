/** Sends prepared rows to Square, and saves the replies. */
import type { Database } from "sql.js";
import type { Square, SquareClient } from "square";
import { NOT_DELETED, reportSaved, saveCustomers } from "./customers.ts";
import { formatNumber, type Result, type RunContext } from "./internal/cli.ts";
import { SyncError } from "./internal/errors.ts";
import { readRows } from "./internal/sql.ts";
import {
  createDeniedError,
  findContentErrors,
  formatErrors,
  hasCategory,
  isContentRejected,
  readErrors,
  type SquareErrorEntry,
} from "./internal/square-errors.ts";
import type { Traffic } from "./internal/strict-fetch.ts";
import { buildRow, type CustomerRow } from "./mapping.ts";
import { searchPages } from "./paging.ts";
import {
  completeRow,
  type Outcome,
  type PushOptions,
  type PushRow,
  type SelectedRow,
  storeReason,
} from "./prepare.ts";
import { formatCounts, pickCounts, recordRun } from "./runs.ts";

/**
 * Looks up rows in doubt by reference_id.
 * @returns the customers that Square has for each of them
 */
export async function findInSquare(square: SquareClient, rows: readonly SelectedRow[]) {
  const found = new Map<number, Square.Customer[]>();
  const lookUp = async ({ localId, references }: SelectedRow): Promise<void> => {
    const customers = new Map<string | undefined, Square.Customer>();
    for (const exact of references)
      for await (const page of searchPages(square, { referenceId: { exact } }))
        for (const customer of page.customers) customers.set(customer.id, customer);
    found.set(localId, [...customers.values()]);
  };
  await Promise.all(rows.map(lookUp));
  return found;
}

/** What Square replied for one row: a customer, errors, or neither, which means that it is unknown. */
export interface Reply {
  row: PushRow;
  customer?: Square.Customer | undefined;
  errors: SquareErrorEntry[];
}

/**
 * Creates customers in Square. If Square rejects the whole call, the rows that its errors name are
 * taken out, and the others are sent again. If the errors name none, each row is sent alone. That is
 * a bulk call of one: Square does not document whether its idempotency keys also count for
 * CreateCustomer.
 * @param useBulk false = one CreateCustomer for each row
 * @returns a reply for each row. In it, `row.inDoubt` is true if an attempt of this row had no
 *   answer, in this run or an earlier one
 * @throws the error of the SDK if Square does not answer. The rows keep their idempotency keys
 */
export async function createCustomers(
  square: SquareClient,
  traffic: Traffic,
  rows: readonly PushRow[],
  useBulk: boolean,
): Promise<Reply[]> {
  const replies: Reply[] = [];
  // Each group is sent with one request. The loop adds the groups that are sent again.
  const groups = useBulk ? [rows] : rows.map((row) => [row]);
  for (const group of groups) {
    if (group.length === 0) continue;
    const unansweredBefore = traffic.unanswered;
    let responses: Record<string, Square.CreateCustomerResponse> = {};
    let rejection: SquareErrorEntry[] = [];
    try {
      responses = await requestCreation(square, group, useBulk);
    } catch (error) {
      rejection = findContentErrors(error) ?? [];
      if (rejection.length === 0) throw error;
    }
    // The SDK has repeated the request. An attempt without an answer may have created the customers.
    const wasUnanswered = traffic.unanswered > unansweredBefore;
    const others: PushRow[] = [];
    for (const prepared of group) {
      const row = { ...prepared, inDoubt: prepared.inDoubt || wasUnanswered };
      const response = responses[row.idempotencyKey];
      // In a bulk call, the field is `customers.<idempotency key>` or `customers.<key>.country`.
      const prefix = `customers.${row.idempotencyKey}.`;
      const ownErrors = rejection.filter(
        ({ field }) => group.length === 1 || `${field}.`.startsWith(prefix),
      );
      if (rejection.length > 0 && ownErrors.length === 0) others.push(row);
      else {
        const errors = [...ownErrors, ...readErrors(response)];
        replies.push({ row, customer: response?.customer, errors });
      }
    }
    if (others.length < group.length) groups.push(others);
    else groups.push(...others.map((row) => [row]));
  }
  return replies;
}

/**
 * @returns the response for each idempotency key
 * @see https://developer.squareup.com/reference/square/customers-api/bulk-create-customers
 * @see https://developer.squareup.com/reference/square/customers-api/create-customer
 */
async function requestCreation(square: SquareClient, rows: readonly PushRow[], useBulk: boolean) {
  if (useBulk) {
    const customers = Object.fromEntries(rows.map((row) => [row.idempotencyKey, row.customer]));
    const { responses = {} } = await square.customers.batchCreate({ customers });
    return responses;
  }
  const responses: Record<string, Square.CreateCustomerResponse> = {};
  for (const { idempotencyKey, customer } of rows)
    responses[idempotencyKey] = await square.customers.create({ ...customer, idempotencyKey });
  return responses;
}

/**
 * Saves the replies of Square in the rows.
 *
 * | Square's answer                                | The row            | Its idempotency key      |
 * | ---------------------------------------------- | ------------------ | ------------------------ |
 * | the customer                                   | gets the id        | stays                    |
 * | refused, and every attempt was answered        | refused            | cleared: nothing was     |
 * |                                                |                    | created; and also the    |
 * |                                                |                    | reference_id that is its |
 * |                                                |                    | copy                     |
 * | refused, after an attempt without an answer    | refused            | stays: that attempt may  |
 * |                                                |                    | have created it          |
 * | key used with other values                     | held               | stays                    |
 * | no answer, or an error that is not about it    | sent again later   | stays                    |
 */
export function saveReplies(db: Database, context: RunContext, replies: readonly Reply[]) {
  const created: CustomerRow[] = [];
  const createdFrom = new Map<string, string>();
  for (const { row, customer } of replies) {
    if (!customer?.id) continue;
    created.push(buildRow(customer));
    createdFrom.set(customer.id, row.idempotencyKey);
  }
  const saved = saveCustomers(db, created, context.startedAt, createdFrom);
  return replies.map(({ row, customer, errors }): PushRow => {
    if (customer?.id) return completeRow(db, row, "created", customer.id, saved);
    // The field is `customers.<idempotency key>.email_address` or `email_address`.
    const prefix = `customers.${row.idempotencyKey}.`;
    const named = errors.map((error) => ({ ...error, field: error.field.replace(prefix, "") }));
    const reason = `Square returned ${formatErrors(named) || "no customer"}`;
    if (!isContentRejected(errors)) return { ...row, outcome: "later", reason };
    if (errors.some(({ code }) => code === "IDEMPOTENCY_KEY_REUSED"))
      return storeReason(db, row, "held", `${reason}: it was edited after it was sent`);
    return storeReason(db, row, "refused", reason, !row.inDoubt);
  });
}

/**
 * Ends the run if Square rejected the token for one row, because it would do so for all others.
 * @throws SyncError (denied)
 */
export function requireAcceptedToken(replies: readonly Reply[]): void {
  const errors = replies.flatMap((reply) => reply.errors);
  if (hasCategory(errors, "AUTHENTICATION_ERROR")) throw createDeniedError(formatErrors(errors));
}

/**
 * Records a push, and builds its result.
 * @param rows what happened to the selected rows; in a dry run, what would happen
 */
export function finishPush(
  db: Database,
  context: RunContext,
  options: PushOptions,
  rows: readonly PushRow[],
): Result {
  const { createdSince, isDryRun } = options;
  const count = (outcome: Outcome) => rows.filter((row) => row.outcome === outcome).length;
  const [refused, held, later] = [count("refused"), count("held"), count("later")];
  const done = { created: count("created"), linked: count("linked"), refused, held };
  const record = recordRun(db, context, { since: createdSince, ...done });
  const { leftOut, edited, withOwnId, notes } = describeOtherRows(db, options, rows);
  const reasons = rows
    .filter(({ reason }) => reason !== null)
    .map(({ localId, outcome, reason }) => `row ${localId} is ${outcome}: ${reason}`);
  const saved = reportSaved({ changes: rows.flatMap(({ changes }) => changes), notSaved: [] });
  const unsent = formatCounts({ refused, held, "not sent because of their id": withOwnId });
  const waiting = [unsent, saved.waiting].filter((text) => text !== "");

  const selected = formatNumber(rows.length, "row");
  const plans = {
    "would be created": count("create"),
    "would be looked up": count("look up"),
    "would be linked": count("link"),
  };
  const counts = formatCounts({ ...plans, ...done }) || "none is done";
  const summary = rows.length === 0 ? "no rows to push" : `${selected} selected: ${counts}`;
  const nextStep =
    "correct a refused row and run it again; for a held row, --link-duplicates if it is the same customer, --allow-duplicates if not, or delete the row";
  const error = new SyncError(
    "temporary",
    `Cannot create ${later} of ${selected} yet: Square did not answer for them, or another program changed them`,
    "run it again later: these rows keep their idempotency keys",
  );
  const json = { selected: rows.length, leftOut, edited, ...pickCounts(record), dryRun: isDryRun };
  return {
    ...saved,
    reasons: [...reasons, ...notes],
    waiting: waiting.join(", "),
    summary: isDryRun ? `dry run: ${summary}; nothing was sent or saved` : summary,
    json: { ...json, rows: rows.map(describeForProgram) },
    table: isDryRun && rows.length > 0 ? buildPlan(rows) : [],
    ...(refused + held > 0 && { nextStep }),
    ...(later > 0 && { error }),
  };
}

/** Counts the rows that this run did not take, and describes why they are not sent. */
function describeOtherRows(db: Database, options: PushOptions, rows: readonly PushRow[]) {
  const { source, createdSince, limit } = options;
  const readIds = (condition: string) => {
    const sql = `SELECT local_id FROM customers WHERE ${NOT_DELETED} AND ${condition}`;
    return readRows(db, sql).map(({ local_id }) => Number(local_id));
  };
  const taken = new Set(rows.map(({ localId }) => localId));
  const leftOut = readIds("id IS NULL").filter((localId) => !taken.has(localId)).length;
  const edited = readIds("id IS NOT NULL AND edited_at <> ''").length;
  // The scripts set synced_at when they save a customer of Square.
  const withOwnId = readIds("id IS NOT NULL AND coalesce(synced_at, '') = ''");
  const notes: string[] = [];
  const isNarrowed = source !== undefined || createdSince !== null || limit !== undefined;
  if (isNarrowed && leftOut > 0)
    notes.push(
      `${formatNumber(leftOut, "other row")} left out by --source, --created-since or --limit`,
    );
  if (edited > 0)
    notes.push(
      `${formatNumber(edited, "edited row")} of customers in Square not sent: see "Edits in the file" in README.md`,
    );
  if (withOwnId.length > 0)
    notes.push(
      `not sent, because their id is not from Square: row ${withOwnId.join(", ")}; move your own number to reference_id, and set id to NULL`,
    );
  return { leftOut, edited, withOwnId: withOwnId.length, notes };
}

function buildPlan(rows: readonly PushRow[]): string[][] {
  const lines = rows.map(({ localId, outcome, customer }) => {
    const { givenName, familyName, companyName, emailAddress, phoneNumber } = customer;
    const name = [givenName, familyName].filter(Boolean).join(" ") || companyName;
    return [`${localId}`, outcome, name ?? "", emailAddress ?? "", phoneNumber ?? ""];
  });
  return [["row", "plan", "name", "email", "phone"], ...lines];
}

function describeForProgram({ localId, outcome, id, reason }: PushRow) {
  const isPlan = ["create", "look up", "link"].includes(outcome);
  const word = isPlan ? `would-${outcome.replace(" ", "-")}` : outcome;
  return { local_id: localId, outcome: word, id, reason };
}
