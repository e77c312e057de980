#!/usr/bin/env tsx
/**
 * Create the database file for the other scripts, or bring an older file up to date.
 *
 * Steps:
 *   1. Open the file, or start with an empty one.
 *   2. Run lib/schema.sql, which creates the tables that do not exist yet.
 *   3. Add the columns and constraints that an older file does not have. All rows are kept.
 *   4. Check that the other scripts can use the result, and save it.
 *
 * Reads lib/schema.sql. Reads and writes the database file. Sends no requests and needs no token.
 * Safe to run again: a file that is up to date is not changed.
 *
 *     npx tsx scripts/init-db.ts
 *     deno run --no-prompt --ignore-env --allow-env=DATABASE_PATH --allow-read=. \
 *       --allow-write=database.db,database.db.tmp,database.db.lock scripts/init-db.ts
 *
 * Deno may read only DATABASE_PATH. With --ignore-env, every other variable looks unset. Without
 * it, the script would fail, because its packages look for other variables. With --db shop.db, name
 * shop.db, shop.db.tmp and shop.db.lock in --allow-write. Exit codes: 0 done, 1 failed, 2 wrong
 * usage, 75 file busy, 130/143 stopped.
 */
import { existsSync, readFileSync } from "node:fs";
import { resolve } from "node:path";
import type { Database } from "sql.js";
import { openDatabase } from "../lib/database.ts";
import { runScript } from "../lib/internal/cli.ts";
import { joinWords } from "../lib/internal/report.ts";
import { createSchemaError, findSchemaProblem } from "../lib/internal/schema-check.ts";
import { beginUpgrade, finishUpgrade, runSchema } from "../lib/internal/upgrade.ts";
import { API_NAMES, COLUMNS, TABLE } from "../lib/mapping.ts";

const SCHEMA = readFileSync(new URL("../lib/schema.sql", import.meta.url), "utf8");

const manual = {
  name: "init-db",
  purpose: "creates the database file, or brings an older one up to date",
  options: {},
  examples: [
    ["init-db", "create database.db"],
    ["init-db --db shop.db", "create a file with another name"],
    ["init-db --json", "print the result for a program"],
  ],
  exitCodes: "0 done, 1 failed, 2 wrong usage, 75 file busy, 130/143 stopped",
  needsSquare: false,
} as const;

await runScript(manual, async (context) => {
  const path = context.databasePath;
  const expected = { table: TABLE, columns: COLUMNS, path }; // The path is only for messages.
  const wasMissing = !existsSync(path);

  // Stop before changing anything if this script cannot repair the file. For example, the file is
  // from a newer version, or its table named customers belongs to another program.
  const check = (db: Database): void => {
    const current = findSchemaProblem(db, expected);
    if (current && !current.isRepairable)
      throw createSchemaError(path, current.problem, current.nextStep);
  };
  const database = await openDatabase(context, { mayCreate: true, check });

  // Make all changes in one transaction and save once. If the script is killed, the file is
  // unchanged.
  const result = await database.update((db) => {
    // Add the columns that an older table lacks. SQLite cannot add a primary key to a table, so a
    // table without one is renamed, and schema.sql creates it again. API_NAMES shows if a column
    // was renamed in lib/mapping.ts only.
    const upgrade = beginUpgrade(db, SCHEMA, expected, API_NAMES);
    // Create the tables that do not exist.
    runSchema(db, SCHEMA);
    // Move the rows of a renamed table to the new one, and add the missing UNIQUE indexes. changes
    // has a phrase for each change of an existing table, for example "added the column …".
    const changes = finishUpgrade(db, expected, upgrade);

    // The other scripts make the same check when they start. If a problem remains, undo all
    // changes.
    const remaining = findSchemaProblem(db, expected);
    if (remaining) throw createSchemaError(path, remaining.problem, remaining.nextStep);
    return { createdTables: upgrade.missingTables, addedColumns: upgrade.addedColumns, changes };
  });

  const { createdTables, addedColumns } = result;
  const additions = createdTables.length > 0 ? [`added ${joinWords(createdTables)}`] : [];
  const done = [...additions, ...result.changes];
  const isNew = wasMissing && createdTables.length > 0;

  // A new column that holds a field of Square is empty in the old rows until they are pulled again.
  // The names in addedColumns begin with the table, for example customers.nickname.
  const newFields = COLUMNS.filter((column) => addedColumns.includes(`${TABLE}.${column}`));
  // commandFor returns undefined if pull-created.ts is not next to this script, for example in a
  // copy.
  const pull = context.commandFor("pull-created", "--since all") ?? "a pull of all customers";
  const nextStep =
    newFields.length > 0 ? `fill ${joinWords(newFields)} in old rows: ${pull}` : undefined;

  return {
    summary: isNew
      ? `created ${resolve(path)} with the tables ${joinWords(createdTables)}`
      : `${path} is ready: ${done.join("; ") || "nothing was missing"}`,
    json: { created: createdTables, upgraded: !isNew && done.length > 0 },
    nextStep,
  };
});

/*
$ npx tsx scripts/init-db.ts
init-db: created /home/ada/shop/database.db with the tables customers, sync_runs and square_account
$ npx tsx scripts/init-db.ts
init-db: database.db is ready: nothing was missing

# The file is named with --db or DATABASE_PATH. A word without an option is rejected.
$ npx tsx scripts/init-db.ts shop.db
init-db: Cannot use these options: leave out "shop.db"
Try: npm run init-db -- --help
*/
