/** The error that a script reports to the user, and helpers to read any error. */

/**
 * The kinds of errors. Code branches on the kind. Only `runScript` turns it into an exit code.
 *
 * - `failed`: the run failed, and running the script again may not help.
 * - `usage`: wrong options, configuration or file. The run stopped before it changed anything.
 * - `denied`: Square rejected the token, or the token lacks a permission.
 * - `temporary`: busy file, rate limit or network. Running the script again later helps.
 */
export type ErrorKind = "failed" | "usage" | "denied" | "temporary";

/**
 * An error with a message for the user, `Cannot <action> <object>: <state>`, and a next step. The
 * message contains no token, and no data of a customer except the id.
 */
export class SyncError extends Error {
  kind: ErrorKind;
  /** Printed after `Try: `. It must not lead back to the same error. */
  nextStep: string;

  constructor(kind: ErrorKind, message: string, nextStep: string, cause?: unknown) {
    super(message, { cause });
    this.name = "SyncError";
    this.kind = kind;
    this.nextStep = nextStep;
  }
}

/** Lists an error, its cause, the cause of that, and so on. */
export function listErrorChain(error: unknown): Error[] {
  return error instanceof Error ? [error, ...listErrorChain(error.cause)] : [];
}

/** Returns the message of any thrown value. sql.js throws a text in some cases. */
export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** Returns the `code` of a system error, for example `ENOENT`; for other errors an empty text. */
export function codeOf(error: unknown): string {
  const code = error instanceof Error && "code" in error ? error.code : "";
  return typeof code === "string" ? code : "";
}

/** True for the error of Deno when a permission such as --allow-read is missing. */
export function isDeniedByDeno(error: unknown): boolean {
  return listErrorChain(error).some(({ name }) => name === "NotCapable");
}

/** True for a JSON object. Null and arrays are not JSON objects. */
export function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
