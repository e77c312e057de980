/**
 * The `fetch` that is handed to the SDK. It closes the SDK's traps in one place, so that the SDK's own retry
 * policy (408, 429, 5xx, Retry-After, exponential back-off) is the only one.
 *
 * A 200 is not always an answer. A proxy can return an HTML page, and a broken connection can cut the JSON in
 * half. The SDK would treat both as a page without a cursor, that is, as the last page, and the customers on
 * the remaining pages would be lost without an error. So this `fetch` reads the whole body, and turns
 * anything that is not a complete answer into a 503, which the SDK retries.
 */
import type { RunContext } from "./context.ts";
import { codeOf, messageOf, SyncError } from "./errors.ts";
import { createProxyFetch } from "./proxy.ts";
import { createRateLimiter } from "./rate-limiter.ts";
import {
  classifyReply,
  formatErrors,
  isRecord,
  isSuccess,
  type NoReply,
  readErrors,
  type SquareProblem,
} from "./square-errors.ts";

/** How often the SDK tries again: after about 1, 2, 4, 8 and 16 seconds, half a minute in all. */
export const MAX_RETRIES = 5;

// A reply that takes longer will not come. This includes the body: the SDK's own time limit ends at the headers.
const REPLY_TIMEOUT_MS = 15_000;
// The SDK waits at most a minute for Retry-After and then tries again too early. So end the run instead.
const LONGEST_RETRY_AFTER_MS = 60_000;
const CLOCK_WARNING_MS = 60_000;

type Fetch = typeof fetch;

/**
 * Creates the strict `fetch` of a run. It counts requests and retries in `context.traffic`, lowers
 * `context.startedAt` when Square's clock is behind, and shares one rate limit among all requests.
 * @param concurrency how many requests may run at the same time
 */
export async function createStrictFetch(context: RunContext, concurrency: number): Promise<Fetch> {
  const { traffic } = context;
  const proxyFetch = await createProxyFetch();
  const limiter = createRateLimiter(concurrency);
  // The SDK passes the same headers object for each attempt of a call. So they identify a retry.
  const attempts = new WeakMap<object, number>();
  let hasClock = false;

  return async function strictFetch(input, init = {}) {
    const url = String(input);
    const { pathname } = new URL(url);
    const call = init.headers ?? {};
    const attempt = (attempts.get(call) ?? 0) + 1;
    attempts.set(call, attempt);
    await limiter.acquire();
    traffic.requests++;
    if (attempt > 1) traffic.retries++;
    const reply = await receive(proxyFetch, url, init, context).catch((error: unknown) => {
      limiter.release(false);
      throw error;
    });
    const { status, headers, text } = reply;
    const body = parseJson(text);
    const errors = readErrors(body);
    const isComplete = isCompleteReply(pathname, body, init.body);
    const { kind, isOutcomeKnown } = classifyReply(status, errors, isComplete);
    limiter.release(kind === "done");
    if (!isOutcomeKnown) traffic.unknownOutcomes++;
    adjustClock(headers.get("date"));
    if (kind === "done") return makeReply(status, headers, text);
    if (kind === "rejected") {
      // The SDK parses an error by its content type, and loses the status of one that it cannot parse.
      headers.set("content-type", body === undefined ? "text/plain" : "application/json");
      // The SDK treats every status below 400 as success.
      return makeReply(Math.max(status, 400), headers, text);
    }

    const reason = reply.failure ?? describeReply(status, errors);
    const waitMs = readRetryAfter(headers);
    if (waitMs > LONGEST_RETRY_AFTER_MS)
      throw new SyncError(
        "temporary",
        `Cannot reach Square (${context.square.environment}): ${reason}; it asks to wait ${Math.round(waitMs / 1_000)} s`,
        "run it again later",
      );
    if (kind === "rate-limited") limiter.slowDown(waitMs);
    if (attempt <= MAX_RETRIES) context.note(`${pathname}: ${reason}; trying again`);
    const retryStatus = kind === "rate-limited" ? 429 : Math.max(status, 503);
    return retryLater(retryStatus, reason, errors, waitMs);
  };

  function adjustClock(header: string | null): void {
    const squareTime = Date.parse(header ?? "");
    if (hasClock || Number.isNaN(squareTime)) return;
    hasClock = true;
    // With a clock that is ahead, the watermark would be in Square's future, and customers created until
    // then would never be read.
    context.startedAt = Math.min(context.startedAt, squareTime);
    const aheadMs = Date.now() - squareTime;
    if (Math.abs(aheadMs) > CLOCK_WARNING_MS)
      context.warn(
        `this computer's clock is ${Math.abs(Math.round(aheadMs / 1_000))} s ${aheadMs > 0 ? "ahead of" : "behind"} Square's`,
      );
  }
}

