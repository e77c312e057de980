#!/usr/bin/env tsx
/**
 * Create the database file that the other scripts work on, or bring an older one up to date.
 *
 * Steps:
 *   1. Open the file, or start with an empty one.
 *   2. Run lib/schema.sql, which creates the tables that do not exist yet.
 *   3. Add what an older file lacks, and keep all of its rows.
 *   4. Check that the other scripts can work on the result, then save it.
 *
 * Reads lib/schema.sql. Reads and writes the file. Sends nothing to Square and needs no token.
 * Safe to run again: what exists stays as it is.
 *
 *     npx tsx scripts/init-db.ts
 *     deno run --no-prompt --ignore-env --allow-env=DATABASE_PATH --allow-read=. \
 *       --allow-write=database.db,database.db.tmp,database.db.lock scripts/init-db.ts
 *
 * With --db shop.db, name shop.db, shop.db.tmp and shop.db.lock in --allow-write.
 * Exit codes: 0 done, 1 failed, 2 wrong usage, 75 file busy, 130/143 stopped.
 */
import { existsSync, readFileSync } from "node:fs";
import { resolve } from "node:path";
import type { Database } from "sql.js";
import { openDatabase } from "../lib/database.ts";
import { runScript } from "../lib/internal/cli.ts";
import { createSchemaError, findSchemaProblem } from "../lib/internal/schema-check.ts";
import { joinWords } from "../lib/internal/sql.ts";
import { beginUpgrade, finishUpgrade, runSchema } from "../lib/internal/upgrade.ts";
import { COLUMNS, TABLE } from "../lib/mapping.ts";

// The tables, as plain SQL. The sqlite3 program can run this file too.
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
  const expected = { table: TABLE, columns: COLUMNS, path };
  const isNew = !existsSync(path);

  // Refuse a file that this script cannot make ready before changing anything: a file from a newer version,
  // or one whose table customers belongs to another program.
  const check = (db: Database): void => {
    const found = findSchemaProblem(db, expected);
    if (found && !found.isRepairable) throw createSchemaError(path, found.problem, found.nextStep);
  };
  const database = await openDatabase(context, { mayCreate: true, check });

  // All changes are one transaction and one save. If the script is killed, the file is as it was.
  const { created, changes, newFields } = await database.update((db) => {
    const upgrade = beginUpgrade(db, SCHEMA, expected);
    runSchema(db, SCHEMA);
    const changes = finishUpgrade(db, expected, upgrade);

    // The other scripts run the same check when they start. A problem that is left undoes all changes.
    const left = findSchemaProblem(db, expected);
    if (left) throw createSchemaError(path, left.problem, left.nextStep);

    const { created, addedColumns } = upgrade;
    const newFields = COLUMNS.filter((column) => addedColumns.includes(`${TABLE}.${column}`));
    return { created, changes, newFields };
  });

  const added = created.length > 0 ? [`added ${joinWords(created)}`] : [];
  const done = [...added, ...changes].join("; ") || "nothing was missing";
  const pull = context.commandFor("pull-created", "--since all") ?? "a pull of all customers";
  return {
    summary: isNew
      ? `created ${resolve(path)} with the tables ${joinWords(created)}`
      : `${path} is ready: ${done}`,
    json: { created, upgraded: changes.length > 0 },
    nextStep:
      newFields.length > 0 ? `fill ${joinWords(newFields)} in old rows: ${pull}` : undefined,
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
