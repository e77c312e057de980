#!/usr/bin/env tsx
/**
 * Creates in Square the customers of the database file that it lacks: rows without an id.
 *
 * Reads the table customers; writes Square (BulkCreateCustomers) and both tables.
 *
 *     npx tsx scripts/push-new.ts --dry-run
 *     deno run --no-prompt --ignore-env \
 *       --allow-env=SQUARE_ACCESS_TOKEN,SQUARE_ENVIRONMENT,SQUARE_BASE_URL,DATABASE_PATH \
 *       --allow-net=connect.squareup.com,connect.squareupsandbox.com --allow-read=. \
 *       --allow-write=database.db,database.db.tmp,database.db.lock scripts/push-new.ts
 *
 * Exit codes: 0 done, 1 failed, 2 wrong usage, 3 rows refused or held, 4 token refused, 75 later,
 * 130/143 stopped. Safe to run again: a row that was sent is asked for, or sent again with its key.
 */
import type { Database as SqlDatabase } from "sql.js";
import { checkCount, runScript, WINDOW_OPTIONS } from "../lib/command.ts";
import { readWatermark, recordRun } from "../lib/database.ts";
import { EXIT, SyncError } from "../lib/errors.ts";
import { prepareRows, pushRows, settleRows, toRehearsed } from "../lib/push.ts";
import { toFixedAt, toWindow } from "../lib/window.ts";

const SCRIPT = "push-new";

// The most that Square takes in one call.
const LARGEST_BATCH = 100;

const manual = {
  name: SCRIPT,
  purpose: "creates in Square the rows that it lacks",
  options: {
    "dry-run": {
      type: "boolean",
      default: false,
      describe: "Show what would be sent; change nothing",
    },
    source: { type: "string", requiresArg: true, describe: "Only rows with this word in source" },
    "created-since": {
      ...WINDOW_OPTIONS.since,
      default: "all",
      describe: "Only rows made since: as --since of the pulls",
    },
    limit: { type: "number", requiresArg: true, describe: "At most so many rows" },
    "batch-size": {
      type: "number",
      default: LARGEST_BATCH,
      requiresArg: true,
      describe: "Rows a call; 1 = CreateCustomer",
    },
    "allow-duplicates": {
      type: "boolean",
      default: false,
      describe: "Send rows whose email or phone is known",
    },
  },
  examples: [
    [`${SCRIPT} --dry-run`, "see what would be sent"],
    [SCRIPT, "create what Square lacks"],
    [`${SCRIPT} --source web-shop --limit 10`, "try it with a few rows"],
  ],
} as const;

await runScript(manual, true, async (run) => {
  const { options, environment } = run;
  const dryRun = options["dry-run"];
  const batchSize = checkCount("--batch-size", options["batch-size"], LARGEST_BATCH);
  const startedAt = Date.now();
  const database = await run.openDatabase();
  const watermark = database.read((db) => readWatermark(db, SCRIPT));
  const { since } = toWindow(options["created-since"], undefined, watermark, startedAt);

  // Every row gets its key, and the keys are on disk, before the first request. A key that is lost
  // with the run that made it is a second profile for everyone whose reply was lost.
  const selection = {
    source: options.source,
    createdSince: since,
    limit: options.limit === undefined ? undefined : checkCount("--limit", options.limit, 1e9),
    allowDuplicates: options["allow-duplicates"],
  };
  const prepare = (db: SqlDatabase) => prepareRows(db, selection, environment);
  const { ready, outcomes } = dryRun ? database.read(prepare) : await database.change(prepare);

  // A row that had its key before this run was sent before, and nobody knows what came of it: pushRows
  // looks it up first. Each reply is saved before the next request, so a crash loses none.
  const square = run.connectSquare(1);
  for await (const answers of pushRows(square, dryRun ? [] : ready, batchSize)) {
    const now = new Date().toISOString();
    outcomes.push(...(await database.change((db) => settleRows(db, answers, now))));
    run.progress(outcomes.length, ready.length);
  }
  if (dryRun) outcomes.push(...ready.map(toRehearsed));

  // A row that Square could not take now keeps its key; refused and held ones carry their reason.
  const count = (word: string) => outcomes.filter(({ outcome }) => outcome === word).length;
  for (const { local_id, outcome, reason } of outcomes)
    if (reason !== null) run.warn(`row ${local_id} ${outcome}: ${reason}`);
  if (count("later") > 0)
    throw new SyncError(`Cannot create ${count("later")} rows now: Square could not take them`, {
      exitCode: EXIT.later,
      next: "run it again later; the other rows are done",
    });

  const counts = { created: count("created"), linked: count("linked"), refused: count("refused") };
  const { fixedAt, warning } = toFixedAt(startedAt, square.clock);
  if (warning) run.warn(warning);
  if (!dryRun)
    await database.change((db) =>
      recordRun(db, {
        script: SCRIPT,
        environment,
        started_at: new Date(startedAt).toISOString(),
        finished_at: new Date().toISOString(),
        since,
        watermark: new Date(fixedAt).toISOString(),
        ...counts,
        ...square.sent,
      }),
    );
  const held = count("held");
  return {
    text: dryRun
      ? [
          ...ready.map(({ localId, customer }) => `row ${localId}: ${JSON.stringify(customer)}`),
          `${SCRIPT} (${environment}), dry run: ${outcomes.length} selected, ${ready.length} would be sent, ${counts.refused} refused, ${held} held; nothing was changed`,
        ].join("\n")
      : `${SCRIPT} (${environment}): ${outcomes.length} selected, ${counts.created} created, ${counts.linked} linked, ${counts.refused} refused, ${held} held in ${run.databasePath}`,
    json: {
      script: SCRIPT,
      environment,
      database: run.databasePath,
      selected: outcomes.length,
      ...counts,
      held,
      ...square.sent,
      seconds: (Date.now() - startedAt) / 1_000,
      dryRun,
      rows: outcomes.sort((one, other) => one.local_id - other.local_id),
    },
    exitCode: counts.refused + held > 0 ? EXIT.someRefused : EXIT.done,
  };
});
