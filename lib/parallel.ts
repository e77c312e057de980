/**
 * Reads a large search faster than page by page. A cursor leads only to the next page, so the range
 * of creation times is divided into slices, and each slice is a search with its own cursor. Every
 * customer is in a slice, because its `created_at` never changes.
 *
 * This layer can be deleted: `searchPages` alone returns the same customers.
 */
import type { Filter, Page } from "./paging.ts";
import { formatTime } from "./window.ts";

// Dividing a slice with fewer customers costs more requests than it saves.
const SMALL_SLICE = 1_000;

// Slices overlap, because Square does not document whether a time range includes its ends.
const SLICE_OVERLAP_MS = 1_000;

/**
 * Yields the pages of a search in any order. A page has the count of its own slice.
 * @param search reads one slice page by page, oldest customer first
 * @param options.concurrency a large search is divided into about twice as many slices
 * @param options.divideUntil the end of the time to divide, if the filter has no end
 */
export async function* readInParallel(
  search: (filter: Filter) => AsyncGenerator<Page>,
  filter: Filter,
  options: { concurrency: number; divideUntil: number },
): AsyncGenerator<Page> {
  let total = 0; // The first slice is the whole search.

  // If many customers remain after a page, divides the rest into two slices, and reads these instead
  // of the next pages.
  async function readSlice(slice: Filter, emit: (page: Page) => void): Promise<void> {
    let returned = 0;
    for await (const page of search(slice)) {
      emit(page);
      total = Math.max(total, page.count);
      returned += page.customers.length;
      // Divide a slice until at most half of total / concurrency remains in it. With larger slices,
      // one that has more customers than estimated would be read alone at the end.
      const rest = page.count - returned;
      const isLarge = rest > Math.max(SMALL_SLICE, total / (2 * options.concurrency));
      const ranges = isLarge ? divideRest(slice, page, rest, options.divideUntil) : [];
      if (ranges.length > 0) {
        await Promise.all(ranges.map((createdAt) => readSlice({ ...slice, createdAt }, emit)));
        return;
      }
    }
  }

  // Several slices emit pages at the same time. The stream is the queue that yields them.
  yield* new ReadableStream<Page>({
    start(controller) {
      readSlice(filter, (page) => controller.enqueue(page)).then(
        () => controller.close(),
        (error) => controller.error(error),
      );
    },
  });
}

/**
 * Divides the time after a page into two slices that overlap.
 * @returns no slices if the time is too short for two
 */
function divideRest(slice: Filter, { customers }: Page, rest: number, divideUntil: number) {
  const firstTime = customers.at(0)?.createdAt;
  const lastTime = customers.at(-1)?.createdAt;
  if (!firstTime || !lastTime) return []; // The page is empty.
  const first = Date.parse(firstTime);
  const last = Date.parse(lastTime);
  const endAt = slice.createdAt?.endAt;
  const end = endAt ? Date.parse(endAt) : divideUntil;

  // Estimate where half of the rest ends, as if the rest were as dense as this page. The middle of
  // the time alone would be a bad place: after an import, most customers can be in the first day,
  // and nearly all of them would be in the first slice.
  const halfOfRestMs = ((last - first) / customers.length) * (rest / 2);
  // The rest can be less dense than this page. So cut at the middle of the time at the latest.
  const firstSliceMs = Math.min(halfOfRestMs, (end - last) / 2);
  // The first slice must be longer than the overlap, or the two slices would be nearly the same.
  const cut = last + Math.max(firstSliceMs, 2 * SLICE_OVERLAP_MS);
  if (cut >= end - SLICE_OVERLAP_MS) return [];
  return [
    // Start 1 ms before the last customer of the page. Others can have the same creation time, and
    // a range may not include its start.
    { startAt: formatTime(last - 1), endAt: formatTime(cut + SLICE_OVERLAP_MS) },
    { startAt: formatTime(cut), ...(endAt && { endAt }) },
  ];
}
