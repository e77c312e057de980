import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import { join } from "node:path";
import { describe, it, type TestContext } from "node:test";
import {
  addRows,
  assertEqualSides,
  assertOneEach,
  assertSpeech,
  hashOf,
  makeReady,
  markRead,
  nthRequest,
  readWatermark,
  WATERMARK,
} from "../fixtures/campaign.ts";
import { toRecord } from "../fixtures/rules.ts";
import { type Fault, inventCustomers, type OfflineSquareOptions } from "../fixtures/square.ts";
import { type Bench, type Ended, makeBench, TOKEN } from "../fixtures/testing.ts";

type Rule = OfflineSquareOptions["fault"];

const CUSTOMERS = inventCustomers(650, { from: "2026-02-01", to: "2026-06-01" });
const ROWS = 16;
const BATCHES = ["--batch-size", "4"];

interface Run {
  bench: Bench;
  script: string;
  ended: Ended;
  before: string;
  names: string[];
}

async function pull(
  t: TestContext,
  fault: Rule,
  { script = "pull-created", env = {}, ...options }: Options = {},
): Promise<Run> {
  const bench = await makeBench(t, { customers: CUSTOMERS, fault, ...options });
  makeReady(bench);
  markRead(bench, script);
  const before = hashOf(bench);
  const ended = await bench.run(script, ["--verbose"], env);
  assertSpeech(ended);
  return { bench, script, ended, before, names: [] };
}

type Options = OfflineSquareOptions & {
  script?: string;
  env?: Record<string, string>;
  args?: string[];
};

async function push(
  t: TestContext,
  fault: Rule,
  { env = {}, args = BATCHES, ...options }: Options = {},
): Promise<Run> {
  const bench = await makeBench(t, { fault, ...options });
  makeReady(bench);
  const names = addRows(bench, ROWS);
  const before = hashOf(bench);
  const ended = await bench.run("push-new", [...args, "--verbose"], env);
  assertSpeech(ended);
  return { bench, script: "push-new", ended, before, names };
}

function assertPulled({ bench, ended, script }: Run): void {
  assert.equal(ended.code, 0, ended.stderr);
  assertEqualSides(bench);
  assert.match(String(readWatermark(bench, script)), /^2(?!026-0[1-6])/);
}

function assertPushed({ bench, ended, names }: Run): void {
  assert.equal(ended.code, 0, ended.stderr);
  assertOneEach(bench, names);
  assertEqualSides(bench);
}

function assertUntouched({ bench, ended, script, before }: Run, code: number, says: RegExp): void {
  assert.equal(ended.code, code, ended.stderr);
  assert.match(ended.stderr, says);
  assert.equal(hashOf(bench), before);
  assert.equal(readWatermark(bench, script), WATERMARK);
  for (const end of [".tmp", ".lock"])
    assert.equal(existsSync(join(bench.folder, `database.db${end}`)), false);
}

/** The push failed, told no lie, and the next one finishes what it began. */
async function assertCarriesOn(run: Run, code: number, says: RegExp): Promise<void> {
  const { bench, ended, names } = run;
  assert.equal(ended.code, code, ended.stderr);
  assert.match(ended.stderr, says);
  const rows = bench.rows("SELECT id, idempotency_key FROM customers ORDER BY local_id");
  assert.deepEqual(
    rows.map(({ id, idempotency_key }) => [
      id === null || bench.square.customers.has(String(id)),
      typeof idempotency_key,
    ]),
    names.map(() => [true, "string"]),
  );
  assert.equal(readWatermark(bench, "push-new"), null);
  bench.square.set({ fault: undefined });
  assertPushed({ ...run, ended: await bench.run("push-new", BATCHES) });
}

const status = (status: number, code: string, headers?: Record<string, string>): Fault => ({
  kind: "status",
  status,
  code,
  ...(headers && { headers }),
});

const inSeconds = (seconds: number): string => new Date(Date.now() + seconds * 1_000).toUTCString();

/** Trouble that passes. Each fault of a group meets another request of the same run. */
const PASSING: Record<string, (() => Fault)[]> = {
  "connections that are dropped, cut, or lost after Square has acted, and answers that are no whole JSON":
    [
      () => ({ kind: "drop" }),
      () => ({ kind: "drop", after: true }),
      () => ({ kind: "cut-connection", after: true }),
      () => ({ kind: "cut", after: true }),
      () => ({ kind: "html", after: true }),
      () => ({ kind: "change", change: () => ({}) }),
      () => ({ kind: "change", change: () => ({ message: "Service Unavailable" }) }),
    ],
  "a 503 of HTML, a 408, a 500 and a server error in a 200": [
    () => ({ kind: "html", status: 503 }),
    () => ({ ...status(408, "REQUEST_TIMEOUT"), after: true }),
    () => ({ ...status(500, "INTERNAL_SERVER_ERROR"), after: true }),
    () => ({ kind: "errors-in-200", code: "INTERNAL_SERVER_ERROR", after: true }),
  ],
  "429s with Retry-After in seconds, as a date, and without": [
    () => status(429, "RATE_LIMITED", { "Retry-After": "2" }),
    () => status(429, "RATE_LIMITED", { "Retry-After": inSeconds(2) }),
    () => status(429, "RATE_LIMITED"),
  ],
};

