import assert from "node:assert/strict";
import { test } from "node:test";
import { assertSpeech, hashOf, makeReady, markRead } from "../fixtures/campaign.ts";
import { inventCustomers } from "../fixtures/square.ts";
import { makeBench } from "../fixtures/testing.ts";

const iso = (ms: number) => new Date(ms).toISOString();
const WATERMARK = "SELECT max(watermark) AS watermark FROM sync_runs WHERE script = 'pull-created'";

test("pull-created brings 1,234 customers over short, empty and full pages, each once and whole", async (t) => {
  const customers = inventCustomers(1234);
  const bench = await makeBench(t, { customers, unevenPages: true });
  makeReady(bench);
  const first = await bench.json("pull-created");
  assert.equal(first.inserted, 1234);
  assert.equal(first.since, null);
  assert.deepEqual(
    bench.rows("SELECT id, email_address, phone_number, version FROM customers ORDER BY id"),
    customers
      .map(({ id, email_address, phone_number, version }) => ({
        id,
        email_address: email_address ?? null,
        phone_number: phone_number ?? null,
        version,
      }))
      .sort((one, other) => (one.id < other.id ? -1 : 1)),
  );
  const second = await bench.json("pull-created");
  assert.deepEqual([second.inserted, second.updated, second.requests], [0, 0, 1]);
  const before = bench.rows("SELECT * FROM customers ORDER BY local_id");
  const all = await bench.json("pull-created", ["--since", "all", "--concurrency", "1"]);
  assert.deepEqual([all.inserted, all.updated, all.unchanged], [0, 0, 1234]);
  assert.deepEqual(bench.rows("SELECT * FROM customers ORDER BY local_id"), before);
});

test("a customer becomes a row under Square's own names, and nothing of it is left out", async (t) => {
  const bench = await makeBench(t, {
    customers: [
      {
        id: "SQUARE0000000000000000ONE1",
        created_at: "2026-07-01T10:00:00.72Z",
        updated_at: "2026-07-01T10:00:00Z",
        version: 7,
        creation_source: "DIRECTORY",
        given_name: "Zoë 👩‍🚀",
        family_name: "Robert'); DROP TABLE customers;--",
        company_name: "C",
        nickname: "N",
        email_address: "zoe@example.com",
        phone_number: "+1-206-555-0100",
        birthday: "0000-02-29",
        note: "two\nlines",
        reference_id: "crm 1",
        tax_ids: { eu_vat: "IE3426675K" },
        address: {
          address_line_1: "1",
          address_line_2: "2",
          locality: "Dublin",
          administrative_district_level_1: "L",
          postal_code: "D02",
          country: "IE",
        },
        group_ids: ["G1"],
        segment_ids: ["S1", "S1"],
        preferences: { email_unsubscribed: true },
      },
    ],
  });
  makeReady(bench);
  await bench.json("pull-created");
  const [row] = bench.rows("SELECT * FROM customers");
  assert.match(String(row?.synced_at), /Z$/);
  assert.deepEqual(
    { ...row, synced_at: "" },
    {
      local_id: 1,
      id: "SQUARE0000000000000000ONE1",
      created_at: "2026-07-01T10:00:00.720Z",
      updated_at: "2026-07-01T10:00:00.000Z",
      version: 7,
      creation_source: "DIRECTORY",
      given_name: "Zoë 👩‍🚀",
      family_name: "Robert'); DROP TABLE customers;--",
      company_name: "C",
      nickname: "N",
      email_address: "zoe@example.com",
      phone_number: "+1-206-555-0100",
      birthday: "0000-02-29",
      note: "two\nlines",
      reference_id: "crm 1",
      tax_ids_eu_vat: "IE3426675K",
      address_line_1: "1",
      address_line_2: "2",
      address_line_3: null,
      locality: "Dublin",
      sublocality: null,
      administrative_district_level_1: "L",
      postal_code: "D02",
      country: "IE",
      group_ids: '["G1"]',
      segment_ids: '["S1","S1"]',
      email_unsubscribed: 1,
      source: null,
      synced_at: "",
      idempotency_key: null,
      push_error: null,
    },
  );
});

