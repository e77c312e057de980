/** Printing: the result goes to stdout, everything else to stderr, and no text can fake a line of a log. */
import { codeOf, messageOf, SyncError } from "./errors.ts";

const LINE_BREAK = "\n";

// Control and format characters, other line separators and halves of surrogate pairs.
const CONTROL_CHARACTER = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu;

// A shorter token could be a part of ordinary words, which would then be replaced too.
const MIN_TOKEN_LENGTH = 8;

// Without a listener, the error event of a failed write ends the process with a stack trace. The error itself
// also reaches the callback of the write, where it is handled.
for (const stream of [process.stdout, process.stderr]) stream.on("error", () => {});

// The first error of each stream. After an error, Deno never calls back for another write.
const failures = new WeakMap<NodeJS.WriteStream, unknown>();

/**
 * Makes text safe to print: hides the token and escapes control characters. A line break stays, but the
 * next line is indented. So a name or message that comes from Square or the file cannot look like a line
 * that a script prints.
 */
export function makePrintable(text: string, token: string): string {
  const hidden = token.length < MIN_TOKEN_LENGTH ? text : text.replaceAll(token, "(the token)");
  return hidden
    .split(LINE_BREAK)
    .map((line) => line.replace(CONTROL_CHARACTER, escapeCharacter))
    .join(`${LINE_BREAK}  `);
}

// JSON uses the same notation. So a line of JSON keeps its meaning when it is escaped.
function escapeCharacter(character: string): string {
  const escapeUnit = (unit: string) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`;
  return character.split("").map(escapeUnit).join("");
}

/**
 * Prints to stdout and waits until the text is written.
 * @throws SyncError (failed) when it cannot be written. A reader that has enough, such as `head`, is no
 *   error.
 */
export async function printToStdout(text: string): Promise<void> {
  const error = await write(process.stdout, text);
  if (error === undefined || codeOf(error) === "EPIPE") return;
  throw new SyncError(
    "failed",
    `Cannot print the result: ${messageOf(error)}`,
    "check where stdout goes; the run itself is complete, only its output is lost",
    error,
  );
}

/** Prints to stderr. When stderr is closed or full there is no place left to report that, so continue. */
export function printToStderr(text: string): void {
  void write(process.stderr, text);
}

/** Waits until stderr is written. Then `process.exit` loses none of it. `printToStdout` waits by itself. */
export async function flushStderr(): Promise<void> {
  await write(process.stderr, "");
}

/** @returns the error, if the text could not be written */
function write(stream: NodeJS.WriteStream, text: string): Promise<unknown> {
  const earlierError = failures.get(stream);
  if (earlierError !== undefined) return Promise.resolve(earlierError);
  return new Promise((resolve) => {
    const finish = (error: unknown) => {
      if (error) failures.set(stream, error);
      resolve(error ?? undefined);
    };
    try {
      stream.write(text, finish);
    } catch (error) {
      finish(error); // Deno throws here instead of calling back
    }
  });
}
