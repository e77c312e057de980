import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { describe, it, type TestContext } from "node:test";
import {
  addRows,
  assertEqualSides,
  assertIntegrity,
  assertOneEach,
  assertSpeech,
  hashOf,
  killAtRequest,
  killDuringSave,
  loseReply,
  makeReady,
  markRead,
  nthRequest,
  readWatermark,
  stopAtStart,
  WATERMARK,
} from "../fixtures/campaign.ts";
import { inventCustomers } from "../fixtures/square.ts";
import { type Bench, makeBench } from "../fixtures/testing.ts";

const PULLS = ["pull-created", "pull-updated"];
const CUSTOMERS = inventCustomers(250, { from: "2026-02-01", to: "2026-06-01" });
const IDS = "SELECT id FROM customers WHERE id IS NOT NULL";
const KEYS = "SELECT local_id, idempotency_key AS key FROM customers ORDER BY local_id";

// The table of 2018 that init-db upgrades: it had no key, so that a customer could be there twice.
const TABLE_2018 = `
  CREATE TABLE customers (id TEXT, created_at TEXT, updated_at TEXT, synced_at TEXT,
    given_name TEXT, family_name TEXT, email_address TEXT, creation_source TEXT);
  INSERT INTO customers (id, created_at, updated_at, given_name) VALUES
    ('A', '2018-08-01T00:00:00Z', '2018-08-01T00:00:00Z', 'Ada'),
    ('A', '2018-08-01T00:00:00Z', '2018-08-02T00:00:00Z', 'Ada L.'),
    (NULL, NULL, NULL, 'Bob')`;

/** Stops pulls at the same point, and holds the file to not having noticed. */
async function stopPulls(
  bench: Bench,
  stop: (script: string) => Promise<unknown>,
  pulls = PULLS,
): Promise<void> {
  for (const script of pulls) {
    const before = hashOf(bench);
    await stop(script);
    assert.equal(hashOf(bench), before);
    assert.equal(readWatermark(bench, script), WATERMARK);
    assertIntegrity(bench);
  }
}

async function assertPullCarriesOn(bench: Bench, script: string): Promise<void> {
  const ended = await bench.run(script);
  assert.equal(ended.code, 0, ended.stderr);
  assert.notEqual(readWatermark(bench, script), WATERMARK);
  assertEqualSides(bench);
  assertTidy(bench);
}

async function makePullBench(t: TestContext): Promise<Bench> {
  const bench = await makeBench(t, { customers: CUSTOMERS });
  makeReady(bench);
  for (const script of PULLS) markRead(bench, script);
  return bench;
}

async function assertPushCarriesOn(bench: Bench, names: string[]): Promise<void> {
  assertIntegrity(bench);
  const ended = await bench.run("push-new");
  assert.equal(ended.code, 0, ended.stderr);
  assertOneEach(bench, names);
  assertEqualSides(bench);
  assertTidy(bench);
}

function assertTidy(bench: Bench): void {
  for (const end of [".tmp", ".lock"])
    assert.equal(existsSync(join(bench.folder, `database.db${end}`)), false, end);
}

async function makePushBench(t: TestContext, rows = 3) {
  const bench = await makeBench(t);
  makeReady(bench);
  return { bench, names: addRows(bench, rows) };
}

/** Sends a signal while Square is silent, and returns once the script has obeyed. */
async function signalAt(
  bench: Bench,
  script: string,
  args: string[],
  operation: string,
  nth: number,
  signal: "SIGINT" | "SIGTERM",
): Promise<void> {
  const { child, ended } = bench.start(script, args);
  let sentAt = 0;
  bench.square.set({
    fault: nthRequest(operation, nth, () => {
      sentAt = Date.now();
      child.kill(signal);
      return { kind: "stall-headers", after: true };
    }),
  });
  const end = await ended;
  bench.square.set({ fault: undefined });
  assertSpeech(end);
  assert.deepEqual([end.code, end.signal], [signal === "SIGINT" ? 130 : 143, null], end.stderr);
  assert.ok(Date.now() - sentAt < 2_000, `it took ${Date.now() - sentAt} ms to stop`);
  assertTidy(bench);
}

