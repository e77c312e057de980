/**
 * Selects unpushed rows and decides which of them can be sent. Checking writes nothing. What the check found is
 * stored before the first request: an idempotency key for each row to send, the reason for each of the others.
 *
 * A row is **in doubt** when it was sent and its outcome is unknown, for example because the reply was lost. It
 * has an idempotency key and no id. It may exist in Square, so it is looked up before it is sent again.
 */

import type { Database, SqlValue } from "sql.js";
import { readUnpushedReferences } from "./customers.ts";
import { type Contacts, createDuplicateIndex, type DuplicateIndex } from "./internal/duplicates.ts";
import { messageOf, SyncError } from "./internal/errors.ts";
import { countWrites, isInTransaction, readRows, resetWrites } from "./internal/sql.ts";
import { findInvalidUtf8 } from "./internal/utf8.ts";
import {
  buildCustomer,
  buildRow,
  columnOf,
  findContacts,
  type LocalRow,
  type NewCustomer,
  TABLE,
} from "./mapping.ts";

const REFERENCE_ID = columnOf("referenceId");
const CREATED_AT = columnOf("createdAt");
const EMAIL_UNSUBSCRIBED = columnOf("preferences.emailUnsubscribed");

/** An unpushed row, and what happened to it. */
export interface PushRow {
  /** A text, because SQLite's integers can be larger than a JavaScript number. */
  localId: string;
  idempotencyKey: string;
  /** What is sent. */
  customer: NewCustomer;
  /** What possible duplicates were found by, when the row was selected. */
  contacts: Contacts;
  /** It was sent before, in this run or an earlier one, and the outcome is unknown. */
  inDoubt: boolean;
  /** Of a row in doubt: the `reference_id`s under which Square may have it. */
  references: string[];
  /** An earlier push had a problem with it. */
  hadError: boolean;
  outcome: Outcome;
  /** Square's customer id, once it is known. */
  id: string | null;
  /** Why it is rejected or on hold, or what a person should know about it. */
  reason: string | null;
}

/**
 * - `ready`: will be sent.
 * - `created`: this run created it in Square.
 * - `linked`: it exists in Square already, from an earlier run whose reply was lost.
 * - `refused`: Square or our validation rejects it.
 * - `held`: on hold until a person decides, for example about a possible duplicate.
 * - `later`: not sent, or not answered; a later run tries again.
 */
export type Outcome = "ready" | "created" | "linked" | "refused" | "held" | "later";

/** Which unpushed rows to push. Every option narrows the selection. */
export interface Selection {
  source: string | undefined;
  /** RFC 3339; null = whenever they were created */
  createdSince: string | null;
  limit: number | undefined;
  allowDuplicates: boolean;
  allowSubscribe: boolean;
}

// ---- Select and check ----

/**
 * Selects the unpushed rows and decides which can be sent. Nothing is written that stays: the trial of each
 * save is rolled back.
 */
export function prepareRows(db: Database, selection: Selection): PushRow[] {
  const selected = readSelected(db, selection);
  const duplicates = selection.allowDuplicates ? undefined : indexDuplicates(db, selected);
  const unpushed = readUnpushedReferences(db);
  return selected.map((columns) => {
    const row = buildPushRow(columns, unpushed);
    checkRow(db, row, columns, duplicates, selection);
    return row;
  });
}

function readSelected(db: Database, { source, createdSince, limit }: Selection): LocalRow[] {
  // Rows that had a problem come last. Otherwise they could use up --limit in every run. A created_at that is
  // not a time could be a new one, so the row is selected.
  return readRows(
    db,
    `SELECT *, CAST(local_id AS TEXT) AS local_id FROM ${TABLE}
     WHERE id IS NULL AND deleted_at IS NULL AND (?1 IS NULL OR source = ?1)
       AND (?2 IS NULL OR coalesce(strftime('%Y-%m-%dT%H:%M:%fZ', ${CREATED_AT}), ?2) >= ?2)
     ORDER BY push_error IS NOT NULL, ${TABLE}.local_id LIMIT ?3`,
    [source ?? null, createdSince, limit ?? -1],
  );
}

function buildPushRow(columns: LocalRow, unpushed: Map<string, string>): PushRow {
  const localId = String(columns.local_id);
  const storedKey = String(columns.idempotency_key ?? "").trim();
  const idempotencyKey = storedKey || crypto.randomUUID();
  const inDoubt = storedKey !== "";
  const { customer } = buildCustomer(columns);
  // Square knows a row in doubt by its own reference_id, or by the one that an earlier run gave it. A reference
  // that several rows share identifies none of them.
  const references = [customer.referenceId ?? idempotencyKey, idempotencyKey];
  const usable = references.filter((reference) => unpushed.get(reference) === localId);
  return {
    localId,
    idempotencyKey,
    customer,
    contacts: findContacts(columns),
    inDoubt,
    references: inDoubt ? [...new Set(usable)] : [],
    hadError: columns.push_error !== null,
    outcome: "ready",
    id: null,
    reason: null,
  };
}

