/**
 * Checks the offline Square's replies against Square's own description of its customers endpoints,
 * which is Square's text and therefore not kept here.
 *
 *   npm install --no-save ajv
 *   node --import tsx .ci/openapi.mjs customers-openapi.json
 *
 * Exit codes: 0 all replies satisfy it, 1 one does not or none was checked, 2 wrong usage.
 */
import { readFileSync } from "node:fs";
import { inventCustomers, startSquare } from "../fixtures/square.ts";

const [path] = process.argv.slice(2);
if (path === undefined) {
  console.error(
    "openapi: Cannot check: no file given\nTry: node --import tsx .ci/openapi.mjs <file>",
  );
  process.exit(2);
}
const description = JSON.parse(readFileSync(path, "utf8"));
const { default: Ajv } = await import("ajv");
const loose = new Ajv({ strict: false, allErrors: true, formats: { int64: true } });
const tight = new Ajv({ strict: false, allErrors: true, formats: { int64: true } });
loose.addSchema({ $id: "square", ...toJsonSchema(description, false) });
tight.addSchema({ $id: "square", ...toJsonSchema(description, true) });

/**
 * OpenAPI 3.0 as JSON Schema. `nullable` becomes a choice, also beside a `$ref`, where a validator
 * would not look at it. When tight, an object may hold only what its schema names.
 */
function toJsonSchema(node, isTight) {
  if (Array.isArray(node)) return node.map((inner) => toJsonSchema(inner, isTight));
  if (typeof node !== "object" || node === null) return node;
  const { nullable, $ref, ...rest } = node;
  const schema = $ref
    ? { $ref }
    : Object.fromEntries(
        Object.entries(rest).map(([key, inner]) => [key, toJsonSchema(inner, isTight)]),
      );
  if (
    isTight &&
    node.type === "object" &&
    node.properties &&
    node.additionalProperties === undefined
  ) {
    schema.additionalProperties = false;
  }
  return nullable ? { anyOf: [schema, { type: "null" }] } : schema;
}

function pointer(...names) {
  const escaped = names.map((name) => name.replaceAll("~", "~0").replaceAll("/", "~1"));
  return `square#/${escaped.map(encodeURIComponent).join("/")}`;
}

const checked = { ok: 0, error: 0 };
const seen = new Set();
const failures = [];

/** One reply: a 200 against its endpoint's schema, anything else against that of an error. */
function check(name, status, body, operation) {
  seen.add(`${name} ${status}`);
  const ref =
    status === 200
      ? pointer("paths", ...operation, "responses", "200", "content", "application/json", "schema")
      : pointer("components", "schemas", "Error");
  const parts = status === 200 ? [body] : body.errors;
  const problems = [];
  if (!Array.isArray(parts) || parts.length === 0) problems.push("no errors in a refusal");
  for (const part of Array.isArray(parts) ? parts : []) {
    for (const [kind, ajv] of [
      ["schema", loose],
      ["unknown property", tight],
    ]) {
      const validate = ajv.getSchema(ref);
      if (!validate) throw new Error(`Cannot check ${name}: no schema at ${ref}`);
      if (validate(part)) continue;
      const texts = validate.errors.map(
        (error) =>
          `${kind}: ${error.instancePath} ${error.message} ${JSON.stringify(error.params)}`,
      );
      problems.push(...texts);
      break;
    }
  }
  checked[status === 200 ? "ok" : "error"] += 1;
  if (problems.length > 0) failures.push(`${name} ${status}: ${problems.join("; ").slice(0, 500)}`);
}

let square;
async function send(method, path, body, token = "offline-token") {
  const response = await fetch(`${square.url}/v2/customers${path}`, {
    method,
    headers: { authorization: `Bearer ${token}`, "content-type": "application/json" },
    body: body === undefined ? null : JSON.stringify(body),
  });
  const reply = await response.json();
  const [known] = path.split("?");
  const full = description.paths[`/v2/customers${known}`]
    ? `/v2/customers${known}`
    : "/v2/customers/{customer_id}";
  check(`${method} ${full}`, response.status, reply, [full, method.toLowerCase()]);
  return reply;
}

async function drain(body, path = "/search") {
  let cursor;
  do {
    const asked = { ...body, ...(cursor ? { cursor } : {}) };
    const reply =
      path === ""
        ? await send("GET", `?${new URLSearchParams(asked)}`)
        : await send("POST", path, asked);
    cursor = reply.cursor;
  } while (cursor !== undefined);
}

