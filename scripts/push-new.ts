#!/usr/bin/env tsx
/**
 * Push the rows that are not in Square yet: create a customer in Square for each row without an id.
 *
 * Steps, for each batch of at most 100 rows:
 *   1. Look up the rows in doubt: an earlier run may have sent them, and the outcome is unknown.
 *   2. Check the rows, and store an idempotency key in each row that is sent.
 *   3. Link rows whose customer is in Square already, and create the others.
 *   4. Save the replies.
 *
 * Writes Square:
 *   https://developer.squareup.com/reference/square/customers-api/bulk-create-customers
 *   https://developer.squareup.com/reference/square/customers-api/update-customer
 * Reads and writes the tables customers and sync_runs.
 * Safe to run again: no row is created twice.
 *
 *     npx tsx scripts/push-new.ts --dry-run
 *     deno run --no-prompt --ignore-env \
 *       --allow-env=SQUARE_ACCESS_TOKEN,SQUARE_ENVIRONMENT,SQUARE_BASE_URL,DATABASE_PATH \
 *       --allow-net=connect.squareup.com,connect.squareupsandbox.com --allow-read=. \
 *       --allow-write=database.db,database.db.tmp scripts/push-new.ts
 *
 * With --db shop.db, name shop.db and shop.db.tmp in --allow-write. --help lists the exit codes.
 */
import { connect, readAccount, saveAccount } from "../lib/client.ts";
import { readDatabase, updateDatabase } from "../lib/database.ts";
import { count, flag, runScript, text } from "../lib/internal/cli.ts";
import { SyncError } from "../lib/internal/errors.ts";
import { prepareLinks, saveLinks } from "../lib/link.ts";
import { type PushRow, prepareRows, requirePullForPush, selectRows } from "../lib/prepare.ts";
import {
  createCustomers,
  findInSquare,
  finishPush,
  requireAcceptedToken,
  saveReplies,
} from "../lib/push.ts";
import { parseTime } from "../lib/window.ts";

const SCRIPT = "push-new";
const MAX_BATCH_SIZE = 100; // rows in one request, which is Square's limit

const manual = {
  name: SCRIPT,
  purpose: "creates the rows without an id as customers in Square",
  options: {
    "dry-run": flag("Show what would be sent, send nothing"),
    source: text("Only rows with this source"),
    "created-since": text("Only rows created since then, for example 24h"),
    limit: count("--limit", "At most this many rows"),
    "batch-size": {
      ...count("--batch-size", "Rows per request; 1 = use CreateCustomer", MAX_BATCH_SIZE),
      default: MAX_BATCH_SIZE,
    },
    "link-duplicates": flag("Link possible duplicates to their customer"),
    "allow-duplicates": flag("Send possible duplicates too"),
    "skip-pull-check": flag("Push without a complete pull-created"),
  },
  examples: [
    [`${SCRIPT} --dry-run`, "see what would be sent"],
    [SCRIPT, "send it"],
    [`${SCRIPT} --source web-shop --limit 10`, "try it with a few rows"],
  ],
  needsSquare: true,
} as const;

await runScript(manual, async (context) => {
  const { options, databasePath, startedAt, traffic } = context;
  const { "created-since": since, "dry-run": isDryRun = false } = options;
  const pushOptions = {
    source: options.source,
    createdSince: since === undefined ? null : parseTime("--created-since", since, startedAt),
    limit: options.limit,
    batchSize: isDryRun ? Number.POSITIVE_INFINITY : options["batch-size"],
    allowDuplicates: options["allow-duplicates"] ?? false,
    linkDuplicates: options["link-duplicates"] ?? false,
    isDryRun,
  };
  if (pushOptions.allowDuplicates && pushOptions.linkDuplicates)
    throw new SyncError(
      "usage",
      "Cannot use --link-duplicates and --allow-duplicates together",
      "one of them",
    );
  // If a customer of Square is missing in the file, a push can create it a second time.
  await readDatabase(databasePath, (db) => {
    readAccount(db, context); // Refuses a file of another environment, also in a dry run.
    if (!options["skip-pull-check"]) requirePullForPush(db, context);
  });

  // All rows are checked in a copy of the file, which is thrown away.
  if (isDryRun)
    return await readDatabase(databasePath, (db) => {
      const selected = selectRows(db, pushOptions, []);
      const planned = prepareRows(db, context, pushOptions, selected, new Map());
      return finishPush(db, context, pushOptions, planned);
    });

  const pushed: PushRow[] = [];
  const selectBatch = () => readDatabase(databasePath, (db) => selectRows(db, pushOptions, pushed));
  const finish = () =>
    updateDatabase(databasePath, (db) => finishPush(db, context, pushOptions, pushed));
  let batch = await selectBatch();
  // If there is nothing to send, the SDK is not loaded, and the token is not checked.
  if (batch.length === 0) return await finish();
  const { square, account } = await connect(context);

  while (batch.length > 0) {
    // A row with a key and no id may be in Square already: the script was killed, or the reply was
    // lost.
    const found = await findInSquare(square, batch);
    // One step checks the rows as they are now, and stores their keys. If a key existed only in
    // memory, a kill between request and save would create the customer twice.
    const rows = await updateDatabase(databasePath, (db) => {
      saveAccount(db, context, account);
      return prepareRows(db, context, pushOptions, batch, found);
    });
    const toLink = rows.filter(({ outcome }) => outcome === "link");
    const toCreate = rows.filter(({ outcome }) => outcome === "create");
    const others = rows.filter(({ outcome }) => outcome !== "link" && outcome !== "create");

    const links = await prepareLinks(square, toLink);
    const replies = await createCustomers(square, traffic, toCreate, pushOptions.batchSize > 1);
    const saved = await updateDatabase(databasePath, (db) => [
      ...saveLinks(db, context, links),
      ...saveReplies(db, context, replies),
    ]);
    pushed.push(...others, ...saved);
    requireAcceptedToken(replies);
    context.showProgress(`${pushed.length} rows`);
    batch = await selectBatch();
  }
  return await finish();
});

/*
Against the fake Square server (npm run square), with the rows of fixtures/data/local-rows.json:

$ npx tsx scripts/push-new.ts
push-new: row 243 is held: same email_address as row 12, customer ADA1815LOVELACE01234567801
push-new: row 244 is refused: phone_number is invalid: expected 9 to 16 digits, for example +12065550100
push-new (offline): 8 rows selected: 6 created, 1 refused, 1 held
Try: correct a refused row and run it again; for a held row, --link-duplicates if it is the same customer, --allow-duplicates if not, or delete the row
$ npx tsx scripts/push-new.ts --source nowhere
push-new: 2 other rows left out by --source, --created-since or --limit
push-new (offline): no rows to push
*/
