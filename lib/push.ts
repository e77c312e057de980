import type { Database as SqlDatabase } from "sql.js";
import * as client from "./client.ts";
import * as database from "./database.ts";
import { EXIT, SyncError } from "./errors.ts";
import { type Customer, FIELDS, type Row, toCustomer, toRow } from "./mapping.ts";
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
type Answer = { row: PushRow; reply: client.Created; outcome: "created" | "linked" };

/** Which of the rows that Square lacks are meant. Each word narrows. */
interface Selection {
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
  database.markEnvironment(db, environment);
  // Rows that failed before come last: else --limit could be used up by them for ever. A time that
  // nobody can read may be a new one.
  const selected = database.readRows(
    db,
    `SELECT *, CAST(local_id AS TEXT) AS local_id FROM customers
     WHERE id IS NULL AND (?1 IS NULL OR source = ?1)
       AND (?2 IS NULL OR coalesce(strftime('%Y-%m-%dT%H:%M:%fZ', created_at), ?2) >= ?2)
     ORDER BY push_error IS NOT NULL, customers.local_id LIMIT ?3`,
    [source ?? null, createdSince, limit ?? -1],
  );
  const twins = allowDuplicates ? undefined : readTwins(db, selected);
  const unpushed = database.readUnpushed(db);
  return selected.map((columns) => {
    const localId = String(columns.local_id);
    const inDoubt = Boolean(columns.idempotency_key);
    const key = String(columns.idempotency_key || crypto.randomUUID());
    const { customer, problems } = toCustomer(columns);
    const reference = String(customer.reference_id ?? key);
    const twin = twins?.find(localId, customer, inDoubt ? reference : undefined);
    const outcome = problems.length > 0 ? "refused" : twin ? "held" : "ready";
    if (twin) problems.push(`${twin} has the same email or phone`);
    const reason = problems.join("; ") || null;
    // A row with a reason keeps what it had; a good one gets its key and its reference_id.
    db.run(
      `UPDATE customers SET push_error = ?1,
         idempotency_key = iif(?1 IS NULL, ?2, idempotency_key),
         reference_id = iif(?1 IS NULL, ?3, reference_id) WHERE local_id = ?4`,
      [reason, key, reference, localId],
    );
    // What is sent without its key on disk is sent again by every run.
    if (db.getRowsModified() !== 1)
      throw new SyncError(
        `Cannot give row ${localId} its key: the table customers is not as init-db made it`,
        EXIT.failed,
        "look for a trigger, or a local_id that is no PRIMARY KEY; nothing was sent",
      );
    if (outcome === "ready") twins?.add(columns);
    // What several rows share is the name of none of them.
    const lookUp = inDoubt ? [key, reference].filter((name) => unpushed.get(name) === localId) : [];
    return { localId, key, customer, inDoubt, lookUp, outcome, id: null, reason };
  });
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
  // A row in doubt may be in Square already: it is looked up, whatever it looks like now.
  const due = rows.filter(({ outcome, inDoubt }) => outcome === "ready" || inDoubt);
  const batches: PushRow[][] = [];
  while (due.length > 0) batches.push(due.splice(0, batchSize));
  for (let batch = batches.shift(); batch; batch = batches.shift()) {
    const linked: Answer[] = [];
    for (const row of batch) {
      // Emptied as it is read: the halves of a refused batch come by here again.
      const customer = await findCreated(square, row.lookUp.splice(0));
      if (customer) linked.push({ row, reply: { customer }, outcome: "linked" });
    }
    // The caller settles them before it comes back, and then they are no longer ready.
    if (linked.length > 0) yield linked;
    const ready = batch.filter(({ outcome }) => outcome === "ready");
    const unsent = await file.change((db) => readAgain(db, ready));
    if (unsent.length === 0) continue;

    const { created, refusals } = await sendRows(file, square, unsent, batchSize);
    const toReply = ({ key }: PushRow) => created[key] ?? { errors: refusals };
    const half = unsent.length >> 1;
    // One row can make Square refuse the whole call. Its halves show which one it is.
    if (refusals.length > 0 && half > 0) batches.unshift(unsent.slice(0, half), unsent.slice(half));
    else yield unsent.map((row) => ({ row, reply: toReply(row), outcome: "created" }));
    const errors = Object.values(created).flatMap((one) => ("errors" in one ? one.errors : []));
    if (client.has(errors, "AUTHENTICATION_ERROR")) throw new client.RefusedError(401, errors);
  }
}

