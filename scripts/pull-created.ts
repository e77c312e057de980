#!/usr/bin/env tsx
/**
 * Pull the customers that were created in Square since the last run into the database file.
 *
 * Steps:
 *   1. Work out the time window. It starts five minutes before the watermark, which is the time up
 *      to which earlier runs have read everything.
 *   2. Search Square for customers that were created in that window, page by page.
 *   3. Save the customers and the new watermark together.
 *
 * Reads Square: https://developer.squareup.com/reference/square/customers-api/search-customers
 * Writes the tables customers and sync_runs.
 * Safe to run again: rows are matched by Square's customer id.
 *
 *     npx tsx scripts/pull-created.ts --since 24h
 *     deno run --no-prompt --ignore-env \
 *       --allow-env=SQUARE_ACCESS_TOKEN,SQUARE_ENVIRONMENT,SQUARE_BASE_URL,DATABASE_PATH \
 *       --allow-net=connect.squareup.com,connect.squareupsandbox.com --allow-read=. \
 *       --allow-write=database.db,database.db.tmp scripts/pull-created.ts
 *
 * With --db shop.db, name shop.db and shop.db.tmp in --allow-write. --help lists the exit codes.
 */
import { computeStartTime, connect, saveAccount } from "../lib/client.ts";
import { reportSaved, saveCustomers } from "../lib/customers.ts";
import { readDatabase, updateDatabase } from "../lib/database.ts";
import { PULL_OPTIONS, runScript } from "../lib/internal/cli.ts";
import { buildRow, type CustomerRow, keepLatestVersion } from "../lib/mapping.ts";
import { type Filter, searchCustomers } from "../lib/paging.ts";
import { describePull, readWatermark, recordRun } from "../lib/runs.ts";
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
  needsSquare: true,
} as const;

await runScript(manual, async (context) => {
  const { options, databasePath, startedAt } = context;

  // Square's search shows a customer some seconds or minutes late. The window therefore starts five
  // minutes before the watermark. Reading a customer twice is harmless, because rows are matched by
  // id. Missing a customer loses data.
  const watermark = await readDatabase(databasePath, (db) => readWatermark(db, SCRIPT));
  const window = resolveWindow(options, watermark, startedAt);

  // Also checks that the token belongs to the seller of the file.
  const { square, account } = await connect(context, options.concurrency);

  // The filter of the SearchCustomers request. To leave customers out, add a condition here, for
  // example creationSource: { values: ["INSTANT_PROFILE"], rule: "EXCLUDE" }.
  const filter: Filter = { createdAt: buildTimeRange(window) };

  // Read all pages before changing the file. If a page fails after all retries, the script stops
  // here and the file is unchanged. Treating it as an empty page would silently lose customers.
  const customers = new Map<string, CustomerRow>();
  let missingCount = 0;
  const search = { concurrency: options.concurrency, divideUntil: startedAt };
  for await (const page of searchCustomers(square, filter, search)) {
    // A customer that is edited during the search can be on two pages. Keep the newer version.
    for (const customer of page.customers) keepLatestVersion(customers, buildRow(customer));
    // Each page has the number of customers that Square has counted and not returned so far. After
    // the last page, it should be 0.
    missingCount = page.missingCount;
    context.showProgress(`${customers.size} of ${page.count} customers`);
  }

  // Save the customers and the watermark in one step, so that the watermark never covers customers
  // that were not saved.
  return await updateDatabase(databasePath, (db) => {
    saveAccount(db, context, account);
    const saved = saveCustomers(db, [...customers.values()], startedAt);
    // If a customer is missing, this run saves no watermark, and the next one reads the window
    // again. The new watermark is the time when this run began, and not the newest created_at
    // that was returned. A long run can return a customer that was created near its end, and miss
    // one that was created near its beginning.
    const isComplete = missingCount === 0 && saved.notSaved.length === 0;
    // Another run may have saved a watermark meanwhile, so it is read again.
    const before = readWatermark(db, SCRIPT);
    const after = computeNextWatermark(window, before, computeStartTime(context));
    const watermark = isComplete ? after : null;
    const record = recordRun(db, context, { ...window, watermark, fetched: customers.size }, saved);
    return { ...describePull("created", record, missingCount), ...reportSaved(saved) };
  });
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
