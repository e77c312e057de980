/**
 * Finds customers that were deleted or merged in Square.
 *
 * Square does not report deletions: a deleted customer only stops appearing in search. Reading all
 * customers in each run would find it, but takes one request for each 100 customers. Counting takes
 * fewer:
 *
 *   1. Ask Square how many customers it has. If the file has as many, one request was enough.
 *   2. If not, divide the customers into two slices by creation time, and ask for the count of
 *      each. Divide each slice whose count differs again, until it has only one or a few pages.
 *   3. Read these pages, and compare their ids with the ids in the file.
 *   4. Look up each id that search did not return. Only the answer to this request decides whether
 *      the customer was deleted.
 *
 * If the file lacks one customer and Square another, the counts are equal and hide both. A later
 * pull adds the customer that the file lacks. Then the counts differ.
 */
import type { Square, SquareClient } from "square";
import type { LiveCustomer } from "./customers.ts";
import { SyncError } from "./internal/errors.ts";
import { isContentRejected, readErrors } from "./internal/square-errors.ts";
import { formatTime } from "./internal/time.ts";
import { type Filter, PAGE_SIZE, requestPage, searchPages } from "./paging.ts";
import { buildTimeRange } from "./window.ts";

// BulkRetrieveCustomers accepts at most this many ids in one request.
const MAX_IDS = 100;

// Dividing a slice takes about 3 requests for each customer that only one side has. Reading it
// takes one request for each page. A slice of at most 8 pages is read if that takes fewer requests.
// A larger one is always divided, because the differing customers are often next to each other, for
// example after a wrong import was deleted.
const SMALL_SLICE_PAGES = 8;
const REQUESTS_PER_DIFFERENCE = 3;

export interface Comparison {
  /** How many customers of the file were compared. */
  checked: number;
  /** Ids of the file that search did not return. `lookUpCustomers` finds out why. */
  missingInSearch: string[];
  /**
   * Ids that search returned and that the file does not have. Search can still return a customer
   * that was just deleted, so look these ids up as well.
   */
  missingInFile: string[];
}

/** What the functions of a comparison share, and the ids that they find. */
interface ComparisonRun {
  square: SquareClient;
  filter: Filter;
  /** The ids of all live customers of the file. */
  liveIds: ReadonlySet<string>;
  missingInSearch: string[];
  missingInFile: Set<string>;
}

/** What Square returns for one id. */
export type LookUp =
  | { outcome: "deleted" }
  /** Merged into `customer`. If that one was merged too, `customer` is the last of the chain. */
  | { outcome: "merged"; mergedInto: string; customer: Square.Customer }
  /** Square has the customer, although search may not return it. */
  | { outcome: "present"; customer: Square.Customer };

/** A range of creation times, and the customers of the file in it. */
interface Slice {
  /** In milliseconds since 1970; undefined = from the beginning. */
  startAt: number | undefined;
  endAt: number;
  /** The searchable customers of the file, oldest first. */
  customers: DatedCustomer[];
}

interface DatedCustomer {
  id: string;
  /** In milliseconds since 1970. */
  createdAt: number;
}

/** A customer that search does not return, or whose row has no valid `created_at`. */
interface CustomerToLookUp {
  id: string;
  createdAt: number | undefined;
}

interface CountedSlice extends Slice {
  /** How many customers Square has in this range. */
  count: number;
}

/**
 * Compares the customers of the file with Square's. It only searches, and changes nothing.
 * @param customers all live customers of the file, including those created after `createdBefore`
 * @param options.createdBefore compares only customers created before this time, in milliseconds
 *   since 1970. Search may not return a customer that was created a moment ago
 * @param options.concurrency how many slices are counted or read at the same time
 * @param options.filter counts only customers of Square that match these conditions. Use the filter
 *   of the pulls: otherwise, customers that the pulls leave out count as missing in the file
 */
