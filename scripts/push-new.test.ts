import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { assertEqualSides, assertOneEach, loseReply, makeReady } from "../fixtures/campaign.ts";
import { inventCustomers } from "../fixtures/square.ts";
import { type Bench, makeBench, RUNTIME } from "../fixtures/testing.ts";

type PushedRow = { local_id: number; outcome: string; id: string | null; reason: string | null };

const rowsOf = (json: Record<string, unknown>) => json.rows as PushedRow[];

function addRows(bench: Bench, count: number): void {
  bench.sql(`WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ${count})
    INSERT INTO customers (given_name, email_address, source)
    SELECT 'Name ' || i, 'name' || i || '@example.com', iif(i % 2, 'odd', 'even') FROM n`);
}

test("230 rows become 230 profiles in three bulk calls, are not sent again, and not pulled back as new", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  addRows(bench, 230);
  let onDisk: unknown;
  bench.square.set({
    fault({ number }) {
      if (number === 1)
        onDisk = bench.rows(
          "SELECT count(idempotency_key) AS keys, count(reference_id) AS refs, sum(idempotency_key = reference_id) AS same FROM customers",
        );
      return undefined;
    },
  });
  const first = await bench.json("push-new");
  assert.deepEqual(onDisk, [{ keys: 230, refs: 230, same: 230 }]);
  assert.deepEqual(
    [first.selected, first.created, first.linked, first.refused, first.held, first.requests],
    [230, 230, 0, 0, 0, 3],
  );
  assert.deepEqual(
    bench.square.requests.map(({ operation, creates }) => [operation, creates]),
    [100, 100, 30].map((creates) => ["bulk-create", creates]),
  );
  const second = await bench.json("push-new");
  assert.deepEqual([second.selected, second.requests], [0, 0]);
  const pulled = await bench.json("pull-created");
  assert.deepEqual([pulled.inserted, pulled.updated, pulled.unchanged], [0, 0, 230]);
  assert.deepEqual(
    bench.rows("SELECT count(*) AS n, count(id) AS ids, count(synced_at) AS synced FROM customers"),
    [{ n: 230, ids: 230, synced: 230 }],
  );
});

test("--batch-size 1 calls CreateCustomer once for each row", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  addRows(bench, 3);
  assert.equal((await bench.json("push-new", ["--batch-size", "1"])).created, 3);
  assert.deepEqual(
    bench.square.requests.map(({ operation }) => operation),
    ["create", "create", "create"],
  );
});

test("a bad row stops no other: its reason is in the row, its key is cleared, the exit code is 3", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  bench.sql(`INSERT INTO customers (given_name, email_address, phone_number, note) VALUES
    ('Good', NULL, NULL, NULL), ('Checked', 'nonsense', NULL, NULL), ('Square', NULL, '000000000', NULL)`);
  bench.square.set({
    fault: ({ operation }) =>
      operation === "bulk-create"
        ? {
            kind: "change",
            change: (body) => {
              const responses = body.responses as Record<
                string,
                { customer?: { phone_number?: string } }
              >;
              for (const [key, { customer }] of Object.entries(responses))
                if (customer?.phone_number)
                  Object.assign(responses, {
                    [key]: {
                      errors: [
                        {
                          category: "INVALID_REQUEST_ERROR",
                          code: "INVALID_PHONE_NUMBER",
                          field: "phone_number",
                          detail: "Bad: 000000000",
                        },
                      ],
                    },
                  });
              return body;
            },
          }
        : undefined,
  });
  const ended = await bench.run("push-new");
  assert.equal(ended.code, 3);
  assert.equal(
    ended.stdout,
    "push-new (offline): 1 created, 0 linked, 2 refused, 0 held, of 3 selected\n",
  );
  assert.equal(
    ended.stderr,
    "push-new: row 2 is refused: email_address is not one that Square takes, such as ada@example.com\npush-new: row 3 is refused: Square says INVALID_PHONE_NUMBER (phone_number)\n",
  );
  assert.deepEqual(
    bench.rows("SELECT local_id, idempotency_key, push_error FROM customers WHERE id IS NULL"),
    [
      {
        local_id: 2,
        idempotency_key: null,
        push_error: "email_address is not one that Square takes, such as ada@example.com",
      },
      {
        local_id: 3,
        idempotency_key: null,
        push_error: "Square says INVALID_PHONE_NUMBER (phone_number) Bad: 000000000",
      },
    ],
  );
});

