import { setTimeout as sleep } from "node:timers/promises";
import type { SquareClient } from "square";
import { EXIT, SyncError } from "./errors.ts";
import { type Customer, isRecord } from "./mapping.ts";
import { makePace } from "./pace.ts";

const ATTEMPT_MS = 15_000; // a whole answer that takes longer will not come
const BUDGET_MS = 60_000; // a request is given up after trying for so long
const BACKOFF_MS = 500; // the first wait, give or take half; each further one is twice as long…
const LONGEST_BACKOFF_MS = 16_000; // …up to this

/** Which Square, and as whom. `offline` is any base URL of one's own. */
export interface Account {
  environment: "sandbox" | "production" | "offline";
  token: string;
  baseUrl: string | undefined;
}

/** One page of a search. It may be short or empty; the last one has no cursor. */
export type Page = { customers: Customer[]; cursor: string | undefined; count: number };

/** One of the `errors` in an answer: category, code, and perhaps detail and field. */
export type SquareProblem = Record<string, unknown>;

/** What came of one row of a create. */
export type Created = { customer: Customer } | { errors: SquareProblem[] };

/** The calls of the kit, and what they cost so far. */
export interface Square {
  searchCustomers(body: object): Promise<Page>;
  /** @param customer with its `idempotency_key` */
  createCustomer(customer: Customer): Promise<Created>;
  /** @param customers 1 to 100 of them, by idempotency key */
  bulkCreateCustomers(customers: Record<string, Customer>): Promise<Record<string, Created>>;
  sent: { requests: number; retries: number };
  /** Square's clock at its first answer and ours at that moment, in milliseconds since 1970. */
  clock: { square: number; local: number } | undefined;
}

/** Square understood the request and refused it; trying again would not help. */
export class RefusedError extends SyncError {
  errors: SquareProblem[];

  constructor(status: number, errors: SquareProblem[]) {
    const isDenied = status === 401 || status === 403 || has(errors, "AUTHENTICATION_ERROR");
    super(
      `Cannot ${isDenied ? "use this token" : "get an answer"}: Square says ${toWords(status, errors)}`,
      isDenied ? EXIT.notAllowed : EXIT.failed,
      isDenied
        ? "a token of this SQUARE_ENVIRONMENT that is not expired, with CUSTOMERS_READ and CUSTOMERS_WRITE"
        : undefined,
    );
    this.errors = errors;
  }
}

/** True when one of the errors is of one of these categories of Square's. */
export function has(errors: SquareProblem[], ...categories: string[]): boolean {
  return errors.some(({ category }) => categories.includes(String(category)));
}

/** Status, codes and fields; not the details, which can quote what a customer said. */
export function toWords(status: number, errors: SquareProblem[]): string {
  const words = errors.map(({ code, field }) => (field ? `${code} (${field})` : String(code)));
  return [...new Set(words.length > 0 ? words : [`status ${status}`])].join(", ");
}

/**
 * Connects to Square. The SDK is loaded with the first request, since that alone takes most of a second.
 *
 * Requests go through the SDK's `fetch`, which knows hosts, token and API version. Its typed calls are
 * not used: they take half of a reply for an empty last page, rename a whole reply's fields when one
 * surprises them, refuse a batch for one unknown country, and wait for ever for a body that stalls.
 * @param workers how many requests may be under way at a time
 * @param stop ends every request and every wait
 * @param say is told of each retry
 */
