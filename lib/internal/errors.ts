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
  nextStep: string | undefined;

  constructor(kind: ErrorKind, message: string, nextStep?: string, cause?: unknown) {
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

/** Runs a step whose failure does not matter. */
export function ignoreErrors(step: () => void): void {
  try {
    step();
  } catch {}
}

/** Returns the message of any thrown value. */
export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** Returns the `code` of a system error, for example `ENOENT`; for other errors an empty string. */
export function codeOf(error: unknown): string {
  if (!(error instanceof Error) || !("code" in error)) return "";
  // The code of a DOMException is a number, which helps neither the user nor a comparison.
  return typeof error.code === "string" ? error.code : "";
}
