import type { Database as SqlDatabase } from "sql.js";
import {
  type Created,
  has,
  RefusedError,
  type Square,
  type SquareProblem,
  toWords,
} from "./client.ts";
import {
  type Database,
  linkRow,
  markEnvironment,
  type Row,
  readRows,
  readUnpushed,
  saveCustomers,
} from "./database.ts";
import { EXIT, SyncError } from "./errors.ts";
import { type Customer, FIELDS, toCustomer, toValues, type Value } from "./mapping.ts";
import { searchPages } from "./paging.ts";

/** A row that is ready to be sent. */
export interface Candidate {
  /** A text: SQLite counts further than a number can. */
  localId: string;
  key: string;
  customer: Customer;
  /** It was sent before, in another run or another attempt, and nobody knows what came of it. */
  inDoubt: boolean;
  /** Its reference_id, if it is in doubt and no other row goes by that: Square can be asked for it. */
  lookUp: string | undefined;
  /** Why it may not be sent, should it not be in Square already. */
  problem: Outcome | undefined;
}

/** What became of a row. */
export interface Outcome {
  local_id: number;
  outcome: "created" | "linked" | "refused" | "held" | "later" | "would-create" | "would-look-up";
  id: string | null;
  reason: string | null;
}

/** What came of a row: what Square answered, or why it was not sent. */
export type Answer = { row: Candidate; created: Created | Outcome; wasFound: boolean };

/** Which of the rows that Square lacks are meant. Each word narrows. */
export interface Selection {
  source: string | undefined;
  createdSince: string | null;
  limit: number | undefined;
  allowDuplicates: boolean;
}

/**
 * Selects the rows that Square lacks, checks them, and gives each good one its key and, where it has
 * none, a reference_id that Square can be asked for.
 * @returns the rows to send, and what became of the others
 */
export function prepareRows(
  db: SqlDatabase,
  { source, createdSince, limit, allowDuplicates }: Selection,
  environment: string,
): { ready: Candidate[]; outcomes: Outcome[] } {
  // Rows that failed before come last: else --limit could be used up by them for ever.
  const rows = readRows(
    db,
    `SELECT *, CAST(local_id AS TEXT) AS local_id FROM customers WHERE id IS NULL AND (?1 IS NULL OR source = ?1)
       AND (?2 IS NULL OR strftime('%Y-%m-%dT%H:%M:%fZ', created_at) >= ?2)
     ORDER BY push_error IS NOT NULL, customers.local_id LIMIT ?3`,
    [source ?? null, createdSince, limit ?? -1],
  );
  const twins = allowDuplicates ? undefined : readTwins(db, rows);
  const named = readUnpushed(db);
  const ready: Candidate[] = [];
  const outcomes: Outcome[] = [];
  for (const row of rows) {
    const localId = String(row.local_id);
    const inDoubt = row.idempotency_key !== null;
    const name = { localId, key: inDoubt ? String(row.idempotency_key) : null };
    const { customer, problems } = toCustomer(row);
    const twin = twins?.find(customer);
    let problem: Outcome | undefined;
    if (problems.length > 0) problem = setAside(db, name, "refused", problems.join("; "));
    else if (twin) problem = setAside(db, name, "held", `${twin} has the same email or phone`);
    // A row in doubt may be in Square already: it is looked up first, whatever it looks like now.
    if (problem && !inDoubt) {
      outcomes.push(problem);
      continue;
    }
    const key = name.key ?? crypto.randomUUID();
    const reference = String(customer.reference_id ?? key);
    customer.reference_id = reference;
    const sql = "UPDATE customers SET idempotency_key = ?, reference_id = ? WHERE local_id = ?";
    // What is sent without its key on disk is sent again by every run.
    if (!problem && db.run(sql, [key, reference, localId]).getRowsModified() !== 1)
      throw new SyncError(
        `Cannot give row ${localId} its key: the table customers is not as init-db made it`,
        EXIT.failed,
        "look for a trigger, or a local_id that is no PRIMARY KEY; nothing was sent",
      );
    const lookUp = inDoubt && named.get(reference) === localId ? reference : undefined;
    ready.push({ localId, key, customer, inDoubt, lookUp, problem });
    twins?.add(customer, `row ${localId}`);
  }
  if (ready.length > 0) markEnvironment(db, environment);
  return { ready, outcomes };
}