/** Leaves the first request alone; then every second one goes wrong, so that its repetition does not. */
function inTurn(operation: string, faults: (() => Fault)[]): Rule {
  let count = 0;
  return (request) => {
    if (request.operation !== operation) return undefined;
    count++;
    return count % 2 === 0 ? faults[count / 2 - 1]?.() : undefined;
  };
}

// With words of its own: without them, Node parses the whole source to find some.
function assertSent({ bench }: Run, atLeast: number): void {
  const sent = bench.square.requests.length;
  assert.ok(sent >= atLeast, `${sent} requests were sent, not ${atLeast}`);
}

function assertWaited({ bench }: Run): void {
  const waits = bench.square.requests.flatMap(({ at, status }, place) =>
    status === 429 ? [((bench.square.requests[place + 1]?.at ?? 0) - at) / 1_000] : [],
  );
  const [inSeconds = 0, asDate = 0, byItself = 0] = waits;
  const asTold = inSeconds > 1.9 && inSeconds < 5 && asDate > 0.9 && asDate < 5;
  assert.ok(asTold && byItself > 0.2 && byItself < 5, `it waited ${waits.join(", ")} s`);
}

describe("Faults", { concurrency: true }, () => {
  describe("that are over in seconds", { concurrency: 1 }, () => {
    describe("that pass", { concurrency: 2 }, () => {
      for (const [name, faults] of Object.entries(PASSING)) {
        it(`a push gets over ${name}`, async (t) => {
          const args = ["--batch-size", "2"];
          const run = await push(t, inTurn("bulk-create", faults), { args });
          assertPushed(run);
          assertSent(run, ROWS / 2 + faults.length);
          if (name.startsWith("429")) assertWaited(run);
        });

        // What only Square's status tells is the same to every call.
        if (/whole|429/.test(name))
          it(`a pull gets over ${name}`, async (t) => {
            const run = await pull(t, inTurn("search", faults), { script: "pull-updated" });
            assertPulled(run);
            assertSent(run, 7 + faults.length);
            if (name.startsWith("429")) assertWaited(run);
          });
      }

      it("a push by single calls gets over replies that are lost after Square has acted", async (t) => {
        let count = 0;
        const rule: Rule = () => (++count % 3 === 0 ? { kind: "drop", after: true } : undefined);
        assertPushed(await push(t, rule, { args: ["--batch-size", "1"] }));
      });

      it("a push whose call is refused as a whole finds that its rows are good", async (t) => {
        const refuse = (): Fault => ({ kind: "errors-in-200", code: "BAD_REQUEST" });
        assertPushed(await push(t, nthRequest("bulk-create", 2, refuse)));
      });
    });

    describe("that do not pass", { concurrency: 2 }, () => {
      it("a pull gives up a 503 that asks for patience until a date in an hour", async (t) => {
        const headers = { "Retry-After": inSeconds(3600) };
        const fault = () => status(503, "SERVICE_UNAVAILABLE", headers);
        const run = await pull(t, nthRequest("search", 2, fault));
        assertUntouched(run, 75, /Cannot reach Square/);
        assert.equal(run.bench.square.requests.length, 2);
      });

      it("a push gives up a 429 that asks for an hour's patience", async (t) => {
        const fault = () => status(429, "RATE_LIMITED", { "Retry-After": "3600" });
        const run = await push(t, nthRequest("bulk-create", 2, fault));
        await assertCarriesOn(run, 75, /Cannot reach Square/);
      });

      it("a pull with a wrong token ends with 4, and nothing was tried twice", async (t) => {
        const env = { SQUARE_ACCESS_TOKEN: "EAAA-wrong-and-secret" };
        const run = await pull(t, undefined, { env });
        assertUntouched(run, 4, /UNAUTHORIZED/);
        assert.doesNotMatch(run.ended.stdout + run.ended.stderr, /EAAA/);
        assert.equal(run.bench.square.requests.length, 1);
      });

      it("a pull whose token is revoked half way ends with 4", async (t) => {
        const revoked = () => status(401, "ACCESS_TOKEN_REVOKED");
        assertUntouched(await pull(t, nthRequest("search", 2, revoked)), 4, /ACCESS_TOKEN_REVOKED/);
      });

      it("a push whose token is revoked half way keeps what was done, and carries on", async (t) => {
        const revoked = () => status(401, "ACCESS_TOKEN_REVOKED");
        const run = await push(t, nthRequest("bulk-create", 2, revoked));
        assert.equal(run.bench.square.customers.size, 4);
        assert.equal(run.bench.rows("SELECT 1 FROM customers WHERE id IS NOT NULL").length, 4);
        await assertCarriesOn(run, 4, /ACCESS_TOKEN_REVOKED/);
      });

      it("a pull without the permission to read ends with 4", async (t) => {
        const run = await pull(t, undefined, { tokens: { [TOKEN]: ["CUSTOMERS_WRITE"] } });
        assertUntouched(run, 4, /INSUFFICIENT_SCOPES/);
      });

      it("a push without the permission to write ends with 4, and carries on once it has it", async (t) => {
        const refused = () => status(403, "INSUFFICIENT_SCOPES");
        const run = await push(t, refused);
        assert.equal(run.bench.square.customers.size, 0);
        await assertCarriesOn(run, 4, /INSUFFICIENT_SCOPES/);
      });

      it("a pull whose cursor expires for ever ends with 1", async (t) => {
        const rule: Rule = ({ body }) =>
          JSON.stringify(body).includes('"cursor"') ? status(400, "INVALID_CURSOR") : undefined;
        assertUntouched(await pull(t, rule), 1, /INVALID_CURSOR/);
      });

      it("a pull that gets errors in no form of Square's does not take them for an empty directory", async (t) => {
        const rule: Rule = () => ({ kind: "change", change: () => ({ errors: ["RATE_LIMITED"] }) });
        assertUntouched(await pull(t, rule), 1, /Cannot get an answer/);
      });

      it("a pull that gets the same cursor again ends with 1, not in a circle", async (t) => {
        const rule: Rule = ({ body }) =>
          JSON.stringify(body).includes('"cursor"') ? { kind: "repeat-cursor" } : undefined;
        const run = await pull(t, rule);
        assertUntouched(run, 1, /Cannot .*cursor/);
        assert.equal(run.bench.square.requests.length, 2);
      });

      it("a pull that never gets all that Square counts saves them, and leaves the watermark", async (t) => {
        const hidden = CUSTOMERS[120]?.id;
        const run = await pull(t, () => ({
          kind: "change",
          change: (body) => without(body, hidden),
        }));
        assert.equal(run.ended.code, 1, run.ended.stderr);
        assert.match(run.ended.stderr, /Cannot .*\b1\b/);
        assert.deepEqual(
          run.bench.rows("SELECT count(*) AS n, max(id) > '' AS ids FROM customers"),
          [{ n: 649, ids: 1 }],
        );
        assert.equal(readWatermark(run.bench, run.script), WATERMARK);
      });
    });

    describe("of paging, and odd answers", { concurrency: 2 }, () => {
      it("a pull whose cursor expires once begins its window again", async (t) => {
        const rule = nthRequest("search", 3, () => status(400, "INVALID_CURSOR"));
        assertPulled(await pull(t, rule));
      });

      it("a pull that misses a customer of Square's count reads the window again", async (t) => {
        const rule = nthRequest("search", 2, () => ({
          kind: "change",
          change: (body) => ({ ...body, customers: toList(body.customers).slice(1) }),
        }));
        const run = await pull(t, rule);
        assertPulled(run);
        assertSent(run, 6);
      });

      it("a pull takes pages that repeat customers, and has each once", async (t) => {
        let before: unknown[] = [];
        const rule: Rule = () => ({
          kind: "change",
          change(body) {
            const own = Array.isArray(body.customers) ? body.customers : [];
            const customers = [...before, ...own, ...own.slice(0, 7)];
            before = own;
            return { ...body, customers };
          },
        });
        assertPulled(await pull(t, rule));
      });

      it("a pull takes odd profiles as they are, and shows no control character", async (t) => {
        const odd = [
          {
            id: "ODD1",
            created_at: "2026-03-01T12:00:00Z",
            updated_at: "2026-03-01T12:00:00.5+01:00",
            version: 3,
            given_name: 42,
            family_name: { was: "a text" },
            email_address: null,
            phone_number: ["+12125550100"],
            creation_source: "HOLOGRAM",
            address: "12 Main Street",
            birthday: true,
            reference_id: null,
            preferences: null,
            tax_ids: [],
            segment_ids: null,
            shoe_size: { left: 43 },
          },
          {
            id: "ODD2\u001b[2J",
            created_at: "the other day",
            version: "seven",
            given_name: "A\0B\u001b[31m\u009b\u202e",
            note: "line 1\nline 2\r",
            address: { country: "Atlantis", locality: null },
          },
        ];
        const rule = nthRequest("search", 2, () => ({
          kind: "change",
          change: (body) => ({ ...body, customers: [...toList(body.customers).slice(2), ...odd] }),
        }));
        const { bench, ended } = await pull(t, rule);
        assert.equal(ended.code, 0, ended.stderr);
        assert.deepEqual(
          bench.rows(
            `SELECT id, created_at, updated_at, version, creation_source, given_name, family_name,
             email_address, phone_number, birthday, note, reference_id, address_line_1, country,
             segment_ids, email_unsubscribed
           FROM customers WHERE id LIKE 'ODD%' ORDER BY id`,
          ),
          [
            {
              id: "ODD1",
              created_at: "2026-03-01T12:00:00.000Z",
              updated_at: "2026-03-01T11:00:00.500Z",
              version: 3,
              creation_source: "HOLOGRAM",
              given_name: "42",
              family_name: '{"was":"a text"}',
              email_address: null,
              phone_number: '["+12125550100"]',
              birthday: "true",
              note: null,
              reference_id: null,
              address_line_1: null,
              country: null,
              segment_ids: "[]",
              email_unsubscribed: 0,
            },
            {
              id: "ODD2\u001b[2J",
              created_at: "the other day",
              updated_at: null,
              version: null,
              creation_source: null,
              given_name: "A\uFFFDB\u001b[31m\u009b\u202e",
              family_name: null,
              email_address: null,
              phone_number: null,
              birthday: null,
              note: "line 1\nline 2\r",
              reference_id: null,
              address_line_1: null,
              country: "Atlantis",
              segment_ids: "[]",
              email_unsubscribed: 0,
            },
          ],
        );
        assert.equal(bench.rows("SELECT 1 FROM customers").length, 650);
      });

      it("a push takes odd profiles for an answer, and gives each row its id", async (t) => {
        const rule: Rule = ({ operation }) => ({
          kind: "change",
          change: (body) =>
            operation !== "bulk-create"
              ? body
              : {
                  responses: Object.fromEntries(
                    Object.entries(toRecord(body.responses)).map(([key, entry]) => [
                      key,
                      {
                        customer: {
                          ...toRecord(toRecord(entry).customer),
                          version: "x",
                          address: 7,
                          preferences: null,
                          creation_source: "HOLOGRAM",
                          shoe_size: 43,
                        },
                      },
                    ]),
                  ),
                },
        });
        const { bench, ended, names } = await push(t, rule);
        assert.equal(ended.code, 0, ended.stderr);
        assertOneEach(bench, names);
      });

      it("a row whose reply was lost and that is then refused keeps its key, and is not doubled", async (t) => {
        let count = 0;
        const rule: Rule = () =>
          ++count === 1 ? { kind: "drop", after: true } : status(400, "BAD_REQUEST");
        const run = await push(t, rule, { args: [] });
        assert.notEqual(run.ended.code, 0);
        run.bench.square.set({ fault: undefined });
        assertPushed({ ...run, ended: await run.bench.run("push-new") });
      });

      it("a row whose reply was lost and that is then refused in a 200 is not doubled", async (t) => {
        let count = 0;
        const refused = { category: "INVALID_REQUEST_ERROR", code: "BAD_REQUEST" };
        const rule: Rule = () =>
          ++count === 1
            ? { kind: "drop", after: true }
            : {
                kind: "change",
                change: (body) => ({
                  responses: Object.fromEntries(
                    Object.keys(toRecord(body.responses)).map((key) => [
                      key,
                      { errors: [refused] },
                    ]),
                  ),
                }),
              };
        const run = await push(t, rule, { args: [] });
        assert.notEqual(run.ended.code, 0);
        run.bench.square.set({ fault: undefined });
        assertPushed({ ...run, ended: await run.bench.run("push-new") });
      });

      it("a Retry-After of 0 does not make a script hammer at Square", async (t) => {
        let first = 0;
        const rule: Rule = () => {
          first ||= Date.now();
          return Date.now() - first < 3_000
            ? status(503, "SERVICE_UNAVAILABLE", { "Retry-After": "0" })
            : undefined;
        };
        const run = await pull(t, rule);
        assertPulled(run);
        const sent = run.bench.square.requests.length;
        assert.ok(sent < 20, `${sent} requests were sent in three seconds`);
      });
    });
  });

  describe("that last", { concurrency: true }, () => {
    it("a pull gets over answers that never begin or stop half way, by sending again", async (t) => {
      const stalls = inTurn("search", [
        () => ({ kind: "stall-headers" }),
        () => ({ kind: "stall-body" }),
      ]);
      assertPulled(await pull(t, stalls));
    });

    it("a push gets over answers that never begin or stop half way, and doubles nobody", async (t) => {
      const stalls = inTurn("bulk-create", [
        () => ({ kind: "stall-headers", after: true }),
        () => ({ kind: "stall-body", after: true }),
      ]);
      assertPushed(await push(t, stalls));
    });

    it("a pull that nobody answers gives up after about a minute", async (t) => {
      const run = await pull(t, undefined, { env: { SQUARE_BASE_URL: await deadUrl() } });
      assertUntouched(run, 75, /Cannot reach Square/);
    });

    it("a pull gets over a connection that is refused for a moment", async (t) => {
      const door = await openDoor(t);
      const bench = await makeBench(t, {
        customers: CUSTOMERS,
        fault: nthRequest("search", 2, () => {
          door.shut();
          setTimeout(() => door.open(), 1_500);
          return { kind: "drop" };
        }),
      });
      door.leadTo(bench.square.url);
      makeReady(bench);
      const ended = await bench.run("pull-created", [], { SQUARE_BASE_URL: door.url });
      assertPulled({ bench, script: "pull-created", ended, before: "", names: [] });
    });

    it("a push that is refused a connection half way gives up, and carries on later", async (t) => {
      const door = await openDoor(t);
      const bench = await makeBench(t, {
        fault: nthRequest("bulk-create", 2, () => {
          door.shut();
          return { kind: "drop", after: true };
        }),
      });
      door.leadTo(bench.square.url);
      makeReady(bench);
      const names = addRows(bench, ROWS);
      const ended = await bench.run("push-new", BATCHES, { SQUARE_BASE_URL: door.url });
      assertSpeech(ended);
      const run = { bench, script: "push-new", ended, before: "", names };
      await assertCarriesOn(run, 75, /Cannot reach Square/);
    });

    it("a push whose answers all stop half way gives up, and carries on later", async (t) => {
      const run = await push(t, ({ operation }) =>
        operation === "bulk-create" ? { kind: "stall-body", after: true } : undefined,
      );
      assert.equal(run.bench.square.customers.size, 4);
      await assertCarriesOn(run, 75, /Cannot reach Square/);
    });

    it("a pull that gets a customer without an id saves nothing and says so", async (t) => {
      const rule: Rule = () => ({
        kind: "change",
        change: (body) => ({
          ...body,
          customers: [...toList(body.customers), { given_name: "?" }],
        }),
      });
      const run = await pull(t, rule);
      assertUntouched(run, run.ended.code === 1 ? 1 : 75, /Cannot .+/);
    });
  });
});

