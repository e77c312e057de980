/**
 * Saves what Square returned about a customer, whether a pull, a push or a search for deletions
 * received it.
 *
 * An **unpushed** row has no `id`. Its customer is not in Square yet. A row with `deleted_at` is
 * finished, whatever else it has.
 */
import type { Database, SqlValue } from "sql.js";
import { buildIdentity, cleanValue, isOtherPerson } from "./checks.ts";
import { formatNumber } from "./internal/cli.ts";
import { messageOf, SyncError } from "./internal/errors.ts";
import { getRow, type Row, readRows } from "./internal/sql.ts";
import {
  COLUMNS,
  type CustomerRow,
  EDITABLE_COLUMNS,
  listReplacedColumns,
  losesOptOut,
} from "./mapping.ts";
import { formatTime } from "./window.ts";

/** The SQL condition for rows without a mark of a deletion. '' counts as NULL. */
export const NOT_DELETED = "coalesce(deleted_at, '') = ''";

/** The SQL condition for unpushed rows that are not finished. */
export const UNPUSHED = `id IS NULL AND ${NOT_DELETED}`;

export interface RowChange {
  localId: number;
  id: string;
  outcome: "inserted" | "updated" | "linked" | "deleted" | "merged";
  columns?: string[];
  /** The columns in which Square's value has replaced that of a person. */
  replaced?: string[];
  losesOptOut?: boolean;
}

