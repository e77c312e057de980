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
import { inventCustomers, startSquare } from "../fixtures/fake-square/server.ts";

const [path] = process.argv.slice(2);
if (path === undefined) {
  console.error("openapi: Cannot check: no file given\nTry: see the head of .ci/openapi.mjs");
  process.exit(2);
}
const description = JSON.parse(readFileSync(path, "utf8"));
const { default: Ajv } = await import("ajv");
const ajv = new Ajv({ strict: false, allErrors: true, formats: { int64: true } });
ajv.addSchema({ $id: "square", ...toJsonSchema(description) });

/**
 * OpenAPI 3.0 as JSON Schema, where an object may hold only what its schema names. `nullable` becomes
 * a choice, also beside a `$ref`, where a validator would not look at it.
 */
function toJsonSchema(node) {
  if (Array.isArray(node)) return node.map(toJsonSchema);
  if (typeof node !== "object" || node === null) return node;
  const { nullable, $ref, ...rest } = node;
  const schema = $ref ? { $ref } : { ...rest };
  for (const [key, inner] of Object.entries(schema)) schema[key] = toJsonSchema(inner);
  if (node.type === "object" && node.properties) schema.additionalProperties ??= false;
  return nullable ? { anyOf: [schema, { type: "null" }] } : schema;
}

const ERROR = { $ref: "#/components/schemas/Error" };
const OPERATIONS = 7; // of those described; what was never answered with a 200 was not checked
const seen = new Set();
const failures = [];
let count = 0;
let square;

/** Sends a request; a 200 has to fit its endpoint's schema, and anything else that of an error. */
async function send(method, path, body, token = "offline-token") {
  const response = await fetch(`${square.url}/v2/customers${path}`, {
    method,
    headers: { authorization: `Bearer ${token}`, "content-type": "application/json" },
    body: body && JSON.stringify(body),
  });
  const reply = await response.json();
  const [known] = `/v2/customers${path}`.split("?");
  const endpoint = description.paths[known] ? known : "/v2/customers/{customer_id}";
  const isOk = response.status === 200;
  const { content } = description.paths[endpoint][method.toLowerCase()].responses[200];
  const { $ref } = isOk ? content["application/json"].schema : ERROR;
  const validate = ajv.getSchema(`square${$ref}`);
  const parts = isOk ? [reply] : (reply.errors ?? []);
  const isWrong = parts.length === 0 || parts.some((part) => !validate(part));
  if (isOk) seen.add(`${method} ${endpoint}`);
  if (isWrong) failures.push(`${method} ${path}: ${ajv.errorsText(validate.errors)}`);
  count += 1;
  return reply;
}
const search = (body, token) => send("POST", "/search", body, token);

async function drain(body) {
  let { cursor } = await search(body);
  while (cursor !== undefined) ({ cursor } = await search({ ...body, cursor }));
}

const stored = JSON.parse(
  readFileSync(new URL("../fixtures/data/customers.json", import.meta.url)),
);
for (const options of [
  { customers: stored },
  { customers: inventCustomers(1200, { spread: "tied" }), unevenPages: true },
  { customers: [] },
]) {
  square = await startSquare(options);
  for (const order of ["ASC", "DESC"])
    await drain({ count: true, query: { sort: { field: "CREATED_AT", order } } });
  await drain({
    limit: 7,
    query: { filter: { updated_at: { start_at: "2026-01-01T00:00:00Z" } } },
  });
  const ids = options.customers.map(({ id }) => id);
  for (const id of ids.slice(0, 240)) await send("GET", `/${id}`);
  for (let n = 0; n < ids.length; n += 99)
    await send("POST", "/bulk-retrieve", { customer_ids: [...ids.slice(n, n + 99), "NOBODY"] });
  await square.close();
}

const READ = ["CUSTOMERS_READ"];
const tokens = { "offline-token": [...READ, "CUSTOMERS_WRITE"], reader: READ };
square = await startSquare({ customers: stored, tokens });
const full = {
  given_name: "Ada",
  phone_number: "+1 (212) 555-0115",
  birthday: "12-10",
  tax_ids: { eu_vat: "IE3426675K" },
  address: { address_line_1: "1 Row", locality: "London", postal_code: "N1", country: "GB" },
};
const { id } = (await send("POST", "", { ...full, idempotency_key: "k1" })).customer;
for (const one of [{ given_name: "Eve", idempotency_key: "k1" }, { given_name: 1 }, { nope: 1 }])
  await send("POST", "", one);
for (const one of [{}, { email_address: "x" }, { birthday: "x" }, { nope: 1 }])
  await send("POST", "/bulk-create", { customers: { one, full, bare: { note: null } } });
for (const body of [{ note: null, address: null, version: 0 }, { version: 0 }, { unknown: 1 }])
  await send("PUT", `/${id}`, body);
for (const path of ["/NOBODY", `/${id}?version=0`, `/${id}?version=1`]) await send("DELETE", path);
square.merge(stored[0].id, stored[1].id);
for (const path of [`/${stored[0].id}`, "/NOBODY"]) await send("GET", path);
for (const body of [{ limit: 0 }, { cursor: "x" }, { query: { sort: { order: "x" } } }])
  await search(body);
await search({}, "nobody");
await send("POST", "", full, "reader");
for (const settings of [
  { requestsPerSecond: 0 },
  { requestsPerSecond: undefined, fault: () => ({ kind: "errors-in-200", code: "CONFLICT" }) },
  { fault: () => ({ kind: "status", status: 503, code: "SERVICE_UNAVAILABLE" }) },
]) {
  square.set(settings);
  await search({});
}
await square.close();

if (seen.size !== OPERATIONS) failures.push(`a 200 was checked of these only: ${[...seen]}`);
for (const failure of failures.slice(0, 20)) console.error(failure.slice(0, 500));
console.log(`${count} replies checked, ${failures.length} failed`);
process.exitCode = failures.length > 0 ? 1 : 0;
