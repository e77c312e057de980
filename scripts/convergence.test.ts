import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { liveThrough } from "../fixtures/campaign.ts";
import { makeBench } from "../fixtures/testing.ts";

describe("After a history of edits, lost replies and kills on both sides", {
  concurrency: 3,
}, () => {
  for (const seed of [1, 2, 3])
    it(`pull, push, pull leaves both sides equal, row for row (seed ${seed})`, async (t) => {
      const story = await liveThrough(await makeBench(t), seed, 4);
      assert.equal(story.rows, story.profiles);
      t.diagnostic(story.steps.join("; "));
    });
});
