/**
 * Creates unpushed rows in Square. Before this, prepare.ts has selected and checked the rows, and
 * has stored their idempotency keys. Rows in doubt are looked up first. Then all rows that were not
 * found are sent, and their ids are saved after each reply.
 */
import type { Square, SquareClient } from "square";
import type { DatabaseFile } from "./database.ts";
import type { RunContext } from "./internal/context.ts";
import { SyncError } from "./internal/errors.ts";
import {
  createDeniedError,
  createSquareError,
  findContentErrors,
  formatErrors,
  hasCategory,
  readErrors,
  type SquareErrorEntry,
} from "./internal/square-errors.ts";
import type { NewCustomer } from "./mapping.ts";
import { listErrorsOf, type Success, saveErrors, saveSuccesses } from "./outcome.ts";
import { searchPages } from "./paging.ts";
import { type PushRow, recheckRows, type Selection, saveReason } from "./prepare.ts";

/**
 * Divides rows into batches. Rows with an error of an earlier run go last and into their own
 * batches, because a bad row can make Square reject the whole request, together with the good rows
 * in it.
 */
export function divideIntoBatches(rows: readonly PushRow[], size: number): PushRow[][] {
  const batches: PushRow[][] = [];
  for (const hadError of [false, true]) {
    const group = rows.filter((row) => row.hadError === hadError);
    for (let start = 0; start < group.length; start += size)
      batches.push(group.slice(start, start + size));
  }
  return batches;
}

// ---- Look up rows in doubt ----

/** Searches Square for the rows in doubt, and links those that exist already. */
export async function linkRowsInDoubt(
  square: SquareClient,
  database: DatabaseFile,
  rows: readonly PushRow[],
): Promise<void> {
  const successes: Success[] = [];
  for (const row of rows) {
    if (!row.inDoubt) continue;
    const customer = await findByReference(square, row.references);
    if (customer !== undefined) successes.push({ row, customer, outcome: "linked" });
  }
  if (successes.length > 0) await database.update((db) => saveSuccesses(db, successes));
}

/**
 * Searches for the customer that has one of the references. A `reference_id` is not unique in
 * Square. If two customers are found, it is unknown which one is the row, so neither is returned.
 * The row is then sent again with its idempotency key, for which Square returns the right one.
 */
async function findByReference(
  square: SquareClient,
  references: readonly string[],
): Promise<Square.Customer | undefined> {
  const found = new Map<string, Square.Customer>();
  for (const reference of references) {
    for await (const page of searchPages(square, { referenceId: { exact: reference } })) {
      for (const customer of page.customers) {
        // Square's filter ignores case, so compare again.
        const isSame = customer.referenceId === reference;
        if (isSame && customer.id !== undefined) found.set(customer.id, customer);
      }
    }
  }
  return found.size === 1 ? [...found.values()][0] : undefined;
}

// ---- Send ----

/**
 * Creates customers in Square, and saves their ids. This sets the outcome of each row.
 *
 * One bad row can make Square reject a whole request. If the errors name rows, these are taken out
 * and the others are sent again. If not, each half of the rows is sent alone, until the bad rows
 * are found.
 * @param rows at most 100. Only rows with the outcome `ready` are sent
 * @param options.useBulk false = call CreateCustomer instead of BulkCreateCustomers. Pass one row
 *   then: if the call for a second row failed, the reply for the first one would be lost
 * @throws SquareError when a request fails after all retries
 * @throws SyncError (denied) when Square rejects the token in the reply for a row
 */
export async function createCustomers(
  square: SquareClient,
  database: DatabaseFile,
  context: RunContext,
  rows: readonly PushRow[],
  options: Selection & { useBulk: boolean },
): Promise<void> {
  const checked = rows.filter(({ outcome }) => outcome === "ready");
  // Another program may have edited the rows since they were checked. Send them as they are now.
  await database.update((db) => recheckRows(db, checked, options));
  const ready = checked.filter(({ outcome }) => outcome === "ready");
  if (ready.length === 0) return;

  let responses: Record<string, Square.CreateCustomerResponse>;
  try {
    responses = await sendRows(square, context, ready, options.useBulk);
  } catch (error) {
    const errors = findContentErrors(error);
    if (errors === undefined) {
      await postpone(database, context, ready, error);
      throw error;
    }
    // Square has rejected the whole call. Reject the rows that are to blame, and send the others.
    const { blamed, groups } = divideRejected(ready, errors);
    await database.update((db) => {
      for (const { row, rowErrors } of blamed) saveErrors(db, row, rowErrors);
    });
    for (const group of groups) await createCustomers(square, database, context, group, options);
    return;
  }

  const replies = ready.map((row) => ({ row, reply: responses[row.idempotencyKey] ?? {} }));
  await database.update((db) => {
    const successes: Success[] = [];
    for (const { row, reply } of replies) {
      const { customer } = reply;
      if (customer?.id === undefined) saveErrors(db, row, readErrors(reply));
      else successes.push({ row, customer, outcome: "created" });
    }
    saveSuccesses(db, successes);
  });
  // If Square rejects the token for one row, it would do so for all other batches. So end the run,
  // after the rows that were created are saved.
  const allErrors = replies.flatMap(({ reply }) => readErrors(reply));
  if (hasCategory(allErrors, "AUTHENTICATION_ERROR"))
    throw createDeniedError(formatErrors(allErrors));
}