const stored = JSON.parse(
  readFileSync(new URL("../fixtures/customers.json", import.meta.url), "utf8"),
);
const ORDERS = [
  { field: "CREATED_AT", order: "ASC" },
  { field: "CREATED_AT", order: "DESC" },
  { field: "DEFAULT", order: "ASC" },
];
const directories = [
  { customers: stored },
  { customers: inventCustomers(1200, { spread: "tied" }), unevenPages: true },
  { customers: [...stored, ...inventCustomers(300, { seed: 3, spread: "import-day" })] },
  { customers: [] },
];
for (const options of directories) {
  square = await startSquare(options);
  for (const sort of ORDERS) await drain({ count: true, query: { sort } });
  await drain({
    limit: 7,
    query: { filter: { updated_at: { start_at: "2026-01-01T00:00:00Z" } } },
  });
  await drain({ count: "true", sort_field: "CREATED_AT", limit: "60" }, "");
  await drain({}, "");
  const ids = options.customers.map(({ id }) => id);
  for (const id of ids.slice(0, 240)) await send("GET", `/${id}`);
  for (let n = 0; n < ids.length; n += 99) {
    await send("POST", "/bulk-retrieve", { customer_ids: [...ids.slice(n, n + 99), "NOBODY"] });
  }
  await square.close();
}

square = await startSquare({
  customers: stored,
  tokens: { "offline-token": ["CUSTOMERS_READ", "CUSTOMERS_WRITE"], reader: ["CUSTOMERS_READ"] },
});
const full = {
  given_name: "Ada",
  family_name: "Lovelace",
  company_name: "Engines & Sons",
  nickname: "A",
  email_address: "ada@example.com",
  phone_number: "+1 (212) 555-0115",
  birthday: "12-10",
  reference_id: "r-1",
  note: "🌻",
  tax_ids: { eu_vat: "IE3426675K" },
  address: { address_line_1: "1 Row", locality: "London", postal_code: "N1", country: "GB" },
};
const { customer } = await send("POST", "", { ...full, idempotency_key: "k1" });
await send("POST", "", { ...full, idempotency_key: "k1" });
await send("POST", "", { given_name: "Eve", idempotency_key: "k1" });
for (const bad of [
  {},
  { given_name: 1 },
  { email_address: "x" },
  { phone_number: "12" },
  { birthday: "x" },
  { nope: 1 },
  { given_name: "x".repeat(301) },
  { given_name: "A", address: { country: "gb" } },
]) {
  await send("POST", "", bad);
  await send("POST", "/bulk-create", {
    customers: { a: bad, b: full, c: { given_name: "B", note: null } },
  });
}
await send("POST", "/bulk-create", {
  customers: Object.fromEntries(
    Array.from({ length: 100 }, (_, n) => [`bulk-${n}`, n % 10 ? full : { note: "x" }]),
  ),
});
await send("POST", "/bulk-create", { customers: {} });
await send("POST", "/bulk-create", {});
await send("PUT", `/${customer.id}`, { note: null, address: null, version: 0 });
await send("PUT", `/${customer.id}`, { note: "late", version: 0 });
await send("PUT", `/${customer.id}`, { unknown: 1 });
await send("GET", "/NOBODY");
await send("PUT", "/NOBODY", { note: "x" });
await send("DELETE", "/NOBODY");
await send("DELETE", `/${customer.id}?version=0`);
await send("DELETE", `/${customer.id}?version=1`);
const merged = square.merge(stored[0].id, stored[1].id);
await send("GET", `/${stored[0].id}`);
await send("GET", `/${merged.id}`);
for (const bad of [
  { limit: 0 },
  { limit: 101 },
  { cursor: "x" },
  { nope: 1 },
  { query: { filter: { created_at: { start_at: "x" } } } },
  {
    query: {
      filter: { created_at: { start_at: "2026-02-01T00:00:00Z", end_at: "2026-01-01T00:00:00Z" } },
    },
  },
  { query: { sort: { field: "UPDATED_AT" } } },
]) {
  await send("POST", "/search", bad);
}
await send("GET", "?limit=1000");
await send("POST", "/bulk-retrieve", { customer_ids: [] });
await send("POST", "/search", {}, "nobody");
await send("POST", "", full, "reader");
await drain({ count: true, query: { filter: { email_address: { exact: "ADA@example.com" } } } });
square.set({ requestsPerSecond: 1 });
await send("POST", "/search", {});
await send("POST", "/search", {});
square.set({
  requestsPerSecond: undefined,
  fault: () => ({ kind: "status", status: 503, code: "SERVICE_UNAVAILABLE" }),
});
await send("POST", "/search", {});
square.set({ fault: () => ({ kind: "errors-in-200", code: "INTERNAL_SERVER_ERROR" }) });
await send("POST", "/search", {});
await square.close();

// An endpoint that was never answered with a 200 would pass without having been checked.
const OFFERED = [
  "GET /v2/customers",
  "POST /v2/customers",
  "POST /v2/customers/search",
  "POST /v2/customers/bulk-create",
  "POST /v2/customers/bulk-retrieve",
  "GET /v2/customers/{customer_id}",
  "PUT /v2/customers/{customer_id}",
  "DELETE /v2/customers/{customer_id}",
];
for (const name of OFFERED) {
  if (!seen.has(`${name} 200`)) failures.push(`${name}: no 200 was checked`);
}
for (const failure of failures.slice(0, 20)) console.error(failure);
console.log(`${checked.ok + checked.error} replies checked, ${failures.length} failed`);
process.exitCode = failures.length > 0 || checked.ok === 0 ? 1 : 0;
