/**
 * Errors that reach the person who ran the script. Code branches on `kind`; only `runScript` turns a kind
 * into an exit code.
 */

/**
 * - `failed`: the run failed and running it again may not help.
 * - `usage`: wrong options, configuration or file; nothing was tried.
 * - `denied`: Square rejected the token, or the token lacks a permission.
 * - `temporary`: busy file, rate limit, network; running it again later helps.
 */
export type ErrorKind = "failed" | "usage" | "denied" | "temporary";

/**
 * An error with a message for a person: `Cannot <action> <object>: <state>`, and what to try next. The
 * message contains no token, and no more of a customer than an id.
 */
export class SyncError extends Error {
  kind: ErrorKind;
  /** Printed after `Try: `. It must not lead back to the same error. */
  nextStep: string | undefined;

  constructor(kind: ErrorKind, message: string, nextStep?: string, cause?: unknown) {
    super(message, { cause });
    this.name = "SyncError";
    this.kind = kind;
    this.nextStep = nextStep;
  }
}

/** The message of anything that was thrown. */
export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** The `code` of a system error such as `ENOENT`, or an empty string. */
export function codeOf(error: unknown): string {
  // A DOMException has a number as its code, which means nothing to a person.
  return error instanceof Error && "code" in error && typeof error.code === "string"
    ? error.code
    : "";
}