test("a narrow window leaves the watermark where it was, and the next run fills the hole", async (t) => {
  const bench = await makeBench(t, { customers: inventCustomers(5) });
  makeReady(bench);
  const old = iso(Date.now() - 3 * 86_400_000);
  markRead(bench, "pull-created", old);
  const created_at = iso(Date.now() - 2 * 86_400_000);
  const missed = bench.square.create({ given_name: "Between", created_at, updated_at: created_at });
  await bench.json("pull-created", ["--since", "5m"]);
  assert.deepEqual(bench.rows(WATERMARK), [{ watermark: old }]);
  const next = await bench.json("pull-created");
  assert.equal(next.inserted, 1);
  assert.equal(
    bench.rows(`SELECT count(*) AS n FROM customers WHERE id = '${missed.id}'`)[0]?.n,
    1,
  );
});

test("a customer who is indexed after the run comes with the next one", async (t) => {
  const bench = await makeBench(t, { customers: inventCustomers(3), indexLagMs: 60_000 });
  makeReady(bench);
  bench.square.create({ given_name: "Late" });
  assert.equal((await bench.json("pull-created")).inserted, 3);
  bench.square.set({ indexLagMs: 0 });
  assert.equal((await bench.json("pull-created")).inserted, 1);
});

test("--until ends the window, and the watermark with it", async (t) => {
  const bench = await makeBench(t, {
    customers: inventCustomers(50, { from: "2026-01-01", to: "2026-03-01" }),
  });
  makeReady(bench);
  const { inserted } = await bench.json("pull-created", ["--until", "2026-02-01T00:00:00Z"]);
  assert.deepEqual(bench.rows(WATERMARK), [{ watermark: "2026-02-01T00:00:00.000Z" }]);
  assert.equal(Number(inserted) + Number((await bench.json("pull-created")).inserted), 50);
});

test("the watermark is Square's time when this computer's clock is ahead", async (t) => {
  const bench = await makeBench(t, { now: () => Date.now() - 3_600_000 });
  makeReady(bench);
  const ended = await bench.run("pull-created");
  assert.match(
    ended.stderr,
    /^pull-created: this computer's clock is 3\d\d\d s ahead of Square's\n$/,
  );
  const [row] = bench.rows(WATERMARK);
  assert.ok(Date.parse(String(row?.watermark)) < Date.now() - 3_590_000);
});

test("a watermark that nobody can read is none: everything is read", async (t) => {
  const bench = await makeBench(t, { customers: inventCustomers(3) });
  makeReady(bench);
  await bench.run("pull-created");
  bench.sql("UPDATE sync_runs SET watermark = ''");
  for (const script of ["pull-created", "pull-updated"]) {
    const { since, fetched } = await bench.json(script);
    assert.deepEqual([since, fetched], [null, 3]);
    bench.sql("UPDATE sync_runs SET watermark = ''");
  }
});

test("a file of one environment refuses another, before anything is asked", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  markRead(bench, "pull-created");
  const before = hashOf(bench);
  const ended = await bench.run("pull-created", [], {
    SQUARE_BASE_URL: "",
    SQUARE_ENVIRONMENT: "production",
  });
  assertSpeech(ended);
  assert.deepEqual([ended.code, ended.stdout], [2, ""]);
  assert.equal(
    ended.stderr,
    'pull-created: Cannot use "database.db": it holds customers of the offline Square, and this run is for production\nTry: SQUARE_ENVIRONMENT and SQUARE_BASE_URL as they were; or another file with --db\n',
  );
  assert.equal(hashOf(bench), before);
});

test("a pulled customer whose reference_id is one unpushed row's is that row", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  bench.sql(`INSERT INTO customers (given_name, reference_id, source) VALUES
    ('Ann', 'crm-1', 'shop'), ('Two', 'same', 'shop'), ('Too', 'same', 'shop')`);
  const ann = bench.square.create({ given_name: "Ann", family_name: "Lee", reference_id: "crm-1" });
  const two = bench.square.create({ given_name: "Two", reference_id: "same" });
  const pulled = await bench.json("pull-created");
  assert.deepEqual([pulled.linked, pulled.inserted, pulled.updated], [1, 1, 0]);
  assert.deepEqual(bench.rows("SELECT local_id, id, family_name, source FROM customers"), [
    { local_id: 1, id: ann.id, family_name: "Lee", source: "shop" },
    { local_id: 2, id: null, family_name: null, source: "shop" },
    { local_id: 3, id: null, family_name: null, source: "shop" },
    { local_id: 4, id: two.id, family_name: null, source: null },
  ]);
});
