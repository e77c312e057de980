/**
 * The table customers: saves what Square returned, and marks customers that Square no longer has.
 *
 * Some terms of this file:
 * - An **unpushed** row has no `id`. Its customer is not in Square yet.
 * - A row with its **own id** has an `id` that a person or another program wrote. Square does not
 *   know it.
 * - An **opt-out** is a 1 in `email_unsubscribed`: the customer wants no marketing email.
 */
import type { Database, SqlValue, Statement } from "sql.js";
import { messageOf, SyncError } from "./internal/errors.ts";
import { isBlank, normalizeCell } from "./internal/normalize.ts";
import { isInTransaction, listColumns, readRows } from "./internal/sql.ts";
import { formatTime } from "./internal/time.ts";
import {
  buildCustomer,
  buildRow,
  COLUMNS,
  CREATED_AT,
  type CustomerRow,
  EMAIL_UNSUBSCRIBED,
  FIELDS,
  hasIdentifyingField,
  IS_SYNCED,
  isSameValue,
  isTime,
  type LocalRow,
  NOT_DELETED,
  REFERENCE_ID,
  TABLE,
} from "./mapping.ts";

// ---- Customers from Square ----

/** What happened to one row. --verbose lists it. */
export interface RowChange {
  localId: string;
  id: string;
  outcome: "inserted" | "updated" | "linked" | "deleted" | "merged";
  /** The columns of an updated or linked row that changed. Empty for every other outcome. */
  columns: string[];
  /** The columns of a linked row in which Square's value has replaced another one. */
  replaced?: string[];
  /** The id of the customer that replaced a merged one. */
  mergedInto?: string | null;
}

type SavedChange = RowChange & { outcome: "inserted" | "updated" | "linked" };

/** A customer that a constraint or trigger of the table rejects, with SQLite's reason. */
export interface RejectedCustomer {
  id: string;
  reason: string;
}

export interface SaveResult {
  inserted: number;
  updated: number;
  unchanged: number;
  linked: number;
  changes: RowChange[];
  /** The customers that the table rejected. All others were saved. */
  rejected: RejectedCustomer[];
}

// A save keeps `source` and your own columns. A customer that Square returned is not deleted, so
// the marks of a deletion are cleared. UPDATE has these parameters: SAVED_COLUMNS, push_error,
// local_id.
const SAVED_COLUMNS = [...COLUMNS, "synced_at"];
const ASSIGNMENTS = [
  ...SAVED_COLUMNS.map((column) => `${column} = ?`),
  "deleted_at = NULL",
  "merged_into = NULL",
  "push_error = ?",
];
const INSERT = `INSERT INTO ${TABLE} (${SAVED_COLUMNS.join(", ")})
  VALUES (${SAVED_COLUMNS.map(() => "?").join(", ")})`;
const UPDATE = `UPDATE ${TABLE} SET ${ASSIGNMENTS.join(", ")} WHERE local_id = ?`;
// local_id is read as a text, because SQLite's integers can be larger than a JavaScript number.
const SELECT = `SELECT CAST(local_id AS TEXT) AS local_id, synced_at, deleted_at, push_error,
  ${COLUMNS.join(", ")} FROM ${TABLE}`;
const SELECT_BY_ID = `${SELECT} WHERE id = ?`;
const SELECT_UNPUSHED = `${SELECT} WHERE local_id = ? AND id IS NULL`;

/**
 * The `push_error` of a row with an opt-out that Square does not have, because it was created with
 * --allow-subscribe. See mustKeepOptOut.
 */
export const OPT_OUT_NOTE = `${EMAIL_UNSUBSCRIBED} is 1 only in this file: Square has the customer as subscribed`;

/**
 * Saves customers of Square in the file. Rows are matched by Square's customer id. If the file does
 * not have the id, and the `reference_id` of the customer belongs to exactly one unpushed row, the
 * customer was created from that row. The row is then linked: it gets the id.
 *
 * A row that has the same values already is not written, so a second run changes nothing. A
 * customer that a constraint or trigger of the table rejects does not stop the others.
 * @param customers rows that {@linkcode buildRow} built, at most one for each id
 * @param savedAt the time to save in `synced_at`, as RFC 3339
 */
