/**
 * The `fetch` with which the SDK sends its requests. It passes only complete replies on to the SDK.
 *
 * A reply with status 200 can be an HTML page of a proxy, or end in the middle. The SDK would treat
 * both as a page without a cursor, which is how Square marks the last page. The customers on the
 * remaining pages would be lost without an error. So this `fetch` reads the whole body, and replaces
 * an incomplete reply by a 503.
 *
 * The SDK retries a 408, a 429 and every 5xx, after the time of Retry-After or with exponential
 * back-off. This `fetch` retries nothing itself.
 */
import {
  codeOf,
  isDeniedByDeno,
  isRecord,
  listErrorChain,
  messageOf,
  SyncError,
} from "./errors.ts";
import { formatErrors, readErrors } from "./square-errors.ts";

/** How often the SDK retries: after about 1, 2, 4, 8 and 16 seconds, half a minute in total. */
export const MAX_RETRIES = 5;

// The time limit for a reply with its body. The SDK's own time limit ends when the headers arrive.
const REPLY_TIMEOUT_MS = 15_000;

// The pause after a 429 without Retry-After, and the longest one. The SDK does not wait longer.
const DEFAULT_PAUSE_S = 1;
const MAX_PAUSE_S = 60;

/** The requests of a run. The strict `fetch` counts them. */
export interface Traffic {
  requests: number;
  retries: number;
  /** Requests whose effect is unknown, for example because the reply was lost. */
  unanswered: number;
  /** Square's clock at the first reply, in milliseconds since 1970. */
  squareTime: number | undefined;
  /** Is called before a request is sent again, with the reason. */
  onRetry?: ((reason: string) => void) | undefined;
}

/** Creates the strict `fetch` of a run. At most `concurrency` requests run at the same time. */
export async function createStrictFetch(
  traffic: Traffic,
  concurrency: number,
): Promise<typeof fetch> {
  await useProxy();
  const gate = createGate(concurrency);
  // Why the previous attempt of a call failed. The headers object identifies the call, because the
  // SDK passes the same one with each attempt.
  const failures = new WeakMap<object, string>();

  return async (input, init = {}) => {
    const url = String(input);
    const call = init.headers ?? {};
    const failure = failures.get(call);
    await gate.enter(failure !== undefined);
    try {
      traffic.requests++;
      if (failure !== undefined) {
        traffic.retries++;
        traffic.onRetry?.(`${new URL(url).pathname}: ${failure}; trying again`);
      }
      const { response, retryReason } = await receive(url, init);
      const { status, headers } = response;
      const squareTime = Date.parse(headers.get("date") ?? "");
      if (!Number.isNaN(squareTime)) traffic.squareTime ??= squareTime;
      if (status === 429) {
        const pause = readRetryAfter(headers);
        gate.pause(pause);
        headers.set("retry-after", `${pause}`);
      } else if (retryReason !== undefined) {
        traffic.unanswered++;
      }
      if (retryReason !== undefined) failures.set(call, retryReason);
      return response;
    } finally {
      gate.leave();
    }
  };
}

/** Sends one request and reads the whole reply. With `retryReason`, the SDK will send it again. */
async function receive(url: string, init: RequestInit) {
  const timeout = new AbortController();
  const timer = setTimeout(() => timeout.abort(), REPLY_TIMEOUT_MS);
  try {
    // Do not follow a redirect. It would send customers and the token to a host that the user did
    // not name.
    const received = await fetch(url, { ...init, redirect: "manual", signal: timeout.signal });
    const { status } = received;
    const text = await received.text();
    if (status >= 300 && status < 400)
      throw new SyncError(
        "failed",
        `Cannot reach Square: the server redirects to another address (status ${status})`,
        "check SQUARE_BASE_URL and the proxy; a login page of the network also answers like this",
      );
    const body = parseJson(text);
    const words = formatErrors(readErrors(body));
    if (status < 300 && (words !== "" || !isComplete(new URL(url).pathname, body)))
      return createUnanswered(words || "incomplete reply");
    const headers = new Headers(received.headers);
    // The SDK parses the body of an error by its content type. If it cannot parse the body, it
    // loses the status.
    headers.set("content-type", body === undefined ? "text/plain" : "application/json");
    const isRetried = status === 408 || status === 429 || status >= 500;
    const retryReason = isRetried ? words || `status ${status}` : undefined;
    const response = new Response(null, { status, headers });
    // The SDK reads the body only with text(). A body would be encoded and decoded again, which
    // takes a tenth of the time of a large pull.
    response.text = async () => text;
    return { response, retryReason };
  } catch (error) {
    if (error instanceof SyncError || isDeniedByDeno(error)) throw error;
    if (timeout.signal.aborted)
      return createUnanswered(`no reply within ${REPLY_TIMEOUT_MS / 1_000} s`);
    const code = findNetworkCode(error);
    // The SDK does not retry what its `fetch` throws. Waiting does not make a certificate valid.
    if (/CERT|UNABLE_TO_(GET|VERIFY)|SELF_SIGNED|certificate/i.test(code))
      throw new SyncError(
        "failed",
        `Cannot reach Square: the certificate of the server is not trusted (${code})`,
        "behind a proxy that opens TLS, set NODE_EXTRA_CA_CERTS (Deno: DENO_CERT) to its CA certificate; or check SQUARE_BASE_URL",
        error,
      );
    return createUnanswered(`no reply (${code})`);
  } finally {
    clearTimeout(timer);
  }
}

