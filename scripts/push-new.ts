#!/usr/bin/env tsx
/**
 * Push the rows that are not in Square yet: create a customer in Square for each row without an id.
 *
 * Steps:
 *   1. Select the rows and check them. Rows that Square would reject, and possible duplicates, are not sent.
 *   2. Store an idempotency key in each row before anything is sent.
 *   3. Look up rows in doubt: they were sent by an earlier run, and its outcome is unknown.
 *   4. Create the others with BulkCreateCustomers, up to 100 in one call, and save their new ids after each call.
 *
 * Writes Square: https://developer.squareup.com/reference/square/customers-api/bulk-create-customers
 * Reads and writes the tables customers and sync_runs. Safe to run again: a row is never created twice.
 *
 *     npx tsx scripts/push-new.ts --dry-run
 *     deno run --no-prompt --ignore-env \
 *       --allow-env=SQUARE_ACCESS_TOKEN,SQUARE_ENVIRONMENT,SQUARE_BASE_URL,DATABASE_PATH \
 *       --allow-net=connect.squareup.com,connect.squareupsandbox.com --allow-read=. \
 *       --allow-write=database.db,database.db.tmp,database.db.lock scripts/push-new.ts
 *
 * With --db shop.db, name shop.db, shop.db.tmp and shop.db.lock in --allow-write.
 * Exit codes: 0 done, 1 failed, 2 wrong usage, 3 rows wait for you, 4 token rejected, 75 try again later,
 * 130/143 stopped.
 */
import type { SquareClient } from "square";
import { createSquareClient, READ_CUSTOMERS, WRITE_CUSTOMERS } from "../lib/client.ts";
import { listRowsWithOwnId } from "../lib/customers.ts";
import { openDatabase } from "../lib/database.ts";
import { isUncheckedToken } from "../lib/internal/account.ts";
import { countOption, flag, runScript, timeOption } from "../lib/internal/cli.ts";
import { countOutcomes, describeDryRun, describePush } from "../lib/internal/push-report.ts";
import { prepareRows, storeKeys } from "../lib/prepare.ts";
import { createCustomers, divideIntoBatches, linkRowsInDoubt } from "../lib/push.ts";
import {
  readWatermark,
  recordRun,
  requireCompletePull,
  requirePulledCustomers,
  warnOfOldPull,
} from "../lib/runs.ts";
import { nextWatermark, resolveWindow } from "../lib/window.ts";

const SCRIPT = "push-new";
const MAX_BATCH_SIZE = 100; // rows in one call, the most that Square accepts

const manual = {
  name: SCRIPT,
  purpose: "creates the rows without an id as customers in Square",
  options: {
    "dry-run": flag("Show what would be sent, send nothing"),
    source: { type: "string", requiresArg: true, describe: "Only rows with this source" },
    "created-since": {
      ...timeOption("--created-since", "Only rows created since this time"),
      default: "all",
    },
    limit: countOption("--limit", 1_000_000_000, "At most this many rows"),
    "batch-size": {
      ...countOption("--batch-size", MAX_BATCH_SIZE, "Rows in one call; 1 = CreateCustomer"),
      default: MAX_BATCH_SIZE,
    },
    "allow-duplicates": flag("Send possible duplicates too"),
    "allow-subscribe": flag("Send rows with email_unsubscribed too"),
    "skip-pull-check": flag("Push without a complete pull-created"),
  },
  examples: [
    [`${SCRIPT} --dry-run`, "see what would be sent"],
    [SCRIPT, "send it"],
    [`${SCRIPT} --source web-shop --limit 10`, "try it with a few rows"],
  ],
  exitCodes:
    "0 done, 1 failed, 2 wrong usage, 3 rows wait for you, 4 token rejected, 75 try again later, 130/143 stopped",
  needsSquare: true,
} as const;

await runScript(manual, async (context) => {
  const { options } = context;
  const { source, limit, "dry-run": isDryRun = false, "batch-size": batchSize } = options;
  const database = await openDatabase(context);

  // Without a complete pull the file does not know which customers Square has, and the push would create them a
  // second time.
  if (!options["skip-pull-check"])
    database.query((db) => {
      requireCompletePull(db, context, "pull-created");
      requirePulledCustomers(db, context, "pull-created");
      warnOfOldPull(db, context, "pull-created");
    });

  // Select the rows without an id. The options narrow the selection. Checking them writes nothing.
  const watermark = database.query((db) => readWatermark(db, SCRIPT));
  const { since } = resolveWindow(
    { since: options["created-since"] },
    watermark,
    context.startedAt,
  );
  const selection = {
    source,
    createdSince: since,
    limit,
    allowDuplicates: options["allow-duplicates"] ?? false,
    allowSubscribe: options["allow-subscribe"] ?? false,
  };
  const preview = database.simulate((db) => prepareRows(db, selection));
  const rowsWithOwnId = database.query(listRowsWithOwnId);
  if (isDryRun) return describeDryRun(context, preview, rowsWithOwnId, database.account);

  // The client is created only when there is something to send, because it takes a second and a request.
  let square: SquareClient | undefined;
  const scopes = [READ_CUSTOMERS, WRITE_CUSTOMERS];
  const connect = async () => (square ??= await createSquareClient(context, database, { scopes }));
  const hasWork = preview.some(({ outcome, inDoubt }) => outcome === "ready" || inDoubt);
  // Creating it also checks the token. A token that is new to this file may belong to another seller, so it is
  // checked on a run without work too.
  if (hasWork || isUncheckedToken(database.account, context.square.token)) await connect();

  // Every row gets its idempotency key, and the keys are in the file before the first request. A key that is made
  // at the moment of the call is lost together with the reply, and the next run would create the customer again.
  const rows = await database.update((db) => {
    const prepared = prepareRows(db, selection);
    storeKeys(db, prepared);
    return prepared;
  });

  const due = rows.filter(({ outcome, inDoubt }) => outcome === "ready" || inDoubt);
  let done = 0;
  for (const batch of divideIntoBatches(due, batchSize)) {
    await linkRowsInDoubt(await connect(), database, batch);
    // BulkCreateCustomers takes the customers under their idempotency keys. If a reply is lost and the same key
    // arrives again, Square returns the customer that it created the first time. The ids of each reply are saved
    // before the next call, so a run that is killed leaves at most one call in doubt.
    await createCustomers(await connect(), database, context, batch, { ...selection, batchSize });
    done += batch.length;
    context.showProgress(done, due.length);
  }

  // Rows that were left out or have to wait must be selected again, so --created-since last may not skip them.
  const counts = countOutcomes(rows);
  const isComplete =
    source === undefined &&
    limit === undefined &&
    counts.refused + counts.held + counts.later === 0;
  await database.update((db) => {
    const before = readWatermark(db, SCRIPT);
    const after = isComplete
      ? nextWatermark({ since, until: null }, before, context.startedAt)
      : before;
    const { created, linked, refused, held } = counts;
    recordRun(db, context, { since, watermark: after, created, linked, refused, held });
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
