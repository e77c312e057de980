/**
 * Finds customers that were deleted or merged in Square.
 *
 * Square does not report deletions: a deleted customer only stops appearing in search. Reading the
 * whole directory every night would find it, at one request for each 100 customers. Counting is
 * cheaper:
 *
 *   1. Ask Square how many customers it has. If the file has as many, one request was enough.
 *   2. If not, divide the customers by creation time into two halves, and count again. Each half
 *      whose count differs is divided again, until one or a few pages hold all of it.
 *   3. Compare the ids on these pages with the ids in the file.
 *   4. Look up each id that search did not return. Only this answer decides about a customer.
 *
 * Counts can be equal although one customer is missing, if the file also lacks one. The difference
 * shows as soon as a later pull has brought the customer that the file lacks.
 */
import type { Square, SquareClient } from "square";
import { SyncError } from "./internal/errors.ts";
import { formatTime } from "./internal/time.ts";
import { type Filter, searchPages } from "./paging.ts";

const PAGE_SIZE = 100; // the most that Square allows, for a search and for a bulk retrieve

// A small stretch is read page by page, instead of being divided, if that takes fewer requests: one
// for each page, compared with about three for each difference. Large stretches are always divided,
// because their differences are often in one place, for example after a wrong import was deleted.
const SMALL_STRETCH_PAGES = 8;
const REQUESTS_PER_DIFFERENCE = 3;

/** A live row of the file: its customer came from Square, and is not marked as deleted. */
export interface LocalCustomer {
  id: string;
  /** The time as RFC 3339. It can also be any other text, because other programs edit the file. */
  createdAt: string;
  /** Has a name, company, email address or phone number. Square's search and count skip others. */
  isSearchable: boolean;
}

export interface Comparison {
  /** How many customers of the file were compared. */
  checked: number;
  /** Ids in the file that search did not return. `lookUpCustomers` finds out why. */
  notFound: string[];
  /**
   * Customers that search returned and that `customers` lacks. Search lags behind deletions too, so
   * `lookUpCustomers` decides about them as well.
   */
  unknown: Square.Customer[];
}

/** What Square answered about one id. */
export type LookUp =
  | { outcome: "deleted" }
  /** Merged into `customer`. After several merges it is the newest one. */
  | { outcome: "merged"; customer: Square.Customer }
  /** Search does not return it, for example because it has no public field. */
  | { outcome: "present"; customer: Square.Customer };

/** All customers that were created in one range of time. */
interface Stretch {
  /** In milliseconds since 1970. The first stretch is open, because the file can lack its start. */
  startAt: number | undefined;
  endAt: number;
  /** The searchable customers of the file in this range, oldest first. */
  customers: DatedCustomer[];
}

interface DatedCustomer {
  id: string;
  createdAt: number;
}

interface CountedStretch extends Stretch {
  /** How many customers Square has in this range. */
  count: number;
}

/**
 * Compares the customers of the file with Square's. Sends SearchCustomers requests only, and
 * changes nothing.
 * @param customers all live rows of the file, including those created after `before`
 * @param options.before compares only customers created before this moment, in ms since 1970.
 *   Search lags behind, and may not return a customer that was created a moment ago
 * @param options.concurrency how many stretches are counted or read at the same time
 * @param options.filter compares only customers that match these conditions. It must be the filter of the pulls:
 *   a customer that they leave out is otherwise counted as one that the file lacks
 */
