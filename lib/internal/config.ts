/** The configuration: read from the environment, then from `.env`, and checked before any work. */
import { existsSync, readFileSync } from "node:fs";
import { resolve } from "node:path";
import type { SquareSettings } from "./context.ts";
import { codeOf, messageOf, SyncError } from "./errors.ts";
import { findPackageCommand, IS_DENO } from "./suggest.ts";

/** Square's hosts. Importing them from the SDK would cost every start most of a second. */
export const SQUARE_HOSTS = new Map([
  ["production", "https://connect.squareup.com"],
  ["sandbox", "https://connect.squareupsandbox.com"],
]);

const ENV_FILE = ".env";
const DEFAULT_DATABASE = "database.db";
const DEFAULT_ENVIRONMENT = "sandbox"; // so that production has to be named

const LOOPBACK_HOST = /^(localhost|127(\.\d+){3}|\[::1\])$/;

// Line breaks, carriage returns and characters without width, such as those copied from a web page.
const INVISIBLE_CHARACTER = /[\p{Cc}\p{Zl}\p{Zp}\u200b\ufeff]/u;

const QUOTES = "has quotes around it, or an unclosed quote";

export interface Configuration {
  databasePath: string;
  /** Empty values for a script that does not use Square. */
  square: SquareSettings;
}

/** One wrong setting. The value is never part of the text, because it can be a token in the wrong place. */
interface Problem {
  text: string;
  fix: string;
}

/** Where a value was found, which decides where to correct it. */
type Source = "--db" | "the environment" | typeof ENV_FILE | "nowhere";

interface Setting {
  name: string;
  value: string;
  source: Source;
}

/**
 * Reads the configuration. A variable of the environment wins over `.env`, also when it is empty.
 * @param dbOption the value of `--db`, which wins over DATABASE_PATH
 * @throws SyncError (usage) with all problems at once
 */
export async function readConfiguration(
  dbOption: string | undefined,
  needsSquare: boolean,
): Promise<Configuration> {
  const file = await readEnvFile();
  const read = (name: string): Setting => {
    const value = process.env[name];
    if (value !== undefined) return { name, value, source: "the environment" };
    const fileValue = file.values[name];
    if (fileValue !== undefined) return { name, value: fileValue, source: ENV_FILE };
    return { name, value: "", source: "nowhere" };
  };
  const database: Setting =
    dbOption === undefined
      ? read("DATABASE_PATH")
      : { name: "--db", value: dbOption, source: "--db" };
  const problems = checkDatabasePath(database);

  // Deno may have no permission to read .env. That is harmless when the environment contains what the script
  // needs. Otherwise a setting could be missing without a word.
  const needed = needsSquare ? [database, read("SQUARE_ACCESS_TOKEN")] : [database];
  const isComplete = needed.every(({ source }) => source !== "nowhere");
  const isFileUsable = file.problem === undefined || (file.isUnreadable && isComplete);
  if (file.problem && !isFileUsable) problems.push(file.problem);

  let square: SquareSettings = { environment: "", token: "", baseUrl: "" };
  if (needsSquare && isFileUsable) {
    const token = trim(read("SQUARE_ACCESS_TOKEN"));
    const environment = trim(read("SQUARE_ENVIRONMENT"));
    const baseUrl = trim(read("SQUARE_BASE_URL"));
    problems.push(...checkToken(token), ...checkEnvironment(environment), ...checkBaseUrl(baseUrl));
    square = buildSquareSettings(token.value, environment.value, baseUrl.value);
  }
  if (problems.length > 0) {
    const texts = problems.map(({ text }) => text);
    const fixes = new Set(problems.map(({ fix }) => fix));
    throw new SyncError("usage", `Cannot start: ${texts.join("; ")}`, [...fixes].join("; "));
  }
  return { databasePath: database.value || DEFAULT_DATABASE, square };
}

// A space or a carriage return at the end is a slip, for example from `docker --env-file` on Windows. No
// token, environment or URL contains one. The name of a file can.
function trim(setting: Setting): Setting {
  return { ...setting, value: setting.value.trim() };
}

function buildSquareSettings(token: string, environment: string, baseUrl: string): SquareSettings {
  if (baseUrl !== "" && URL.canParse(baseUrl)) {
    const { origin, pathname } = new URL(baseUrl);
    return { environment: "offline", token, baseUrl: (origin + pathname).replace(/\/+$/, "") };
  }
  const name = environment || DEFAULT_ENVIRONMENT;
  return { environment: name, token, baseUrl: SQUARE_HOSTS.get(name) ?? "" };
}

