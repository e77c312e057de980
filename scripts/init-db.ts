#!/usr/bin/env tsx
/**
 * Create the database file for the other scripts, or bring an older file up to date.
 *
 * Steps:
 *   1. Open the file, or start with an empty one.
 *   2. Let SQLite compare it with lib/schema.sql.
 *   3. Add what is missing, and save it. All rows are kept.
 *
 * Reads lib/schema.sql. Reads and writes the database file. Sends no requests and needs no token.
 * Safe to run again: a file that is up to date is not changed.
 *
 *     npx tsx scripts/init-db.ts
 *     deno run --no-prompt --ignore-env --allow-env=DATABASE_PATH --allow-read=. \
 *       --allow-write=database.db,database.db.tmp scripts/init-db.ts
 *
 * Deno may read only DATABASE_PATH. With --ignore-env, every other variable looks unset. Without
 * it, the script would fail, because its packages look for other variables. With --db shop.db, name
 * shop.db and shop.db.tmp in --allow-write. --help lists the exit codes.
 */
import { existsSync } from "node:fs";
import { resolve } from "node:path";
import { createOrUpdateDatabase } from "../lib/database.ts";
import { runScript } from "../lib/internal/cli.ts";
import { messageOf, SyncError } from "../lib/internal/errors.ts";
import { readSchema, requireSchema } from "../lib/schema.ts";

const manual = {
  name: "init-db",
  purpose: "creates the database file, or brings an older one up to date",
  options: {},
  examples: [
    ["init-db", "create database.db"],
    ["init-db --db shop.db", "create a file with another name"],
    ["init-db --json", "print the result for a program"],
  ],
  needsSquare: false,
} as const;

await runScript(manual, async ({ databasePath: path }) => {
  const isNew = !existsSync(path);
  const texts = await createOrUpdateDatabase(path, (db, differences) => {
    // A missing column that holds a field of Square may have been renamed. Only a person knows.
    const forPerson = differences.filter(({ advice }) => advice !== undefined);
    requireSchema(forPerson, path);
    // Create the tables and triggers that do not exist, then add the columns and indexes.
    db.exec(readSchema());
    for (const { statement } of differences) {
      try {
        if (statement !== undefined) db.run(statement);
      } catch (error) {
        // For example two rows with the same id, which a UNIQUE index does not accept.
        const message = `Cannot run ${statement}: ${messageOf(error)}`;
        throw new SyncError("failed", message, "correct these rows, and run it again");
      }
    }

    const texts = differences.map(({ text }) => text);
    // Version 2 showed a complete pull only by its watermark, and an opt-out that Square does not
    // have only by a note. Files of version 1 have no account, but each run has its environment.
    if (texts.includes("sync_runs has no column complete"))
      db.run("UPDATE sync_runs SET complete = 1 WHERE watermark = started_at");
    if (texts.includes("customers has no column edited_at"))
      db.run(`UPDATE customers SET edited_at = synced_at, push_error = NULL
        WHERE push_error LIKE 'email_unsubscribed is 1 only in this file%'`);
    if (texts.length > 0)
      db.run(`INSERT OR IGNORE INTO square_account (only_row, environment)
        SELECT 1, environment FROM sync_runs ORDER BY id DESC LIMIT 1`);
    // Without the customers that they read, the earlier runs prove nothing.
    if (texts.includes("it has no table customers"))
      db.run("UPDATE sync_runs SET watermark = NULL, complete = 0");
    return texts;
  });

  const done =
    texts.length > 0 ? `added what was missing (${texts.join("; ")})` : "nothing was missing";
  return {
    summary: isNew ? `created ${resolve(path)}` : `${path} is ready: ${done}`,
    json: { created: isNew, added: texts },
  };
});

/*
$ npx tsx scripts/init-db.ts
init-db: created /home/ada/shop/database.db
$ npx tsx scripts/init-db.ts
init-db: database.db is ready: nothing was missing

# The file is named with --db or DATABASE_PATH. A word without an option is rejected.
$ npx tsx scripts/init-db.ts shop.db
init-db: Cannot use these options: unknown word "shop.db"
Try: --help shows them all
*/
