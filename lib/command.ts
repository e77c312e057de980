import { readFileSync } from "node:fs";
import { parse } from "dotenv";
import yargs, { type InferredOptionTypes, type Options } from "yargs";
import { type Account, connectSquare, type Square } from "./client.ts";
import { type Check, checkReady, type Database, openDatabase } from "./database.ts";
import { codeOf, EXIT, type ExitCode, SyncError, toPrintable } from "./errors.ts";
import { toInstant } from "./window.ts";

// Held to package.json by a test; Deno may not read that from everywhere.
const VERSION = "1.0.0";

const BAR_AFTER_MS = 1_000; // what is over sooner needs no bar
const BAR = "{bar} {value}/{total} customers, {rate} a second, {eta_formatted} left";

type AllOptions = Record<string, Options>;

const COMMON = {
  db: { type: "string", requiresArg: true, describe: "The file [DATABASE_PATH or database.db]" },
  json: { type: "boolean", default: false, describe: "Print one JSON object" },
  quiet: { type: "boolean", default: false, describe: "Print nothing but errors" },
  verbose: { type: "boolean", default: false, describe: "Tell of retries and causes" },
} as const satisfies AllOptions;

/** The options of the pulls. A word that is no time is refused before anything is tried. */
export const PULL_OPTIONS = {
  since: {
    type: "string",
    default: "last",
    requiresArg: true,
    describe: "last, all, 90s, 5m, 24h, 1d, 2w, 2026-08-01 or an RFC 3339 time",
    coerce: (text: string) => checkTime("--since", text, "last", "all"),
  },
  until: {
    type: "string",
    requiresArg: true,
    describe: "The same without last and all [no end]",
    coerce: (text: string) => checkTime("--until", text),
  },
  concurrency: {
    ...countOption("--concurrency", 16, "Requests side by side; 1 = in order"),
    default: 4,
  },
} as const satisfies AllOptions;

/** What `--help` says of a script. */
export interface Manual<O extends AllOptions> {
  name: string;
  purpose: string;
  options: O;
  examples: readonly (readonly [command: string, what: string])[];
  exitCodes: string;
  /** False for a script that asks Square for nothing, and so needs no token. */
  needsSquare: boolean;
}

/** What a script has at hand. */
export interface Run<O extends AllOptions> {
  options: InferredOptionTypes<O>;
  environment: string;
  databasePath: string;
  /** Locks the file until the script ends. @param check by default: ready, and of this environment */
  openDatabase(check?: Check, mayBeNew?: boolean): Promise<Database>;
  connectSquare(workers: number): Square;
  warn(text: string): void;
  /** Moves the bar; there is one on a terminal only. */
  progress(done: number, total: number): void;
}

/** What a script says in the end: a line to a person, or an object to a program. */
export type Summary = { text: string; json: Record<string, unknown>; exitCode?: ExitCode };

/**
 * Runs a script: first options and configuration, then `main`, then the summary on stdout, or the error
 * on stderr; and the exit code that says which.
 */
export async function runScript<const O extends AllOptions>(
  manual: Manual<O>,
  main: (run: Run<O>) => Promise<Summary>,
): Promise<void> {
  const stop = new AbortController();
  const stopFor = (signal: string, exitCode: ExitCode) => () =>
    stop.abort(new SyncError(`Cannot go on: stopped by ${signal}`, exitCode, "run it again"));
  process.once("SIGINT", stopFor("SIGINT", EXIT.interrupted));
  process.once("SIGTERM", stopFor("SIGTERM", EXIT.terminated));
  let isVerbose = false;
  let token = "";
  let database: Database | undefined;
  let bar: ReturnType<typeof makeBar> | undefined;
  // What is printed holds no token, and nothing that a terminal would obey.
  const toSafe = (text: string) => {
    const safe = token === "" ? text : text.replaceAll(token, "(the token)");
    return `${safe.split("\n").map(toPrintable).join("\n")}\n`;
  };
  const say = (text: string) => process.stderr.write(toSafe(text));
  process.stdout.once("error", ({ message }) => {
    say(`${manual.name}: Cannot print the result: ${message}`);
    process.exitCode = EXIT.failed;
  });
  try {
    const options = await readOptions(manual);
    if (options === undefined) return;
    isVerbose = options.verbose;
    const { databasePath, account } = readConfiguration(options.db, manual.needsSquare);
    const { environment } = account;
    token = account.token;
    bar = makeBar(!options.quiet && process.stderr.isTTY);
    const summary = await main({
      options,
      environment,
      databasePath,
      openDatabase: async (check = checkReady(environment), mayBeNew = false) => {
        database = await openDatabase(databasePath, stop.signal, check, mayBeNew);
        return database;
      },
      connectSquare: (workers) =>
        connectSquare(account, workers, stop.signal, (text) => isVerbose && say(text)),
      warn: (text) => !options.quiet && say(`${manual.name}: ${text}`),
      progress: bar.move,
    });
    bar.stop();
    const result = options.json ? JSON.stringify(summary.json) : summary.text;
    if (options.json || !options.quiet) process.stdout.write(toSafe(result));
    process.exitCode = summary.exitCode ?? EXIT.done;
  } catch (thrown) {
    bar?.stop();
    const error: unknown = stop.signal.aborted ? stop.signal.reason : thrown;
    const isOurs = error instanceof SyncError;
    const message = error instanceof Error ? error.message : String(error);
    say(`${manual.name}: ${isOurs ? message : `Cannot go on: ${message}`}`);
    if (isOurs && error.next) say(`Try: ${error.next}`);
    for (let one = error; isVerbose && one instanceof Error; one = one.cause) say(`${one.stack}`);
    process.exitCode = isOurs ? error.exitCode : EXIT.failed;
  } finally {
    database?.close();
    stop.abort(); // what other workers still wait for
  }
}

