/** What a script's exit code tells its caller. 75 is EX_TEMPFAIL of sysexits.h: worth another try later. */
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
 * The one error of our own: its message is for the person who ran the script.
 * It says `Cannot <action> <object>: <state>`, and names no more of a customer than an id.
 */
export class SyncError extends Error {
  override name = "SyncError";
  exitCode: ExitCode;
  /** What to do next, printed as `Try: …`. */
  next: string | undefined;

  constructor(
    message: string,
    options: { exitCode?: ExitCode; next?: string | undefined; cause?: unknown } = {},
  ) {
    super(message, { cause: options.cause });
    this.exitCode = options.exitCode ?? EXIT.failed;
    this.next = options.next;
  }
}

/** The `code` of a system error such as `ENOENT`, or undefined. */
export function codeOf(error: unknown): string | undefined {
  return error instanceof Error && "code" in error && typeof error.code === "string"
    ? error.code
    : undefined;
}

/**
 * A text that is safe on a terminal: names come from strangers, and a control character in one
 * could move the cursor, recolour the screen or fake a line of a log.
 */
export function toPrintable(text: string): string {
  return text.replace(
    /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Surrogate}]/gu,
    (char) => `\\u{${char.codePointAt(0)?.toString(16)}}`,
  );
}
