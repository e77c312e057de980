/** Searches Square's customers page by page. Read `searchPages` first: it is the simple way. */
import type { Square, SquareClient } from "square";
import { SyncError } from "./internal/errors.ts";
import { findContentErrors } from "./internal/square-errors.ts";
import { readInParallel } from "./parallel.ts";

export type Filter = Square.CustomerFilter;

export interface Page {
  customers: Square.Customer[];
  /** How many customers match the filter, as Square counted them. */
  count: number;
}

const MAX_RESTARTS = 3; // of a search whose cursor has expired
const MAX_ATTEMPTS = 3; // to read all customers that Square counted

/**
 * Requests one page of a search, oldest customer first.
 * @param options.limit 100 is the most that Square accepts
 * @see https://developer.squareup.com/reference/square/customers-api/search-customers
 */
export async function requestPage(
  square: SquareClient,
  filter: Filter,
  { cursor, limit = 100 }: { cursor?: string | undefined; limit?: number } = {},
): Promise<Square.SearchCustomersResponse> {
  return await square.customers.search({
    limit: BigInt(limit),
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

/** Yields the pages of one search, oldest customer first. */
export async function* searchPages(square: SquareClient, filter: Filter): AsyncGenerator<Page> {
  const cursors = new Set<string>();
  let cursor: string | undefined;
  let restarts = 0;
  for (;;) {
    // A cursor is only valid for its own query, so each request repeats the same query.
    const response = await requestPage(square, filter, { cursor }).catch((error) => {
      // A cursor expires after a few minutes. Square has accepted the same query before, so if it
      // rejects the request now (content errors), the cursor has expired. Start again from the
      // first page. Yielding a customer twice is harmless, because callers collect customers by id.
      const isExpired = cursor !== undefined && findContentErrors(error) !== undefined;
      if (!isExpired || restarts === MAX_RESTARTS) throw error;
      restarts++;
      cursors.clear();
      return requestPage(square, filter);
    });
    yield { customers: response.customers ?? [], count: Number(response.count ?? 0) };
    // Only a missing cursor marks the last page. A short or empty page can be followed by others.
    cursor = response.cursor || undefined;
    if (cursor === undefined) return;
    if (cursors.has(cursor))
      throw new SyncError(
        "failed",
        "Cannot read all pages: Square returned the same cursor twice",
        "run it again; nothing was saved",
      );
    cursors.add(cursor);
  }
}

/**
 * Yields the pages of a search like {@linkcode searchPages}, with two differences. It divides a
 * large result into slices of time and reads several of them at the same time, so the pages come in
 * any order. And if customers are missing at the end, it runs the whole search again, up to twice.
 * @param options.concurrency how many slices to read at the same time; 1 = do not divide the result
 * @param options.divideUntil the end of the time to divide. Later customers are returned too
 * @returns pages, each with how many customers Square has counted and not returned so far
 */
export async function* searchCustomers(
  square: SquareClient,
  filter: Filter,
  options: { concurrency: number; divideUntil: number },
): AsyncGenerator<Page & { missingCount: number }> {
  for (let attempt = 1; attempt <= MAX_ATTEMPTS; attempt++) {
    const ids = new Set<string | undefined>();
    let count = 0;
    const pages =
      options.concurrency === 1
        ? searchPages(square, filter)
        : readInParallel((slice) => searchPages(square, slice), filter, options);
    for await (const page of pages) {
      for (const { id } of page.customers) ids.add(id);
      // Square counts again for each page. If a customer is returned and then deleted, `ids` still
      // has it, and the next count does not. The smaller count could hide a missing customer, so
      // keep the largest one. A slice has a smaller count than the whole search.
      count = Math.max(count, page.count);
      yield { customers: page.customers, count, missingCount: Math.max(count - ids.size, 0) };
    }
    if (ids.size >= count) return;
    // If a customer is deleted during a search, the customers after it move up by one place. One of
    // them can move to a page that was already read. The next attempt returns it.
  }
}
