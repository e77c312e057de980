import assert from "node:assert/strict";
import { existsSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { assertSpeech, hashOf, makeReady } from "../fixtures/campaign.ts";
import { makeBench, putFile } from "../fixtures/testing.ts";

const SCHEMA_2018 = `CREATE TABLE customers (id TEXT, created_at TEXT, updated_at TEXT, synced_at TEXT,
  given_name TEXT, family_name TEXT, email_address TEXT, creation_source TEXT)`;

test("init-db makes both tables, for the owner's eyes only, does nothing the second time, and a row needs no more than a name", async (t) => {
  const bench = await makeBench(t);
  assert.deepEqual(await bench.json("init-db"), {
    script: "init-db",
    database: "database.db",
    created: ["customers", "sync_runs"],
    upgraded: false,
  });
  const path = join(bench.folder, "database.db");
  if (process.platform !== "win32") assert.equal(statSync(path).mode & 0o777, 0o600);
  assert.deepEqual(bench.rows("PRAGMA user_version"), [{ user_version: 1 }]);
  const before = readFileSync(path);
  const again = await bench.run("init-db");
  assert.deepEqual(again, {
    code: 0,
    signal: null,
    stdout: "init-db: database.db is ready; nothing was missing\n",
    stderr: "",
  });
  assert.deepEqual(readFileSync(path), before);
  bench.sql("INSERT INTO customers (given_name, email_address) VALUES ('Ada', 'ada@example.com')");
  const [row] = bench.rows("SELECT created_at FROM customers");
  assert.match(String(row?.created_at), /^\d{4}-.*\.\d{3}Z$/);
});

test("init-db puts back a table and a column that are missing, and keeps every row", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  bench.sql("INSERT INTO customers (given_name) VALUES ('Ada')");
  bench.sql("ALTER TABLE customers ADD COLUMN loyalty TEXT DEFAULT 'gold'");
  bench.sql("ALTER TABLE customers DROP COLUMN nickname; DROP TABLE sync_runs");
  const { created, upgraded } = await bench.json("init-db");
  assert.deepEqual([created, upgraded], [["sync_runs"], true]);
  assert.deepEqual(bench.rows("SELECT given_name, nickname, loyalty FROM customers"), [
    { given_name: "Ada", nickname: null, loyalty: "gold" },
  ]);
  bench.sql("ALTER TABLE sync_runs DROP COLUMN retries");
  assert.deepEqual((await bench.json("init-db")).upgraded, true);
  assert.equal((await bench.json("pull-created")).retries, 0);
});

test("init-db upgrades the table of the 2018 post; doubled rows are merged and the old table is kept", async (t) => {
  const bench = await makeBench(t);
  bench.sql(`${SCHEMA_2018};
    INSERT INTO customers VALUES
      ('A', '2018-08-01T10:00:00Z', '2018-08-01T10:00:00Z', '2018-08-01', 'Ann', 'One', 'ann@example.com', 'DIRECTORY'),
      ('B', '2018-08-01T10:00:00.5Z', '2018-08-01T10:00:00Z', NULL, 'Bob', NULL, NULL, 'DIRECTORY'),
      ('A', '2018-08-01T10:00:00Z', '2018-08-02T10:00:00.25Z', '2018-08-02', 'Anna', 'One', 'ann@example.com', 'DIRECTORY'),
      (NULL, NULL, NULL, NULL, 'Local', 'Only', 'local@example.com', NULL),
      (NULL, NULL, NULL, NULL, 'Local', 'Only', 'local@example.com', NULL),
      (' ', NULL, NULL, NULL, 'Empty', 'Id', NULL, NULL)`);
  const { created, upgraded } = await bench.json("init-db");
  assert.deepEqual([created, upgraded], [["sync_runs"], true]);
  assert.deepEqual(
    bench.rows(
      "SELECT id, given_name, created_at, updated_at FROM customers ORDER BY coalesce(id, 'Z'), local_id",
    ),
    [
      {
        id: "A",
        given_name: "Anna",
        created_at: "2018-08-01T10:00:00.000Z",
        updated_at: "2018-08-02T10:00:00.250Z",
      },
      {
        id: "B",
        given_name: "Bob",
        created_at: "2018-08-01T10:00:00.500Z",
        updated_at: "2018-08-01T10:00:00.000Z",
      },
      { id: null, given_name: "Local", created_at: null, updated_at: null },
      { id: null, given_name: "Local", created_at: null, updated_at: null },
      { id: null, given_name: "Empty", created_at: null, updated_at: null },
    ],
  );
  assert.deepEqual(bench.rows("SELECT count(*) AS n FROM customers_2018"), [{ n: 6 }]);
  assert.equal((await bench.json("init-db")).upgraded, false);
});