export function saveCustomers(
  db: Database,
  customers: readonly CustomerRow[],
  savedAt: string = formatTime(Date.now()),
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
  let localIdByReference: Map<string, string> | undefined;
  for (const customer of customers) {
    try {
      let stored = statements.findById(customer.id);
      if (stored === undefined) {
        // Only a customer that is new to the file can be linked. So the unpushed rows, which take
        // time to read, are read when the first such customer arrives.
        localIdByReference ??= readLinkableReferences(db, customers);
        // No row has an empty reference, so a customer without one is not linked.
        const localId = localIdByReference.get(cleanReference(customer[REFERENCE_ID]));
        if (localId !== undefined) stored = statements.findUnpushed(localId);
      }
      const change = saveCustomer(statements, customer, stored, savedAt);
      if (change === undefined) {
        result.unchanged++;
      } else {
        result[change.outcome]++;
        result.changes.push(change);
      }
    } catch (error) {
      // If a trigger has undone all other customers as well, nothing of this step can be saved.
      throwIfRolledBack(db, customer.id, error);
      result.rejected.push({ id: customer.id, reason: messageOf(error) });
    }
  }
  statements.free();
  return result;
}

/**
 * Saves one customer.
 * @param stored the row with the customer's id, or the unpushed row that the customer was created
 *   from. If it is undefined, a row is inserted
 * @returns undefined when the row has the same values already, or a newer version
 */
function saveCustomer(
  statements: Statements,
  received: CustomerRow,
  stored: LocalRow | undefined,
  savedAt: string,
): SavedChange | undefined {
  const keepsOptOut = stored !== undefined && mustKeepOptOut(stored, received);
  const customer = keepsOptOut ? { ...received, [EMAIL_UNSUBSCRIBED]: 1 } : received;
  const note = keepsOptOut ? OPT_OUT_NOTE : null;
  const { id } = customer;
  // In the order of SAVED_COLUMNS.
  const values = [...COLUMNS.map((column) => customer[column] ?? null), savedAt];

  if (stored === undefined) {
    const localId = statements.insert(values);
    return { localId, id, outcome: "inserted", columns: [] };
  }
  const localId = String(stored.local_id);
  if (stored.id === null) {
    // Every link sets id and version, so they are not listed.
    const columns = listDifferences(stored, customer).filter(
      (column) => column !== "id" && column !== "version",
    );
    const replaced = listReplacedColumns(stored, customer);
    statements.update(values, note, localId);
    return { localId, id, outcome: "linked", columns, replaced };
  }
  if (isNewer(stored, customer)) return undefined;
  const columns = listDifferences(stored, customer);
  if (isMarkedDeleted(stored)) columns.push("deleted_at");
  // Without a time in synced_at, the row looks as if its id did not come from Square. So a cell
  // that another program has cleared is filled again.
  if (!isTime(stored.synced_at)) columns.push("synced_at");
  if (columns.length === 0) return undefined;
  statements.update(values, note, localId);
  return { localId, id, outcome: "updated", columns };
}

type Statements = ReturnType<typeof prepareStatements>;

/** Prepares the SQL of a save once, because a pull can save many thousands of customers. */
function prepareStatements(db: Database) {
  const selectById = db.prepare(SELECT_BY_ID);
  const selectUnpushed = db.prepare(SELECT_UNPUSHED);
  const insert = db.prepare(INSERT);
  const selectLastLocalId = db.prepare("SELECT CAST(last_insert_rowid() AS TEXT)");
  const update = db.prepare(UPDATE);
  // If the table has no customers yet, skip the search for each id. The rows that this save inserts
  // do not matter, because saveCustomers gets each id only once.
  const hasCustomers =
    readRows(db, `SELECT 1 FROM ${TABLE} WHERE id IS NOT NULL LIMIT 1`).length > 0;

  function findRow(statement: Statement, value: string): LocalRow | undefined {
    statement.bind([value]);
    const row = statement.step() ? statement.getAsObject() : undefined;
    statement.reset();
    return row;
  }

  return {
    findById: (id: string) => (hasCustomers ? findRow(selectById, id) : undefined),
    findUnpushed: (localId: string) => findRow(selectUnpushed, localId),
    insert(values: SqlValue[]): string {
      insert.run(values);
      requireWrittenRow(db);
      return String(selectLastLocalId.get([])[0]);
    },
    update(values: SqlValue[], pushError: string | null, localId: string): void {
      update.run([...values, pushError, localId]);
      requireWrittenRow(db);
    },
    free(): void {
      for (const statement of [selectById, selectUnpushed, insert, selectLastLocalId, update])
        statement.free();
    },
  };
}