export async function compareWithSquare(
  square: SquareClient,
  customers: LocalCustomer[],
  { before, concurrency, filter = {} }: { before: number; concurrency: number; filter?: Filter },
): Promise<Comparison> {
  const liveIds = new Set(customers.map(({ id }) => id));
  const { searchable, others } = classifyCustomers(customers, before);
  const notFound = [...others];
  const unknown = new Map<string, Square.Customer>();

  // Square does not say whether a range includes its end. So end at a moment at which no customer
  // of the file was created.
  const times = new Set(searchable.map(({ createdAt }) => createdAt));
  let endAt = before;
  while (times.has(endAt)) endAt--;
  const whole: Stretch = {
    startAt: undefined,
    endAt,
    customers: searchable.filter(({ createdAt }) => createdAt < endAt),
  };

  /** Compares a stretch with everything that Square returned for it. */
  function compareIds(stretch: Stretch, returned: Square.Customer[]): void {
    const returnedIds = new Set(returned.map(({ id }) => id));
    for (const { id } of stretch.customers) if (!returnedIds.has(id)) notFound.push(id);
    // Unknown to the whole file, not only to this stretch: `created_at` in the file can be wrong.
    for (const customer of returned)
      if (customer.id !== undefined && !liveIds.has(customer.id))
        unknown.set(customer.id, customer);
  }

  /** Counts Square's customers in a stretch. If the reply also holds all of them, it `isDone`. */
  async function countStretch(stretch: Stretch): Promise<{ count: number; isDone: boolean }> {
    const reply = await square.customers.search({
      limit: BigInt(PAGE_SIZE),
      count: true,
      query: {
        filter: { ...filter, createdAt: buildTimeRange(stretch) },
        sort: { field: "CREATED_AT", order: "ASC" },
      },
    });
    const page = reply.customers ?? [];
    const isDone = !reply.cursor;
    if (isDone) compareIds(stretch, page);
    return { count: Number(reply.count ?? page.length), isDone };
  }

  /**
   * Reads all pages of a stretch. If Square returns too few customers, the lookup prevents a wrong
   * conclusion, and a customer that the file lacks is found on a later night.
   */
  async function readStretch(stretch: Stretch): Promise<void> {
    const returned: Square.Customer[] = [];
    const pages = searchPages(square, { ...filter, createdAt: buildTimeRange(stretch) });
    for await (const page of pages) returned.push(...page.customers);
    compareIds(stretch, returned);
  }

  /** Divides a stretch whose count differs, or reads it. Returns the parts that remain. */
  async function narrow(stretch: CountedStretch): Promise<CountedStretch[]> {
    const difference = Math.abs(stretch.count - stretch.customers.length);
    if (difference === 0) return [];
    const pages = Math.ceil(stretch.count / PAGE_SIZE);
    const isDense = pages <= SMALL_STRETCH_PAGES && difference * REQUESTS_PER_DIFFERENCE >= pages;
    const halves = isDense ? undefined : divideStretch(stretch);
    if (!halves) {
      await readStretch(stretch);
      return [];
    }
    const { left, right } = halves;
    const { count, isDone } = await countStretch(left);
    // What is not in the left half is in the right half. So one request counts both.
    const countedRight = { ...right, count: stretch.count - count };
    return isDone ? [countedRight] : [{ ...left, count }, countedRight];
  }

  // Level by level: all halves, then all quarters. So no more than `concurrency` stretches are read
  // at the same time, and each cursor is used before it expires.
  const { count, isDone } = await countStretch(whole);
  let stretches: CountedStretch[] = isDone ? [] : [{ ...whole, count }];
  while (stretches.length > 0) {
    const parts: CountedStretch[] = [];
    await forEachInParallel(stretches, concurrency, async (stretch) => {
      for (const part of await narrow(stretch)) parts.push(part);
    });
    stretches = parts;
  }

  return {
    checked: whole.customers.length + others.length,
    notFound,
    unknown: [...unknown.values()],
  };
}

/**
 * Asks Square for customers by id, with BulkRetrieveCustomers.
 * @throws SyncError (temporary) when the answer about an id is neither a customer nor NOT_FOUND, so
 *   that nothing can be concluded from it
 */