function without(body: Record<string, unknown>, id: string | undefined): Record<string, unknown> {
  return { ...body, customers: toList(body.customers).filter((one) => toRecord(one).id !== id) };
}

function toList(value: unknown): unknown[] {
  return Array.isArray(value) ? value : [];
}

/** An address where nothing listens. */
async function deadUrl(): Promise<string> {
  const server = createServer();
  const { port } = await listen(server, 0);
  await new Promise((resolve) => server.close(resolve));
  return `http://127.0.0.1:${port}`;
}

/** A way to the offline Square that can be shut: connections through it end, new ones are refused. */
async function openDoor(t: TestContext) {
  const sockets = new Set<Socket>();
  let to = 0;
  const server = createServer((socket) => {
    const other = connect(to, "127.0.0.1");
    for (const end of [socket, other]) {
      sockets.add(end);
      end.on("error", () => {}).on("close", () => sockets.delete(end));
    }
    socket.pipe(other).pipe(socket);
  });
  const { port } = await listen(server, 0);
  const shut = () => {
    server.close();
    for (const socket of sockets) socket.destroy();
  };
  t.after(shut);
  return {
    url: `http://127.0.0.1:${port}`,
    shut,
    open: () => void server.listen(port, "127.0.0.1"),
    leadTo(url: string) {
      to = Number(new URL(url).port);
    },
  };
}

function listen(server: ReturnType<typeof createServer>, port: number): Promise<AddressInfo> {
  return new Promise((resolve, reject) => {
    server.once("error", reject);
    server.listen(port, "127.0.0.1", () => {
      const address = server.address();
      if (address !== null && typeof address !== "string") resolve(address);
    });
  });
}
