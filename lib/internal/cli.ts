/**
 * Runs a script: options, configuration, progress, summary, errors and the exit code. A script passes its
 * manual and a main function, and does not have to care about any of these.
 */
import type { InferredOptionTypes, Options } from "yargs";
import { readConfiguration } from "./config.ts";
import type { RunContext } from "./context.ts";
import { type ErrorKind, messageOf, SyncError } from "./errors.ts";
import { flushStderr, makePrintable, printToStderr, printToStdout } from "./output.ts";
import { createProgress, type Progress } from "./progress.ts";
import { describeSquareError } from "./square-errors.ts";
import { commandFor, quoteArgument } from "./suggest.ts";
import { parseTime } from "./time.ts";

// Not read from package.json, because Deno may have no permission for it. A test compares the two.
export const VERSION = "2.0.0";

const HELP_WIDTH = 80;

// 75 is EX_TEMPFAIL of sysexits.h: a temporary failure, try again later.
const EXIT_CODES: Record<ErrorKind, number> = { failed: 1, usage: 2, denied: 4, temporary: 75 };
const EXIT_DONE = 0;
const EXIT_ROWS_WAIT = 3;
const EXIT_SIGINT = 130;
const EXIT_SIGTERM = 143;

type OptionSet = Record<string, Options>;

/** The options of every script. */
const COMMON_OPTIONS = {
  db: {
    type: "string",
    requiresArg: true,
    describe: "The SQLite file [DATABASE_PATH or database.db]",
  },
  json: flag("Print the result as one JSON object"),
  quiet: flag("Print only errors"),
  verbose: flag("Also print changed rows, retries and causes"),
  help: flag("Show this help"),
  version: flag("Show the version"),
} as const satisfies OptionSet;

/** The options of the pulls. */
export const PULL_OPTIONS = {
  since: {
    ...timeOption("--since", "last (run), all, 90s, 5m, 24h, 1d, 2w, 2026-08-01, or RFC 3339"),
    default: "last",
  },
  until: timeOption("--until", "The same, except last and all [no end]"),
  concurrency: {
    ...countOption("--concurrency", 16, "Requests at the same time; 1 = in order"),
    default: 4,
  },
} as const satisfies OptionSet;

/** What `--help` prints about a script, and whether the script needs a token. */
export interface Manual<O extends OptionSet> {
  name: string;
  /** Continues the sentence that begins with the name. */
  purpose: string;
  options: O;
  examples: readonly (readonly [command: string, description: string])[];
  exitCodes: string;
  needsSquare: boolean;
}

/** What a script did. */
export interface Result {
  /** One line for a person, printed after the name of the script. */
  summary: string;
  /** Fields for `--json`, in addition to script, environment, database and seconds. */
  json: object;
  /** Printed to stdout above the summary, for example the table of a dry run. */
  lines?: readonly string[] | undefined;
  /** Printed to stderr with --verbose: each changed row. */
  details?: readonly string[] | undefined;
  /** Rows that wait for a person. The exit code is then 3, which tells cron about them. */
  hasWaitingRows?: boolean | undefined;
  /** With --quiet, the only line about waiting rows, for example `2 refused, 1 on hold`. */
  waitingText?: string | undefined;
  /** Printed as a `Try:` line on stderr, for example for rows on hold. */
  nextStep?: string | undefined;
  /** Reported after the summary, for a run that did only a part of its work. */
  error?: unknown;
}

/** The context of a run with the options of the script. */
export type ScriptContext<O extends OptionSet> = RunContext & {
  options: InferredOptionTypes<O & typeof COMMON_OPTIONS>;
};

/**
 * Runs a script and ends the process. The summary goes to stdout, an error to stderr, and the exit code tells
 * how it ended.
 */
export async function runScript<const O extends OptionSet>(
  manual: Manual<O>,
  main: (context: ScriptContext<O>) => Promise<Result>,
): Promise<void> {
  const reporter = createReporter(manual.name);
  exitOnSignal("SIGINT", EXIT_SIGINT, reporter);
  exitOnSignal("SIGTERM", EXIT_SIGTERM, reporter);
  let exitCode: number;
  try {
    exitCode = await execute(manual, main, reporter);
  } catch (thrown) {
    const error = thrown instanceof SyncError ? thrown : describeUnexpected(thrown);
    reporter.reportError(error);
    exitCode = EXIT_CODES[error.kind];
  }
  // Other requests may still be under way when a run fails. They would keep the process alive.
  await flushStderr();
  process.exit(exitCode);
}

// Exit in the handler: the SDK's wait between two attempts cannot be interrupted. Nothing is lost, because a
// save is synchronous and the lock is removed on exit.
function exitOnSignal(signal: "SIGINT" | "SIGTERM", exitCode: number, reporter: Reporter): void {
  process.on(signal, () => {
    const message = `Cannot go on: stopped by ${signal}`;
    reporter.reportError(new SyncError("temporary", message, "run it again"));
    process.exit(exitCode);
  });
}