// The rows whose key is still in the file, and that still have no id: another program may have taken
// them away, or put an older file in the place of this one, and its rows would get new keys.
function keepWaiting(db: SqlDatabase, rows: Candidate[]): Candidate[] {
  const sql = "SELECT 1 FROM customers WHERE idempotency_key = ? AND id IS NULL";
  return rows.filter(({ key }) => readRows(db, sql, [key]).length > 0);
}

/**
 * Sends rows and yields after each reply: whoever loops over it saves what came before the next
 * request is made. A key can be sent twice: Square answers with the profile that it made before.
 * @param batchSize 1 = CreateCustomer, more = BulkCreateCustomers
 */
export async function* pushRows(
  database: Database,
  square: Square,
  rows: Candidate[],
  batchSize: number,
): AsyncGenerator<Answer[]> {
  for (let at = 0; at < rows.length; at += batchSize) {
    const settled: Answer[] = [];
    const unsent: Candidate[] = [];
    const due = rows.slice(at, at + batchSize);
    const waiting = await database.change((db) => keepWaiting(db, due));
    for (const row of due) {
      if (waiting.includes(row)) continue;
      const created = toOutcome(row.localId, "later", "it is no longer in the file as it was");
      settled.push({ row, created, wasFound: false });
    }
    for (const row of waiting) {
      const found = row.lookUp ? await findCreated(square, row.lookUp) : undefined;
      const created = found ? { customer: found } : row.problem;
      if (created) settled.push({ row, created, wasFound: true });
      else unsent.push(row);
    }
    if (settled.length > 0) yield settled;
    if (unsent.length > 0) yield* createRows(square, unsent, batchSize === 1);
  }
}

