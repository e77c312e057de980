/**
 * Reads the configuration from --db, the environment and the file `.env`, and checks all of it
 * before a script does any work.
 */
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import type { SquareSettings } from "./context.ts";
import { codeOf, messageOf, SyncError } from "./errors.ts";
import { fileExists, findPackageCommand, IS_DENO } from "./suggest.ts";
import { isValidUtf8 } from "./utf8.ts";

/**
 * The URLs of Square by environment. They are repeated here, because loading the SDK takes about a
 * second. A test compares them with the SDK.
 */
export const SQUARE_HOSTS = new Map([
  ["production", "https://connect.squareup.com"],
  ["sandbox", "https://connect.squareupsandbox.com"],
]);

const ENV_FILE = ".env";
const DEFAULT_DATABASE = "database.db";

// The default is not production, so that no run changes real customers by accident.
const DEFAULT_ENVIRONMENT = "sandbox";

const LOOPBACK_HOST = /^(localhost|127(\.\d+){3}|\[::1\])$/;

// Control characters such as line breaks, and characters without width, which copied text can have.
const INVISIBLE_CHARACTER = /[\p{Cc}\p{Zl}\p{Zp}\u200b\ufeff]/u;

const QUOTES = "has quotes around it, or an unclosed quote";

export interface Configuration {
  databasePath: string;
  /** For a script that does not use Square, all values are empty. */
  square: SquareSettings;
}

/** A wrong setting. Its text never contains the value, because a value can be a misplaced token. */
interface Problem {
  text: string;
  /** The next step, for the `Try:` line. */
  fix: string;
}

/** The place of a value, so that the next step can name the place to correct. */
type Source = "--db" | "variable" | typeof ENV_FILE | "nowhere";

interface Setting {
  name: string;
  value: string;
  source: Source;
}

/**
 * Reads the configuration. A variable of the environment overrides `.env`, even if it is empty.
 * @param dbOption the value of `--db`, which overrides DATABASE_PATH
 * @throws SyncError (usage) with all problems at once
 */
export async function readConfiguration(
  dbOption: string | undefined,
  needsSquare: boolean,
): Promise<Configuration> {
  const file = await readEnvFile();
  const read = (name: string): Setting => {
    const value = process.env[name];
    if (value !== undefined) return { name, value, source: "variable" };
    const fileValue = file.values[name];
    if (fileValue !== undefined) return { name, value: fileValue, source: ENV_FILE };
    return { name, value: "", source: "nowhere" };
  };
  const database: Setting =
    dbOption === undefined
      ? read("DATABASE_PATH")
      : { name: "--db", value: dbOption, source: "--db" };
  const problems = checkDatabasePath(database);

  // DATABASE_PATH is required here although it has a default, because an unreadable `.env` may name
  // another database.
  const required = needsSquare ? [database, read("SQUARE_ACCESS_TOKEN")] : [database];
  const fileProblem = findFileProblem(file, required);

  let square: SquareSettings = { environment: "", token: "", baseUrl: "" };
  if (fileProblem !== undefined) {
    // Do not check the other settings: they would be reported as missing although `.env` has them.
    problems.push(fileProblem);
  } else if (needsSquare) {
    const token = trim(read("SQUARE_ACCESS_TOKEN"));
    const environment = trim(read("SQUARE_ENVIRONMENT"));
    const baseUrl = trim(read("SQUARE_BASE_URL"));
    problems.push(...checkToken(token), ...checkEnvironment(environment), ...checkBaseUrl(baseUrl));
    // If a value is invalid, these settings are not used: the problems are thrown below.
    square = buildSquareSettings(token.value, environment.value, baseUrl.value);
  }
  if (problems.length > 0) {
    const texts = problems.map(({ text }) => text);
    const fixes = new Set(problems.map(({ fix }) => fix));
    throw new SyncError("usage", `Cannot start: ${texts.join("; ")}`, [...fixes].join("; "));
  }
  return { databasePath: database.value || DEFAULT_DATABASE, square };
}

/** Returns the problem of `.env` to report, if there is one. */
function findFileProblem(file: EnvFile, required: readonly Setting[]): Problem | undefined {
  // A file in a wrong encoding has settings that would silently be missing.
  if (!file.isUnreadable) return file.problem;
  // A file that cannot be read matters only if a required setting is in no other place. Otherwise
  // Deno may have no permission to read it, or a container may have a folder with this name.
  return required.some(({ source }) => source === "nowhere") ? file.problem : undefined;
}