/**
 * Checks that the statement before this call wrote its row. A trigger with RAISE(IGNORE) makes
 * SQLite skip the row without an error.
 */
export function requireWrittenRow(db: Database): void {
  if (db.getRowsModified() === 0) throw new Error("a trigger ignored the row");
}

/**
 * Reads the unpushed rows that customers can be linked to, as {@linkcode readUnpushedReferences}
 * does. A reference that several of the customers share identifies none of them, so it is left out.
 */
function readLinkableReferences(
  db: Database,
  customers: readonly CustomerRow[],
): Map<string, string> {
  const localIds = readUnpushedReferences(db);
  const seen = new Set<string>();
  for (const customer of customers) {
    const reference = cleanReference(customer[REFERENCE_ID]);
    if (seen.has(reference)) localIds.delete(reference);
    seen.add(reference);
  }
  return localIds;
}

/** Lists the columns of a row whose values differ from the customer. */
function listDifferences(stored: LocalRow, customer: CustomerRow): string[] {
  return COLUMNS.filter(
    (column) => !isSameValue(column, stored[column] ?? null, customer[column] ?? null),
  );
}

/**
 * Lists the columns whose value in the file differs from Square's, so that a save replaces it.
 * Blank values and fields that are never sent do not count. Values are compared in the form in
 * which they are sent, and an invalid value as it is.
 * @param square the values that Square has
 */
export function listReplacedColumns(stored: LocalRow, square: CustomerRow): string[] {
  const fileValues = normalizeRow(stored);
  const squareValues = normalizeRow(square);
  const replaced: string[] = [];
  for (const { column, sent: isSent } of FIELDS) {
    if (!isSent) continue;
    // normalizeRow leaves out blank and invalid values.
    const value = fileValues[column] ?? String(stored[column] ?? "").trim();
    if (!isBlank(String(value)) && value !== squareValues[column]) replaced.push(column);
  }
  return replaced;
}

/**
 * Brings the values of a row into the form in which they are sent. For example, a birthday without
 * a year can be stored as 0000-04-25 or 04-25.
 */
function normalizeRow(row: LocalRow): CustomerRow {
  return buildRow(buildCustomer(row).customer);
}

/**
 * Parses the opt-out of a row.
 * @returns true if the customer wants no marketing email; undefined if the value is invalid
 */
export function parseOptOut(stored: LocalRow): boolean | undefined {
  const value = stored[EMAIL_UNSUBSCRIBED] ?? "";
  if (value instanceof Uint8Array) return undefined;
  const text = String(value).trim();
  if (text === "1") return true;
  return text === "" || text === "0" ? false : undefined;
}

/**
 * True if the row holds a newer version than the customer that Square returned: search can return
 * an older version than the one that a push has just saved.
 */
function isNewer(stored: LocalRow, customer: CustomerRow): boolean {
  // If Square returns a customer that was marked as deleted, save it, whatever its version is. It
  // was restored, or the mark was a mistake.
  if (isMarkedDeleted(stored)) return false;
  // A version that is not a number, for example an empty text, counts as unknown.
  const storedVersion = /^[0-9]+$/.test(String(stored.version)) ? Number(stored.version) : -1;
  return storedVersion > (customer.version ?? -1);
}

function isMarkedDeleted(stored: LocalRow): boolean {
  return isTime(stored.deleted_at);
}

/**
 * True for an opt-out that only the file has. Square does not accept `email_unsubscribed` for a new
 * customer, so `push-new --allow-subscribe` creates the customer as subscribed. The next save would
 * replace the 1 in the file with Square's 0, and the opt-out would be lost. So the 1 stays until
 * Square has it too, and a note in `push_error` marks the row.
 */
