/**
 * Runs a script. It parses the options, reads the configuration, shows progress, prints the summary
 * or the error, and sets the exit code. A script passes its manual and a main function.
 */
import type { InferredOptionTypes, Options } from "yargs";
import { readConfiguration, type SquareSettings } from "./config.ts";
import {
  codeOf,
  type ErrorKind,
  isDeniedByDeno,
  listErrorChain,
  messageOf,
  SyncError,
} from "./errors.ts";
import { createSquareError } from "./square-errors.ts";
import type { Traffic } from "./strict-fetch.ts";

// Repeated from package.json, because Deno may have no permission to read that file. A test
// compares this constant with package.json.
export const VERSION = "3.0.0";

// 75 is EX_TEMPFAIL of sysexits.h: a temporary failure, try again later.
const EXIT_CODES: Record<ErrorKind, number> = { failed: 1, usage: 2, denied: 4, temporary: 75 };
const EXIT_ROWS_WAIT = 3;
const EXIT_SIGNALS = { SIGINT: 130, SIGTERM: 143 };
const EXIT_CODES_HELP =
  "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 rows wait for you, 4 token rejected, 75 try again later, 130/143 stopped";

type OptionSet = Record<string, Options>;

const COMMON_OPTIONS = {
  db: text("The SQLite file [DATABASE_PATH or database.db]"),
  json: flag("Print the result as one JSON object"),
  quiet: flag("Print only warnings and errors"),
  verbose: flag("Also print changed rows, retries and causes"),
} as const satisfies OptionSet;

export const PULL_OPTIONS = {
  since: {
    ...text("last (run), all, 90s, 5m, 24h, 1d, 2w, 2026-08-01, or RFC 3339"),
    default: "last",
  },
  until: text("The same, except last and all; default: no end"),
  concurrency: {
    ...count("--concurrency", "Requests at the same time; 1 = in order", 16),
    default: 4,
  },
} as const satisfies OptionSet;

/** The text of `--help`, the options of the script, and whether it needs a token. */
export interface Manual<O extends OptionSet> {
  name: string;
  /** The rest of a sentence that begins with the name, for example `pulls new customers`. */
  purpose: string;
  options: O;
  examples: readonly (readonly [command: string, description: string])[];
  needsSquare: boolean;
}

/** The settings of a run, and the functions that report to the user. */
export interface RunContext {
  script: string;
  databasePath: string;
  square: SquareSettings;
  /** When the run began, by this computer's clock, in milliseconds since 1970. */
  startedAt: number;
  traffic: Traffic;
  /** Prints a warning to stderr, also with --quiet. */
  warn(text: string): void;
  showProgress(text: string): void;
}

type Parsed<O extends OptionSet> = { options: InferredOptionTypes<O & typeof COMMON_OPTIONS> };
type Main<O extends OptionSet> = (context: RunContext & Parsed<O>) => Promise<Result>;

/** The result of a run: what is printed to stdout, and lines for stderr. */
export interface Result {
  summary: string;
  json?: object;
  /** Text for another program. It is printed to stdout byte for byte, and the summary to stderr. */
  data?: string;
  /** A table that is printed above the summary. Its first row is the header. */
  table?: readonly (readonly string[])[];
  /** Printed with --quiet too. */
  warnings?: readonly string[];
  /** Printed with --verbose only, for example one line for each changed row. */
  details?: () => readonly string[];
  /** Not printed with --quiet, for example why a row was refused. */
  reasons?: readonly string[];
  /** What waits for a person, for example `2 refused, 1 held`. The exit code is then 3. */
  waiting?: string;
  nextStep?: string;
  /** The error of a run that did only a part of its work. It is reported after the summary. */
  error?: SyncError | undefined;
}

