#!/usr/bin/env tsx
/**
 * Pull the customers that were created in Square since the last run into the database file.
 *
 * Steps:
 *   1. Work out the time window: from the watermark of the last run, minus an overlap, until now.
 *   2. Search Square for customers that were created in that window, page by page.
 *   3. Save them and the new watermark in one transaction.
 *
 * Reads Square: https://developer.squareup.com/reference/square/customers-api/search-customers
 * Writes the tables customers and sync_runs. Safe to run again: rows are matched by Square's customer id.
 *
 *     npx tsx scripts/pull-created.ts --since 24h
 *     deno run --no-prompt --ignore-env \
 *       --allow-env=SQUARE_ACCESS_TOKEN,SQUARE_ENVIRONMENT,SQUARE_BASE_URL,DATABASE_PATH \
 *       --allow-net=connect.squareup.com,connect.squareupsandbox.com --allow-read=. \
 *       --allow-write=database.db,database.db.tmp,database.db.lock scripts/pull-created.ts
 *
 * With --db shop.db, name shop.db, shop.db.tmp and shop.db.lock in --allow-write.
 * Exit codes: 0 done, 1 failed, 2 wrong usage, 4 token rejected, 75 try again later, 130/143 stopped.
 */
import { createSquareClient, READ_CUSTOMERS } from "../lib/client.ts";
import { saveCustomers } from "../lib/customers.ts";
import { openDatabase } from "../lib/database.ts";
import { PULL_OPTIONS, runScript } from "../lib/internal/cli.ts";
import { describePull } from "../lib/internal/report.ts";
import { buildRow, type CustomerRow, keepLatestVersion } from "../lib/mapping.ts";
import { type Filter, searchCustomers } from "../lib/paging.ts";
import { readWatermark, recordRun } from "../lib/runs.ts";
import { nextWatermark, resolveWindow, toTimeRange } from "../lib/window.ts";

const SCRIPT = "pull-created";

const manual = {
  name: SCRIPT,
  purpose: "pulls the customers that were created in Square since the last run",
  options: PULL_OPTIONS,
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
  const { options, startedAt } = context;

  // The file stays locked until the script ends. A second script waits a few seconds, then exits with 75.
  const database = await openDatabase(context);

  // The watermark is the time up to which everything has been read. Square's search index lags behind its
  // writes, so the window starts five minutes earlier. Reading a customer twice is harmless, because rows are
  // matched by id; missing one loses data.
  const watermark = database.query((db) => readWatermark(db, SCRIPT));
  const window = resolveWindow(options, watermark, startedAt);

  // The filter of the SearchCustomers request. To leave customers out, add a condition here, for example
  // creationSource: { values: ["INSTANT_PROFILE"], rule: "EXCLUDE" }.
  const filter: Filter = { createdAt: toTimeRange(window) };

  // Read all pages before changing the file. If a page fails after all retries, the script stops here and the
  // file is unchanged. Treating a failed page as an empty one would lose its customers without an error.
  const { concurrency } = options;
  const scopes = [READ_CUSTOMERS];
  const square = await createSquareClient(context, database, { scopes, concurrency });
  const customers = new Map<string, CustomerRow>();
  let missingCount = 0;
  for await (const page of searchCustomers(square, filter, { concurrency, until: startedAt })) {
    // A customer that is edited during the search can appear on two pages. Keep the newer version.
    for (const customer of page.customers) keepLatestVersion(customers, buildRow(customer));
    missingCount = page.missingCount;
    context.showProgress(customers.size, page.count);
  }

  // Save customers and watermark in one transaction, so that neither exists without the other. The new
  // watermark is the time at which this run started, not the newest created_at that arrived: a customer that
  // was created during the search, or indexed late, can be older than that and would never be read.
  const saved = await database.update((db) => {
    const result = saveCustomers(db, [...customers.values()]);
    // If customers are missing or could not be saved, the next run has to read the same window again.
    const isComplete = missingCount === 0 && result.rejected.length === 0;
    // Read the watermark again: if another program replaced the file meanwhile, it can have an older one.
    const before = readWatermark(db, SCRIPT);
    const after = isComplete ? nextWatermark(window, before, context.startedAt) : before;
    recordRun(db, context, {
      ...window,
      watermark: after,
      fetched: customers.size,
      inserted: result.inserted,
      updated: result.updated,
      unchanged: result.unchanged,
      linked: result.linked,
    });
    return result;
  });
  return describePull(context, "created", window, customers.size, saved, missingCount);
});

/*
Against the fake Square server (npm run square):

$ npx tsx scripts/pull-created.ts
pull-created (offline): 239 customers fetched since the beginning: 239 inserted

Times have a fixed form, so that a word is never taken for another time:

$ npx tsx scripts/pull-created.ts --since yesterday
pull-created: Cannot use --since "yesterday": expected a duration (90s, 5m, 24h, 1d, 2w), a date (2026-08-01) or an RFC 3339 time
Try: npm run pull-created -- --help
*/