export async function compareWithSquare(
  square: SquareClient,
  customers: LiveCustomer[],
  options: { createdBefore: number; concurrency: number; filter?: Filter },
): Promise<Comparison> {
  const { createdBefore, concurrency, filter = {} } = options;
  const { searchable, toLookUp } = classifyCustomers(customers);
  // Square does not document whether a range includes its end. So choose an end at which no
  // customer of the file was created.
  const times = new Set(searchable.map(({ createdAt }) => createdAt));
  let endAt = createdBefore;
  while (times.has(endAt)) endAt--;
  const whole: Slice = {
    startAt: undefined,
    endAt,
    customers: searchable.filter(({ createdAt }) => createdAt < endAt),
  };
  // The customers that cannot be compared in slices are looked up by id in each run.
  const idsToLookUp = toLookUp
    .filter(({ createdAt }) => createdAt === undefined || createdAt < createdBefore)
    .map(({ id }) => id);

  const run: ComparisonRun = {
    square,
    filter,
    liveIds: new Set(customers.map(({ id }) => id)),
    missingInSearch: [...idsToLookUp],
    missingInFile: new Set(),
  };

  // Begin with all customers. Then process all halves, then all quarters, and so on, each level
  // from one queue. If each slice started its own halves, the number of requests at the same time
  // would double with each level, and cursors would expire while they wait.
  const { count, isDone } = await countSlice(run, whole);
  let slices: CountedSlice[] = isDone ? [] : [{ ...whole, count }];
  while (slices.length > 0) {
    const nextSlices: CountedSlice[] = [];
    await forEachInParallel(slices, concurrency, async (slice) => {
      nextSlices.push(...(await readOrDivide(run, slice)));
    });
    slices = nextSlices;
  }

  return {
    checked: whole.customers.length + idsToLookUp.length,
    missingInSearch: run.missingInSearch,
    missingInFile: [...run.missingInFile],
  };
}

/**
 * Asks for the count of a slice. The reply also has the first page. If the slice has only that
 * page, its ids are compared as well, and `isDone` is true.
 */
async function countSlice(
  run: ComparisonRun,
  slice: Slice,
): Promise<{ count: number; isDone: boolean }> {
  const response = await requestPage(run.square, buildFilter(run.filter, slice));
  const page = response.customers ?? [];
  const isDone = !response.cursor;
  if (isDone) compareIds(run, slice, page);
  // An empty result has no count.
  return { count: Number(response.count ?? page.length), isDone };
}

/**
 * Reads or divides a slice whose counts differ. Does nothing if they are equal.
 * @returns the slices into which it was divided and that are not done yet
 */
async function readOrDivide(run: ComparisonRun, slice: CountedSlice): Promise<CountedSlice[]> {
  const difference = Math.abs(slice.count - slice.customers.length);
  if (difference === 0) return [];
  const pages = Math.ceil(slice.count / PAGE_SIZE);
  const isReadFaster = pages <= SMALL_SLICE_PAGES && pages <= difference * REQUESTS_PER_DIFFERENCE;
  const halves = isReadFaster ? undefined : divideSlice(slice);
  if (halves === undefined) {
    await readSlice(run, slice);
    return [];
  }
  const { older, newer } = halves;
  const { count, isDone } = await countSlice(run, older);
  // The count of the newer slice is the rest. divideSlice lets the two slices share a millisecond.
  // A customer in it is counted in the older slice only. That is enough: if the file lacks the
  // customer, the count of the older slice differs, and its ids are compared.
  const countedNewer = { ...newer, count: slice.count - count };
  return isDone ? [countedNewer] : [{ ...older, count }, countedNewer];
}

/**
 * Reads all pages of a slice, and compares their ids. Square can return fewer customers than it
 * counts. A customer of the file that is missing for this reason is looked up, so it is not marked
 * as deleted. A customer that the file does not have is found by a later run.
 */
async function readSlice(run: ComparisonRun, slice: Slice): Promise<void> {
  const returned: Square.Customer[] = [];
  for await (const page of searchPages(run.square, buildFilter(run.filter, slice)))
    returned.push(...page.customers);
  compareIds(run, slice, returned);
}

/** Adds the ids that only one side has to the run. `returned` is the whole slice in Square. */
function compareIds(run: ComparisonRun, slice: Slice, returned: Square.Customer[]): void {
  const returnedIds = new Set(returned.map(({ id }) => id));
  for (const { id } of slice.customers) if (!returnedIds.has(id)) run.missingInSearch.push(id);
  // A row with a wrong `created_at` is in another slice. So compare with the ids of the whole file.
  for (const { id } of returned)
    if (id !== undefined && !run.liveIds.has(id)) run.missingInFile.add(id);
}

/**
 * Looks up customers by id.
 * @throws SyncError if Square returns neither a customer nor NOT_FOUND for an id, because nothing
 *   can be concluded from that: (failed) if Square rejects the id, (temporary) for any other answer
 * @see https://developer.squareup.com/reference/square/customers-api/bulk-retrieve-customers
 */
export async function lookUpCustomers(
  square: SquareClient,
  ids: string[],
): Promise<Map<string, LookUp>> {
  const uniqueIds = [...new Set(ids)];
  const lookUps = new Map<string, LookUp>();
  const rejected: string[] = [];
  const unclear: string[] = [];

  for (let start = 0; start < uniqueIds.length; start += MAX_IDS) {
    const customerIds = uniqueIds.slice(start, start + MAX_IDS);
    const { responses } = await square.customers.bulkRetrieveCustomers({ customerIds });
    for (const id of customerIds) {
      const answer = classifyAnswer(id, responses?.[id]);
      if (answer === "rejected") rejected.push(id);
      else if (answer === "unclear") unclear.push(id);
      else lookUps.set(id, answer);
    }
  }

  const message =
    `Cannot look up customers in Square: no clear answer for ${rejected.length + unclear.length} of ` +
    `${uniqueIds.length} ids`;
  if (rejected.length > 0)
    throw new SyncError(
      "failed",
      `${message}, for example ${rejected[0]}, which Square rejects`,
      "correct that id in the file",
    );
  if (unclear.length > 0)
    throw new SyncError("temporary", `${message}, for example ${unclear[0]}`, "run it again later");
  return lookUps;
}

