/**
 * The `fetch` with which the SDK sends its requests. It passes only complete replies on to the SDK.
 *
 * A reply with status 200 can be incomplete. A proxy can return an HTML page, and a broken
 * connection can cut the JSON off. The SDK would treat both as a page without a cursor, which is
 * how Square marks the last page. The customers on the remaining pages would be lost without an
 * error. So this `fetch` reads the whole body, and replaces an incomplete reply by a 503.
 *
 * The SDK retries a 408, a 429 and every 5xx, after the time of Retry-After or with exponential
 * back-off. This `fetch` retries nothing itself.
 */
import type { RunContext } from "./context.ts";
import { codeOf, listErrorChain, messageOf, SyncError } from "./errors.ts";
import { isDeniedByDeno } from "./file-errors.ts";
import { isRecord, parseJson } from "./json.ts";
import { createProxyFetch } from "./proxy.ts";
import { createRateLimiter } from "./rate-limiter.ts";
import {
  classifyReply,
  formatCannotReach,
  formatErrors,
  isSuccess,
  type ReplyKind,
  type RetryReply,
  readErrors,
  type SquareErrorEntry,
} from "./square-errors.ts";

/** How often the SDK retries: after about 1, 2, 4, 8 and 16 seconds, half a minute in total. */
export const MAX_RETRIES = 5;

// The time limit for a reply with its body. The SDK's own time limit ends when the headers arrive.
const REPLY_TIMEOUT_MS = 15_000;

// The SDK waits for at most a minute. After a longer Retry-After it would retry too early, so the
// run ends instead.
const LONGEST_RETRY_AFTER_MS = 60_000;

// Warn about a larger difference between the clocks of this computer and of Square.
const CLOCK_WARNING_MS = 60_000;

type Fetch = typeof fetch;

interface RawReply {
  /** The HTTP status, or 0 without a reply. */
  status: number;
  headers: Headers;
  text: string;
  /** Why there is no reply. */
  failure?: string;
}

interface ClassifiedReply extends RawReply {
  /** The parsed text, or undefined if it is not JSON. */
  body: unknown;
  errors: SquareErrorEntry[];
  kind: ReplyKind;
}

/**
 * Creates the strict `fetch` of a run. It counts requests and retries in `context.traffic`, lowers
 * `context.startedAt` if Square's clock is behind, and shares one rate limiter among all requests.
 * @param concurrency how many requests may run at the same time
 */