/** @returns the exit code of a run without an error */
async function execute<O extends OptionSet>(
  manual: Manual<O>,
  main: (context: ScriptContext<O>) => Promise<Result>,
  reporter: Reporter,
): Promise<number> {
  const { name, needsSquare } = manual;
  const startedAt = Date.now();
  const options = await parseOptions(manual);
  if (typeof options === "string") {
    await printToStdout(options);
    return EXIT_DONE;
  }
  const { db, json = false, quiet = false, verbose = false } = options;
  reporter.isVerbose = verbose;
  const { databasePath, square } = await readConfiguration(db, needsSquare);
  reporter.token = square.token;
  reporter.progress = await createProgress(quiet);
  const context: ScriptContext<O> = {
    script: name,
    options,
    databasePath,
    square,
    startedAt,
    traffic: { requests: 0, retries: 0, unknownOutcomes: 0 },
    warn(text) {
      if (!quiet) reporter.report(`${name}: ${text}`);
    },
    // On a terminal, a minute without any output looks like a program that hangs.
    note(text) {
      if (verbose || (process.stderr.isTTY && !quiet)) reporter.report(`${name}: ${text}`);
    },
    showProgress(done, total) {
      reporter.progress?.show(done, total);
    },
    commandFor(script, args = "") {
      // The suggested command has to work on the same file as this run.
      const needsFile = db !== undefined && !args.includes("--db");
      const file = needsFile ? `--db ${quoteArgument(db)}` : "";
      return commandFor(script, [file, args].filter(Boolean).join(" "));
    },
  };

  const describeError = (error: unknown) =>
    error instanceof SyncError ? error : (describeSquareError(error, context) ?? error);
  const result = await main(context).catch((error: unknown) => {
    throw describeError(error);
  });

  reporter.progress.hide();
  if (verbose) for (const detail of result.details ?? []) reporter.report(`${name}: ${detail}`);
  if (json || !quiet) {
    // Not context.startedAt, which is earlier when Square's clock is behind.
    const seconds = (Date.now() - startedAt) / 1_000;
    const lines = json
      ? [formatJson(context, result.json, needsSquare, seconds)]
      : [...(result.lines ?? []), formatSummary(context, result.summary, needsSquare)];
    await printToStdout(lines.map((line) => `${makePrintable(line, square.token)}\n`).join(""));
  }
  const { hasWaitingRows = false, waitingText = "rows wait for a person", nextStep } = result;
  if (quiet && hasWaitingRows) reporter.report(`${name}: ${waitingText}`);
  if (nextStep && !quiet) reporter.report(`Try: ${nextStep}`);
  if (result.error !== undefined) throw describeError(result.error);
  return hasWaitingRows ? EXIT_ROWS_WAIT : EXIT_DONE;
}

/** Prints to stderr, above the progress bar. */
interface Reporter {
  token: string;
  isVerbose: boolean;
  progress: Progress | undefined;
  report(text: string): void;
  reportError(error: SyncError): void;
}

function createReporter(script: string): Reporter {
  return {
    token: "",
    isVerbose: false,
    progress: undefined,
    report(text) {
      this.progress?.hide();
      printToStderr(`${makePrintable(text, this.token)}\n`);
    },
    reportError(error) {
      this.report(`${script}: ${error.message}`);
      if (error.nextStep) this.report(`Try: ${error.nextStep}`);
      if (this.isVerbose) for (const text of listCauses(error)) this.report(text);
    },
  };
}

/** For example `pull-created (sandbox): …`, and with time and file where it can become a line of a log. */
function formatSummary(context: RunContext, summary: string, needsSquare: boolean): string {
  const { script, databasePath, square } = context;
  const where = needsSquare ? [square.environment] : [];
  let time = "";
  if (!process.stdout.isTTY) {
    time = `${new Date().toISOString().replace(/\.\d+Z$/, "Z")} `;
    where.push(databasePath);
  }
  const parentheses = where.length > 0 ? ` (${where.join(", ")})` : "";
  return `${time}${script}${parentheses}: ${summary}`;
}

function formatJson(
  { script, databasePath, square }: RunContext,
  json: object,
  needsSquare: boolean,
  seconds: number,
): string {
  const head = needsSquare
    ? { script, environment: square.environment, database: databasePath }
    : { script, database: databasePath };
  return JSON.stringify({ ...head, ...json, ...(needsSquare ? { seconds } : {}) });
}

// A bug in a script, or a failure that we did not foresee.
function describeUnexpected(error: unknown): SyncError {
  const nextStep = "add --verbose to see where it happened";
  return new SyncError("failed", `Cannot go on: ${messageOf(error)}`, nextStep, error);
}

