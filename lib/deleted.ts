/**
 * Finds customers that were deleted or merged in Square.
 *
 * Square does not report deletions: a deleted customer only stops appearing in search. Reading all
 * customers would show it, but takes one request for each 100 customers. So this file compares
 * counts first. Where they differ, it divides the range of creation times, until a part is small
 * enough to be read. The division decides only the cost: each id that only one side has is looked
 * up before anything is concluded.
 *
 * If the file lacks one customer and Square another, the counts are equal and hide both. A later
 * pull adds the customer that the file lacks. Then the counts differ.
 */
import type { Database } from "sql.js";
import type { Square, SquareClient } from "square";
import { NOT_DELETED, type RowChange, type SaveResult } from "./customers.ts";
import type { RunContext } from "./internal/cli.ts";
import { messageOf, SyncError } from "./internal/errors.ts";
import { readRows, readValue } from "./internal/sql.ts";
import { readErrors } from "./internal/square-errors.ts";
import { type Filter, requestPage, searchPages } from "./paging.ts";
import { formatTime } from "./window.ts";

// A range with at most this many customers is read. Dividing it costs more requests than it saves.
const SMALL_RANGE = 500;

// BulkRetrieveCustomers accepts at most this many ids in one request.
const MAX_IDS = 100;

/**
 * Requires that a pull has read all customers of Square. Without them, the file does not show which
 * customers exist, and a push would create them a second time.
 * @throws SyncError (usage)
 */
export function requireCompletePull(db: Database, context: RunContext): void {
  const sql = "SELECT count(*) FROM sync_runs WHERE script = 'pull-created' AND complete = 1";
  if (readValue(db, sql) === 0)
    throw new SyncError(
      "usage",
      `Cannot run ${context.script}: pull-created has not read all customers of Square into "${context.databasePath}" yet`,
      "pull-created, without --since",
    );
}

/** A customer of the file that came from Square and is not marked as deleted. */
export interface LiveCustomer {
  id: string;
  /** In milliseconds since 1970; NaN if the cell holds something else. */
  createdAt: number;
  /** Has a name, company, email address or phone number. Square's search and count omit others. */
  isSearchable: boolean;
}

/** Reads the customers that the file has from Square. */
export function readLiveCustomers(db: Database): LiveCustomer[] {
  const fields = ["given_name", "family_name", "company_name", "email_address", "phone_number"];
  const rows = readRows(
    db,
    `SELECT id, created_at, concat(${fields.join(", ")}) <> '' AS searchable FROM customers
     WHERE id IS NOT NULL AND synced_at <> '' AND ${NOT_DELETED}`,
  );
  return rows.map(({ id, created_at, searchable }) => ({
    id: String(id),
    createdAt: Date.parse(String(created_at)),
    isSearchable: searchable === 1,
  }));
}

interface Comparison {
  square: SquareClient;
  filter: Filter;
  /** The ids of all customers of the file. */
  knownIds: ReadonlySet<string>;
  /** The ids that only one side has. */
  different: Set<string>;
}

/** A range of creation times, in milliseconds since 1970. It has no customer of the file at its ends. */
interface Range {
  startAt: number | undefined;
  endAt: number;
  /** The customers of the file in this range, oldest first. */
  customers: LiveCustomer[];
}

/**
 * Compares the customers of the file with Square's. It only searches.
 * @param createdBefore leaves out customers that were created later, in milliseconds since 1970.
 *   Search may not return them yet
 * @param filter the same conditions as in the pulls. Otherwise, customers that the pulls leave out
 *   would count as missing in the file
 * @returns how many customers of the file were compared, and the ids that only one side has
 */
export async function compareWithSquare(
  square: SquareClient,
  customers: LiveCustomer[],
  createdBefore: number,
  filter: Filter = {},
): Promise<{ checked: number; different: string[] }> {
  const knownIds = new Set(customers.map(({ id }) => id));
  const isCounted = ({ createdAt, isSearchable }: LiveCustomer) => isSearchable && createdAt > 0;
  const times = new Set(customers.map(({ createdAt }) => createdAt));
  let endAt = createdBefore;
  while (times.has(endAt)) endAt--;
  const compared = customers.filter(({ createdAt }) => !(createdAt > endAt));
  // Square's count leaves these out, or their cell has no valid time. They are always looked up.
  const different = new Set(compared.filter((one) => !isCounted(one)).map(({ id }) => id));
  const counted = compared.filter(isCounted).sort((a, b) => a.createdAt - b.createdAt);
  const range = { startAt: undefined, endAt, customers: counted };
  const comparison = { square, filter, knownIds, different };
  await compareRange(comparison, range, await countRange(comparison, range));
  return { checked: compared.length, different: [...different] };
}