test("a row that makes Square refuse the whole call is found, and the others are created", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  addRows(bench, 9);
  // A region to the runtime, and no country to Square.
  bench.sql("UPDATE customers SET country = 'EU' WHERE local_id = 4");
  const pushed = await bench.json("push-new", [], 3);
  assert.deepEqual([pushed.created, pushed.refused], [8, 1]);
  assert.equal(bench.square.customers.size, 8);
});

test("a row whose email or phone is a customer's already is held, and --allow-duplicates sends it", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  bench.sql(`INSERT INTO customers (id, given_name, email_address, phone_number) VALUES
    ('ANN', 'Ann', 'ann@example.com', NULL), ('BOB', 'Bob', NULL, '+44 7911 123456')`);
  bench.sql(`INSERT INTO customers (given_name, email_address, phone_number) VALUES
    ('Ann', ' ANN@Example.com', NULL), ('Bob', NULL, '07911 123456'), ('Eve', NULL, '+1 206 555 0100'),
    ('Eva', NULL, '(206) 555-0100'), ('Eli', NULL, '+1 306 555 0100')`);
  const pushed = await bench.json("push-new", [], 3);
  assert.deepEqual(
    rowsOf(pushed).map(({ local_id, outcome }) => [local_id, outcome]),
    [
      [3, "held"],
      [4, "held"],
      [5, "created"],
      [6, "held"],
      [7, "created"],
    ],
  );
  assert.equal(rowsOf(pushed)[1]?.reason, "customer BOB has the same email or phone");
  assert.equal(
    bench.rows("SELECT push_error FROM customers WHERE local_id = 6")[0]?.push_error,
    "row 5 has the same email or phone",
  );
  const all = await bench.json("push-new", ["--allow-duplicates"]);
  assert.equal(all.created, 3);
});

test("--source, --created-since and --limit narrow what is sent", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  addRows(bench, 10);
  bench.sql("UPDATE customers SET created_at = '2020-01-01 10:00:00' WHERE local_id <= 4");
  const count = async (...narrow: string[]) => {
    const { selected, created } = await bench.json("push-new", narrow);
    assert.equal(created, selected);
    return created;
  };
  assert.equal(await count("--created-since", "1h", "--source", "odd"), 3);
  assert.equal(await count("--created-since", "2019-12-31", "--limit", "1"), 1);
  assert.equal(await count("--source", ""), 0);
  assert.equal(await count("--created-since", "last"), 6);
  bench.sql("INSERT INTO customers (given_name, created_at) VALUES ('Old', '2020-01-01')");
  assert.equal(await count("--created-since", "last"), 0);
});

test("an option that cannot be used is named, and nothing is tried", async (t) => {
  const bench = await makeBench(t);
  for (const [option = "", ...words] of [
    ["--created-since", "yesterday"],
    ["--no-source"],
    ["--dry-run=1"],
  ]) {
    const { code, stderr } = await bench.run("push-new", [option, ...words]);
    assert.equal(code, 2, stderr);
    assert.match(stderr, new RegExp(`Cannot use .*${option.replace(/^--|=1/g, "")}`));
  }
  assert.deepEqual(readdirSync(bench.folder), []);
});

test("rows that were refused do not use up the limit of the next run", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  bench.sql(`INSERT INTO customers (note, push_error)
    VALUES ('nobody', 'no name'), ('nobody', 'no name')`);
  addRows(bench, 2);
  assert.equal((await bench.json("push-new", ["--limit", "2"])).created, 2);
});

