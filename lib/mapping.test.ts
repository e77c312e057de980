import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import initSqlJs from "sql.js";
import { readRows } from "./database.ts";
import { FIELDS, keepNewest, type Row, toCustomer, toRow } from "./mapping.ts";

const { Database } = await initSqlJs();
const db = new Database();
db.exec(readFileSync(new URL("schema.sql", import.meta.url), "utf8"));
const columns = readRows(db, "PRAGMA table_info(customers)").map(({ name }) => name);

test("the schema has exactly the columns of the field table and the file's own, in that order", () => {
  assert.deepEqual(columns, [
    "local_id",
    ...FIELDS.map(({ column }) => column),
    "source",
    "synced_at",
    "idempotency_key",
    "push_error",
  ]);
});

test("what is sent and then comes back is the same row", () => {
  const row = {
    given_name: "Ada",
    family_name: "Lovelace",
    company_name: "Engines",
    nickname: "A",
    email_address: "ada@example.com",
    phone_number: "+12065550100",
    birthday: "1815-12-10",
    note: "first",
    reference_id: "r-1",
    tax_ids_eu_vat: "GB1",
    address_line_1: "1",
    address_line_2: "2",
    address_line_3: "3",
    locality: "London",
    sublocality: "Soho",
    administrative_district_level_1: "LND",
    postal_code: "W1",
    country: "GB",
  };
  const { customer, problems } = toCustomer(row);
  assert.deepEqual(problems, []);
  const back = toRow({ id: "X", ...customer });
  for (const [name, value] of Object.entries(row)) assert.equal(back[name], value);
  assert.deepEqual(
    FIELDS.filter(({ sent }) => sent).map(({ column }) => column),
    Object.keys(row),
  );
});

test("times are made to compare as text: UTC, three digits", () => {
  const row = toRow({
    id: "X",
    created_at: "2023-11-20T16:53:44.72Z",
    updated_at: "2023-11-20T17:53:44+01:00",
  });
  assert.equal(row.created_at, "2023-11-20T16:53:44.720Z");
  assert.equal(row.updated_at, "2023-11-20T16:53:44.000Z");
});

test("an odd profile is kept: unknown words, wrong types, NUL, half a surrogate pair", () => {
  const kept = toRow({
    id: "X",
    creation_source: "TELEPATHY",
    given_name: 42,
    family_name: "a\0b\ud800",
    nickname: null,
    address: "nowhere",
    version: 1.5,
    group_ids: null,
    preferences: { email_unsubscribed: "yes" },
    created_at: "soon",
  });
  assert.equal(kept.creation_source, "TELEPATHY");
  assert.equal(kept.given_name, "42");
  assert.equal(kept.family_name, "a\uFFFDb\uFFFD");
  assert.equal(kept.nickname, null);
  assert.equal(kept.locality, null);
  assert.equal(kept.version, null);
  assert.equal(kept.group_ids, "[]");
  assert.equal(kept.email_unsubscribed, 0);
  assert.equal(kept.created_at, "soon");
});

const taken = (row: Record<string, unknown>) => toCustomer({ given_name: "A", ...row }).customer;
const problem = (row: Record<string, unknown>) =>
  toCustomer({ given_name: "A", ...row }).problems.join();

test("case and spaces are put right", () => {
  assert.deepEqual(taken({ email_address: " ada@example.com ", country: " gb " }), {
    given_name: "A",
    email_address: "ada@example.com",
    address: { country: "GB" },
  });
  assert.equal(taken({ phone_number: "+1 (206) 555-0100" }).phone_number, "+12065550100");
  assert.equal(taken({ phone_number: 2065550100 }).phone_number, "2065550100");
});

test("nothing else is guessed: what Square cannot take is refused, by the column's name only", () => {
  for (const [column, values] of Object.entries({
    email_address: ["ada", "ada@", "ada@x", "a b@example.com", "a@b@example.com"],
    phone_number: ["12", "12345678901234567", "call me", "+44 20 7946 0958 ext 3"],
    birthday: ["1815", "10.12.1815", "2023-02-29", "13-01", "1815-12-32"],
    country: ["Utopia", "XX", "U"],
    given_name: ["x".repeat(301), new Uint8Array([1])],
  }))
    for (const value of values) {
      const [said = ""] = problem({ [column]: value }).split(", such as ");
      assert.ok(said.startsWith(column), `${column} ${value}: ${said}`);
      assert.ok(!said.includes(String(value)), said);
    }
});

test("a birthday goes to Square in its two forms and 29 February needs no year", () => {
  assert.equal(taken({ birthday: "0000-02-29" }).birthday, "02-29");
  assert.equal(taken({ birthday: "02-29" }).birthday, "02-29");
  assert.equal(taken({ birthday: "2024-02-29" }).birthday, "2024-02-29");
});

test("one of the five fields is needed, and blank ones do not count", () => {
  const { problems } = toCustomer({ given_name: " ", email_address: "", note: "hello" });
  assert.match(problems.join(), /^one of given_name/);
});

test("of a customer that came twice the newer version is kept, whatever came first", () => {
  const customers = new Map<string, Row>();
  for (const version of [3, 5, 4])
    keepNewest(customers, { id: "X", version, given_name: `v${version}` });
  assert.deepEqual(
    [...customers.values()].map(({ given_name }) => given_name),
    ["v5"],
  );
});