// Takes the rows as they stand now, and returns those that are still good. Another program may have
// changed some since, or taken them away, or put an older file in the place of this one, whose rows would
// get new keys.
function readAgain(db: SqlDatabase, rows: PushRow[]): PushRow[] {
  for (const row of rows) {
    const columns = readWaiting(db, row);
    const { customer, problems } = toCustomer(columns ?? {});
    const reason = columns ? problems.join("; ") || null : "it is no longer in the file as it was";
    row.customer = { reference_id: row.key, ...customer };
    const bad = columns ? "refused" : "later";
    Object.assign(row, { outcome: reason === null ? "ready" : bad, reason });
    if (row.outcome === "refused") writeOutcome(db, row);
  }
  return rows.filter(({ outcome }) => outcome === "ready");
}

function readWaiting(db: SqlDatabase, { key }: PushRow): Row | undefined {
  const sql = "SELECT * FROM customers WHERE idempotency_key = ? AND id IS NULL";
  return database.readRows(db, sql, [key])[0];
}

// Makes one call. Where Square refuses all of it, the refusals are the answer.
async function sendRows(
  file: database.Database,
  square: client.Square,
  rows: PushRow[],
  batchSize: number,
): Promise<{ created: Record<string, client.Created>; refusals: client.SquareProblem[] }> {
  const { unanswered } = square;
  try {
    return { created: await createRows(square, rows, batchSize), refusals: [] };
  } catch (error) {
    if (error instanceof client.RefusedError && client.isRefusal(error.errors))
      return { created: {}, refusals: error.errors };
    if (!(error instanceof SyncError && error.exitCode === EXIT.later)) throw error;
    // Perhaps one of these is why there was no answer: the next run begins with others.
    const reason = error.message;
    await file.change((db) => {
      for (const row of rows) writeOutcome(db, { ...row, reason });
    });
    throw error;
  } finally {
    // An attempt that got no answer may have created them, whatever the next one was told.
    if (square.unanswered > unanswered) for (const row of rows) row.inDoubt = true;
  }
}

