/**
 * Prints the result to stdout and everything else to stderr. Text from Square or from the file is
 * escaped, so that it cannot control the terminal or imitate a line of a log.
 */
import { codeOf, messageOf, SyncError } from "./errors.ts";

const LINE_BREAK = "\n";

// Control and format characters, the line separators of Unicode, and surrogates without a partner.
const CONTROL_CHARACTER = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu;

// A shorter token is not replaced, because it could be a part of ordinary words.
const MIN_TOKEN_LENGTH = 8;

// The form of Square's access tokens, which have 64 characters. The ids of customers are shorter. A
// token can be printed before the settings are read, for example if it stands among the options by
// mistake.
const SQUARE_TOKEN = /EAAA[\w-]{40,}/g;

/**
 * Makes a text safe to print: replaces the token and escapes control characters. A line break
 * stays, but the next line is indented. So a name with a line break cannot look like a line that a
 * script printed.
 */
export function makePrintable(text: string, token: string): string {
  const withoutToken =
    token.length < MIN_TOKEN_LENGTH ? text : text.replaceAll(token, "(the token)");
  return withoutToken
    .replace(SQUARE_TOKEN, "(the token)")
    .split(LINE_BREAK)
    .map((line) => line.replace(CONTROL_CHARACTER, escapeCharacter))
    .join(`${LINE_BREAK}  `);
}

// Formats a character as one or two UTF-16 code units, for example \u001b. JSON uses the same
// notation, so a line of JSON has the same meaning after it was escaped.
function escapeCharacter(character: string): string {
  const codeUnits = character.split("").map((unit) => unit.charCodeAt(0));
  return codeUnits.map((code) => `\\u${code.toString(16).padStart(4, "0")}`).join("");
}

/**
 * Prints to stdout and waits until the text is written.
 * @throws SyncError (failed) if the text cannot be written. A closed pipe is not an error: for
 *   example, `head` closes the pipe after ten lines.
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

/** Prints to stderr. An error is ignored, because stderr is where it would be reported. */
export function printToStderr(text: string): void {
  void write(process.stderr, text);
}

/** Waits until all text for stderr is written. Otherwise `process.exit` could cut it off. */
export async function flushStderr(): Promise<void> {
  await write(process.stderr, "");
}

// The first error of each stream. After an error, Deno does not call the callback of the next
// write, and waiting for it would never end.
const firstErrors = new WeakMap<NodeJS.WriteStream, unknown>();

// A stream emits an error event in addition to the callback that `write` handles. Without a
// listener, that event ends the process with a stack trace.
for (const stream of [process.stdout, process.stderr]) stream.on("error", () => {});

/** @returns the error if the text cannot be written, otherwise undefined */
function write(stream: NodeJS.WriteStream, text: string): Promise<unknown> {
  const earlierError = firstErrors.get(stream);
  if (earlierError !== undefined) return Promise.resolve(earlierError);
  return new Promise((resolve) => {
    // Without an error, the stream passes null or undefined, depending on the runtime.
    const finish = (error: unknown) => {
      if (error) firstErrors.set(stream, error);
      resolve(error ?? undefined);
    };
    try {
      stream.write(text, finish);
    } catch (error) {
      // Deno throws the error, and does not call the callback.
      finish(error);
    }
  });
}