function classifyAnswer(
  id: string,
  answer: Square.GetCustomerResponse | undefined,
): LookUp | "rejected" | "unclear" {
  const customer = answer?.customer;
  const errors = readErrors(answer);
  if (customer?.id && errors.length === 0)
    return customer.id === id
      ? { outcome: "present", customer }
      : { outcome: "merged", mergedInto: customer.id, customer };
  // A reply with both a customer and errors contradicts itself.
  if (customer || errors.length === 0) return "unclear";
  if (errors.every(({ code }) => code === "NOT_FOUND")) return { outcome: "deleted" };
  return isContentRejected(errors) ? "rejected" : "unclear";
}

/** Separates the customers that search can return, oldest first, from those to look up by id. */
function classifyCustomers(customers: LiveCustomer[]) {
  const searchable: DatedCustomer[] = [];
  const toLookUp: CustomerToLookUp[] = [];
  for (const { id, createdAt: text, isSearchable } of customers) {
    const time = Date.parse(text);
    // Not valid: a text that is not a time (NaN), and a time before 1970, which cannot come from
    // Square.
    const createdAt = time > 0 ? time : undefined;
    if (createdAt !== undefined && isSearchable) searchable.push({ id, createdAt });
    else toLookUp.push({ id, createdAt });
  }
  searchable.sort((a, b) => a.createdAt - b.createdAt);
  return { searchable, toLookUp };
}

// A gap of this length has room for the ends of both slices. See the example in divideSlice.
const MIN_GAP_MS = 3;

/**
 * Divides a slice near the middle of its customers.
 * @returns undefined if the slice has at most one page of customers, or if their creation times are
 *   too close to each other
 */
function divideSlice({ startAt, endAt, customers }: Slice) {
  const gap = findGapNearMiddle(customers);
  if (gap === undefined) return undefined;
  const { index, lastOlder, firstNewer } = gap;
  // The older slice ends 1 ms after the newer one starts. So a customer that only Square has is in
  // at least one of them, whether or not Square includes the ends of a range. No customer of the
  // file is in both, because both ends lie in the gap. Example: the gap is from 0 to 3 ms, so the
  // newer slice starts at 1, and the older one ends at 2.
  const start = lastOlder + Math.floor((firstNewer - lastOlder) / 2);
  return {
    older: { startAt, endAt: start + 1, customers: customers.slice(0, index) },
    newer: { startAt: start, endAt, customers: customers.slice(index) },
  };
}

/**
 * Finds the gap nearest to the middle: a place where two customers were created at least 3 ms
 * apart. Starts where the older customers fill whole pages, so that reading them needs no
 * half-empty page, and goes outwards from there.
 */
function findGapNearMiddle(customers: DatedCustomer[]) {
  if (customers.length <= PAGE_SIZE) return undefined;
  const middle = Math.round(customers.length / 2 / PAGE_SIZE) * PAGE_SIZE;
  for (let distance = 0; distance < customers.length; distance++) {
    for (const index of [middle - distance, middle + distance]) {
      const lastOlder = customers[index - 1]?.createdAt;
      const firstNewer = customers[index]?.createdAt;
      const isInside = lastOlder !== undefined && firstNewer !== undefined;
      if (isInside && firstNewer - lastOlder >= MIN_GAP_MS) return { index, lastOlder, firstNewer };
    }
  }
  return undefined;
}

/** Sets the range of a slice in a filter. */
function buildFilter(filter: Filter, { startAt, endAt }: Slice): Filter {
  const since = startAt === undefined ? null : formatTime(startAt);
  return { ...filter, createdAt: buildTimeRange({ since, until: formatTime(endAt) }) };
}

/** Runs `action` for all items, at most `concurrency` at the same time. */
async function forEachInParallel<T extends object>(
  items: readonly T[],
  concurrency: number,
  action: (item: T) => Promise<void>,
): Promise<void> {
  const queue = [...items];
  async function work(): Promise<void> {
    for (let item = queue.shift(); item !== undefined; item = queue.shift()) await action(item);
  }
  try {
    await Promise.all(Array.from({ length: concurrency }, work));
  } finally {
    // After an error, the other workers finish their current item and find the queue empty.
    queue.length = 0;
  }
}
