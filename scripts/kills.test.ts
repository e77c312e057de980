import assert from "node:assert/strict";
import { readdirSync } from "node:fs";
import { describe, it } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import {
  addRows,
  assertOneEach,
  assertSpeech,
  killOverAndOver,
  makeReady,
  waitUntil,
} from "../fixtures/campaign.ts";
import { inventCustomers } from "../fixtures/square.ts";
import { makeBench } from "../fixtures/testing.ts";

const KILLS = 4;
const SEED = 20_260_801;

describe("Kills", { concurrency: 2 }, () => {
  for (const script of ["pull-created", "push-new"] as const)
    it(`${script} survives ${KILLS} kills, and leaves one profile for every row`, async (t) => {
      const customers = script === "pull-created" ? inventCustomers(700) : [];
      const bench = await makeBench(t, { customers });
      const { killed, rows, profiles } = await killOverAndOver(bench, script, KILLS, SEED);
      assert.ok(killed >= KILLS / 2, `only ${killed} kills were in time`);
      assert.equal(rows, profiles);
    });

  it("SIGINT ends a push that waits to try again within two seconds, with 130", async (t) => {
    const bench = await makeBench(t, {
      fault: () => ({
        kind: "status",
        status: 503,
        code: "SERVICE_UNAVAILABLE",
        headers: { "Retry-After": "30" },
        after: true,
      }),
    });
    makeReady(bench);
    const names = addRows(bench, 3);
    const { child, ended } = bench.start("push-new");
    await waitUntil(() => bench.square.requests.length > 0, "the first request");
    await sleep(300);
    const sentAt = Date.now();
    child.kill("SIGINT");
    const end = await ended;
    assert.ok(Date.now() - sentAt < 2_000, `it took ${Date.now() - sentAt} ms`);
    assertSpeech(end);
    assert.deepEqual([end.code, end.signal, end.stdout], [130, null, ""], end.stderr);
    assert.deepEqual(readdirSync(bench.folder), ["database.db"]);
    bench.square.set({ fault: undefined });
    assert.equal((await bench.run("push-new")).code, 0);
    assertOneEach(bench, names);
  });
});
