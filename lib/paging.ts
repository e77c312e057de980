/** Searches Square's customers page by page. Read `searchPages` first: it is the whole idea. */
import type { Square, SquareClient } from "square";
import { SyncError } from "./internal/errors.ts";
import { readInParallel } from "./internal/parallel.ts";
import { findRejection } from "./internal/square-errors.ts";

/** The filter of a SearchCustomers request. */
export type Filter = Square.CustomerFilter;

/** One page of a search. It can be short or empty and still not be the last one. */
export interface Page {
  customers: Square.Customer[];
  /** How many customers match, as Square counted them. */
  count: number;
  /** How many of them have not been returned yet. If it is not 0 after the last page, customers are missing. */
  missingCount: number;
}

const PAGE_SIZE = 100n; // the most that Square allows
const MAX_RESTARTS = 3; // after an expired cursor
const MAX_READINGS = 3; // of a search that returns fewer customers than Square counts

/**
 * Yields the pages of one search, oldest customer first.
 * @throws SquareError when a request fails after all retries
 * @throws SyncError when Square returns the same cursor twice
 * @see https://developer.squareup.com/reference/square/customers-api/search-customers
 */
export async function* searchPages(square: SquareClient, filter: Filter): AsyncGenerator<Page> {
  // By creation time, because it never changes. In Square's default order, by name, a customer that is renamed
  // during the search can move from a page that is still to come to one that was read already.
  const query: Square.CustomerQuery = { filter, sort: { field: "CREATED_AT", order: "ASC" } };
  const ids = new Set<string | undefined>();
  const cursors = new Set<string>();
  let cursor: string | undefined;
  let restarts = 0;
  let count = 0;

  while (true) {
    let response: Square.SearchCustomersResponse;
    try {
      // A cursor belongs to its query, so every request repeats the same query.
      response = await square.customers.search({
        limit: PAGE_SIZE,
        count: true,
        query,
        ...(cursor !== undefined && { cursor }),
      });
    } catch (error) {
      // A cursor expires after a few minutes. Square accepted the same query before, so a rejection now means
      // that the cursor has expired. Start again from the first page: a customer that comes twice is harmless.
      const isExpired = cursor !== undefined && findRejection(error) !== undefined;
      if (!isExpired || restarts === MAX_RESTARTS) throw error;
      restarts++;
      cursor = undefined;
      cursors.clear();
      continue;
    }

    const customers = response.customers ?? [];
    for (const { id } of customers) ids.add(id);
    // Square counts again with every page. The largest count includes a customer that was deleted since.
    count = Math.max(count, Number(response.count ?? 0));
    yield { customers, count, missingCount: Math.max(count - ids.size, 0) };

    // Only a missing cursor ends the search. A page that is short or empty does not.
    cursor = response.cursor || undefined;
    if (cursor === undefined) return;
    if (cursors.has(cursor))
      throw new SyncError("failed", "Cannot read all pages: Square returned the same cursor twice");
    cursors.add(cursor);
  }
}

/**
 * Yields the pages of a search like {@linkcode searchPages}, but reads several parts of a large result at the
 * same time, and reads everything again, up to twice, when customers are missing. The pages come in any order.
 * @param options.concurrency how many parts to read at the same time; 1 = one after the other, oldest first
 * @param options.until the end of the time in which customers can have been created, in ms since 1970
 */
export async function* searchCustomers(
  square: SquareClient,
  filter: Filter,
  options: { concurrency: number; until: number },
): AsyncGenerator<Page> {
  for (let reading = 1; reading <= MAX_READINGS; reading++) {
    let missingCount = 0;
    const pages =
      options.concurrency === 1
        ? searchPages(square, filter)
        : readInParallel((part) => searchPages(square, part), filter, options);
    for await (const page of pages) {
      missingCount = page.missingCount;
      yield page;
    }
    // Square counted each reading again. A customer that was deleted during the search can move another one
    // across the edge of a page, and the next reading finds it.
    if (missingCount === 0) return;
  }
}
