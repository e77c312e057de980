/** Saves what Square answered about pushed rows. */

import type { Database } from "sql.js";
import type { Square } from "square";
import { OPT_OUT_NOTE, requireTransaction, saveCustomers } from "./customers.ts";
import { messageOf } from "./internal/errors.ts";
import { readRows } from "./internal/sql.ts";
import { formatErrors, isRejection, type SquareProblem } from "./internal/square-errors.ts";
import {
  buildCustomer,
  buildRow,
  type CustomerRow,
  FIELDS,
  findColumnOfError,
  keepLatestVersion,
  type LocalRow,
  TABLE,
} from "./mapping.ts";
import { hold, isUnsubscribed, type PushRow, readWaiting, refuse, saveReason } from "./prepare.ts";

export interface Success {
  row: PushRow;
  customer: Square.Customer;
  outcome: "created" | "linked";
}

/** Saves that rows exist in Square now. a constraint or trigger of the table that rejects one row does not stop the others. */
export function saveSuccesses(db: Database, successes: readonly Success[]): void {
  const latest = new Map<string, CustomerRow>();
  const rows = new Map<string, PushRow>();
  for (const { row, customer, outcome } of successes) {
    const id = String(customer.id);
    const columns = readWaiting(db, row);
    db.run("SAVEPOINT link");
    try {
      // The pulled row can be newer than this reply.
      const pulled = columns === undefined ? [] : removePulledRow(db, id);
      for (const version of [...pulled, buildRow(customer)]) keepLatestVersion(latest, version);
      if (columns !== undefined)
        linkRow(db, row.idempotencyKey, id, latest.get(id)?.version ?? null, columns);
      rows.set(id, row);
      // What Square returns for a row in doubt can be what an earlier attempt sent.
      const sent = buildRow(outcome === "linked" || row.inDoubt ? customer : row.customer);
      const lost = columns === undefined ? [] : listOverwritten(columns, sent);
      const reason = `edited after it was sent: Square's value replaced ${lost.join(", ")}`;
      Object.assign(row, { outcome, id, reason: lost.length > 0 ? reason : null });
      db.run("RELEASE link");
    } catch (error) {
      requireTransaction(db, id, error);
      db.run("ROLLBACK TO link; RELEASE link");
      if (!rows.has(id)) latest.delete(id);
      holdUnsaved(db, row, id, messageOf(error));
    }
  }
  const { rejected } = saveCustomers(db, [...latest.values()]);
  for (const { id, reason } of rejected) {
    const row = rows.get(id);
    if (row !== undefined) holdUnsaved(db, row, id, reason);
  }
}

// The row keeps its idempotency key or has its id by now, so it is not created again.
function holdUnsaved(db: Database, row: PushRow, id: string, problem: string): void {
  hold(row, `it is customer ${id} in Square, but the file did not accept that: ${problem}`);
  db.run(`UPDATE ${TABLE} SET push_error = ? WHERE idempotency_key = ?`, [
    row.reason,
    row.idempotencyKey,
  ]);
}

// A pull can have saved the same customer as a row of its own, before it was known which row it came from. That
// row goes, unless it is yours (it has a source) or was sent itself (it has an idempotency key). Your row stays,
// with its local_id.
function removePulledRow(db: Database, id: string): CustomerRow[] {
  const where = "id = ? AND idempotency_key IS NULL AND source IS NULL";
  const [pulled] = readRows(db, `SELECT * FROM ${TABLE} WHERE ${where}`, [id]);
  if (pulled === undefined) return [];
  db.run(`DELETE FROM ${TABLE} WHERE ${where}`, [id]);
  const version = typeof pulled.version === "number" ? pulled.version : null;
  return [{ ...pulled, id, version }];
}

/**
 * Gives a row its id in Square.
 * @param version of the customer; one that was left from another customer could keep its values out
 */
function linkRow(
  db: Database,
  key: string,
  id: string,
  version: number | null,
  columns: LocalRow,
): void {
  const [other] = readRows(db, `SELECT 1 FROM ${TABLE} WHERE id = ?`, [id]);
  if (other !== undefined) throw new Error("another row of the file has that id");
  db.run(
    `UPDATE ${TABLE} SET id = ?, version = ?, push_error = ?
     WHERE idempotency_key = ? AND id IS NULL`,
    [id, version, isUnsubscribed(columns) ? OPT_OUT_NOTE : null, key],
  );
  if (db.getRowsModified() !== 1) throw new Error("a trigger ignored the row");
}

/** Lists the columns of a row whose values are replaced by what Square has. */
function listOverwritten(columns: LocalRow, sent: CustomerRow): string[] {
  const { customer } = buildCustomer(columns);
  const ours = buildRow(customer);
  const { customer: resent } = buildCustomer(sent); // in the same form: a birthday has year 0000 or none
  const theirs = buildRow(resent);
  return FIELDS.flatMap((field) => {
    if (!field.sent) return [];
    // A value that Square would not accept is compared as it is.
    const value = ours[field.column] ?? String(columns[field.column] ?? "").trim();
    return value !== "" && value !== theirs[field.column] ? [field.column] : [];
  });
}

/** Saves why Square did not create a row. */
export function saveErrors(db: Database, row: PushRow, errors: SquareProblem[]): void {
  const inColumns = errors.map((error) => ({ ...error, field: findColumn(row, error) }));
  const reason = `Square returned ${formatErrors(inColumns) || "no customer"}`;
  if (!isRejection(errors)) {
    // About Square, the token, or an attempt that still runs; not about the row.
    row.outcome = "later";
    row.reason = reason;
    return;
  }
  if (errors.some(({ code }) => code === "IDEMPOTENCY_KEY_REUSED"))
    // Square has the key with other content, so the customer was created before the row was edited. A new key
    // would create a second one. The row waits until search shows the first.
    hold(row, `${reason}: the row was edited after it was sent`);
  else refuse(row, reason);
  // Square's details can quote the customer's data. The row may keep them; they are not printed.
  const details = errors.map(({ detail = "" }) => detail).join(" ");
  saveReason(db, row, details);
}

// The field of an error in a bulk call is, for example, `customers.<idempotency key>.address.country`.
export function listErrorsOf(row: PushRow, errors: SquareProblem[]): SquareProblem[] {
  const prefix = `customers.${row.idempotencyKey}`;
  return errors.filter(({ field = "" }) => field === prefix || field.startsWith(`${prefix}.`));
}

function findColumn(row: PushRow, { field = "" }: SquareProblem): string {
  return findColumnOfError(field) ?? field.replace(`customers.${row.idempotencyKey}.`, "");
}
