import { setTimeout as sleep } from "node:timers/promises";
import type { serialization } from "square";
import { EXIT, SyncError } from "./errors.ts";
import { type Customer, isRecord } from "./mapping.ts";
import { makePace } from "./pace.ts";

/**
 * Square's hosts, and the version of its API, as the `square` package has them: tests hold them, and
 * every request, to that package. It is not loaded here. That takes most of a second, and its typed
 * calls take half a reply for the last page, rename all fields when one surprises them, refuse a
 * hundred rows for one unknown country, and wait for ever for a stalled body.
 */
export const HOSTS = new Map([
  ["production", "https://connect.squareup.com"],
  ["sandbox", "https://connect.squareupsandbox.com"],
]);
const SQUARE_VERSION = "2026-09-16";

const ATTEMPT_MS = 15_000; // a whole answer that takes longer will not come
const BUDGET_MS = 60_000; // a request is given up after trying for so long
const BACKOFF_MS = 500; // the first wait, give or take half; each further one is twice as long…
const LONGEST_BACKOFF_MS = 16_000; // …up to this

/** The body of a SearchCustomers request, as it goes over the wire. */
export type SearchRequest = serialization.SearchCustomersRequest.Raw;

/** One page of a search. It may be short or empty; the last one has no cursor. */
export type Page = { customers: Customer[]; cursor: string | undefined; count: number };

/** One of the `errors` in an answer: category, code, and perhaps detail and field. */
export type SquareProblem = Record<string, unknown>;

/** What came of one row of a create. */
export type Created = { customer: Customer } | { errors: SquareProblem[] };

type Reply = Record<string, unknown>;

const TOO_LARGE = { category: "INVALID_REQUEST_ERROR", code: "REQUEST_ENTITY_TOO_LARGE" };

/** The calls of the kit, what they cost so far, and when the run was fixed. */
export type Square = ReturnType<typeof connectSquare>;

/** Square understood the request and refused it; trying again would not help. */
export class RefusedError extends SyncError {
  errors: SquareProblem[];

  constructor(status: number, errors: SquareProblem[]) {
    const isDenied = status === 401 || status === 403 || has(errors, "AUTHENTICATION_ERROR");
    const what = isDenied ? "use this token" : "get an answer";
    const exitCode = isDenied ? EXIT.notAllowed : EXIT.failed;
    const scopes = "with CUSTOMERS_READ and CUSTOMERS_WRITE";
    const hint = `a token of this SQUARE_ENVIRONMENT that is not expired, ${scopes}`;
    const message = `Cannot ${what}: Square says ${toWords(status, errors)}`;
    super(message, exitCode, isDenied ? hint : undefined);
    // What stands between us and Square says it without Square's words.
    const tooLarge = status === 413 && errors.length === 0;
    this.errors = tooLarge ? [TOO_LARGE] : errors;
  }
}

/** True when one of the errors is of this category of Square's. */
export function has(errors: SquareProblem[], name: string): boolean {
  return errors.some(({ category }) => category === name);
}

/**
 * True when Square refuses what it was sent: all its errors say so. Anything else, such as a word of
 * something on the way, tells nothing of what Square did.
 */
export function isRefusal(errors: SquareProblem[]): boolean {
  const refuses = ({ category, code }: SquareProblem) =>
    category === "INVALID_REQUEST_ERROR" &&
    typeof code === "string" &&
    !["CONFLICT", "REQUEST_TIMEOUT"].includes(code);
  return errors.length > 0 && errors.every(refuses);
}

/** Codes and fields, or the status; not the details, which can quote what a customer said. */
export function toWords(status: number, errors: SquareProblem[]): string {
  const words = errors.map(({ code = "UNKNOWN", field }) => `${code}${field ? ` (${field})` : ""}`);
  return [...new Set(words)].join(", ") || `status ${status}`;
}