test("--dry-run says what would be sent and changes not a byte on either side", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  bench.sql(`INSERT INTO customers (given_name, reference_id, idempotency_key, country) VALUES
    ('Ann' || char(27) || '[31m', 'crm-1', NULL, 'us'), ('Bob', 'crm-2', 'key-2', NULL), (NULL, NULL, NULL, NULL)`);
  const before = readFileSync(join(bench.folder, "database.db"));
  const ended = await bench.run("push-new", ["--dry-run"]);
  assert.deepEqual(
    [ended.code, ended.stderr],
    [
      3,
      "push-new: row 3 is refused: one of given_name, family_name, company_name, email_address, phone_number is needed\n",
    ],
  );
  assert.equal(
    ended.stdout,
    'row 1: {"given_name":"Ann\\u001b[31m","reference_id":"crm-1","address":{"country":"US"}}\nrow 2: {"given_name":"Bob","reference_id":"crm-2"}\npush-new (offline): dry run, 2 would be sent, 1 refused, 0 held, of 3 selected\n',
  );
  const json = await bench.json("push-new", ["--dry-run"], 3);
  assert.deepEqual(
    [json.dryRun, json.created, rowsOf(json).map(({ outcome }) => outcome)],
    [true, 0, ["would-create", "would-look-up", "refused"]],
  );
  assert.equal(bench.square.requests.length, 0);
  assert.deepEqual(readFileSync(join(bench.folder, "database.db")), before);
});

test("a row in doubt is looked up and linked, also when it was edited since, and never doubled", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  addRows(bench, 3);
  bench.square.set({ fault: () => ({ kind: "html", status: 400, after: true }) });
  const lost = await bench.run("push-new", ["--limit", "1", "--batch-size", "2"]);
  assert.equal(lost.code, 1);
  bench.square.set({ fault: undefined });
  bench.sql("UPDATE customers SET given_name = 'Edited', phone_number = '12' WHERE local_id = 1");
  const next = await bench.json("push-new");
  assert.deepEqual([next.linked, next.created], [1, 2]);
  assert.equal(bench.square.customers.size, 3);
});

test("a row in doubt is looked up past a page that is empty and not the last", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  addRows(bench, 1);
  await loseReply(bench, 1);
  let count = 0;
  bench.square.set({
    fault: () =>
      ++count === 1 ? { kind: "change", change: () => ({ cursor: "next" }) } : undefined,
  });
  assert.equal((await bench.json("push-new")).linked, 1);
  assert.ok(bench.square.requests.every(({ operation }) => operation !== "bulk-create"));
});

test("rows whose local_id is more than a JavaScript number can tell stay apart", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  bench.sql(`INSERT INTO customers (local_id, given_name)
    VALUES (9007199254740992, 'Even'), (9007199254740993, 'Odd')`);
  assert.equal((await bench.json("push-new")).created, 2);
  assertOneEach(bench, ["Even", "Odd"]);
  assertEqualSides(bench);
});

test("nothing is sent when the file does not keep the keys", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  addRows(bench, 2);
  bench.sql(`CREATE TRIGGER swallow BEFORE UPDATE OF idempotency_key ON customers
    BEGIN SELECT RAISE(IGNORE); END`);
  const ended = await bench.run("push-new");
  assert.equal(ended.code, 1, ended.stderr);
  assert.match(ended.stderr, /Cannot give row 1 its key/);
  assert.equal(bench.square.requests.length, 0);
});

test("of a row that a pull made and that turns out to be a local one, the newer version stays", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  const family = "INSERT INTO customers (given_name, reference_id)";
  bench.sql(`${family} VALUES ('Nora', 'family'), ('Max', 'family')`);
  await loseReply(bench, 1);
  const [nora] = bench.square.customers.keys();
  bench.square.update(String(nora), { note: "newer" });
  await bench.run("pull-created");
  await bench.run("push-new");
  assertOneEach(bench, ["Nora", "Max"]);
  assertEqualSides(bench);
});

test("a row that was edited after a lost reply waits for the search, and is not created twice", async (t) => {
  const bench = await makeBench(t, { indexLagMs: 60_000 });
  makeReady(bench);
  addRows(bench, 1);
  await loseReply(bench, 1);
  bench.sql("UPDATE customers SET note = 'edited', nickname = 'E'");
  const held = await bench.json("push-new", [], 3);
  assert.deepEqual([held.held, bench.square.customers.size], [1, 1]);
  bench.square.set({ indexLagMs: 0 });
  assert.equal((await bench.json("push-new")).linked, 1);
  assertOneEach(bench, ["Name 1"]);
  assertEqualSides(bench);
});

