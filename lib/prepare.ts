/**
 * Selects unpushed rows and decides what happens to each: it is sent, linked, refused or held.
 *
 * A row is **in doubt** when it may have been sent and its outcome is unknown, for example because
 * the reply was lost. It has an idempotency key and no id. It may exist in Square, so it is looked
 * up before it is sent again.
 */
import type { Database, SqlValue } from "sql.js";
import type { Square } from "square";
import { buildIdentity, cleanValue, type Identity, isOtherPerson } from "./checks.ts";
import { loadSquare } from "./client.ts";
import {
  NOT_DELETED,
  type RowChange,
  readKey,
  type SaveResult,
  saveCustomers,
  UNPUSHED,
} from "./customers.ts";
import { requireCompletePull } from "./deleted.ts";
import { formatNumber, type RunContext } from "./internal/cli.ts";
import { messageOf, SyncError } from "./internal/errors.ts";
import { type Row, readRows, readValue } from "./internal/sql.ts";
import { buildRow, FIELDS, hasOptOut } from "./mapping.ts";

/** Which unpushed rows to push, and what to do with possible duplicates. */
export interface PushOptions {
  source: string | undefined;
  /** RFC 3339; null = all rows. */
  createdSince: string | null;
  limit: number | undefined;
  batchSize: number;
  allowDuplicates: boolean;
  linkDuplicates: boolean;
  isDryRun: boolean;
}

/**
 * What happens to a row (`create`, `look up` in a dry run, `link`), or what has happened:
 * - `linked`: its customer existed in Square already.
 * - `refused`: Square or our checks do not accept it.
 * - `held`: waits until a person decides, for example about a possible duplicate.
 * - `later`: not sent, or not answered; a later run tries again.
 */
export type Outcome =
  | ("create" | "look up" | "link")
  | ("created" | "linked" | "refused" | "held" | "later");

/** A row of the file that can be compared with others. */
interface LocalRow {
  localId: number;
  inDoubt: boolean;
  hasOptOut: boolean;
  identity: Identity;
}

/** A row that was selected, and what happened to it. */
export interface PushRow extends LocalRow {
  idempotencyKey: string;
  customer: NewCustomer;
  outcome: Outcome;
  /** Square's customer id. */
  id: string | null;
  reason: string | null;
  /** The changes of the file, for --verbose. */
  changes: RowChange[];
}

/** A selected row before the step that decides about it. */
export interface SelectedRow {
  localId: number;
  /** For a row in doubt: each `reference_id` under which Square may have it. Otherwise empty. */
  references: string[];
}

/**
 * Requires a complete pull whose customers are still in the file. After `DELETE FROM customers`,
 * sync_runs still lists that pull, but a push would create every customer a second time. Warns if
 * the last complete pull is older than a day.
 * @throws SyncError (usage)
 */
export function requirePullForPush(db: Database, context: RunContext): void {
  requireCompletePull(db, context);
  // The last run that read everything in one window has fetched all customers of Square. Later runs
  // have added others.
  const saved = readValue(
    db,
    `WITH whole AS (SELECT coalesce(max(id), 0) AS id FROM sync_runs
       WHERE script = 'pull-created' AND complete = 1 AND since IS NULL)
     SELECT sum(iif(sync_runs.id = whole.id, fetched, inserted + created))
     FROM sync_runs, whole WHERE sync_runs.id >= whole.id`,
  );
  const existing = readValue(db, "SELECT count(*) FROM customers WHERE id IS NOT NULL");
  if (Number(existing) < Number(saved) / 2)
    throw new SyncError(
      "usage",
      `Cannot run ${context.script}: "${context.databasePath}" has only ${existing} of the ${saved} customers that were saved in it`,
      "pull-created --since all; or --skip-pull-check, if they were removed on purpose",
    );
  const sql = `SELECT max(started_at) FROM sync_runs WHERE script = 'pull-created' AND complete = 1`;
  const age = context.startedAt - Date.parse(String(readValue(db, sql)));
  const hours = Math.floor(age / 3_600_000);
  if (hours >= 24)
    context.warn(
      `the last complete pull-created began ${formatNumber(hours, "hour")} ago: customers created in Square since then can be created again`,
    );
}

/**
 * Selects the next unpushed rows. A row with a reason or an idempotency key comes late, so that the
 * same bad rows do not use up --limit in every run.
 * @param taken the rows that this run has taken already. It takes no row twice
 */