export async function lookUpCustomers(
  square: SquareClient,
  ids: string[],
): Promise<Map<string, LookUp>> {
  const uniqueIds = [...new Set(ids)];
  const lookUps = new Map<string, LookUp>();
  const unclear: string[] = [];

  for (let start = 0; start < uniqueIds.length; start += PAGE_SIZE) {
    const customerIds = uniqueIds.slice(start, start + PAGE_SIZE);
    const { responses } = await square.customers.bulkRetrieveCustomers({ customerIds });
    for (const id of customerIds) {
      const lookUp = readLookUp(id, responses?.[id]);
      if (lookUp) lookUps.set(id, lookUp);
      else unclear.push(id);
    }
  }

  if (unclear.length > 0)
    throw new SyncError(
      "temporary",
      `Cannot look up customers in Square: no clear answer for ${unclear.length} of ` +
        `${uniqueIds.length} ids, for example ${unclear[0]}`,
      "run it again later",
    );
  return lookUps;
}

function readLookUp(
  id: string,
  answer: Square.GetCustomerResponse | undefined,
): LookUp | undefined {
  const { customer, errors = [] } = answer ?? {};
  if (customer?.id && errors.length === 0)
    return { outcome: customer.id === id ? "present" : "merged", customer };
  const isNotFound = errors.length > 0 && errors.every(({ code }) => code === "NOT_FOUND");
  return isNotFound && !customer ? { outcome: "deleted" } : undefined;
}

/** Separates the customers that search can return from those that can only be looked up by id. */
function classifyCustomers(customers: LocalCustomer[], before: number) {
  const searchable: DatedCustomer[] = [];
  const others: string[] = [];
  for (const { id, createdAt, isSearchable } of customers) {
    const time = Date.parse(createdAt);
    // Zero and negative times were not written by Square either.
    const isDated = time > 0;
    if (isDated && isSearchable) searchable.push({ id, createdAt: time });
    else if (!isDated || time < before) others.push(id);
  }
  searchable.sort((a, b) => a.createdAt - b.createdAt);
  return { searchable, others };
}

/**
 * Divides a stretch near the middle of its customers, at a whole number of pages from its start.
 * Returns undefined if it holds no more than one page, or if all of its customers were created at
 * the same time.
 */
function divideStretch({ startAt, endAt, customers }: Stretch) {
  if (customers.length <= PAGE_SIZE) return undefined;
  const middle = Math.round(customers.length / 2 / PAGE_SIZE) * PAGE_SIZE;
  for (let distance = 0; distance < customers.length; distance++) {
    for (const index of [middle - distance, middle + distance]) {
      const before = customers[index - 1]?.createdAt;
      const after = customers[index]?.createdAt;
      if (before === undefined || after === undefined || after - before < 3) continue;
      // Square does not say whether a range includes its ends. No customer of the file was created
      // at these two moments, so each one is counted once. The halves overlap by a millisecond, so
      // that a customer that the file lacks is at least in one of them.
      const cut = before + Math.floor((after - before) / 2);
      return {
        left: { startAt, endAt: cut + 1, customers: customers.slice(0, index) },
        right: { startAt: cut, endAt, customers: customers.slice(index) },
      };
    }
  }
  return undefined;
}

function buildTimeRange({ startAt, endAt }: Stretch): Square.TimeRange {
  return {
    ...(startAt !== undefined && { startAt: formatTime(startAt) }),
    endAt: formatTime(endAt),
  };
}

/** Runs `action` for all items, at most `concurrency` at a time. */
async function forEachInParallel<T>(
  items: Iterable<T>,
  concurrency: number,
  action: (item: T) => Promise<void>,
): Promise<void> {
  const queue = yieldAll(items);
  async function work(): Promise<void> {
    // All workers take from the same generator. If one fails, its loop closes the generator, and
    // the others stop after their current item.
    for (const item of queue) await action(item);
  }
  await Promise.all(Array.from({ length: concurrency }, work));
}

function* yieldAll<T>(items: Iterable<T>): Generator<T> {
  yield* items;
}
