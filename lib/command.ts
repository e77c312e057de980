import { readFileSync } from "node:fs";
import { parse as parseEnv } from "dotenv";
import yargs, { type InferredOptionTypes, type Options } from "yargs";
import { type Account, connectSquare, type Square } from "./client.ts";
import { type Check, checkReady, type Database, openDatabase } from "./database.ts";
import { codeOf, EXIT, type ExitCode, SyncError, toPrintable } from "./errors.ts";
import { toInstant } from "./window.ts";

/** Printed by --version; a test holds it to package.json, which Deno may not read here. */
export const VERSION = "1.0.0";

const PROGRESS_AFTER_MS = 1_000; // what is over sooner needs no bar
const PROGRESS = "{bar} {value}/{total} customers, {rate} a second, {eta_formatted} left";

const COMMON = {
  db: {
    type: "string",
    requiresArg: true,
    describe: "The SQLite file [DATABASE_PATH or database.db]",
  },
  json: { type: "boolean", default: false, describe: "Print one JSON object" },
  quiet: { type: "boolean", default: false, describe: "Print problems only" },
  verbose: {
    type: "boolean",
    default: false,
    describe: "Tell of retries, and where an error came from",
  },
} as const satisfies Record<string, Options>;

const EXIT_CODES = `Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 some rows refused
or held, 4 token refused, 75 try again later, 130/143 stopped by a signal.`;

/** --since and --until of the two pulls; a word that is no time is refused before anything is tried. */
export const WINDOW_OPTIONS = {
  since: {
    type: "string",
    default: "last",
    requiresArg: true,
    describe: "last, all, 90s, 5m, 24h, 1d, 2w, 2026-08-01 or an RFC 3339 time",
    coerce: (text: string) => checkTime("--since", text, ["last", "all"]),
  },
  until: {
    type: "string",
    requiresArg: true,
    describe: "The same, but for last and all [no end]",
    coerce: (text: string) => checkTime("--until", text, []),
  },
  concurrency: {
    type: "number",
    default: 4,
    requiresArg: true,
    describe: "Slices read side by side; 1 = in order",
    coerce: (count: number) => checkCount("--concurrency", count, 16),
  },
} as const satisfies Record<string, Options>;

/** What a script is to its `--help`. */
export interface Manual<O> {
  name: string;
  purpose: string;
  options: O;
  /** Three command lines and what each is for. */
  examples: readonly (readonly [string, string])[];
}

/** What a script has at hand while it runs. */
export interface Context<O extends Record<string, Options>> {
  options: InferredOptionTypes<O>;
  /** The name of the Square that this run is for; of `init-db`, which has none, the empty word. */
  environment: string;
  databasePath: string;
  /** Aborts when the script is told to stop. */
  stop: AbortSignal;
  /** @param check refuses a file; by default one that is not ready for this environment */
  openDatabase(check?: Check, mayBeNew?: boolean): Promise<Database>;
  connectSquare(workers: number): Square;
  warn(text: string): void;
  /** Moves the bar on a terminal. */
  progress(done: number, total: number): void;
}

/** What a script has to say in the end: a line for a person, or an object for a program. */
export interface Summary {
  text: string;
  json: Record<string, unknown>;
  exitCode?: ExitCode;
}

/**
 * Runs one script: options and configuration first, all of their problems at once; then `main`; then
 * the summary, or the error and its exit code. A file or a lock is never left half done.
 */
