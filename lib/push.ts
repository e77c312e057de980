import type { Database as SqlDatabase } from "sql.js";
import * as client from "./client.ts";
import * as database from "./database.ts";
import { EXIT, SyncError } from "./errors.ts";
import { type Customer, FIELDS, toCustomer, toValues, type Value } from "./mapping.ts";
import { searchPages } from "./paging.ts";

/** A row that Square lacks, and what became of it. */
export interface PushRow {
  localId: string; // a text: SQLite counts further than a number can
  key: string;
  customer: Customer;
  inDoubt: boolean; // it was sent before, in this run or another, and nobody knows what came of it
  lookUp: string | undefined; // its reference_id, if in doubt and no other row goes by that
  outcome: "ready" | "created" | "linked" | "refused" | "held" | "later";
  id: string | null;
  reason: string | null;
}

/** What Square said of a row, and what the row is then: created now, or linked to what it had become. */
export type Answer = { row: PushRow; reply: client.Created; outcome: "created" | "linked" };

/** Which of the rows that Square lacks are meant. Each word narrows. */
export interface Selection {
  source: string | undefined;
  createdSince: string | null;
  limit: number | undefined;
  allowDuplicates: boolean;
}

/**
 * Selects the rows that Square lacks, checks them, and gives each good one its key and, where it has
 * none, a reference_id that Square can be asked for. The others get the reason why they are not sent.
 */
export function prepareRows(
  db: SqlDatabase,
  { source, createdSince, limit, allowDuplicates }: Selection,
  environment: string,
): PushRow[] {
  // Rows that failed before come last: else --limit could be used up by them for ever.
  const selected = database.readRows(
    db,
    `SELECT *, CAST(local_id AS TEXT) AS local_id FROM customers WHERE id IS NULL AND (?1 IS NULL OR source = ?1)
       AND (?2 IS NULL OR strftime('%Y-%m-%dT%H:%M:%fZ', created_at) >= ?2)
     ORDER BY push_error IS NOT NULL, customers.local_id LIMIT ?3`,
    [source ?? null, createdSince, limit ?? -1],
  );
  const twins = allowDuplicates ? undefined : readTwins(db, selected);
  const named = database.readUnpushed(db);
  const rows = selected.map((columns): PushRow => {
    const { idempotency_key = null, reference_id = null } = columns;
    const localId = String(columns.local_id);
    const inDoubt = idempotency_key !== null;
    const key = String(idempotency_key ?? crypto.randomUUID());
    const { customer, problems } = toCustomer(columns);
    const twin = twins?.find(customer);
    if (twin) problems.push(`${twin} has the same email or phone`);
    const reason = problems.length > 0 ? problems.join("; ") : null;
    const isReady = reason === null;
    const reference = String(customer.reference_id ?? key);
    if (isReady) customer.reference_id = reference;
    db.run(
      `UPDATE customers SET idempotency_key = ?, reference_id = ?, push_error = coalesce(?, push_error)
       WHERE local_id = ?`,
      [isReady ? key : idempotency_key, isReady ? reference : reference_id, reason, localId],
    );
    // What is sent without its key on disk is sent again by every run.
    if (isReady && db.getRowsModified() !== 1)
      throw new SyncError(
        `Cannot give row ${localId} its key: the table customers is not as init-db made it`,
        EXIT.failed,
        "look for a trigger, or a local_id that is no PRIMARY KEY; nothing was sent",
      );
    if (isReady || inDoubt) twins?.add(customer, `row ${localId}`);
    const lookUp = inDoubt && named.get(reference) === localId ? reference : undefined;
    const outcome = isReady ? "ready" : twin && problems.length === 1 ? "held" : "refused";
    return { localId, key, customer, inDoubt, lookUp, outcome, id: null, reason };
  });
  if (rows.some(isDue)) database.markEnvironment(db, environment);
  return rows;
}

// A row in doubt may be in Square already: it is looked up, whatever it looks like now.
function isDue({ outcome, inDoubt }: PushRow): boolean {
  return outcome === "ready" || inDoubt;
}

/**
 * Sends rows and yields after each reply: whoever loops over it saves what came before the next
 * request is made. A key can be sent twice: Square answers with the profile that it made before.
 * @param batchSize 1 = CreateCustomer, more = BulkCreateCustomers
 */
