/**
 * Saves the outcome of each pushed row: its customer in Square, or the errors that Square returned.
 */
import type { Database } from "sql.js";
import type { Square } from "square";
import {
  listReplacedColumns,
  OPT_OUT_NOTE,
  parseOptOut,
  requireWrittenRow,
  saveCustomers,
  throwIfRolledBack,
} from "./customers.ts";
import { messageOf } from "./internal/errors.ts";
import { SCRIPT_COLUMNS } from "./internal/schema-check.ts";
import { quoteName, readRows } from "./internal/sql.ts";
import {
  formatErrors,
  isContentRejected,
  type SquareErrorEntry,
} from "./internal/square-errors.ts";
import {
  buildRow,
  COLUMNS,
  type CustomerRow,
  findColumnOfError,
  keepLatestVersion,
  type LocalRow,
  TABLE,
} from "./mapping.ts";
import { hold, type PushRow, readUnpushedRow, refuse, saveReason } from "./prepare.ts";

/** A pushed row, and its customer in Square. */
export interface Success {
  row: PushRow;
  customer: Square.Customer;
  outcome: "created" | "linked";
}

// ---- Rows that exist in Square ----

/**
 * Saves Square's customers in the rows that they were created from. A constraint or trigger of the
 * table that rejects one row does not stop the others.
 *
 * For each row: if a pull has already inserted the customer as another row, remove that row, and
 * copy your own columns from it. Give the pushed row the id of the customer. After that,
 * saveCustomers finds the rows by their ids and saves the other values.
 */
export function saveSuccesses(db: Database, successes: readonly Success[]): void {
  // The customers to save by id, each in its newest version.
  const latest = new Map<string, CustomerRow>();
  const rowsById = new Map<string, PushRow>();
  for (const { row, customer, outcome } of successes) {
    const id = String(customer.id);
    const stored = readUnpushedRow(db, row);
    if (stored === undefined) {
      // Another program has removed the row, marked it as deleted, or given it an id. saveCustomers
      // finds the customer by its id, or inserts it.
      keepLatestVersion(latest, buildRow(customer));
      rowsById.set(id, row);
      markDone(row, outcome, id, null);
      continue;
    }
    db.run("SAVEPOINT link");
    try {
      // If a pull has saved the customer already, its version can be newer than that of this reply.
      const pulled = removePulledRow(db, id);
      const received = buildRow(customer);
      const isPulledNewer = (pulled?.version ?? 0) > (received.version ?? 0);
      const newest = pulled !== undefined && isPulledNewer ? pulled : received;
      linkRow(db, row, stored, id, newest.version);
      if (pulled !== undefined) copyUserColumns(db, pulled, id);
      db.run("RELEASE link");
      keepLatestVersion(latest, newest);
      rowsById.set(id, row);
      markDone(row, outcome, id, describeLostEdits(row, stored, customer, outcome));
    } catch (error) {
      throwIfRolledBack(db, id, error);
      db.run("ROLLBACK TO link; RELEASE link");
      holdUnsaved(db, row, id, messageOf(error));
    }
  }

  const { rejected } = saveCustomers(db, [...latest.values()]);
  for (const { id, reason } of rejected) {
    const row = rowsById.get(id);
    if (row !== undefined) holdUnsaved(db, row, id, reason);
  }
}

function markDone(
  row: PushRow,
  outcome: Success["outcome"],
  id: string,
  reason: string | null,
): void {
  row.outcome = outcome;
  row.id = id;
  row.holdReason = null;
  row.reason = reason;
}

/**
 * Puts a row on hold whose customer exists in Square, but whose values the table rejects. The row
 * keeps its idempotency key, and its id if that could be saved. Because of these, no later run
 * creates it again.
 */
function holdUnsaved(db: Database, row: PushRow, id: string, problem: string): void {
  hold(
    row,
    `it is customer ${id} in Square, but the file did not accept that: ${problem}`,
    "not saved",
  );
  try {
    db.run(`UPDATE ${TABLE} SET push_error = ? WHERE idempotency_key = ?`, [
      row.reason,
      row.idempotencyKey,
    ]);
  } catch (error) {
    // The trigger that rejects the values can reject this write too. The reason is printed anyway.
    throwIfRolledBack(db, id, error);
  }
}

/**
 * Removes the row that a pull has inserted for a customer before it was known which row the
 * customer was created from. The pushed row takes its place, because it has your `local_id` and
 * `source`. A row with a source or an idempotency key is not removed, because no pull has inserted
 * it.
 * @returns the removed row
 */
function removePulledRow(db: Database, id: string): CustomerRow | undefined {
  const condition = "id = ? AND idempotency_key IS NULL AND source IS NULL";
  const [pulled] = readRows(db, `SELECT * FROM ${TABLE} WHERE ${condition}`, [id]);
  if (pulled === undefined) return undefined;
  db.run(`DELETE FROM ${TABLE} WHERE ${condition}`, [id]);
  const version = typeof pulled.version === "number" ? pulled.version : null;
  return { ...pulled, id, version };
}

