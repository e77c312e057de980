import type { Page, Square } from "./client.ts";
import { RefusedError } from "./client.ts";
import { EXIT, SyncError } from "./errors.ts";
import { type Customer, toTime } from "./mapping.ts";
import type { Window } from "./window.ts";

const PAGE_SIZE = 100; // the most that Square allows; advisory: a page may hold fewer
const RESTARTS = 3; // a cursor lives for minutes; one that dies three times will not do
const READINGS = 3; // how often a window is read when fewer customers arrive than Square counted
const SMALL = 500; // customers: less is not worth dividing
const SLICES_PER_WORKER = 4; // so that no worker is left alone with a long last slice
const OVERLAP_MS = 1_000; // whether the ends of a time range are in it, Square does not say

type TimeRange = { start_at?: string; end_at?: string };

/** What a search asks for. Filters are ANDed. */
export interface Filter {
  created_at?: TimeRange;
  updated_at?: TimeRange;
}

/** A page, and how many customers Square counted in its slice that never arrived. */
export type SlicePage = Page & { missing: number };

/**
 * Yields the pages of one search, oldest customer first: the only order that does not move while
 * customers are edited. Customers can come twice; whoever collects them must tell them apart by id.
 * @throws SyncError when a cursor comes again, or the search fails
 */
export async function* searchPages(square: Square, filter: Filter): AsyncGenerator<Page> {
  const query = { filter, sort: { field: "CREATED_AT", order: "ASC" } };
  const cursors = new Set<string>();
  let cursor: string | undefined;
  for (let restarts = 0; ; ) {
    let page: Page;
    try {
      // A cursor is bound to its query: the body must stay the same to the letter.
      const body = { limit: PAGE_SIZE, count: true, query };
      page = await square.searchCustomers(cursor === undefined ? body : { ...body, cursor });
    } catch (error) {
      // The same body was good enough for the first page, so what Square refuses is the cursor's age.
      const isExpired = error instanceof RefusedError && error.exitCode === EXIT.failed;
      if (!isExpired || cursor === undefined || ++restarts > RESTARTS) throw error;
      cursor = undefined;
      cursors.clear();
      continue;
    }
    yield page;
    // A short page is not the last one, and neither is an empty one. Only this ends a search:
    if (page.cursor === undefined) return;
    if (cursors.has(page.cursor))
      throw new SyncError("Cannot read all customers: Square sent the same cursor twice", {
        next: "run it again; nothing of this run was saved",
      });
    cursor = page.cursor;
    cursors.add(cursor);
  }
}

/**
 * Yields the pages of a window, read in slices side by side and in no order: a layer over
 * {@linkcode searchPages} that can be taken away. A customer's `created_at` never changes, so slices
 * of it hold every customer, whatever the window looks at. Each slice is held to Square's own count.
 * @param field what the window looks at
 * @param workers how many slices are read at a time; 1 = in order, undivided
 * @param now the end of an open window for the purpose of dividing it, in milliseconds since 1970
 */
export async function* searchSlices(
  square: Square,
  field: "created_at" | "updated_at",
  window: Window,
  workers: number,
  now: number,
): AsyncGenerator<SlicePage> {
  const arrived: SlicePage[] = [];
  const ids = new Set<unknown>();
  let share = Number.POSITIVE_INFINITY;
  let total = 0;
  let done = false;
  let wake = () => {};

  async function readSlice(slice: Window, isWhole: boolean): Promise<void> {
    for (let reading = 1; ; reading++) {
      const own = new Set<unknown>();
      if (isWhole) ids.clear();
      let counted = 0;
      let isDivided = false;
      for await (const page of searchPages(square, toFilter(field, window, slice))) {
        for (const { id } of page.customers) own.add(id) && ids.add(id);
        counted = Math.max(counted, page.count);
        if (isWhole && workers > 1) {
          total = counted;
          share = Math.max(SMALL / 2, counted / (workers * SLICES_PER_WORKER));
        }
        arrived.push({ ...page, count: total || counted, missing: 0 });
        wake();
        const slices =
          counted - own.size > 2 * share ? divide(page, slice, now, counted / share) : [];
        if (page.cursor !== undefined && slices.length > 1) {
          isDivided = true;
          await Promise.all(slices.map((part) => readSlice(part, false)));
          break;
        }
      }
      // The parts were held to their own counts; only the whole can tell that nothing fell between them.
      const missing = isDivided && !isWhole ? 0 : counted - (isWhole ? ids : own).size;
      if (missing <= 0) return;
      if (reading === READINGS) {
        arrived.push({ customers: [], cursor: undefined, count: total, missing });
        return;
      }
    }
  }

  const whole = field === "created_at" ? window : { since: null, until: null };
  const reading = readSlice(whole, true).finally(() => {
    done = true;
    wake();
  });
  reading.catch(() => {}); // it is awaited below, when the pages that came before are delivered
  while (!done || arrived.length > 0) {
    if (arrived.length === 0)
      await new Promise<void>((resolve) => {
        wake = resolve;
      });
    yield* arrived.splice(0);
  }
  await reading;
}

/** Divides what comes after a slice's first page into parts of equal time; they overlap a little. */
function divide(page: Page, slice: Window, now: number, parts: number): Window[] {
  const first = toMs(page.customers[0]);
  const start = toMs(page.customers.at(-1));
  const end = slice.until === null ? now : Date.parse(slice.until);
  // A page of one and the same time is the beginning of an import: it is given a part of its own.
  const ends = first === start ? [start + 2 * OVERLAP_MS] : [];
  const step = Math.max((end - start) / Math.ceil(parts), 2 * OVERLAP_MS);
  if (ends.length === 0)
    for (let at = start + step; at < end - OVERLAP_MS; at += step) ends.push(at);
  const bounds = ends.filter((at) => at < end - OVERLAP_MS);
  if (Number.isNaN(start) || bounds.length === 0) return [];
  return [start, ...bounds].map((from, place) => {
    const to = bounds[place];
    return {
      since: new Date(from).toISOString(),
      until: to === undefined ? slice.until : new Date(to + OVERLAP_MS).toISOString(),
    };
  });
}

function toMs(customer: Customer | undefined): number {
  return Date.parse(toTime(String(customer?.created_at)));
}

function toFilter(field: "created_at" | "updated_at", window: Window, slice: Window): Filter {
  const filter: Filter = {};
  const ranges = { [field]: window, created_at: slice };
  for (const name of ["created_at", "updated_at"] as const) {
    const { since, until } = ranges[name] ?? { since: null, until: null };
    if (since === null && until === null) continue;
    filter[name] = {
      ...(since !== null && { start_at: since }),
      ...(until !== null && { end_at: until }),
    };
  }
  return filter;
}
