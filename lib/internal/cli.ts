/**
 * Runs a script. It parses the options, reads the configuration, shows progress, prints the summary
 * or the error, and sets the exit code. A script passes its manual and a main function.
 */
import type { InferredOptionTypes, Options } from "yargs";
import { readConfiguration } from "./config.ts";
import type { RunContext } from "./context.ts";
import { type ErrorKind, listErrorChain, messageOf, SyncError } from "./errors.ts";
import { flushStderr, makePrintable, printToStderr, printToStdout } from "./output.ts";
import { createProgress, type Progress } from "./progress.ts";
import { createSquareError } from "./square-errors.ts";
import { buildCommand, quoteArgument } from "./suggest.ts";
import { parseTime } from "./time.ts";

// Repeated from package.json, because Deno may have no permission to read that file. A test
// compares this constant with package.json.
export const VERSION = "2.0.0";

const HELP_WIDTH = 80;

// 75 is EX_TEMPFAIL of sysexits.h: a temporary failure, try again later.
const EXIT_CODES: Record<ErrorKind, number> = { failed: 1, usage: 2, denied: 4, temporary: 75 };
const EXIT_DONE = 0;
const EXIT_ROWS_WAIT = 3;
const EXIT_SIGINT = 130;
const EXIT_SIGTERM = 143;

/** An option of yargs, with a check of its value. */
interface ScriptOption extends Options {
  /**
   * Called before any work. yargs has `coerce` for this, but passes on only the message of its
   * errors, so the next step of a SyncError would get lost.
   * @param script the name of the script, for the next step of the error
   * @throws SyncError (usage) for an invalid value
   */
  check?(value: unknown, script: string): void;
}

type OptionSet = Record<string, ScriptOption>;

/** The options of every script. */
const COMMON_OPTIONS = {
  db: {
    type: "string",
    requiresArg: true,
    describe: "The SQLite file [DATABASE_PATH or database.db]",
  },
  json: flag("Print the result as one JSON object"),
  quiet: flag("Print only warnings and errors"),
  verbose: flag("Also print changed rows, retries and causes"),
  help: flag("Show this help"),
  version: flag("Show the version"),
} as const satisfies OptionSet;