/** A row that is to blame for a rejected call, and the errors about it. */
interface BlamedRow {
  row: PushRow;
  rowErrors: SquareErrorEntry[];
}

/**
 * Divides the rows of a call that Square has rejected as a whole.
 * @returns the rows that are to blame, and the other rows in groups. Each group has to be sent
 *   again in its own call
 */
function divideRejected(
  rows: readonly PushRow[],
  errors: SquareErrorEntry[],
): { blamed: BlamedRow[]; groups: PushRow[][] } {
  // The errors name rows: send all others together.
  const named = rows
    .map((row) => ({ row, rowErrors: listErrorsOf(row, errors) }))
    .filter(({ rowErrors }) => rowErrors.length > 0);
  if (named.length > 0) {
    const others = rows.filter((row) => !named.some((blamed) => blamed.row === row));
    return { blamed: named, groups: [others] };
  }
  // The errors name no row, and only one was sent.
  if (rows.length === 1)
    return { blamed: rows.map((row) => ({ row, rowErrors: errors })), groups: [] };
  // The errors name none of several rows: send each half alone, to find out which row is to blame.
  const middle = Math.floor(rows.length / 2);
  return { blamed: [], groups: [rows.slice(0, middle), rows.slice(middle)] };
}

/** Sends rows to Square. Returns the response for each idempotency key. */
async function sendRows(
  square: SquareClient,
  context: RunContext,
  rows: readonly PushRow[],
  useBulk: boolean,
): Promise<Record<string, Square.CreateCustomerResponse>> {
  // Counts the attempts without a reply. The client sends such a request again and does not report
  // it.
  const unknownBefore = context.traffic.unknownOutcomes;
  try {
    if (useBulk) return await createInBulk(square, rows);
    const responses: Record<string, Square.CreateCustomerResponse> = {};
    for (const row of rows) responses[row.idempotencyKey] = await createOne(square, row);
    return responses;
  } finally {
    // An attempt without a reply may have created the customers, even if the last attempt was
    // rejected. So the rows are in doubt.
    const hasUnknownOutcome = context.traffic.unknownOutcomes > unknownBefore;
    if (hasUnknownOutcome) {
      for (const row of rows) row.inDoubt = true;
    }
  }
}

/** @see https://developer.squareup.com/reference/square/customers-api/bulk-create-customers */
async function createInBulk(
  square: SquareClient,
  rows: readonly PushRow[],
): Promise<Record<string, Square.CreateCustomerResponse>> {
  const customers: Record<string, NewCustomer> = {};
  for (const { idempotencyKey, customer } of rows) customers[idempotencyKey] = customer;
  const { responses = {} } = await square.customers.batchCreate({ customers });
  return responses;
}

/** @see https://developer.squareup.com/reference/square/customers-api/create-customer */
async function createOne(
  square: SquareClient,
  { idempotencyKey, customer }: PushRow,
): Promise<Square.CreateCustomerResponse> {
  return await square.customers.create({ ...customer, idempotencyKey });
}

/**
 * Saves a temporary error of Square as the `push_error` of the rows that were sent. One of them may
 * be the reason why Square does not answer. With a `push_error`, they come last in the next run,
 * and do not stop the other rows again.
 */
async function postpone(
  database: DatabaseFile,
  context: RunContext,
  rows: readonly PushRow[],
  error: unknown,
): Promise<void> {
  const described = error instanceof SyncError ? error : createSquareError(error, context);
  if (described?.kind !== "temporary") return;
  for (const row of rows) {
    row.outcome = "later";
    row.reason = described.message;
  }
  await database.update((db) => {
    for (const row of rows) saveReason(db, row, { clearKey: false });
  });
}
