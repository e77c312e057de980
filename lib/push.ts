import type { Database as SqlDatabase } from "sql.js";
import {
  type Created,
  isCategory,
  isNotOfTheRow,
  RefusedError,
  type Square,
  toWords,
} from "./client.ts";
import { linkRow, markEnvironment, readRows, saveCustomers } from "./database.ts";
import { EXIT } from "./errors.ts";
import {
  type Customer,
  toCustomer,
  toSameEmail,
  toSamePhone,
  toValues,
  type Value,
} from "./mapping.ts";

/** A row that is ready to be sent. */
export interface Candidate {
  localId: number;
  key: string;
  customer: Customer;
  /** It had its key when the run began, so it was sent before and its fate is not known. */
  inDoubt: boolean;
  /** Why it may not be sent, should the look-up find nothing. */
  problem: Outcome | undefined;
}

/** What became of a row, as `--json` reports it. */
export interface Outcome {
  local_id: number;
  outcome: "created" | "linked" | "refused" | "held" | "later" | "would-create" | "would-look-up";
  id: string | null;
  reason: string | null;
}

/** Which rows without an id are meant; each word narrows. */
export interface Selection {
  source: string | undefined;
  createdSince: string | null;
  limit: number | undefined;
  allowDuplicates: boolean;
}

/**
 * Selects the rows that Square lacks, checks them, and gives each good one its key: all on disk before
 * anything is sent, since a key that is made at the call is forgotten with the call.
 * @returns the rows to send, and what became of those that are not
 */
export function prepareRows(
  db: SqlDatabase,
  { source, createdSince, limit, allowDuplicates }: Selection,
  environment: string,
): { ready: Candidate[]; outcomes: Outcome[] } {
  markEnvironment(db, environment);
  // Rows that failed before come last, so that --limit cannot be used up by them every time.
  const rows = readRows(
    db,
    `SELECT * FROM customers WHERE id IS NULL AND (?1 IS NULL OR source = ?1)
       AND (?2 IS NULL OR strftime('%Y-%m-%dT%H:%M:%fZ', created_at) >= ?2)
     ORDER BY push_error IS NOT NULL, local_id LIMIT ?3`,
    [source ?? null, createdSince, limit ?? -1],
  );
  const taken: Taken = new Map();
  if (rows.length > 0 && !allowDuplicates) readTaken(db, taken);
  const ready: Candidate[] = [];
  const outcomes: Outcome[] = [];
  for (const row of rows) {
    const localId = Number(row.local_id);
    const inDoubt = row.idempotency_key !== null;
    const { customer, problems } = toCustomer(row);
    const twin = findTwin(taken, customer);
    let problem: Outcome | undefined;
    if (problems.length > 0) problem = setAside(db, localId, "refused", problems.join("; "));
    else if (twin) problem = setAside(db, localId, "held", `${twin} has the same email or phone`);
    // A row in doubt may be in Square already: it is looked up first, whatever it looks like now.
    if (problem !== undefined && !inDoubt) {
      outcomes.push(problem);
      continue;
    }
    const key = inDoubt ? String(row.idempotency_key) : crypto.randomUUID();
    customer.reference_id ??= key;
    db.run("UPDATE customers SET idempotency_key = ?, reference_id = ? WHERE local_id = ?", [
      key,
      String(customer.reference_id),
      localId,
    ]);
    ready.push({ localId, key, customer, inDoubt, problem });
    if (!allowDuplicates) take(taken, customer, `row ${localId}`);
  }
  return { ready, outcomes };
}

/** What came of a row: Square's answer, or the reason why it was not sent. */
export interface Answer {
  row: Candidate;
  created: Created | undefined;
  wasFound: boolean;
}

/**
 * Sends rows in batches and yields after each reply: whoever loops over it saves what came before the
 * next request is made. Sending a key twice is safe: Square answers with the profile it made before.
 * @param batchSize 1 = CreateCustomer, more = BulkCreateCustomers
 */
