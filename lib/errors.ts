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

export type ExitCode = (typeof EXIT)[keyof typeof EXIT];

/**
 * An error for the person who ran the script: `Cannot <action> <object>: <state>`, then what to try
 * next. It names no more of a customer than an id, and never a token.
 */
export class SyncError extends Error {
  exitCode: ExitCode;
  next: string | undefined;

  constructor(message: string, exitCode: ExitCode, next?: string, cause?: unknown) {
    super(message, { cause });
    this.exitCode = exitCode;
    this.next = next;
  }
}

/** The `code` of a system error such as `ENOENT`, or the empty word. */
export function codeOf(error: unknown): string {
  return error instanceof Error && "code" in error ? String(error.code) : "";
}

/**
 * Makes control characters visible: in a stranger's name one could fake a line of your log. They are
 * written as JSON writes them, so that what is printed of JSON is still JSON.
 */
export function toPrintable(text: string): string {
  const toEscape = (unit: string) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`;
  const odd = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu;
  return text.replace(odd, (char) => char.replace(/[\s\S]/g, toEscape));
}