/**
 * Copies the values of your own columns from a removed row to the row that takes its place, where
 * that row still has the default value.
 */
function copyUserColumns(db: Database, removed: LocalRow, id: string): void {
  const columns = readRows(db, "SELECT name, dflt_value FROM pragma_table_info(?)", [TABLE]);
  for (const { name, dflt_value: defaultValue } of columns) {
    const column = String(name);
    const value = removed[column] ?? null;
    if (value === null || COLUMNS.includes(column) || SCRIPT_COLUMNS.includes(column)) continue;
    const quoted = quoteName(column);
    db.run(
      `UPDATE ${TABLE} SET ${quoted} = ?
       WHERE id = ? AND (${quoted} IS NULL OR ${quoted} IS (${defaultValue ?? "NULL"}))`,
      [value, id],
    );
  }
}

/**
 * Gives a row its id in Square.
 * @param version the version of the customer. It replaces the version in the row. If the row was
 *   made by copying the row of another customer, its version can be larger, and saveCustomers would
 *   ignore this customer as outdated
 */
function linkRow(
  db: Database,
  row: PushRow,
  stored: LocalRow,
  id: string,
  version: number | null,
): void {
  const [other] = readRows(db, `SELECT 1 FROM ${TABLE} WHERE id = ?`, [id]);
  if (other !== undefined)
    throw new Error("another row of the file has that id, so delete one of the two rows");
  const note = parseOptOut(stored) === true ? OPT_OUT_NOTE : null;
  db.run(
    `UPDATE ${TABLE} SET id = ?, version = ?, push_error = ?
     WHERE idempotency_key = ? AND id IS NULL`,
    [id, version, note, row.idempotencyKey],
  );
  requireWrittenRow(db);
}

/**
 * Describes the columns of a row that were edited after the row was sent. The save replaces their
 * values with those of Square.
 * @param stored the row as it is in the file now
 * @returns null if no column was edited
 */
function describeLostEdits(
  row: PushRow,
  stored: LocalRow,
  customer: Square.Customer,
  outcome: Success["outcome"],
): string | null {
  // A row that was sent once is compared with the data that was sent, because Square can store a
  // value in another form, which is not an edit. A row in doubt can have been
  // created by an earlier request, whose data is not known anymore. So it is compared with the
  // customer that Square returned.
  const wasSentOnce = outcome === "created" && !row.inDoubt;
  const edited = listReplacedColumns(stored, buildRow(wasSentOnce ? row.customer : customer));
  if (edited.length === 0) return null;
  return `edited after it was sent: Square's value replaced ${edited.join(", ")}`;
}

// ---- Rows that Square did not create ----

/** Saves why Square did not create a row, or leaves the row to a later run. */
export function saveErrors(db: Database, row: PushRow, errors: SquareErrorEntry[]): void {
  const named = errors.map((error) => ({ ...error, field: nameField(row, error) }));
  const reason = `Square returned ${formatErrors(named) || "no customer"}`;
  if (!isContentRejected(errors)) {
    // The errors are not about the row. They are about Square, the token, or an earlier request
    // with the same idempotency key that Square has not finished.
    row.outcome = "later";
    row.reason = reason;
    return;
  }
  if (errors.some(({ code }) => code === "IDEMPOTENCY_KEY_REUSED")) {
    // Square has this idempotency key with other values, so it created the customer before the row
    // was edited. A new key would create a second customer. The row waits until search returns the
    // first one.
    hold(row, `${reason}: the row was edited after it was sent`, "edited");
  } else {
    refuse(row, reason);
  }
  saveReason(db, row, {
    // Square's rejection proves that this request created nothing. It proves nothing about the
    // earlier request of a row in doubt, so that row keeps its key.
    clearKey: row.outcome === "refused" && !row.inDoubt,
    // Square's details can quote personal data. The row may keep them, because they are not
    // printed.
    details: errors.map(({ detail = "" }) => detail).join(" "),
  });
}

/**
 * Lists the errors of a bulk request that are about one row. Their field starts with
 * `customers.<idempotency key>`.
 */
export function listErrorsOf(row: PushRow, errors: SquareErrorEntry[]): SquareErrorEntry[] {
  const prefix = `customers.${row.idempotencyKey}`;
  return errors.filter(({ field = "" }) => field === prefix || field.startsWith(`${prefix}.`));
}

/**
 * Returns the column that an error is about. Without such a column, returns the field as Square
 * names it.
 */
function nameField(row: PushRow, { field = "" }: SquareErrorEntry): string {
  return findColumnOfError(field) ?? field.replace(`customers.${row.idempotencyKey}.`, "");
}
