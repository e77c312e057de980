import assert from "node:assert/strict";
import { test } from "node:test";
import { inventCustomers } from "../fixtures/square.ts";
import { makeBench } from "../fixtures/testing.ts";

test("the first pull-updated begins where the first complete pull-created was fixed", async (t) => {
  const bench = await makeBench(t, { customers: inventCustomers(120) });
  await bench.run("init-db");
  await bench.json("pull-created");
  const [run] = bench.rows("SELECT watermark FROM sync_runs");
  const { since, fetched } = await bench.json("pull-updated");
  assert.equal(since, new Date(Date.parse(String(run?.watermark)) - 300_000).toISOString());
  assert.equal(fetched, 0);
});

test("without any complete pull, pull-updated reads everything", async (t) => {
  const bench = await makeBench(t, { customers: inventCustomers(120) });
  await bench.run("init-db");
  await bench.json("pull-created", ["--since", "5m"]);
  const { since, inserted } = await bench.json("pull-updated");
  assert.deepEqual([since, inserted], [null, 120]);
});

test("pull-updated brings what changed, and leaves alone what is yours", async (t) => {
  const customers = inventCustomers(5);
  const bench = await makeBench(t, { customers });
  await bench.run("init-db");
  await bench.json("pull-created");
  const id = String(customers[0]?.id);
  bench.sql(`UPDATE customers SET source = 'mine' WHERE id = '${id}'`);
  bench.square.update(id, { given_name: "Renamed", note: null });
  const pulled = await bench.json("pull-updated");
  assert.deepEqual([pulled.updated, pulled.inserted, pulled.unchanged], [1, 0, 0]);
  assert.deepEqual(
    bench.rows(`SELECT given_name, note, version, source FROM customers WHERE id = '${id}'`),
    [
      {
        given_name: "Renamed",
        note: null,
        version: Number(customers[0]?.version) + 1,
        source: "mine",
      },
    ],
  );
});

test("an older version from a search that lags never overwrites a newer one", async (t) => {
  const customers = inventCustomers(1);
  const bench = await makeBench(t, { customers });
  await bench.run("init-db");
  await bench.json("pull-created");
  bench.sql("UPDATE customers SET version = 99, given_name = 'Newer'");
  const pulled = await bench.json("pull-updated", ["--since", "all"]);
  assert.deepEqual([pulled.updated, pulled.unchanged], [0, 1]);
  assert.equal(bench.rows("SELECT given_name FROM customers")[0]?.given_name, "Newer");
});
