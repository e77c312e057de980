#!/usr/bin/env tsx
/**
 * Push the rows that are not in Square yet: create a customer in Square for each row without an id.
 *
 * Steps:
 *   1. Select the rows and check them. Invalid rows and possible duplicates are not sent.
 *   2. Store an idempotency key in each row before anything is sent.
 *   3. Look up the rows in doubt: an earlier run may have sent them, and the outcome is unknown.
 *   4. Create the others, up to 100 with each request, and save their ids after each reply.
 *
 * Writes Square:
 *   https://developer.squareup.com/reference/square/customers-api/bulk-create-customers
 * Reads and writes the tables customers and sync_runs.
 * Safe to run again: no row is created twice.
 *
 *     npx tsx scripts/push-new.ts --dry-run
 *     deno run --no-prompt --ignore-env \
 *       --allow-env=SQUARE_ACCESS_TOKEN,SQUARE_ENVIRONMENT,SQUARE_BASE_URL,DATABASE_PATH \
 *       --allow-net=connect.squareup.com,connect.squareupsandbox.com --allow-read=. \
 *       --allow-write=database.db,database.db.tmp,database.db.lock scripts/push-new.ts
 *
 * With --db shop.db, name shop.db, shop.db.tmp and shop.db.lock in --allow-write.
 * Exit codes: 0 done, 1 failed, 2 wrong usage, 3 some rows wait for you, 4 token rejected, 75 try
 * again later, 130/143 stopped.
 */
import type { SquareClient } from "square";
import { createSquareClient, READ_CUSTOMERS, WRITE_CUSTOMERS } from "../lib/client.ts";
import { listRowsWithOwnId } from "../lib/customers.ts";
import { openDatabase } from "../lib/database.ts";
import { isUncheckedToken } from "../lib/internal/account.ts";
import { countOption, flag, runScript, timeOption } from "../lib/internal/cli.ts";
import { countOutcomes, describeDryRun, describePush } from "../lib/internal/push-report.ts";
import { needsRequest, prepareRows, storeCheckResults } from "../lib/prepare.ts";
import { createCustomers, divideIntoBatches, linkRowsInDoubt } from "../lib/push.ts";
import { readWatermark, recordRun, requirePullForPush } from "../lib/runs.ts";
import { computeNextWatermark, resolveWindow } from "../lib/window.ts";

const SCRIPT = "push-new";
const MAX_BATCH_SIZE = 100; // rows in one request, which is Square's limit

const manual = {
  name: SCRIPT,
  purpose: "creates the rows without an id as customers in Square",
  options: {
    "dry-run": flag("Show what would be sent, send nothing"),
    source: { type: "string", requiresArg: true, describe: "Only rows with this source" },
    "created-since": {
      ...timeOption("--created-since", "Only rows created since this time", ["last", "all"]),
      default: "all",
    },
    limit: countOption("--limit", 1_000_000_000, "At most this many rows"),
    "batch-size": {
      ...countOption("--batch-size", MAX_BATCH_SIZE, "Rows per request; 1 = use CreateCustomer"),
      default: MAX_BATCH_SIZE,
    },
    "allow-duplicates": flag("Send possible duplicates too"),
    "allow-subscribe": flag("Create unsubscribed rows as subscribed"),
    "skip-pull-check": flag("Push without a complete pull-created"),
  },
  examples: [
    [`${SCRIPT} --dry-run`, "see what would be sent"],
    [SCRIPT, "send it"],
    [`${SCRIPT} --source web-shop --limit 10`, "try it with a few rows"],
  ],
  exitCodes:
    "0 done, 1 failed, 2 wrong usage, 3 some rows wait for you, 4 token rejected, 75 try again later, 130/143 stopped",
  needsSquare: true,
} as const;

