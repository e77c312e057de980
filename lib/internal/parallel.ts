/**
 * Reads a large search faster than page by page. The cursor of a page leads only to the next page,
 * so one search cannot be read in parallel. Instead, its range of creation times is divided into
 * slices, and each slice is a search with its own cursor. Every customer is in a slice, because its
 * `created_at` never changes.
 *
 * This layer can be deleted: `searchPages` alone returns the same customers.
 */
import type { Square } from "square";
import { formatTime } from "./time.ts";

// The number of customers above which the rest of a slice is divided. Dividing a smaller rest costs
// more requests than it saves.
const SMALL_SLICE = 1_000;

// The overlap of two slices. Square does not document whether a time range includes its ends.
const SLICE_OVERLAP_MS = 1_000;

/** One page of a search, as `searchPages` yields it. */
interface Page {
  customers: Square.Customer[];
  count: number;
  /** How many of the counted customers have not been returned so far. After the last page, they are missing. */
  missingCount: number;
}

type Filter = Square.CustomerFilter;
type TimeRange = Square.TimeRange;
type Ids = Set<string | undefined>;

/**
 * Yields the pages of a search in any order, and then an empty page with the final missing count.
 * @param search reads one slice page by page, oldest customer first
 * @param options.concurrency into how many slices a large search is divided, approximately
 * @param options.createdBefore a time, in ms since 1970, after which no customer of the search was
 *   created. It is the end of the range to divide if the filter has no end
 */
export async function* readInParallel(
  search: (filter: Filter) => AsyncGenerator<Page>,
  filter: Filter,
  options: { concurrency: number; createdBefore: number },
): AsyncGenerator<Page> {
  // The largest count of any slice. The first slice is the whole search, so this is its count.
  let total = 0;
  const allIds: Ids = new Set();

  /**
   * Reads a slice. If many customers remain after a page, it divides the rest into two slices, and
   * reads these instead of the next pages.
   */
  async function readSlice(
    range: TimeRange,
    emit: (page: Page) => void,
  ): Promise<{ ids: Ids; missingCount: number }> {
    const ids: Ids = new Set();
    let sliceMissing = 0;
    for await (const page of search({ ...filter, createdAt: range })) {
      total = Math.max(total, page.count);
      for (const { id } of page.customers) {
        ids.add(id);
        allIds.add(id);
      }
      sliceMissing = page.missingCount;
      const overallMissing = Math.max(total - allIds.size, 0);
      emit({ customers: page.customers, count: total, missingCount: overallMissing });

      // Divide a slice if more than this is left in it. Half of an equal share keeps all requests
      // busy until the end.
      const maxUndividedRest = Math.max(SMALL_SLICE, total / (2 * options.concurrency));
      if (sliceMissing <= maxUndividedRest) continue;
      const slices = divideRest(range, page.customers, sliceMissing, options.createdBefore);
      if (slices.length === 0) continue;
      const results = await Promise.all(slices.map((slice) => readSlice(slice, emit)));
      // Compare the count of this slice with the ids of its page and of both new slices. Otherwise
      // a customer that neither of the two returned would not be noticed.
      for (const result of results) for (const id of result.ids) ids.add(id);
      const missingCounts = results.map(({ missingCount }) => missingCount);
      // The two new slices have read the rest, so the next pages of this search are not needed.
      return { ids, missingCount: Math.max(page.count - ids.size, ...missingCounts) };
    }
    return { ids, missingCount: sliceMissing };
  }

  // Several slices emit pages at the same time. The stream is the queue from which they are
  // yielded.
  yield* new ReadableStream<Page>({
    start(controller) {
      readSlice(filter.createdAt ?? {}, (page) => controller.enqueue(page)).then(
        ({ missingCount }) => {
          controller.enqueue({ customers: [], count: total, missingCount });
          controller.close();
        },
        (error) => controller.error(error),
      );
    },
  });
}

/**
 * Divides the time after a page into two slices that overlap.
 * @param rest how many customers of the range follow the page
 * @returns no slices if the time is too short for two
 */
function divideRest(
  range: TimeRange,
  page: Square.Customer[],
  rest: number,
  createdBefore: number,
): TimeRange[] {
  const first = Date.parse(page.at(0)?.createdAt ?? "");
  const last = Date.parse(page.at(-1)?.createdAt ?? "");
  const { endAt } = range;
  const end = endAt ? Date.parse(endAt) : createdBefore;

  // Estimate where half of the rest ends, as if the rest were as dense as this page. Cut there, but
  // not after the middle of the time. After an import that created most customers within a day, the
  // middle of the time would leave nearly all of them in the first slice.
  const halfOfRestMs = ((last - first) / page.length) * (rest / 2);
  const halfOfTimeMs = (end - last) / 2;
  const cut = last + Math.max(Math.min(halfOfRestMs, halfOfTimeMs), 2 * SLICE_OVERLAP_MS);
  // An empty page, or a customer without a time, makes the cut NaN. Then there is no room either.
  const hasRoom = cut < end - SLICE_OVERLAP_MS;
  if (!hasRoom) return [];
  return [
    // Start 1 ms before the last customer of the page. Others can have the same creation time, and
    // a range may not include its start.
    { startAt: formatTime(last - 1), endAt: formatTime(cut + SLICE_OVERLAP_MS) },
    { startAt: formatTime(cut), ...(endAt && { endAt }) },
  ];
}