/** As whom Square is asked; the base URL has no slash at its end. */
export type Account = { environment: string; token: string; baseUrl: string };

/** The run that asks: when it began, in milliseconds since 1970, what ends it, and whom it tells. */
interface Caller {
  startedAt: number;
  stop: AbortSignal; // ends every request and every wait
  say(text: string): void; // hears of each retry
  warn(text: string): void;
}

/**
 * Makes the calls of the kit to one Square.
 * @param workers how many requests may be under way at a time
 */
export function connectSquare(
  { environment, token, baseUrl }: Account,
  workers: number,
  { startedAt, stop, say, warn }: Caller,
) {
  const cannot = `Cannot reach Square (${environment})`;
  const isOffline = environment === "offline";
  const where = isOffline
    ? "does SQUARE_BASE_URL answer? (npm run square: http, not https)"
    : "check the network and https://www.issquareup.com";
  const pace = makePace(workers);
  let hasClock = false;
  const square = {
    workers,
    sent: { requests: 0, retries: 0 },
    unanswered: 0, // requests of which nobody knows what Square did
    /**
     * When the run began by our clock or, if that is earlier, by Square's: the watermark of a clock that
     * is ahead would pass over whoever is created until then.
     */
    fixedAt: startedAt,
    searchCustomers: (body: SearchRequest) => send("/v2/customers/search", body, toPage),
    /** @param customer with its `idempotency_key` */
    createCustomer: (customer: Customer) => send("/v2/customers", customer, toCreated),
    /** @param customers 1 to 100 of them, by idempotency key */
    bulkCreateCustomers: (customers: Record<string, Customer>) =>
      send("/v2/customers/bulk-create", { customers }, ({ responses }) => {
        const created: Record<string, Created> = {};
        for (const key of Object.keys(customers)) {
          const answer = toCreated(isRecord(responses) ? responses[key] : undefined);
          // An entry without an answer of its own says nothing of what became of it.
          if (answer === undefined) return undefined;
          created[key] = answer;
        }
        return created;
      }),
  };

  // Every search only reads and every create carries a stored key, so whatever was asked may be asked
  // again. Where toAnswer returns undefined the answer is not whole: a failure, never an empty page.
  async function send<T>(path: string, body: object, toAnswer: (reply: Reply) => T | undefined) {
    let giveUpAt = 0;
    for (let attempt = 1; ; attempt++) {
      await pace.turn(stop);
      giveUpAt ||= Date.now() + BUDGET_MS;
      square.sent.requests++;
      if (attempt > 1) square.sent.retries++;
      const { status = 0, json, retryAfterMs = 0, cause } = await sendOnce(path, body);
      pace.over(status === 200);
      const errors = toErrors(json);
      const isWell = status === 200 && errors.length === 0;
      const answer = isWell && isRecord(json) ? toAnswer(json) : undefined;
      if (answer !== undefined) return answer;

      const isLimited = status === 429 || has(errors, "RATE_LIMIT_ERROR");
      const isBroken = isWell || status === 0; // no answer at all, or not a whole one
      const passes = isLimited || isBroken || status === 408 || status >= 500;
      const isRefused = !passes && !has(errors, "API_ERROR");
      // What is limited or refused was not done. Of the rest nobody knows, nor of a 200 that says no.
      if (status === 200 || (!isLimited && !isRefused)) square.unanswered++;
      if (isRefused) throw new RefusedError(status, errors);
      const why = isBroken ? "no whole answer" : toWords(status, errors);
      const backoff = Math.min(BACKOFF_MS * 2 ** (attempt - 1), LONGEST_BACKOFF_MS);
      // "Retry-After: 0" is no leave to hammer.
      const waitMs = Math.max(retryAfterMs, backoff * (0.5 + Math.random()));
      if (Date.now() + waitMs > giveUpAt) {
        const hint = `run it again later; ${where}`;
        throw new SyncError(`${cannot}: ${why} (tries: ${attempt})`, EXIT.later, hint, cause);
      }
      say(`${path}: ${why}; trying again in ${(waitMs / 1e3).toFixed(1)} s`);
      // A rate limit is everybody's: all workers slow down, not only the one that was told.
      if (isLimited) {
        pace.limited(waitMs);
        continue;
      }
      await sleep(waitMs, undefined, { signal: stop });
    }
  }

  /** One request; no status when there was no answer, or it did not come whole in time. */
  async function sendOnce(path: string, body: object) {
    // Not AbortSignal.any: on Node 20 such a signal is collected as garbage, and then nothing ends a wait.
    const attempt = new AbortController();
    const abort = () => attempt.abort();
    const timer = setTimeout(abort, ATTEMPT_MS);
    stop.addEventListener("abort", abort);
    try {
      const response = await fetch(baseUrl + path, {
        method: "POST",
        headers: {
          Authorization: `Bearer ${token}`,
          "Content-Type": "application/json",
          "Square-Version": SQUARE_VERSION,
        },
        body: JSON.stringify(body),
        // Not followed: it would take customers to a host that nobody named. And not "error": with that,
        // Node 20 goes on waiting for a body that stalls, whatever the signal says.
        redirect: "manual",
        signal: attempt.signal,
      });
      // Of HTML, or half of the JSON, the status and toAnswer say what it means.
      const json: unknown = await response.json().catch((error: unknown) => {
        if (!(error instanceof SyntaxError)) throw error;
      });
      const { status, headers } = response;
      const date = Date.parse(headers.get("date") ?? "");
      if (!hasClock && date) setClock(date);
      // A number of seconds, or a date by Square's own clock. What is neither comes to NaN, and so to 0.
      const after = headers.get("retry-after") ?? "";
      const retryAfterMs = Number(after) * 1e3 || Date.parse(after) - date || 0;
      return { status, json, retryAfterMs };
    } catch (cause) {
      stop.throwIfAborted();
      if (!(cause instanceof Error && cause.name === "NotCapable")) return { cause };
      const why = "Deno has no permission for its host"; // nor will it have the next time
      const hint = "--allow-net with the host that --verbose names";
      throw new SyncError(`${cannot}: ${why}`, EXIT.usage, hint, cause);
    } finally {
      clearTimeout(timer);
      stop.removeEventListener("abort", abort);
    }
  }

  function setClock(date: number): void {
    hasClock = true;
    square.fixedAt = Math.min(startedAt, date);
    const offBy = Math.round((Date.now() - date) / 1e3);
    const way = offBy > 0 ? "ahead of" : "behind";
    if (Math.abs(offBy) > 60) warn(`this computer's clock is ${Math.abs(offBy)} s ${way} Square's`);
  }

  return square;
}

// Nothing found is {}, but what says something else and names no customers is no page; and a cursor
// that is no text is no end.
function toPage({ customers, cursor, count, errors, ...others }: Reply): Page | undefined {
  const found = customers === undefined && Object.keys(others).length === 0 ? [] : customers;
  const next = cursor ?? "";
  if (!Array.isArray(found) || !found.every(hasId) || typeof next !== "string") return undefined;
  return { customers: found, cursor: next === "" ? undefined : next, count: Number(count) || 0 };
}

function toCreated(reply: unknown): Created | undefined {
  if (isRecord(reply) && hasId(reply.customer)) return { customer: reply.customer };
  const errors = toErrors(reply);
  return errors.length > 0 ? { errors } : undefined;
}

// What stands under errors is an error, whatever its form.
function toErrors(reply: unknown): SquareProblem[] {
  const errors = isRecord(reply) ? (reply.errors ?? []) : [];
  return [errors].flat().map((one) => (isRecord(one) ? one : {}));
}

function hasId(customer: unknown): customer is Customer {
  return isRecord(customer) && typeof customer.id === "string" && customer.id !== "";
}