export async function* pushRows(
  file: database.Database,
  square: client.Square,
  rows: PushRow[],
  batchSize: number,
): AsyncGenerator<Answer[]> {
  const due = rows.filter(isDue);
  for (let at = 0; at < due.length; at += batchSize) {
    const batch = due.slice(at, at + batchSize);
    const waiting = await file.change((db) => keepWaiting(db, batch));
    for (const row of batch)
      if (!waiting.includes(row)) setLater(row, "it is no longer in the file as it was");
    const linked: Answer[] = [];
    const unsent: PushRow[] = [];
    for (const row of waiting) {
      const customer = row.lookUp ? await findCreated(square, row.lookUp) : undefined;
      if (customer) linked.push({ row, reply: { customer }, outcome: "linked" });
      else if (row.outcome === "ready") unsent.push(row);
    }
    if (linked.length > 0) yield linked;
    if (unsent.length > 0) yield* createRows(square, unsent, batchSize === 1);
  }
}

// The rows whose key is still in the file, and that still have no id: another program may have taken
// them away, or put an older file in the place of this one, and its rows would get new keys.
function keepWaiting(db: SqlDatabase, rows: PushRow[]): PushRow[] {
  const sql = "SELECT 1 FROM customers WHERE idempotency_key = ? AND id IS NULL";
  return rows.filter(({ key }) => database.readRows(db, sql, [key]).length > 0);
}

async function* createRows(
  square: client.Square,
  rows: PushRow[],
  oneByOne: boolean,
): AsyncGenerator<Answer[]> {
  const created: Record<string, client.Created> = {};
  const customers = Object.fromEntries(rows.map(({ key, customer }) => [key, customer]));
  const { retries } = square.sent;
  let refusals: client.SquareProblem[] = [];
  try {
    if (!oneByOne) Object.assign(created, await square.bulkCreateCustomers(customers));
    else
      for (const { key, customer } of rows)
        created[key] = await square.createCustomer({ ...customer, idempotency_key: key });
  } catch (error) {
    const isRefusal = error instanceof client.RefusedError && error.exitCode === EXIT.failed;
    if (isRefusal) refusals = error.errors;
    // A refusal that is not in Square's words is a proxy's, and tells nothing of the rows.
    if (refusals.length === 0) throw error;
  }
  // An attempt that got no answer may have created them, whatever the next one was told.
  if (square.sent.retries > retries) for (const row of rows) row.inDoubt = true;
  const half = rows.length >> 1;
  if (refusals.length > 0 && half > 0) {
    // One row can make Square refuse the whole call. Its halves show which one it is.
    yield* createRows(square, rows.slice(0, half), oneByOne);
    yield* createRows(square, rows.slice(half), oneByOne);
    return;
  }
  const toReply = ({ key }: PushRow) => created[key] ?? { errors: refusals };
  yield rows.map((row) => ({ row, reply: toReply(row), outcome: "created" }));
  const errors = Object.values(created).flatMap((one) => ("errors" in one ? one.errors : []));
  if (client.has(errors, "AUTHENTICATION_ERROR")) throw new client.RefusedError(401, errors);
}

// The one profile that a row in doubt became. Square's filter does not look at case, and a
// reference_id is no key there: two profiles with the same one leave the question open.
async function findCreated(square: client.Square, exact: string): Promise<Customer | undefined> {
  const found = new Map<unknown, Customer>();
  for await (const { customers } of searchPages(square, { reference_id: { exact } }))
    for (const one of customers) if (one.reference_id === exact) found.set(one.id, one);
  const [first, ...others] = found.values();
  return others.length === 0 ? first : undefined;
}

/** Writes down what became of the rows of one reply, in the file and in the rows. */
export function settleRows(db: SqlDatabase, answers: Answer[], now: string): void {
  const customers: Value[][] = [];
  for (const { row, reply, outcome } of answers) {
    if ("errors" in reply) settleRefusal(db, row, reply.errors);
    else {
      const id = String(reply.customer.id);
      // A pull can have saved this profile as a row of its own, before anybody could tell whose it was.
      // That row goes, unless it is yours (source) or was sent itself (key). What it says is kept: it
      // can be newer than this answer.
      const [pulled] = database.readRows(
        db,
        `DELETE FROM customers WHERE id = ? AND idempotency_key IS NULL AND source IS NULL
         AND EXISTS (SELECT 1 FROM customers WHERE idempotency_key = ? AND id IS NULL) RETURNING *`,
        [id, row.key],
      );
      if (pulled) customers.push(FIELDS.map(({ column }) => pulled[column] as Value));
      const find = "SELECT CAST(local_id AS TEXT) AS local_id FROM customers WHERE id = ?";
      const [other] = database.readRows(db, find, [id]);
      if (other && other.local_id !== row.localId)
        setAside(db, row, "held", `it is customer ${id}, as is row ${other.local_id}`);
      else {
        database.linkRow(db, "idempotency_key", row.key, id);
        customers.push(toValues(reply.customer));
        Object.assign(row, { outcome, id, reason: null });
      }
    }
  }
  database.saveCustomers(db, customers, now);
}