test("a row in doubt is not taken for another customer with the same reference_id", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  const ann = bench.square.create({ given_name: "Ann", reference_id: "web-shop" });
  bench.sql(`INSERT INTO customers (id, given_name, reference_id, idempotency_key) VALUES
    ('${ann.id}', 'Ann', 'web-shop', 'k0'), (NULL, 'Bob', 'web-shop', 'k1')`);
  assert.equal((await bench.json("push-new")).created, 1);
  assertOneEach(bench, ["Ann", "Bob"]);
  assert.equal(bench.square.customers.size, 2);
});

test("rows with one reference_id and an e-mail each are linked, not held, when a pull came before the lost reply's push", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  bench.sql(`INSERT INTO customers (given_name, email_address, reference_id)
    VALUES ('Ada', 'ada@example.com', 'import-1'), ('Bob', 'bob@example.com', 'import-1')`);
  for (const localId of [1, 2]) await loseReply(bench, localId);
  await bench.json("pull-created");
  assert.equal((await bench.json("push-new")).created, 2);
  assertOneEach(bench, ["Ada", "Bob"]);
  assertEqualSides(bench);
});

test("a row that was sent and is not meant by this run is a twin all the same", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  bench.sql(`INSERT INTO customers (given_name, email_address, source)
    VALUES ('Web', 'ann@example.com', 'web'), ('Till', 'ann@example.com', 'till')`);
  await loseReply(bench, 1);
  const pushed = await bench.json("push-new", ["--source", "till"], 3);
  assert.deepEqual([pushed.created, pushed.held], [0, 1]);
  assert.equal(rowsOf(pushed)[0]?.reason, "row 1 has the same email or phone");
});

test("what is changed in a row during a push is sent; what is changed while it is under way is named", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  addRows(bench, 4);
  bench.square.set({
    fault({ number }) {
      if (number === 1)
        bench.sql(`UPDATE customers SET note = 'in time' WHERE local_id = 3;
          UPDATE customers SET email_address = 'nonsense' WHERE local_id = 4`);
      if (number === 2) bench.sql("UPDATE customers SET note = 'too late' WHERE local_id = 2");
      return undefined;
    },
  });
  const { code, stderr } = await bench.run("push-new", ["--batch-size", "1"]);
  assert.equal(code, 3);
  assert.equal(
    stderr,
    "push-new: row 2 is created: Square's note replaced what it said\npush-new: row 4 is refused: email_address is not one that Square takes, such as ada@example.com\n",
  );
  const notes = [...bench.square.customers.values()].map(({ note }) => note);
  assert.deepEqual(notes, [undefined, undefined, "in time"]);
  const [bad] = bench.rows("SELECT idempotency_key, push_error FROM customers WHERE local_id = 4");
  assert.deepEqual(bad, {
    idempotency_key: null,
    push_error: "email_address is not one that Square takes, such as ada@example.com",
  });
});

test("a blank column is nothing that was lost", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  bench.sql("INSERT INTO customers (given_name, note) VALUES ('Ann', zeroblob(0)), ('Bob', '  ')");
  const { code, stderr } = await bench.run("push-new");
  assert.deepEqual([code, stderr], [0, ""]);
});

test("what a row says that Square does not, once it is linked, is named", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  addRows(bench, 1);
  await loseReply(bench, 1);
  bench.sql("UPDATE customers SET email_address = 'right@example.com', email_unsubscribed = 1");
  const linked = await bench.json("push-new");
  assert.equal(
    rowsOf(linked)[0]?.reason,
    "Square's email_address, email_unsubscribed replaced what it said",
  );
});

test("a row that is created anew, with another profile's version in it, hears of changes again", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  bench.sql("INSERT INTO customers (given_name, version) VALUES ('Zoe', 5)");
  await bench.json("push-new");
  const [id = ""] = bench.square.customers.keys();
  bench.square.update(id, { note: "news" });
  assert.equal((await bench.json("pull-updated")).updated, 1);
  assertEqualSides(bench);
});