export async function createStrictFetch(context: RunContext, concurrency: number): Promise<Fetch> {
  const { traffic } = context;
  const proxyFetch = await createProxyFetch();
  const limiter = createRateLimiter(concurrency);
  // Why the last attempt of a call failed. The SDK passes the same headers object with each attempt
  // of a call, so the headers identify the call.
  const lastFailures = new WeakMap<object, string>();
  let isClockChecked = false;

  /** Waits for the rate limiter, sends a request, and classifies the reply. */
  async function sendOnce(
    url: string,
    pathname: string,
    init: RequestInit,
  ): Promise<ClassifiedReply> {
    await limiter.acquire();
    let result: "accepted" | "failed" | { pauseMs: number } = "failed";
    try {
      traffic.requests++;
      const reply = await receive(proxyFetch, url, init, context);
      const body = parseJson(reply.text);
      const errors = readErrors(body);
      const isComplete = isCompleteReply(pathname, body, init.body);
      const { kind, isOutcomeKnown } = classifyReply(reply.status, errors, isComplete);
      if (!isOutcomeKnown) traffic.unknownOutcomes++;
      if (kind === "done") result = "accepted";
      if (kind === "rate-limited") result = { pauseMs: readRetryAfter(reply.headers) };
      return { ...reply, body, errors, kind };
    } finally {
      limiter.release(result);
    }
  }

  /** Compares this computer's clock with Square's, once in a run. */
  function checkClock(dateHeader: string | null): void {
    const squareTime = Date.parse(dateHeader ?? "");
    if (isClockChecked || Number.isNaN(squareTime)) return;
    isClockChecked = true;
    // If this computer's clock is ahead, the watermark would be in Square's future. Customers that
    // are created until that time would never be read.
    context.startedAt = Math.min(context.startedAt, squareTime);
    const aheadMs = Date.now() - squareTime;
    if (Math.abs(aheadMs) > CLOCK_WARNING_MS)
      context.warn(
        `this computer's clock is ${Math.abs(Math.round(aheadMs / 1_000))} s ${aheadMs > 0 ? "ahead of" : "behind"} Square's`,
      );
  }

  /** Sends a request for the SDK. The SDK calls it again after a status that it retries. */
  async function strictFetch(input: string | URL | Request, init: RequestInit = {}) {
    const url = String(input);
    const { pathname } = new URL(url);
    const headersOfCall = init.headers ?? {};
    const lastFailure = lastFailures.get(headersOfCall);
    if (lastFailure !== undefined) {
      traffic.retries++;
      context.note(`${pathname}: ${lastFailure}; trying again`);
    }

    const reply = await sendOnce(url, pathname, init);
    const { kind, status, headers, text, body, errors } = reply;
    checkClock(headers.get("date"));
    if (kind === "done") return createReply(status, headers, text);
    if (kind === "rejected") {
      // The SDK parses the body of an error by its content type. If it cannot parse the body, it
      // loses the status.
      headers.set("content-type", body === undefined ? "text/plain" : "application/json");
      // The SDK treats every status below 400 as success.
      return createReply(Math.max(status, 400), headers, text);
    }

    const reason = reply.failure ?? describeReply(status, errors);
    lastFailures.set(headersOfCall, reason);
    const waitMs = readRetryAfter(headers);
    if (waitMs > LONGEST_RETRY_AFTER_MS)
      throw new SyncError(
        "temporary",
        formatCannotReach(context, `${reason}; it asks to wait ${Math.round(waitMs / 1_000)} s`),
        "run it again later",
      );
    return createRetryReply(kind === "rate-limited" ? 429 : 503, reason, errors, waitMs);
  }

  return strictFetch;
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
    // Do not follow a redirect. It would send customers and the token to a host that the user did
    // not name.
    const response = await send(url, { ...init, redirect: "manual", signal: timeout.signal });
    const text = await response.text();
    if (response.status >= 300 && response.status < 400)
      throw new SyncError(
        "failed",
        formatCannotReach(
          context,
          `the server redirects to another address (status ${response.status})`,
        ),
        "check SQUARE_BASE_URL and the proxy; a login page of the network also answers like this",
      );
    // Copy the headers, because Node does not allow changes to those of a reply.
    return { status: response.status, headers: new Headers(response.headers), text };
  } catch (error) {
    if (error instanceof SyncError) throw error;
    const proxyStatus = findProxyStatus(error);
    if (proxyStatus !== undefined) return { status: proxyStatus, headers: new Headers(), text: "" };
    let failure = `no reply within ${REPLY_TIMEOUT_MS / 1_000} s`;
    if (!timeout.signal.aborted) {
      const code = findNetworkCode(error);
      const lasting = createLastingError(error, code, context);
      if (lasting !== undefined) throw lasting;
      failure = `no reply (${code})`;
    }
    return { status: 0, headers: new Headers(), text: "", failure };
  } finally {
    clearTimeout(timer);
  }
}

/**
 * Creates the error for a failure that a retry cannot fix, or returns undefined for another
 * failure. The SDK does not retry after an error that its `fetch` throws.
 */
function createLastingError(
  error: unknown,
  code: string,
  context: RunContext,
): SyncError | undefined {
  if (/CERT|UNABLE_TO_(GET|VERIFY)|SELF_SIGNED|certificate/i.test(code))
    return new SyncError(
      "failed",
      formatCannotReach(context, `the certificate of the server is not trusted (${code})`),
      "behind a proxy that opens TLS, set NODE_EXTRA_CA_CERTS (Deno: DENO_CERT) to its CA certificate; or check SQUARE_BASE_URL",
      error,
    );
  if (isDeniedByDeno(error))
    return new SyncError(
      "usage",
      formatCannotReach(context, "Deno has no permission for its host"),
      "--allow-net with the host of this SQUARE_ENVIRONMENT or SQUARE_BASE_URL",
      error,
    );
  return undefined;
}

// In Node, `fetch` throws if the proxy rejects the request. The status is only in the text of a
// cause.
function findProxyStatus(error: unknown): number | undefined {
  for (const cause of listErrorChain(error)) {
    const [, status] = /^Proxy response \((\d{3})\)/.exec(cause.message) ?? [];
    if (status !== undefined) return Number(status);
    // For a 407, with which the proxy asks for a password, the cause is an Error without a message
    // and without a code.
    const isPasswordMissing =
      cause.constructor === Error && cause.message === "" && codeOf(cause) === "";
    if (isPasswordMissing) return 407;
  }
  return undefined;
}

