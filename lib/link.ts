/**
 * Links rows to customers that are in Square already. The row of the customer stays as it is, and
 * the linked row is marked as after a merge, so that joins follow it and no push sends it.
 */
import type { Database } from "sql.js";
import type { Square, SquareClient } from "square";
import { linkRow, saveCustomers } from "./customers.ts";
import { lookUpCustomers } from "./deleted.ts";
import type { RunContext } from "./internal/cli.ts";
import { findInvalidRequestErrors, formatErrors } from "./internal/square-errors.ts";
import { buildRow, hasOptOut } from "./mapping.ts";
import { completeRow, type PushRow, storeReason } from "./prepare.ts";
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
 * @see https://developer.squareup.com/reference/square/customers-api/update-customer
 */
export async function prepareLinks(square: SquareClient, rows: readonly PushRow[]) {
  const ids = rows.map(({ id }) => String(id));
  const lookUps = await lookUpCustomers(square, ids);
  const links: Link[] = [];
  for (const row of rows)
    links.push(await prepareLink(square, row, lookUps.get(String(row.id)) ?? undefined));
  return links;
}

async function prepareLink(square: SquareClient, row: PushRow, customer?: Square.Customer) {
  const customerId = String(row.id);
  const { referenceId } = row.customer;
  if (customer?.id !== customerId)
    return { row, obstacle: `customer ${customerId} was deleted or merged in Square` };
  if (!referenceId || customer.referenceId === referenceId) return { row, customer };
  if (customer.referenceId)
    return { row, obstacle: `customer ${customerId} has another reference_id in Square` };
  const { version } = customer;
  try {
    const request = { customerId, referenceId, ...(version !== undefined && { version }) };
    const { customer: updated } = await square.customers.update(request);
    return updated ? { row, customer: updated } : { row, obstacle: "Square returned no customer" };
  } catch (error) {
    const errors = findInvalidRequestErrors(error);
    if (errors === undefined) throw error;
    return { row, obstacle: `Square returned ${formatErrors(errors)}` };
  }
}

/** Saves the customers of linked rows, and marks the rows. Stores the reason of the others. */
export function saveLinks(db: Database, context: RunContext, links: readonly Link[]): PushRow[] {
  return links.map(({ row, customer, obstacle }) => {
    if (customer === undefined) return storeReason(db, row, "held", `not linked: ${obstacle}`);
    const received = buildRow(customer);
    const { id } = received;
    const saved = saveCustomers(db, [received], context.startedAt);
    const linked = completeRow(db, row, "linked", id, saved);
    if (linked.outcome === "held") return linked;
    if (!linkRow(db, row.localId, id, formatTime(Date.now())))
      return { ...linked, outcome: "later", reason: "another program has changed it" };
    const losesOptOut = row.hasOptOut && !hasOptOut(received);
    linked.changes.push({ localId: row.localId, id, outcome: "linked", losesOptOut });
    return linked;
  });
}
