import type { Database as SqlDatabase } from "sql.js";
import * as client from "./client.ts";
import * as database from "./database.ts";
import { EXIT, SyncError } from "./errors.ts";
import { type Customer, columnValue, FIELDS, toCustomer, toValues, type Value } from "./mapping.ts";
import { searchPages } from "./paging.ts";

/** A row that Square lacks, and what became of it. */
export interface PushRow {
  localId: string; // a text: SQLite counts further than a number can
  key: string;
  customer: Customer;
  inDoubt: boolean; // it was sent before, in this run or another, and nobody knows what came of it
  lookUp: string[]; // if in doubt: what it may go by in Square, its key and its own reference_id
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
       AND (?2 IS NULL OR coalesce(strftime('%Y-%m-%dT%H:%M:%fZ', created_at), ?2) >= ?2)
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
    const reference = String(customer.reference_id ?? key);
    const twin = twins?.find(localId, customer, inDoubt ? reference : undefined);
    if (twin) problems.push(`${twin} has the same email or phone`);
    const reason = problems.length > 0 ? problems.join("; ") : null;
    const isReady = reason === null;
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
    if (isReady) twins?.add(columns);
    // What several rows share is the name of none of them.
    const lookUp = inDoubt ? [key, reference].filter((name) => named.get(name) === localId) : [];
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
    const ready = batch.filter(({ outcome }) => outcome === "ready");
    await file.change((db) => {
      for (const row of batch) refresh(db, row, ready.includes(row));
    });
    const linked: Answer[] = [];
    const unsent: PushRow[] = [];
    for (const row of batch.filter(({ outcome }) => outcome !== "later")) {
      const customer = await findCreated(square, row.lookUp);
      if (customer) linked.push({ row, reply: { customer }, outcome: "linked" });
      else if (row.outcome === "ready") unsent.push(row);
    }
    if (linked.length > 0) yield linked;
    if (unsent.length > 0) yield* createRows(square, unsent, batchSize === 1);
  }
}

// Takes a row as it stands now. Another program may have changed it since, or taken it away, or put an
// older file in the place of this one, whose rows would get new keys.
function refresh(db: SqlDatabase, row: PushRow, isReady: boolean): void {
  const columns = readWaiting(db, row);
  const { customer, problems } = toCustomer(columns ?? {});
  row.customer = { reference_id: row.key, ...customer };
  if (columns === undefined) setLater(row, "it is no longer in the file as it was");
  else if (isReady && problems.length > 0) refuse(db, row, problems.join("; "));
  else if (isReady) row.outcome = "ready";
}

function readWaiting(db: SqlDatabase, { key }: PushRow): database.Row | undefined {
  const sql = "SELECT * FROM customers WHERE idempotency_key = ? AND id IS NULL";
  return database.readRows(db, sql, [key])[0];
}

