import { setTimeout as sleep } from "node:timers/promises";
import { EXIT, SyncError } from "./errors.ts";
import { type Customer, isRecord } from "./mapping.ts";
import { makePace } from "./pace.ts";

const ATTEMPT_MS = 15_000; // an answer, body included, that takes longer will not come
const BUDGET_MS = 60_000; // after so long, a request is given up: the trouble is not a short one
const BACKOFF_MS = 500; // the first wait; each further one is twice as long, give or take half
const LONGEST_WAIT_MS = 16_000;

/** Which Square to talk to, and as whom. */
export interface Account {
  /** `sandbox`, `production`, or `offline` for a base URL of its own. */
  environment: string;
  token: string;
  baseUrl: string | undefined;
}

/** One page of a search. Only the absence of a cursor ends a search: a page may be short, or empty. */
export interface Page {
  customers: Customer[];
  cursor: string | undefined;
  count: number;
}

/** What Square answered for one row of a bulk call. */
export type Created = { customer: Customer } | { errors: SquareError[] };

export interface SquareError {
  category: string;
  code: string;
  field: string;
  detail: string;
}

/** The calls that the kit makes, and what they cost. */
export interface Square {
  searchCustomers(body: object): Promise<Page>;
  /** @param customer with its `idempotency_key` */
  createCustomer(customer: Customer): Promise<Created>;
  /** @param customers 1 to 100, by idempotency key */
  bulkCreateCustomers(customers: Record<string, Customer>): Promise<Record<string, Created>>;
  /** Requests sent, retries included, and how many of them were retries. */
  sent: { requests: number; retries: number };
  /** Square's clock at its first answer, and ours at that moment, in milliseconds since 1970. */
  clock: { square: number; local: number } | undefined;
}

/**
 * A refusal that names the request, not the network: status 4xx, or errors in a 200. Callers that can
 * do something about one catch it; for all others it is a SyncError with a message for a person.
 */
export class RefusedError extends SyncError {
  override name = "RefusedError";
  errors: SquareError[];

  constructor(message: string, errors: SquareError[], status: number) {
    const denied = status === 401 || status === 403 || isCategory(errors, "AUTHENTICATION_ERROR");
    super(message, {
      exitCode: denied ? EXIT.notAllowed : EXIT.failed,
      next: denied
        ? "check that SQUARE_ACCESS_TOKEN is of this environment, not expired, and may read and write customers"
        : undefined,
    });
    this.errors = errors.length > 0 ? errors : [toError({ code: `HTTP ${status}` })];
  }
}

/** A failure that may pass; `waitMs` is how long Square asked us to wait, if it did. */
interface Passing {
  why: string;
  limited: boolean;
  waitMs: number | undefined;
  cause?: unknown;
}

/**
 * Connects to Square, lazily: the SDK is loaded with the first request, since that takes most of a second.
 *
 * Requests go through the SDK's `fetch`, which knows the hosts, the token's header and the API version.
 * Its typed calls are not used: they take a 200 with half a body for an empty last page, turn a whole
 * reply into other names when one field surprises them, and cannot wait for a body that stalls.
 * @param workers how many requests may be under way at a time
 * @param stop ends every request and every wait
 * @param say hears of each retry, for --verbose
 */
