import assert from "node:assert/strict";
import { test } from "node:test";
import { inventCustomers } from "../fixtures/square.ts";
import { makeBench } from "../fixtures/testing.ts";

test("pull-created brings 1,234 customers over short, empty and full pages, each once", async (t) => {
  const bench = await makeBench(t, { customers: inventCustomers(1234), unevenPages: true });
  await bench.run("init-db");
  const first = await bench.json("pull-created");
  assert.equal(first.inserted, 1234);
  assert.deepEqual(bench.rows("SELECT count(*) AS n, count(DISTINCT id) AS ids FROM customers"), [
    { n: 1234, ids: 1234 },
  ]);
  const second = await bench.json("pull-created");
  assert.deepEqual([second.inserted, second.updated], [0, 0]);
  const all = await bench.json("pull-created", ["--since", "all"]);
  assert.deepEqual([all.inserted, all.updated, all.unchanged], [0, 0, 1234]);
});