async function* createRows(
  square: client.Square,
  rows: PushRow[],
  oneByOne: boolean,
): AsyncGenerator<Answer[]> {
  const created: Record<string, client.Created> = {};
  const customers = Object.fromEntries(rows.map(({ key, customer }) => [key, customer]));
  const { unanswered } = square;
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
  if (square.unanswered > unanswered) for (const row of rows) row.inDoubt = true;
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
async function findCreated(square: client.Square, names: string[]): Promise<Customer | undefined> {
  const found = new Map<unknown, Customer>();
  for (const exact of new Set(names))
    for await (const { customers } of searchPages(square, { reference_id: { exact } }))
      for (const one of customers) if (one.reference_id === exact) found.set(one.id, one);
  const [first, ...others] = found.values();
  return others.length === 0 ? first : undefined;
}

/** Writes down what became of the rows of one reply, in the file and in the rows. */
export function settleRows(db: SqlDatabase, answers: Answer[], now: string): void {
  const customers = answers.flatMap(({ row, reply, outcome }) => {
    if ("customer" in reply) return settleCustomer(db, row, reply.customer, outcome);
    settleRefusal(db, row, reply.errors);
    return [];
  });
  database.saveCustomers(db, customers, now);
}

function settleCustomer(
  db: SqlDatabase,
  row: PushRow,
  customer: Customer,
  outcome: Answer["outcome"],
): Value[][] {
  const id = String(customer.id);
  const profile = toValues(customer);
  const columns = readWaiting(db, row);
  // A pull can have saved this profile as a row of its own, before anybody could tell whose it was.
  // That row goes, unless it is yours (source) or was sent itself (key). What it says is kept: it
  // can be newer than this answer.
  const [pulled] = database.readRows(
    db,
    `DELETE FROM customers WHERE id = ? AND idempotency_key IS NULL AND source IS NULL AND ? RETURNING *`,
    [id, columns ? 1 : 0],
  );
  const find = "SELECT CAST(local_id AS TEXT) AS local_id FROM customers WHERE id = ?";
  const [other] = database.readRows(db, find, [id]);
  if (other && other.local_id !== row.localId) {
    setAside(db, row, "held", `it is customer ${id}, as is row ${other.local_id}`);
    return [];
  }
  database.linkRow(db, "idempotency_key", row.key, id);
  const theirs = toCustomer(
    Object.fromEntries(FIELDS.map(({ column }, n) => [column, profile[n]])),
  );
  const sent = outcome === "created" ? row.customer : theirs.customer;
  const lost = columns ? toLost(columns, sent, profile) : "";
  const reason = lost ? `Square's ${lost} replaced what it said` : null;
  Object.assign(row, { outcome, id, reason });
  return pulled ? [FIELDS.map(({ column }) => pulled[column] as Value), profile] : [profile];
}

// Which columns of a row say what was not sent: it was changed since, or Square is not to be told.
function toLost(columns: database.Row, sent: Customer, profile: Value[]): string {
  const [mine = [], theirs = []] = [toCustomer(columns).customer, sent].map(toValues);
  const isLost = (n: number) => mine[n] !== null && mine[n] !== theirs[n];
  const lost = FIELDS.flatMap(({ column }, n) => (isLost(n) ? column : []));
  const flag = "email_unsubscribed";
  if (columns[flag] === 1 && columnValue(profile, flag) === 0) lost.push(flag);
  return lost.join(", ");
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
    refuse(db, row, reason, ` ${details}`.trimEnd());
  }
}

function refuse(db: SqlDatabase, row: PushRow, reason: string, details = ""): void {
  setAside(db, row, "refused", reason, details);
  // A row in doubt keeps its key: that this attempt was refused tells nothing of another.
  const sql = "UPDATE customers SET idempotency_key = NULL WHERE idempotency_key = ?";
  if (!row.inDoubt) db.run(sql, [row.key]);
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

// Who has which e-mail address and phone number: Square does not tell duplicates apart.
function readTwins(db: SqlDatabase, rows: database.Row[]) {
  const known = new Map<string, { name: string; row: database.Row }[]>();
  for (const name of rows.flatMap(toNames)) known.set(toPlace(name), []);
  const add = (row: database.Row) => {
    for (const name of toNames(row)) known.get(toPlace(name))?.push({ name, row });
  };
  // Of a row in doubt the reference is given: who has the same one may be that row, created and pulled.
  const find = (localId: string, customer: Customer, reference?: string) => {
    for (const name of toNames(customer))
      for (const { name: other, row } of known.get(toPlace(name)) ?? [])
        if (String(row.local_id) !== localId && row.reference_id !== reference)
          if (name.endsWith(other) || other.endsWith(name))
            return row.id === null ? `row ${row.local_id}` : `customer ${row.id}`;
    return undefined;
  };
  // A row at a time: the whole directory may be a million.
  const all = db.prepare(
    `SELECT CAST(local_id AS TEXT) AS local_id, id, reference_id, email_address, phone_number
     FROM customers WHERE id IS NOT NULL OR idempotency_key IS NOT NULL`,
  );
  while (known.size > 0 && all.step()) add(all.getAsObject());
  all.free();
  return { add, find };
}

function toNames({ email_address, phone_number }: database.Row | Customer): string[] {
  const email = String(email_address ?? "").trim();
  const digits = String(phone_number ?? "").replace(/\D/g, "");
  const number = digits.replace(/^0+/, "");
  return [email.toLowerCase(), number.length < 9 ? "" : number].filter((name) => name !== "");
}

// The country code of a number may be missing on either side, so one that is the end of the other is
// the same: they meet where their last nine digits are.
function toPlace(name: string): string {
  return /^\d+$/.test(name) ? name.slice(-9) : name;
}
