import { type Page, RefusedError, type SearchRequest, type Square } from "./client.ts";
import { EXIT, SyncError } from "./errors.ts";
import { type Customer, toTime } from "./mapping.ts";
import type { Window } from "./window.ts";

const PAGE_SIZE = 100; // the most that Square allows, and advisory
const RESTARTS = 3; // a cursor lives for minutes: when it dies so often, the window cannot be read
const READINGS = 3; // of a window in which fewer customers come than Square counted
const SMALL_SLICE = 500; // customers; smaller ones cost more requests than they save
const SLICES_PER_WORKER = 4; // so that none is left alone with a long last slice
const DENSE_MARGIN = 1.5; // a page is a small sample
const OVERLAP_MS = 1_000; // Square does not say whether the ends of a time range are in it

export type TimeField = "created_at" | "updated_at";

/**
 * Yields the pages of one search, oldest customer first: the only order that does not move while
 * customers change. A customer can come twice; whoever collects them must tell them apart by id.
 * @throws SyncError when the search fails, or a cursor comes again
 */
export async function* searchPages(square: Square, filter: object): AsyncGenerator<Page> {
  const sort = { field: "CREATED_AT", order: "ASC" } as const;
  // A cursor is bound to its query: the rest of the body stays the same to the letter.
  const body: SearchRequest = { limit: PAGE_SIZE, count: true, query: { filter, sort } };
  const cursors = new Set<string>();
  let cursor: string | undefined;
  for (let restarts = 0; ; ) {
    let page: Page;
    try {
      page = await square.searchCustomers(cursor === undefined ? body : { ...body, cursor });
    } catch (error) {
      // The same query was good enough for the first page: what Square refuses is the cursor's age.
      const isExpired = error instanceof RefusedError && error.exitCode === EXIT.failed;
      if (!isExpired || cursor === undefined || ++restarts > RESTARTS) throw error;
      cursor = undefined;
      cursors.clear();
      continue;
    }
    yield page;
    // A short page is not the last one, and neither is an empty one. Only this is:
    if (page.cursor === undefined) return;
    if (cursors.has(page.cursor))
      throw new SyncError("Cannot read all pages: Square sent one cursor twice", EXIT.failed);
    cursor = page.cursor;
    cursors.add(cursor);
  }
}

/**
 * Reads a window in slices side by side, its pages in no order: a layer over {@linkcode searchPages}
 * that can be taken away. No customer's `created_at` ever changes, so slices of it hold every customer,
 * whatever the window looks at. Each slice is held to Square's count of it.
 * @param field what the window looks at
 * @param workers how many requests are under way at a time; 1 = one slice, in order
 * @param now where an open window is taken to end when it is divided, in milliseconds since 1970
 * @param take is given each page's customers, and how many Square counts in the whole window
 * @returns how many customers Square counted and never sent
 */
export async function searchSlices(
  square: Square,
  field: TimeField,
  window: Window,
  workers: number,
  now: number,
  take: (customers: Customer[], total: number) => void,
): Promise<number> {
  let total = 0;
  let missing = 0;

  async function readSlice(slice: Window, takeAbove: (customers: Customer[]) => void) {
    for (let reading = 1; reading <= READINGS; reading++) {
      const missingBefore = missing;
      const ids = new Set<unknown>();
      let counted = 0;
      const takeHere = (customers: Customer[]) => {
        for (const { id } of customers) ids.add(id);
        takeAbove(customers);
      };
      const filter = { [field]: toRange(window), created_at: toRange(slice) };
      for await (const page of searchPages(square, filter)) {
        counted = Math.max(counted, page.count);
        total = Math.max(total, counted);
        takeHere(page.customers);
        const share = Math.max(SMALL_SLICE, total / (workers * SLICES_PER_WORKER));
        const left = counted - ids.size;
        const isLarge = workers > 1 && page.cursor !== undefined && left > 2 * share;
        const parts = isLarge ? divide(page, slice, now, left, Math.ceil(left / share)) : [];
        if (parts.length === 0) continue;
        // A large slice goes on as parts of it. What comes through them is counted here too: else a
        // customer who fell between two parts would not be missed.
        await Promise.all(parts.map((part) => readSlice(part, takeHere)));
        break;
      }
      // Counted afresh each time: a deletion can move somebody over the edge of a page. What a part has
      // read three times to no avail, the whole does not read again.
      const left = counted - ids.size;
      if (left <= 0 || missing > missingBefore) return;
      if (reading === READINGS) missing += left;
    }
  }

  const whole = field === "created_at" ? window : { since: null, until: null };
  await readSlice(whole, (customers) => take(customers, total));
  return missing;
}

/** Divides what follows a page of a slice into parts of equal time that overlap a little. */
function divide(page: Page, slice: Window, now: number, left: number, most: number): Window[] {
  const [first, start] = [toMs(page.customers[0]), toMs(page.customers.at(-1))];
  const end = slice.until === null ? now : Date.parse(slice.until);
  // In an import customers are so dense that later parts would be empty: the parts are for the time in
  // which the rest would come at that density, and one is for what follows.
  const dense = (DENSE_MARGIN * (start - first) * left) / page.customers.length;
  const reach = Math.min(dense, end - start);
  const step = Math.max(reach / most, 2 * OVERLAP_MS);
  const cuts = Array.from({ length: Math.max(1, reach / step) }, (_, n) => start + (n + 1) * step);
  const inside = cuts.filter((cut) => cut < end - OVERLAP_MS);
  if (inside.length === 0) return [];
  return [start - 1, ...inside].map((from, n) => {
    const to = inside[n];
    const until = to === undefined ? slice.until : new Date(to + OVERLAP_MS).toISOString();
    return { since: new Date(from).toISOString(), until };
  });
}

function toMs(customer: Customer | undefined): number {
  return Date.parse(toTime(String(customer?.created_at)));
}

// JSON leaves out what is undefined: an end that is open, a range that is all of time.
function toRange({ since, until }: Window): object | undefined {
  if (since === null && until === null) return undefined;
  return { start_at: since ?? undefined, end_at: until ?? undefined };
}
