import assert from "node:assert/strict";
import { test } from "node:test";
import { makeReady, readWatermark } from "../fixtures/campaign.ts";
import { inventCustomers } from "../fixtures/square.ts";
import { makeBench } from "../fixtures/testing.ts";

test("pull-updated begins where the first pull-created was fixed, and brings what is newer but leaves yours", async (t) => {
  const customers = inventCustomers(5);
  const bench = await makeBench(t, { customers });
  makeReady(bench);
  await bench.json("pull-created");
  const [edited, lagging] = customers.map(({ id }) => id);
  bench.sql(`UPDATE customers SET source = 'mine' WHERE id = '${edited}';
    UPDATE customers SET version = 99, given_name = 'Newer' WHERE id = '${lagging}'`);
  bench.square.update(String(edited), { given_name: "Renamed", note: null });
  bench.square.update(String(lagging), { given_name: "Older" });
  const fixed = Date.parse(String(readWatermark(bench, "pull-created")));
  const pulled = await bench.json("pull-updated");
  assert.equal(pulled.since, new Date(fixed - 300_000).toISOString());
  assert.deepEqual(
    [pulled.fetched, pulled.updated, pulled.inserted, pulled.unchanged],
    [2, 1, 0, 1],
  );
  const version = Number(customers[0]?.version) + 1;
  assert.deepEqual(
    bench.rows(
      `SELECT given_name, note, version, source FROM customers WHERE id = '${edited}' OR version = 99
       ORDER BY version`,
    ),
    [
      { given_name: "Renamed", note: null, version, source: "mine" },
      { given_name: "Newer", note: customers[1]?.note ?? null, version: 99, source: null },
    ],
  );
});

test("without any complete pull, pull-updated reads everything", async (t) => {
  const bench = await makeBench(t, { customers: inventCustomers(120) });
  makeReady(bench);
  await bench.json("pull-created", ["--since", "5m"]);
  assert.equal(readWatermark(bench, "pull-created"), null);
  const { since, inserted } = await bench.json("pull-updated");
  assert.deepEqual([since, inserted], [null, 120]);
});