/** Runs a script, prints its result or its error, and ends the process with the exit code. */
export async function runScript<const O extends OptionSet>(manual: Manual<O>, main: Main<O>) {
  // Exit in the signal handler, because the wait of the SDK between two attempts cannot be
  // interrupted. This loses nothing: a save is synchronous, so it is complete or has not begun.
  for (const [signal, code] of Object.entries(EXIT_SIGNALS))
    process.on(signal, () => {
      printError(`${manual.name}: Cannot go on: stopped by ${signal}`);
      printError("Try: run it again");
      process.exit(code);
    });
  // Keep the event loop busy. While it is empty, for example because sql.js is being compiled, Node 20
  // waits for threads of V8 that can wait for Node, and the script would never end.
  setInterval(() => {}, 1_000);
  // An error of a stream ends the process, unless something listens. `write` reports it.
  for (const stream of [process.stdout, process.stderr]) stream.on("error", () => {});

  let exitCode: number;
  try {
    requireSupportedNode();
    exitCode = await execute(manual, main);
  } catch (thrown) {
    const error = describeError(thrown);
    printError(`${manual.name}: ${error.message}`);
    printError(`Try: ${error.nextStep}`);
    if (process.argv.includes("--verbose")) listStackTraces(error).forEach(printError);
    exitCode = EXIT_CODES[error.kind];
  }
  await write(process.stderr, "");
  // Without this call, open requests of a failed run would keep the process alive.
  process.exit(exitCode);
}

/** @returns the exit code of a run without an error */
async function execute<O extends OptionSet>(manual: Manual<O>, main: Main<O>): Promise<number> {
  const { name, needsSquare } = manual;
  const startedAt = Date.now();
  const options = await parseCommandLine(manual);
  const { json = false, quiet = false, verbose = false } = options;
  const warn = (text: string) => printError(`${name}: ${text}`);
  const { databasePath, square } = await readConfiguration(options.db, needsSquare, warn);
  // On a terminal, retries are printed without --verbose too. Otherwise a wait of half a minute
  // would look like a script that hangs.
  const isOnTerminal = process.stderr.isTTY && !quiet;
  const onRetry = verbose || isOnTerminal ? warn : undefined;
  const traffic = { requests: 0, retries: 0, unanswered: 0, squareTime: undefined, onRetry };
  const showProgress = (text: string): void => {
    if (!isOnTerminal) return;
    process.stderr.write(`${CLEAR_LINE}${text}`);
    hasProgress = true;
  };
  const context = { script: name, databasePath, square, startedAt, traffic, warn, showProgress };

  const result = await main({ ...context, options }).catch((error: unknown) => {
    throw createSquareError(error, square.environment) ?? error;
  });

  hideProgress();
  const { data, table = [], waiting, nextStep, error } = result;
  result.warnings?.forEach(warn);
  if (verbose) result.details?.().forEach(warn);
  if (!quiet) result.reasons?.forEach(warn);
  const summary = formatSummary(context, result.summary);
  if (json) {
    const { requests, retries } = traffic;
    const place = { script: name, environment: square.environment, database: databasePath };
    const seconds = (Date.now() - startedAt) / 1_000;
    const fields = { ...place, ...result.json, requests, retries, seconds };
    await write(process.stdout, `${makePrintable(JSON.stringify(fields))}\n`);
  } else if (data !== undefined) {
    await write(process.stdout, data);
    if (!quiet) printError(summary);
  } else if (!quiet) {
    const lines = [...formatTable(table), summary];
    await write(process.stdout, lines.map((line) => `${makePrintable(line)}\n`).join(""));
  }
  if (quiet && waiting) warn(waiting);
  if (!quiet && nextStep) printError(`Try: ${nextStep}`);
  if (error !== undefined) throw error;
  return waiting ? EXIT_ROWS_WAIT : 0;
}

// Node 18 would fail later, in a package, with a message that nobody understands.
function requireSupportedNode(): void {
  const { node } = process.versions;
  const [major = 0, minor = 0] = node.split(".").map(Number);
  if (major < 20 || (major === 20 && minor < 19))
    throw new SyncError("usage", `Cannot start: Node ${node} is too old`, "Node 20.19 or later");
}

