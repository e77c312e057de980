/** Finds out what a reply of Square means, and formats its errors for a person. */
import type { RunContext } from "./context.ts";
import { messageOf, SyncError } from "./errors.ts";
import { isRecord } from "./json.ts";

/**
 * One entry of the `errors` array in a reply.
 * @see https://developer.squareup.com/docs/build-basics/handling-errors
 */
export interface SquareErrorEntry {
  category?: string;
  code?: string;
  detail?: string;
  /** For example `customers.<idempotency key>.address.country`. */
  field?: string;
}

/**
 * - `done`: Square executed the request.
 * - `rate-limited`: send the request again, after a pause of all requests.
 * - `retry`: send the request again, because the failure can be temporary.
 * - `rejected`: do not send the request again, because the result would be the same.
 */
export type ReplyKind = "done" | "rate-limited" | "retry" | "rejected";

/**
 * Classifies one reply.
 *
 * | Status                | Body                               | Kind         | Executed? |
 * | --------------------- | ---------------------------------- | ------------ | --------- |
 * | 2xx                   | complete, without errors           | done         | yes       |
 * | 2xx                   | cut off, HTML, empty, other shape  | retry        | unknown   |
 * | 2xx                   | RATE_LIMIT_ERROR                   | rate-limited | unknown   |
 * | 2xx                   | API_ERROR                          | retry        | unknown   |
 * | 2xx                   | other errors                       | rejected     | unknown   |
 * | 429                   | any                                | rate-limited | no        |
 * | any other             | RATE_LIMIT_ERROR                   | rate-limited | no        |
 * | 408, 5xx, no reply    | any                                | retry        | unknown   |
 * | other 4xx             | API_ERROR                          | retry        | unknown   |
 * | other 4xx             | any other                          | rejected     | no        |
 *
 * @param status the HTTP status, or 0 without a reply
 * @param isComplete true if the body has everything that the endpoint must return
 * @returns `isOutcomeKnown` is false for the rows with "unknown" in the last column
 */
export function classifyReply(
  status: number,
  errors: SquareErrorEntry[],
  isComplete: boolean,
): { kind: ReplyKind; isOutcomeKnown: boolean } {
  const isSuccessful = isSuccess(status);
  if (status === 429 || hasCategory(errors, "RATE_LIMIT_ERROR"))
    return { kind: "rate-limited", isOutcomeKnown: !isSuccessful };
  if (isSuccessful && errors.length === 0)
    return { kind: isComplete ? "done" : "retry", isOutcomeKnown: isComplete };
  const isTemporary = status === 0 || status === 408 || status >= 500;
  if (isTemporary || hasCategory(errors, "API_ERROR"))
    return { kind: "retry", isOutcomeKnown: false };
  return { kind: "rejected", isOutcomeKnown: !isSuccessful };
}

/** True for a status that reports success: 200, and others that Square does not document. */
export function isSuccess(status: number): boolean {
  return status >= 200 && status < 300;
}

/** Reads the `errors` of a reply. An entry of an unexpected form counts as an error too. */
export function readErrors(body: unknown): SquareErrorEntry[] {
  if (!isRecord(body)) return [];
  const errors = body.errors ?? [];
  return Array.isArray(errors) ? errors.map(readError) : [readError(errors)];
}

function readError(error: unknown): SquareErrorEntry {
  const problem: SquareErrorEntry = {};
  if (!isRecord(error)) return problem;
  for (const name of ["category", "code", "detail", "field"] as const)
    if (typeof error[name] === "string") problem[name] = error[name];
  return problem;
}

export function hasCategory(errors: SquareErrorEntry[], category: string): boolean {
  return errors.some((error) => error.category === category);
}

// Codes of INVALID_REQUEST_ERROR that do not concern the content of a request. CONFLICT and
// REQUEST_TIMEOUT can come from an earlier attempt that has not ended yet. The others mean a wrong
// address or a wrong version of the API.
const NOT_ABOUT_CONTENT = [
  "CONFLICT",
  "REQUEST_TIMEOUT",
  "NOT_FOUND",
  "METHOD_NOT_ALLOWED",
  "NOT_ACCEPTABLE",
  "GONE",
  "UNSUPPORTED_MEDIA_TYPE",
  "INVALID_CONTENT_TYPE",
  "INVALID_SQUARE_VERSION_FORMAT",
  "API_VERSION_INCOMPATIBLE",
];

/**
 * True if the errors prove that Square rejected the content of the request and did not execute it.
 * After an error of another category, Square can have executed a part of the request.
 */
export function isContentRejected(errors: SquareErrorEntry[]): boolean {
  const isAboutContent = ({ category, code }: SquareErrorEntry) =>
    category === "INVALID_REQUEST_ERROR" && code !== undefined && !NOT_ABOUT_CONTENT.includes(code);
  return errors.length > 0 && errors.every(isAboutContent);
}

/**
 * Returns the errors of a call whose content Square rejected, or undefined for any other failure.
 * @param error the error that a call of the SDK threw
 */
