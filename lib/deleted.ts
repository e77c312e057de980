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
  /** In milliseconds since 1970; 0 if the cell does not hold a time. */
  createdAt: number;
  /** It has a time, and a name, email address or phone number. Square's count omits others. */
  isCounted: boolean;
}

export function readLiveCustomers(db: Database): LiveCustomer[] {
  const sql = `SELECT id, created_at,
      concat(given_name, family_name, company_name, email_address, phone_number) AS searchable
    FROM customers WHERE id IS NOT NULL AND synced_at <> '' AND ${NOT_DELETED}`;
  return readRows(db, sql).map(({ id, created_at, searchable }) => {
    const createdAt = Date.parse(String(created_at)) || 0;
    return { id: String(id), createdAt, isCounted: createdAt > 0 && searchable !== "" };
  });
}

/** A range of creation times, and the customers of the file in it, oldest first. */
interface Range {
  createdAt: Square.TimeRange;
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
  customers: readonly LiveCustomer[],
  createdBefore: number,
  filter: Filter,
): Promise<{ checked: number; different: string[] }> {
  const knownIds = new Set(customers.map(({ id }) => id));
  const compared = customers.filter(({ createdAt }) => createdAt <= createdBefore);
  const counted = compared.filter(({ isCounted }) => isCounted);
  // Customers that cannot be counted in a range are always looked up.
  const different = new Set(compared.filter(({ isCounted }) => !isCounted).map(({ id }) => id));

  /** @returns true if Square and the file have the same number of customers in this range */
  async function compareRange(range: Range): Promise<boolean> {
    const rangeFilter = { ...filter, createdAt: range.createdAt };
    const response = await requestPage(square, rangeFilter, { limit: 1 });
    const count = Number(response.count ?? 0); // An empty result has no count.
    if (count === range.customers.length) return true;
    const isSmall = Math.min(count, range.customers.length) <= SMALL_RANGE;
    const parts = isSmall ? [] : divideRange(range);
    const isEqual = await Promise.all(parts.map(compareRange));
    // The difference is in a part. If it is in none, Square counts a customer at the time of the
    // division in both parts, or in none. Then read the whole range.
    if (isEqual.includes(false)) return false;
    const returned = new Set<string>();
    for await (const page of searchPages(square, rangeFilter))
      for (const { id = "" } of page.customers) returned.add(id);
    for (const { id } of range.customers) if (!returned.has(id)) different.add(id);
    // A row with a wrong `created_at` is in another range. So compare with all ids of the file.
    for (const id of returned) if (!knownIds.has(id)) different.add(id);
    return false;
  }

  counted.sort((a, b) => a.createdAt - b.createdAt);
  const createdAt = { endAt: formatTime(createdBefore) };
  await compareRange({ createdAt, customers: counted });
  return { checked: compared.length, different: [...different] };
}

/**
 * Divides a range near the middle of its customers, at a time at which the file has no customer.
 * @returns two parts; none if there is no such time
 */
function divideRange({ createdAt: range, customers }: Range): Range[] {
  // The places between two customers where at least a millisecond is free.
  const places = customers.flatMap(({ createdAt }, index) => {
    const previous = customers[index - 1]?.createdAt ?? createdAt;
    return createdAt - previous > 1 ? [{ index, time: createdAt - 1 }] : [];
  });
  const place = places.find(({ index }) => index >= customers.length / 2) ?? places.at(-1);
  if (place === undefined) return [];
  const time = formatTime(place.time);
  return [
    { createdAt: { ...range, endAt: time }, customers: customers.slice(0, place.index) },
    { createdAt: { ...range, startAt: time }, customers: customers.slice(place.index) },
  ];
}

/**
 * Looks up customers by id.
 * @returns for each id the customer, which has another id if it was merged; null = deleted
 * @throws SyncError (temporary) if Square returns neither a customer nor NOT_FOUND for an id
 * @see https://developer.squareup.com/reference/square/customers-api/bulk-retrieve-customers
 */
export async function lookUpCustomers(square: SquareClient, ids: readonly string[]) {
  const lookUps = new Map<string, Square.Customer | null>();
  for (let start = 0; start < ids.length; start += MAX_IDS) {
    const customerIds = ids.slice(start, start + MAX_IDS);
    const { responses } = await square.customers.bulkRetrieveCustomers({ customerIds });
    for (const id of customerIds) {
      const reply = responses?.[id];
      const errors = readErrors(reply);
      if (errors.length === 0 && reply?.customer?.id) lookUps.set(id, reply.customer);
      else if (errors.length > 0 && errors.every(({ code }) => code === "NOT_FOUND"))
        lookUps.set(id, null);
      else
        throw new SyncError(
          "temporary",
          `Cannot look up customers in Square: no clear answer for ${id}`,
          "run it again later; if it stays, correct that id in the file",
        );
    }
  }
  return lookUps;
}

/**
 * Marks customers as deleted or merged. The rows stay, with all their values.
 * @param gone for each customer the id of the one that it was merged into; null = deleted
 */
export function markGone(db: Database, gone: ReadonlyMap<string, string | null>) {
  const markedAt = formatTime(Date.now());
  const changes: RowChange[] = [];
  const notSaved: SaveResult["notSaved"] = [];
  for (const [id, mergedInto] of gone) {
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