/** The options of the pulls. */
export const PULL_OPTIONS = {
  since: {
    ...timeOption("--since", "last (run), all, 90s, 5m, 24h, 1d, 2w, 2026-08-01, or RFC 3339", [
      "last",
      "all",
    ]),
    default: "last",
  },
  until: timeOption("--until", "The same, except last and all [no end]", []),
  concurrency: {
    ...countOption("--concurrency", 16, "Requests at the same time; 1 = in order"),
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
  exitCodes: string;
  needsSquare: boolean;
}

/** The result of a run, as the main function returns it. */
export interface Result {
  /** One line for the user, printed after the name of the script. */
  summary: string;
  /**
   * Fields for `--json`, in addition to script and database. For a script that uses Square,
   * environment and seconds are added too.
   */
  json: object;
  /** Lines that are printed to stdout above the summary, for example the table of a dry run. */
  lines?: readonly string[] | undefined;
  /** A line for each changed row. They are printed to stderr, and only with --verbose. */
  details?: readonly string[] | undefined;
  /**
   * A line for each row that was refused, is on hold, or was not sent, with the reason. They are
   * printed to stderr, except with --quiet.
   */
  reasons?: readonly string[] | undefined;
  /**
   * Set if rows wait for a person, for example `2 refused, 1 held`. The exit code is then 3, so
   * that a scheduler can report it. The text is printed only with --quiet, instead of `reasons`.
   */
  waiting?: string | undefined;
  /** Printed to stderr after `Try: `, except with --quiet. For example for rows on hold. */
  nextStep?: string | undefined;
  /** The error of a run that did only a part of its work. It is reported after the summary. */
  error?: unknown;
}

/** The context of a run with the options of the script. */
export type ScriptContext<O extends OptionSet> = RunContext & {
  options: InferredOptionTypes<O & typeof COMMON_OPTIONS>;
};

/**
 * Runs a script and ends the process. The summary is printed to stdout and an error to stderr. The
 * exit code shows whether the run succeeded.
 */
export async function runScript<const O extends OptionSet>(
  manual: Manual<O>,
  main: (context: ScriptContext<O>) => Promise<Result>,
): Promise<void> {
  const reporter = createReporter(manual.name);
  exitOnSignal("SIGINT", EXIT_SIGINT, manual.name, reporter);
  exitOnSignal("SIGTERM", EXIT_SIGTERM, manual.name, reporter);
  let exitCode: number;
  try {
    exitCode = await execute(manual, main, reporter);
  } catch (thrown) {
    const error = thrown instanceof SyncError ? thrown : createUnexpectedError(thrown);
    reporter.reportError(error);
    exitCode = EXIT_CODES[error.kind];
  }
  await flushStderr();
  // Without this call, open requests of a failed run would keep the process alive.
  process.exit(exitCode);
}

// Exits in the signal handler, because the wait of the SDK between two attempts cannot be
// interrupted. This loses nothing: a save is synchronous, so it is either complete or has not
// begun, and the lock is removed on exit.
function exitOnSignal(
  signal: "SIGINT" | "SIGTERM",
  exitCode: number,
  script: string,
  reporter: Reporter,
): void {
  process.on(signal, () => {
    reporter.report(`${script}: Cannot go on: stopped by ${signal}`);
    reporter.report("Try: run it again");
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
  const parsed = await parseCommandLine(manual);
  if (parsed.helpText !== undefined) {
    await printToStdout(parsed.helpText);
    return EXIT_DONE;
  }
  const { options } = parsed;
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
      reporter.report(`${name}: ${text}`);
    },
    // On a terminal, notes are printed without --verbose too. Otherwise a wait of a minute before a
    // retry would look like a script that hangs.
    note(text) {
      if (verbose || (process.stderr.isTTY && !quiet)) reporter.report(`${name}: ${text}`);
    },
    showProgress(done, total) {
      reporter.progress?.show(done, total);
    },
    commandFor(script, args = "") {
      // The suggested command has to work on the same file as this run. It finds the path by itself
      // in `.env`. A variable of the environment may be set for this run only.
      const path = db ?? process.env.DATABASE_PATH;
      if (!path) return buildCommand(script, args);
      return buildCommand(script, `--db ${quoteArgument(path)} ${args}`.trim());
    },
  };

  // An error of the SDK becomes a SyncError. Any other error stays as it is.
  const explain = (error: unknown) =>
    error instanceof SyncError ? error : (createSquareError(error, context) ?? error);
  const result = await main(context).catch((error: unknown) => {
    throw explain(error);
  });

  reporter.progress.hide();
  if (verbose) for (const detail of result.details ?? []) reporter.report(`${name}: ${detail}`);
  if (!quiet) for (const reason of result.reasons ?? []) reporter.report(`${name}: ${reason}`);
  if (json || !quiet) {
    // context.startedAt is not used here, because it can be Square's clock.
    const seconds = (Date.now() - startedAt) / 1_000;
    const lines = json
      ? [formatJson(context, result.json, needsSquare, seconds)]
      : [...(result.lines ?? []), formatSummary(context, result.summary, needsSquare)];
    await printToStdout(lines.map((line) => `${makePrintable(line, square.token)}\n`).join(""));
  }
  const { waiting, nextStep } = result;
  if (quiet && waiting) reporter.report(`${name}: ${waiting}`);
  if (nextStep && !quiet) reporter.report(`Try: ${nextStep}`);
  if (result.error !== undefined) throw explain(result.error);
  return waiting ? EXIT_ROWS_WAIT : EXIT_DONE;
}

/**
 * Prints to stderr, and removes the progress bar before that. The reporter is created before
 * anything else, because even parsing the options can fail. So its first three properties are set
 * later, as soon as their values are known.
 */
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
      if (this.isVerbose) for (const text of listStackTraces(error)) this.report(text);
    },
  };
}

