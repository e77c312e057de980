/** Sends prepared rows to Square, and saves the replies. */
import type { Database } from "sql.js";
import type { Square, SquareClient } from "square";
import { loadSquare } from "./client.ts";
import { NOT_DELETED, reportSaved, saveCustomers, UNPUSHED } from "./customers.ts";
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
import { buildRow } from "./mapping.ts";
import { searchPages } from "./paging.ts";
import {
  describeUnsaved,
  type NewCustomer,
  type Outcome,
  type PushOptions,
  type PushResult,
  type PushRow,
  type SelectedRow,
  storeReason,
} from "./prepare.ts";
import { formatCounts, pickCounts, recordRun } from "./runs.ts";

/** Returns the country codes that the SDK knows. */
export function listCountries(): ReadonlySet<string> {
  return new Set(Object.values(loadSquare().Square.Country));
}

/**
 * Looks up rows in doubt by reference_id.
 * @returns the customers that Square has for each of them
 * @see https://developer.squareup.com/reference/square/customers-api/search-customers
 */
export async function findInSquare(
  square: SquareClient,
  rows: readonly SelectedRow[],
): Promise<Map<number, Square.Customer[]>> {
  const inDoubt = rows.filter(({ references }) => references.length > 0);
  const entries = inDoubt.map(
    async ({ localId, references }): Promise<[number, Square.Customer[]]> => {
      const customers = new Map<string | undefined, Square.Customer>();
      for (const exact of references)
        for await (const page of searchPages(square, { referenceId: { exact } }))
          for (const customer of page.customers) customers.set(customer.id, customer);
      return [localId, [...customers.values()]];
    },
  );
  return new Map(await Promise.all(entries));
}

/** What Square replied for one row: a customer, errors, or neither, which means that it is unknown. */
export interface Reply {
  row: PushRow;
  customer?: Square.Customer | undefined;
  errors: SquareErrorEntry[];
}

/**
 * Creates customers in Square.
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
  const groups = useBulk ? [rows] : rows.map((row) => [row]);
  const replies: Reply[] = [];
  for (const group of groups) replies.push(...(await sendGroup(square, traffic, group, useBulk)));
  return replies;
}

/**
 * Sends rows with one request. If Square rejects the whole call, the rows that its errors name are
 * taken out, and the others are sent again. If the errors name none, each row is sent alone. That is
 * a bulk call of one: Square does not document whether its idempotency keys also count for
 * CreateCustomer.
 */
async function sendGroup(
  square: SquareClient,
  traffic: Traffic,
  rows: readonly PushRow[],
  useBulk: boolean,
): Promise<Reply[]> {
  if (rows.length === 0) return [];
  const unansweredBefore = traffic.unanswered;
  const { responses, errors } = await requestCreation(square, rows, useBulk);
  const isUnanswered = traffic.unanswered > unansweredBefore;
  const sent = rows.map((row) => ({ ...row, inDoubt: row.inDoubt || isUnanswered }));
  if (responses !== undefined)
    return sent.map((row) => {
      const response = responses[row.idempotencyKey];
      return { row, customer: response?.customer, errors: readErrors(response) };
    });
  if (sent.length === 1) return sent.map((row) => ({ row, errors }));
  const named: Reply[] = [];
  const others: PushRow[] = [];
  for (const row of sent) {
    const ownErrors = listErrorsOf(row, errors);
    if (ownErrors.length > 0) named.push({ row, errors: ownErrors });
    else others.push(row);
  }
  const groups = named.length > 0 ? [others] : others.map((row) => [row]);
  for (const group of groups) named.push(...(await sendGroup(square, traffic, group, useBulk)));
  return named;
}

/**
 * Makes one request.
 * @returns the response for each idempotency key, or the errors with which Square rejected the call
 * @see https://developer.squareup.com/reference/square/customers-api/bulk-create-customers
 * @see https://developer.squareup.com/reference/square/customers-api/create-customer
 */
async function requestCreation(
  square: SquareClient,
  rows: readonly PushRow[],
  useBulk: boolean,
): Promise<{
  responses?: Record<string, Square.CreateCustomerResponse>;
  errors: SquareErrorEntry[];
}> {
  try {
    const customers: Record<string, NewCustomer> = {};
    for (const { idempotencyKey, customer } of rows) customers[idempotencyKey] = customer;
    if (useBulk) {
      const { responses = {} } = await square.customers.batchCreate({ customers });
      return { responses, errors: [] };
    }
    const responses: Record<string, Square.CreateCustomerResponse> = {};
    for (const [idempotencyKey, customer] of Object.entries(customers))
      responses[idempotencyKey] = await square.customers.create({ ...customer, idempotencyKey });
    return { responses, errors: [] };
  } catch (error) {
    const errors = findContentErrors(error);
    if (errors === undefined) throw error;
    return { errors };
  }
}

