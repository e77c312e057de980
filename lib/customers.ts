/**
 * The one writer of the table customers. Whatever Square returned about a customer is saved here,
 * whether a pull, a push or a search for deletions received it.
 *
 * An **unpushed** row has no `id`. Its customer is not in Square yet. A row with `deleted_at` is
 * finished, whatever else it has.
 */
import type { Database, SqlValue, Statement } from "sql.js";
import { buildIdentity, cleanValue, isOtherPerson } from "./checks.ts";
import { formatNumber } from "./internal/cli.ts";
import { messageOf, SyncError } from "./internal/errors.ts";
import { getRow, type Row, readRows } from "./internal/sql.ts";
import {
  COLUMNS,
  type CustomerRow,
  EDITABLE_COLUMNS,
  hasOptOut,
  listDifferences,
  listReplacedColumns,
} from "./mapping.ts";
import { formatTime } from "./window.ts";

/** The SQL condition for rows without a mark of a deletion. '' counts as NULL. */
export const NOT_DELETED = "coalesce(deleted_at, '') = ''";

/** The SQL condition for unpushed rows that are not finished. */
export const UNPUSHED = `id IS NULL AND ${NOT_DELETED}`;

/** What happened to one row. */
export interface RowChange {
  localId: number;
  id: string;
  outcome: "inserted" | "updated" | "linked" | "deleted" | "merged";
  /** The columns of an updated row that changed. */
  columns?: string[];
  /** The columns in which Square's value has replaced that of a person. */
  replaced?: string[];
  /** The row had an opt-out from marketing email, and Square has the customer as subscribed. */
  losesOptOut?: boolean;
}

export interface SaveResult {
  changes: RowChange[];
  /** How many rows were equal already. */
  unchanged: number;
  /** The customers that a constraint or trigger of the table does not accept, with the reason. */
  notSaved: { id: string; reason: string }[];
}

// OR ABORT overrides every ON CONFLICT clause of the table. With REPLACE, saving one customer could
// delete the row of another. RETURNING shows whether a row was written, because a trigger can
// ignore it without an error.
const SAVED_COLUMNS = [...COLUMNS, "synced_at"];
const INSERT = `INSERT OR ABORT INTO customers (${SAVED_COLUMNS.join(", ")})
  VALUES (${SAVED_COLUMNS.map(() => "?").join(", ")}) RETURNING local_id`;
const UPDATE = `UPDATE OR ABORT customers SET ${SAVED_COLUMNS.map((name) => `${name} = ?`).join(", ")},
  edited_at = NULL, push_error = NULL, deleted_at = NULL, merged_into = NULL
  WHERE local_id = ? RETURNING local_id`;

/**
 * Saves customers of Square. Rows are matched by Square's customer id. A customer that the file does
 * not have is linked to the unpushed row that it was created from, or inserted. Columns that Square
 * does not have are not touched, and a row that is equal already is not written.
 * @param customers rows that buildRow built, at most one for each id
 * @param startedAt when the run began, in milliseconds since 1970. A mark of a deletion that is
 *   younger stays, because this run may have received the customer before it was deleted
 * @param createdFrom the idempotency key of the row that a customer was created from, by customer id
 */
export function saveCustomers(
  db: Database,
  customers: readonly CustomerRow[],
  startedAt: number,
  createdFrom: ReadonlyMap<string, string> = new Map(),
): SaveResult {
  const result: SaveResult = { changes: [], unchanged: 0, notSaved: [] };
  const savedAt = formatTime(Date.now());
  const findLink = createLinkFinder(db, customers, createdFrom);
  // Prepared once, because a pull can save many thousands of customers.
  const select = db.prepare("SELECT * FROM customers WHERE id = ?");
  const selectUnpushed = db.prepare(`SELECT * FROM customers WHERE local_id = ? AND ${UNPUSHED}`);
  const insert = db.prepare(INSERT);
  const update = db.prepare(UPDATE);
  const names = select.getColumnNames();
  const read = (statement: Statement, value: SqlValue): Row | undefined =>
    runOnce(statement, [value], () => getRow(statement, names));
  const write = (statement: Statement, values: SqlValue[]): number => {
    const localId = runOnce(statement, values, () => Number(statement.get()[0]));
    if (localId === undefined) throw new Error("a trigger of the table ignores it");
    return localId;
  };

  function save(customer: CustomerRow): RowChange | undefined {
    const { id } = customer;
    const values = [...COLUMNS.map((column) => customer[column] ?? null), savedAt];
    const stored = read(select, id);
    const unpushedId = stored === undefined || createdFrom.has(id) ? findLink(customer) : undefined;
    // A pull has saved the customer before it was known from which row it was created.
    if (stored !== undefined && unpushedId !== undefined) linkRow(db, unpushedId, id, savedAt);
    if (stored !== undefined) {
      const { isWritten, ...change } = compare(stored, customer, startedAt);
      if (!isWritten) return undefined;
      const localId = write(update, [...values, stored.local_id ?? null]);
      // Without a column, only the note of an edit was cleared.
      return change.columns.length > 0 ? { localId, id, outcome: "updated", ...change } : undefined;
    }
    const row = unpushedId === undefined ? undefined : read(selectUnpushed, unpushedId);
    if (row === undefined) return { localId: write(insert, values), id, outcome: "inserted" };
    const localId = write(update, [...values, row.local_id ?? null]);
    const replaced = listReplacedColumns(row, customer);
    const losesOptOut = hasOptOut(row) && !hasOptOut(customer);
    return { localId, id, outcome: "linked", replaced, losesOptOut };
  }

  for (const customer of customers) {
    try {
      const change = save(customer);
      if (change === undefined) result.unchanged++;
      else result.changes.push(change);
    } catch (error) {
      result.notSaved.push({ id: customer.id, reason: messageOf(error) });
    }
  }
  for (const statement of [select, selectUnpushed, insert, update]) statement.free();
  return result;
}

