/**
 * Selects unpushed rows and decides what happens to each: it is sent, linked, refused or held.
 *
 * A row is **in doubt** when it may have been sent and its outcome is unknown, for example because
 * the reply was lost. It has an idempotency key and no id. It may exist in Square, so it is looked
 * up before it is sent again.
 */
import type { Database } from "sql.js";
import type { Square } from "square";
import { buildIdentity, cleanValue, type Identity, isOtherPerson } from "./checks.ts";
import { NOT_DELETED, type RowChange, saveCustomers, UNPUSHED } from "./customers.ts";
import { requireCompletePull } from "./deleted.ts";
import { formatNumber, type RunContext } from "./internal/cli.ts";
import { messageOf, SyncError } from "./internal/errors.ts";
import { type Row, readRows, readValue } from "./internal/sql.ts";
import { buildRow, type CustomerRow, FIELDS, hasOptOut, type SquareField } from "./mapping.ts";

const HOUR_MS = 3_600_000;

// A push warns if the last complete pull is older than this.
const OLD_PULL_MS = 24 * HOUR_MS;

/** Which unpushed rows to push, and what to do with possible duplicates. */
export interface PushOptions {
  /** Only rows with this `source`. */
  source: string | undefined;
  /** Only rows created since this time, as RFC 3339; null = all. */
  createdSince: string | null;
  /** At most this many rows. */
  limit: number | undefined;
  /** Rows in one request. */
  batchSize: number;
  /** Send possible duplicates too. */
  allowDuplicates: boolean;
  /** Link a row to the one customer that it matches. */
  linkDuplicates: boolean;
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

/** A row that was selected, and what happened to it. */
export interface PushRow {
  localId: number;
  idempotencyKey: string;
  /** The data to send. */
  customer: NewCustomer;
  /** The row may have been sent, in this run or an earlier one, and the outcome is unknown. */
  inDoubt: boolean;
  hasOptOut: boolean;
  outcome: Outcome;
  /** Square's customer id, when it is known. */
  id: string | null;
  /** Why the row is refused or held. */
  reason: string | null;
}

/** The rows of a push, and the changes of the file that --verbose lists. */
export interface PushResult {
  rows: PushRow[];
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
 * the last complete pull is old.
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
  // The file does not have the customers that were created in Square since the last complete pull.
  const sql = `SELECT max(started_at) FROM sync_runs WHERE script = 'pull-created' AND complete = 1`;
  const age = context.startedAt - Date.parse(String(readValue(db, sql)));
  if (age > OLD_PULL_MS)
    context.warn(
      `the last complete pull-created began ${formatNumber(Math.floor(age / HOUR_MS), "hour")} ago: customers created in Square since then can be created again`,
    );
}

/**
 * Selects the next unpushed rows. A row with a reason or an idempotency key comes late, so that the
 * same bad rows do not use up --limit in every run.
 * @param taken the local_id of the rows that this run has taken already
 */
export function selectRows(
  db: Database,
  { source, createdSince, limit = Number.POSITIVE_INFINITY, batchSize }: PushOptions,
  taken: ReadonlySet<number>,
): SelectedRow[] {
  // A row whose created_at is not a time is selected, because it can be new.
  const rows = readRows(
    db,
    `SELECT local_id, idempotency_key, reference_id FROM customers
     WHERE ${UNPUSHED} AND (?1 IS NULL OR source = ?1)
       AND (?2 IS NULL OR coalesce(strftime('%Y-%m-%dT%H:%M:%fZ', created_at), ?2) >= ?2)
     ORDER BY concat(push_error, idempotency_key) <> '', local_id`,
    [source ?? null, createdSince],
  );
  return rows
    .filter(({ local_id }) => !taken.has(Number(local_id)))
    .slice(0, Math.min(batchSize, limit - taken.size))
    .map((row) => {
      const key = readKey(row);
      const reference = buildIdentity(row).reference_id;
      // A reference_id that another row has too identifies neither of them.
      const sql = "SELECT count(*) FROM customers WHERE reference_id = ?";
      const isShared = key !== "" && Number(readValue(db, sql, [row.reference_id ?? ""])) > 1;
      // The row can have got another reference_id after it was sent with its key.
      const references = isShared || reference === "" ? [key] : [key, reference];
      const localId = Number(row.local_id);
      return { localId, references: key === "" ? [] : [...new Set(references)] };
    });
}

/**
 * Decides what happens to selected rows, as they are in the file now, and stores that: the id of a
 * row that was found in Square, a reason, or an idempotency key. A row that is not in the result
 * waits for the next batch: another script has given it a key meanwhile, so it must be looked up.
 * @param found the customers that Square has for each row in doubt; undefined = look up nothing,
 *   for a dry run
 * @param countries the country codes that the SDK knows
 */
export function prepareRows(
  db: Database,
  context: RunContext,
  selected: readonly SelectedRow[],
  found: ReadonlyMap<number, Square.Customer[]> | undefined,
  options: PushOptions,
  countries: ReadonlySet<string>,
): PushResult {
  const sql = `SELECT * FROM customers WHERE local_id = ? AND ${UNPUSHED}`;
  const current = selected
    .flatMap(({ localId }) => readRows(db, sql, [localId]))
    .filter((row) => readKey(row) === "" || !found || found.has(Number(row.local_id)));
  const known = readKnownRows(db, current);
  const sent = new Set<number>();
  const changes: RowChange[] = [];

  const rows = current.map((stored): PushRow => {
    const { customer, problems } = buildCustomer(stored, countries);
    const row = createPushRow(stored, customer);
    const { localId } = row;
    const identity = buildIdentity(stored);
    const own = findOwnCustomer(found?.get(localId) ?? [], row.idempotencyKey, identity);
    if (own !== undefined) {
      const created = new Map([[own.id, row.idempotencyKey]]);
      const saved = saveCustomers(db, [own], context.startedAt, created);
      changes.push(...saved.changes);
      const problem = saved.notSaved[0]?.reason;
      if (problem === undefined) return { ...row, outcome: "linked", id: own.id };
      return storeReason(db, row, "held", describeUnsaved(own.id, problem));
    }
    if (problems.length > 0) return storeReason(db, row, "refused", problems.join("; "));
    if (!options.allowDuplicates) {
      const { id = null, reason } = compareRow(row, identity, known, sent, options);
      if (id !== null) return { ...row, outcome: "link", id, reason };
      if (reason !== null) return storeReason(db, row, "held", reason);
    }
    if (row.hasOptOut)
      return storeReason(
        db,
        row,
        "held",
        "email_unsubscribed is set, and Square would create the customer as subscribed",
      );
    // A row without a reference_id is sent with its key in that field, because search finds a
    // customer by reference_id.
    const referenceId = customer.referenceId ?? row.idempotencyKey;
    const problem = storeKey(db, row, referenceId);
    if (problem !== undefined)
      return storeReason(db, row, "refused", `the table does not accept it: ${problem}`);
    sent.add(localId);
    const outcome = row.inDoubt && found === undefined ? "look up" : "create";
    return { ...row, customer: { ...customer, referenceId }, outcome };
  });
  return { rows, changes };
}

function createPushRow(stored: Row, customer: NewCustomer): PushRow {
  const storedKey = readKey(stored);
  return {
    localId: Number(stored.local_id),
    idempotencyKey: storedKey || crypto.randomUUID(),
    customer,
    // The file does not record the request itself. If the script was killed before it, the row has
    // a key and was never sent.
    inDoubt: storedKey !== "",
    hasOptOut: hasOptOut(stored),
    outcome: "create",
    id: null,
    reason: null,
  };
}

function readKey(row: Row): string {
  return String(row.idempotency_key ?? "").trim();
}

/**
 * Finds the customer that a row in doubt became, among those that Square has under its references.
 * If that is unclear, the row is sent again with its key: then Square itself knows the customer.
 */
function findOwnCustomer(
  found: readonly Square.Customer[],
  idempotencyKey: string,
  identity: Identity,
): CustomerRow | undefined {
  const references = [idempotencyKey, identity.reference_id];
  // Square's search ignores the case of a reference_id.
  const possible = found
    .filter(({ referenceId = "" }) => references.includes(String(referenceId)))
    .map(buildRow)
    .filter(
      (customer) =>
        customer.reference_id === idempotencyKey ||
        !isOtherPerson(buildIdentity(customer), identity),
    );
  return possible.length === 1 ? possible[0] : undefined;
}

/**
 * Stores the idempotency key of a row before it is sent. If the key existed only in memory and the
 * script were killed after the request, the next run would create the customer a second time.
 * @returns the problem, if the table does not keep it
 */
function storeKey(db: Database, row: PushRow, referenceId: string): string | undefined {
  try {
    const stored = readValue(
      db,
      `UPDATE OR ABORT customers SET idempotency_key = ?, push_error = NULL,
         reference_id = iif(trim(coalesce(reference_id, '')) = '', ?, reference_id)
       WHERE local_id = ? RETURNING local_id`,
      [row.idempotencyKey, referenceId, row.localId],
    );
    return stored === null ? "a trigger ignores it" : undefined;
  } catch (error) {
    return messageOf(error);
  }
}

// ---- The data to send ----

/** The data of a new customer, for CreateCustomer and BulkCreateCustomers. */
export type NewCustomer = Omit<Square.CreateCustomerRequest, "idempotencyKey">;

/**
 * Builds the data of a new customer from a row, and lists the values that must not be sent. A blank
 * column is left out, because Square accepts a missing field but not an empty one.
 * @param countries the country codes that the SDK knows
 */
export function buildCustomer(
  row: Row,
  countries: ReadonlySet<string>,
): { customer: NewCustomer; problems: string[] } {
  const customer: NewCustomer = {};
  const problems: string[] = [];
  for (const { column, square, sent } of FIELDS) {
    if (sent === undefined) continue;
    const { text, problem } = cleanValue(row[column], sent, countries);
    if (problem !== undefined) problems.push(`${column} ${problem}`);
    else if (text !== "") setField(customer, square, text);
  }
  return { customer, problems };
}

function setField(customer: NewCustomer, field: SquareField, text: string): void {
  const [first = "", second] = field.split(".");
  if (second === undefined) Object.assign(customer, { [first]: text });
  else if (first === "address") customer.address = { ...customer.address, [second]: text };
  else customer.taxIds = { ...customer.taxIds, [second]: text }; // the only other object
}

// ---- Possible duplicates ----

/** A row of the file that a row can be compared with. */
interface KnownRow {
  localId: number;
  /** The customer of the row. A merged row counts as the customer that it was merged into. */
  customerId: string | null;
  /** The row was sent, and may be in Square. */
  inDoubt: boolean;
  /** Without this, the same person could be created as subscribed from a second row. */
  hasOptOut: boolean;
  identity: Identity;
}

/** Lists the values by which equal rows are found. Equal phone numbers have the same last digits. */
function listValues({ email_address, phone_number, reference_id }: Identity): string[] {
  return [email_address, phone_number.slice(-9), reference_id].filter((value) => value !== "");
}

/** Reads the rows of the file that have a value of one of the given rows, and all unpushed rows. */
function readKnownRows(db: Database, rows: readonly Row[]): KnownRow[] {
  const wanted = new Set(rows.flatMap((row) => listValues(buildIdentity(row))));
  // Deleted customers are left out, because the same person may come back. A merged customer is
  // still in Square, as a part of another one.
  const stored = readRows(
    db,
    `SELECT local_id, iif(${NOT_DELETED}, id, merged_into) AS customer_id, idempotency_key,
       given_name, family_name, company_name, email_address, phone_number, reference_id,
       email_unsubscribed
     FROM customers WHERE ${NOT_DELETED}
       OR merged_into IN (SELECT id FROM customers WHERE id IS NOT NULL AND ${NOT_DELETED})`,
  );
  const known = stored.map((row) => ({
    localId: Number(row.local_id),
    customerId: row.customer_id === null ? null : String(row.customer_id),
    inDoubt: readKey(row) !== "",
    hasOptOut: hasOptOut(row),
    identity: buildIdentity(row),
  }));
  return known.filter(
    ({ customerId, identity }) =>
      customerId === null || listValues(identity).some((value) => wanted.has(value)),
  );
}

// Shorter numbers are local ones, which different customers can have.
const MIN_PHONE_DIGITS = 9;

/**
 * True if two phone numbers are the same. One can lack the country code, so one ends with the other.
 */
function isSamePhone(one: string, other: string): boolean {
  const isLongEnough = Math.min(one.length, other.length) >= MIN_PHONE_DIGITS;
  return isLongEnough && (one.endsWith(other) || other.endsWith(one));
}

/** Returns the column in which two rows are the same, if they are a possible duplicate. */
function findSameColumn(one: Identity, other: Identity): keyof Identity | undefined {
  const isEqual = (column: keyof Identity) => one[column] !== "" && one[column] === other[column];
  if (isEqual("email_address")) return "email_address";
  if (isEqual("reference_id")) return "reference_id";
  const isFamily = isOtherPerson(one, other); // with one telephone
  return isSamePhone(one.phone_number, other.phone_number) && !isFamily
    ? "phone_number"
    : undefined;
}

/**
 * Compares a row with the others.
 * @param sent the rows that are sent before this one
 * @returns the customer to link it to, and what is the same; or only why to hold it; or neither
 */
function compareRow(
  row: PushRow,
  identity: Identity,
  known: readonly KnownRow[],
  sent: ReadonlySet<number>,
  { linkDuplicates }: PushOptions,
): { id?: string; reason: string | null } {
  const { localId, idempotencyKey, inDoubt } = row;
  const { reference_id } = identity;
  const others = known.filter((other) => other.localId !== localId);

  // Rule of the reference_id: exactly one customer and one unpushed row have it.
  const withReference = others.filter(
    (other) => reference_id !== "" && other.identity.reference_id === reference_id,
  );
  const owners = new Set(withReference.map(({ customerId }) => customerId));
  const [owner] = owners;
  const isOther = withReference.every((other) => isOtherPerson(other.identity, identity));
  if (!inDoubt && owners.size === 1 && owner && !isOther)
    return { id: owner, reason: `same reference_id as customer ${owner}` };

  // A pull can have saved the customer of a row in doubt as another row. That is not a duplicate.
  const isOwnCustomer = ({ identity: other }: KnownRow) =>
    inDoubt && [reference_id, idempotencyKey].includes(other.reference_id);
  const isCompared = (other: KnownRow) =>
    other.customerId !== null || other.inDoubt || other.hasOptOut || sent.has(other.localId);
  const matches = others.filter(
    (other) =>
      isCompared(other) &&
      findSameColumn(identity, other.identity) !== undefined &&
      !isOwnCustomer(other),
  );
  const [match] = matches;
  if (match === undefined) return { reason: null };
  const customer = match.customerId === null ? "" : `, customer ${match.customerId}`;
  const column = findSameColumn(identity, match.identity);
  const reason = `same ${column} as row ${match.localId}${customer}`;
  if (!linkDuplicates) return { reason };

  const customers = new Set(matches.map(({ customerId }) => customerId));
  const [id = null] = customers;
  const ofCustomer = others.filter(({ customerId }) => id !== null && customerId === id);
  const references = ofCustomer.map((other) => other.identity.reference_id);
  const isWantedTwice = others.some(
    (other) =>
      other.customerId === null &&
      ofCustomer.some((one) => findSameColumn(one.identity, other.identity) !== undefined),
  );
  let obstacle: string | undefined;
  if (inDoubt) obstacle = "it may have been sent already";
  else if (customers.size > 1 || id === null) obstacle = "it matches several rows";
  else if (
    reference_id !== "" &&
    references.some((other) => other !== "" && other !== reference_id)
  )
    obstacle = "the customer has another reference_id";
  else if (isWantedTwice) obstacle = "another row matches the customer too";
  return obstacle === undefined && id !== null
    ? { id, reason }
    : { reason: `${reason}; not linked: ${obstacle}` };
}

// ---- Reasons ----

/**
 * Stores why a row is held or refused.
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
  const clear = `, idempotency_key = NULL, reference_id = nullif(reference_id, idempotency_key)`;
  const sql = `UPDATE OR ABORT customers SET push_error = ?${clearsKey ? clear : ""}
    WHERE local_id = ? AND ${UNPUSHED}`;
  try {
    db.run(sql, [reason, row.localId]);
  } catch {
    // A trigger of the table does not accept the write. The reason is printed anyway.
  }
  return { ...row, outcome, reason };
}

/** The reason of a row whose customer exists in Square, but could not be saved in the file. */
export function describeUnsaved(id: string, problem: string): string {
  return `it is customer ${id} in Square, but the table does not accept that: ${problem}`;
}
