/**
 * Reads a search in parts, several at the same time. A cursor can only be followed one page after the other, so
 * a large result is divided by creation time. Every customer falls into a part, because `created_at` never
 * changes, whatever else the filter looks at. This layer can be deleted: `searchPages` alone reads the same.
 */
import type { Square } from "square";
import { formatTime } from "./time.ts";

const SMALL_PART = 1_000; // customers; dividing a smaller part costs more requests than it saves
const EDGE_MS = 1_000; // the parts overlap by this much, because Square does not say whether the ends belong

/** One page of a search, as `searchPages` yields it. */
interface Page {
  customers: Square.Customer[];
  count: number;
  missingCount: number;
}

type Filter = Square.CustomerFilter;
type TimeRange = Square.TimeRange;
type Ids = Set<string | undefined>;

/**
 * Yields the pages of a search in any order, and at the end an empty page with the final missing count.
 * @param search reads one part, page by page
 * @param options.concurrency how many parts to aim for
 * @param options.until the end of the time in which customers can have been created, in ms since 1970
 */
export async function* readInParallel(
  search: (filter: Filter) => AsyncGenerator<Page>,
  filter: Filter,
  options: { concurrency: number; until: number },
): AsyncGenerator<Page> {
  let total = 0; // customers that Square counts in the whole search
  const returned: Ids = new Set();

  /** Reads a part, and divides what is left of it when that is a lot. */
  async function readPart(
    range: TimeRange,
    emit: (page: Page) => void,
  ): Promise<{ ids: Ids; missingCount: number }> {
    const ids: Ids = new Set();
    let missingCount = 0;
    for await (const page of search({ ...filter, createdAt: range })) {
      total = Math.max(total, page.count);
      for (const { id } of page.customers) {
        ids.add(id);
        returned.add(id);
      }
      missingCount = page.missingCount;
      emit({ ...page, count: total, missingCount: Math.max(total - returned.size, 0) });
      const isLarge = missingCount > Math.max(SMALL_PART, total / (2 * options.concurrency));
      const halves = isLarge ? divideRest(range, page.customers, missingCount, options.until) : [];
      if (halves.length === 0) continue;
      const results = await Promise.all(halves.map((half) => readPart(half, emit)));
      // Ids of the halves count here too. Otherwise a customer between the two halves would not be missed.
      for (const result of results) for (const id of result.ids) ids.add(id);
      missingCount = Math.max(page.count - ids.size, ...results.map((half) => half.missingCount));
      return { ids, missingCount };
    }
    return { ids, missingCount };
  }

  const stream = new ReadableStream<Page>({
    start(controller) {
      readPart(filter.createdAt ?? {}, (page) => controller.enqueue(page)).then(
        ({ missingCount }) => {
          controller.enqueue({ customers: [], count: total, missingCount });
          controller.close();
        },
        (error) => controller.error(error),
      );
    },
  });
  const reader = stream.getReader();
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

/** Divides what follows a page into two ranges of time that overlap a little, if there is room for two. */
function divideRest(
  range: TimeRange,
  page: Square.Customer[],
  rest: number,
  until: number,
): TimeRange[] {
  const first = Date.parse(page.at(0)?.createdAt ?? "");
  const last = Date.parse(page.at(-1)?.createdAt ?? "");
  const { endAt } = range;
  const end = endAt ? Date.parse(endAt) : until;
  // Half of the time; or less, when customers are as dense as on this page and half of the rest comes sooner. The
  // middle of the time would be long after an import that created most customers within a day.
  const halfOfRestMs = ((last - first) / page.length) * (rest / 2);
  const cut = last + Math.max(Math.min(halfOfRestMs, (end - last) / 2), 2 * EDGE_MS);
  if (!(cut < end - EDGE_MS)) return [];
  return [
    { startAt: formatTime(last - 1), endAt: formatTime(cut + EDGE_MS) },
    { startAt: formatTime(cut), ...(endAt && { endAt }) },
  ];
}
