import assert from "node:assert/strict";
import { test } from "node:test";
import { setImmediate as nextTurn } from "node:timers/promises";
import { inventCustomers } from "../fixtures/invent.ts";
import { type Page, RefusedError, type Square } from "./client.ts";
import type { Customer } from "./mapping.ts";
import { searchPages, searchSlices, type TimeField } from "./paging.ts";
import type { Window } from "./window.ts";

const EVERYTHING: Window = { since: null, until: null };
const NOW = Date.parse("2026-07-02");

type Range = { start_at?: string; end_at?: string };
type Body = { cursor?: string; query: { filter: { created_at?: Range; updated_at?: Range } } };

/** A Square of its own, owing nothing to the offline one: `change` may spoil the page of a request. */
function makeSquare(
  directory: Customer[],
  ends = "[)",
  change = (page: Page, _body: Body, _number: number): Page => page,
) {
  const rows = directory.map((customer) => ({
    customer,
    created_at: Date.parse(String(customer.created_at)),
    updated_at: Date.parse(String(customer.updated_at)),
  }));
  rows.sort((one, other) => one.created_at - other.created_at);
  const bodies: Body[] = [];
  const toIsIn = ({ start_at, end_at }: Range = {}) => {
    const start = start_at ? Date.parse(start_at) - (ends.startsWith("[") ? 1 : 0) : -Infinity;
    const end = end_at ? Date.parse(end_at) + (ends.endsWith("]") ? 1 : 0) : Infinity;
    return (time: number) => time > start && time < end;
  };
  const results = new Map<string, typeof rows>();
  const none = () => Promise.reject(new Error("not asked for here"));
  const square: Square = {
    sent: { requests: 0, retries: 0 },
    unanswered: 0,
    fixedAt: NOW,
    workers: 4,
    createCustomer: none,
    bulkCreateCustomers: none,
    async searchCustomers(asked) {
      const body = asked as Body;
      bodies.push(JSON.parse(JSON.stringify(body))); // as it goes over the wire
      const number = bodies.length;
      await nextTurn();
      const { created_at, updated_at } = body.query.filter;
      const key = JSON.stringify(body.query.filter);
      const [isCreated, isUpdated] = [toIsIn(created_at), toIsIn(updated_at)];
      const found =
        results.get(key) ??
        rows.filter((row) => isCreated(row.created_at) && isUpdated(row.updated_at));
      results.set(key, found);
      const from = Number(body.cursor ?? 0);
      const customers = found.slice(from, from + 100).map(({ customer }) => customer);
      const cursor = from + 100 < found.length ? String(from + 100) : undefined;
      return change({ customers, cursor, count: found.length }, body, number);
    },
  };
  return { square, bodies };
}

async function readAll(
  square: Square,
  workers = 4,
  field: TimeField = "created_at",
  of = EVERYTHING,
) {
  const ids = new Set<unknown>();
  const missing = await searchSlices({ ...square, workers }, field, of, (customers) => {
    for (const { id } of customers) ids.add(id);
  });
  return { ids, missing };
}

const toIds = (customers: Customer[]) => new Set(customers.map(({ id }) => id));

/** So many customers, each so many milliseconds after the one before. */
const makeRow = (count: number, gapMs: number): Customer[] =>
  Array.from({ length: count }, (_, n) => {
    const time = new Date(Date.parse("2026-03-01") + n * gapMs).toISOString();
    return { id: `C${n}`, created_at: time, updated_at: time };
  });

const DIRECTORIES: [name: string, customers: Customer[], waste: number][] = [
  ["evenly spread", inventCustomers(4000), 1.15],
  ["half of them imported on one day", inventCustomers(4000, { spread: "import-day" }), 1.35],
  ["half of them of one and the same time", inventCustomers(4000, { spread: "tied" }), 1.35],
  ["all of them imported on one day", makeRow(4000, 20_000), 1.2],
  ["all of one and the same time", makeRow(4000, 0), 1.15],
  ["all within four seconds", makeRow(4000, 1), 1.5],
];

