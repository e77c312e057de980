/** The table customers: saves what Square returned, and marks what is gone. */
import type { Database, SqlValue, Statement } from "sql.js";
import { messageOf, SyncError } from "./internal/errors.ts";
import { normalizeCell } from "./internal/normalize.ts";
import { isInTransaction, readRows } from "./internal/sql.ts";
import { formatTime } from "./internal/time.ts";
import {
  COLUMNS,
  type CustomerRow,
  columnOf,
  hasPublicField,
  isSameValue,
  type LocalRow,
  TABLE,
} from "./mapping.ts";

const REFERENCE_ID = columnOf("referenceId");
const CREATED_AT = columnOf("createdAt");
const EMAIL_UNSUBSCRIBED = columnOf("preferences.emailUnsubscribed");

// ---- Customers from Square ----

/** What happened to one row. --verbose lists it. */
export interface RowChange {
  localId: string;
  id: string;
  outcome: "inserted" | "updated" | "linked" | "deleted" | "merged" | "created";
  /** The columns that changed, of an updated or linked row. */
  columns: string[];
  /** Of a merged row: the id of the customer that replaced it. */
  mergedInto?: string | null;
}

type SavedChange = RowChange & { outcome: "inserted" | "updated" | "linked" };

export interface SaveResult {
  inserted: number;
  updated: number;
  unchanged: number;
  linked: number;
  changes: RowChange[];
  /** Customers that a constraint or trigger of the table rejects, with SQLite's reason. The others are saved. */
  rejected: { id: string; reason: string }[];
}

// The columns that a save sets. What Square does not own, such as `source` and your own columns, is not touched.
const SAVED_COLUMNS = [...COLUMNS, "synced_at"];
const SET = [
  ...SAVED_COLUMNS.map((column) => `${column} = ?`),
  "deleted_at = NULL",
  "merged_into = NULL",
  "push_error = ?",
];
const INSERT = `INSERT INTO ${TABLE} (${SAVED_COLUMNS.join(", ")})
  VALUES (${SAVED_COLUMNS.map(() => "?").join(", ")})`;
const UPDATE = `UPDATE ${TABLE} SET ${SET.join(", ")} WHERE local_id = ?`;
const FIND = `SELECT CAST(local_id AS TEXT) AS local_id, synced_at, deleted_at, push_error, ${COLUMNS.join(", ")}
  FROM ${TABLE}`;
const FIND_BY_ID = `${FIND} WHERE id = ?`;
const FIND_BY_LOCAL_ID = `${FIND} WHERE local_id = ? AND id IS NULL`;

/** The `push_error` of a row whose opt-out Square does not have. */
export const OPT_OUT_NOTE = `${EMAIL_UNSUBSCRIBED} is 1 only in this file: Square has the customer as subscribed`;

/**
 * Saves customers of Square in the file. Rows are matched by Square's id. A customer whose `reference_id` or
 * idempotency key belongs to exactly one unpushed row was created from that row, so it is linked to it.
 * A row that is the same already is not written, so a second run changes nothing.
 * @param customers as {@linkcode buildRow} makes them, each id once
 * @param now the time to save in `synced_at`
 */
export function saveCustomers(
  db: Database,
  customers: readonly CustomerRow[],
  now: string = formatTime(Date.now()),
): SaveResult {
  const result: SaveResult = {
    inserted: 0,
    updated: 0,
    unchanged: 0,
    linked: 0,
    changes: [],
    rejected: [],
  };
  const statements = prepareStatements(db);
  // Reading the unpushed rows takes time, and they only matter for customers that the file does not have yet.
  let unpushed: Map<string, string> | undefined;
  for (const customer of customers) {
    try {
      const stored = statements.findCustomer(customer.id);
      if (stored === undefined) unpushed ??= readLinkableReferences(db, customers);
      const unpushedId = unpushed?.get(cleanReference(customer[REFERENCE_ID]));
      const row = stored ?? ((unpushedId && statements.findUnpushed(unpushedId)) || undefined);
      const change = saveCustomer(statements, customer, row, now);
      if (change === undefined) {
        result.unchanged++;
      } else {
        result[change.outcome]++;
        result.changes.push(change);
      }
    } catch (error) {
      requireTransaction(db, customer.id, error);
      result.rejected.push({ id: customer.id, reason: messageOf(error) });
    }
  }
  statements.free();
  return result;
}

/**
 * Saves one customer.
 * @param row its row: the one with its id, or the unpushed row that it was created from; undefined = insert it
 * @returns undefined when the row is the same already
 */