/** @param count how many customers Square has in this range */
async function compareRange(comparison: Comparison, range: Range, count: number): Promise<void> {
  const { customers } = range;
  if (count === customers.length) return;
  const parts = Math.min(count, customers.length) > SMALL_RANGE ? divideRange(range) : undefined;
  if (parts === undefined) return await readRange(comparison, range);
  const counts = await Promise.all(parts.map((part) => countRange(comparison, part)));
  // Square may count a customer at the time of the division in both parts, or in none. If the parts
  // agree although the whole differs, it is such a customer.
  if (parts.every((part, index) => part.customers.length === counts[index]))
    return await readRange(comparison, range);
  await Promise.all(parts.map((part, index) => compareRange(comparison, part, counts[index] ?? 0)));
}

/** Divides a range near the middle of its customers, at a time at which the file has no customer. */
function divideRange({ startAt, endAt, customers }: Range): Range[] | undefined {
  const middle = Math.floor(customers.length / 2);
  for (let distance = 0; distance < middle; distance++)
    for (const index of [middle - distance, middle + distance]) {
      const older = customers[index - 1]?.createdAt ?? Number.NaN;
      const newer = customers[index]?.createdAt ?? Number.NaN;
      if (newer - older < 2 || Number.isNaN(newer - older)) continue;
      return [
        { startAt, endAt: newer - 1, customers: customers.slice(0, index) },
        { startAt: newer - 1, endAt, customers: customers.slice(index) },
      ];
    }
  return undefined;
}

async function countRange({ square, filter }: Comparison, range: Range): Promise<number> {
  const { count } = await requestPage(square, buildFilter(filter, range), { limit: 1 });
  return Number(count ?? 0); // An empty result has no count.
}

/** Reads all pages of a range, and compares their ids. */
async function readRange(comparison: Comparison, range: Range): Promise<void> {
  const { square, filter, knownIds, different } = comparison;
  const returned = new Set<string>();
  for await (const page of searchPages(square, buildFilter(filter, range)))
    for (const { id = "" } of page.customers) returned.add(id);
  for (const { id } of range.customers) if (!returned.has(id)) different.add(id);
  // A row with a wrong `created_at` is in another range. So compare with the ids of the whole file.
  for (const id of returned) if (!knownIds.has(id)) different.add(id);
}

function buildFilter(filter: Filter, { startAt, endAt }: Range): Filter {
  const start = startAt === undefined ? {} : { startAt: formatTime(startAt) };
  return { ...filter, createdAt: { ...start, endAt: formatTime(endAt) } };
}

/**
 * Looks up customers by id.
 * @returns for each id the customer, which has another id if it was merged; null = deleted
 * @throws SyncError (temporary) if Square returns neither a customer nor NOT_FOUND for an id
 * @see https://developer.squareup.com/reference/square/customers-api/bulk-retrieve-customers
 */
export async function lookUpCustomers(
  square: SquareClient,
  ids: readonly string[],
): Promise<Map<string, Square.Customer | null>> {
  const lookUps = new Map<string, Square.Customer | null>();
  for (let start = 0; start < ids.length; start += MAX_IDS) {
    const customerIds = ids.slice(start, start + MAX_IDS);
    const { responses } = await square.customers.bulkRetrieveCustomers({ customerIds });
    for (const id of customerIds) {
      const reply = responses?.[id];
      const errors = readErrors(reply);
      const isGone = errors.length > 0 && errors.every(({ code }) => code === "NOT_FOUND");
      if (!isGone && (errors.length > 0 || !reply?.customer?.id))
        throw new SyncError(
          "temporary",
          `Cannot look up customers in Square: no clear answer for ${id}`,
          "run it again later; if it stays, correct that id in the file",
        );
      lookUps.set(id, isGone ? null : (reply?.customer ?? null));
    }
  }
  return lookUps;
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
 */
export function markGone(
  db: Database,
  gone: readonly GoneCustomer[],
  markedAt: string,
): Pick<SaveResult, "changes" | "notSaved"> {
  const changes: RowChange[] = [];
  const notSaved: SaveResult["notSaved"] = [];
  for (const { id, mergedInto } of gone) {
    try {
      const sql = `UPDATE OR ABORT customers SET deleted_at = ?, merged_into = ?
        WHERE id = ? AND ${NOT_DELETED} RETURNING local_id`;
      const [row] = readRows(db, sql, [markedAt, mergedInto, id]);
      if (row === undefined) continue;
      const outcome = mergedInto === null ? "deleted" : "merged";
      changes.push({ localId: Number(row.local_id), id, outcome });
      // If A was merged into B, and B is now merged into C, then A points to C as well.
      const follow = "UPDATE OR ABORT customers SET merged_into = ? WHERE merged_into = ?";
      if (mergedInto !== null) db.run(follow, [mergedInto, id]);
    } catch (error) {
      notSaved.push({ id, reason: messageOf(error) });
    }
  }
  return { changes, notSaved };
}