/**
 * Formats the summary line, for example `pull-created (sandbox): …`. When stdout is not a terminal,
 * the line is usually added to a log, so it gets the time and the file too.
 */
function formatSummary(context: RunContext, summary: string, needsSquare: boolean): string {
  const { script, databasePath, square } = context;
  const where = needsSquare ? [square.environment] : [];
  let prefix = "";
  if (!process.stdout.isTTY) {
    const timeWithoutMs = new Date().toISOString().replace(/\.\d+Z$/, "Z");
    prefix = `${timeWithoutMs} `;
    where.push(databasePath);
  }
  const parentheses = where.length > 0 ? ` (${where.join(", ")})` : "";
  return `${prefix}${script}${parentheses}: ${summary}`;
}

function formatJson(
  { script, databasePath, square }: RunContext,
  json: object,
  needsSquare: boolean,
  seconds: number,
): string {
  const { environment } = square;
  const fields = needsSquare
    ? { script, environment, database: databasePath, ...json, seconds }
    : { script, database: databasePath, ...json };
  return JSON.stringify(fields);
}

// The error for a bug in a script, or for a failure that no other code handles.
function createUnexpectedError(error: unknown): SyncError {
  const nextStep = "add --verbose to see where it happened";
  return new SyncError("failed", `Cannot go on: ${messageOf(error)}`, nextStep, error);
}

/** Lists the stack traces of an error and its causes. */
function listStackTraces(error: unknown): string[] {
  return listErrorChain(error).map((cause) => {
    const stack = cause.stack ?? messageOf(cause);
    // An error of the SDK has the reply as its body, and repeats it in the message. The reply can
    // contain the data of a customer, so it is not printed.
    return "body" in cause ? stack.replace(cause.message, "(reply of Square)") : stack;
  });
}

type ParsedCommandLine<O extends OptionSet> =
  | { options: ScriptContext<O>["options"]; helpText?: never }
  | { options?: never; helpText: string };

/**
 * Parses the command line.
 * @returns the options, or the text to print for --help and --version
 * @throws SyncError (usage)
 */
async function parseCommandLine<O extends OptionSet>(
  manual: Manual<O>,
): Promise<ParsedCommandLine<O>> {
  const { name, purpose, options, examples, exitCodes } = manual;
  const words = process.argv.slice(2);
  // `deno task` and tsx pass on the -- that npm removes. What follows it would not count as
  // options.
  if (words[0] === "--") words.shift();
  if (words.includes("--version")) return { helpText: `${VERSION}\n` };

  const allOptions: OptionSet = { ...options, ...COMMON_OPTIONS };
  // Loaded here, because loading yargs takes longer than everything else at the start of a script.
  const { default: yargs } = await import("yargs");
  const parser = yargs(words)
    .scriptName(name)
    .help(false)
    .version(false)
    .usage(`${name} ${purpose}`)
    .options(allOptions)
    .example(examples.map((example) => [...example])) // yargs accepts no readonly lists.
    .epilogue(`Exit codes: ${exitCodes}`)
    .wrap(HELP_WIDTH)
    .detectLocale(false)
    .exitProcess(false)
    // Turn off conversions of yargs. By default, an option that is given twice becomes a list,
    // --no-source sets source to false, --batchSize is accepted for --batch-size, a dot in a name
    // creates an object, and the stray word 007 becomes the number 7.
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
    .fail((message) => {
      throw new SyncError("usage", `Cannot use these options: ${message}`, findHelp(name));
    });
  if (words.includes("--help")) return { helpText: `${await parser.getHelp()}\n` };

  rejectOptionTakenByNpm(name, allOptions);
  const parsed: Record<string, unknown> & { _: (string | number)[] } = await parser.parseAsync();
  for (const [option, { check }] of Object.entries(allOptions))
    if (parsed[option] !== undefined) check?.(parsed[option], name);

  // The strict mode of yargs would name an unknown option without its dashes.
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
  return { options: parsed as unknown as ScriptContext<O>["options"] };
}

