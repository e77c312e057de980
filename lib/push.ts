/**
 * Creates unpushed rows in Square. prepare.ts has selected and checked them, and stored their idempotency keys.
 * Rows in doubt are looked up first. Then the others are sent, and the ids are saved after every reply.
 */
import type { Square, SquareClient } from "square";
import type { DatabaseFile } from "./database.ts";
import type { RunContext } from "./internal/context.ts";
import { SyncError } from "./internal/errors.ts";
import {
  describeDenial,
  describeSquareError,
  findRejection,
  formatErrors,
  hasCategory,
  readErrors,
} from "./internal/square-errors.ts";
import type { NewCustomer } from "./mapping.ts";
import { listErrorsOf, type Success, saveErrors, saveSuccesses } from "./outcome.ts";
import { searchPages } from "./paging.ts";
import { checkAgain, type PushRow, type Selection, saveReason } from "./prepare.ts";

/**
 * Divides rows into batches. Rows that had a problem before go last and into batches of their own, so that they
 * do not make Square reject a call with good rows.
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

/** Searches Square for the rows in doubt and links those that exist already. */
export async function linkRowsInDoubt(
  square: SquareClient,
  database: DatabaseFile,
  rows: readonly PushRow[],
): Promise<void> {
  const found = new Map<PushRow, Square.Customer>();
  for (const row of rows) {
    const customer = row.inDoubt ? await findByReference(square, row.references) : undefined;
    if (customer !== undefined) found.set(row, customer);
  }
  if (found.size === 0) return;
  const successes = [...found].map(
    ([row, customer]): Success => ({ row, customer, outcome: "linked" }),
  );
  await database.update((db) => saveSuccesses(db, successes));
}

// A reference_id is not unique in Square. If two customers have it, neither is known to be the row.
async function findByReference(square: SquareClient, references: readonly string[]) {
  const found = new Map<string, Square.Customer>();
  // Square's filter ignores case, so compare again.
  for (const exact of references)
    for await (const { customers } of searchPages(square, { referenceId: { exact } }))
      for (const customer of customers)
        if (customer.id !== undefined && customer.referenceId === exact)
          found.set(customer.id, customer);
  return found.size === 1 ? [...found.values()][0] : undefined;
}

// ---- Send ----

/**
 * Creates customers in Square and saves their ids. When Square rejects the call as a whole, the rows that its
 * errors name are taken out, and the others are sent again. If the errors name no row, the rows are divided into
 * halves, until the bad ones are found.
 * @param rows at most 100; those whose outcome is not `ready` are left out
 * @param options.batchSize 1 = call CreateCustomer for each row instead of BulkCreateCustomers
 * @throws SquareError when Square does not answer, or rejects the token
 */
export async function createCustomers(
  square: SquareClient,
  database: DatabaseFile,
  context: RunContext,
  rows: readonly PushRow[],
  options: Selection & { batchSize: number },
): Promise<void> {
  const due = rows.filter(({ outcome }) => outcome === "ready");
  // Another program may have changed the rows since they were checked. Send them as they are now.
  await database.update((db) => checkAgain(db, due, options));
  const ready = due.filter(({ outcome }) => outcome === "ready");
  if (ready.length === 0) return;

  const before = context.traffic.unknownOutcomes;
  const isUncertain = () => context.traffic.unknownOutcomes > before;
  let responses: Record<string, Square.CreateCustomerResponse>;
  try {
    responses =
      options.batchSize === 1
        ? await createOneByOne(square, ready)
        : await createInBulk(square, ready);
  } catch (error) {
    // An attempt without a reply may have created the customers, whatever the next attempt returned.
    if (isUncertain()) for (const row of ready) row.inDoubt = true;
    const errors = findRejection(error);
    if (errors === undefined) {
      await postpone(database, context, ready, error);
      throw error;
    }
    const named = ready.filter((row) => listErrorsOf(row, errors).length > 0);
    if (named.length > 0 || ready.length === 1) {
      const bad = named.length > 0 ? named : ready;
      await database.update((db) => {
        for (const row of bad)
          saveErrors(db, row, named.length > 0 ? listErrorsOf(row, errors) : errors);
      });
      await createCustomers(square, database, context, ready, options);
    } else {
      const middle = ready.length >> 1;
      await createCustomers(square, database, context, ready.slice(0, middle), options);
      await createCustomers(square, database, context, ready.slice(middle), options);
    }
    return;
  }

  if (isUncertain()) for (const row of ready) row.inDoubt = true;
  const replies = ready.map((row) => ({ row, reply: responses[row.idempotencyKey] ?? {} }));
  await database.update((db) => {
    const successes: Success[] = [];
    for (const { row, reply } of replies) {
      if (reply.customer?.id === undefined) saveErrors(db, row, readErrors(reply));
      else successes.push({ row, customer: reply.customer, outcome: "created" });
    }
    saveSuccesses(db, successes);
  });
  const allErrors = replies.flatMap(({ reply }) => readErrors(reply));
  if (hasCategory(allErrors, "AUTHENTICATION_ERROR")) throw describeDenial(formatErrors(allErrors));
}

/** @see https://developer.squareup.com/reference/square/customers-api/bulk-create-customers */
async function createInBulk(square: SquareClient, rows: readonly PushRow[]) {
  const customers: Record<string, NewCustomer> = {};
  for (const { idempotencyKey, customer } of rows) customers[idempotencyKey] = customer;
  const { responses = {} } = await square.customers.batchCreate({ customers });
  return responses;
}

/** @see https://developer.squareup.com/reference/square/customers-api/create-customer */
async function createOneByOne(square: SquareClient, rows: readonly PushRow[]) {
  const responses: Record<string, Square.CreateCustomerResponse> = {};
  for (const { idempotencyKey, customer } of rows)
    responses[idempotencyKey] = await square.customers.create({ ...customer, idempotencyKey });
  return responses;
}

// One of these rows may be why Square does not answer. With a reason they come last in the next run.
async function postpone(
  database: DatabaseFile,
  context: RunContext,
  rows: readonly PushRow[],
  error: unknown,
): Promise<void> {
  const described = error instanceof SyncError ? error : describeSquareError(error, context);
  if (described?.kind !== "temporary") return;
  await database.update((db) => {
    for (const row of rows) saveReason(db, { ...row, outcome: "later", reason: described.message });
  });
}
