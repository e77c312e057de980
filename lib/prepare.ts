/**
 * Selects unpushed rows and decides which of them can be sent. The check undoes its own writes.
 * Before the first request, its result is stored: an idempotency key for each row to send, and the
 * reason for each other row.
 *
 * A row is **in doubt** when it may have been sent and its outcome is unknown, for example because
 * the reply was lost. It has an idempotency key and no id. It may exist in Square, so it is looked
 * up before it is sent again.
 */
import type { Database, SqlValue } from "sql.js";
import { parseOptOut, readUnpushedReferences } from "./customers.ts";
import {
  type ComparedValues,
  createDuplicateIndex,
  type DuplicateIndex,
  type Match,
} from "./internal/duplicates.ts";
import { messageOf, SyncError } from "./internal/errors.ts";
import { countWrites, isInTransaction, readRows, resetWrites } from "./internal/sql.ts";
import { findInvalidUtf8 } from "./internal/utf8.ts";
import {
  buildComparedValues,
  buildCustomer,
  buildRow,
  CREATED_AT,
  columnOf,
  EMAIL_UNSUBSCRIBED,
  type LocalRow,
  type NewCustomer,
  NOT_DELETED,
  REFERENCE_ID,
  TABLE,
} from "./mapping.ts";

/** An unpushed row, and what happened to it. */
export interface PushRow {
  /** A text, because SQLite's integers can be larger than a JavaScript number. */
  localId: string;
  idempotencyKey: string;
  /** The data to send. */
  customer: NewCustomer;
  /** The values that were compared with those of other rows when the row was selected. */
  comparedValues: ComparedValues;
  /** The row may have been sent, in this run or an earlier one, and the outcome is unknown. */
  inDoubt: boolean;
  /** For a row in doubt: each `reference_id` to search for in Square. Empty for other rows. */
  references: string[];
  /** The row has a `push_error` of an earlier run. */
  hadError: boolean;
  outcome: Outcome;
  /** Why the row is on hold; null = it is not. */
  holdReason: HoldReason | null;
  /** Square's customer id, when it is known. */
  id: string | null;
  /** The reason to print: why the row is rejected or on hold, or what a person should know. */
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

/**
 * - `duplicate`: another row has the same email address, phone number or reference id.
 * - `opt-out`: the customer wants no marketing email, and Square would create it as subscribed.
 * - `edited`: it was edited after it was sent. Square has its idempotency key with other values.
 * - `not saved`: it exists in Square, but a constraint or trigger of the table rejects the
 * customer.
 */
export type HoldReason = "duplicate" | "opt-out" | "edited" | "not saved";

/** Which unpushed rows to push. The first three options narrow the selection. */
export interface Selection {
  /** Only rows with this `source`. */
  source: string | undefined;
  /** Only rows created since this time, as RFC 3339; null = all. */
  createdSince: string | null;
  /** At most this many rows. */
  limit: number | undefined;
  /** Send possible duplicates too. */
  allowDuplicates: boolean;
  /** Send rows with `email_unsubscribed` too. */
  allowSubscribe: boolean;
}

// ---- Select and check ----

/**
 * Selects unpushed rows and decides which of them can be sent. The check tries to save each row and
 * undoes that again, so the database stays as it was.
 */
export function prepareRows(db: Database, selection: Selection): PushRow[] {
  const selected = readSelectedRows(db, selection);
  const duplicates = selection.allowDuplicates ? undefined : indexDuplicates(db, selected);
  const localIdByReference = readUnpushedReferences(db);
  return selected.map((stored) => {
    const row = createPushRow(stored);
    checkRow(db, row, stored, duplicates, selection);
    if (row.inDoubt) row.references = listReferences(row, localIdByReference);
    return row;
  });
}

/** True if the row needs a request: to look it up, or to create it. */
export function needsRequest({ outcome, inDoubt }: PushRow): boolean {
  return outcome === "ready" || inDoubt;
}

function readSelectedRows(db: Database, { source, createdSince, limit }: Selection): LocalRow[] {
  // Rows with an error of an earlier run come last. Otherwise, the same bad rows could use up
  // --limit in every run. A row whose created_at is not a time is selected, because it can be new.
  // The text local_id takes the place of the number in the result. ORDER BY names the table,
  // because local_id alone would be the text, which sorts 10 before 9.
  return readRows(
    db,
    `SELECT *, CAST(local_id AS TEXT) AS local_id FROM ${TABLE}
     WHERE id IS NULL AND ${NOT_DELETED} AND (?1 IS NULL OR source = ?1)
       AND (?2 IS NULL OR coalesce(strftime('%Y-%m-%dT%H:%M:%fZ', ${CREATED_AT}), ?2) >= ?2)
     ORDER BY push_error IS NOT NULL, ${TABLE}.local_id LIMIT ?3`,
    [source ?? null, createdSince, limit ?? -1],
  );
}

function createPushRow(stored: LocalRow): PushRow {
  const storedKey = String(stored.idempotency_key ?? "").trim();
  return {
    localId: String(stored.local_id),
    idempotencyKey: storedKey || crypto.randomUUID(),
    customer: {}, // checkRow builds it.
    comparedValues: buildComparedValues(stored),
    // A stored key means that the row may have been sent. The file does not record the request
    // itself: if the script was killed before it, the row has a key and was never sent.
    inDoubt: storedKey !== "",
    references: [],
    hadError: stored.push_error !== null,
    outcome: "ready",
    holdReason: null,
    id: null,
    reason: null,
  };
}

/**
 * Returns the reference_id to send: the one of the row, or else its idempotency key. With it, each
 * row can be searched for in Square. Call it after checkRow has built `row.customer`.
 */
function chooseReferenceId({ customer, idempotencyKey }: PushRow): string {
  return customer.referenceId ?? idempotencyKey;
}

/**
 * Lists each reference_id under which Square may have a row in doubt. The row can have got its
 * reference_id after it was sent, so the idempotency key is one of them. A reference that several
 * rows share identifies none of them, so it is left out.
 */
function listReferences(row: PushRow, localIdByReference: Map<string, string>): string[] {
  const references = new Set([chooseReferenceId(row), row.idempotencyKey]);
  return [...references].filter((reference) => localIdByReference.get(reference) === row.localId);
}

/**
 * Builds the data to send, and decides whether the row can be sent.
 * @param stored the row as it is in the file now
 * @param duplicates undefined = do not look for possible duplicates
 */
function checkRow(
  db: Database,
  row: PushRow,
  stored: LocalRow,
  duplicates: DuplicateIndex | undefined,
  { allowSubscribe }: Selection,
): void {
  const { customer, problems } = buildCustomer(stored, findInvalidUtf8(db, TABLE, stored));
  row.customer = customer;
  const hasOptOut = parseOptOut(stored);
  if (hasOptOut === undefined) problems.push(`${EMAIL_UNSUBSCRIBED} is invalid: expected 0 or 1`);
  if (problems.length > 0) {
    refuse(row, problems.join("; "));
    return;
  }

  const candidate = { localId: row.localId, id: null, ...buildComparedValues(stored) };
  // Example: row 7 was sent, and the reply was lost. A pull could not link the customer, and
  // inserted it as row 12, which has the reference_id of row 7. Row 12 is not a duplicate of row 7,
  // but its customer. So a row in doubt is not compared with rows that have its reference_id.
  const options = row.inDoubt ? { ignoredReference: chooseReferenceId(row) } : {};
  const match = duplicates?.find(candidate, options);
  if (match !== undefined) {
    hold(row, describeMatch(match), "duplicate");
    return;
  }
  if (hasOptOut && !allowSubscribe) {
    hold(
      row,
      `${EMAIL_UNSUBSCRIBED} is set, but Square would create the customer as subscribed to marketing email`,
      "opt-out",
    );
    return;
  }
  const problem = trySave(db, row);
  if (problem !== undefined) {
    refuse(row, `a constraint or trigger of the table rejects it: ${problem}`);
    return;
  }
  // The row will be sent, so the rows after it are compared with it too.
  duplicates?.add(candidate);
}

/** Indexes the rows that a selected row can be a duplicate of. */
function indexDuplicates(db: Database, selected: LocalRow[]): DuplicateIndex {
  // To save memory, the index keeps only the values that a selected row has.
  const index = createDuplicateIndex(selected.map(buildComparedValues));
  const columns = [columnOf("emailAddress"), columnOf("phoneNumber"), columnOf("referenceId")];
  // Read the customers of Square, and the rows that may have been sent. A selected row can be among
  // them. That is harmless, because find ignores the row itself. checkRow adds the rows that will
  // be sent. Deleted customers are left out, because the same person may come back. A merged
  // customer is still in Square, as a part of another one.
  const statement = db.prepare(
    `SELECT CAST(local_id AS TEXT) AS local_id, iif(${NOT_DELETED}, id, merged_into) AS id,
       ${columns.join(", ")} FROM ${TABLE}
     WHERE (${NOT_DELETED}
         OR merged_into IN (SELECT id FROM ${TABLE} WHERE id IS NOT NULL AND ${NOT_DELETED}))
       AND (id IS NOT NULL OR idempotency_key IS NOT NULL)`,
  );
  // There can be very many rows, so read them one at a time.
  while (statement.step()) {
    const row = statement.getAsObject();
    const id = row.id === null ? null : String(row.id);
    index.add({ localId: String(row.local_id), id, ...buildComparedValues(row) });
  }
  statement.free();
  return index;
}

function describeMatch(match: Match): string {
  const customer = match.id === null ? "" : `, customer ${match.id}`;
  return `same ${columnOf(match.field)} as row ${match.localId}${customer}`;
}

/**
 * Tries what a push will save, and undoes it. Without this trial, a constraint or trigger of the
 * table would reject the save only after the customer was created in Square, and again in every
 * run.
 * @returns SQLite's reason, or undefined when the save works
 */
function trySave(db: Database, row: PushRow): string | undefined {
  const now = new Date().toISOString();
  const example = buildRow({
    ...row.customer,
    referenceId: chooseReferenceId(row),
    id: "ABCDEFGHIJKLMNOPQRSTUVWXYZ", // It looks like an id that Square gives.
    createdAt: now,
    updatedAt: now,
    creationSource: "THIRD_PARTY",
    version: 0n,
  });
  const columns = [...Object.keys(example), "synced_at"];
  const assignments = columns.map((column) => `${column} = ?`);
  let problem: string | undefined;
  const writesBefore = countWrites(db);
  db.run("SAVEPOINT trial");
  try {
    writeKey(db, row);
    db.run(`UPDATE ${TABLE} SET ${assignments.join(", ")}, push_error = NULL WHERE local_id = ?`, [
      ...Object.values(example),
      now,
      row.localId,
    ]);
    if (db.getRowsModified() !== 1) problem = "a trigger ignores the update";
  } catch (error) {
    problem = messageOf(error);
  }
  if (isInTransaction(db)) {
    db.run("ROLLBACK TO trial; RELEASE trial");
  } else {
    // A constraint or trigger with ROLLBACK has ended the whole transaction, so begin another one.
    // No write is lost with the first one, because all rows are checked before anything is written.
    db.run("BEGIN");
  }
  // The trial has left no change. Without this call, its writes would still count, and an update
  // would save the file without need.
  resetWrites(db, writesBefore);
  return problem;
}

/**
 * Checks rows again right before they are sent, because another program may have edited them. Rows
 * with the same values as before are not compared with other rows again. A row that must not be
 * sent anymore gets another outcome than `ready`, and its reason is saved.
 */
export function recheckRows(db: Database, rows: readonly PushRow[], selection: Selection): void {
  const current: { row: PushRow; stored: LocalRow; isChanged: boolean }[] = [];
  for (const row of rows) {
    const stored = readUnpushedRow(db, row);
    if (stored === undefined) {
      row.outcome = "later";
      row.reason = "another program changed or removed it during the push";
      continue;
    }
    // This step can run twice, so begin with a clean outcome.
    row.outcome = "ready";
    row.holdReason = null;
    row.reason = null;
    current.push({ row, stored, isChanged: hasChangedValues(row, stored) });
  }

  // Reading the whole table again takes time. So only rows with a new email address, phone number
  // or reference_id are compared with the others again.
  const changed = current.filter(({ isChanged }) => isChanged).map(({ stored }) => stored);
  const needsIndex = changed.length > 0 && !selection.allowDuplicates;
  const duplicates = needsIndex ? indexDuplicates(db, changed) : undefined;
  for (const { row, stored, isChanged } of current) {
    checkRow(db, row, stored, isChanged ? duplicates : undefined, selection);
    // Always send a reference_id, so that the row can be looked up. storeCheckResults has stored
    // one, but another program can have removed it since.
    row.customer.referenceId = chooseReferenceId(row);
  }

  // checkRow can undo what was written before it in this transaction, so write at the end. A row
  // that was not sent needs no idempotency key.
  for (const { row } of current)
    if (row.outcome !== "ready") saveReason(db, row, { clearKey: !row.inDoubt });
}

/** True if a compared value of a row has changed since the row was selected. */
function hasChangedValues({ comparedValues, idempotencyKey }: PushRow, stored: LocalRow): boolean {
  const { emailAddress, phoneNumber, referenceId } = buildComparedValues(stored);
  // storeCheckResults has saved the idempotency key as the reference_id of a row without one.
  const expectedReferenceId = comparedValues.referenceId || idempotencyKey;
  return (
    emailAddress !== comparedValues.emailAddress ||
    phoneNumber !== comparedValues.phoneNumber ||
    referenceId !== expectedReferenceId
  );
}

/**
 * Reads a row as it is in the file now, by its idempotency key. Another program can have given its
 * local_id to another row.
 * @returns undefined if the row was removed, marked as deleted, or has an id
 */
export function readUnpushedRow(db: Database, { idempotencyKey }: PushRow): LocalRow | undefined {
  const sql = `SELECT *, CAST(local_id AS TEXT) AS local_id FROM ${TABLE}
    WHERE idempotency_key = ? AND id IS NULL AND ${NOT_DELETED}`;
  return readRows(db, sql, [idempotencyKey])[0];
}

// ---- Store the result of the check ----

/**
 * Stores the result of the check in each row: an idempotency key and a `reference_id` by which
 * Square can be searched, or the reason why the row is not sent. If a key were created at the time
 * of the request, it would be lost together with the reply, and the next run would create the
 * customer again.
 * @throws SyncError (failed) when the table does not keep a key
 */
export function storeCheckResults(db: Database, rows: readonly PushRow[]): void {
  const notReady = rows.filter(({ outcome }) => outcome !== "ready");
  const ready = rows.filter(({ outcome }) => outcome === "ready");
  // All reasons come before the first key. If a trigger with ROLLBACK ends the transaction while a
  // reason is written, no key is lost.
  const sql = `UPDATE ${TABLE} SET push_error = ? WHERE local_id = ?`;
  for (const { reason, localId } of notReady) tryWriteReason(db, sql, [reason, localId]);
  for (const row of ready) storeKey(db, row);
}

/**
 * Writes the reason of a row. The trigger that rejects the row can reject this write too. The
 * reason is then only printed, and the other rows go on.
 */
function tryWriteReason(db: Database, sql: string, values: SqlValue[]): void {
  try {
    db.run(sql, values);
  } catch {
    // A trigger with ROLLBACK has ended the transaction. Only reasons were written in it so far.
    if (!isInTransaction(db)) db.run("BEGIN");
  }
}

/** Stores the key of a row. The trial of the same write has succeeded, so a problem is unexpected. */
function storeKey(db: Database, row: PushRow): void {
  try {
    writeKey(db, row);
  } catch (error) {
    throw new SyncError(
      "failed",
      `Cannot store the idempotency key of row ${row.localId}: ${messageOf(error)}`,
      "look for a trigger on the table, or a local_id that is not its PRIMARY KEY; nothing was sent",
    );
  }
}

function writeKey(db: Database, row: PushRow): void {
  const referenceId = chooseReferenceId(row);
  db.run(`UPDATE ${TABLE} SET idempotency_key = ?, ${REFERENCE_ID} = ? WHERE local_id = ?`, [
    row.idempotencyKey,
    referenceId,
    row.localId,
  ]);
  // A trigger can have changed or ignored the write.
  const kept = readRows(
    db,
    `SELECT 1 FROM ${TABLE} WHERE local_id = ? AND idempotency_key = ? AND ${REFERENCE_ID} = ?`,
    [row.localId, row.idempotencyKey, referenceId],
  );
  if (kept.length !== 1) throw new Error("the table does not keep its idempotency key");
}

// ---- Outcomes ----

/**
 * Saves the reason of a row in `push_error`.
 * @param options.clearKey removes the idempotency key. Do this only when it is certain that no
 *   request with this key was executed. Otherwise, the next run would create the customer again
 * @param options.details saved after the reason, and never printed
 */
export function saveReason(
  db: Database,
  row: PushRow,
  { clearKey, details = "" }: { clearKey: boolean; details?: string },
): void {
  tryWriteReason(
    db,
    `UPDATE ${TABLE} SET push_error = ?, idempotency_key = ? WHERE idempotency_key = ? AND id IS NULL`,
    [`${row.reason} ${details}`.trim(), clearKey ? null : row.idempotencyKey, row.idempotencyKey],
  );
}

/** Puts a row on hold. */
export function hold(row: PushRow, reason: string, holdReason: HoldReason): void {
  row.outcome = "held";
  row.reason = reason;
  row.holdReason = holdReason;
}

/** Marks a row as rejected. */
export function refuse(row: PushRow, reason: string): void {
  row.outcome = "refused";
  row.reason = reason;
}
