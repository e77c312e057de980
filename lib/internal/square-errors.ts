/** What a reply of Square means, and how its errors are described to a person. */
import type { RunContext } from "./context.ts";
import { messageOf, SyncError } from "./errors.ts";

/**
 * One entry of the `errors` array in a reply.
 * @see https://developer.squareup.com/docs/build-basics/handling-errors
 */
export interface SquareProblem {
  category?: string;
  code?: string;
  detail?: string;
  /** For example `customers.<idempotency key>.address.country`. */
  field?: string;
}

export type ReplyKind = "done" | "rate-limited" | "retry" | "rejected";

/**
 * Classifies one reply.
 *
 * | Status                | Body                               | Kind         | Was the request executed? |
 * | --------------------- | ---------------------------------- | ------------ | ------------------------- |
 * | 2xx                   | complete, without errors           | done         | yes                       |
 * | 2xx                   | cut off, HTML, empty, other shape  | retry        | unknown                   |
 * | 2xx                   | RATE_LIMIT_ERROR                   | rate-limited | unknown                   |
 * | 2xx                   | API_ERROR                          | retry        | unknown                   |
 * | 2xx                   | other errors                       | rejected     | unknown                   |
 * | 429                   | any                                | rate-limited | no                        |
 * | any other             | RATE_LIMIT_ERROR                   | rate-limited | no                        |
 * | 408, 5xx, no reply    | any                                | retry        | unknown                   |
 * | other 4xx             | API_ERROR                          | retry        | unknown                   |
 * | other 4xx             | any other                          | rejected     | no                        |
 *
 * @param status the HTTP status; 0 when no reply came
 * @param isComplete whether the body is what the endpoint promises
 */
export function classifyReply(
  status: number,
  errors: SquareProblem[],
  isComplete: boolean,
): { kind: ReplyKind; isOutcomeKnown: boolean } {
  const isSuccessful = isSuccess(status);
  if (status === 429 || hasCategory(errors, "RATE_LIMIT_ERROR"))
    return { kind: "rate-limited", isOutcomeKnown: !isSuccessful };
  if (isSuccessful && errors.length === 0 && isComplete)
    return { kind: "done", isOutcomeKnown: true };
  const isTemporary = status === 0 || status === 408 || status >= 500;
  const isIncomplete = isSuccessful && errors.length === 0;
  if (isTemporary || isIncomplete || hasCategory(errors, "API_ERROR"))
    return { kind: "retry", isOutcomeKnown: false };
  return { kind: "rejected", isOutcomeKnown: !isSuccessful };
}

/** True for a status that reports success: 200, and others that Square does not document. */
export function isSuccess(status: number): boolean {
  return status >= 200 && status < 300;
}

/** Reads the `errors` of a reply. Whatever stands there counts as an error, also in an unexpected form. */
export function readErrors(body: unknown): SquareProblem[] {
  const errors = isRecord(body) ? (body.errors ?? []) : [];
  return [errors].flat().map((error: unknown) => {
    if (!isRecord(error)) return {};
    const problem: SquareProblem = {};
    for (const name of ["category", "code", "detail", "field"] as const)
      if (typeof error[name] === "string") problem[name] = error[name];
    return problem;
  });
}

export function hasCategory(errors: SquareProblem[], category: string): boolean {
  return errors.some((error) => error.category === category);
}

// Errors that say nothing about the customers in a request: CONFLICT and REQUEST_TIMEOUT can come from an
// earlier attempt that still runs, and the others mean a wrong address or version of the API.
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
 * True when the errors prove that Square rejected the content of the request and did not execute it. Errors of
 * another category can come from a failure half way.
 */
export function isRejection(errors: SquareProblem[]): boolean {
  const isAboutRequest = ({ category, code }: SquareProblem) =>
    category === "INVALID_REQUEST_ERROR" && code !== undefined && !NOT_ABOUT_CONTENT.includes(code);
  return errors.length > 0 && errors.every(isAboutRequest);
}

/**
 * Returns the errors of a call that Square rejected as a whole, or undefined for any other error.
 * @param error what a call of the SDK threw
 */
