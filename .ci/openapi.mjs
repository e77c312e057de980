/**
 * Checks the replies of the fake Square server against Square's OpenAPI description of the
 * customers endpoints. The description is Square's text, so it is not part of this project. It
 * does not contain RetrieveTokenStatus; that reply is checked against the fields that Square's
 * reference lists.
 *
 *   npm install --no-save ajv
 *   node --import tsx .ci/openapi.mjs customers-openapi.json
 *
 * Exit codes: 0 all replies are valid, 1 a reply is invalid or an endpoint was not checked, 2
 * wrong usage.
 */
import { readFileSync } from "node:fs";
import { inventCustomers, startFakeSquare } from "../fixtures/fake-square/server.ts";

const [path] = process.argv.slice(2);
if (path === undefined) {
  console.error("openapi: Cannot check: no file given");
  console.error("Try: node --import tsx .ci/openapi.mjs customers-openapi.json");
  process.exit(2);
}
const description = JSON.parse(readFileSync(path, "utf8"));
const { default: Ajv } = await import("ajv");
const ajv = new Ajv({ strict: false, allErrors: true, formats: { int64: true } });
// https://developer.squareup.com/reference/square/o-auth-api/retrieve-token-status
const TOKEN_STATUS = {
  type: "object",
  required: ["scopes", "expires_at", "client_id", "merchant_id"],
  additionalProperties: false,
  properties: {
    scopes: { type: "array", items: { type: "string" } },
    expires_at: { type: "string", pattern: "^(\\d{4}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\dZ)?$" },
    client_id: { type: "string", minLength: 1 },
    merchant_id: { type: "string", minLength: 1 },
  },
};
ajv.addSchema({ $id: "square", ...convertSchema(description) });
ajv.addSchema({ $id: "token-status", ...TOKEN_STATUS });

/**
 * Converts OpenAPI 3.0 to JSON Schema. An object may have only the fields that its schema lists.
 * `nullable` becomes an `anyOf`, because validators ignore keywords next to a `$ref`.
 */
function convertSchema(node) {
  if (Array.isArray(node)) return node.map(convertSchema);
  if (typeof node !== "object" || node === null) return node;
  const { nullable, $ref, ...rest } = node;
  const schema = $ref ? { $ref } : { ...rest };
  for (const [key, inner] of Object.entries(schema)) schema[key] = convertSchema(inner);
  if (node.type === "object" && node.properties) schema.additionalProperties ??= false;
  return nullable ? { anyOf: [schema, { type: "null" }] } : schema;
}

const ENDPOINTS = 8; // every endpoint of the server must have answered at least once with 200
const seen = new Set();
const failures = [];
let count = 0;
let square;

/** Finds the schemas of the endpoint's replies in Square's description. */
function findEndpoint(method, path) {
  if (path === "/oauth2/token/status") return { name: `${method} ${path}`, schema: "token-status" };
  const [known] = path.split("?");
  const endpoint = description.paths[known] ? known : "/v2/customers/{customer_id}";
  const { content } = description.paths[endpoint][method.toLowerCase()].responses[200];
  const { $ref } = content["application/json"].schema;
  return { name: `${method} ${endpoint}`, schema: `square${$ref}` };
}

/**
 * Sends a request. A reply with status 200 must match the endpoint's schema, any other that of
 * errors.
 */
async function request(method, path, body, token = "offline-token") {
  const response = await fetch(`${square.url}${path}`, {
    method,
    headers: { authorization: `Bearer ${token}`, "content-type": "application/json" },
    body: body && JSON.stringify(body),
  });
  const reply = await response.json();
  const { name, schema } = findEndpoint(method, path);
  const isOk = response.status === 200;
  const validate = ajv.getSchema(isOk ? schema : "square#/components/schemas/Error");
  const parts = isOk ? [reply] : (reply.errors ?? []);
  const isInvalid = parts.length === 0 || parts.some((part) => !validate(part));
  if (isOk) seen.add(name);
  if (isInvalid) failures.push(`${method} ${path}: ${ajv.errorsText(validate.errors)}`);
  count += 1;
  return reply;
}

const send = (method, path, body, token) => request(method, `/v2/customers${path}`, body, token);
const checkTokenStatus = (token) => request("POST", "/oauth2/token/status", undefined, token);
const search = (body, token) => send("POST", "/search", body, token);

/** Requests all pages of a search. */
async function readPages(body) {
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
  square = await startFakeSquare(options);
  await readPages({ count: true, query: { sort: { field: "CREATED_AT", order: "ASC" } } });
  await readPages({
    limit: 7,
    query: { filter: { updated_at: { start_at: "2026-01-01T00:00:00Z" } } },
  });
  const ids = options.customers.map(({ id }) => id);
  for (const id of ids.slice(0, 240)) await send("GET", `/${id}`);
  for (let n = 0; n < ids.length; n += 99)
    await send("POST", "/bulk-retrieve", { customer_ids: [...ids.slice(n, n + 99), "UNKNOWN"] });
  await square.close();
}

const READ = ["CUSTOMERS_READ"];
const tokens = {
  "offline-token": [...READ, "CUSTOMERS_WRITE"],
  reader: { scopes: READ, merchantId: "SELLER-B", expiresAt: "2999-12-31T00:00:00Z" },
  expired: { scopes: READ, expiresAt: "2020-01-01T00:00:00Z" },
};
square = await startFakeSquare({ customers: stored, tokens });
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
for (const one of [{}, { email_address: "x" }, { birthday: "x" }, { nope: 1, note: 2 }])
  await send("POST", "/bulk-create", { customers: { one, full, bare: { note: null } } });
for (const body of [{ note: null, address: null, version: 0 }, { version: 0 }, { unknown: 1 }])
  await send("PUT", `/${id}`, body);
for (const path of ["/UNKNOWN", `/${id}`]) await send("DELETE", path);
square.restore(id);
const oldIds = [stored[0].id, stored[1].id];
const merged = square.merge(...oldIds);
for (const mergedIdsNotFound of [false, true]) {
  square.set({ mergedIdsNotFound });
  for (const one of [...oldIds, merged.id, id, "UNKNOWN"]) await send("GET", `/${one}`);
  await send("POST", "/bulk-retrieve", { customer_ids: [...oldIds, merged.id, id, "UNKNOWN"] });
}
square.unmerge(merged.id);
await send("POST", "/bulk-retrieve", { customer_ids: [...oldIds, merged.id] });
for (const token of ["offline-token", "reader", "expired", "unknown"])
  await checkTokenStatus(token);
for (const body of [{ limit: 0 }, { cursor: "x" }, { query: { sort: { order: "x" } } }])
  await search(body);
await search({}, "unknown");
await search({}, "expired");
await send("POST", "", full, "reader");
for (const settings of [
  { hasTokenStatus: false },
  { requestsPerSecond: 0 },
  {
    requestsPerSecond: undefined,
    hasTokenStatus: true,
    fault: () => ({ kind: "status", status: 503, code: "SERVICE_UNAVAILABLE" }),
  },
]) {
  square.set(settings);
  await search({});
  await checkTokenStatus();
}
square.set({ fault: () => ({ kind: "errors-in-200", code: "CONFLICT" }) });
await search({});
await square.close();

if (seen.size !== ENDPOINTS)
  failures.push(`only these endpoints answered: ${[...seen].join(", ")}`);
for (const failure of failures.slice(0, 20)) console.error(failure.slice(0, 500));
console.log(`${count} replies checked, ${failures.length} invalid`);
process.exitCode = failures.length > 0 ? 1 : 0;