function describeError(error: unknown): SyncError {
  if (error instanceof SyncError) return error;
  const message = `Cannot go on: ${messageOf(error)}`;
  const command = "the deno command in the first comment of the script, with your file and host";
  if (isDeniedByDeno(error)) return new SyncError("usage", message, command, error);
  return new SyncError("failed", message, "add --verbose to see where it happened", error);
}

function listStackTraces(error: unknown): string[] {
  return listErrorChain(error).flatMap((cause) => {
    const { name, message, stack = message } = cause;
    // An error of the SDK repeats the reply in its message. The reply can contain the data of a
    // customer, so it is not printed.
    const isFromSdk = "body" in cause || name === "JsonError";
    return (isFromSdk ? stack.replace(message, "(not printed)") : stack).split("\n");
  });
}

// ---- Options ----

/** Parses the command line. For --help and --version, yargs prints the text and ends the process. */
async function parseCommandLine<O extends OptionSet>(manual: Manual<O>) {
  const { name, purpose, options, examples } = manual;
  // Some runners pass on the -- that npm removes. yargs would ignore every option after it.
  const words = process.argv.slice(2).filter((word) => word !== "--");
  const allOptions: OptionSet = { ...options, ...COMMON_OPTIONS };
  const known = [...Object.keys(allOptions), "help", "version"];
  rejectOptionTakenByNpm(name, known);
  // Loaded here, because loading yargs takes longer than everything else at the start of a script.
  const { default: yargs } = await import("yargs");
  const parsed: unknown = await yargs(words)
    .scriptName(name)
    .version(VERSION)
    .usage(`${name} ${purpose}`)
    .options(allOptions)
    .example(examples.map((example) => [...example])) // yargs accepts no readonly lists.
    .epilogue(EXIT_CODES_HELP)
    .wrap(80)
    .detectLocale(false)
    .strict()
    // Turn off conversions of yargs. By default, an option that is given twice becomes a list,
    // --no-source sets source to false, --batchSize is accepted for --batch-size, and a dot in a
    // name creates an object.
    .parserConfiguration({
      "duplicate-arguments-array": false,
      "boolean-negation": false,
      "camel-case-expansion": false,
      "dot-notation": false,
      "parse-positional-numbers": false,
    })
    .updateStrings({
      "Not enough arguments following: %s": "--%s needs a value",
      "Argument unexpected for: %s": "--%s takes no value",
    })
    .fail((message, error: unknown) => {
      // An error of `coerce` comes with its own next step.
      if (error instanceof SyncError) throw error;
      const unknown = /^Unknown arguments?: (.*)$/s.exec(message)?.[1]?.split(", ");
      const problems = unknown?.map((word) => describeUnknown(word, words, known)) ?? [message];
      const text = `Cannot use these options: ${problems.join("; ")}`;
      throw new SyncError("usage", text, "--help shows them all");
    })
    .parseAsync();
  // yargs has checked the values against the types of allOptions.
  return parsed as Parsed<O>["options"];
}

/** Describes a word that yargs does not know. yargs returns an option without its dashes. */
function describeUnknown(word: string, words: string[], known: string[]): string {
  if (words.includes(word)) return `unknown word ${JSON.stringify(word)}`;
  // The nearest option is the one that has the longest beginning in common with the word.
  let start = word.toLowerCase().replace(/^no-/, "");
  while (!known.some((option) => option.startsWith(start))) start = start.slice(0, -1);
  const nearest = known.find((option) => option.startsWith(start));
  return `unknown option ${word.length === 1 ? "-" : "--"}${word}; did you mean --${nearest}?`;
}

/**
 * Rejects an option that npm has taken. `npm run push-new --dry-run` passes the option to npm and
 * not to the script, and so does PowerShell with `npm run push-new -- --dry-run`. Without this
 * check, the script would push. npm stores the option in the variable npm_config_dry_run.
 */
