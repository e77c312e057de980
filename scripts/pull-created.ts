#!/usr/bin/env tsx
/**
 * Pull the customers that were created in Square since the last run into the database file.
 *
 * Steps:
 *   1. Work out the time window. It starts five minutes before the watermark, which is the time up
 *      to which earlier runs have read everything.
 *   2. Search Square for customers that were created in that window, page by page.
 *   3. Save the customers and the new watermark in one transaction.
 *
 * Reads Square: https://developer.squareup.com/reference/square/customers-api/search-customers
 * Writes the tables customers and sync_runs.
 * Safe to run again: rows are matched by Square's customer id.
 *
 *     npx tsx scripts/pull-created.ts --since 24h
 *     deno run --no-prompt --ignore-env \
 *       --allow-env=SQUARE_ACCESS_TOKEN,SQUARE_ENVIRONMENT,SQUARE_BASE_URL,DATABASE_PATH \
 *       --allow-net=connect.squareup.com,connect.squareupsandbox.com --allow-read=. \
 *       --allow-write=database.db,database.db.tmp,database.db.lock scripts/pull-created.ts
 *
 * With --db shop.db, name shop.db, shop.db.tmp and shop.db.lock in --allow-write. Exit codes: 0
 * done, 1 failed, 2 wrong usage, 4 token rejected, 75 try again later, 130/143 stopped.
 */
import { createSquareClient, READ_CUSTOMERS } from "../lib/client.ts";
import { saveCustomers } from "../lib/customers.ts";
import { openDatabase } from "../lib/database.ts";
import { PULL_OPTIONS, runScript } from "../lib/internal/cli.ts";
import { describePull } from "../lib/internal/report.ts";
import { buildRow, type CustomerRow, keepLatestVersion } from "../lib/mapping.ts";
import { type Filter, searchCustomers } from "../lib/paging.ts";
import { readWatermark, recordRun } from "../lib/runs.ts";
import { buildTimeRange, computeNextWatermark, resolveWindow } from "../lib/window.ts";

const SCRIPT = "pull-created";

const manual = {
  name: SCRIPT,
  purpose: "pulls the customers that were created in Square since the last run",
  options: PULL_OPTIONS, // --since, --until and --concurrency
  examples: [
    [SCRIPT, "continue where the last run ended"],
    [`${SCRIPT} --since 24h`, "read only the last day"],
    [`${SCRIPT} --since all`, "read all customers again"],
  ],
  exitCodes:
    "0 done, 1 failed, 2 wrong usage, 4 token rejected, 75 try again later, 130/143 stopped",
  needsSquare: true,
} as const;

await runScript(manual, async (context) => {
  const { options } = context;

  // The file stays locked until the script ends. A second script waits for it for a few seconds,
  // and then ends with exit code 75. Other programs do not know the lock.
  const database = await openDatabase(context);

  // Square's search shows a customer some seconds or minutes late. The window therefore starts five
  // minutes before the watermark. Reading a customer twice is harmless, because rows are matched by
  // id. Missing a customer loses data.
  const watermark = database.query((db) => readWatermark(db, SCRIPT));
  const window = resolveWindow(options, watermark, context.startedAt);

  // The filter of the SearchCustomers request. To leave customers out, add a condition here, for
  // example creationSource: { values: ["INSTANT_PROFILE"], rule: "EXCLUDE" }.
  const filter: Filter = { createdAt: buildTimeRange(window) };

  const { concurrency } = options;
  const scopes = [READ_CUSTOMERS];
  // From now on, context.startedAt is Square's time, if Square's clock is behind ours.
  const square = await createSquareClient(context, database, { scopes, concurrency });
  // A large result is read in parallel, in slices of creation time. searchCustomers divides the
  // time up to divideUntil. Customers that are created later are in the last slice, which has no
  // end.
  const search = { concurrency, divideUntil: context.startedAt };
  const customers = new Map<string, CustomerRow>();
  let missingCount = 0;
  // Read all pages before changing the file. If a page fails after all retries, the script stops
  // here and the file is unchanged. Treating it as an empty page would silently lose customers.
  for await (const page of searchCustomers(square, filter, search)) {
    // A customer that is edited during the search can be on two pages. Keep the newer version.
    for (const customer of page.customers) keepLatestVersion(customers, buildRow(customer));
    // Square returns a count with each page. missingCount is that count minus the customers that
    // have been returned so far. After the last page it should be 0.
    missingCount = page.missingCount;
    context.showProgress(customers.size, page.count);
  }

  const fetched = customers.size;

  // Save the customers and the watermark in one transaction, so that the watermark never covers
  // customers that were not saved.
  const saved = await database.update((db) => {
    const result = saveCustomers(db, [...customers.values()]);
    // If Square did not return all customers, or if a constraint or trigger of the table rejected
    // one, the watermark stays where it was, so that the next run reads the same window again.
    const isComplete = missingCount === 0 && result.rejected.length === 0;
    // Read the watermark from the file again. If another program has replaced the file during the
    // search, for example with a backup, the watermark in that file can be older.
    const before = readWatermark(db, SCRIPT);
    // The new watermark is the time when this run began, and not the newest created_at that was
    // returned. A long run can return a customer that was created near its end, and miss one that
    // was created near its beginning. With the newest time, the next run would not read the missed
    // one.
    const after = isComplete ? computeNextWatermark(window, before, context.startedAt) : before;
    recordRun(db, context, {
      since: window.since,
      until: window.until,
      watermark: after,
      fetched,
      inserted: result.inserted,
      updated: result.updated,
      unchanged: result.unchanged,
      linked: result.linked,
    });
    return result;
  });
  return describePull(context, { action: "created", window, fetched, saved, missingCount });
});

/*
Against the fake Square server (npm run square):

$ npx tsx scripts/pull-created.ts
pull-created (offline): 239 customers fetched since the beginning: 239 inserted

--since accepts a few forms of time. Any other word is rejected and not guessed:

$ npx tsx scripts/pull-created.ts --since yesterday
pull-created: Cannot use --since "yesterday": expected a duration (90s, 5m, 24h, 1d, 2w), a date (2026-08-01) or an RFC 3339 time
Try: --since 1d, --since 2026-08-01, or see --help
*/
