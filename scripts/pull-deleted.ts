#!/usr/bin/env tsx
import type { Database } from "sql.js";
/**
 * Find the customers that were deleted or merged in Square, and mark their rows in the database file.
 *
 * Square's search does not return what is gone. But it counts, so this script compares counts:
 *
 * Steps:
 *   1. Compare how many customers Square and the file have. If the counts differ, divide the customers by their
 *      time of creation and compare the parts, until the ids on one page show the difference.
 *   2. Ask Square for each customer that search did not return: is it deleted, merged, or still there?
 *   3. Stop if the number of customers to mark is suspiciously large.
 *   4. Mark the rows. Nothing is removed from the file.
 *
 * Reads Square: https://developer.squareup.com/reference/square/customers-api/search-customers
 *               https://developer.squareup.com/reference/square/customers-api/bulk-retrieve-customers
 * Writes the tables customers and sync_runs. Safe to run again: a marked row is not marked twice.
 *
 *     npx tsx scripts/pull-deleted.ts --dry-run
 *     deno run --no-prompt --ignore-env \
 *       --allow-env=SQUARE_ACCESS_TOKEN,SQUARE_ENVIRONMENT,SQUARE_BASE_URL,DATABASE_PATH \
 *       --allow-net=connect.squareup.com,connect.squareupsandbox.com --allow-read=. \
 *       --allow-write=database.db,database.db.tmp,database.db.lock scripts/pull-deleted.ts
 *
 * With --db shop.db, name shop.db, shop.db.tmp and shop.db.lock in --allow-write.
 * Exit codes: 0 done, 1 failed, 2 wrong usage, 4 token rejected, 75 try again later, 130/143 stopped.
 */
import type { Square } from "square";
import { createSquareClient, READ_CUSTOMERS } from "../lib/client.ts";
import { type GoneCustomer, markGone, readLiveCustomers, saveCustomers } from "../lib/customers.ts";
import { openDatabase } from "../lib/database.ts";
import { countOption, flag, runScript } from "../lib/internal/cli.ts";
import { describeDeletions, refuseToMark } from "../lib/internal/report.ts";
import { buildRow } from "../lib/mapping.ts";
import type { Filter } from "../lib/paging.ts";
import { compareWithSquare, lookUpCustomers } from "../lib/reconcile.ts";
import { recordRun, requireCompletePull } from "../lib/runs.ts";

const SCRIPT = "pull-deleted";

// Search returns a new customer only after some seconds or minutes. Newer customers are left to a later run.
const SEARCH_LAG_MS = 5 * 60_000;

// The seat belt: more marks than this in one run look like a mistake, such as the token of another account.
const MAX_MARKS = 20; // rows
const MAX_MARKED_SHARE = 0.1; // of the customers in the file

const manual = {
  name: SCRIPT,
  purpose: "marks the customers that were deleted or merged in Square",
  options: {
    "dry-run": flag("Show what would be marked, change nothing"),
    "max-delete": countOption("--max-delete", 1_000_000_000, "Mark up to this many rows"),
    concurrency: {
      ...countOption("--concurrency", 16, "Requests at the same time"),
      default: 4,
    },
  },
  examples: [
    [`${SCRIPT} --dry-run`, "see what would be marked"],
    [SCRIPT, "mark it"],
    [`${SCRIPT} --max-delete 500`, "mark up to 500 rows, after a clean-up in Square"],
  ],
  exitCodes:
    "0 done, 1 failed, 2 wrong usage, 4 token rejected, 75 try again later, 130/143 stopped",
  needsSquare: true,
} as const;

await runScript(manual, async (context) => {
  const { options } = context;
  const { "dry-run": isDryRun = false, "max-delete": maxDelete, concurrency } = options;
  const database = await openDatabase(context);

  // Before the first complete pull, most customers of Square are missing in the file.
  database.query((db) => requireCompletePull(db, context, "pull-created"));
  const customers = database.query(readLiveCustomers);

  // Compare counts, and then ids. On a night without deletions this is a single SearchCustomers request.
  const scopes = [READ_CUSTOMERS];
  const square = await createSquareClient(context, database, { scopes, concurrency });
  const before = context.startedAt - SEARCH_LAG_MS;
  // If you leave customers out of the pulls, add the same condition here. Otherwise this script inserts them.
  const filter: Filter = {};
  const { checked, notFound, unknown } = await compareWithSquare(square, customers, {
    before,
    concurrency,
    filter,
  });

  // A customer that search does not return is not always deleted: search lags, and it leaves out profiles without
  // name, email and phone. So ask for each id with BulkRetrieveCustomers, and believe only that answer. In the
  // same way, ask for customers that search returned and the file lacks.
  const unknownIds = new Set(unknown.map(({ id = "" }) => id));
  const answers = await lookUpCustomers(square, [...notFound, ...unknownIds]);
  const gone: GoneCustomer[] = [];
  const present: Square.Customer[] = [];
  for (const [id, answer] of answers) {
    if (answer.outcome !== "deleted") present.push(answer.customer);
    if (answer.outcome === "present" || unknownIds.has(id)) continue;
    const mergedInto = answer.outcome === "merged" ? (answer.customer.id ?? null) : null;
    gone.push({ id, mergedInto });
  }

  const limit = maxDelete ?? Math.max(MAX_MARKS, Math.floor(customers.length * MAX_MARKED_SHARE));
  if (gone.length > limit && !isDryRun)
    throw refuseToMark(context, gone.length, customers.length, limit);

  // One transaction for all marks, made only now that the whole comparison is done. A customer that the file
  // lacks is inserted, for example the profile that two others were merged into.
  const save = (db: Database) => {
    const rows = new Map(present.map((customer) => [customer.id, buildRow(customer)]));
    const saved = saveCustomers(db, [...rows.values()]);
    const marked = markGone(db, gone);
    const merged = marked.filter(({ outcome }) => outcome === "merged").length;
    const { inserted, updated, unchanged, linked } = saved;
    const counts = { inserted, updated, linked, deleted: marked.length - merged, merged };
    recordRun(db, context, { fetched: rows.size, unchanged, ...counts });
    return { ...counts, saved, marked };
  };
  const result = isDryRun ? database.simulate(save) : await database.update(save);
  return describeDeletions(context, checked, result, isDryRun);
});

/*
Against the fake Square server (npm run square), after pull-created:

$ npx tsx scripts/pull-deleted.ts
pull-deleted (offline): 239 customers checked: nothing was deleted or merged
*/