async function* createRows(
  square: Square,
  rows: Candidate[],
  oneByOne: boolean,
): AsyncGenerator<Answer[]> {
  const created: Record<string, Created> = {};
  const customers = Object.fromEntries(rows.map(({ key, customer }) => [key, customer]));
  const { retries } = square.sent;
  let refusals: SquareProblem[] = [];
  try {
    if (!oneByOne) Object.assign(created, await square.bulkCreateCustomers(customers));
    else
      for (const [key, customer] of Object.entries(customers))
        created[key] = await square.createCustomer({ ...customer, idempotency_key: key });
  } catch (error) {
    if (error instanceof RefusedError && error.exitCode === EXIT.failed) refusals = error.errors;
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
  const toAnswer = (row: Candidate) => created[row.key] ?? { errors: refusals };
  yield rows.map((row) => ({ row, created: toAnswer(row), wasFound: false }));
  const errors = Object.values(created).flatMap((one) => ("errors" in one ? one.errors : []));
  if (has(errors, "AUTHENTICATION_ERROR")) throw new RefusedError(401, errors);
}

// The one profile that a row in doubt became. Square's filter does not look at case, and a
// reference_id is no key there: two profiles with the same one leave the question open.
async function findCreated(square: Square, exact: string): Promise<Customer | undefined> {
  const found = new Map<unknown, Customer>();
  for await (const { customers } of searchPages(square, { reference_id: { exact } }))
    for (const one of customers) if (one.reference_id === exact) found.set(one.id, one);
  const [first, ...others] = found.values();
  return others.length === 0 ? first : undefined;
}

/** Writes down what became of the rows of one reply. */
export function settleRows(db: SqlDatabase, answers: Answer[], now: string): Outcome[] {
  const customers: Value[][] = [];
  const outcomes = answers.map(({ row, created, wasFound }) => {
    const { localId, key } = row;
    if ("outcome" in created) return created;
    if ("customer" in created) {
      const id = String(created.customer.id);
      // A pull can have saved this profile as a row of its own, before anybody could tell whose it was.
      // That row goes, unless it is yours (source) or was sent itself (key). What it says is kept: it
      // can be newer than this answer.
      const [pulled] = readRows(
        db,
        `DELETE FROM customers WHERE id = ? AND idempotency_key IS NULL AND source IS NULL
         AND EXISTS (SELECT 1 FROM customers WHERE idempotency_key = ? AND id IS NULL) RETURNING *`,
        [id, key],
      );
      if (pulled) customers.push(FIELDS.map(({ column }) => pulled[column] as Value));
      const find = "SELECT CAST(local_id AS TEXT) AS local_id FROM customers WHERE id = ?";
      const [other] = readRows(db, find, [id]);
      if (other && other.local_id !== localId)
        return setAside(db, row, "held", `it is customer ${id}, as is row ${other.local_id}`);
      linkRow(db, "idempotency_key", key, id);
      customers.push(toValues(created.customer));
      return { ...toOutcome(localId, wasFound ? "linked" : "created", null), id };
    }
    const { errors } = created;
    const reason = `Square says ${toWords(400, errors)}`;
    const codes = errors.map(({ code }) => code);
    // About Square, the token, or an attempt that still runs, and not about the row: it keeps its key.
    if (
      has(errors, "API_ERROR", "RATE_LIMIT_ERROR", "AUTHENTICATION_ERROR") ||
      codes.includes("CONFLICT")
    )
      return toOutcome(localId, "later", reason);
    // Square knows the key with other content, so a profile was made before the row was edited. A new
    // key would make a second one: the row waits until the search shows the first.
    if (codes.includes("IDEMPOTENCY_KEY_REUSED"))
      return setAside(db, row, "held", `${reason}: it was sent before it was edited`);
    const details = errors.map(({ detail }) => detail ?? "").join(" ");
    const outcome = setAside(db, row, "refused", reason, ` ${details}`.trimEnd());
    // A row in doubt keeps its key: that this attempt was refused tells nothing of another.
    const sql = "UPDATE customers SET idempotency_key = NULL WHERE idempotency_key = ?";
    if (!row.inDoubt) db.run(sql, [key]);
    return outcome;
  });
  saveCustomers(db, customers, now);
  return outcomes;
}

/** What a dry run says of a row that a real run would send. */
export function toRehearsed({ localId, inDoubt, problem }: Candidate): Outcome {
  return problem ?? toOutcome(localId, inDoubt ? "would-look-up" : "would-create", null);
}

// Square's details can quote what a customer said: the row keeps them, but they are not printed.
function setAside(
  db: SqlDatabase,
  { localId, key }: { localId: string; key: string | null },
  outcome: Outcome["outcome"],
  reason: string,
  details = "",
): Outcome {
  // With its key: another program may have put another row under this local_id meanwhile.
  const sql = "UPDATE customers SET push_error = ? WHERE local_id = ? AND idempotency_key IS ?";
  db.run(sql, [reason + details, localId, key]);
  return toOutcome(localId, outcome, reason);
}

function toOutcome(localId: string, outcome: Outcome["outcome"], reason: string | null): Outcome {
  return { local_id: Number(localId), outcome, id: null, reason };
}

// Who has which e-mail address and phone number: Square does not tell duplicates apart. The country
// code of a number may be missing on either side, so one that is the end of the other is the same.
function readTwins(db: SqlDatabase, rows: Row[]) {
  const owners = new Map<string, { name: string; owner: string }[]>();
  for (const name of rows.flatMap(toNames)) owners.set(name.slice(-9), []);
  const add = (row: Row | Customer, owner: string) => {
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

function toNames({ email_address, phone_number }: Row | Customer): string[] {
  const email = String(email_address ?? "").trim();
  const digits = String(phone_number ?? "").replace(/\D/g, "");
  const number = digits.replace(/^0+/, "");
  return [email.toLowerCase(), number.length < 9 ? "" : number].filter((name) => name !== "");
}
