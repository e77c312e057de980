#!/usr/bin/env tsx
/**
 * Creates in Square the customers of the database file that it lacks: the rows without an id.
 *
 * Reads the table customers. Writes Square (BulkCreateCustomers), customers and sync_runs.
 *
 *     npx tsx scripts/push-new.ts --dry-run
 *     deno run --no-prompt --ignore-env \
 *       --allow-env=SQUARE_ACCESS_TOKEN,SQUARE_ENVIRONMENT,SQUARE_BASE_URL,DATABASE_PATH \
 *       --allow-net=connect.squareup.com,connect.squareupsandbox.com --allow-read=. \
 *       --allow-write=database.db,database.db.tmp,database.db.lock scripts/push-new.ts
 *
 * Exit codes: 0 done, 1 failed, 2 wrong usage, 3 rows refused or held, 4 token refused, 75 later,
 * 130/143 stopped. Safe to run again: what was sent before is looked up, or sent with the same key.
 */
import type { Database as SqlDatabase } from "sql.js";
import { countOption, flag, runScript, timeOption } from "../lib/command.ts";
import { readValue, readWatermark, recordRun } from "../lib/database.ts";
import { EXIT, SyncError } from "../lib/errors.ts";
import { type PushRow, prepareRows, pushRows, settleRows, toReport } from "../lib/push.ts";
import { toWatermark, toWindow } from "../lib/window.ts";

const SCRIPT = "push-new";
const LARGEST_BATCH = 100; // the most rows that Square takes in one call

const manual = {
  name: SCRIPT,
  purpose: "creates in Square the rows of the file that it lacks",
  options: {
    "dry-run": flag("Show what would be sent"),
    source: { type: "string", requiresArg: true, describe: "Only rows with this source" },
    "created-since": { ...timeOption("--created-since", "Only rows made since"), default: "all" },
    limit: countOption("--limit", 1_000_000_000, "At most so many rows"),
    "batch-size": {
      ...countOption("--batch-size", LARGEST_BATCH, "Rows a call; 1 = CreateCustomer"),
      default: LARGEST_BATCH,
    },
    "allow-duplicates": flag("Send known email, phone too"),
  },
  examples: [
    [`${SCRIPT} --dry-run`, "see what would be sent"],
    [SCRIPT, "send it"],
    [`${SCRIPT} --source web-shop --limit 10`, "try it with a few rows"],
  ],
  exitCodes:
    "0 done, 1 failed, 2 wrong usage, 3 rows refused or held, 4 token refused, 75 try again later, 130/143 stopped",
  needsSquare: true,
} as const;

await runScript(manual, async (run) => {
  const { options, environment, startedAt } = run;
  const { source, limit, "dry-run": isDryRun = false, "batch-size": batchSize } = options;
  const { "created-since": madeSince, "allow-duplicates": allowDuplicates = false } = options;
  const database = await run.openDatabase();

  // An id that you put in yourself hides the row: it looks as if Square had it.
  const hidden = `SELECT group_concat(local_id, ', ') FROM (SELECT local_id FROM customers
    WHERE id IS NOT NULL AND synced_at IS NULL LIMIT 10)`;
  const unseen = database.read((db) => readValue(db, hidden));
  if (unseen) run.warn(`not sent, since no pull has brought their id: row ${unseen}`);

  // Which rows: those without an id. The options narrow that; none widens it.
  const watermark = database.read((db) => readWatermark(db, SCRIPT));
  const { since } = toWindow(madeSince, undefined, watermark, startedAt);

  // Every row gets its key, and all keys are on disk, before the first request. A key made at the call
  // is lost with the call, and whoever was created by it is created again by the next. A row that Square
  // would refuse gets the reason instead, and stops no other.
  const selection = { source, createdSince: since, limit, allowDuplicates };
  const prepare = (db: SqlDatabase) => prepareRows(db, selection, environment);
  // A rehearsal does the same to the copy in memory, which is never written.
  const rows = isDryRun ? database.read(prepare) : await database.change(prepare);

  // The ids in each reply are saved before the next request is made: killed at any moment, we are in
  // doubt about one call at most. Rows that had their key before this run were sent before, and nobody
  // knows what came of them: pushRows looks them up first.
  const square = run.connectSquare(1);
  let answered = 0;
  for await (const answers of pushRows(database, square, isDryRun ? [] : rows, batchSize)) {
    await database.change((db) => settleRows(db, answers));
    answered += answers.length;
    run.progress(answered, rows.length);
  }

  const count = (word: PushRow["outcome"]) => rows.filter((row) => row.outcome === word).length;
  const counts = { created: count("created"), linked: count("linked"), refused: count("refused") };
  const [held, later, ready] = [count("held"), count("later"), count("ready")];
  for (const { localId, outcome, reason } of rows)
    if (reason) run.warn(`row ${localId} is ${outcome}: ${reason}`);

  // What was left out or is not done yet must come again: --created-since last may not pass over it.
  const isAll = source === undefined && limit === undefined;
  const isDone = isAll && counts.refused + held + later === 0;
  const record = (db: SqlDatabase) => {
    const before = readWatermark(db, SCRIPT);
    const next = isDone ? toWatermark({ since, until: null }, before, square.fixedAt) : before;
    recordRun(db, run, { since, watermark: next, ...counts, ...square.sent });
  };
  if (!isDryRun) await database.change(record);

  // Exit code 3 tells cron that rows wait for a person, though the run did all that it could.
  const details = rows
    .filter(({ outcome }) => outcome === "ready")
    .map(({ localId, customer }) => `row ${localId}: ${JSON.stringify(customer)}`);
  const done = `${counts.created} created, ${counts.linked} linked`;
  const error = new SyncError(
    `Cannot create ${later} of ${rows.length} rows yet: Square or another program was in the way`,
    EXIT.later,
    "run it again later; they keep their keys, and the other rows are done",
  );
  const said = { held, ...square.sent, dryRun: isDryRun, rows: rows.map(toReport) };
  return {
    details,
    text: `${isDryRun ? `dry run, ${ready} would be sent` : done}, ${counts.refused} refused, ${held} held, of ${rows.length} selected`,
    json: { selected: rows.length, ...counts, ...said },
    exitCode: counts.refused + held > 0 ? EXIT.someRefused : EXIT.done,
    error: later > 0 ? error : undefined,
  };
});

/*
Against the offline Square (npm run square), with the rows of fixtures/local-rows.json:

$ npx tsx scripts/push-new.ts
push-new: row 243 is held: customer ADA1815LOVELACE01234567801 has the same email or phone
push-new: row 244 is refused: phone_number is not one that Square takes, such as +12065550100
push-new (offline): 6 created, 0 linked, 1 refused, 1 held, of 8 selected
$ npx tsx scripts/push-new.ts --source nobody
push-new (offline): 0 created, 0 linked, 0 refused, 0 held, of 0 selected
*/
