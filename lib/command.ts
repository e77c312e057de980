import { setMaxListeners } from "node:events";
import { resolve } from "node:path";
import { Presets, SingleBar } from "cli-progress";
import { config } from "dotenv";
import yargs, { type InferredOptionTypes, type Options } from "yargs";
import { type Account, connectSquare, HOSTS, type Square } from "./client.ts";
import { type Check, checkReady, type Database, openDatabase } from "./database.ts";
import { codeOf, EXIT, messageOf, SyncError, usageError } from "./errors.ts";
import { toInstant } from "./window.ts";

// Held to package.json by a test; Deno may not read that from everywhere.
const VERSION = "1.1.1";

const BAR = "{bar} {value}/{total} customers, {rate} a second, {eta_formatted} left";
const BAR_AFTER_S = 1; // what is over sooner needs no bar

// An address without a name, a password or a query in it, over https, or on this computer.
const SAFE_URL = /^(https:\/\/|http:\/\/(localhost|127(\.\d+){3}|\[::1\])(?=[:/]|$))[^\s@?#]*$/i;

// Control characters but for the end of a line: in a stranger's name they could fake a line of your log.
const CONTROL = /(?!\n)[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu;

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

/** What `--help` says of a script, and whether it needs a token. */
interface Manual<O extends AllOptions> {
  name: string;
  purpose: string;
  options: O;
  examples: readonly (readonly [command: string, what: string])[];
  exitCodes: string;
  needsSquare: boolean;
}

/** What a script has at hand. */
interface Run<O extends AllOptions> {
  script: string;
  options: InferredOptionTypes<O>;
  environment: string;
  startedAt: number; // in milliseconds since 1970
  /** Locks the file until the script ends. @param check by default: ready, and of this environment */
  openDatabase(check?: Check, mayBeNew?: boolean): Promise<Database>;
  connectSquare(workers: number): Square;
  warn(text: string): void;
  progress(done: number, total: number): void;
}

/** What a script says in the end, to a person or to a program; and what is left to be done. */
interface Summary {
  details?: string[]; // lines above the text
  text: string; // follows the script's name, and the environment
  json: object; // what it has beside those
  exitCode?: number;
  error?: SyncError | undefined;
}

/**
 * Runs a script: first options and configuration, then `main`, then its summary on stdout, or the error
 * on stderr; and the exit code that says which.
 */
export async function runScript<const O extends AllOptions>(
  manual: Manual<O>,
  main: (run: Run<O>) => Promise<Summary>,
): Promise<void> {
  const { name, needsSquare } = manual;
  const stop = new AbortController();
  setMaxListeners(0, stop.signal); // Node warns of more than ten, and every request listens
  const stopFor = (signal: string, exitCode: number) => () =>
    stop.abort(new SyncError(`Cannot go on: stopped by ${signal}`, exitCode, "run it again"));
  process.once("SIGINT", stopFor("SIGINT", EXIT.interrupted));
  process.once("SIGTERM", stopFor("SIGTERM", EXIT.terminated));
  let isVerbose = false;
  let token = "";
  const toSafe = (text: string) => {
    const safe = token.length < 8 ? text : text.replaceAll(token, "(the token)");
    return `${safe.replace(CONTROL, toEscape)}\n`;
  };
  const bar = new SingleBar({ format: BAR, clearOnComplete: true }, Presets.shades_classic);
  const say = (text: string) => {
    bar.stop(); // its line goes, and what is said takes it: the next progress draws a new one below
    process.stderr.write(toSafe(text));
  };
  process.stderr.on("error", () => {}); // nobody listens: that is no reason to stop
  process.stdout.once("error", ({ message }) => {
    say(`${name}: Cannot print the result: ${message}`);
    process.exitCode = EXIT.failed;
  });
  try {
    const options = await readOptions(manual);
    if (options === undefined) return;
    const { db, json = false, quiet = false, verbose = false } = options;
    const { database, account } = readConfiguration(db, needsSquare);
    token = account.token;
    isVerbose = verbose;
    const { environment } = account;
    const startedAt = Date.now();
    // On a terminal a minute without a word looks like a dead program.
    const retried = (text: string) => (verbose || (process.stderr.isTTY && !quiet)) && say(text);
    const warn = (text: string) => !quiet && say(`${name}: ${text}`);
    const caller = { startedAt, stop: stop.signal, say: retried, warn };
    const summary = await main({
      script: name,
      options,
      environment,
      startedAt,
      openDatabase: (check = checkReady(environment), mayBeNew = false) =>
        openDatabase(database, stop.signal, check, mayBeNew),
      connectSquare: (workers) => connectSquare(account, workers, caller),
      warn,
      progress(done, total) {
        const seconds = (Date.now() - startedAt) / 1e3;
        if (quiet || stop.signal.aborted || seconds < BAR_AFTER_S) return;
        const rate = { rate: Math.round(done / seconds) };
        if (!bar.isActive) bar.start(total, done, rate); // not on a terminal, it stays inactive
        bar.setTotal(Math.max(total, done));
        bar.update(done, rate);
      },
    }).finally(() => bar.stop());
    const who = needsSquare ? `${name} (${environment})` : name;
    const lines = [...(summary.details ?? []), `${who}: ${summary.text}`];
    const asked = needsSquare ? { environment, seconds: (Date.now() - startedAt) / 1e3 } : {};
    const all = { script: name, database, ...asked, ...summary.json };
    if (json || !quiet) process.stdout.write(toSafe(json ? JSON.stringify(all) : lines.join("\n")));
    process.exitCode = summary.exitCode ?? EXIT.done;
    if (summary.error) throw summary.error;
  } catch (thrown) {
    let error: unknown = stop.signal.aborted ? stop.signal.reason : thrown;
    const said = `Cannot go on: ${messageOf(error)}`;
    const { message, next, exitCode } =
      error instanceof SyncError ? error : new SyncError(said, EXIT.failed);
    say(`${name}: ${message}`);
    if (next) say(`Try: ${next}`);
    for (; isVerbose && error instanceof Error; error = error.cause) say(`${error.stack}`);
    process.exitCode = exitCode;
  } finally {
    stop.abort(); // what other workers still wait for
  }
}

/** @returns the options; undefined when help or the version was asked for, and is printed */
async function readOptions<O extends AllOptions>(manual: Manual<O>) {
  const { name, purpose, examples, exitCodes, options } = manual;
  // npm run push-new --dry-run: npm takes the option for its own, and the script would push. So would the
  // last one of npm run sync --dry-run, and the first may as well say so.
  const taken = Object.keys({ ...options, ...COMMON, "dry-run": true }).find(
    (option) => process.env[`npm_config_${option.replaceAll("-", "_")}`] !== undefined,
  );
  if (taken !== undefined)
    throw usageError(
      `Cannot use --${taken}: npm took it`,
      taken in { ...options, ...COMMON }
        ? `put -- before it: npm run ${name} -- --${taken} …`
        : `leave it out, it is push-new's: npm run push-new -- --${taken}`,
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
    // Habits of yargs that would change what was meant: an option given twice is a list, --no-source is a
    // source named false, --batchSize is taken too, and a dot makes an object.
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
      throw usageError(message, `npx tsx scripts/${name}.ts --help`);
    })
    .parseAsync();
  if ("help" in given || "version" in given) return undefined;
  return given as unknown as InferredOptionTypes<O & typeof COMMON>;
}

/** Reads the environment, then `.env`. @throws SyncError (usage) with all that is wrong, at once */
function readConfiguration(db: string | undefined, needsSquare: boolean) {
  // Into an object of its own: Deno must be allowed each name that is set in process.env.
  const { parsed: file = {}, error } = config({ processEnv: {}, quiet: true });
  const read = (name: string) => process.env[name] ?? file[name] ?? "";
  const token = read("SQUARE_ACCESS_TOKEN").trim();
  const environment = read("SQUARE_ENVIRONMENT") || "sandbox"; // production must be named
  const host = HOSTS.get(environment) ?? "";
  const baseUrl = read("SQUARE_BASE_URL").trim().replace(/\/+$/, "");
  // What may be wrong, and whether it is. It is not quoted: it may be a token in the wrong line.
  const problems = {
    "SQUARE_ACCESS_TOKEN is not set (no account yet? npm run demo needs none)": token === "",
    "SQUARE_ACCESS_TOKEN holds a blank, or another character that no token has":
      !/^[\x21-\x7e]*$/.test(token),
    "SQUARE_ENVIRONMENT is not sandbox or production": host === "",
    "SQUARE_BASE_URL is no https://… address (http://… for this computer only)":
      baseUrl !== "" && !(URL.canParse(baseUrl) && SAFE_URL.test(baseUrl)),
  };
  const wrong = db === "" ? ["--db is empty"] : [];
  if (error && codeOf(error) !== "ENOENT") wrong.push(error.message);
  for (const [what, isSo] of Object.entries(problems)) if (isSo && needsSquare) wrong.push(what);
  if (wrong.length > 0)
    throw usageError(
      `Cannot start: ${wrong.join("; ")}`,
      `put it right in ${resolve(".env")}; if there is none yet, cp .env.example .env`,
    );
  const name = baseUrl ? "offline" : environment;
  const account: Account = { environment: name, token, baseUrl: baseUrl || host };
  return { database: db ?? (read("DATABASE_PATH") || "database.db"), account };
}

// As JSON writes them, so that what is printed of JSON still says the same.
function toEscape(control: string): string {
  const toUnit = (unit: string) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`;
  return control.split("").map(toUnit).join("");
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
