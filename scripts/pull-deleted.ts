#!/usr/bin/env tsx
/**
 * Find the customers that were deleted or merged in Square, and mark their rows in the file.
 *
 * Square does not report deletions: a deleted customer only stops appearing in search. To find it
 * with few requests, this script first compares counts, and compares ids only where they differ.
 *
 * Steps:
 *   1. Compare how many customers Square and the file have, in total and in slices of time.
 *   2. Compare the ids in each small slice whose counts differ.
 *   3. Look up each id that only one side has: is the customer deleted, merged, or still there?
 *   4. Stop if suspiciously many customers would be marked.
 *   5. Mark the rows of deleted and merged customers. Insert customers that the file lacks. No row is
 *      removed.
 *
 * Reads Square: https://developer.squareup.com/reference/square/customers-api/search-customers
 *               https://developer.squareup.com/reference/square/customers-api/bulk-retrieve-customers
 * Writes the tables customers and sync_runs.
 * Safe to run again: a row that is already marked is not marked again.
 *
 *     npx tsx scripts/pull-deleted.ts --dry-run
 *     deno run --no-prompt --ignore-env \
 *       --allow-env=SQUARE_ACCESS_TOKEN,SQUARE_ENVIRONMENT,SQUARE_BASE_URL,DATABASE_PATH \
 *       --allow-net=connect.squareup.com,connect.squareupsandbox.com --allow-read=. \
 *       --allow-write=database.db,database.db.tmp,database.db.lock scripts/pull-deleted.ts
 *
 * With --db shop.db, name shop.db, shop.db.tmp and shop.db.lock in --allow-write. Exit codes: 0
 * done, 1 failed, 2 wrong usage, 4 token rejected, 75 try again later, 130/143 stopped.
 */
import type { Database } from "sql.js";
import { createSquareClient, READ_CUSTOMERS } from "../lib/client.ts";
import { type GoneCustomer, markGone, readLiveCustomers, saveCustomers } from "../lib/customers.ts";
import { openDatabase } from "../lib/database.ts";
import { countOption, flag, runScript } from "../lib/internal/cli.ts";
import { createTooManyMarksError, describeDeletions } from "../lib/internal/report.ts";
import { buildRow, type CustomerRow } from "../lib/mapping.ts";
import type { Filter } from "../lib/paging.ts";
import { compareWithSquare, lookUpCustomers } from "../lib/reconcile.ts";
import { recordRun, requireCompletePull } from "../lib/runs.ts";
import { SEARCH_LAG_MS } from "../lib/window.ts";

const SCRIPT = "pull-deleted";

// Without --max-delete, a run marks at most 20 rows or 10 % of the customers in the file, whichever
// is more. A larger number is probably a mistake, for example the access token of another account.
const MAX_MARKS = 20;
const MAX_MARKED_SHARE = 0.1;

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

  // Before the first complete pull, the counts differ because the file has only some customers.
  database.query((db) => requireCompletePull(db, context, "pull-created"));
  const customers = database.query(readLiveCustomers);

  const scopes = [READ_CUSTOMERS];
  const square = await createSquareClient(context, database, { scopes, concurrency });
  // If the filters of the pulls have a condition, add it here. Otherwise this script inserts the
  // customers that the pulls leave out, because they are missing in the file.
  const filter: Filter = {};
  // Search may not show the newest customers yet. A later run compares them.
  const createdBefore = context.startedAt - SEARCH_LAG_MS;
  // If nothing was deleted, the comparison takes one SearchCustomers request.
  const comparison = await compareWithSquare(square, customers, {
    createdBefore,
    concurrency,
    filter,
  });

  // Search proves nothing, so look up both kinds of ids with BulkRetrieveCustomers:
  // - A customer that is missing in search can exist. Search shows changes late, and it never
  //   returns a customer without a name, company, email address and phone number.
  // - A customer that is missing in the file can be deleted. Search returns a deleted customer for
  //   a while.
  const { checked, missingInSearch, missingInFile } = comparison;
  const answers = await lookUpCustomers(square, [...missingInSearch, ...missingInFile]);

  // The customers to save. For a merged id, answer.customer is the customer that it was merged
  // into. Two ids can lead to the same customer, and the map keeps it once.
  const present = new Map<string, CustomerRow>();
  for (const answer of answers.values()) {
    if (answer.outcome === "deleted") continue;
    const row = buildRow(answer.customer);
    present.set(row.id, row);
  }

  // The customers of the file that are gone.
  const gone: GoneCustomer[] = [];
  for (const id of missingInSearch) {
    const answer = answers.get(id);
    if (answer?.outcome === "deleted") gone.push({ id, mergedInto: null });
    if (answer?.outcome === "merged") gone.push({ id, mergedInto: answer.mergedInto });
  }

  const limit = maxDelete ?? Math.max(MAX_MARKS, Math.floor(customers.length * MAX_MARKED_SHARE));
  if (gone.length > limit) {
    const error = createTooManyMarksError(context, gone.length, customers.length, limit);
    if (!isDryRun) throw error;
    context.warn(`a run without --dry-run would end with: ${error.message}`);
  }

  // Save everything in one transaction. A customer that is missing in the file is inserted, for
  // example the customer into which two others were merged.
  const save = (db: Database) => {
    const saved = saveCustomers(db, [...present.values()]);
    const { marked, rejected } = markGone(db, gone);
    const merged = marked.filter(({ outcome }) => outcome === "merged").length;
    const deleted = marked.length - merged;
    const { inserted, updated, unchanged, linked } = saved;
    const counts = { inserted, updated, unchanged, linked, deleted, merged };
    recordRun(db, context, { fetched: present.size, ...counts });
    return { deleted, merged, saved, marked, rejected: [...saved.rejected, ...rejected] };
  };
  const result = isDryRun ? database.simulate(save) : await database.update(save);
  return describeDeletions(context, checked, result, isDryRun);
});

/*
Against the fake Square server (npm run square), after pull-created:

$ npx tsx scripts/pull-deleted.ts
pull-deleted (offline): 239 customers checked: nothing was deleted or merged
*/