async function createRows(square: client.Square, rows: PushRow[], batchSize: number) {
  const customers = Object.fromEntries(rows.map(({ key, customer }) => [key, customer]));
  if (batchSize > 1) return square.bulkCreateCustomers(customers);
  const created: Record<string, client.Created> = {};
  for (const { key, customer } of rows)
    created[key] = await square.createCustomer({ ...customer, idempotency_key: key });
  return created;
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
export function settleRows(db: SqlDatabase, answers: Answer[]): void {
  const customers = answers.flatMap(({ row, reply, outcome }) => {
    if ("customer" in reply) return settleCustomer(db, row, reply.customer, outcome);
    Object.assign(row, toRefusal(reply.errors));
    // Square's details can quote what a customer said: the row keeps them, but they are not printed.
    const details = reply.errors.map(({ detail }) => detail ?? "").join(" ");
    if (row.outcome !== "later") writeOutcome(db, row, details);
    return [];
  });
  database.saveCustomers(db, customers);
}

/** @returns what is to be saved of the customer */
function settleCustomer(
  db: SqlDatabase,
  row: PushRow,
  customer: Customer,
  outcome: Answer["outcome"],
): Row[] {
  const id = String(customer.id);
  const columns = readWaiting(db, row);
  // A pull can have saved this profile as a row of its own, before anybody could tell whose it was.
  // That row goes, unless it is yours (source) or was sent itself (key). What it says is kept: it
  // can be newer than this answer.
  const sql = `DELETE FROM customers
    WHERE id = ? AND idempotency_key IS NULL AND source IS NULL RETURNING *`;
  const pulled = columns ? database.readRows(db, sql, [id]) : [];
  if (columns && !database.linkRow(db, "idempotency_key", row.key, id)) {
    const reason = `it is customer ${id}, as is another row`;
    Object.assign(row, { outcome: "held", id: null, reason });
    writeOutcome(db, row);
    return [];
  }
  // Of a row in doubt, what Square answers can be of an attempt before this one.
  const told = outcome === "linked" || row.inDoubt ? customer : row.customer;
  const lost = columns ? toLost(columns, told) : "";
  const reason = lost ? `Square's ${lost} replaced what it said` : null;
  Object.assign(row, { outcome, id, reason });
  return [...pulled, toRow(customer)];
}

// The columns that say what Square was not told: they were edited since, or it takes no word of them.
function toLost(columns: Row, told: Customer): string {
  // Both in the form in which Square takes them: a space or a year 0000 is no difference.
  const toSent = (row: Row) => toRow(toCustomer(row).customer);
  const theirs = toRow(told);
  const [ours, known] = [toSent(columns), toSent(theirs)];
  const lost = FIELDS.flatMap(({ column, sent }) => {
    const said = ours[column] ?? String(columns[column] ?? "").trim(); // as it is, where Square could not take it
    return sent && said !== "" && said !== known[column] ? column : [];
  });
  if (columns.email_unsubscribed && !theirs.email_unsubscribed) lost.push("email_unsubscribed");
  return lost.join(", ");
}

function toRefusal(errors: client.SquareProblem[]): Pick<PushRow, "outcome" | "reason"> {
  const reason = `Square says ${client.toWords(400, errors)}`;
  const codes = errors.map(({ code }) => code);
  // About Square, the token, or an attempt that still runs, and not about the row.
  if (!client.isRefusal(errors)) return { outcome: "later", reason };
  // Square knows the key with other content, so a profile was made before the row was edited. A new
  // key would make a second one: the row waits until the search shows the first.
  if (codes.includes("IDEMPOTENCY_KEY_REUSED"))
    return { outcome: "held", reason: `${reason}: it was sent before it was edited` };
  return { outcome: "refused", reason };
}

// A row in doubt keeps its key: that this attempt was refused tells nothing of another.
function writeOutcome(db: SqlDatabase, row: PushRow, details = ""): void {
  const key = row.outcome === "refused" && !row.inDoubt ? null : row.key;
  const sql = `UPDATE customers SET push_error = ?, idempotency_key = ?
    WHERE idempotency_key = ? AND id IS NULL`;
  db.run(sql, [`${row.reason} ${details}`.trim(), key, row.key]);
}

/** What `--json` says of a row. One that is still ready was so in a dry run. */
export function toReport({ localId, id, outcome, reason, inDoubt }: PushRow) {
  const would = inDoubt ? "would-look-up" : "would-create";
  return { local_id: Number(localId), outcome: outcome === "ready" ? would : outcome, id, reason };
}

// Who has which e-mail address and phone number: Square does not tell duplicates apart.
function readTwins(db: SqlDatabase, rows: Row[]) {
  const known = new Map<string, { name: string; row: Row }[]>();
  for (const name of rows.flatMap(toContacts)) known.set(toLookupKey(name), []);
  const add = (row: Row) => {
    for (const name of toContacts(row)) known.get(toLookupKey(name))?.push({ name, row });
  };
  // Of a row in doubt the reference is given: who has the same one may be that row, created and pulled.
  const find = (localId: string, customer: Customer, reference?: string) => {
    for (const name of toContacts(customer))
      for (const { name: other, row } of known.get(toLookupKey(name)) ?? [])
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

function toContacts({ email_address, phone_number }: Row | Customer): string[] {
  const email = String(email_address ?? "").trim();
  const number = String(phone_number ?? "").replace(/^[\D0]+|\D/g, "");
  return [email.toLowerCase(), number.length < 9 ? "" : number].filter(Boolean);
}

// The country code of a number may be missing on either side, so one that is the end of the other is
// the same: they meet where their last nine digits are.
function toLookupKey(name: string): string {
  return /^\d+$/.test(name) ? name.slice(-9) : name;
}