export function selectRows(
  db: Database,
  { source, createdSince, limit = Number.POSITIVE_INFINITY, batchSize }: PushOptions,
  taken: readonly PushRow[],
): SelectedRow[] {
  const takenIds = new Set(taken.map(({ localId }) => localId));
  // A row whose created_at is not a time is selected, because it can be new.
  const sql = `SELECT local_id, idempotency_key, reference_id FROM customers
    WHERE ${UNPUSHED} AND (?1 IS NULL OR source = ?1)
      AND (?2 IS NULL OR coalesce(strftime('%Y-%m-%dT%H:%M:%fZ', created_at), ?2) >= ?2)
    ORDER BY concat(push_error, idempotency_key) <> '', local_id`;
  return readRows(db, sql, [source ?? null, createdSince])
    .filter(({ local_id }) => !takenIds.has(Number(local_id)))
    .slice(0, Math.min(batchSize, limit - taken.length))
    .map((row) => ({ localId: Number(row.local_id), references: listReferences(db, row) }));
}

function listReferences(db: Database, row: Row): string[] {
  const key = readKey(row);
  if (key === "") return [];
  // The row can have got another reference_id after it was sent with its key. A reference_id that
  // another row has too identifies neither of them.
  const reference = buildIdentity(row).reference_id;
  const sql = "SELECT count(*) FROM customers WHERE reference_id = ?";
  const isOwn = reference !== "" && readValue(db, sql, [row.reference_id ?? null]) === 1;
  return isOwn && reference !== key ? [key, reference] : [key];
}

function readLocalRow(row: Row): LocalRow {
  return {
    localId: Number(row.local_id),
    // If the script was killed before the request, the row has a key and was never sent. The file
    // does not show the difference.
    inDoubt: readKey(row) !== "",
    hasOptOut: hasOptOut(row),
    identity: buildIdentity(row),
  };
}

/**
 * Decides what happens to selected rows, as they are in the file now, and stores that: the id of a
 * row that was found in Square, a reason, or an idempotency key. A row that is not in the result
 * waits for the next batch: another script has given it a key meanwhile, so it must be looked up.
 * @param found the customers that Square has for each row in doubt
 */
export function prepareRows(
  db: Database,
  context: RunContext,
  options: PushOptions,
  selected: readonly SelectedRow[],
  found: ReadonlyMap<number, Square.Customer[]>,
): PushRow[] {
  const sql = `SELECT * FROM customers WHERE local_id = ? AND ${UNPUSHED}`;
  const current = selected.flatMap(({ localId, references }) =>
    readRows(db, sql, [localId]).filter((row) => readKey(row) === "" || references.length > 0),
  );
  const known = readKnownRows(db, current);
  const countries = new Set<string>(Object.values(loadSquare().Square.Country));
  const sent = new Set<number>();

  return current.map((stored): PushRow => {
    const { customer, problems } = buildCustomer(stored, countries);
    const storedKey = readKey(stored);
    const row: PushRow = {
      ...readLocalRow(stored),
      idempotencyKey: storedKey || crypto.randomUUID(),
      customer,
      outcome: "create",
      id: null,
      reason: null,
      changes: [],
    };
    const ownCustomer = findOwnCustomer(row, found.get(row.localId) ?? []);
    if (ownCustomer !== undefined) {
      const { id } = ownCustomer;
      const saved = saveCustomers(db, [ownCustomer], context.startedAt, new Map([[id, storedKey]]));
      return completeRow(db, row, "linked", id, saved);
    }
    if (problems.length > 0) return storeReason(db, row, "refused", problems.join("; "));
    if (!options.allowDuplicates) {
      const match = compareRow(row, known, sent, options.linkDuplicates);
      if (match?.id) return { ...row, outcome: "link", ...match };
      if (match !== undefined) return storeReason(db, row, "held", match.reason);
    }
    if (row.hasOptOut) {
      const reason =
        "email_unsubscribed is set, and Square would create the customer as subscribed";
      return storeReason(db, row, "held", reason);
    }
    // A row without a reference_id is sent with its key in that field, because search finds a
    // customer by reference_id, and not by idempotency key.
    const referenceId = customer.referenceId ?? row.idempotencyKey;
    const assignments = `idempotency_key = ?, push_error = NULL,
      reference_id = iif(trim(coalesce(reference_id, '')) = '', ?, reference_id)`;
    const problem = updateRow(db, row, assignments, [row.idempotencyKey, referenceId]);
    if (problem !== undefined)
      return storeReason(db, row, "refused", `the table does not accept it: ${problem}`);
    sent.add(row.localId);
    const outcome = row.inDoubt && options.isDryRun ? "look up" : "create";
    return { ...row, customer: { ...customer, referenceId }, outcome };
  });
}