export function connectSquare(
  account: Account,
  workers: number,
  stop: AbortSignal,
  say: (text: string) => void,
): Square {
  const pace = makePace(workers);
  let connecting: Promise<import("square").SquareClient> | undefined;
  const square: Square = {
    sent: { requests: 0, retries: 0 },
    clock: undefined,
    async searchCustomers(body) {
      const reply = await send("/v2/customers/search", body, (reply) => {
        const customers = reply.customers ?? [];
        return Array.isArray(customers) && customers.every(hasId);
      });
      return {
        customers: Array.isArray(reply.customers) ? reply.customers : [],
        cursor: typeof reply.cursor === "string" && reply.cursor !== "" ? reply.cursor : undefined,
        count: Number(reply.count ?? 0),
      };
    },
    async createCustomer(customer) {
      return toCreated(await send("/v2/customers", customer, ({ customer }) => hasId(customer)));
    },
    async bulkCreateCustomers(customers) {
      const keys = Object.keys(customers);
      const isWhole = (reply: Record<string, unknown>) =>
        keys.every((key) => {
          const created = isRecord(reply.responses) ? reply.responses[key] : undefined;
          return isRecord(created) && (hasId(created.customer) || toErrors(created).length > 0);
        });
      const { responses } = await send("/v2/customers/bulk-create", { customers }, isWhole);
      const replies = isRecord(responses) ? responses : {};
      return Object.fromEntries(keys.map((key) => [key, toCreated(replies[key])]));
    },
  };

  /** Sends until there is a whole answer: every search only reads, every create carries a stored key. */
  async function send(
    path: string,
    body: object,
    isWhole: (reply: Record<string, unknown>) => boolean,
  ): Promise<Record<string, unknown>> {
    const client = await connect();
    let started: number | undefined;
    for (let attempt = 1; ; attempt++) {
      await pace.turn(stop);
      started ??= Date.now();
      square.sent.requests++;
      if (attempt > 1) square.sent.retries++;
      let outcome: Awaited<ReturnType<typeof sendOnce>> | undefined;
      try {
        outcome = await sendOnce(client, path, body, isWhole);
      } finally {
        pace.over(outcome !== undefined && "reply" in outcome);
      }
      if ("reply" in outcome) return outcome.reply;
      const backoff = Math.min(BACKOFF_MS * 2 ** (attempt - 1), LONGEST_WAIT_MS);
      const waitMs = outcome.waitMs ?? backoff * (0.5 + Math.random());
      if (Date.now() - started + waitMs > BUDGET_MS)
        throw new SyncError(`Cannot reach Square (${account.environment}): ${outcome.why}`, {
          exitCode: EXIT.later,
          next: `run it again later; ${attempt} attempt${attempt === 1 ? " was" : "s were"} made`,
          cause: outcome.cause,
        });
      say(`${path}: ${outcome.why}; trying again in ${(waitMs / 1000).toFixed(1)} s`);
      // A rate limit is everybody's: all workers slow down, not only the one that was told.
      if (outcome.limited) pace.limited(waitMs);
      else await sleep(waitMs, undefined, { signal: stop });
    }
  }

  async function sendOnce(
    client: import("square").SquareClient,
    path: string,
    body: object,
    isWhole: (reply: Record<string, unknown>) => boolean,
  ): Promise<{ reply: Record<string, unknown> } | Passing> {
    const attempt = new AbortController();
    const timer = setTimeout(() => attempt.abort(), ATTEMPT_MS);
    const stopped = () => attempt.abort();
    stop.addEventListener("abort", stopped);
    try {
      const response = await client.fetch(
        path,
        {
          method: "POST",
          headers: { "Content-Type": "application/json" },
          body: JSON.stringify(body),
        },
        { abortSignal: attempt.signal, maxRetries: 0 },
      );
      // The same signal covers the body, which the SDK's own time-out does not.
      const text = await response.text();
      const date = Date.parse(response.headers.get("date") ?? "");
      if (!Number.isNaN(date)) square.clock ??= { square: date, local: Date.now() };
      const reply = toJson(text);
      const errors = toErrors(reply);
      const { status } = response;
      const why = [`status ${status}`, ...errors.map(toWords)].join(", ");
      const limited = status === 429 || isCategory(errors, "RATE_LIMIT_ERROR");
      if (limited || status === 408 || status >= 500 || isCategory(errors, "API_ERROR"))
        return { why, limited, waitMs: toWaitMs(response.headers, Date.now()) };
      if (status !== 200 || errors.length > 0)
        throw new RefusedError(`Cannot get an answer from Square: ${why}`, errors, status);
      // Proxies and bad days answer 200 with a page of HTML or half of the JSON. That is not an answer.
      if (!isRecord(reply) || !isWhole(reply))
        return { why: "the answer was not whole", limited: false, waitMs: undefined };
      return { reply };
    } catch (error) {
      stop.throwIfAborted();
      if (error instanceof SyncError) throw error;
      const why = attempt.signal.aborted ? "no whole answer in time" : "the connection failed";
      return { why, limited: false, waitMs: undefined, cause: error };
    } finally {
      clearTimeout(timer);
      stop.removeEventListener("abort", stopped);
    }
  }

  function connect(): Promise<import("square").SquareClient> {
    connecting ??= import("square").then(({ SquareClient, SquareEnvironment }) => {
      const { environment, token, baseUrl } = account;
      const host = environment === "production" ? "Production" : "Sandbox";
      return new SquareClient({
        token,
        // The SDK's default is production; ours never is.
        baseUrl: baseUrl ?? SquareEnvironment[host],
        // A redirect would send customers to a host that nobody named.
        fetch: (url, init) => fetch(url, { ...init, redirect: "error" }),
      });
    });
    return connecting;
  }

  return square;
}

/** Whether errors are about Square or the token, and say nothing about the row. */
export function isNotOfTheRow(errors: SquareError[]): boolean {
  return ["API_ERROR", "RATE_LIMIT_ERROR", "AUTHENTICATION_ERROR"].some((category) =>
    isCategory(errors, category),
  );
}

/** Square's code and field, and nothing that a customer said: details can quote a row. */
export function toWords({ code, field }: SquareError): string {
  return field === "" ? code : `${code} (${field})`;
}

export function isCategory(errors: SquareError[], category: string): boolean {
  return errors.some((error) => error.category === category);
}

function toErrors(reply: unknown): SquareError[] {
  if (!isRecord(reply) || !Array.isArray(reply.errors)) return [];
  return reply.errors.filter(isRecord).map(toError);
}

function toError(error: Record<string, unknown>): SquareError {
  const word = (value: unknown) => (typeof value === "string" ? value : "");
  return {
    category: word(error.category),
    code: word(error.code) || "UNKNOWN",
    field: word(error.field),
    detail: word(error.detail),
  };
}

function toCreated(reply: unknown): Created {
  if (isRecord(reply) && isRecord(reply.customer)) return { customer: reply.customer };
  return { errors: toErrors(reply) };
}

function hasId(customer: unknown): boolean {
  return isRecord(customer) && typeof customer.id === "string" && customer.id !== "";
}

function toJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined; // not an answer; the caller decides by the status whether to try again
  }
}

// Retry-After is a number of seconds or a date; the date is by Square's clock, so its own Date is used.
function toWaitMs(headers: Headers, now: number): number | undefined {
  const text = headers.get("retry-after");
  if (text === null || text.trim() === "") return undefined;
  const seconds = Number(text);
  if (seconds >= 0) return seconds * 1_000;
  const from = Date.parse(headers.get("date") ?? "") || now;
  const wait = Date.parse(text) - from;
  return Number.isNaN(wait) ? undefined : Math.max(wait, 0);
}