function mustKeepOptOut(stored: LocalRow, customer: CustomerRow): boolean {
  // For all other rows, Square is the source of truth: there, the customer has subscribed again.
  const isUnpushed = stored.id === null;
  const isMarked = stored.push_error === OPT_OUT_NOTE;
  const hasOptOut = parseOptOut(stored) === true && customer[EMAIL_UNSUBSCRIBED] !== 1;
  return hasOptOut && (isUnpushed || isMarked);
}

/**
 * Throws if a failed statement has ended the transaction. SQLite usually undoes only the statement.
 * A constraint or trigger with ROLLBACK undoes the whole transaction, so nothing of this step can
 * be saved.
 * @param error the error of the statement
 * @throws SyncError (failed)
 */
export function throwIfRolledBack(db: Database, id: string, error: unknown): void {
  if (isInTransaction(db)) return;
  throw new SyncError(
    "failed",
    `Cannot save customer ${id}: ${messageOf(error)}; that rule undid all other customers too`,
    "change the rule from ROLLBACK to ABORT, then run it again",
    error,
  );
}

/**
 * Reads which unpushed row each reference belongs to. The references of a row are its
 * `reference_id` and the idempotency key that it was sent with. A reference that also belongs to
 * another row, pushed or not, identifies neither and is left out.
 * @returns the local_id for each reference, in the form in which references are sent
 */
export function readUnpushedReferences(db: Database): Map<string, string> {
  const localIds = new Map<string, string>();
  const shared = new Set<string>();
  const unpushed = readRows(
    db,
    `SELECT CAST(local_id AS TEXT) AS local_id, ${REFERENCE_ID} AS reference, idempotency_key
     FROM ${TABLE} WHERE id IS NULL AND ${NOT_DELETED}`,
  );
  for (const row of unpushed) {
    // A row without a reference_id is sent with its idempotency key in that field, so the two can
    // be equal. The set has them once.
    const references = new Set([
      cleanReference(row.reference),
      cleanReference(row.idempotency_key),
    ]);
    for (const reference of references) {
      if (reference === "") continue;
      if (localIds.has(reference)) shared.add(reference);
      localIds.set(reference, String(row.local_id));
    }
  }
  for (const reference of shared) localIds.delete(reference);

  // There can be very many pushed rows, so read them one at a time.
  const pushed = db.prepare(
    `SELECT ${REFERENCE_ID} FROM ${TABLE}
     WHERE id IS NOT NULL AND ${NOT_DELETED} AND ${REFERENCE_ID} IS NOT NULL`,
  );
  while (localIds.size > 0 && pushed.step()) localIds.delete(cleanReference(pushed.get()[0]));
  pushed.free();
  return localIds;
}

/** Cleans a reference_id as for sending. A value that cannot be sent becomes an empty text. */
function cleanReference(value: SqlValue | undefined): string {
  return normalizeCell(value, "reference").text ?? "";
}

// ---- Customers that Square no longer has ----

// The rows whose customer came from Square and is not marked as deleted. A row with its own id has
// no synced_at.
const IS_LIVE = `id IS NOT NULL AND ${NOT_DELETED} AND ${IS_SYNCED}`;

/** A row whose customer came from Square and is not marked as deleted. */
export interface LiveCustomer {
  id: string;
  /** RFC 3339. It can also be any other text, because other programs edit the file. */
  createdAt: string;
  /** Has a name, company, email address or phone number. Square's search and count omit others. */
  isSearchable: boolean;
}

/**
 * Reads the customers that were saved from Square and are not marked as deleted. Rows with their
 * own id are left out, because Square never had them.
 */
export function readLiveCustomers(db: Database): LiveCustomer[] {
  const statement = db.prepare(`SELECT ${COLUMNS.join(", ")} FROM ${TABLE} WHERE ${IS_LIVE}`);
  const customers: LiveCustomer[] = [];
  while (statement.step()) {
    const row = statement.getAsObject();
    customers.push({
      id: String(row.id),
      createdAt: String(row[CREATED_AT]),
      isSearchable: hasIdentifyingField(row),
    });
  }
  statement.free();
  return customers;
}

/**
 * Reads the ids of some customers of Square: the 50 that were added to the file first, and the 50
 * that were added last.
 */