function checkDatabasePath(setting: Setting): Problem[] {
  const { value, source } = setting;
  if (value === "" && source === "--db") return [describe(setting, "is empty")];
  if (hasQuotes(value)) return [describe(setting, QUOTES)];
  if (INVISIBLE_CHARACTER.test(value))
    return [describe(setting, "contains an invisible character, such as a line break")];
  if (value !== value.trim()) return [describe(setting, "begins or ends with a space")];
  // Each of these would make a file or a folder with this name.
  if (/^(~[\\/]|\$)/.test(value))
    return [describe(setting, "begins with ~ or $, which only a shell replaces")];
  if (/^(:memory:$|(file|sqlite3?):)/i.test(value))
    return [describe(setting, "must be the path of a file, not a URL")];
  return [];
}

function checkToken(setting: Setting): Problem[] {
  const { value, source } = setting;
  if (value === "") return [describe(setting, source === "nowhere" ? "is not set" : "is empty")];
  if (hasQuotes(value)) return [describe(setting, QUOTES)];
  if (!/^[\x21-\x7e]+$/.test(value))
    return [
      describe(
        setting,
        "contains a space, a line break (unclosed quote?) or another invalid character",
      ),
    ];
  return [];
}

function checkEnvironment(setting: Setting): Problem[] {
  const { value } = setting;
  if (hasQuotes(value)) return [describe(setting, QUOTES)];
  if (value === "" || SQUARE_HOSTS.has(value)) return [];
  return [describe(setting, "must be sandbox or production")];
}

function checkBaseUrl(setting: Setting): Problem[] {
  const { value } = setting;
  if (value === "") return [];
  if (hasQuotes(value)) return [describe(setting, QUOTES)];
  const url = URL.canParse(value) ? new URL(value) : undefined;
  const isLoopback = LOOPBACK_HOST.test(url?.hostname ?? "");
  if (url?.protocol !== "https:" && !(url?.protocol === "http:" && isLoopback))
    return [describe(setting, "must be an https:// URL (http:// only for localhost)")];
  if (url.username || url.password || /[?#\s]/.test(value))
    return [describe(setting, "must not contain a user name, password, query or space")];
  if (/\/v2\/*$/.test(url.pathname))
    return [describe(setting, "must not end in /v2: leave that out")];
  // Otherwise the run would call itself offline and work on real customers.
  for (const [environment, host] of SQUARE_HOSTS)
    if (url.origin === host)
      return [describe(setting, `is Square's own: set SQUARE_ENVIRONMENT=${environment} instead`)];
  return [];
}

// dotenv removes quotes, Docker's --env-file does not.
function hasQuotes(value: string): boolean {
  return /^["'`“”‘’]|["'`“”‘’]$/.test(value.trim());
}

function describe({ name, source }: Setting, state: string): Problem {
  const fixes = {
    "--db": "give --db another path",
    "the environment": `correct ${name} in the environment, which overrides ${ENV_FILE}`,
    [ENV_FILE]: `edit ${resolve(ENV_FILE)}`,
    nowhere: describeFirstSetup(name),
  };
  return { text: `${name} ${state}`, fix: fixes[source] };
}

function describeFirstSetup(name: string): string {
  let step = `create ${resolve(ENV_FILE)} with ${name}=…`;
  if (existsSync(ENV_FILE)) step = `add ${name}=… to ${resolve(ENV_FILE)}`;
  else if (existsSync(".env.example")) step = "cp .env.example .env, and fill it in";
  const demo = findPackageCommand("demo", "fixtures/demo.ts");
  return demo === undefined ? step : `${step}; without a Square account: ${demo}`;
}

interface EnvFile {
  values: Record<string, string>;
  problem?: Problem;
  /** The file may exist or not: it could not be read. */
  isUnreadable?: boolean;
}

async function readEnvFile(): Promise<EnvFile> {
  const path = resolve(ENV_FILE);
  let bytes: Uint8Array;
  try {
    bytes = readFileSync(ENV_FILE);
  } catch (error) {
    if (codeOf(error) === "ENOENT") return { values: {} };
    const fix = IS_DENO
      ? `add --allow-read=${ENV_FILE}, or set all variables in the environment`
      : `make ${path} a file that you may read`;
    const problem = { text: `${ENV_FILE} cannot be read: ${messageOf(error)}`, fix };
    return { values: {}, problem, isUnreadable: true };
  }
  // In UTF-16, every second byte of an ASCII text is 0. In UTF-8, no byte of a text is.
  const isUtf16 = bytes.includes(0);
  const text = decodeUtf8(bytes);
  if (text === undefined || isUtf16) {
    const state = isUtf16 ? "is in UTF-16, as PowerShell writes it" : "is not valid UTF-8";
    return {
      values: {},
      problem: { text: `${ENV_FILE} ${state}`, fix: `save ${path} again as UTF-8` },
    };
  }
  // Loaded here because --help, and a run that has everything in the environment, do not need it.
  const { parse } = await import("dotenv");
  return { values: parse(text) };
}

function decodeUtf8(bytes: Uint8Array): string | undefined {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    return undefined;
  }
}
