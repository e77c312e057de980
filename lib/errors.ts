/** Exit codes; 75 is EX_TEMPFAIL of sysexits.h: a passing trouble, run it again later. */
export const EXIT = {
  done: 0,
  failed: 1,
  usage: 2,
  someRefused: 3,
  notAllowed: 4,
  later: 75,
  interrupted: 130,
  terminated: 143,
} as const;

/**
 * An error for the person who ran the script: `Cannot <action> <object>: <state>`, then what to try
 * next. It names no more of a customer than an id, and never a token.
 */
export class SyncError extends Error {
  exitCode: number;
  next: string | undefined;

  constructor(message: string, exitCode: number, next?: string, cause?: unknown) {
    super(message, { cause });
    this.exitCode = exitCode;
    this.next = next;
  }
}

/** The error for wrong usage or configuration: nothing was tried. */
export function usageError(message: string, next: string): SyncError {
  return new SyncError(message, EXIT.usage, next);
}

/** What an error says; anything can be thrown. */
export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** The `code` of a system error such as `ENOENT`, or the empty word. */
export function codeOf(error: unknown): string {
  return error instanceof Error && "code" in error ? String(error.code) : "";
}