for (const [name, customers, waste] of DIRECTORIES)
  test(`searchSlices brings each customer, whatever the ends of a range mean: ${name}`, async () => {
    const since = "2025-01-01T00:00:00.000Z";
    const ideal = customers.length / 100;
    for (const ends of ["[)", "()", "[]", "(]"])
      for (const workers of [1, 4, 8]) {
        const { square, bodies } = makeSquare(customers, ends);
        const what = `${ends} ${workers}`;
        assert.deepEqual(
          await readAll(square, workers),
          { ids: toIds(customers), missing: 0 },
          what,
        );
        const most = workers === 1 ? ideal : ideal * waste;
        assert.ok(bodies.length <= most, `${what}: ${bodies.length} requests`);
        const updated = makeSquare(customers, ends);
        assert.deepEqual(
          await readAll(updated.square, workers, "updated_at", { since, until: null }),
          { ids: toIds(customers.filter((one) => String(one.updated_at) >= since)), missing: 0 },
          what,
        );
      }
  });

test("searchSlices keeps to its window", async () => {
  const customers = makeRow(5000, 3_600_000);
  const window = { since: "2026-03-11T00:00:00.000Z", until: "2026-06-09T00:00:00.000Z" };
  const wanted = customers.filter(
    ({ created_at }) => String(created_at) >= window.since && String(created_at) < window.until,
  );
  for (const field of ["created_at", "updated_at"] as const) {
    const { square } = makeSquare(customers);
    assert.deepEqual(await readAll(square, 4, field, window), { ids: toIds(wanted), missing: 0 });
  }
});

test("searchSlices with one worker reads one slice, oldest customer first", async () => {
  const { square, bodies } = makeSquare(makeRow(3000, 3_600_000));
  const { ids } = await readAll(square, 1);
  assert.deepEqual([...ids].slice(0, 3), ["C0", "C1", "C2"]);
  assert.equal(bodies.length, 30);
  const { cursor, ...last } = bodies.at(-1) ?? {};
  assert.equal(cursor, "2900");
  assert.deepEqual(last, bodies[0]); // but for the cursor, the same to the letter
  assert.deepEqual(last, {
    limit: 100,
    count: true,
    query: { filter: {}, sort: { field: "CREATED_AT", order: "ASC" } },
  });
});

test("searchSlices leaves a small window whole", async () => {
  const { square, bodies } = makeSquare(makeRow(1000, 3_600_000));
  assert.equal((await readAll(square)).ids.size, 1000);
  assert.equal(bodies.length, 10);
});

test("searchSlices reads on through short and empty pages", async () => {
  const customers = makeRow(3000, 3_600_000);
  const { square } = makeSquare(customers, "[)", (page, body, number) => {
    if (number % 3 === 0)
      return {
        ...page,
        customers: [],
        cursor: `${Number(body.cursor ?? 0)}.${"0".repeat(number)}`,
      };
    return page;
  });
  assert.deepEqual(await readAll(square), { ids: toIds(customers), missing: 0 });
});