interface RawReply {
  status: number; // 0 when no reply came
  headers: Headers;
  text: string;
  failure?: string;
}

// The SDK reads the body with text(). A Response with a real body would encode the text and decode it again,
// which takes a tenth of the time of a large load.
function makeReply(status: number, headers: Headers, text: string): Response {
  const response = new Response(null, { status, headers });
  response.text = async () => text;
  return response;
}

/** Sends one request and reads the whole reply. */
async function receive(
  send: Fetch,
  url: string,
  init: RequestInit,
  context: RunContext,
): Promise<RawReply> {
  const timeout = new AbortController();
  const timer = setTimeout(() => timeout.abort(), REPLY_TIMEOUT_MS);
  try {
    // A redirect is not followed: it would send customers and token to a host that the user did not name.
    const response = await send(url, { ...init, redirect: "manual", signal: timeout.signal });
    const text = await response.text();
    if (response.status >= 300 && response.status < 400)
      throw new SyncError(
        "failed",
        `Cannot reach Square (${context.square.environment}): the server redirects to another address (status ${response.status})`,
        "check SQUARE_BASE_URL and the proxy; a login page of the network also answers like this",
      );
    // Copied, because Node does not allow to change the headers of a reply.
    return { status: response.status, headers: new Headers(response.headers), text };
  } catch (error) {
    if (error instanceof SyncError) throw error;
    const proxyStatus = findProxyStatus(error);
    if (proxyStatus !== undefined) return { status: proxyStatus, headers: new Headers(), text: "" };
    const code = timeout.signal.aborted
      ? `no reply within ${REPLY_TIMEOUT_MS / 1_000} s`
      : findNetworkCode(error);
    throwIfLasting(error, code, context);
    return { status: 0, headers: new Headers(), text: "", failure: `no reply (${code})` };
  } finally {
    clearTimeout(timer);
  }
}

/** Throws for a failure that trying again cannot fix. The SDK does not retry what `fetch` throws. */
function throwIfLasting(error: unknown, code: string, { square: { environment } }: RunContext) {
  const cannot = `Cannot reach Square (${environment})`;
  if (/CERT|UNABLE_TO_(GET|VERIFY)|SELF_SIGNED|certificate/i.test(code))
    throw new SyncError(
      "failed",
      `${cannot}: the certificate of the server is not trusted (${code})`,
      "behind a proxy that opens TLS, set NODE_EXTRA_CA_CERTS (Deno: DENO_CERT) to its CA certificate; or check SQUARE_BASE_URL",
      error,
    );
  if (error instanceof Error && error.name === "NotCapable")
    throw new SyncError(
      "usage",
      `${cannot}: Deno has no permission for its host`,
      "--allow-net with the host of this SQUARE_ENVIRONMENT or SQUARE_BASE_URL",
      error,
    );
}

// In Node, a proxy that rejects a request does not lead to a reply. Its status is only in the text of an error, and
// fetch replaces a reply with status 407 by an error without any text.
function findProxyStatus(error: unknown): number | undefined {
  for (let cause: unknown = error; cause instanceof Error; cause = cause.cause) {
    const [, status] = /^Proxy response \((\d{3})\)/.exec(cause.message) ?? [];
    if (status !== undefined) return Number(status);
    const isBare = cause.message === "" && codeOf(cause) === "" && cause.constructor === Error;
    if (isBare) return 407;
  }
  return undefined;
}