/**
 * Decides whether a row can be sent.
 * @param columns the row as it is in the file now
 * @param duplicates undefined = do not look for possible duplicates
 */
function checkRow(
  db: Database,
  row: PushRow,
  columns: LocalRow,
  duplicates: DuplicateIndex | undefined,
  { allowSubscribe }: Selection,
): void {
  const { customer, problems } = buildCustomer(columns, findInvalidUtf8(db, TABLE, columns));
  row.customer = customer;
  const isFlag = [null, 0, 1, "", "0", "1"].includes(unsubscribedCell(columns));
  if (!isFlag) problems.push(`${EMAIL_UNSUBSCRIBED} is invalid: expected 0 or 1`);
  if (problems.length > 0) {
    refuse(row, problems.join("; "));
    return;
  }
  const candidate = { localId: row.localId, id: null, ...findContacts(columns) };
  const referenceId = customer.referenceId ?? row.idempotencyKey;
  // A customer with the reference_id of a row in doubt can be the row itself, created and pulled.
  const match = duplicates?.find(candidate, row.inDoubt ? referenceId : undefined);
  if (match !== undefined) {
    hold(row, describeMatch(match));
    return;
  }
  if (isUnsubscribed(columns) && !allowSubscribe) {
    hold(
      row,
      `${EMAIL_UNSUBSCRIBED} is set, but Square would create the customer as subscribed to marketing email`,
    );
    return;
  }
  const problem = trySave(db, row, { ...customer, referenceId });
  if (problem !== undefined)
    refuse(row, `a constraint or trigger of the table rejects it: ${problem}`);
  else duplicates?.add(candidate);
}

/** True for a row whose customer wants no marketing email. */
export function isUnsubscribed(columns: LocalRow): boolean {
  return ["1", 1].includes(unsubscribedCell(columns) ?? 0);
}

function unsubscribedCell(columns: LocalRow): string | number | null {
  const value = columns[EMAIL_UNSUBSCRIBED] ?? null;
  return value instanceof Uint8Array ? "bytes" : typeof value === "string" ? value.trim() : value;
}

// Deleted customers hold nothing: the same person may come back.
function indexDuplicates(db: Database, selected: LocalRow[]): DuplicateIndex {
  const index = createDuplicateIndex(selected.map(findContacts));
  const contacts = ["emailAddress", "phoneNumber", "referenceId"] as const;
  const statement = db.prepare(
    `SELECT CAST(local_id AS TEXT) AS local_id, id, ${contacts.map(columnOf).join(", ")} FROM ${TABLE}
     WHERE deleted_at IS NULL AND (id IS NOT NULL OR idempotency_key IS NOT NULL)`,
  );
  // One row at a time, because the whole directory can be large.
  while (statement.step()) {
    const row = statement.getAsObject();
    const id = row.id === null ? null : String(row.id);
    index.add({ localId: String(row.local_id), id, ...findContacts(row) });
  }
  statement.free();
  return index;
}

function describeMatch(match: NonNullable<ReturnType<DuplicateIndex["find"]>>): string {
  const customer = match.id === null ? "" : `, customer ${match.id}`;
  return `same ${columnOf(match.field)} as row ${match.localId}${customer}`;
}

/**
 * Tries what a push will save, and undoes it. a constraint or trigger of the table, such as a NOT NULL column or a trigger of
 * yours, would otherwise reject the row only after the customer was created in Square, in every run again.
 * @returns SQLite's reason, or undefined when the save works
 */
function trySave(db: Database, row: PushRow, customer: NewCustomer) {
  const now = new Date().toISOString();
  const example = buildRow({
    ...customer,
    id: "ABCDEFGHIJKLMNOPQRSTUVWXYZ", // has the form of Square's ids
    createdAt: now,
    updatedAt: now,
    creationSource: "THIRD_PARTY",
    version: 0n,
  });
  const columns = Object.keys(example);
  const set = [...columns, "synced_at"].map((column) => `${column} = ?`);
  let problem: string | undefined;
  const writes = countWrites(db);
  db.run("SAVEPOINT trial");
  try {
    storeKey(db, row, String(customer.referenceId));
    db.run(`UPDATE ${TABLE} SET ${set.join(", ")}, push_error = NULL WHERE local_id = ?`, [
      ...Object.values(example),
      now,
      row.localId,
    ]);
    if (db.getRowsModified() !== 1) problem = "a trigger ignores the update";
  } catch (error) {
    problem = messageOf(error);
  }
  // A rule with ROLLBACK ends the whole transaction. Rows are checked before anything is written in it, so
  // nothing is lost, and another transaction takes its place.
  db.run(isInTransaction(db) ? "ROLLBACK TO trial; RELEASE trial" : "BEGIN");
  // Otherwise an update would save the file although the trial has left no change in it.
  resetWrites(db, writes);
  return problem;
}