export function findContentErrors(error: unknown): SquareErrorEntry[] | undefined {
  if (!isSquareError(error)) return undefined;
  const errors = readErrors(error.body);
  // A proxy or firewall on the way can reject a large body with a 413 that has no `errors`.
  if (error.statusCode === 413 && errors.length === 0)
    return [{ category: "INVALID_REQUEST_ERROR", code: "REQUEST_ENTITY_TOO_LARGE" }];
  return isContentRejected(errors) ? errors : undefined;
}

/**
 * Lists the codes and fields of errors, for example `INVALID_VALUE (address.country), CONFLICT`. It
 * omits the details, because they can quote a customer's data.
 */
export function formatErrors(errors: SquareErrorEntry[]): string {
  const words = errors.map(({ code = "UNKNOWN", field }) => (field ? `${code} (${field})` : code));
  return [...new Set(words)].join(", ");
}

/** The body of the reply that the strict `fetch` creates to make the SDK retry. */
export interface RetryReply {
  /** Why the last attempt failed, for example `no reply (ECONNRESET)`. */
  retry_reason: string;
  /** The errors of Square's reply, if there are any. */
  errors?: SquareErrorEntry[];
}

/**
 * Creates the error to report for an error that the SDK threw.
 * @returns undefined for an error that does not come from the SDK
 */
export function createSquareError(error: unknown, context: RunContext): SyncError | undefined {
  // The SDK throws a JsonError before it sends a request, when a value has the wrong type. It does
  // not export the class. The message can contain the value, so only its path is printed.
  if (error instanceof Error && error.name === "JsonError") {
    const problems = "errors" in error && Array.isArray(error.errors) ? error.errors : [];
    const paths = problems.map(formatPath).join(", ");
    return new SyncError(
      "failed",
      `Cannot send this request: the square package does not accept ${paths || "a value in it"}`,
      undefined,
      error,
    );
  }
  if (!isSquareError(error)) return undefined;
  // The SDK wraps an error that the strict `fetch` threw.
  if (error.cause instanceof SyncError) return error.cause;

  const { environment } = context.square;
  const { body } = error;
  const status = error.statusCode ?? 0; // 0 without a reply
  const errors = readErrors(body);
  const words = formatErrors(errors) || `status ${status}`;
  // The SDK has thrown, so there is no successful and complete reply.
  const isComplete = false;
  const { kind } = classifyReply(status, errors, isComplete);

  if (kind === "rejected" && hasCategory(errors, "AUTHENTICATION_ERROR"))
    return createDeniedError(words, error);
  if (kind === "rejected" && errors.length === 0)
    return new SyncError(
      "failed",
      formatCannotReach(
        context,
        `status ${status} came from a proxy, a firewall or another server, not from Square`,
      ),
      "ask whoever runs the network; with SQUARE_BASE_URL or HTTPS_PROXY set, check its address",
      error,
    );
  if (kind === "rejected") {
    const isWrongUrl = environment === "offline" && errors.some(({ code }) => code === "NOT_FOUND");
    return new SyncError(
      "failed",
      `Cannot complete a request to Square (${environment}): it returned ${words}`,
      isWrongUrl ? "check SQUARE_BASE_URL: the scripts add /v2/customers to it" : undefined,
      error,
    );
  }

  let reason = words;
  // The strict `fetch` stores the reason in the body of its reply.
  if (isRecord(body) && typeof body.retry_reason === "string") reason = body.retry_reason;
  // Without a reply, the SDK itself has failed, for example with its time limit.
  else if (status === 0 && errors.length === 0) reason = messageOf(error);
  const advice =
    environment === "offline"
      ? "does the server of SQUARE_BASE_URL run? (npm run square; http, not https)"
      : "check the network and https://www.issquareup.com";
  return new SyncError(
    "temporary",
    formatCannotReach(context, reason),
    `run it again later; ${advice}`,
    error,
  );
}

/** Creates the error for a token that Square does not accept, or that lacks a permission. */
export function createDeniedError(words: string, cause?: unknown): SyncError {
  return new SyncError(
    "denied",
    `Cannot use this token: Square returned ${words}`,
    "a token of this SQUARE_ENVIRONMENT that has not expired, with CUSTOMERS_READ and, to create customers, CUSTOMERS_WRITE",
    cause,
  );
}

/** Formats the message of an error that happened on the way to Square. */
export function formatCannotReach({ square }: RunContext, state: string): string {
  return `Cannot reach Square (${square.environment}): ${state}`;
}

// Formats the path of a value in a request, such as `customers.key.address.country`.
function formatPath(problem: unknown): string {
  if (!isRecord(problem)) return "";
  return Array.isArray(problem.path) ? problem.path.join(".") : String(problem.path ?? "");
}

// Recognizes a SquareError by its properties. Importing the class would load the SDK, also in a
// script that sends nothing.
function isSquareError(error: unknown): error is Error & { statusCode?: number; body?: unknown } {
  return error instanceof Error && "errors" in error && "rawResponse" in error;
}