/**
 * Returns the unknown options as the user wrote them, for example `--frob` or `-x`. yargs returns
 * only their names, without dashes. Values are left out, because a value can be secret.
 */
function findUnknownOptions(words: string[], parsed: string[], known: string[]): string[] {
  // yargs returns the words that are not options in `_`, and the name of the script in `$0`.
  const unknown = parsed.filter((key) => !["_", "$0", ...known].includes(key));
  const written = unknown.map((key) => {
    const long = words.find((word) => word === `--${key}` || word.startsWith(`--${key}=`));
    // `-xyz` is parsed as the three options x, y and z.
    const short = words.find((word) => /^-[^-]/.test(word) && word.includes(key));
    return (long ?? short ?? `--${key}`).replace(/=.*/s, "");
  });
  return [...new Set(written)];
}

/**
 * Rejects an option that npm has taken. `npm run push-new --dry-run` passes the option to npm and
 * not to the script. Without this check, the script would push. npm stores such an option in a
 * variable of the environment, for example npm_config_dry_run.
 */
function rejectOptionTakenByNpm(name: string, options: OptionSet): void {
  const known = Object.keys(options);
  // Every script rejects --dry-run, not only the scripts that have it. `npm run sync` runs four
  // scripts, and the last one is push-new: if npm took --dry-run, it would push.
  // Compare without the dashes, because --dryrun is a common mistake.
  const normalize = (option: string) => option.replace(/[-_]/g, "").toLowerCase();
  const takenByNpm = Object.keys(process.env)
    .filter((variable) => variable.startsWith("npm_config_"))
    .map((variable) => normalize(variable.slice("npm_config_".length)));
  const taken = [...known, "dry-run"].find((option) => takenByNpm.includes(normalize(option)));
  if (taken === undefined) return;
  const value = options[taken]?.requiresArg ? " …" : "";
  throw new SyncError(
    "usage",
    `Cannot use --${taken}: npm took it as its own option`,
    known.includes(taken)
      ? `npm run ${name} -- --${taken}${value} (options go after --)`
      : `leave it out: ${name} has no --${taken}; for a script that has it: npm run <script> -- --${taken}`,
  );
}

/** Finds the next step for wrong options: the command that prints the help of the script. */
function findHelp(script: string): string {
  return buildCommand(script, "--help") ?? "add --help to see the options";
}

/**
 * Defines an option without a value. With nargs 0, yargs rejects `--dry-run=1`. Without it, yargs
 * would read that as false, and the script would push.
 */
export function flag(describe: string) {
  return { type: "boolean", nargs: 0, describe } as const;
}

/**
 * Defines an option that takes a time. Here its value is only checked. The script parses it later,
 * because a duration is subtracted from the start of the run (context.startedAt).
 * @param keywords the words that are accepted in place of a time
 */
export function timeOption(option: string, describe: string, keywords: readonly string[]) {
  const check = (value: unknown) => {
    const text = String(value);
    if (!keywords.includes(text)) parseTime(option, text, Date.now());
  };
  return { type: "string", requiresArg: true, describe, check } as const;
}

/** Defines an option that takes a whole number from 1 to `max`. */
export function countOption(option: string, max: number, describe: string) {
  const check = (value: unknown, script: string) => {
    const count = Number(value);
    if (Number.isInteger(count) && count >= 1 && count <= max) return;
    const message = `Cannot use ${option}: expected a whole number from 1 to ${max}`;
    throw new SyncError("usage", message, findHelp(script));
  };
  return { type: "number", requiresArg: true, describe, check } as const;
}