export function findRejection(error: unknown): SquareProblem[] | undefined {
  if (!isSquareError(error)) return undefined;
  const errors = readErrors(error.body);
  // A proxy or firewall on the way rejects a large body with a 413 of its own, without Square's errors.
  if (error.statusCode === 413 && errors.length === 0)
    return [{ category: "INVALID_REQUEST_ERROR", code: "REQUEST_ENTITY_TOO_LARGE" }];
  return isRejection(errors) ? errors : undefined;
}

/** Lists codes and fields. The details are left out, because they can quote a customer's data. */
export function formatErrors(errors: SquareProblem[]): string {
  const words = errors.map(({ code = "UNKNOWN", field }) => `${code}${field ? ` (${field})` : ""}`);
  return [...new Set(words)].join(", ");
}

/** The body of the reply that the strict `fetch` makes up when no complete reply came. */
export interface NoReply {
  no_reply: string;
}

/**
 * Describes an error that the SDK threw.
 * @returns undefined for an error that does not come from the SDK
 */
export function describeSquareError(
  error: unknown,
  { square: { environment } }: RunContext,
): SyncError | undefined {
  // The SDK does not export its JsonError. It is thrown before a request is sent, when a value has the wrong
  // type. Its message can contain the value, so only the path is printed.
  if (error instanceof Error && error.name === "JsonError") {
    const paths = "errors" in error && Array.isArray(error.errors) ? error.errors : [];
    const where = paths.map((one) => (isRecord(one) ? [one.path].flat().join(".") : "")).join(", ");
    return new SyncError(
      "failed",
      `Cannot send this request: the square package does not accept ${where || "a value in it"}`,
      undefined,
      error,
    );
  }
  if (!isSquareError(error)) return undefined;
  // What the strict fetch throws reaches us as the cause.
  if (error.cause instanceof SyncError) return error.cause;
  const { statusCode = 0, body } = error;
  const errors = readErrors(body);
  const { kind } = classifyReply(statusCode, errors, false);
  const words = formatErrors(errors) || `status ${statusCode}`;
  if (kind === "rejected" && hasCategory(errors, "AUTHENTICATION_ERROR"))
    return describeDenial(words, error);
  const cannotReach = `Cannot reach Square (${environment})`;
  if (kind === "rejected" && errors.length === 0)
    return new SyncError(
      "failed",
      `${cannotReach}: status ${statusCode} came from a proxy, a firewall or another server, not from Square`,
      "ask whoever runs the network; with SQUARE_BASE_URL or HTTPS_PROXY set, check its address",
      error,
    );
  if (kind === "rejected")
    return new SyncError(
      "failed",
      `Cannot get an answer from Square (${environment}): ${words}`,
      errors.some(({ code }) => code === "NOT_FOUND") && environment === "offline"
        ? "check SQUARE_BASE_URL: only the host, without a path"
        : undefined,
      error,
    );
  const reason = isRecord(body) && typeof body.no_reply === "string" ? body.no_reply : words;
  const where =
    environment === "offline"
      ? "does the server of SQUARE_BASE_URL run? (npm run square; http, not https)"
      : "check the network and https://www.issquareup.com";
  return new SyncError(
    "temporary",
    `${cannotReach}: ${reason === "status 0" ? messageOf(error) : reason}`,
    `run it again later; ${where}`,
    error,
  );
}

/** The error for a token that Square does not accept, or that lacks a permission. */
export function describeDenial(words: string, cause?: unknown): SyncError {
  return new SyncError(
    "denied",
    `Cannot use this token: Square returned ${words}`,
    "a token of this SQUARE_ENVIRONMENT that has not expired, with CUSTOMERS_READ and, for push-new, CUSTOMERS_WRITE",
    cause,
  );
}

/** A JSON object: not null, not an array. */
export function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

// Tested by its form: importing the class would load the SDK, also for a script that sends nothing.
function isSquareError(error: unknown): error is Error & { statusCode?: number; body?: unknown } {
  return error instanceof Error && "errors" in error && "rawResponse" in error;
}