/** @returns the options; undefined when help or the version was asked for, and is printed */
async function readOptions<const O extends AllOptions>(
  manual: Manual<O>,
): Promise<InferredOptionTypes<O & typeof COMMON> | undefined> {
  let printed = "";
  let problem: Error | undefined;
  const parser = yargs()
    .scriptName(manual.name)
    .usage(`${manual.name} ${manual.purpose}`)
    .options({ ...manual.options, ...COMMON })
    .example(manual.examples.map(([command, what]) => [command, what]))
    .epilogue(`Exit codes: ${manual.exitCodes}`)
    .version(VERSION)
    .strict()
    .demandCommand(0, 0)
    .parserConfiguration({ "duplicate-arguments-array": false })
    .detectLocale(false)
    .exitProcess(false)
    .wrap(80);
  const options = await parser.parseAsync(process.argv.slice(2), {}, (error, _, output) => {
    if (error) problem = error;
    printed = output;
  });
  if (problem !== undefined) {
    // yargs hands on what a check of ours said under another class.
    const said = (problem as Error).message;
    const message = said.startsWith("Cannot") ? said : `Cannot use these options: ${said}`;
    throw new SyncError(message, EXIT.usage, `${manual.name} --help`);
  }
  if (printed !== "") process.stdout.write(`${printed}\n`);
  return printed === ""
    ? (options as unknown as InferredOptionTypes<O & typeof COMMON>)
    : undefined;
}

/** Reads the environment, then `.env`. @throws SyncError (usage) with all that is wrong, at once */
function readConfiguration(
  db: string | undefined,
  needsSquare: boolean,
): { databasePath: string; account: Account } {
  const file = readDotEnv();
  const read = (name: string) => process.env[name] ?? file[name] ?? "";
  const token = read("SQUARE_ACCESS_TOKEN").trim();
  const named = read("SQUARE_ENVIRONMENT") || "sandbox";
  const baseUrl = read("SQUARE_BASE_URL");
  const environment = baseUrl === "" && named === "production" ? "production" : "sandbox";
  const wrong: string[] = [];
  if (needsSquare && token === "")
    wrong.push("SQUARE_ACCESS_TOKEN is not set (no account yet? npm run demo needs none)");
  if (needsSquare && !/^[\x21-\x7e]*$/.test(token))
    wrong.push("SQUARE_ACCESS_TOKEN holds a character that no token has");
  if (needsSquare && named !== "sandbox" && named !== "production")
    wrong.push(`SQUARE_ENVIRONMENT is ${JSON.stringify(named)}, not sandbox or production`);
  if (needsSquare && baseUrl !== "" && !isSafeUrl(baseUrl))
    wrong.push("SQUARE_BASE_URL is no https address (plain http: for this computer only)");
  if (db === "") wrong.push("--db is empty");
  if (wrong.length > 0)
    throw new SyncError(
      `Cannot start: ${wrong.join("; ")}`,
      EXIT.usage,
      "cp .env.example .env, and fill it in",
    );
  return {
    databasePath: db ?? (read("DATABASE_PATH") || "database.db"),
    account: baseUrl
      ? { environment: "offline", token, baseUrl }
      : { environment, token, baseUrl: undefined },
  };
}

// Not dotenv's config(): it sets what it reads, and Deno must be allowed to set each name.
function readDotEnv(): Record<string, string> {
  try {
    return parse(readFileSync(".env"));
  } catch (error) {
    if (codeOf(error) === "ENOENT") return {};
    throw new SyncError("Cannot read .env: no permission", EXIT.usage, undefined, error);
  }
}

function isSafeUrl(text: string): boolean {
  if (!URL.canParse(text)) return false;
  const { protocol, hostname } = new URL(text);
  const isHere = /^(localhost|127(\.\d+){3}|\[::1\])$/.test(hostname);
  return protocol === "https:" || (protocol === "http:" && isHere);
}

function checkTime(option: string, text: string, ...words: string[]): string {
  if (!words.includes(text)) toInstant(option, text, Date.now());
  return text;
}

/** An option that takes a whole number from 1 to `most`. */
export function countOption(option: string, most: number, describe: string) {
  const coerce = (count: number): number => {
    if (Number.isInteger(count) && count >= 1 && count <= most) return count;
    throw new Error(`Cannot use ${option}: it takes a whole number from 1 to ${most}`);
  };
  return { type: "number", requiresArg: true, describe, coerce } as const;
}

function makeBar(isWanted: boolean) {
  const startedAt = Date.now();
  let bar: import("cli-progress").SingleBar | undefined;
  let isOver = !isWanted;
  return {
    async move(done: number, total: number): Promise<void> {
      const seconds = (Date.now() - startedAt) / 1e3;
      if (isOver || seconds * 1e3 < BAR_AFTER_MS) return;
      const { Presets, SingleBar } = (await import("cli-progress")).default;
      if (isOver) return;
      const rate = Math.round(done / seconds);
      bar ??= new SingleBar({ format: BAR, clearOnComplete: true }, Presets.shades_classic);
      if (!bar.isActive) bar.start(total, done, { rate });
      bar.setTotal(Math.max(total, done));
      bar.update(done, { rate });
    },
    stop(): void {
      isOver = true;
      bar?.stop();
    },
  };
}