/**
 * Finds the customer that a row in doubt became, among those that Square has under its references.
 * If that is unclear, the row is sent again with its key: then Square itself knows the customer.
 */
function findOwnCustomer({ idempotencyKey, identity }: PushRow, found: readonly Square.Customer[]) {
  // Square's search ignores the case of a reference_id.
  const possible = found
    .map(buildRow)
    .filter(
      (customer) =>
        customer.reference_id === idempotencyKey ||
        (customer.reference_id === identity.reference_id &&
          !isOtherPerson(buildIdentity(customer), identity)),
    );
  return possible.length === 1 ? possible[0] : undefined;
}

// ---- The data to send ----

export type NewCustomer = Omit<Square.CreateCustomerRequest, "idempotencyKey">;

/**
 * Builds the data of a new customer from a row, and lists the values that must not be sent. A blank
 * column is left out, because Square accepts a missing field but not an empty one.
 */
export function buildCustomer(row: Row, countries: ReadonlySet<string>) {
  const customer: NewCustomer = {};
  const problems: string[] = [];
  for (const { column, square, sent } of FIELDS) {
    if (sent === undefined) continue;
    const { text, problem } = cleanValue(row[column], sent, countries);
    if (problem !== undefined) problems.push(`${column} ${problem}`);
    if (!text) continue;
    // A field such as `address.country` is inside an object.
    const [first = "", second] = square.split(".");
    const object: unknown = Reflect.get(customer, first);
    const value = second === undefined ? text : { ...Object(object), [second]: text };
    Object.assign(customer, { [first]: value });
  }
  return { customer, problems };
}

// ---- Possible duplicates ----

/** A row that the selected rows are compared with. */
interface KnownRow extends LocalRow {
  /** The customer of the row. A merged row counts as the customer that it was merged into. */
  customerId: string | null;
}

// Shorter phone numbers are local ones, which different customers can have.
const MIN_PHONE_DIGITS = 9;

/** Lists the values by which equal rows are found. Equal phone numbers have the same last digits. */
function listValues({ email_address, phone_number, reference_id }: Identity): string[] {
  const lastDigits = phone_number.slice(-MIN_PHONE_DIGITS);
  return [email_address, lastDigits, reference_id].filter((value) => value !== "");
}

/** Reads the rows of the file that have a value of one of the given rows, and all unpushed rows. */
function readKnownRows(db: Database, rows: readonly Row[]): KnownRow[] {
  const wanted = new Set(rows.flatMap((row) => listValues(buildIdentity(row))));
  // Deleted customers are left out, because the same person may come back. A merged customer is
  // still in Square, as a part of another one.
  const sql = `SELECT local_id, iif(${NOT_DELETED}, id, merged_into) AS customer_id,
      idempotency_key, given_name, family_name, company_name, email_address, phone_number,
      reference_id, email_unsubscribed
    FROM customers WHERE ${NOT_DELETED}
      OR merged_into IN (SELECT id FROM customers WHERE id IS NOT NULL AND ${NOT_DELETED})`;
  const known = readRows(db, sql).map((row) => {
    const customerId = row.customer_id === null ? null : String(row.customer_id);
    return { ...readLocalRow(row), customerId };
  });
  return known.filter(
    ({ customerId, identity }) =>
      customerId === null || listValues(identity).some((value) => wanted.has(value)),
  );
}

/** Returns the column in which two rows are the same, if they are a possible duplicate. */
function findSameColumn(one: Identity, other: Identity): keyof Identity | undefined {
  for (const column of ["email_address", "reference_id"] as const)
    if (one[column] !== "" && one[column] === other[column]) return column;
  const [phone, otherPhone] = [one.phone_number, other.phone_number];
  if (Math.min(phone.length, otherPhone.length) < MIN_PHONE_DIGITS) return undefined;
  // One of two equal numbers can lack the country code. A family can have one telephone.
  const isSamePhone = phone.endsWith(otherPhone) || otherPhone.endsWith(phone);
  return isSamePhone && !isOtherPerson(one, other) ? "phone_number" : undefined;
}

/**
 * Compares a row with the others.
 * @param sent the rows that are sent before this one
 * @returns why the row waits, and the customer to link it to, if it is clear; undefined = send it
 */
