#!/usr/bin/env tsx
/**
 * Find the customers that were deleted or merged in Square, and mark their rows in the file.
 *
 * Steps:
 *   1. Compare how many customers Square and the file have, in total and in ranges of time.
 *   2. Compare the ids in each small range whose counts differ.
 *   3. Look up each id that only one side has: is the customer deleted, merged, or still there?
 *   4. Stop if suspiciously many customers would be marked.
 *   5. Mark the rows of deleted and merged customers, and save the others. No row is removed.
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
 *       --allow-write=database.db,database.db.tmp scripts/pull-deleted.ts
 *
 * With --db shop.db, name shop.db and shop.db.tmp in --allow-write. --help lists the exit codes.
 */
import { connect, saveAccount } from "../lib/client.ts";
import { reportSaved, saveCustomers } from "../lib/customers.ts";
import { readDatabase, updateDatabase } from "../lib/database.ts";
import {
  compareWithSquare,
  lookUpCustomers,
  markGone,
  readLiveCustomers,
  requireCompletePull,
} from "../lib/deleted.ts";
import { count, flag, formatNumber, runScript } from "../lib/internal/cli.ts";
import { SyncError } from "../lib/internal/errors.ts";
import { buildRow, type CustomerRow } from "../lib/mapping.ts";
import type { Filter } from "../lib/paging.ts";
import { formatCounts, pickCounts, recordRun } from "../lib/runs.ts";
import { SEARCH_LAG_MS } from "../lib/window.ts";

const SCRIPT = "pull-deleted";

// Without --max-delete, a run marks at most 20 rows or 10 % of the customers in the file as deleted,
// whichever is more. A larger number is probably a mistake.
const MAX_DELETED = 20;
const MAX_DELETED_SHARE = 0.1;

const manual = {
  name: SCRIPT,
  purpose: "marks the customers that were deleted or merged in Square",
  options: {
    "dry-run": flag("Show what would be marked, change nothing"),
    "max-delete": count("--max-delete", "Mark at most this many as deleted [20 or 10 %]"),
  },
  examples: [
    [`${SCRIPT} --dry-run`, "see what would be marked"],
    [SCRIPT, "mark it"],
    [`${SCRIPT} --max-delete 500`, "after a clean-up in Square"],
  ],
  needsSquare: true,
} as const;

await runScript(manual, async (context) => {
  const { options, databasePath, startedAt } = context;
  const { "dry-run": isDryRun = false } = options;
  // A customer that no pull has read yet would count as a difference.
  const live = await readDatabase(databasePath, (db) => {
    requireCompletePull(db, context);
    return readLiveCustomers(db);
  });
  const { square, account } = await connect(context);

  // Use the same filter as in the pulls, if they leave customers out.
  const filter: Filter = {};
  // Search may not return a customer yet that was created in the last five minutes.
  const createdBefore = startedAt - SEARCH_LAG_MS;
  const { checked, different } = await compareWithSquare(square, live, createdBefore, filter);

  // Search can be wrong about a customer for some minutes. Only this answer decides.
  const lookUps = await lookUpCustomers(square, different);
  const received = new Map<string, CustomerRow>();
  // The customers of the file that are gone, and the id that each was merged into; null = deleted.
  const gone = new Map<string, string | null>();
  const fileIds = new Set(live.map(({ id }) => id));
  for (const [id, customer] of lookUps) {
    // For a merged customer, Square returns the one that it became part of, under another id.
    const row = customer === null ? undefined : buildRow(customer);
    if (row !== undefined) received.set(row.id, row);
    if (fileIds.has(id) && row?.id !== id) gone.set(id, row?.id ?? null);
  }

  const deletedCount = [...gone.values()].filter((mergedInto) => mergedInto === null).length;
  const share = Math.floor(live.length * MAX_DELETED_SHARE);
  const limit = options["max-delete"] ?? Math.max(MAX_DELETED, share);
  if (deletedCount > limit && !isDryRun)
    throw new SyncError(
      "failed",
      `Cannot mark ${deletedCount} of ${formatNumber(live.length, "customer")} as deleted: that is more than ${limit}, so nothing was marked`,
      `--dry-run to list them; if they are really gone from Square, --max-delete ${deletedCount}`,
    );

  // A dry run does the same in a copy that is thrown away.
  const change = isDryRun ? readDatabase : updateDatabase;
  const { record, marked, ...saved } = await change(databasePath, (db) => {
    saveAccount(db, context, account);
    const { unchanged, ...saved } = saveCustomers(db, [...received.values()], startedAt);
    const marked = markGone(db, gone);
    const changes = [...saved.changes, ...marked.changes];
    const notSaved = [...saved.notSaved, ...marked.notSaved];
    const record = recordRun(db, context, { fetched: received.size }, { changes, unchanged });
    return { record, marked, changes, notSaved };
  });

  const rows = marked.changes.map(({ localId, id, outcome }) => {
    return { local_id: localId, id, outcome, merged_into: gone.get(id) ?? null };
  });
  const { unchanged, ...changed } = pickCounts(record);
  const counts = formatCounts(changed) || "nothing was deleted or merged";
  const summary = `${formatNumber(checked, "customer")} checked: ${counts}`;
  const table = rows.map((row) => [`${row.local_id}`, row.id, row.outcome, row.merged_into ?? ""]);
  return {
    ...reportSaved(saved),
    summary: isDryRun ? `dry run: ${summary}; nothing was saved` : summary,
    table: isDryRun && table.length > 0 ? [["row", "customer", "is", "merged into"], ...table] : [],
    json: { checked, ...pickCounts(record), dryRun: isDryRun, rows },
  };
});

/*
Against the fake Square server (npm run square), after pull-created:

$ npx tsx scripts/pull-deleted.ts
pull-deleted (offline): 239 customers checked: nothing was deleted or merged
*/