test("--created-since last does not pass over rows that were refused, or whose time nobody can read", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  bench.sql("INSERT INTO customers (given_name, birthday) VALUES ('Ann', '1815')");
  bench.sql("UPDATE customers SET created_at = '2020-01-01T00:00:00Z'");
  await bench.json("push-new", [], 3);
  bench.sql("UPDATE customers SET birthday = NULL");
  bench.sql("INSERT INTO customers (given_name, created_at) VALUES ('Bob', NULL), ('Eve', 'soon')");
  assert.equal((await bench.json("push-new", ["--created-since", "last"])).created, 3);
  bench.sql("INSERT INTO customers (given_name, created_at) VALUES ('Old', '2020-01-01')");
  bench.sql("INSERT INTO customers (given_name, created_at) VALUES ('Odd', '11/24/2026')");
  assert.equal((await bench.json("push-new", ["--created-since", "last"])).created, 1);
});

test("a pull that meets two customers with the reference_id of one row links neither", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  bench.sql("INSERT INTO customers (given_name, reference_id, source) VALUES ('Ada', '42', 'crm')");
  bench.square.create({ given_name: "Bob", reference_id: "42" });
  await loseReply(bench, 1);
  assert.equal((await bench.json("pull-created")).linked, 0);
  assert.equal((await bench.json("push-new")).created, 1);
  assertOneEach(bench, ["Ada", "Bob"]);
  assert.deepEqual(bench.rows("SELECT source FROM customers WHERE given_name = 'Ada'"), [
    { source: "crm" },
  ]);
});

test("a call that is too large for something on the way is taken apart", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  addRows(bench, 5);
  bench.sql("UPDATE customers SET note = 'too much' WHERE local_id = 4");
  bench.square.set({
    fault: ({ body }) =>
      JSON.stringify(body).includes("too much") ? { kind: "html", status: 413 } : undefined,
  });
  const pushed = await bench.json("push-new", [], 3);
  assert.deepEqual([pushed.created, pushed.refused], [4, 1]);
  assert.equal(rowsOf(pushed)[3]?.reason, "Square says REQUEST_ENTITY_TOO_LARGE");
});

test("a refusal after a rate limit clears the key: Square had looked at nothing before", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  bench.sql("INSERT INTO customers (given_name, country) VALUES ('Ann', 'EU')");
  bench.square.set({
    fault: ({ number }) =>
      number === 1 ? { kind: "status", status: 429, code: "RATE_LIMITED" } : undefined,
  });
  assert.equal((await bench.json("push-new", [], 3)).refused, 1);
  assert.equal(bench.rows("SELECT idempotency_key AS key FROM customers")[0]?.key, null);
});

// What npm takes it says in the environment, of which Deno sees a few names only; but npm runs tsx.
const withNpm = { skip: RUNTIME === "deno" && "npm runs the scripts with tsx" };
test("an option that npm has taken for itself is refused", withNpm, async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  addRows(bench, 1);
  const ended = await bench.run("push-new", [], { npm_config_dry_run: "true" });
  assert.equal(ended.code, 2);
  assert.match(ended.stderr, /Cannot use --dry-run: npm took it/);
  // npm run sync begins with a pull.
  const pull = await bench.run("pull-created", [], { npm_config_dry_run: "true" });
  assert.equal(pull.code, 2);
  assert.match(pull.stderr, /^Try: .*npm run push-new -- --dry-run$/m);
  assert.equal(bench.square.requests.length, 0);
});

test("a file without a column that a field needs is refused before anything is sent", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  addRows(bench, 1);
  bench.sql("ALTER TABLE customers RENAME COLUMN sublocality TO town");
  for (const script of ["pull-created", "push-new"]) {
    const { code, stderr } = await bench.run(script);
    assert.equal(code, 2);
    assert.equal(
      stderr,
      `${script}: Cannot use "database.db": table customers has no column named sublocality\nTry: npx tsx scripts/init-db.ts --db "database.db"\n`,
    );
  }
  assert.equal(bench.square.requests.length, 0);
  await bench.run("init-db");
  assert.equal((await bench.json("push-new")).created, 1);
});