/** Checks rows again, as they are in the file now, right before they are sent. */
export function checkAgain(db: Database, rows: readonly PushRow[], selection: Selection): void {
  const waiting = rows.flatMap((row) => {
    const columns = readWaiting(db, row);
    if (columns !== undefined && columns.deleted_at === null) return [{ row, columns }];
    row.outcome = "later";
    row.reason = "another program changed or removed it during the push";
    return [];
  });
  // Reading the whole table again takes time, so only rows with another email, phone or reference_id are
  // compared with it.
  const changed = waiting.filter(({ row, columns }) => hasOtherContacts(row, columns));
  const duplicates =
    changed.length === 0 || selection.allowDuplicates
      ? undefined
      : indexDuplicates(
          db,
          changed.map(({ columns }) => columns),
        );
  for (const { row, columns } of waiting) {
    Object.assign(row, { outcome: "ready", reason: null });
    const isChanged = hasOtherContacts(row, columns);
    checkRow(db, row, columns, isChanged ? duplicates : undefined, selection);
    row.customer = { referenceId: row.idempotencyKey, ...row.customer };
  }
  // The check of a row can undo what was written in the transaction before, so write at the end.
  for (const { row } of waiting)
    if (row.outcome !== "ready") saveReason(db, row, "", row.inDoubt ? row.idempotencyKey : null);
}

function hasOtherContacts({ contacts, idempotencyKey }: PushRow, columns: LocalRow): boolean {
  const { emailAddress, phoneNumber, referenceId } = findContacts(columns);
  return (
    emailAddress !== contacts.emailAddress ||
    phoneNumber !== contacts.phoneNumber ||
    referenceId !== (contacts.referenceId || idempotencyKey)
  );
}

/** Reads a row as it is in the file now; undefined when it is gone or has an id. */
export function readWaiting(db: Database, { idempotencyKey }: PushRow): LocalRow | undefined {
  const sql = `SELECT *, CAST(local_id AS TEXT) AS local_id FROM ${TABLE}
    WHERE idempotency_key = ? AND id IS NULL`;
  return readRows(db, sql, [idempotencyKey])[0];
}

// ---- Store the idempotency keys ----

/**
 * Writes to each row what the check found: an idempotency key and a `reference_id` that Square can be asked for,
 * or the reason why the row is not sent. If a key were made at the moment of the call, it would be lost together
 * with the reply, and the next run would create the customer again.
 * @throws SyncError (failed) when the file does not keep a key
 */
export function storeKeys(db: Database, rows: readonly PushRow[]): void {
  for (const row of rows) {
    if (row.outcome === "ready") storeKey(db, row, row.customer.referenceId ?? row.idempotencyKey);
    else db.run(`UPDATE ${TABLE} SET push_error = ? WHERE local_id = ?`, [row.reason, row.localId]);
  }
}

function storeKey(db: Database, row: PushRow, referenceId: string): void {
  db.run(`UPDATE ${TABLE} SET idempotency_key = ?, ${REFERENCE_ID} = ? WHERE local_id = ?`, [
    row.idempotencyKey,
    referenceId,
    row.localId,
  ]);
  const kept = readRows(
    db,
    `SELECT 1 FROM ${TABLE} WHERE local_id = ? AND idempotency_key = ? AND ${REFERENCE_ID} = ?`,
    [row.localId, row.idempotencyKey, referenceId],
  );
  if (kept.length !== 1)
    throw new SyncError(
      "failed",
      `Cannot store the idempotency key of row ${row.localId}: the table does not keep it`,
      "look for a trigger on the table, or a local_id that is not its PRIMARY KEY; nothing was sent",
    );
}

// ---- Outcomes ----

// Only Square's own rejection proves that nothing was created, and only then the key is cleared. A row in doubt
// keeps its key: the rejection of one attempt proves nothing about an earlier one.
export function saveReason(
  db: Database,
  row: PushRow,
  details = "",
  key: SqlValue = row.outcome === "refused" && !row.inDoubt ? null : row.idempotencyKey,
): void {
  db.run(
    `UPDATE ${TABLE} SET push_error = ?, idempotency_key = ? WHERE idempotency_key = ? AND id IS NULL`,
    [`${row.reason} ${details}`.trim(), key, row.idempotencyKey],
  );
}

export function hold(row: PushRow, reason: string): void {
  row.outcome = "held";
  row.reason = reason;
}

export function refuse(row: PushRow, reason: string): void {
  row.outcome = "refused";
  row.reason = reason;
}
