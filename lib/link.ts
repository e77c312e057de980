/**
 * Links rows to customers that are in Square already. The row of the customer stays as it is, and
 * the linked row is marked as after a merge, so that joins follow it and no push sends it.
 */
import type { Database } from "sql.js";
import type { Square, SquareClient } from "square";
import { linkRow, type RowChange, saveCustomers } from "./customers.ts";
import { lookUpCustomers } from "./deleted.ts";
import type { RunContext } from "./internal/cli.ts";
import { findInvalidRequestErrors, formatErrors } from "./internal/square-errors.ts";
import { buildRow, hasOptOut } from "./mapping.ts";
import { describeUnsaved, type PushResult, type PushRow, storeReason } from "./prepare.ts";
import { formatTime } from "./window.ts";

/** A row to link, and its customer as it is in Square now; or the reason why it cannot be linked. */
export interface Link {
  row: PushRow;
  customer?: Square.Customer;
  obstacle?: string;
}

/**
 * Reads the customers of rows anew, and gives each the reference_id of its row, if it has none. The
 * file can be older than Square, for example if the customer was merged or the reply to an earlier
 * update was lost.
 * @param rows rows with the outcome `link`
 * @see https://developer.squareup.com/reference/square/customers-api/update-customer
 */
export async function prepareLinks(
  square: SquareClient,
  rows: readonly PushRow[],
): Promise<Link[]> {
  const lookUps = await lookUpCustomers(
    square,
    rows.map(({ id }) => String(id)),
  );
  const links: Link[] = [];
  for (const row of rows) {
    const customerId = String(row.id);
    const customer = lookUps.get(customerId);
    const { referenceId } = row.customer;
    if (customer?.id !== customerId) {
      links.push({ row, obstacle: `customer ${customerId} was deleted or merged in Square` });
    } else if (referenceId && customer.referenceId && customer.referenceId !== referenceId) {
      links.push({ row, obstacle: `customer ${customerId} has another reference_id in Square` });
    } else if (!referenceId || customer.referenceId) {
      links.push({ row, customer });
    } else {
      links.push(await updateReference(square, row, customer, referenceId));
    }
  }
  return links;
}

async function updateReference(
  square: SquareClient,
  row: PushRow,
  { id: customerId = "", version }: Square.Customer,
  referenceId: string,
): Promise<Link> {
  try {
    const request = { customerId, referenceId, ...(version !== undefined && { version }) };
    const { customer } = await square.customers.update(request);
    return customer === undefined
      ? { row, obstacle: "Square returned no customer" }
      : { row, customer };
  } catch (error) {
    const errors = findInvalidRequestErrors(error);
    if (errors === undefined) throw error;
    return { row, obstacle: `Square returned ${formatErrors(errors)}` };
  }
}

/** Saves the customers of linked rows, and marks the rows. Stores the reason of the others. */
export function saveLinks(db: Database, context: RunContext, links: readonly Link[]): PushResult {
  const changes: RowChange[] = [];
  const rows = links.map(({ row, customer, obstacle }): PushRow => {
    if (customer === undefined) return storeReason(db, row, "held", `not linked: ${obstacle}`);
    const received = buildRow(customer);
    const saved = saveCustomers(db, [received], context.startedAt);
    const [unsaved] = saved.notSaved;
    if (unsaved !== undefined)
      return storeReason(db, row, "held", describeUnsaved(unsaved.id, unsaved.reason));
    changes.push(...saved.changes);
    const linkedAt = formatTime(Date.now());
    if (!linkRow(db, row.localId, received.id, linkedAt))
      return { ...row, outcome: "later", reason: "another program has changed it" };
    const losesOptOut = row.hasOptOut && !hasOptOut(received);
    const { localId } = row;
    changes.push({ localId, id: received.id, outcome: "linked", losesOptOut });
    return { ...row, outcome: "linked", id: received.id };
  });
  return { rows, changes };
}
