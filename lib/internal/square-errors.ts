/** Reads the errors of Square, and turns those of the SDK into errors for the user. */
import { isDeniedByDeno, isRecord, messageOf, SyncError } from "./errors.ts";

/** An entry of `errors`: https://developer.squareup.com/docs/build-basics/handling-errors. */
export interface SquareErrorEntry {
  category: string;
  code: string;
  /** For example `customers.<idempotency key>.address.country`; empty if Square names none. */
  field: string;
}

/** Reads the `errors` of a reply. An entry of an unexpected form counts as an error too. */
export function readErrors(body: unknown): SquareErrorEntry[] {
  const errors = isRecord(body) ? (body.errors ?? []) : [];
  return (Array.isArray(errors) ? errors : [errors]).map((error: unknown) => {
    const read = (name: string) => (isRecord(error) ? String(error[name] ?? "") : "");
    return { category: read("category"), code: read("code"), field: read("field") };
  });
}

export function hasCategory(errors: SquareErrorEntry[], category: string): boolean {
  return errors.some((error) => error.category === category);
}

/**
 * True if the errors prove that Square rejected the content of the request and did not execute it.
 * After an error of another category, Square can have executed a part of the request.
 */
export function isContentRejected(errors: SquareErrorEntry[]): boolean {
  // CONFLICT and REQUEST_TIMEOUT can come from an earlier attempt that has not ended yet. NOT_FOUND
  // means a wrong address.
  const otherCodes = ["", "CONFLICT", "REQUEST_TIMEOUT", "NOT_FOUND"];
  const isAboutContent = ({ category, code }: SquareErrorEntry) =>
    category === "INVALID_REQUEST_ERROR" && !otherCodes.includes(code);
  return errors.length > 0 && errors.every(isAboutContent);
}

/** Returns the errors of a call of the SDK if {@linkcode isContentRejected} is true for them. */
export function findContentErrors(error: unknown): SquareErrorEntry[] | undefined {
  const errors = findInvalidRequestErrors(error) ?? [];
  return isContentRejected(errors) ? errors : undefined;
}

/** Returns the errors of a call that Square rejected, also because of a conflict. */
export function findInvalidRequestErrors(error: unknown): SquareErrorEntry[] | undefined {
  const errors = isSquareError(error) ? readErrors(error.body) : [];
  return hasCategory(errors, "INVALID_REQUEST_ERROR") ? errors : undefined;
}

/**
 * Lists the codes and fields of errors, for example `INVALID_VALUE (address.country), CONFLICT`. It
 * omits the details, because they can quote a customer's data.
 */
export function formatErrors(errors: SquareErrorEntry[]): string {
  const words = errors.map(({ code, field }) => `${code || "UNKNOWN"}${field && ` (${field})`}`);
  return [...new Set(words)].join(", ");
}

/** Turns an error of the SDK into one for the user. Returns undefined for any other error. */
export function createSquareError(error: unknown, environment: string): SyncError | undefined {
  // The SDK checks a request before it sends it. It does not export the class of this error. The
  // message can contain the value, so it is not printed.
  if (error instanceof Error && error.name === "JsonError") {
    const message = "Cannot send a request: the square package does not accept a value in it";
    return new SyncError("failed", message, "see where with --verbose", error);
  }
  if (!isSquareError(error) || isDeniedByDeno(error)) return undefined;
  // The SDK wraps an error that the strict `fetch` threw.
  if (error.cause instanceof SyncError) return error.cause;

  const { body } = error;
  const status = error.statusCode ?? 0; // 0 without a reply
  const errors = readErrors(body);
  const words = formatErrors(errors) || `status ${status}`;
  if (hasCategory(errors, "AUTHENTICATION_ERROR")) return createDeniedError(words, error);
  if (status === 0 || status === 408 || status === 429 || status >= 500) {
    const reason = isRecord(body) ? body.retry_reason : undefined;
    return new SyncError(
      "temporary",
      `Cannot reach Square (${environment}): ${reason ?? (status === 0 ? messageOf(error) : words)}`,
      "run it again later; check the network, SQUARE_BASE_URL, and https://www.issquareup.com",
      error,
    );
  }
  const source = errors.length > 0 ? "Square" : "a proxy, a firewall or another server";
  return new SyncError(
    "failed",
    `Cannot complete a request to Square (${environment}): ${words} came from ${source}`,
    "check SQUARE_BASE_URL, HTTPS_PROXY and the network; --verbose shows the request",
    error,
  );
}

export function createDeniedError(words: string, cause?: unknown): SyncError {
  return new SyncError(
    "denied",
    `Cannot use this token: Square returned ${words}`,
    "a token of this SQUARE_ENVIRONMENT that has not expired, with CUSTOMERS_READ and, to push, CUSTOMERS_WRITE",
    cause,
  );
}

// Recognizes a SquareError by its properties. Importing the class would load the SDK, also in a
// script that sends nothing.
function isSquareError(error: unknown): error is Error & { statusCode?: number; body?: unknown } {
  return error instanceof Error && "errors" in error && "rawResponse" in error;
}