/** Makes up a reply that the SDK retries. Its body keeps the reason for the error message. */
function createUnanswered(retryReason: string) {
  return { response: Response.json({ retry_reason: retryReason }, { status: 503 }), retryReason };
}

/** True if a body has the shape that the endpoint promises. */
function isComplete(pathname: string, body: unknown): boolean {
  if (!isRecord(body)) return false;
  if (pathname.endsWith("/search")) {
    const { customers, cursor, count, ...others } = body;
    // An empty page is `{}`, possibly with a cursor and a count. Treating any other body without a
    // list as the last page would silently drop customers.
    const isEmpty = customers === undefined && Object.keys(others).length === 0;
    const isList = Array.isArray(customers) && customers.every(hasId);
    // With an invalid cursor or count, a search would end too early without notice.
    const isValid = typeof (cursor ?? "") === "string" && typeof (count ?? 0) === "number";
    return (isEmpty || isList) && isValid;
  }
  if (pathname.includes("/bulk-")) return isRecord(body.responses);
  // CreateCustomer and UpdateCustomer return the customer.
  return pathname.includes("/customers") ? hasId(body.customer) : true;
}

function hasId(customer: unknown): boolean {
  return isRecord(customer) && typeof customer.id === "string" && customer.id !== "";
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** Reads Retry-After, a number of seconds or a time. Returns whole seconds. */
function readRetryAfter(headers: Headers): number {
  const text = headers.get("retry-after") ?? "";
  const seconds = Number(text) || (Date.parse(text) - Date.now()) / 1_000 || DEFAULT_PAUSE_S;
  return Math.min(Math.max(Math.ceil(seconds), DEFAULT_PAUSE_S), MAX_PAUSE_S);
}

// Node and Bun store a code such as ENOTFOUND in the error or in a cause. Deno has only messages.
function findNetworkCode(error: unknown): string {
  const causes = listErrorChain(error).flatMap((cause) =>
    cause instanceof AggregateError ? [cause, ...cause.errors] : [cause],
  );
  const code = causes.map(codeOf).find((text) => text !== "");
  if (code !== undefined) return code;
  const words = causes.map(messageOf).join(": ");
  if (/dns|lookup/i.test(words)) return "ENOTFOUND";
  if (/refused/i.test(words)) return "ECONNREFUSED";
  return /certificate[^:)]*/i.exec(words)?.[0] ?? "ECONNRESET";
}

/**
 * Limits the requests of a run. Square limits the requests of an account together, and does not
 * publish its limit. So a 429 pauses all requests, and from then on one fewer runs at a time. A
 * request that is sent again goes first. Otherwise it could meet the limit until the SDK gives up.
 */
function createGate(concurrency: number) {
  const waiting: (() => void)[] = [];
  let limit = concurrency;
  let active = 0;
  let pausedUntil = 0;
  const admit = (): void => {
    const pause = pausedUntil - performance.now();
    if (pause > 0) {
      setTimeout(admit, pause); // A timer can end early, and is then started again.
      return;
    }
    while (active < limit && waiting.length > 0) {
      active++;
      waiting.shift()?.();
    }
  };
  return {
    enter(isRetry: boolean): Promise<void> {
      return new Promise((resolve) => {
        if (isRetry) waiting.unshift(resolve);
        else waiting.push(resolve);
        admit();
      });
    },
    leave(): void {
      active--;
      admit();
    },
    pause(seconds: number): void {
      // A little longer than the SDK waits, so that the request is back in the queue by then.
      pausedUntil = Math.max(pausedUntil, performance.now() + seconds * 1_000 + 100);
      limit = Math.max(limit - 1, 1);
    },
  };
}

/**
 * Makes Node's `fetch` use HTTPS_PROXY, HTTP_PROXY and NO_PROXY, as Deno's and Bun's do. The fake
 * Square server runs on this computer, where a proxy cannot reach it.
 */
async function useProxy(): Promise<void> {
  const { env } = process;
  const proxy = env.https_proxy || env.HTTPS_PROXY || env.http_proxy || env.HTTP_PROXY;
  if (!proxy || "Deno" in globalThis || "bun" in process.versions) return;
  const { EnvHttpProxyAgent, setGlobalDispatcher } = await import("undici");
  const noProxy = `localhost,127.0.0.1,::1,${env.no_proxy || env.NO_PROXY || ""}`;
  try {
    setGlobalDispatcher(new EnvHttpProxyAgent({ noProxy }));
  } catch (error) {
    // The value is not printed, because it can contain a password.
    throw new SyncError(
      "usage",
      "Cannot use HTTPS_PROXY: expected a URL such as http://proxy.example.com:3128",
      "correct HTTPS_PROXY in the environment, or unset it",
      error,
    );
  }
}