test("--json names the file as it is called, also where a terminal must not see it as it is", async (t) => {
  const bench = await makeBench(t);
  const name = "\u{1f469}\u200d\u{1f527}.db";
  const { stdout } = await bench.run("init-db", ["--json", "--db", name]);
  assert.ok(stdout.includes("\\u200d") && !stdout.includes("\u200d"));
  assert.equal(JSON.parse(stdout).database, name);
  assert.ok(existsSync(join(bench.folder, name)));
});

test("init-db leaves a view, an index and odd times of the 2018 table as they are", async (t) => {
  const bench = await makeBench(t);
  bench.sql(`${SCHEMA_2018}; INSERT INTO customers (id, given_name, updated_at) VALUES ('A', 'Ann', '2018');
    CREATE INDEX mine ON customers (email_address);
    CREATE INDEX Customers_2018 ON customers (id); -- where the old table would go
    CREATE VIEW names AS SELECT given_name FROM customers`);
  await bench.json("init-db");
  bench.sql("INSERT INTO customers (given_name) VALUES ('Bob')");
  assert.deepEqual(bench.rows("SELECT * FROM names"), [
    { given_name: "Ann" },
    { given_name: "Bob" },
  ]);
  assert.deepEqual(bench.rows("SELECT updated_at FROM customers WHERE id = 'A'"), [
    { updated_at: "2018" },
  ]);
  assert.deepEqual(bench.rows("SELECT tbl_name FROM sqlite_master WHERE name = 'mine'"), [
    { tbl_name: "customers_2018_" },
  ]);
});

test("init-db leaves no old table behind where every row and column was carried over", async (t) => {
  const bench = await makeBench(t);
  bench.sql(
    `${SCHEMA_2018}; INSERT INTO customers (id, given_name) VALUES ('A', 'Ann'), (NULL, 'Bob')`,
  );
  await bench.json("init-db");
  assert.deepEqual(
    bench.rows("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"),
    [{ name: "customers" }, { name: "sync_runs" }],
  );
  assert.deepEqual(bench.rows("SELECT id, given_name FROM customers ORDER BY id"), [
    { id: null, given_name: "Bob" },
    { id: "A", given_name: "Ann" },
  ]);
});

test("init-db refuses what is no SQLite file, a newer schema, and another program's customers, and changes none", async (t) => {
  const bench = await makeBench(t);
  async function expectRefusal(name: string, code: number, says: RegExp) {
    const before = hashOf(bench, name);
    const ended = await bench.run("init-db", ["--db", name]);
    assertSpeech(ended);
    assert.deepEqual([ended.code, ended.stdout], [code, ""]);
    assert.match(ended.stderr, says);
    assert.equal(hashOf(bench, name), before);
    assert.equal(existsSync(join(bench.folder, `${name}.lock`)), false);
  }
  putFile(bench, "text.db", "Dear diary, ".repeat(100));
  const noDatabase =
    /^init-db: Cannot open "text.db": it is damaged, or no SQLite database \(.*\)\nTry: /;
  await expectRefusal("text.db", 1, noDatabase);
  bench.sql("PRAGMA user_version = 2; CREATE TABLE t (x)");
  await expectRefusal("database.db", 2, /Cannot use "database.db": its schema has version 2/);
  bench.sql("PRAGMA user_version = 0; CREATE TABLE customers (customer_number INTEGER)");
  await expectRefusal("database.db", 2, /its table customers is another program's/);
  bench.sql("DROP TABLE customers; CREATE TABLE customers (local_id INTEGER, name TEXT)");
  await expectRefusal("database.db", 2, /its table customers is another program's/);
  bench.sql("DROP TABLE customers; CREATE TABLE sync_runs (finished TEXT)");
  await expectRefusal("database.db", 2, /its table sync_runs is another program's/);
});