describe("Guarantees", { concurrency: 2 }, () => {
  it("init-db, killed before it saves", async (t) => {
    const bench = await makeBench(t);
    bench.sql(TABLE_2018);
    const before = hashOf(bench);
    await stopAtStart(bench, "init-db", "SIGKILL");
    assert.equal(hashOf(bench), before);
    await assertUpgraded(bench);
  });

  it("init-db, killed during its save", async (t) => {
    const bench = await makeBench(t);
    bench.sql(TABLE_2018);
    const before = hashOf(bench);
    await killDuringSave(bench, "init-db");
    assert.equal(hashOf(bench), before);
    await assertUpgraded(bench);
  });

  it("init-db, stopped by a signal", async (t) => {
    const bench = await makeBench(t);
    bench.sql(TABLE_2018);
    const before = hashOf(bench);
    const end = await stopAtStart(bench, "init-db", "SIGTERM");
    assert.deepEqual([end.code, end.signal], [143, null], end.stderr);
    assert.equal(hashOf(bench), before);
    assertTidy(bench);
    await assertUpgraded(bench);
  });

  it("pull, killed before its first request", async (t) => {
    const bench = await makePullBench(t);
    await stopPulls(bench, (script) => stopAtStart(bench, script, "SIGKILL"), ["pull-updated"]);
    assert.equal(bench.square.requests.length, 0);
    await assertPullCarriesOn(bench, "pull-updated");
  });

  it("pull, killed between two pages", async (t) => {
    const bench = await makePullBench(t);
    await stopPulls(bench, (script) => killAtRequest(bench, script, [], "search", 2, "before"));
    await assertPullCarriesOn(bench, "pull-updated");
  });

  it("pull, killed after the last page and before its save", async (t) => {
    const bench = await makePullBench(t);
    const stop = (script: string) => killAtRequest(bench, script, [], "search", 3, "answered");
    await stopPulls(bench, stop, ["pull-created"]);
    await assertPullCarriesOn(bench, "pull-created");
  });

  it("pull, killed during its save", async (t) => {
    const bench = await makePullBench(t);
    await stopPulls(bench, (script) => killDuringSave(bench, script), ["pull-updated"]);
    await assertPullCarriesOn(bench, "pull-updated");
  });

  it("pull, stopped by a signal", async (t) => {
    const bench = await makePullBench(t);
    await stopPulls(bench, (script) =>
      signalAt(bench, script, [], "search", 2, script === "pull-created" ? "SIGINT" : "SIGTERM"),
    );
    await assertPullCarriesOn(bench, "pull-created");
  });

  it("push-new, killed before its first request", async (t) => {
    const { bench, names } = await makePushBench(t);
    await stopAtStart(bench, "push-new", "SIGKILL");
    assert.equal(bench.square.requests.length, 0);
    assert.equal(bench.rows("SELECT given_name FROM customers").length, names.length);
    await assertPushCarriesOn(bench, names);
  });

  it("push-new, killed while it saves the keys", async (t) => {
    const { bench, names } = await makePushBench(t);
    const before = hashOf(bench);
    await killDuringSave(bench, "push-new");
    assert.equal(hashOf(bench), before);
    assert.equal(bench.square.requests.length, 0);
    await assertPushCarriesOn(bench, names);
  });

  it("push-new, killed between key and call", async (t) => {
    const { bench, names } = await makePushBench(t);
    await killAtRequest(bench, "push-new", [], "bulk-create", 1, "before");
    const keys = bench.rows(KEYS);
    assert.equal(new Set(keys.map(({ key }) => key)).size, names.length);
    assert.equal(bench.square.customers.size, 0);
    await assertPushCarriesOn(bench, names);
    assert.deepEqual(bench.rows(KEYS), keys);
  });

  it("push-new, killed between Square's creation and the lost reply", async (t) => {
    const { bench, names } = await makePushBench(t);
    bench.square.set({ indexLagMs: 600_000 });
    await killAtRequest(bench, "push-new", [], "bulk-create", 1, "acted");
    assert.deepEqual(bench.rows(IDS), []);
    assert.equal(bench.square.customers.size, names.length);
    await assertPushCarriesOn(bench, names);
  });

  it("push-new, killed between reply and save", async (t) => {
    const { bench, names } = await makePushBench(t);
    await killAtRequest(bench, "push-new", ["--batch-size", "1"], "create", 1, "answered");
    assert.deepEqual(bench.rows(IDS), []);
    assert.equal(bench.square.customers.size, 1);
    await assertPushCarriesOn(bench, names);
  });

  it("push-new, killed while it saves the ids", async (t) => {
    const { bench, names } = await makePushBench(t);
    await killDuringSave(bench, "push-new", 2);
    assert.deepEqual(bench.rows(IDS), []);
    assert.equal(bench.square.customers.size, names.length);
    await assertPushCarriesOn(bench, names);
  });

  it("push-new, killed between two calls", async (t) => {
    const { bench, names } = await makePushBench(t, 4);
    await killAtRequest(bench, "push-new", ["--batch-size", "2"], "bulk-create", 2, "before");
    assert.equal(bench.rows(IDS).length, 2);
    assert.equal(bench.square.customers.size, 2);
    await assertPushCarriesOn(bench, names);
  });

  it("push-new, on a refused row", async (t) => {
    const { bench, names } = await makePushBench(t);
    bench.sql(
      `INSERT INTO customers (given_name, email_address) VALUES ('Odd', 'o"dd@example.com')`,
    );
    const ended = await bench.run("push-new");
    assertSpeech(ended);
    assert.equal(ended.code, 3, ended.stderr);
    assertOneEach(bench, names);
    assert.deepEqual(
      bench.rows(
        "SELECT id, idempotency_key AS key, push_error > '' AS says FROM customers WHERE given_name = 'Odd'",
      ),
      [{ id: null, key: null, says: 1 }],
    );
    bench.sql("UPDATE customers SET email_address = 'odd@example.com' WHERE given_name = 'Odd'");
    await assertPushCarriesOn(bench, [...names, "Odd"]);
  });

  it("push-new, stopped by a signal", async (t) => {
    const { bench, names } = await makePushBench(t, 4);
    const args = ["--batch-size", "2"];
    await signalAt(bench, "push-new", args, "bulk-create", 2, "SIGTERM");
    assert.equal(bench.rows(IDS).length, 2);
    assert.equal(bench.square.customers.size, 4);
    await assertPushCarriesOn(bench, names);
  });
});

