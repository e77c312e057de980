#!/usr/bin/env tsx
/**
 * Makes the database file that the other three scripts work on, or brings an older one up to date.
 *
 * Reads and writes the file only; asks Square for nothing.
 *
 *     npx tsx scripts/init-db.ts
 *     deno run --no-prompt --ignore-env --allow-env=DATABASE_PATH --allow-read=. \
 *       --allow-write=database.db,database.db.tmp,database.db.lock scripts/init-db.ts
 *
 * Exit codes: 0 done, 1 failed, 2 wrong usage, 75 busy, 130/143 stopped.
 * Safe to run again: it adds what is missing and drops nothing.
 */
import { readFileSync } from "node:fs";
import { runScript } from "../lib/command.ts";
import { checkUpgradable, initialise } from "../lib/upgrade.ts";

// Plain SQL in a file of its own, so that you can read it, and the sqlite3 program can run it.
const SCHEMA = new URL("../lib/schema.sql", import.meta.url);

await runScript(
  {
    name: "init-db",
    purpose: "makes the database file, or brings an older one up to date",
    options: {},
    examples: [
      ["init-db", "make database.db"],
      ["init-db --db shop.db", "make a file of another name"],
      ["init-db --json", "say it to a program"],
    ],
  },
  false,
  async ({ databasePath, openDatabase }) => {
    // A file of the 2018 post is upgraded; a foreign or newer one is refused before it is touched.
    const database = await openDatabase(checkUpgradable, true);

    // One transaction: a run that is killed leaves the old file, never one with half of the tables.
    const schema = readFileSync(SCHEMA, "utf8");
    const { created, upgraded } = await database.change((db) => initialise(db, schema));

    const done = upgraded ? "upgraded" : created.length > 0 ? "made" : "was ready before";
    return {
      text: `${databasePath} ${done}${created.length > 0 ? `: tables ${created.join(", ")}` : ""}`,
      json: { script: "init-db", database: databasePath, created, upgraded },
    };
  },
);
