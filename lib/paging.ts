/** Searches Square's customers page by page. Read `searchPages` first: it is the simple way. */
import type { Square, SquareClient } from "square";
import { SyncError } from "./internal/errors.ts";
import { readInParallel } from "./internal/parallel.ts";
import { findContentErrors } from "./internal/square-errors.ts";

/** The filter of a SearchCustomers request. */
export type Filter = Square.CustomerFilter;

/** One page of a search. A short or empty page is not always the last one. */
export interface Page {
  customers: Square.Customer[];
  /** How many customers match the filter, as Square counted them. */
  count: number;
  /** How many of them were not returned yet. After the last page, these customers are missing. */
  missingCount: number;
}

/** The most customers that Square returns on one page. */
export const PAGE_SIZE = 100;

// How often searchPages starts again because its cursor has expired.
const MAX_RESTARTS = 3;

// How often searchCustomers runs a search in total, if customers are missing.
const MAX_ATTEMPTS = 3;

/**
 * Requests one page of a search, oldest customer first.
 * @param cursor where to continue: the `cursor` of the previous page; undefined = the first page
 * @see https://developer.squareup.com/reference/square/customers-api/search-customers
 */
export async function requestPage(
  square: SquareClient,
  filter: Filter,
  cursor?: string,
): Promise<Square.SearchCustomersResponse> {
  return await square.customers.search({
    limit: BigInt(PAGE_SIZE),
    count: true,
    query: {
      filter,
      // Sort by creation time, because it never changes. Square's default order is by name. A
      // customer that is renamed during the search could move from a later page to a page that was
      // already read, and would be lost.
      sort: { field: "CREATED_AT", order: "ASC" },
    },
    ...(cursor !== undefined && { cursor }),
  });
}

/**
 * Yields the pages of one search, oldest customer first.
 * @throws SquareError when a request fails after all retries
 * @throws SyncError when Square returns the same cursor twice
 */
export async function* searchPages(square: SquareClient, filter: Filter): AsyncGenerator<Page> {
  const ids = new Set<string | undefined>();
  const cursors = new Set<string>();
  let cursor: string | undefined;
  let restarts = 0;
  let count = 0;

  while (true) {
    let response: Square.SearchCustomersResponse;
    try {
      // A cursor is only valid for its own query, so each request repeats the same query.
      response = await requestPage(square, filter, cursor);
    } catch (error) {
      // A cursor expires after a few minutes. Square has accepted the same query before, so if it
      // rejects the request now (content errors), the cursor has expired. Start again from the
      // first page. Yielding a customer twice is harmless, because callers collect customers by id.
      const isExpired = cursor !== undefined && findContentErrors(error) !== undefined;
      if (!isExpired || restarts === MAX_RESTARTS) throw error;
      restarts++;
      cursor = undefined;
      cursors.clear();
      continue;
    }

    const customers = response.customers ?? [];
    for (const { id } of customers) ids.add(id);
    // Square counts again for each page. If a customer is returned and then deleted, `ids` still
    // has it, and the next count does not. The smaller count could hide a missing customer, so keep
    // the largest one. Example: of 10 customers, A is returned and then deleted, and B is never
    // returned. The last count is 9, and `ids` has 9 entries, so none would seem missing.
    count = Math.max(count, Number(response.count ?? 0));
    yield { customers, count, missingCount: Math.max(count - ids.size, 0) };

    // Only a missing cursor marks the last page. A short or empty page can be followed by others.
    cursor = response.cursor || undefined;
    if (cursor === undefined) return;
    if (cursors.has(cursor))
      throw new SyncError("failed", "Cannot read all pages: Square returned the same cursor twice");
    cursors.add(cursor);
  }
}

/**
 * Yields the pages of a search like {@linkcode searchPages}, with two differences. It divides a
 * large result into slices of time and reads several of them at the same time, so the pages come in
 * any order. And if customers are missing at the end, it runs the whole search again, up to twice.
 * @param options.concurrency how many slices to read at the same time; 1 = do not divide the result
 * @param options.divideUntil the end of the time to divide, in milliseconds since 1970. Customers
 *   that were created later are returned too
 */
export async function* searchCustomers(
  square: SquareClient,
  filter: Filter,
  options: { concurrency: number; divideUntil: number },
): AsyncGenerator<Page> {
  for (let attempt = 1; attempt <= MAX_ATTEMPTS; attempt++) {
    // Each attempt is a new search with its own count, so begin with 0 again. readInParallel adds
    // up the slices, so each of its pages has the missing count of the whole search so far.
    let missingCount = 0;
    const pages =
      options.concurrency === 1
        ? searchPages(square, filter)
        : readInParallel((sliceFilter) => searchPages(square, sliceFilter), filter, options);
    for await (const page of pages) {
      missingCount = page.missingCount;
      yield page;
    }
    // If a customer is deleted during a search, the customers after it move up by one place. One of
    // them can move to a page that was already read. The next attempt returns it.
    if (missingCount === 0) return;
  }
}