async function assertUpgraded(bench: Bench): Promise<void> {
  const ended = await bench.run("init-db");
  assert.equal(ended.code, 0, ended.stderr);
  assertIntegrity(bench);
  assert.deepEqual(
    bench.rows("SELECT id, given_name, updated_at FROM customers ORDER BY local_id"),
    [
      { id: "A", given_name: "Ada L.", updated_at: "2018-08-02T00:00:00.000Z" },
      { id: null, given_name: "Bob", updated_at: null },
    ],
  );
  assert.equal(bench.rows("SELECT * FROM customers_2018").length, 3);
  assertTidy(bench);
}

const FAMILY = `INSERT INTO customers (given_name, reference_id)
  VALUES ('Nora', 'family'), ('Max', 'family')`;

// What Square does not promise to be unique, and what people put into a column all the same.
describe("Guarantees for rows that are hard to tell apart", { concurrency: 2 }, () => {
  it("two rows with one reference_id both get their place, when the reply for the first was lost", async (t) => {
    const bench = await makeBench(t);
    makeReady(bench);
    bench.sql(FAMILY);
    await loseReply(bench, 1);
    await assertPushCarriesOn(bench, ["Nora", "Max"]);
  });

  it("two rows with one reference_id are not there twice, when a pull came before the lost reply's push", async (t) => {
    const bench = await makeBench(t);
    makeReady(bench);
    bench.sql(FAMILY);
    for (const localId of [1, 2]) await loseReply(bench, localId);
    assert.equal((await bench.run("pull-created")).code, 0);
    await assertPushCarriesOn(bench, ["Nora", "Max"]);
  });

  it("a row whose reference_id is the word null stays itself when customers without one are pulled", async (t) => {
    const customers = CUSTOMERS.slice(0, 20).map(({ reference_id, ...customer }) => customer);
    const bench = await makeBench(t, { customers });
    makeReady(bench);
    const word = "INSERT INTO customers (given_name, reference_id) VALUES ('Nora', ";
    bench.sql(`${word} 'null'); ${word} 'undefined')`);
    assert.equal((await bench.run("pull-created")).code, 0);
    assert.deepEqual(bench.rows("SELECT id, given_name FROM customers WHERE local_id < 3"), [
      { id: null, given_name: "Nora" },
      { id: null, given_name: "Nora" },
    ]);
    assert.equal(bench.rows(IDS).length, 20);
  });

  it("a row in doubt keeps its own reference_id, even one that Square cannot take", async (t) => {
    const { bench } = await makePushBench(t, 1);
    const reference = "r".repeat(120);
    bench.sql(`UPDATE customers SET idempotency_key = 'key-1', reference_id = '${reference}'`);
    const ended = await bench.run("push-new");
    assert.equal(ended.code, 3, ended.stderr);
    assert.deepEqual(bench.rows("SELECT id, reference_id FROM customers"), [
      { id: null, reference_id: reference },
    ]);
  });
});