// Node and Bun store a code such as ENOTFOUND in the error or in one of its causes. Deno has only
// messages.
function findNetworkCode(error: unknown): string {
  const causes = listErrorChain(error);
  for (const cause of causes) {
    if (codeOf(cause)) return codeOf(cause);
    if (cause instanceof AggregateError && codeOf(cause.errors[0])) return codeOf(cause.errors[0]);
  }
  const messages = causes.map(messageOf).join(": ");
  if (/dns|lookup/i.test(messages)) return "ENOTFOUND";
  if (/refused/i.test(messages)) return "ECONNREFUSED";
  if (/reset|closed|terminated|incomplete|eof/i.test(messages)) return "ECONNRESET";
  // Deno has no code for an untrusted certificate. createLastingError recognizes this word.
  return /certificate[^:)]*/i.exec(messages)?.[0] ?? "connection failed";
}

/** True if a body has everything that the endpoint must return. */
function isCompleteReply(pathname: string, body: unknown, request: unknown): boolean {
  if (!isRecord(body)) return false;
  if (pathname.endsWith("/search")) return isCompletePage(body);
  if (pathname.endsWith("/bulk-create") || pathname.endsWith("/bulk-retrieve")) {
    // A bulk reply has an entry for each entry of the request. If one is missing, we cannot know
    // what Square did with it.
    const { responses } = body;
    return (
      isRecord(responses) &&
      listRequestedKeys(request).every((key) => isCompleteEntry(responses[key]))
    );
  }
  // CreateCustomer returns the customer.
  if (pathname.endsWith("/customers")) return hasId(body.customer);
  // RetrieveTokenStatus. checkAccount accepts any object.
  return true;
}

function isCompletePage({ customers, cursor, count, ...others }: Record<string, unknown>): boolean {
  // An empty page is `{}`, possibly with a cursor and a count.
  const isEmpty = customers === undefined && Object.keys(others).length === 0;
  // Any other page has a list. Treating a body without one as the last page would silently drop
  // customers.
  const isList = Array.isArray(customers) && customers.every(hasId);
  // With an invalid cursor, the search would end too early. With an invalid count, it would not be
  // noticed that customers are missing.
  const hasValidCursor = typeof (cursor ?? "") === "string";
  const hasValidCount = typeof (count ?? 0) === "number";
  return (isEmpty || isList) && hasValidCursor && hasValidCount;
}

/**
 * Lists the keys under which a bulk reply must have an entry: the ids of a bulk-retrieve request,
 * or the idempotency keys of a bulk-create request.
 */
function listRequestedKeys(request: unknown): string[] {
  const sent = parseJson(String(request));
  if (!isRecord(sent)) return [];
  if (Array.isArray(sent.customer_ids)) return sent.customer_ids.map(String);
  return Object.keys(sent.customers ?? {});
}

function isCompleteEntry(entry: unknown): boolean {
  return isRecord(entry) && (hasId(entry.customer) || readErrors(entry).length > 0);
}

function hasId(customer: unknown): boolean {
  return isRecord(customer) && typeof customer.id === "string" && customer.id !== "";
}

function describeReply(status: number, errors: SquareErrorEntry[]): string {
  if (isSuccess(status) && errors.length === 0) return "incomplete reply";
  return formatErrors(errors) || `status ${status}`;
}

/**
 * Reads Retry-After, which is a number of seconds or a time by Square's clock.
 * @returns milliseconds to wait; 0 without the header, or if it has another form
 */
function readRetryAfter(headers: Headers): number {
  const text = headers.get("retry-after") ?? "";
  const seconds = Number(text);
  if (seconds > 0) return seconds * 1_000;
  const time = Date.parse(text);
  if (Number.isNaN(time)) return 0;
  const squareNow = Date.parse(headers.get("date") ?? "") || Date.now();
  return Math.max(time - squareNow, 0);
}

// The SDK reads the body only with text(). A Response with a real body would encode the text and
// decode it again, which would take a tenth of the time of a pull of all customers.
function createReply(status: number, headers: Headers, text: string): Response {
  const response = new Response(null, { status, headers });
  response.text = async () => text;
  return response;
}

/** Creates a reply that makes the SDK retry. Its body keeps the reason for the error message. */
function createRetryReply(
  status: 429 | 503,
  reason: string,
  errors: SquareErrorEntry[],
  waitMs: number,
): Response {
  const headers = new Headers({ "content-type": "application/json" });
  if (waitMs > 0) headers.set("retry-after", `${Math.ceil(waitMs / 1_000)}`);
  const body: RetryReply = { retry_reason: reason };
  if (errors.length > 0) body.errors = errors;
  return new Response(JSON.stringify(body), { status, headers });
}