export async function runScript<const O extends Record<string, Options>>(
  manual: Manual<O>,
  needsSquare: boolean,
  main: (context: Context<O>) => Promise<Summary>,
): Promise<void> {
  const stop = new AbortController();
  for (const [signal, code] of [
    ["SIGINT", EXIT.interrupted],
    ["SIGTERM", EXIT.terminated],
  ] as const)
    process.once(signal, () =>
      stop.abort(
        new SyncError(`Cannot go on: stopped by ${signal}`, {
          exitCode: code,
          next: "run it again: it carries on where it stopped",
        }),
      ),
    );
  let verbose = process.argv.includes("--verbose");
  let token = "";
  let database: Database | undefined;
  let bar: Bar | undefined;
  // The one way to stderr: nothing secret, and nothing that a terminal would obey.
  const say = (text: string) => {
    const safe = token === "" ? text : text.replaceAll(token, "[token]");
    for (const line of safe.split("\n")) process.stderr.write(`${toPrintable(line)}\n`);
  };
  try {
    const options = await readOptions(manual);
    if (options === undefined) return;
    verbose = options.verbose;
    const { databasePath, account } = readConfiguration(options.db, needsSquare);
    token = account.token;
    const progress = makeBar(options.quiet);
    bar = progress;
    const summary = await main({
      options,
      environment: account.environment,
      databasePath,
      stop: stop.signal,
      openDatabase: async (check = checkReady(account.environment), mayBeNew = false) => {
        database = await openDatabase(databasePath, stop.signal, check, mayBeNew);
        return database;
      },
      connectSquare: (workers) =>
        connectSquare(account, workers, stop.signal, verbose ? (text) => say(text) : () => {}),
      warn: (text) => !options.quiet && say(`${manual.name}: ${text}`),
      progress: progress.move,
    });
    bar.stop();
    if (options.json) process.stdout.write(`${JSON.stringify(summary.json)}\n`);
    else if (!options.quiet)
      process.stdout.write(`${summary.text.split("\n").map(toPrintable).join("\n")}\n`);
    process.exitCode = summary.exitCode ?? EXIT.done;
  } catch (thrown) {
    bar?.stop();
    const error = stop.signal.aborted ? stop.signal.reason : thrown;
    const message = error instanceof Error ? error.message : String(error);
    say(`${manual.name}: ${error instanceof SyncError ? message : `Cannot go on: ${message}`}`);
    if (error instanceof SyncError && error.next !== undefined) say(`Try: ${error.next}`);
    for (let e = error; verbose && e instanceof Error; e = e.cause) say(e.stack ?? e.message);
    process.exitCode = error instanceof SyncError ? error.exitCode : EXIT.failed;
  } finally {
    database?.close();
    stop.abort(); // ends what other workers were still waiting for
  }
}

/** @returns the options, or undefined when help or the version was asked for and is printed */
async function readOptions<O extends Record<string, Options>>(
  manual: Manual<O>,
): Promise<InferredOptionTypes<O & typeof COMMON> | undefined> {
  let printed = "";
  let problem: unknown;
  const parser = yargs()
    .scriptName(manual.name)
    .usage(`${manual.name}: ${manual.purpose}`)
    .options({ ...manual.options, ...COMMON })
    .example(manual.examples.map(([command, what]) => [command, what]))
    .epilogue(EXIT_CODES)
    .version(VERSION)
    .strict()
    .demandCommand(0, 0)
    .parserConfiguration({ "duplicate-arguments-array": false })
    .detectLocale(false)
    .exitProcess(false)
    .wrap(80);
  const argv = await parser.parseAsync(process.argv.slice(2), {}, (error, _argv, output) => {
    problem = error;
    printed = output;
  });
  if (problem) {
    const what = problem instanceof Error ? problem.message : String(problem);
    throw new SyncError(what.startsWith("Cannot") ? what : `Cannot use these options: ${what}`, {
      exitCode: EXIT.usage,
      next: `${manual.name} --help`,
    });
  }
  if (printed !== "") process.stdout.write(`${printed}\n`);
  return printed === "" ? (argv as unknown as InferredOptionTypes<O & typeof COMMON>) : undefined;
}