/** Compares the row of a customer with what Square returned. */
function compare(stored: Row, customer: CustomerRow, startedAt: number) {
  const mark = String(stored.deleted_at ?? "");
  const comesBack = mark !== "" && mark < formatTime(startedAt);
  const columns = listDifferences(stored, customer);
  if (comesBack) columns.push("deleted_at");
  if (!stored.synced_at) columns.push("synced_at");
  // Search can return an older version than the one that a push has just saved.
  const isOlder = Number(stored.version ?? -1) > (customer.version ?? -1);
  // A row without synced_at was inserted with its id by another program.
  const isEdited = Boolean(stored.edited_at) || !stored.synced_at;
  const isWritten = mark === "" ? !isOlder && (columns.length > 0 || isEdited) : comesBack;
  const replaced = isEdited ? columns.filter((column) => EDITABLE_COLUMNS.includes(column)) : [];
  const losesOptOut = isEdited && hasOptOut(stored) && !hasOptOut(customer);
  return { isWritten, columns, replaced, losesOptOut };
}

/** Runs a statement that returns at most one row, and reads that row. */
function runOnce<T>(statement: Statement, values: SqlValue[], read: () => T): T | undefined {
  try {
    statement.bind(values);
    return statement.step() ? read() : undefined;
  } finally {
    statement.reset();
  }
}

/**
 * Finds the unpushed row that a customer was created from: the row whose idempotency key is the
 * customer's reference_id, or else the row with the same reference_id. A reference_id that several
 * customers or rows have identifies none of them, and neither does one with another name and email
 * address, for example the number of a family.
 */
function createLinkFinder(
  db: Database,
  customers: readonly CustomerRow[],
  createdFrom: ReadonlyMap<string, string>,
) {
  const unpushed = readRows(db, `SELECT * FROM customers WHERE ${UNPUSHED}`);
  if (unpushed.length === 0) return () => undefined;
  const byKey = new Map<string, number>();
  const byReference = new Map<string, Row>();
  for (const row of unpushed) {
    byKey.set(String(row.idempotency_key ?? ""), Number(row.local_id));
    byReference.set(cleanReference(row), row);
  }
  byKey.delete("");
  const inSquare = readRows(
    db,
    `SELECT reference_id FROM customers WHERE id IS NOT NULL AND ${NOT_DELETED} AND reference_id <> ''`,
  );
  const shared = new Set([
    ...findRepeated(unpushed.map(cleanReference)),
    ...findRepeated(customers.map(cleanReference)),
    ...inSquare.map(cleanReference),
    "",
  ]);
  return (customer: CustomerRow): number | undefined => {
    const reference = cleanReference(customer);
    const row = shared.has(reference) ? undefined : byReference.get(reference);
    const isSame = row && !isOtherPerson(buildIdentity(row), buildIdentity(customer));
    return (
      byKey.get(createdFrom.get(customer.id) ?? reference) ??
      (isSame ? Number(row.local_id) : undefined)
    );
  };
}

function findRepeated(values: string[]): string[] {
  const seen = new Set<string>();
  return values.filter((value) => seen.size === seen.add(value).size);
}

function cleanReference(row: Row): string {
  return cleanValue(row.reference_id, "reference").text ?? "";
}

/**
 * Marks an unpushed row whose customer is in another row already, as after a merge. Joins can follow
 * `merged_into`, and no push sends the row.
 * @returns false if the row is not unpushed anymore
 */
export function linkRow(db: Database, localId: number, id: string, linkedAt: string): boolean {
  const sql = `UPDATE OR ABORT customers SET deleted_at = ?, merged_into = ?, push_error = NULL
    WHERE local_id = ? AND ${UNPUSHED} RETURNING local_id`;
  return readRows(db, sql, [linkedAt, id, localId]).length > 0;
}

/**
 * Reports changed rows and customers that were not saved.
 * @returns parts of the result of the script. It warns of each value of a person that Square's value
 *   has replaced
 */
export function reportSaved({
  changes,
  notSaved,
}: {
  changes: readonly RowChange[];
  notSaved: SaveResult["notSaved"];
}) {
  const warnings: string[] = [];
  let optOuts = 0;
  // Only names of columns are printed, because values are personal data.
  const describe = ({ localId, id, outcome, columns = [] }: RowChange) =>
    `row ${localId}, customer ${id}: ${outcome}${columns.length > 0 ? `: ${columns.join(", ")}` : ""}`;
  for (const { localId, id, replaced = [], losesOptOut } of changes) {
    const row = `row ${localId}, customer ${id}:`;
    if (replaced.length > 0) warnings.push(`${row} Square's value replaced ${replaced.join(", ")}`);
    if (!losesOptOut) continue;
    optOuts++;
    warnings.push(`${row} Square has email_unsubscribed = 0: unsubscribe that customer in Square`);
  }
  const list = notSaved.slice(0, 5).map(({ id, reason }) => `${id} (${reason})`);
  if (notSaved.length > list.length) list.push("…");
  return {
    warnings,
    details: () => changes.map(describe),
    waiting: optOuts > 0 ? `${optOuts} to unsubscribe in Square` : "",
    error:
      notSaved.length === 0
        ? undefined
        : new SyncError(
            "failed",
            `Cannot save ${formatNumber(notSaved.length, "customer")} that the table does not accept: ${list.join(", ")}`,
            "change the constraint or trigger, or the row that is in the way, and run it again; all others are saved",
          ),
  };
}