// Removes spaces and carriage returns around a token, an environment or a URL. They are never part
// of one, and come, for example, from a file for `docker --env-file` that was written on Windows.
// The path of a database file is not trimmed. checkDatabasePath reports a space around it, because
// the name of a file can begin or end with a space.
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
  if (value === "" && source === "--db") return [buildProblem(setting, "is empty")];
  if (hasQuotes(value)) return [buildProblem(setting, QUOTES)];
  if (INVISIBLE_CHARACTER.test(value))
    return [buildProblem(setting, "contains an invisible character, such as a line break")];
  if (value !== value.trim()) return [buildProblem(setting, "begins or ends with a space")];
  // Without the next two checks, the script would create a file or folder with exactly this name,
  // for example `~` or `:memory:`.
  if (/^(~([\\/]|$)|\$)/.test(value))
    return [buildProblem(setting, "begins with ~ or $, which only a shell replaces")];
  if (/^(:memory:$|(file|sqlite3?):)/i.test(value))
    return [buildProblem(setting, "must be the path of a file, not a URL or a database in memory")];
  return [];
}

function checkToken(setting: Setting): Problem[] {
  const { value, source } = setting;
  if (value === "")
    return [buildProblem(setting, source === "nowhere" ? "is not set" : "is empty")];
  if (hasQuotes(value)) return [buildProblem(setting, QUOTES)];
  if (!/^[\x21-\x7e]+$/.test(value))
    return [
      buildProblem(
        setting,
        "contains a space, a line break (unclosed quote?) or another invalid character",
      ),
    ];
  return [];
}

function checkEnvironment(setting: Setting): Problem[] {
  const { value } = setting;
  if (hasQuotes(value)) return [buildProblem(setting, QUOTES)];
  if (value === "" || SQUARE_HOSTS.has(value)) return [];
  return [buildProblem(setting, "must be sandbox or production")];
}

function checkBaseUrl(setting: Setting): Problem[] {
  const { value } = setting;
  if (value === "") return [];
  if (hasQuotes(value)) return [buildProblem(setting, QUOTES)];
  const url = URL.canParse(value) ? new URL(value) : undefined;
  const isHttps = url?.protocol === "https:";
  const isLocalHttp = url?.protocol === "http:" && LOOPBACK_HOST.test(url.hostname);
  if (url === undefined || !(isHttps || isLocalHttp))
    return [buildProblem(setting, "must be an https:// URL (http:// only for localhost)")];
  if (url.username || url.password || /[?#\s]/.test(value))
    return [buildProblem(setting, "must not contain a user name, password, query or space")];
  if (/\/v2\/*$/.test(url.pathname))
    return [buildProblem(setting, "must not end in /v2: leave that out")];
  // With SQUARE_BASE_URL, the environment is named offline. With a URL of Square, that would be
  // wrong, and the run would work on real customers.
  for (const [environment, squareUrl] of SQUARE_HOSTS)
    if (url.origin === squareUrl)
      return [
        buildProblem(setting, `is Square's own: set SQUARE_ENVIRONMENT=${environment} instead`),
      ];
  return [];
}

// dotenv removes the quotes around a value, but Docker's --env-file keeps them.
function hasQuotes(value: string): boolean {
  return /^["'`“”‘’]|["'`“”‘’]$/.test(value.trim());
}

function buildProblem({ name, source }: Setting, state: string): Problem {
  const fixes = {
    "--db": "give --db another path",
    variable: `correct ${name} in the environment, which overrides ${ENV_FILE}`,
    [ENV_FILE]: `edit ${resolve(ENV_FILE)}`,
    nowhere: findSetupStep(name),
  };
  return { text: `${name} ${state}`, fix: fixes[source] };
}

/** Finds the next step for a missing setting. It names only files and commands that exist. */
function findSetupStep(name: string): string {
  const path = resolve(ENV_FILE);
  let step = `create ${path} with ${name}=…`;
  if (fileExists(ENV_FILE)) step = `add ${name}=… to ${path}`;
  else if (fileExists(".env.example")) step = "cp .env.example .env, and fill it in";
  const demo = findPackageCommand("demo", "fixtures/demo.ts");
  return demo === undefined ? step : `${step}; without a Square account: ${demo}`;
}

interface EnvFile {
  values: Record<string, string>;
  /** The reason why the file has no values. A file that does not exist is not a problem. */
  problem?: Problem;
  /** True if the file could not be read. Under Deno, such a file may not even exist. */
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
  // UTF-16 stores the letter A as two bytes, and one of them is 0. UTF-8 text has no such byte.
  const isUtf16 = bytes.includes(0);
  if (isUtf16 || !isValidUtf8(bytes)) {
    const state = isUtf16 ? "is in UTF-16, as PowerShell writes it" : "is not valid UTF-8";
    return {
      values: {},
      problem: { text: `${ENV_FILE} ${state}`, fix: `save ${path} again as UTF-8` },
    };
  }
  // Loaded here, because a run without the file .env does not need it.
  const { parse } = await import("dotenv");
  return { values: parse(new TextDecoder().decode(bytes)) };
}