function settleRefusal(db: SqlDatabase, row: PushRow, errors: client.SquareProblem[]): void {
  const reason = `Square says ${client.toWords(400, errors)}`;
  const codes = errors.map(({ code }) => code);
  const passes = client.has(errors, "API_ERROR", "RATE_LIMIT_ERROR", "AUTHENTICATION_ERROR");
  // About Square, the token, or an attempt that still runs, and not about the row: it keeps its key.
  if (passes || codes.includes("CONFLICT")) setLater(row, reason);
  // Square knows the key with other content, so a profile was made before the row was edited. A new
  // key would make a second one: the row waits until the search shows the first.
  else if (codes.includes("IDEMPOTENCY_KEY_REUSED"))
    setAside(db, row, "held", `${reason}: it was sent before it was edited`);
  else {
    const details = errors.map(({ detail }) => detail ?? "").join(" ");
    setAside(db, row, "refused", reason, ` ${details}`.trimEnd());
    // A row in doubt keeps its key: that this attempt was refused tells nothing of another.
    const sql = "UPDATE customers SET idempotency_key = NULL WHERE idempotency_key = ?";
    if (!row.inDoubt) db.run(sql, [row.key]);
  }
}

// Square's details can quote what a customer said: the row keeps them, but they are not printed.
function setAside(
  db: SqlDatabase,
  row: PushRow,
  outcome: "refused" | "held",
  reason: string,
  details = "",
): void {
  const sql = "UPDATE customers SET push_error = ? WHERE idempotency_key = ?";
  db.run(sql, [reason + details, row.key]);
  Object.assign(row, { outcome, reason });
}

/** What `--json` says of a row. One that is still ready was so in a dry run. */
export function toReport({ localId, id, outcome, reason, inDoubt }: PushRow) {
  const would = inDoubt ? "would-look-up" : "would-create";
  return { local_id: Number(localId), outcome: outcome === "ready" ? would : outcome, id, reason };
}

function setLater(row: PushRow, reason: string): void {
  Object.assign(row, { outcome: "later", reason });
}

// Who has which e-mail address and phone number: Square does not tell duplicates apart. The country
// code of a number may be missing on either side, so one that is the end of the other is the same.
function readTwins(db: SqlDatabase, rows: database.Row[]) {
  const owners = new Map<string, { name: string; owner: string }[]>();
  for (const name of rows.flatMap(toNames)) owners.set(name.slice(-9), []);
  const add = (row: database.Row | Customer, owner: string) => {
    for (const name of toNames(row)) owners.get(name.slice(-9))?.push({ name, owner });
  };
  const isEnd = (one: string, other: string) => one.endsWith(other) && /^\d+$/.test(one);
  const find = (row: Customer) => {
    for (const name of toNames(row))
      for (const { name: other, owner } of owners.get(name.slice(-9)) ?? [])
        if (name === other || isEnd(name, other) || isEnd(other, name)) return owner;
    return undefined;
  };
  // A row at a time: the whole directory may be a million.
  const known = db.prepare("SELECT id, email_address, phone_number FROM customers WHERE id <> ''");
  while (owners.size > 0 && known.step()) {
    const row = known.getAsObject();
    add(row, `customer ${row.id}`);
  }
  known.free();
  return { add, find };
}

function toNames({ email_address, phone_number }: database.Row | Customer): string[] {
  const email = String(email_address ?? "").trim();
  const digits = String(phone_number ?? "").replace(/\D/g, "");
  const number = digits.replace(/^0+/, "");
  return [email.toLowerCase(), number.length < 9 ? "" : number].filter((name) => name !== "");
}