/** The stack traces of an error and its causes. */
function listCauses(error: unknown): string[] {
  const texts: string[] = [];
  for (let cause = error; cause instanceof Error; cause = cause.cause) {
    const stack = cause.stack ?? messageOf(cause);
    // The message of an error of the SDK contains the whole reply, and with it a customer's data.
    const isReply = "body" in cause;
    texts.push(isReply ? stack.replace(cause.message, "(reply of Square)") : stack);
  }
  return texts;
}

/**
 * Parses the command line.
 * @returns the options, or the text to print for --help and --version
 * @throws SyncError (usage)
 */
async function parseOptions<O extends OptionSet>(
  manual: Manual<O>,
): Promise<ScriptContext<O>["options"] | string> {
  const { name, purpose, options, examples, exitCodes } = manual;
  const words = process.argv.slice(2);
  if (words.includes("--version")) return `${VERSION}\n`;

  const allOptions = { ...options, ...COMMON_OPTIONS };
  // Loaded here because it takes longer than everything else that starts a script.
  const { default: yargs } = await import("yargs");
  const parser = yargs(words)
    .scriptName(name)
    .help(false)
    .version(false)
    .usage(`${name} ${purpose}`)
    .options(allOptions)
    .example(examples.map(([command, description]) => [command, description]))
    .epilogue(`Exit codes: ${exitCodes}`)
    .wrap(HELP_WIDTH)
    .detectLocale(false)
    .exitProcess(false)
    // Defaults of yargs that would change the meaning: an option given twice becomes a list, --no-source sets
    // source to false, --batchSize is accepted too, a dot makes an object, and a stray 007 becomes 7.
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
    // The message of an invalid value comes from one of the functions below.
    .fail((message) => {
      const text = message.startsWith("Cannot") ? message : `Cannot use these options: ${message}`;
      throw new SyncError("usage", text, findHelp(name));
    });
  if (words.includes("--help")) return `${await parser.getHelp()}\n`;

  refuseSwallowedOption(name, Object.keys(allOptions));
  const parsed = await parser.parseAsync();
  const strayWords = [
    ...parsed._.map(String),
    ...findUnknownOptions(words, Object.keys(parsed), Object.keys(allOptions)),
  ];
  if (strayWords.length > 0)
    throw new SyncError(
      "usage",
      `Cannot use these options: leave out ${strayWords.map((word) => JSON.stringify(word)).join(", ")}`,
      findHelp(name),
    );
  // yargs has checked the values against the types of allOptions.
  return parsed as unknown as ScriptContext<O>["options"];
}

/** Returns the unknown options as they were written, without their values. */
function findUnknownOptions(words: string[], parsed: string[], known: string[]): string[] {
  const unknown = parsed.filter((key) => !["_", "$0", ...known].includes(key));
  const written = unknown.map((key) => {
    const long = words.find((word) => word === `--${key}` || word.startsWith(`--${key}=`));
    const short = words.find((word) => /^-[^-]/.test(word) && word.includes(key));
    return (long ?? short ?? `--${key}`).replace(/=.*/s, "");
  });
  return [...new Set(written)];
}

/**
 * `npm run push-new --dry-run` passes the option to npm, which drops it, and the script would push. npm leaves
 * a trace of it in the environment.
 */
function refuseSwallowedOption(name: string, known: string[]): void {
  // --dry-run is refused by every script: `npm run sync --dry-run` starts several, and the last one pushes.
  const swallowed = [...known, "dry-run"].find(
    (option) => process.env[`npm_config_${option.replaceAll("-", "_")}`] !== undefined,
  );
  if (swallowed === undefined) return;
  throw new SyncError(
    "usage",
    `Cannot use --${swallowed}: npm took it as its own option`,
    known.includes(swallowed)
      ? `npm run ${name} -- --${swallowed} (options go after --)`
      : `leave it out: ${name} has no --${swallowed}; for a script that has it: npm run <script> -- --${swallowed}`,
  );
}

function findHelp(name: string): string {
  return commandFor(name, "--help") ?? "add --help to see the options";
}

/** An option without a value. With nargs 0, yargs rejects `--dry-run=1` instead of reading it as false. */
export function flag(describe: string) {
  return { type: "boolean", nargs: 0, describe } as const;
}

/** An option that takes a time. It is checked before any work, and parsed when the run has begun. */
export function timeOption(option: string, describe: string) {
  const coerce = (text: string): string => {
    const isKeyword = option !== "--until" && ["last", "all"].includes(text);
    if (!isKeyword) parseTime(option, text, Date.now());
    return text;
  };
  return { type: "string", requiresArg: true, describe, coerce } as const;
}

/** An option that takes a whole number from 1 to `max`. */
export function countOption(option: string, max: number, describe: string) {
  const coerce = (count: number): number => {
    if (Number.isInteger(count) && count >= 1 && count <= max) return count;
    throw new Error(`Cannot use ${option}: expected a whole number from 1 to ${max}`);
  };
  return { type: "number", requiresArg: true, describe, coerce } as const;
}