export interface SaveResult {
  changes: RowChange[];
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
 * @param customers at most one for each id
 * @param startedAt when the run began. A mark of a deletion that is younger stays, because this run
 *   may have received the customer before it was deleted
 * @param createdFrom by customer id: the idempotency key of the row that it was created from
 */
export function saveCustomers(
  db: Database,
  customers: readonly CustomerRow[],
  startedAt: number,
  createdFrom: ReadonlyMap<string, string> = new Map(),
): SaveResult {
  const result: SaveResult = { changes: [], unchanged: 0, notSaved: [] };
  const savedAt = formatTime(Date.now());
  const takeUnpushed = createLinkFinder(db, customers, createdFrom);
  const select = prepareOnce(db, "SELECT * FROM customers WHERE id = ?");
  const insert = prepareOnce(db, INSERT);
  const update = prepareOnce(db, UPDATE);
  const write = (customer: CustomerRow, row: Row | undefined): number => {
    const values = [...COLUMNS.map((column) => customer[column] ?? null), savedAt];
    const written = row === undefined ? insert(values) : update([...values, Number(row.local_id)]);
    if (written === undefined) throw new Error("a trigger of the table ignores it");
    return Number(written.local_id);
  };

  function save(customer: CustomerRow): RowChange | undefined {
    const { id } = customer;
    const stored = select([id]);
    if (stored === undefined) {
      const row = takeUnpushed(customer);
      const localId = write(customer, row);
      if (row === undefined) return { localId, id, outcome: "inserted" };
      const replaced = listReplacedColumns(row, customer);
      return { localId, id, outcome: "linked", replaced, losesOptOut: losesOptOut(row, customer) };
    }
    // A pull has saved the customer before it was known from which row it was created.
    const row = createdFrom.has(id) ? takeUnpushed(customer) : undefined;
    if (row !== undefined) linkRow(db, Number(row.local_id), id, savedAt);
    const change = compare(stored, customer, startedAt);
    if (change === undefined) return undefined;
    const localId = write(customer, stored);
    // Without a column, only the note of an edit was cleared.
    return change.columns.length > 0 ? { localId, id, outcome: "updated", ...change } : undefined;
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
  return result;
}

/** @returns undefined if the row of a customer stays as it is */
function compare(stored: Row, customer: CustomerRow, startedAt: number) {
  const mark = String(stored.deleted_at ?? "");
  // Search can return an older version than the one that a push has just saved.
  const isOlder = Number(stored.version ?? -1) > (customer.version ?? -1);
  if (mark === "" ? isOlder : mark >= formatTime(startedAt)) return undefined;
  const columns = COLUMNS.filter((column) => (stored[column] ?? null) !== customer[column]);
  if (mark !== "") columns.push("deleted_at");
  if (!stored.synced_at) columns.push("synced_at");
  // Another program inserted a row without synced_at together with its id.
  const isEdited = Boolean(stored.edited_at) || !stored.synced_at;
  if (!isEdited) return columns.length > 0 ? { columns } : undefined;
  const replaced = columns.filter((column) => EDITABLE_COLUMNS.includes(column));
  return { columns, replaced, losesOptOut: losesOptOut(stored, customer) };
}

/**
 * Prepares a statement that returns at most one row. A pull can run it many thousands of times. It is
 * freed when the database is closed.
 */
function prepareOnce(db: Database, sql: string): (values: SqlValue[]) => Row | undefined {
  const statement = db.prepare(sql);
  const names = statement.getColumnNames();
  return (values) => {
    try {
      statement.bind(values);
      return statement.step() ? getRow(statement, names) : undefined;
    } finally {
      statement.reset();
    }
  };
}

/**
 * Finds the unpushed row that a customer was created from: the row whose idempotency key is the
 * customer's reference_id, or else the row with the same reference_id. A reference_id that several
 * customers or rows have identifies none of them, and neither does one with another name and email
 * address, for example the number of a family. Each row is found once.
 */
function createLinkFinder(
  db: Database,
  customers: readonly CustomerRow[],
  createdFrom: ReadonlyMap<string, string>,
): (customer: CustomerRow) => Row | undefined {
  const unpushed = readRows(db, `SELECT * FROM customers WHERE ${UNPUSHED}`);
  if (unpushed.length === 0) return () => undefined;
  const sql = `SELECT reference_id FROM customers
    WHERE id IS NOT NULL AND ${NOT_DELETED} AND reference_id <> ''`;
  const inSquare = readRows(db, sql);
  const counts = new Map<string, number>();
  for (const reference of [...unpushed, ...inSquare, ...customers].map(cleanReference))
    counts.set(reference, (counts.get(reference) ?? 0) + 1);
  // If a row has the key of another row as its reference_id, the row of the key counts.
  const rows = new Map<string, Row>();
  for (const row of unpushed) rows.set(cleanReference(row), row);
  for (const row of unpushed) rows.set(readKey(row), row);
  rows.delete("");
  const taken = new Set<Row>();

  return (customer) => {
    const reference = cleanReference(customer);
    const key = createdFrom.get(customer.id) ?? reference;
    const row = rows.get(key) ?? rows.get(reference);
    if (row === undefined || taken.has(row)) return undefined;
    // If the two are this row and this customer, no other one has the reference_id.
    const isAlone = counts.get(reference) === 2 && cleanReference(row) === reference;
    const isSame = isAlone && !isOtherPerson(buildIdentity(row), buildIdentity(customer));
    if (readKey(row) !== key && !isSame) return undefined;
    taken.add(row);
    return row;
  };
}

export function readKey(row: Row): string {
  return String(row.idempotency_key ?? "").trim();
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

/** Reports changed rows, and customers that were not saved, as parts of the result of a script. */
export function reportSaved({ changes, notSaved }: Pick<SaveResult, "changes" | "notSaved">) {
  // Only names of columns are printed, because values are personal data.
  const describe = ({ localId, id, outcome, columns }: RowChange) =>
    `row ${localId}, customer ${id}: ${outcome}${columns ? `: ${columns.join(", ")}` : ""}`;
  const warnings: string[] = [];
  let optOuts = 0;
  for (const { localId, id, replaced = [], losesOptOut } of changes) {
    const row = `row ${localId}, customer ${id}:`;
    if (replaced.length > 0) warnings.push(`${row} Square's value replaced ${replaced.join(", ")}`);
    if (!losesOptOut) continue;
    optOuts++;
    warnings.push(`${row} Square has email_unsubscribed = 0: unsubscribe that customer in Square`);
  }
  const waiting = optOuts > 0 ? `${optOuts} to unsubscribe in Square` : "";
  const report = { warnings, details: () => changes.map(describe), waiting };
  if (notSaved.length === 0) return report;
  const list = notSaved.slice(0, 5).map(({ id, reason }) => `${id} (${reason})`);
  if (notSaved.length > list.length) list.push("…");
  const error = new SyncError(
    "failed",
    `Cannot save ${formatNumber(notSaved.length, "customer")} that the table does not accept: ${list.join(", ")}`,
    "change the constraint or trigger, or the row that is in the way, and run it again; all others are saved",
  );
  return { ...report, error };
}
