import assert from "node:assert/strict";
import { it } from "node:test";
import { liveThrough } from "../fixtures/campaign.ts";
import { makeBench } from "../fixtures/testing.ts";

const RUNS = 5;
const SEED = 1;

it("after a history of edits, lost replies and kills, pull, push, pull leaves both sides equal, row for row", async (t) => {
  const story = await liveThrough(await makeBench(t), SEED, RUNS);
  assert.equal(story.rows, story.profiles);
  t.diagnostic(story.steps.join("; "));
});