for (const workers of [1, 4]) {
  const customers = makeRow(3000, 3_600_000);
  const isLeftOut = ({ id }: Customer) => id === "C2500";

  test(`searchSlices with ${workers} reads the window once more when a customer was left out`, async () => {
    const most = 2 * (await countRequests(customers, workers));
    let leftOut = 0;
    const { square, bodies } = makeSquare(customers, "[)", (page) => {
      if (leftOut > 0 || !page.customers.some(isLeftOut)) return page;
      leftOut++;
      return { ...page, customers: page.customers.filter((one) => !isLeftOut(one)) };
    });
    assert.deepEqual(await readAll(square, workers), { ids: toIds(customers), missing: 0 });
    assert.ok(bodies.length <= most, `${bodies.length} requests`);
  });

  test(`searchSlices with ${workers} gives up after three readings and says how many are missing`, async () => {
    let leftOut = 0;
    const { square } = makeSquare(customers, "[)", (page) => {
      leftOut += page.customers.filter(isLeftOut).length;
      return { ...page, customers: page.customers.filter((one) => !isLeftOut(one)) };
    });
    const { ids, missing } = await readAll(square, workers);
    assert.deepEqual([ids.size, missing, leftOut], [2999, 1, 3]);
  });

  test(`searchSlices with ${workers} reads the window once more when a customer was deleted meanwhile`, async () => {
    const most = 2 * (await countRequests(customers, workers));
    let isDeleted = false;
    const { square, bodies } = makeSquare(customers, "[)", (page, { query }, number) => {
      isDeleted ||= number > 2;
      const { start_at = "", end_at = "9999" } = query.filter.created_at ?? {};
      const time = String(customers[2500]?.created_at);
      const isCounted = start_at <= time && time < end_at;
      return {
        ...page,
        customers: page.customers.filter((one) => !isDeleted || !isLeftOut(one)),
        count: page.count - (isDeleted && isCounted ? 1 : 0),
      };
    });
    const { ids, missing } = await readAll(square, workers);
    assert.deepEqual([ids.size, missing], [2999, 0]);
    assert.ok(bodies.length <= most, `${bodies.length} requests`);
  });
}

async function countRequests(customers: Customer[], workers: number): Promise<number> {
  const { square, bodies } = makeSquare(customers);
  await readAll(square, workers);
  return bodies.length;
}

test("searchSlices hands on the pages before a failure, then fails", async () => {
  const { square } = makeSquare(makeRow(3000, 3_600_000), "[)", (page, _, number) => {
    if (number > 20) throw new Error("no page 21");
    return page;
  });
  const ids = new Set<unknown>();
  const take = (customers: Customer[]) => {
    for (const { id } of customers) ids.add(id);
  };
  const all = searchSlices(square, "created_at", EVERYTHING, take);
  await assert.rejects(all, /no page 21/);
  assert.ok(ids.size > 1000, `${ids.size} customers`);
});

// ---- One slice ----

const EXPIRED = [{ category: "INVALID_REQUEST_ERROR", code: "INVALID_CURSOR" }];

async function readPages(square: Square): Promise<number[]> {
  const sizes: number[] = [];
  for await (const { customers } of searchPages(square, {})) sizes.push(customers.length);
  return sizes;
}

test("searchPages begins again when its cursor expires", async () => {
  const { square } = makeSquare(makeRow(350, 1), "[)", (page, { cursor }, number) => {
    if (cursor && number === 3) throw new RefusedError(400, EXPIRED);
    return page;
  });
  assert.deepEqual(await readPages(square), [100, 100, 100, 100, 100, 50]);
});

test("searchPages gives up when its cursor expires a fourth time", async () => {
  const { square, bodies } = makeSquare(makeRow(350, 1), "[)", (page, { cursor }) => {
    if (cursor) throw new RefusedError(400, EXPIRED);
    return page;
  });
  await assert.rejects(readPages(square), /Square says INVALID_CURSOR/);
  assert.equal(bodies.length, 8);
});

test("searchPages does not ask again when a first page or the token is refused", async () => {
  for (const [status, number] of [
    [400, 1],
    [401, 2],
  ] as const) {
    const { square, bodies } = makeSquare(makeRow(350, 1), "[)", (page, _, now) => {
      if (now === number) throw new RefusedError(status, []);
      return page;
    });
    await assert.rejects(readPages(square), RefusedError);
    assert.equal(bodies.length, number);
  }
});

test("searchPages fails when Square sends one cursor twice", async () => {
  const { square } = makeSquare(makeRow(350, 1), "[)", (page, { cursor }) => ({
    ...page,
    cursor: cursor ?? page.cursor,
  }));
  await assert.rejects(readPages(square), {
    message: "Cannot read all pages: Square sent one cursor twice",
  });
});