function rejectOptionTakenByNpm(name: string, known: string[]): void {
  // Compare without the dashes, because --dryrun is a common mistake.
  const normalize = (option: string) => option.replace(/[-_]/g, "").toLowerCase();
  const taken = Object.keys(process.env)
    .filter((variable) => variable.startsWith("npm_config_"))
    .map(normalize);
  // Every script rejects --dry-run: `npm run sync` runs four scripts, and the last one is push-new.
  const all = [...known, "dry-run"];
  const option = all.find((one) => taken.includes(normalize(`npm_config_${one}`)));
  if (option === undefined) return;
  const message = `Cannot use --${option}: npm took it as its own option`;
  throw new SyncError("usage", message, `npx tsx scripts/${name}.ts --${option}`);
}

/**
 * Defines an option without a value. With nargs 0, yargs rejects `--dry-run=1`. Without it, yargs
 * would read that as false, and the script would push.
 */
export function flag(describe: string) {
  return { type: "boolean", nargs: 0, describe } as const;
}

export function text(describe: string) {
  return { type: "string", requiresArg: true, describe } as const;
}

export function count(option: string, describe: string, max: number = 1_000_000_000) {
  const coerce = (value: number): number => {
    if (Number.isInteger(value) && value >= 1 && value <= max) return value;
    const message = `Cannot use ${option}: expected a whole number from 1 to ${max}`;
    throw new SyncError("usage", message, "--help shows all options");
  };
  return { type: "number", requiresArg: true, describe, coerce } as const;
}

// ---- Output ----

// Moves the cursor of a terminal to the start of its line, and erases the line.
const CLEAR_LINE = "\r\u001b[K";

// True while the last line of the terminal is the progress.
let hasProgress = false;

/** Prints a line to stderr. An error is ignored, because stderr is where it would be reported. */
function printError(line: string): void {
  hideProgress();
  process.stderr.write(`${makePrintable(line)}\n`);
}

function hideProgress(): void {
  if (hasProgress) process.stderr.write(CLEAR_LINE);
  hasProgress = false;
}

/**
 * Makes a line safe to print. It hides a token, which can stand among the options by mistake, and
 * escapes control characters, with which a text of Square or of the file could control the terminal
 * or imitate a line of a log.
 */
function makePrintable(line: string): string {
  return line
    .replace(/EAAA[\w-]{40,}/g, "(the token)") // Square's tokens begin with EAAA.
    .replace(
      /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu,
      (one) => `\\u${one.codePointAt(0)?.toString(16).padStart(4, "0")}`,
    );
}

/** Writes to a stream, and waits until it is written. A pipe that `head` closed is not an error. */
function write(stream: NodeJS.WriteStream, text: string): Promise<void> {
  return new Promise((resolve, reject) => {
    stream.write(text, (error) => {
      if (error && codeOf(error) !== "EPIPE") reject(error);
      else resolve();
    });
  });
}

/** Formats the summary line. In a log, which is not a terminal, it gets the time and the file too. */
function formatSummary({ script, databasePath, square }: RunContext, summary: string): string {
  const { isTTY } = process.stdout;
  const time = isTTY ? "" : `${new Date().toISOString().slice(0, 19)}Z `;
  const places = [square.environment, isTTY ? "" : databasePath].filter(Boolean).join(", ");
  return `${time}${script}${places && ` (${places})`}: ${summary}`;
}

export function formatNumber(number: number, noun: string): string {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

function formatTable(rows: readonly (readonly string[])[]): string[] {
  const measure = (column: number) => Math.max(...rows.map((row) => row[column]?.length ?? 0));
  const widths = rows[0]?.map((_, column) => measure(column)) ?? [];
  const pad = (cell: string, column: number) => cell.padEnd(widths[column] ?? 0);
  return rows.map((row) => row.map(pad).join("  ").trimEnd());
}