function saveCustomer(
  statements: Statements,
  customer: CustomerRow,
  row: LocalRow | undefined,
  now: string,
): SavedChange | undefined {
  const { id } = customer;
  const note = keepOptOut(customer, row);
  const values = [...COLUMNS.map((column) => customer[column] ?? null), now];
  if (row === undefined) {
    const localId = statements.insert(values);
    return { localId, id, outcome: "inserted", columns: [] };
  }
  const localId = String(row.local_id);
  if (row.id === null) {
    statements.update([...values, note, localId]);
    return { localId, id, outcome: "linked", columns: [] };
  }
  const columns = listChanges(row, customer);
  if (columns.length === 0) return undefined;
  statements.update([...values, note, localId]);
  return { localId, id, outcome: "updated", columns };
}

type Statements = ReturnType<typeof prepareStatements>;

/** Prepares the SQL of a save once, because a pull can save many thousand customers. */
function prepareStatements(db: Database) {
  const find = db.prepare(FIND_BY_ID);
  const findLocal = db.prepare(FIND_BY_LOCAL_ID);
  const insert = db.prepare(INSERT);
  const lastId = db.prepare("SELECT CAST(last_insert_rowid() AS TEXT)");
  const update = db.prepare(UPDATE);
  // A first load finds none of its customers in the file, so it does not have to look for each of them.
  const hasCustomers =
    readRows(db, `SELECT 1 FROM ${TABLE} WHERE id IS NOT NULL LIMIT 1`).length > 0;

  function findRow(statement: Statement, value: string): LocalRow | undefined {
    const row = statement.bind([value]) && statement.step() ? statement.getAsObject() : undefined;
    statement.reset();
    return row;
  }
  // A trigger can make SQLite skip a row without an error.
  function requireWritten(): void {
    if (db.getRowsModified() === 0) throw new Error("a trigger ignored the row");
  }

  return {
    findCustomer: (id: string) => (hasCustomers ? findRow(find, id) : undefined),
    findUnpushed: (localId: string) => findRow(findLocal, localId),
    insert(values: SqlValue[]): string {
      insert.run(values);
      requireWritten();
      return String(lastId.get([])[0]);
    },
    update(values: SqlValue[]): void {
      update.run(values);
      requireWritten();
    },
    free: () => {
      for (const statement of [find, findLocal, insert, lastId, update]) statement.free();
    },
  };
}

// A reference_id that several of the customers share identifies none of them, so it links no row.
function readLinkableReferences(
  db: Database,
  customers: readonly CustomerRow[],
): Map<string, string> {
  const unpushed = readUnpushedReferences(db);
  const seen = new Set<string>();
  for (const customer of customers) {
    const reference = cleanReference(customer[REFERENCE_ID]);
    if (seen.has(reference)) unpushed.delete(reference);
    seen.add(reference);
  }
  return unpushed;
}

/**
 * Lists the columns in which a stored row differs from the customer, or returns an empty list when the row
 * must stay as it is: the search can return an older version than the one that a push has just saved.
 */
function listChanges(stored: LocalRow, customer: CustomerRow): string[] {
  const isBack = stored.deleted_at !== null;
  // A version that is not a number, for example an empty text, counts as unknown.
  const storedVersion = typeof stored.version === "number" ? stored.version : -1;
  if (!isBack && (customer.version ?? -1) < storedVersion) return [];
  const columns = COLUMNS.filter(
    (column) => !isSameValue(column, stored[column] ?? null, customer[column] ?? null),
  );
  if (isBack) columns.push("deleted_at");
  // A row that was never marked as read, for example because another program cleared the cell.
  if (!isTime(stored.synced_at)) columns.push("synced_at");
  return columns;
}

// Square does not accept email_unsubscribed for a new customer, so `push-new --allow-subscribe` creates one as
// subscribed while the file says unsubscribed. A note in the row keeps the 1, until Square has it too: any other
// change in Square would replace it with a 0, and the opt-out would be lost.
function keepOptOut(customer: CustomerRow, row: LocalRow | undefined): string | null {
  const isOnlyHere =
    row?.[EMAIL_UNSUBSCRIBED] === 1 && (row.id === null || row.push_error === OPT_OUT_NOTE);
  if (!isOnlyHere || customer[EMAIL_UNSUBSCRIBED] === 1) return null;
  customer[EMAIL_UNSUBSCRIBED] = 1;
  return OPT_OUT_NOTE;
}

function isTime(value: SqlValue | undefined): boolean {
  return typeof value === "string" && !Number.isNaN(Date.parse(value));
}

/**
 * After an error, SQLite usually undoes only the statement that failed. a constraint or trigger of the table can also end the
 * whole transaction (ON CONFLICT ROLLBACK, RAISE(ROLLBACK)). Then nothing of this step can be saved.
 */
