import { type Page, RefusedError, type SearchRequest, type Square } from "./client.ts";
import { EXIT, SyncError } from "./errors.ts";
import type { Customer } from "./mapping.ts";
import type { Window } from "./window.ts";

const PAGE_SIZE = 100; // the most that Square allows, and advisory
const RESTARTS = 3; // a cursor lives for minutes: when it dies so often, the window cannot be read
const READINGS = 3; // of a window in which fewer customers come than Square counted
const SMALL_SLICE = 1_000; // customers; to divide so few costs more requests than it saves
const OVERLAP_MS = 1_000; // Square does not say whether the ends of a time range are in it

export type TimeField = "created_at" | "updated_at";

/**
 * Yields the pages of one search, oldest customer first: the only order that does not move while
 * customers change. A customer can come twice; whoever collects them must tell them apart by id.
 * @throws SyncError when the search fails, or a cursor comes again
 */
export async function* searchPages(
  square: Square,
  filter: object,
  restarts = RESTARTS,
): AsyncGenerator<Page> {
  const sort = { field: "CREATED_AT", order: "ASC" } as const;
  // A cursor is bound to its query: the rest of the body stays the same to the letter.
  let body: SearchRequest = { limit: PAGE_SIZE, count: true, query: { filter, sort } };
  const cursors = new Set<string>();
  try {
    for (;;) {
      const page = await square.searchCustomers(body);
      yield page;
      // A short page is not the last one, and neither is an empty one. Only this is:
      const { cursor } = page;
      if (cursor === undefined) return;
      if (cursors.has(cursor))
        throw new SyncError("Cannot read all pages: Square sent one cursor twice", EXIT.failed);
      cursors.add(cursor);
      body = { ...body, cursor };
    }
  } catch (error) {
    // The same query was good enough for the first page: what Square refuses is the cursor's age.
    const isExpired = error instanceof RefusedError && error.exitCode === EXIT.failed;
    if (!isExpired || cursors.size === 0 || restarts === 0) throw error;
    yield* searchPages(square, filter, restarts - 1);
  }
}

/**
 * Reads a window in slices side by side, its pages in no order: a layer over {@linkcode searchPages}
 * that can be taken away. No customer's `created_at` ever changes, so slices of it hold every customer,
 * whatever the window looks at. Each slice is held to Square's count of it.
 * @param field what the window looks at
 * @param take is given each page's customers, and how many Square counts in the whole window
 * @returns how many customers Square counted and never sent
 */
export async function searchSlices(
  square: Square,
  field: TimeField,
  window: Window,
  take: (customers: Customer[], total: number) => void,
): Promise<number> {
  const { workers, fixedAt } = square; // one worker reads one slice, in order
  let total = 0;

  async function readSlice(slice: Window): Promise<{ ids: Set<unknown>; missing: number }> {
    // In pull-created both names are one, and the slice, which is a part of the window, takes its place.
    const filter = { [field]: toRange(window), created_at: toRange(slice) };
    const ids = new Set<unknown>();
    let counted = 0;
    for await (const { customers, cursor, count } of searchPages(square, filter)) {
      counted = Math.max(counted, count);
      total = Math.max(total, counted);
      for (const { id } of customers) ids.add(id);
      take(customers, total);
      const left = counted - ids.size;
      const isLarge = left > Math.max(SMALL_SLICE, total / (2 * workers));
      if (workers === 1 || cursor === undefined || !isLarge) continue;
      const halves = halve(slice, customers, left, fixedAt);
      if (halves.length === 0) continue;
      const below = await Promise.all(halves.map(readSlice));
      // Whom the halves brought counts here too: nobody else would miss who fell between the two.
      for (const half of below) for (const id of half.ids) ids.add(id);
      return { ids, missing: Math.max(counted - ids.size, ...below.map((half) => half.missing)) };
    }
    return { ids, missing: Math.max(counted - ids.size, 0) };
  }

  const whole = field === "created_at" ? window : { since: null, until: null };
  for (let reading = 1; ; reading++) {
    // Counted afresh each time: a deletion can move somebody over the edge of a page.
    const { missing } = await readSlice(whole);
    if (missing === 0 || reading === READINGS) return missing;
  }
}

/** Divides what follows a page of a slice in two that overlap a little, if there is room for two. */
function halve(slice: Window, page: Customer[], left: number, now: number): Window[] {
  const toMs = (place: number) => Date.parse(String(page.at(place)?.created_at));
  const last = toMs(-1);
  const end = slice.until === null ? now : Date.parse(slice.until);
  // In the middle of the time; or before it, where half of those left have come if all are as close
  // together as here: the middle of the time is long past the end of an import.
  const dense = ((last - toMs(0)) / page.length) * (left / 2);
  const cut = last + Math.max(Math.min(dense, (end - last) / 2), 2 * OVERLAP_MS);
  if (!(cut < end - OVERLAP_MS)) return [];
  const toText = (ms: number) => new Date(ms).toISOString();
  return [
    { since: toText(last - 1), until: toText(cut + OVERLAP_MS) },
    { since: toText(cut), until: slice.until },
  ];
}

// JSON leaves out what is undefined: an end that is open, a range that is all of time.
function toRange({ since, until }: Window): object | undefined {
  if (since === null && until === null) return undefined;
  return { start_at: since ?? undefined, end_at: until ?? undefined };
}