test("a row that was given an id by hand is not sent, and push-new says so", async (t) => {
  const bench = await makeBench(t, { customers: inventCustomers(2) });
  makeReady(bench);
  await bench.run("pull-created");
  addRows(bench, 1);
  bench.sql("INSERT INTO customers (id, given_name) VALUES ('my-7', 'Bob'), ('my-8', 'Cy')");
  const ended = await bench.run("push-new");
  assert.deepEqual(ended, {
    code: 0,
    signal: null,
    stdout: "push-new (offline): 1 created, 0 linked, 0 refused, 0 held, of 1 selected\n",
    stderr: "push-new: not sent, since no pull has brought their id: row 4, 5\n",
  });
  // Whom a pull brings is known, whatever the file said of it.
  bench.sql("DELETE FROM customers WHERE id LIKE 'my%'; UPDATE customers SET synced_at = NULL");
  await bench.run("pull-created", ["--since", "all"]);
  assert.equal((await bench.run("push-new")).stderr, "");
});

test("what was done is told also when rows are left for later", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  addRows(bench, 2);
  bench.square.set({
    fault: () => ({
      kind: "change",
      change: ({ responses }) => {
        const [key = ""] = Object.keys(responses as object);
        const errors = [{ category: "API_ERROR", code: "INTERNAL_SERVER_ERROR" }];
        return { responses: { ...(responses as object), [key]: { errors } } };
      },
    }),
  });
  const pushed = await bench.json("push-new", [], 75);
  assert.deepEqual(
    rowsOf(pushed).map(({ outcome }) => outcome),
    ["later", "created"],
  );
  bench.square.set({ fault: undefined });
  assert.equal((await bench.json("push-new")).linked, 1);
});

test("a row that is deleted while others are looked up is not created", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  addRows(bench, 2);
  bench.sql(
    "UPDATE customers SET idempotency_key = 'key-' || local_id, reference_id = 'key-' || local_id",
  );
  bench.square.set({
    fault({ number }) {
      if (number === 1) bench.sql("DELETE FROM customers WHERE local_id = 2");
      return undefined;
    },
  });
  const pushed = await bench.json("push-new", [], 75);
  assert.deepEqual(
    rowsOf(pushed).map(({ outcome }) => outcome),
    ["created", "later"],
  );
  assertOneEach(bench, ["Name 1"]);
  assertEqualSides(bench);
});

test("an answer that is no refusal in Square's words leaves the key, and the row is not doubled", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  const odd: unknown[] = [
    "oops",
    [{}],
    [{ code: "INTERNAL_SERVER_ERROR" }],
    [{ category: "INVALID_REQUEST_ERROR", code: "REQUEST_TIMEOUT" }],
  ];
  addRows(bench, odd.length);
  bench.square.set({
    fault: () => ({
      kind: "change",
      change: ({ responses }) => ({
        responses: Object.fromEntries(
          Object.keys(responses as object).map((key, n) => [key, { errors: odd[n] }]),
        ),
      }),
    }),
  });
  const pushed = await bench.json("push-new", [], 75);
  assert.ok(rowsOf(pushed).every(({ outcome }) => outcome === "later"));
  bench.square.set({
    fault: () => ({ kind: "change", change: (body) => ({ ...body, errors: ["blocked"] }) }),
  });
  assert.equal((await bench.run("push-new")).code, 1);
  bench.square.set({ fault: undefined });
  assert.equal((await bench.json("push-new")).linked, odd.length);
  assert.equal(bench.square.customers.size, odd.length);
});

test("a row that Square never answers does not keep the others from the next run", async (t) => {
  const bench = await makeBench(t);
  makeReady(bench);
  addRows(bench, 3);
  bench.square.set({
    fault: ({ body }) =>
      JSON.stringify(body).includes("Name 1")
        ? {
            kind: "status",
            status: 503,
            code: "SERVICE_UNAVAILABLE",
            headers: { "Retry-After": "90" },
          }
        : undefined,
  });
  for (const known of [0, 2]) {
    assert.equal((await bench.run("push-new", ["--batch-size", "1"])).code, 75);
    assert.equal(bench.square.customers.size, known);
  }
  const [row] = bench.rows(
    "SELECT idempotency_key AS key, push_error FROM customers WHERE local_id = 1",
  );
  assert.match(String(row?.push_error), /SERVICE_UNAVAILABLE/);
  assert.ok(row?.key);
});