// Node and Bun put a code such as ENOTFOUND into the error or one of its causes. Deno has only a text.
function findNetworkCode(error: unknown): string {
  const texts: string[] = [];
  for (let cause: unknown = error; cause instanceof Error; cause = cause.cause) {
    if (codeOf(cause)) return codeOf(cause);
    if (cause instanceof AggregateError && codeOf(cause.errors[0])) return codeOf(cause.errors[0]);
    texts.push(messageOf(cause));
  }
  const text = texts.join(": ");
  if (/dns|lookup/i.test(text)) return "ENOTFOUND";
  if (/refused/i.test(text)) return "ECONNREFUSED";
  if (/reset|closed|terminated|incomplete|eof/i.test(text)) return "ECONNRESET";
  return /certificate[^:)]*/i.exec(text)?.[0] ?? "connection failed";
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined; // HTML, or JSON that was cut off: the caller treats it as an incomplete reply
  }
}

/**
 * True when a body is what the endpoint promises. In a bulk reply, every entry of the request needs an entry
 * of its own; without it, we cannot know what Square did with that row.
 */
function isCompleteReply(pathname: string, body: unknown, request: unknown): boolean {
  if (!isRecord(body)) return false;
  if (pathname.endsWith("/search")) return isCompletePage(body);
  if (pathname.endsWith("/bulk-create") || pathname.endsWith("/bulk-retrieve")) {
    const { responses } = body;
    const sent = parseJson(String(request));
    const keys = isRecord(sent) ? (sent.customer_ids ?? Object.keys(sent.customers ?? {})) : [];
    const isAnswered = (key: unknown) => isRecord(responses) && isEntry(responses[String(key)]);
    return Array.isArray(keys) && keys.every(isAnswered);
  }
  return pathname.endsWith("/customers") ? hasId(body.customer) : true;
}

// An empty result is `{}`. Any other body without a `customers` array is incomplete, and so is a cursor that
// is not a text. Treating it as the last page would silently drop customers. Without a number as the count,
// missing customers would not be noticed.
function isCompletePage({ customers, cursor, count, ...others }: Record<string, unknown>): boolean {
  const isEmpty = customers === undefined && Object.keys(others).length === 0;
  const isList = Array.isArray(customers) && customers.every(hasId);
  const hasValidCursor = typeof (cursor ?? "") === "string";
  const hasValidCount = typeof (count ?? 0) === "number";
  return (isEmpty || isList) && hasValidCursor && hasValidCount;
}

function isEntry(entry: unknown): boolean {
  return isRecord(entry) && (hasId(entry.customer) || readErrors(entry).length > 0);
}

function hasId(customer: unknown): boolean {
  return isRecord(customer) && typeof customer.id === "string" && customer.id !== "";
}

function describeReply(status: number, errors: SquareProblem[]): string {
  if (isSuccess(status) && errors.length === 0) return "incomplete reply";
  return formatErrors(errors) || `status ${status}`;
}

// Retry-After is a number of seconds, or a date by Square's clock. Anything else counts as 0.
function readRetryAfter(headers: Headers): number {
  const text = headers.get("retry-after") ?? "";
  const squareTime = Date.parse(headers.get("date") ?? "") || Date.now();
  const waitMs = Number(text) * 1_000 || Date.parse(text) - squareTime;
  return Math.max(waitMs, 0) || 0;
}

/** Makes the reply that lets the SDK try again. Its body keeps the reason for the error message. */
function retryLater(status: number, reason: string, errors: SquareProblem[], waitMs: number) {
  const headers = new Headers({ "content-type": "application/json" });
  if (waitMs > 0) headers.set("retry-after", `${Math.ceil(waitMs / 1_000)}`);
  const body: NoReply & { errors?: SquareProblem[] } = { no_reply: reason };
  if (errors.length > 0) body.errors = errors;
  return new Response(JSON.stringify(body), { status, headers });
}
