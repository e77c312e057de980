#!/usr/bin/env tsx
/**
 * Pulls the customers that were created in Square since the last run into the database file.
 *
 * Reads Square (SearchCustomers). Writes the tables customers and sync_runs.
 *
 *     npx tsx scripts/pull-created.ts --since 24h
 *     deno run --no-prompt --ignore-env \
 *       --allow-env=SQUARE_ACCESS_TOKEN,SQUARE_ENVIRONMENT,SQUARE_BASE_URL,DATABASE_PATH \
 *       --allow-net=connect.squareup.com,connect.squareupsandbox.com --allow-read=. \
 *       --allow-write=database.db,database.db.tmp,database.db.lock scripts/pull-created.ts
 *
 * Exit codes: 0 done, 1 failed, 2 wrong usage, 4 token refused, 75 later, 130/143 stopped.
 * Safe to run again: customers are told apart by Square's id, so none is ever there twice.
 */
import { PULL_OPTIONS, runScript } from "../lib/command.ts";
import { readWatermark, recordRun, saveCustomers } from "../lib/database.ts";
import { EXIT, SyncError } from "../lib/errors.ts";
import { type Customer, keepNewest, type Row } from "../lib/mapping.ts";
import { searchSlices } from "../lib/paging.ts";
import { toWatermark, toWindow } from "../lib/window.ts";

const SCRIPT = "pull-created";

// The window looks at the time that never changes, so every customer falls into exactly one window.
const FIELD = "created_at";

const manual = {
  name: SCRIPT,
  purpose: "pulls the customers that were created in Square since the last run",
  options: PULL_OPTIONS,
  examples: [
    [SCRIPT, "go on where the last run ended"],
    [`${SCRIPT} --since 24h`, "look at the last day only"],
    [`${SCRIPT} --since all`, "read everything again"],
  ],
  exitCodes:
    "0 done, 1 failed, 2 wrong usage, 4 token refused, 75 try again later, 130/143 stopped",
  needsSquare: true,
} as const;

await runScript(manual, async (run) => {
  const { options, startedAt } = run;

  // From here on the file is ours until the script ends: a second one would wait, then exit with 75.
  const database = await run.openDatabase();

  // Up to the watermark everything has been read. The window begins a little before it, since Square's
  // search lags its writes: to read a customer twice does no harm, never to read one does.
  const watermark = database.read((db) => readWatermark(db, SCRIPT));
  const window = toWindow(options.since, options.until, watermark, startedAt);

  // Network first: the file is not touched before the last page is here. A page that fails after all
  // its retries ends the run: taken for an empty one, it would leave its customers out for good.
  const square = run.connectSquare(options.concurrency);
  const customers = new Map<string, Row>();
  // A customer who is edited while we read can come twice, once in each version. The newer one stays.
  const take = (page: Customer[], total: number) => {
    for (const customer of page) keepNewest(customers, customer);
    run.progress(customers.size, total);
  };
  const missing = await searchSlices(square, FIELD, window, take);

  // Customers and watermark go to disk in one save: neither is ever there without the other. The new
  // watermark is when the run began, not the newest row that came: whoever was created while we read,
  // or is indexed late, would be older than that row, and never be asked for again.
  const saved = await database.change((db) => {
    // Read again: an older file may have been put in the place of the one we began with.
    const before = readWatermark(db, SCRIPT);
    // Inserted, or replaced by Square's id. A customer made from one of our rows, whose answer was lost,
    // is linked to that row and not doubled.
    const counts = saveCustomers(db, [...customers.values()]);
    const report = { ...window, fetched: customers.size, ...counts, ...square.sent };
    // With somebody missing, the next run has to begin where this one did. Nor does a window that does
    // not reach back to the watermark move it, such as --since 5m on a Thursday.
    const next = missing > 0 ? before : toWatermark(window, before, square.fixedAt);
    recordRun(db, run, { ...report, watermark: next });
    return report;
  });

  const { fetched, inserted, updated, unchanged, linked } = saved;
  const text = `${fetched} read, ${inserted} new, ${updated} changed, ${unchanged} unchanged, ${linked} linked`;
  if (missing === 0) return { text, json: saved };
  // Square counts what it finds. Fewer than that is a failure, though every page looked well.
  const error = new SyncError(
    `Cannot read all customers: ${missing} fewer came than Square counted`,
    EXIT.failed,
    "run it again; those that came are saved, and the next run begins where this one did",
  );
  return { text, json: saved, error };
});

/*
Against the offline Square (npm run square):

$ npx tsx scripts/pull-created.ts
pull-created (offline): 239 read, 239 new, 0 changed, 0 unchanged, 0 linked
$ npx tsx scripts/pull-created.ts --since yesterday
pull-created: Cannot use --since "yesterday": it is not a duration (90s, 5m, 24h, 1d, 2w), a date (2026-08-01) or an RFC 3339 time
Try: npx tsx scripts/pull-created.ts --help
*/