export function requireTransaction(db: Database, id: string, error: unknown): void {
  if (isInTransaction(db)) return;
  throw new SyncError(
    "failed",
    `Cannot save customer ${id}: ${messageOf(error)}; that rule undid all other customers too`,
    "change the rule from ROLLBACK to ABORT, then run it again",
    error,
  );
}

/**
 * Finds the unpushed row that a reference belongs to: its `reference_id`, or the idempotency key that it was
 * sent with. A reference that several rows share, in Square or not, identifies none of them and is left out.
 * @returns local_id by reference, cleaned as it is sent
 */
export function readUnpushedReferences(db: Database): Map<string, string> {
  const references = new Map<string, string>();
  const shared = new Set<string>();
  const rows = readRows(
    db,
    `SELECT CAST(local_id AS TEXT) AS local_id, ${REFERENCE_ID} AS reference, idempotency_key
     FROM ${TABLE} WHERE id IS NULL AND deleted_at IS NULL`,
  );
  for (const row of rows) {
    const own = new Set([cleanReference(row.reference), cleanReference(row.idempotency_key)]);
    for (const reference of own) {
      if (reference === "") continue;
      if (references.has(reference)) shared.add(reference);
      references.set(reference, `${row.local_id}`);
    }
  }
  // One row at a time, because the whole directory can be large.
  const pushed = db.prepare(
    `SELECT ${REFERENCE_ID} FROM ${TABLE} WHERE id IS NOT NULL AND deleted_at IS NULL AND ${REFERENCE_ID} IS NOT NULL`,
  );
  while (references.size > 0 && pushed.step()) shared.add(cleanReference(pushed.get()[0]));
  pushed.free();
  for (const reference of shared) references.delete(reference);
  return references;
}

/** A reference_id as it is sent. Text that cannot be sent identifies nothing, so it becomes empty. */
export function cleanReference(value: SqlValue | undefined): string {
  return normalizeCell(value, "reference").text ?? "";
}

// ---- Customers that are gone from Square ----

/** A customer of the file that Square had when it was last read. */
export interface LiveCustomer {
  id: string;
  createdAt: string;
  /** False for a profile without name, company, email and phone: search and count leave it out. */
  isSearchable: boolean;
}

/**
 * Reads the customers that were saved from Square and are not marked as deleted. A row with an id of your own
 * was never in Square, so it is left out.
 */
export function readLiveCustomers(db: Database): LiveCustomer[] {
  const statement = db.prepare(
    `SELECT ${COLUMNS.join(", ")} FROM ${TABLE}
     WHERE id IS NOT NULL AND deleted_at IS NULL AND julianday(synced_at) IS NOT NULL`,
  );
  const customers: LiveCustomer[] = [];
  while (statement.step()) {
    const row = statement.getAsObject();
    customers.push({
      id: String(row.id),
      createdAt: String(row[CREATED_AT]),
      isSearchable: hasPublicField(row),
    });
  }
  statement.free();
  return customers;
}

/** A customer that Square no longer has under its id. */
export interface GoneCustomer {
  id: string;
  /** The id of the customer that it was merged into; null = it was deleted. */
  mergedInto: string | null;
}

/**
 * Marks customers as deleted or merged. The rows stay, with all their values.
 * @returns the rows that were marked; a row that was marked before is left out
 */
export function markGone(
  db: Database,
  gone: readonly GoneCustomer[],
  now: string = formatTime(Date.now()),
): RowChange[] {
  const changes: RowChange[] = [];
  for (const { id, mergedInto } of gone) {
    const [row] = readRows(
      db,
      `UPDATE ${TABLE} SET deleted_at = ?, merged_into = ? WHERE id = ? AND deleted_at IS NULL
       RETURNING CAST(local_id AS TEXT) AS local_id`,
      [now, mergedInto, id],
    );
    if (row === undefined) continue;
    const outcome = mergedInto === null ? "deleted" : "merged";
    changes.push({ localId: String(row.local_id), id, outcome, columns: [], mergedInto });
    // A customer that was merged into this one now continues as the newest one.
    if (mergedInto !== null)
      db.run(`UPDATE ${TABLE} SET merged_into = ? WHERE merged_into = ?`, [mergedInto, id]);
  }
  return changes;
}

/**
 * Lists the rows with an id that did not come from Square. They look like pushed rows, but never were. A row with
 * an idempotency key and an error got its id from a push, and a constraint or trigger of the table rejected its other values.
 */
export function listRowsWithOwnId(db: Database): string[] {
  const rows = readRows(
    db,
    `SELECT CAST(local_id AS TEXT) AS local_id FROM ${TABLE}
     WHERE id IS NOT NULL AND julianday(synced_at) IS NULL AND deleted_at IS NULL
       AND (idempotency_key IS NULL OR push_error IS NULL) ORDER BY ${TABLE}.local_id`,
  );
  return rows.map((row) => String(row.local_id));
}
