import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer, type Server } from "node:http";
import { json } from "node:stream/consumers";
import { test } from "node:test";
import { SquareClient, SquareEnvironment, serialization } from "square";
import { connectSquare, HOSTS, type Square } from "./client.ts";
import { FIELDS, toCustomer } from "./mapping.ts";

const ROW = {
  given_name: "Ada",
  family_name: "Lovelace",
  company_name: "Engines Ltd",
  nickname: "A",
  email_address: "ada@example.com",
  phone_number: "+12125550123",
  birthday: "1815-12-10",
  note: "a note",
  reference_id: "shop-1",
  tax_ids_eu_vat: "IE3426675K",
  address_line_1: "1 Long Row",
  address_line_2: "2",
  address_line_3: "3",
  locality: "London",
  sublocality: "Soho",
  administrative_district_level_1: "Greater London",
  postal_code: "SW1A 1AA",
  country: "GB",
};

async function listen(server: Server): Promise<string> {
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  const address = server.address();
  return `http://127.0.0.1:${typeof address === "object" ? address?.port : ""}`;
}

function makeCaller(startedAt = Date.now(), warn = (_text: string) => {}) {
  return { startedAt, stop: new AbortController().signal, say: () => {}, warn };
}

/** What both clients send for the same calls, as a server sees it. */
async function recordBoth(
  ours: (square: Square) => Promise<unknown>,
  theirs: (client: SquareClient) => Promise<unknown>,
) {
  const asked: object[] = [];
  const server = createServer(async (request, response) => {
    const { authorization, "content-type": type, "square-version": version } = request.headers;
    const { method, url } = request;
    asked.push({ method, url, authorization, type, version, body: await json(request) });
    const customer = { id: "A" };
    response.end(JSON.stringify({ customers: [], customer, responses: { "key-1": { customer } } }));
  });
  const baseUrl = await listen(server);
  try {
    const account = { environment: "offline", token: "a-token", baseUrl } as const;
    await ours(connectSquare(account, 1, makeCaller()));
    await theirs(new SquareClient({ token: "a-token", baseUrl }));
  } finally {
    server.close();
    server.closeAllConnections();
  }
  return asked;
}

test("the hosts are those of the square package", () => {
  const { Production, Sandbox } = SquareEnvironment;
  assert.deepEqual(Object.fromEntries(HOSTS), { production: Production, sandbox: Sandbox });
});

test("each field is one that the square package knows, and each that is sent one that it sends", () => {
  const names = (schema: { _getRawProperties(): string[] }) => schema._getRawProperties();
  const { Customer, BulkCreateCustomerData } = serialization;
  const parents: Record<string, string[]> = {
    address: names(serialization.Address),
    tax_ids: names(serialization.CustomerTaxIds),
    preferences: names(serialization.CustomerPreferences),
  };
  for (const { column, square = column, under = square, sent } of FIELDS) {
    assert.ok(names(Customer).includes(under), column);
    if (under !== square) assert.ok(parents[under]?.includes(square), column);
    if (sent) assert.ok(names(BulkCreateCustomerData).includes(under), column);
  }
});

test("a search goes over the wire as the square package sends it, API version and token included", async () => {
  const start = "2026-08-01T00:00:00.000Z";
  const [our, their] = await recordBoth(
    (square) =>
      square.searchCustomers({
        limit: 100,
        count: true,
        query: {
          filter: { created_at: { start_at: start }, reference_id: { exact: "shop-1" } },
          sort: { field: "CREATED_AT", order: "ASC" },
        },
        cursor: "c",
      }),
    (client) =>
      client.customers.search({
        limit: 100n,
        count: true,
        query: {
          filter: { createdAt: { startAt: start }, referenceId: { exact: "shop-1" } },
          sort: { field: "CREATED_AT", order: "ASC" },
        },
        cursor: "c",
      }),
  );
  assert.deepEqual(our, their);
});

test("a row goes over the wire as the square package sends it, alone and in bulk", async () => {
  const { customer, problems } = toCustomer(ROW);
  assert.deepEqual(problems, []);
  const data = serialization.BulkCreateCustomerData.parse(customer);
  assert.ok(data.ok);
  const [our, theirs] = await recordBoth(
    (square) => square.bulkCreateCustomers({ "key-1": customer }),
    (client) => client.customers.batchCreate({ customers: { "key-1": data.value } }),
  );
  assert.deepEqual(our, theirs);
  const [one, their] = await recordBoth(
    (square) => square.createCustomer({ ...customer, idempotency_key: "key-1" }),
    (client) => client.customers.create({ ...data.value, idempotencyKey: "key-1" } as object),
  );
  assert.deepEqual(one, their);
});

test("a redirect is not followed, and the token goes to no other host", async () => {
  let isVisited = false;
  const other = createServer((_, response) => {
    isVisited = true;
    response.end("{}");
  });
  const elsewhere = await listen(other);
  const square = createServer((_, response) => {
    response.writeHead(307, { Location: elsewhere }).end();
  });
  const account = { environment: "offline", token: "a", baseUrl: await listen(square) } as const;
  await assert.rejects(connectSquare(account, 1, makeCaller()).searchCustomers({}), {
    message: "Cannot get an answer: Square says status 307",
  });
  for (const server of [square, other]) {
    server.close();
    server.closeAllConnections();
  }
  assert.equal(isVisited, false);
});

test("a clock that is ahead cannot push the watermark into the future, and is told of", async () => {
  let square = 0;
  const server = createServer((_, response) => {
    response.setHeader("Date", new Date(square).toUTCString()).end("{}");
  });
  const account = { environment: "offline", token: "a", baseUrl: await listen(server) } as const;
  const ask = async (offBy: number) => {
    const now = Math.floor(Date.now() / 1e3) * 1e3;
    square = now - offBy;
    const said: string[] = [];
    const client = connectSquare(
      account,
      1,
      makeCaller(now, (text) => said.push(text)),
    );
    assert.equal(client.fixedAt, now);
    await client.searchCustomers({});
    square = now - 99 * offBy; // the first answer's clock is the one that counts
    await client.searchCustomers({});
    return { movedMs: client.fixedAt - now, said: said.join() };
  };
  const ahead = await ask(3_600_000);
  assert.equal(ahead.movedMs, -3_600_000);
  assert.match(ahead.said, /^this computer's clock is 360[01] s ahead of Square's$/);
  const behind = await ask(-90_000);
  assert.equal(behind.movedMs, 0);
  assert.match(behind.said, /^this computer's clock is (89|90) s behind Square's$/);
  assert.deepEqual(await ask(2_000), { movedMs: -2_000, said: "" });
  server.close();
  server.closeAllConnections();
});