/** Lists the errors of a bulk call that are about one row: `customers.<idempotency key>.…`. */
function listErrorsOf(row: PushRow, errors: SquareErrorEntry[]): SquareErrorEntry[] {
  const prefix = `customers.${row.idempotencyKey}`;
  return errors.filter(({ field }) => field === prefix || field.startsWith(`${prefix}.`));
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
export function saveReplies(
  db: Database,
  context: RunContext,
  replies: readonly Reply[],
): PushResult {
  const created = replies.flatMap(({ customer }) => (customer?.id ? [buildRow(customer)] : []));
  const createdFrom = new Map(
    replies.map(({ row, customer }) => [customer?.id ?? "", row.idempotencyKey] as const),
  );
  const saved = saveCustomers(db, created, context.startedAt, createdFrom);
  const unsaved = new Map(saved.notSaved.map(({ id, reason }) => [id, reason]));
  const rows = replies.map(({ row, customer, errors }): PushRow => {
    if (customer?.id) {
      const { id } = customer;
      const problem = unsaved.get(id);
      if (problem === undefined) return { ...row, outcome: "created", id };
      return storeReason(db, row, "held", describeUnsaved(id, problem));
    }
    const words = formatErrors(errors.map((error) => ({ ...error, field: nameField(row, error) })));
    const reason = `Square returned ${words || "no customer"}`;
    if (!isContentRejected(errors)) return { ...row, outcome: "later", reason };
    if (errors.some(({ code }) => code === "IDEMPOTENCY_KEY_REUSED"))
      return storeReason(db, row, "held", `${reason}: it was edited after it was sent`);
    return storeReason(db, row, "refused", reason, !row.inDoubt);
  });
  return { rows, changes: saved.changes };
}

// The field is `customers.<idempotency key>.email_address` or `email_address`.
function nameField(row: PushRow, { field }: SquareErrorEntry): string {
  return field.replace(`customers.${row.idempotencyKey}.`, "");
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
  { source, createdSince, limit }: PushOptions,
  { rows, changes }: PushResult,
  isDryRun: boolean,
): Result {
  const count = (outcome: Outcome) => rows.filter((row) => row.outcome === outcome).length;
  const [refused, held, later] = [count("refused"), count("held"), count("later")];
  const done = { created: count("created"), linked: count("linked"), refused, held };
  const record = recordRun(db, context, { since: createdSince, ...done });
  const taken = new Set(rows.map(({ localId }) => localId));
  const inSquare = `SELECT local_id FROM customers WHERE id IS NOT NULL AND ${NOT_DELETED}`;
  const unpushed = readIds(db, `SELECT local_id FROM customers WHERE ${UNPUSHED}`);
  const leftOut = unpushed.filter((localId) => !taken.has(localId)).length;
  const edited = readIds(db, `${inSquare} AND edited_at <> ''`).length;
  const withOwnId = readIds(db, `${inSquare} AND coalesce(synced_at, '') = ''`);

  const reasons = rows
    .filter(({ reason }) => reason !== null)
    .map(({ localId, outcome, reason }) => `row ${localId} is ${outcome}: ${reason}`);
  const isNarrowed = source !== undefined || createdSince !== null || limit !== undefined;
  if (isNarrowed && leftOut > 0)
    reasons.push(
      `${formatNumber(leftOut, "other row")} left out by --source, --created-since or --limit`,
    );
  if (edited > 0)
    reasons.push(
      `${formatNumber(edited, "edited row")} of customers in Square not sent: see "Edits in the file" in README.md`,
    );
  if (withOwnId.length > 0)
    reasons.push(
      `not sent, because their id is not from Square: row ${withOwnId.join(", ")}; move your own number to reference_id, and set id to NULL`,
    );
  const saved = reportSaved({ changes, notSaved: [] });
  const waiting = [
    formatCounts({ refused, held, "not sent because of their id": withOwnId.length }),
    saved.waiting,
  ].filter((text) => text !== "");

  const plans: Record<string, number> = {
    "would be created": count("create"),
    "would be looked up": count("look up"),
    "would be linked": count("link"),
  };
  const counts = formatCounts({ ...plans, ...done }) || "none is done";
  const selected = formatNumber(rows.length, "row");
  const summary = rows.length === 0 ? "no rows to push" : `${selected} selected: ${counts}`;
  const json = { selected: rows.length, leftOut, edited, ...pickCounts(record), dryRun: isDryRun };
  const result: Result = {
    ...saved,
    reasons,
    waiting: waiting.join(", "),
    summary: isDryRun ? `dry run: ${summary}; nothing was sent or saved` : summary,
    json: { ...json, rows: rows.map(describeForProgram) },
    table: isDryRun && rows.length > 0 ? [PLAN_HEADER, ...rows.map(describeForPerson)] : [],
    ...(refused + held > 0 && { nextStep: NEXT_STEP }),
  };
  if (later > 0)
    result.error = new SyncError(
      "temporary",
      `Cannot create ${later} of ${selected} yet: Square did not answer for them, or another program changed them`,
      "run it again later: these rows keep their idempotency keys",
    );
  return result;
}

const NEXT_STEP =
  "correct a refused row and run it again; for a held row, --link-duplicates if it is the same customer, --allow-duplicates if not, or delete the row";

const PLAN_HEADER = ["row", "plan", "name", "email", "phone"];

function describeForPerson({ localId, outcome, customer }: PushRow): string[] {
  const { givenName, familyName, companyName, emailAddress, phoneNumber } = customer;
  const name = [givenName, familyName].filter(Boolean).join(" ") || companyName;
  return [`${localId}`, outcome, name ?? "", emailAddress ?? "", phoneNumber ?? ""];
}

function describeForProgram({ localId, outcome, id, reason }: PushRow) {
  const isPlan = ["create", "look up", "link"].includes(outcome);
  const word = isPlan ? `would-${outcome.replace(" ", "-")}` : outcome;
  return { local_id: localId, outcome: word, id, reason };
}

function readIds(db: Database, sql: string): number[] {
  return readRows(db, sql).map(({ local_id }) => Number(local_id));
}