export function connectSquare(
  account: Account,
  workers: number,
  stop: AbortSignal,
  say: (text: string) => void,
): Square {
  const pace = makePace(workers);
  let connecting: Promise<SquareClient> | undefined;
  const square: Square = {
    sent: { requests: 0, retries: 0 },
    clock: undefined,
    async searchCustomers(body) {
      const isWhole = ({ customers = [] }) => Array.isArray(customers) && customers.every(hasId);
      const { customers, cursor, count } = await send("/v2/customers/search", body, isWhole);
      return {
        customers: Array.isArray(customers) ? customers : [],
        cursor: typeof cursor === "string" && cursor !== "" ? cursor : undefined,
        count: Number(count) || 0,
      };
    },
    async createCustomer(body) {
      return toCreated(await send("/v2/customers", body, ({ customer }) => hasId(customer)));
    },
    async bulkCreateCustomers(customers) {
      const of = (reply: Record<string, unknown>, key: string) =>
        isRecord(reply.responses) ? reply.responses[key] : undefined;
      const keys = Object.keys(customers);
      const reply = await send("/v2/customers/bulk-create", { customers }, (reply) =>
        keys.every((key) => isRecord(of(reply, key)) && isCreated(toCreated(of(reply, key)))),
      );
      return Object.fromEntries(keys.map((key) => [key, toCreated(of(reply, key))]));
    },
  };

  // Every search only reads and every create carries a stored key, so whatever was asked may be asked
  // again. What is not a whole answer is a failure, never an empty page.
  async function send(
    path: string,
    body: object,
    isWhole: (reply: Record<string, unknown>) => boolean,
  ): Promise<Record<string, unknown>> {
    connecting ??= connect(account);
    const client = await connecting;
    let firstAt = 0;
    for (let attempt = 1; ; attempt++) {
      await pace.turn(stop);
      firstAt ||= Date.now();
      square.sent.requests++;
      if (attempt > 1) square.sent.retries++;
      let reply: Awaited<ReturnType<typeof sendOnce>> | undefined;
      try {
        reply = await sendOnce(client, path, body);
      } finally {
        pace.over(reply?.status === 200);
      }
      const { status, json, errors } = reply;
      const isLimited = status === 429 || has(errors, "RATE_LIMIT_ERROR");
      const passes =
        isLimited || status === 408 || status >= 500 || status === 0 || has(errors, "API_ERROR");
      if (!passes && (status !== 200 || errors.length > 0)) throw new RefusedError(status, errors);
      if (!passes && isRecord(json) && isWhole(json)) return json;

      const why = passes && status > 0 ? toWords(status, errors) : "no whole answer";
      const backoff = Math.min(BACKOFF_MS * 2 ** (attempt - 1), LONGEST_BACKOFF_MS);
      // "Retry-After: 0" is no leave to hammer.
      const waitMs = Math.max(reply.retryAfterMs ?? 0, backoff * (0.5 + Math.random()));
      if (Date.now() - firstAt + waitMs > BUDGET_MS)
        throw new SyncError(
          `Cannot reach Square (${account.environment}): ${why}, ${attempt} times`,
          EXIT.later,
          "run it again later; check the network and https://www.issquareup.com",
          reply.cause,
        );
      say(`${path}: ${why}; trying again in ${(waitMs / 1e3).toFixed(1)} s`);
      // A rate limit is everybody's: all workers slow down, not only the one that was told.
      if (isLimited) pace.limited(waitMs);
      else await sleep(waitMs, undefined, { signal: stop });
    }
  }

  /** One request; status 0 when there was no answer, or it did not come whole in time. */
  async function sendOnce(client: SquareClient, path: string, body: object) {
    const attempt = new AbortController();
    const abort = () => attempt.abort();
    const timer = setTimeout(abort, ATTEMPT_MS);
    stop.addEventListener("abort", abort);
    const headers = { "Content-Type": "application/json" };
    const request = { method: "POST", headers, body: JSON.stringify(body) };
    try {
      const options = { abortSignal: attempt.signal, maxRetries: 0 };
      const response = await client.fetch(path, request, options);
      const json = toJson(await response.text());
      const date = Date.parse(response.headers.get("date") ?? "");
      if (date) square.clock ??= { square: date, local: Date.now() };
      const errors =
        isRecord(json) && Array.isArray(json.errors) ? json.errors.filter(isRecord) : [];
      const retryAfterMs = toWaitMs(response.headers.get("retry-after"), date || Date.now());
      return { status: response.status, json, errors, retryAfterMs, cause: undefined };
    } catch (cause) {
      stop.throwIfAborted();
      // Deno may not go to that host, and may not the next time either.
      if (cause instanceof Error && cause.name === "NotCapable")
        throw new SyncError(
          `Cannot reach Square (${account.environment}): Deno has no permission for its host`,
          EXIT.usage,
          "--allow-net with the host that --verbose names",
          cause,
        );
      return { status: 0, json: undefined, errors: [], retryAfterMs: undefined, cause };
    } finally {
      clearTimeout(timer);
      stop.removeEventListener("abort", abort);
    }
  }

  return square;
}

async function connect({ environment, token, baseUrl }: Account): Promise<SquareClient> {
  const { SquareClient, SquareEnvironment } = await import("square");
  const { Production, Sandbox } = SquareEnvironment;
  return new SquareClient({
    token,
    // The SDK's default is production; ours never is.
    baseUrl: baseUrl ?? (environment === "production" ? Production : Sandbox),
    // A redirect would take customers to a host that nobody named.
    fetch: (url, init) => fetch(url, { ...init, redirect: "error" }),
  });
}

function toCreated(reply: unknown): Created {
  if (isRecord(reply) && hasId(reply.customer)) return { customer: reply.customer };
  const errors = isRecord(reply) && Array.isArray(reply.errors) ? reply.errors : [];
  return { errors: errors.filter(isRecord) };
}

function isCreated(created: Created): boolean {
  return "customer" in created || created.errors.length > 0;
}

function hasId(customer: unknown): customer is Customer {
  return isRecord(customer) && typeof customer.id === "string" && customer.id !== "";
}

function toJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined; // HTML, or half of the JSON: the status and the caller say what that means
  }
}

// A number of seconds, or a date by Square's own clock.
function toWaitMs(retryAfter: string | null, now: number): number | undefined {
  if (!retryAfter?.trim()) return undefined;
  const waitMs = Number(retryAfter) * 1e3;
  const untilMs = Math.max(Date.parse(retryAfter) - now, 0);
  if (waitMs >= 0) return waitMs;
  return Number.isNaN(untilMs) ? undefined : untilMs;
}