export function readSomeIds(db: Database): string[] {
  // A script of your own can use lib with another table, and its file may not have this one.
  if (listColumns(db, TABLE).length === 0) return [];
  const select = (order: string) =>
    `SELECT * FROM (SELECT id FROM ${TABLE} WHERE ${IS_LIVE} ORDER BY local_id ${order} LIMIT 50)`;
  const rows = readRows(db, `${select("ASC")} UNION ${select("DESC")}`);
  return rows.map(({ id }) => String(id));
}

/** A customer that Square no longer has under its id. */
export interface GoneCustomer {
  id: string;
  /** The id of the customer that it was merged into. If it is null, the customer was deleted. */
  mergedInto: string | null;
}

/**
 * Marks customers as deleted or merged. The rows stay, with all their values.
 * @param markedAt the time to save in `deleted_at`, as RFC 3339
 * @returns the rows that were marked now, and the customers whose mark a constraint or trigger of
 *   the table rejected
 */
export function markGone(
  db: Database,
  gone: readonly GoneCustomer[],
  markedAt: string = formatTime(Date.now()),
): { marked: RowChange[]; rejected: RejectedCustomer[] } {
  const marked: RowChange[] = [];
  const rejected: RejectedCustomer[] = [];
  for (const { id, mergedInto } of gone) {
    const [row] = readRows(
      db,
      `SELECT CAST(local_id AS TEXT) AS local_id, push_error FROM ${TABLE}
       WHERE id = ? AND ${NOT_DELETED}`,
      [id],
    );
    if (row === undefined) continue;
    db.run("SAVEPOINT mark");
    try {
      db.run(`UPDATE ${TABLE} SET deleted_at = ?, merged_into = ? WHERE id = ?`, [
        markedAt,
        mergedInto,
        id,
      ]);
      requireWrittenRow(db);
      if (mergedInto !== null) followMerge(db, id, mergedInto, row.push_error === OPT_OUT_NOTE);
      const outcome = mergedInto === null ? "deleted" : "merged";
      marked.push({ localId: String(row.local_id), id, outcome, columns: [], mergedInto });
    } catch (error) {
      throwIfRolledBack(db, id, error);
      // Undo the mark too, so that the next run tries again.
      db.run("ROLLBACK TO mark");
      rejected.push({ id, reason: messageOf(error) });
    }
    db.run("RELEASE mark");
  }
  return { marked, rejected };
}

/** Updates the other rows after a merge. */
function followMerge(db: Database, id: string, mergedInto: string, hasOptOut: boolean): void {
  // If A was merged into B, and B is now merged into C, then A points to C as well.
  db.run(`UPDATE ${TABLE} SET merged_into = ? WHERE merged_into = ?`, [mergedInto, id]);
  // An opt-out that only the file has would be lost with the merged row.
  if (!hasOptOut) return;
  const target = readRows(db, `SELECT 1 FROM ${TABLE} WHERE id = ?`, [mergedInto]);
  if (target.length === 0) throw new Error(`customer ${mergedInto} is not in the file`);
  db.run(
    `UPDATE ${TABLE} SET ${EMAIL_UNSUBSCRIBED} = 1, push_error = ?
     WHERE id = ? AND ${EMAIL_UNSUBSCRIBED} IS NOT 1`,
    [OPT_OUT_NOTE, mergedInto],
  );
}

/**
 * Lists the rows with their own id: they have an id and no synced_at. A row that a push has linked,
 * but whose other values the table rejected, looks the same. It has an idempotency key and a
 * push_error, so it is left out.
 * @returns the local_id of each row
 */
export function listRowsWithOwnId(db: Database): string[] {
  // The text has another name than the column, so that ORDER BY sorts the numbers.
  const rows = readRows(
    db,
    `SELECT CAST(local_id AS TEXT) AS local_id_text FROM ${TABLE}
     WHERE id IS NOT NULL AND NOT (${IS_SYNCED}) AND ${NOT_DELETED}
       AND NOT (idempotency_key IS NOT NULL AND push_error IS NOT NULL) ORDER BY local_id`,
  );
  return rows.map((row) => String(row.local_id_text));
}