/** Reads the environment, then `.env`, and checks all of it before any work. */
function readConfiguration(
  db: string | undefined,
  needsSquare: boolean,
): { databasePath: string; account: Account } {
  const file = readDotEnv();
  const read = (name: string) => process.env[name] ?? file[name] ?? "";
  const problems: string[] = [];
  const baseUrl = read("SQUARE_BASE_URL");
  const named = read("SQUARE_ENVIRONMENT") || "sandbox";
  const token = read("SQUARE_ACCESS_TOKEN").trim();
  if (db === "") problems.push("--db needs a path");
  if (needsSquare && token === "")
    problems.push(
      "SQUARE_ACCESS_TOKEN is not set (put it into .env, or try it without an account: npm run demo)",
    );
  // A token is one line of visible characters; a pasted line break would end up in a header.
  else if (!/^[\x21-\x7e]*$/.test(token))
    problems.push("SQUARE_ACCESS_TOKEN has characters that no token has");
  if (named !== "sandbox" && named !== "production")
    problems.push(`SQUARE_ENVIRONMENT is ${JSON.stringify(named)}, neither sandbox nor production`);
  if (baseUrl !== "" && !isSafeUrl(baseUrl))
    problems.push(
      "SQUARE_BASE_URL is not an https address (plain http is for this machine only: 127.0.0.1, ::1, localhost)",
    );
  if (needsSquare ? problems.length > 0 : db === "")
    throw new SyncError(`Cannot start: ${problems.join("\nCannot start: ")}`, {
      exitCode: EXIT.usage,
      next: "cp .env.example .env, and fill it in; the README explains each line",
    });
  return {
    databasePath: db ?? (read("DATABASE_PATH") || "database.db"),
    account: {
      environment: baseUrl === "" ? named : "offline",
      token,
      baseUrl: baseUrl || undefined,
    },
  };
}

// dotenv's config() would set what it reads, which Deno has to be allowed name by name.
function readDotEnv(): Record<string, string> {
  try {
    return parseEnv(readFileSync(".env"));
  } catch (error) {
    if (codeOf(error) === "ENOENT") return {};
    throw new SyncError("Cannot read .env: no permission", { exitCode: EXIT.usage, cause: error });
  }
}

function isSafeUrl(text: string): boolean {
  if (!URL.canParse(text)) return false;
  const { protocol, hostname } = new URL(text);
  const isHere = /^(localhost|127(\.\d+){3}|\[::1\])$/.test(hostname);
  return protocol === "https:" || (protocol === "http:" && isHere);
}

function checkTime(option: string, text: string, words: string[]): string {
  if (!words.includes(text)) toInstant(option, text, Date.now());
  return text;
}

/** @returns the count; @throws SyncError when it is not a whole number from 1 to `most` */
export function checkCount(option: string, count: number, most: number): number {
  if (Number.isInteger(count) && count >= 1 && count <= most) return count;
  throw new SyncError(`Cannot use ${option}: it takes a whole number from 1 to ${most}`, {
    exitCode: EXIT.usage,
  });
}

interface Bar {
  move(done: number, total: number): void;
  stop(): void;
}

// A bar is for a person who waits: on a terminal only, and not for what is over in a moment.
function makeBar(quiet: boolean): Bar {
  const started = Date.now();
  let stopped = quiet || !process.stderr.isTTY;
  let bar: import("cli-progress").SingleBar | undefined;
  let loading: Promise<void> | undefined;
  async function load(): Promise<void> {
    const { Presets, SingleBar } = (await import("cli-progress")).default;
    const options = { format: PROGRESS, clearOnComplete: true, stream: process.stderr };
    if (stopped) return;
    bar = new SingleBar(options, Presets.shades_classic);
    bar.start(0, 0, { rate: 0 });
  }
  return {
    move(done, total) {
      if (stopped || Date.now() - started < PROGRESS_AFTER_MS) return;
      if (loading === undefined) loading = load();
      bar?.setTotal(Math.max(total, done));
      bar?.update(done, { rate: Math.round((done * 1_000) / (Date.now() - started)) });
    },
    stop() {
      stopped = true;
      bar?.stop();
    },
  };
}
