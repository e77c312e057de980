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
import { addDifferences, requireSchema } from "../lib/schema.ts";

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
  // SQLite itself says what is missing: lib/schema.sql runs in an empty database, and the two are
  // compared.
  const texts = await createOrUpdateDatabase(path, (db, differences) => {
    // A missing column that holds a field of Square may have been renamed. Only a person knows.
    requireSchema(differences, path, true);
    // Add missing columns of the kit's own state, then the tables, triggers and indexes.
    addDifferences(db, differences);
    return differences.map(({ text }) => text);
  });
  const added = texts.length > 0 ? `added what was missing (${texts.join("; ")})` : "";
  return {
    summary: isNew
      ? `created ${resolve(path)}`
      : `${path} is ready: ${added || "nothing was missing"}`,
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