function compareRow(
  row: PushRow,
  known: readonly KnownRow[],
  sent: ReadonlySet<number>,
  linkDuplicates: boolean,
): { id: string | null; reason: string } | undefined {
  const { inDoubt, identity } = row;
  const { reference_id } = identity;
  const others = known.filter(({ localId }) => localId !== row.localId);

  // A reference_id that exactly one customer and one unpushed row have identifies the customer.
  const withReference = others.filter(
    (other) => reference_id !== "" && other.identity.reference_id === reference_id,
  );
  const owner = findOnlyCustomer(withReference);
  const isSamePerson = withReference.some((other) => !isOtherPerson(other.identity, identity));
  if (owner !== null && isSamePerson && !inDoubt)
    return { id: owner, reason: `same reference_id as customer ${owner}` };

  // A pull can have saved the customer of a row in doubt as another row. That is not a duplicate.
  const ownReferences = [row.idempotencyKey, reference_id].filter((text) => text !== "");
  const matches = others.filter((other) => {
    const isOwn = inDoubt && ownReferences.includes(other.identity.reference_id);
    // Without opt-outs, the same person could be created as subscribed from a second row.
    const isCompared =
      other.customerId !== null || other.inDoubt || other.hasOptOut || sent.has(other.localId);
    return isCompared && !isOwn && findSameColumn(identity, other.identity) !== undefined;
  });
  const [match] = matches;
  if (match === undefined) return undefined;
  const customer = match.customerId === null ? "" : `, customer ${match.customerId}`;
  const column = findSameColumn(identity, match.identity);
  const reason = `same ${column} as row ${match.localId}${customer}`;
  if (!linkDuplicates) return { id: null, reason };
  const id = findOnlyCustomer(matches);
  const obstacle = findObstacle(row, id, others);
  if (obstacle === undefined) return { id, reason };
  return { id: null, reason: `${reason}; not linked: ${obstacle}` };
}

/** Returns the customer of rows; null if they have several, or if one is not in Square. */
function findOnlyCustomer(rows: readonly KnownRow[]): string | null {
  const [id = null, ...otherIds] = new Set(rows.map(({ customerId }) => customerId));
  return otherIds.length === 0 ? id : null;
}

/** @returns why a row cannot be linked to the customer that it matches */
function findObstacle(
  { inDoubt, identity: { reference_id } }: PushRow,
  id: string | null,
  others: readonly KnownRow[],
): string | undefined {
  if (inDoubt) return "it may have been sent already";
  if (id === null) return "it matches several rows";
  const ofCustomer = others.filter(({ customerId }) => customerId === id);
  const known = ofCustomer.map(({ identity }) => identity.reference_id);
  if (reference_id !== "" && known.some((one) => one !== "" && one !== reference_id))
    return "the customer has another reference_id";
  const unpushed = others.filter(({ customerId }) => customerId === null);
  const isWantedTwice = unpushed.some((other) =>
    ofCustomer.some((one) => findSameColumn(one.identity, other.identity) !== undefined),
  );
  return isWantedTwice ? "another row matches the customer too" : undefined;
}

// ---- What has happened ----

/** @returns the problem, if the table does not accept the change of an unpushed row */
function updateRow(db: Database, { localId }: PushRow, assignments: string, values: SqlValue[]) {
  const sql = `UPDATE OR ABORT customers SET ${assignments}
    WHERE local_id = ? AND ${UNPUSHED} RETURNING local_id`;
  try {
    const stored = readValue(db, sql, [...values, localId]);
    return stored === null ? "a trigger ignores it" : undefined;
  } catch (error) {
    return messageOf(error);
  }
}

/**
 * Stores why a row is held or refused. If the table does not accept that, it is only printed.
 * @param clearsKey Square's own answer proves that nothing was created. Clears the idempotency key,
 *   and the reference_id that is its copy
 */
export function storeReason(
  db: Database,
  row: PushRow,
  outcome: "held" | "refused",
  reason: string,
  clearsKey: boolean = false,
): PushRow {
  const clear = ", idempotency_key = NULL, reference_id = nullif(reference_id, idempotency_key)";
  updateRow(db, row, `push_error = ?${clearsKey ? clear : ""}`, [reason]);
  return { ...row, outcome, reason };
}

/** Completes a row whose customer was saved. If the table did not accept it, the row is held. */
export function completeRow(
  db: Database,
  row: PushRow,
  outcome: "created" | "linked",
  id: string,
  { changes, notSaved }: SaveResult,
): PushRow {
  const problem = notSaved.find((one) => one.id === id);
  if (problem === undefined)
    return { ...row, outcome, id, changes: changes.filter((change) => change.id === id) };
  const reason = `it is customer ${id} in Square, but the table does not accept that: ${problem.reason}`;
  return storeReason(db, row, "held", reason);
}