export async function* pushRows(
  square: Square,
  rows: Candidate[],
  batchSize: number,
): AsyncGenerator<Answer[]> {
  for (let at = 0; at < rows.length; at += batchSize) {
    const settled: Answer[] = [];
    const unsent: Candidate[] = [];
    for (const row of rows.slice(at, at + batchSize)) {
      const customer = row.inDoubt ? await findCreated(square, row) : undefined;
      if (customer) settled.push({ row, created: { customer }, wasFound: true });
      else if (row.problem) settled.push({ row, created: undefined, wasFound: false });
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
  let created: Record<string, Created> = {};
  try {
    if (oneByOne)
      for (const { key, customer } of rows)
        created[key] = await square.createCustomer({ ...customer, idempotency_key: key });
    else
      created = await square.bulkCreateCustomers(
        Object.fromEntries(rows.map(({ key, customer }) => [key, customer])),
      );
  } catch (error) {
    if (!(error instanceof RefusedError) || error.exitCode !== EXIT.failed) throw error;
    // One row can make Square refuse the whole call. The halves show which one it is.
    const half = rows.length >> 1;
    if (half > 0) {
      yield* createRows(square, rows.slice(0, half), oneByOne);
      yield* createRows(square, rows.slice(half), oneByOne);
      return;
    }
    for (const { key } of rows) created[key] = { errors: error.errors };
  }
  yield rows.map((row) => ({ row, created: created[row.key], wasFound: false }));
  const errors = Object.values(created).flatMap((one) => ("errors" in one ? one.errors : []));
  if (isCategory(errors, "AUTHENTICATION_ERROR"))
    throw new RefusedError(`Cannot create customers: ${errors.map(toWords)[0]}`, errors, 200);
}

// The one profile that a row in doubt became; undefined when there is none, or more than one.
async function findCreated(square: Square, row: Candidate): Promise<Customer | undefined> {
  const exact = String(row.customer.reference_id);
  const filter = { reference_id: { exact } };
  const { customers } = await square.searchCustomers({ limit: 100, query: { filter } });
  // Square's filter does not look at case; two references that differ in case are two.
  const found = customers.filter((customer) => customer.reference_id === exact);
  return found.length === 1 ? found[0] : undefined;
}

/** Writes down what became of the rows of one reply. */
export function settleRows(db: SqlDatabase, answers: Answer[], now: string): Outcome[] {
  const customers: Value[][] = [];
  const outcomes = answers.map(({ row, created, wasFound }): Outcome => {
    const { localId } = row;
    if (created === undefined) return row.problem ?? toOutcome(localId, "later", "no answer");
    if ("customer" in created) {
      const id = String(created.customer.id);
      const [other] = readRows(db, "SELECT local_id FROM customers WHERE id = ?", [id]);
      if (other !== undefined && other.local_id !== localId)
        return setAside(db, localId, "held", `customer ${id} in Square is row ${other.local_id}`);
      linkRow(db, localId, id);
      customers.push(toValues(created.customer));
      return { ...toOutcome(localId, wasFound ? "linked" : "created", null), id };
    }
    const reason = `Square refused it: ${created.errors.map(toWords).join(", ")}`;
    if (isNotOfTheRow(created.errors)) return toOutcome(localId, "later", reason);
    // Square knows the key with other content: a profile was made before the row was edited. A new key
    // would make a second one, so the row waits until the search shows the first.
    if (created.errors.some(({ code }) => code === "IDEMPOTENCY_KEY_REUSED"))
      return setAside(db, localId, "held", "sent before with other content; look for it in Square");
    // A row that was in doubt keeps its key: a refusal of this content says nothing of the first.
    if (!row.inDoubt)
      db.run("UPDATE customers SET idempotency_key = NULL WHERE local_id = ?", [localId]);
    const details = created.errors.map(({ detail }) => detail).join(" ");
    return setAside(db, localId, "refused", reason, details.trim());
  });
  saveCustomers(db, customers, now);
  return outcomes;
}

/** What a dry run says of a row that a real run would send. */
export function toRehearsed({ localId, inDoubt }: Candidate): Outcome {
  return toOutcome(localId, inDoubt ? "would-look-up" : "would-create", null);
}

function toOutcome(local_id: number, outcome: Outcome["outcome"], reason: string | null): Outcome {
  return { local_id, outcome, id: null, reason };
}

// The row keeps the whole reason; what is printed leaves out Square's details, which can quote a row.
function setAside(
  db: SqlDatabase,
  localId: number,
  outcome: "refused" | "held",
  reason: string,
  details = "",
): Outcome {
  const whole = details === "" ? reason : `${reason}: ${details}`;
  db.run("UPDATE customers SET push_error = ? WHERE local_id = ?", [whole, localId]);
  return toOutcome(localId, outcome, reason);
}

// Who has which e-mail address and phone number. Square does not dedupe: a second profile would be made.
type Taken = Map<string, { name: string; owner: string }[]>;

function readTaken(db: SqlDatabase, taken: Taken): void {
  for (const row of readRows(
    db,
    `SELECT id, email_address, phone_number FROM customers
     WHERE id IS NOT NULL AND (email_address IS NOT NULL OR phone_number IS NOT NULL)`,
  ))
    take(taken, row, `customer ${row.id}`);
}

function take(taken: Taken, row: Customer, owner: string): void {
  for (const name of toNames(row)) {
    const others = taken.get(name.slice(-9));
    if (others) others.push({ name, owner });
    else taken.set(name.slice(-9), [{ name, owner }]);
  }
}

// A phone number may lack its country code on either side, so the end of a number is enough.
function findTwin(taken: Taken, row: Customer): string | undefined {
  for (const name of toNames(row))
    for (const other of taken.get(name.slice(-9)) ?? [])
      if (other.name === name || (!name.includes("@") && isEnd(name, other.name)))
        return other.owner;
  return undefined;
}

function isEnd(one: string, other: string): boolean {
  return one.endsWith(other) || other.endsWith(one);
}

function toNames({ email_address, phone_number }: Customer): string[] {
  const names = [toSameEmail(email_address), toSamePhone(phone_number)];
  return names.filter((name) => name !== undefined);
}
