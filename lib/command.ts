import { readFileSync } from "node:fs";
import { Presets, SingleBar } from "cli-progress";
import { parse } from "dotenv";
import yargs, { type InferredOptionTypes, type Options } from "yargs";
import { connectSquare, HOSTS, type Square } from "./client.ts";
import { type Check, checkReady, type Database, openDatabase } from "./database.ts";
import { codeOf, EXIT, type ExitCode, SyncError, toPrintable } from "./errors.ts";
import { toInstant } from "./window.ts";

// Held to package.json by a test; Deno may not read that from everywhere.
const VERSION = "1.0.1";

const BAR_AFTER_S = 1; // what is over sooner needs no bar
const BAR = "{bar} {value}/{total} customers, {rate} a second, {eta_formatted} left";

type AllOptions = Record<string, Options>;

const COMMON = {
  db: { type: "string", requiresArg: true, describe: "The file [DATABASE_PATH or database.db]" },
  json: flag("Print one JSON object"),
  quiet: flag("Print nothing but errors"),
  verbose: flag("Tell of retries and causes"),
} as const satisfies AllOptions;

/** The options of the pulls. */
export const PULL_OPTIONS = {
  since: {
    ...timeOption("--since", "last, all, 90s, 5m, 24h, 1d, 2w, 2026-08-01 or an RFC 3339 time"),
    default: "last",
  },
  until: timeOption("--until", "The same without last and all [no end]"),
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
  needsSquare: boolean; // and so a token
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
export type Summary = {
  text: string;
  json: Record<string, unknown>;
  exitCode?: ExitCode;
  error?: SyncError | undefined; // what is left to be said, and done
};

/**
 * Runs a script: first options and configuration, then `main`, then the summary on stdout, or the error
 * on stderr; and the exit code that says which.
 */
export async function runScript<const O extends AllOptions>(
  manual: Manual<O>,
  main: (run: Run<O>) => Promise<Summary>,
): Promise<void> {
  const { name } = manual;
  const stop = new AbortController();
  const stopFor = (signal: string, exitCode: ExitCode) => () =>
    stop.abort(new SyncError(`Cannot go on: stopped by ${signal}`, exitCode, "run it again"));
  process.once("SIGINT", stopFor("SIGINT", EXIT.interrupted));
  process.once("SIGTERM", stopFor("SIGTERM", EXIT.terminated));
  let isVerbose = false;
  let token = "";
  const bar = new SingleBar({ format: BAR, clearOnComplete: true }, Presets.shades_classic);
  // What is printed holds no token, and nothing that a terminal would obey.
  const toSafe = (text: string) => {
    const safe = token.length < 8 ? text : text.replaceAll(token, "(the token)");
    return `${safe.split("\n").map(toPrintable).join("\n")}\n`;
  };
  const say = (text: string) => process.stderr.write(toSafe(text));
  process.stdout.once("error", ({ message }) => {
    say(`${name}: Cannot print the result: ${message}`);
    process.exitCode = EXIT.failed;
  });
  try {
    const options = await readOptions(manual);
    if (options === undefined) return;
    const { db, json = false, quiet = false, verbose = false } = options;
    const { databasePath, account } = readConfiguration(db, manual.needsSquare);
    const { environment } = account;
    token = account.token;
    isVerbose = verbose;
    const startedAt = Date.now();
    const summary = await main({
      options,
      environment,
      databasePath,
      openDatabase: (check = checkReady(environment), mayBeNew = false) =>
        openDatabase(databasePath, stop.signal, check, mayBeNew),
      connectSquare: (workers) =>
        connectSquare(account, workers, stop.signal, (text) => isVerbose && say(text)),
      warn: (text) => !quiet && say(`${name}: ${text}`),
      progress(done, total) {
        const seconds = (Date.now() - startedAt) / 1e3;
        if (quiet || stop.signal.aborted || !process.stderr.isTTY || seconds < BAR_AFTER_S) return;
        const rate = { rate: Math.round(done / seconds) };
        if (!bar.isActive) bar.start(total, done, rate);
        bar.setTotal(Math.max(total, done));
        bar.update(done, rate);
      },
    });
    bar.stop();
    const result = json ? JSON.stringify(summary.json) : summary.text;
    if (json || !quiet) process.stdout.write(toSafe(result));
    process.exitCode = summary.exitCode ?? EXIT.done;
    if (summary.error) throw summary.error;
  } catch (thrown) {
    bar.stop();
    const error: unknown = stop.signal.aborted ? stop.signal.reason : thrown;
    const isOurs = error instanceof SyncError;
    const message = error instanceof Error ? error.message : String(error);
    say(`${name}: ${isOurs ? message : `Cannot go on: ${message}`}`);
    if (isOurs && error.next) say(`Try: ${error.next}`);
    for (let one = error; isVerbose && one instanceof Error; one = one.cause) say(`${one.stack}`);
    process.exitCode = isOurs ? error.exitCode : EXIT.failed;
  } finally {
    stop.abort(); // what other workers still wait for
  }
}

/** @returns the options; undefined when help or the version was asked for, and is printed */
async function readOptions<O extends AllOptions>(manual: Manual<O>) {
  const { name, purpose, examples, exitCodes, options } = manual;
  // npm run push-new --dry-run: npm takes the option for its own, and the script would push.
  const taken = Object.keys({ ...options, db: "" }).find(
    (option) => process.env[`npm_config_${option.replaceAll("-", "_")}`] !== undefined,
  );
  if (taken !== undefined)
    throw new SyncError(
      `Cannot use --${taken}: npm took it`,
      EXIT.usage,
      `npm run ${name} -- --${taken}`,
    );
  const given = await yargs(process.argv.slice(2))
    .scriptName(name)
    .usage(`${name} ${purpose}`)
    .options({ ...options, ...COMMON })
    .example(examples.map(([command, what]) => [command, what]))
    .epilogue(`Exit codes: ${exitCodes}`)
    .version(VERSION)
    .strict()
    .demandCommand(0, 0)
    .parserConfiguration({
      "duplicate-arguments-array": false,
      "boolean-negation": false,
      "camel-case-expansion": false,
      "dot-notation": false,
    })
    .detectLocale(false)
    .exitProcess(false)
    .wrap(80)
    .fail((said) => {
      const message = said.startsWith("Cannot") ? said : `Cannot use these options: ${said}`;
      throw new SyncError(message, EXIT.usage, `${name} --help`);
    })
    .parseAsync();
  if ("help" in given || "version" in given) return undefined;
  return given as unknown as InferredOptionTypes<O & typeof COMMON>;
}

/** Reads the environment, then `.env`. @throws SyncError (usage) with all that is wrong, at once */
function readConfiguration(db: string | undefined, needsSquare: boolean) {
  const file = readDotEnv();
  const read = (name: string) => process.env[name] ?? file[name] ?? "";
  const token = read("SQUARE_ACCESS_TOKEN").trim();
  const environment = read("SQUARE_ENVIRONMENT") || "sandbox"; // production must be named
  const host = HOSTS.get(environment);
  const baseUrl = read("SQUARE_BASE_URL").replace(/\/+$/, "");
  // What may be wrong, and whether it is. It is not quoted: it may be a token in the wrong line.
  const problems = {
    "SQUARE_ACCESS_TOKEN is not set (no account yet? npm run demo needs none)": token === "",
    "SQUARE_ACCESS_TOKEN holds a character that no token has": !/^[\x21-\x7e]*$/.test(token),
    "SQUARE_ENVIRONMENT is not sandbox or production": host === undefined,
    "SQUARE_BASE_URL is no https address (plain http: for this computer only)":
      baseUrl !== "" && !isSafeUrl(baseUrl),
  };
  const wrong = db === "" ? ["--db is empty"] : [];
  for (const [what, isSo] of Object.entries(problems)) if (isSo && needsSquare) wrong.push(what);
  if (wrong.length > 0)
    throw new SyncError(
      `Cannot start: ${wrong.join("; ")}`,
      EXIT.usage,
      "put it right in .env; if there is none yet, cp .env.example .env",
    );
  return {
    databasePath: db ?? (read("DATABASE_PATH") || "database.db"),
    account: baseUrl
      ? { environment: "offline", token, baseUrl }
      : { environment, token, baseUrl: host ?? "" },
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

/** An option that is there or not. Without nargs, yargs takes --dry-run=1 for false, and would push. */
export function flag(describe: string) {
  return { type: "boolean", nargs: 0, describe } as const;
}

/** An option that takes a time: what is none is refused before anything is tried. */
export function timeOption(option: string, describe: string) {
  const coerce = (text: string): string => {
    const isWord = option !== "--until" && ["last", "all"].includes(text);
    if (!isWord) toInstant(option, text, Date.now());
    return text;
  };
  return { type: "string", requiresArg: true, describe, coerce } as const;
}

/** An option that takes a whole number from 1 to `most`. */
export function countOption(option: string, most: number, describe: string) {
  const coerce = (count: number): number => {
    if (Number.isInteger(count) && count >= 1 && count <= most) return count;
    throw new Error(`Cannot use ${option}: it takes a whole number from 1 to ${most}`);
  };
  return { type: "number", requiresArg: true, describe, coerce } as const;
}