await runScript(manual, async (context) => {
  const { options } = context;
  const { source, limit, "dry-run": isDryRun = false, "batch-size": batchSize } = options;
  const database = await openDatabase(context);

  // If a customer of Square is missing in the file, a push can create it a second time. So require
  // that pull-created has read all customers, and that they are still in the file. Warn if that was
  // long ago.
  if (!options["skip-pull-check"])
    database.query((db) => requirePullForPush(db, context, "pull-created"));

  // Select the rows without an id. --source, --created-since and --limit narrow the selection.
  // push-new has a watermark of another kind: every row that was created before it has been pushed.
  // --created-since last continues there.
  const watermark = database.query((db) => readWatermark(db, SCRIPT));
  const window = resolveWindow({ since: options["created-since"] }, watermark, context.startedAt);
  const selection = {
    source,
    createdSince: window.since,
    limit,
    allowDuplicates: options["allow-duplicates"] ?? false,
    allowSubscribe: options["allow-subscribe"] ?? false,
  };
  // prepareRows checks the rows. For each row, it tries to save an example of Square's reply, to
  // find out if a constraint or trigger of the table would reject the real one. simulate undoes all
  // of it.
  const preview = database.simulate((db) => prepareRows(db, selection));
  // Rows with an id that is not from Square, for example your own number. They are not sent.
  const rowsWithOwnId = database.query(listRowsWithOwnId);
  if (isDryRun) return describeDryRun(context, preview, rowsWithOwnId, database.account);

  // Creating the client takes a second. It also checks that the token belongs to the seller of this
  // file, so it comes before any key is stored. It is needed if there are rows to send, or if this
  // token was never checked for this file.
  let square: SquareClient | undefined;
  const scopes = [READ_CUSTOMERS, WRITE_CUSTOMERS];
  if (preview.some(needsRequest) || isUncheckedToken(database.account, context.square.token))
    square = await createSquareClient(context, database, { scopes });

  // Store an idempotency key in each row before the first request. If the key existed only in
  // memory and the script were killed, the next run would create the customer a second time. Check
  // the rows again, because another program can have changed the file since the first check.
  const rows = await database.update((db) => {
    const prepared = prepareRows(db, selection);
    storeCheckResults(db, prepared);
    return prepared;
  });

  // linkRowsInDoubt and createCustomers set the outcome of each row, and save it before the next
  // batch begins. If the script is killed, the outcome of one batch is unknown. The file does not
  // record which one, so the next run looks up all rows that have a key and no id. If search does
  // not return a row, it is sent again with its stored key. If Square knows that key, it returns
  // the customer that it created before, and not a second one.
  const due = rows.filter(needsRequest);
  const useBulk = batchSize > 1;
  let done = 0;
  for (const batch of divideIntoBatches(due, batchSize)) {
    // If the preview had no rows to send, there is no client yet. Another program can have added a
    // row since the preview.
    square ??= await createSquareClient(context, database, { scopes });
    await linkRowsInDoubt(square, database, batch);
    // The selection is needed again, because rows are checked once more right before they are sent.
    await createCustomers(square, database, context, batch, { ...selection, useBulk });
    done += batch.length;
    context.showProgress(done, due.length);
  }

  // Move the watermark only if all rows were selected and none of them is left. Otherwise the next
  // run with --created-since last would skip the rows that are left. `later` counts the rows that
  // were not sent, or that Square did not answer for. If --created-since has left out older rows,
  // computeNextWatermark keeps the old watermark.
  const { created, linked, refused, held, later } = countOutcomes(rows);
  const isComplete = source === undefined && limit === undefined && refused + held + later === 0;
  await database.update((db) => {
    const before = readWatermark(db, SCRIPT);
    const after = isComplete ? computeNextWatermark(window, before, context.startedAt) : before;
    recordRun(db, context, {
      since: window.since,
      watermark: after,
      created,
      linked,
      refused,
      held,
    });
  });
  return describePush(context, rows, rowsWithOwnId);
});

/*
Against the fake Square server (npm run square), with the rows of fixtures/data/local-rows.json:

$ npx tsx scripts/push-new.ts
push-new: row 243 is on hold: same email_address as row 12, customer ADA1815LOVELACE01234567801
push-new: row 244 is rejected: phone_number is invalid: expected 9 to 16 digits, for example +12065550100
push-new (offline): 8 rows selected: 6 created, 1 refused, 1 held
Try: correct the rejected rows and run it again; change or delete the rows on hold, or send them with --allow-duplicates
$ npx tsx scripts/push-new.ts --source nowhere
push-new (offline): no rows to push
*/
