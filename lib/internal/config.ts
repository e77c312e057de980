/**
 * Reads the configuration from --db, the environment and the file `.env`, and checks all of it
 * before a script does any work.
 */
import { readFileSync, statSync } from "node:fs";
import { SyncError } from "./errors.ts";

/**
 * The URLs of Square by environment. They are repeated here, because loading the SDK takes about a
 * second. A test compares them with the SDK.
 */
export const SQUARE_HOSTS = new Map([
  ["production", "https://connect.squareup.com"],
  ["sandbox", "https://connect.squareupsandbox.com"],
]);

/** The Square account of a run. All are empty for a script that does not use Square. */
export interface SquareSettings {
  /** `sandbox`, `production`, or `offline` if SQUARE_BASE_URL names another server. */
  environment: string;
  token: string;
  /** For example `https://connect.squareup.com`, without a slash at the end. */
  baseUrl: string;
}

/**
 * Reads the configuration. A variable of the environment overrides `.env`, even if it is empty.
 * @param dbOption the value of `--db`, which overrides DATABASE_PATH
 * @throws SyncError (usage) with all problems at once. No message contains a value, because a value
 *   can be a misplaced token
 */
export async function readConfiguration(
  dbOption: string | undefined,
  needsSquare: boolean,
  warn: (text: string) => void,
): Promise<{ databasePath: string; square: SquareSettings }> {
  const file = await readEnvFile();
  const problems: string[] = [];
  const read = (name: string): string => {
    const value = (process.env[name] ?? file[name] ?? "").trim();
    // dotenv removes the quotes around a value, but Docker's --env-file keeps them.
    if (/^["'`“”‘’]|["'`“”‘’]$/.test(value)) problems.push(`${name} has quotes around it`);
    return value;
  };

  const databasePath = dbOption ?? (read("DATABASE_PATH") || "database.db");
  // A script would create a file with exactly this name.
  if (/^$|^~|^\$|^:memory:$|^file:/.test(databasePath))
    problems.push("the path of the database is not the path of a file");
  const square = { environment: "", token: "", baseUrl: "" };
  if (needsSquare) {
    square.token = read("SQUARE_ACCESS_TOKEN");
    if (square.token === "") problems.push("SQUARE_ACCESS_TOKEN is not set");
    else if (!/^[\x21-\x7e]+$/.test(square.token))
      problems.push("SQUARE_ACCESS_TOKEN contains a space, a line break or an invalid character");
    // The default is not production, so that no run changes real customers by accident.
    square.environment = read("SQUARE_ENVIRONMENT") || "sandbox";
    const host = SQUARE_HOSTS.get(square.environment);
    if (host === undefined) problems.push("SQUARE_ENVIRONMENT must be sandbox or production");
    const url = read("SQUARE_BASE_URL");
    square.baseUrl = url === "" ? (host ?? "") : url.replace(/\/+$/, "");
    if (url !== "") {
      problems.push(...checkBaseUrl(url));
      if (square.environment === "production")
        warn(
          "SQUARE_BASE_URL is set, so SQUARE_ENVIRONMENT=production is ignored: remove it to reach Square",
        );
      square.environment = "offline";
    }
  }
  if (problems.length === 0) return { databasePath, square };
  const nextStep = "correct .env in this folder, or the environment, which overrides it";
  throw new SyncError("usage", `Cannot start: ${problems.join("; ")}`, nextStep);
}

function checkBaseUrl(value: string): string[] {
  const url = URL.canParse(value) ? new URL(value) : undefined;
  const isLocal = /^(localhost|127(\.\d+){3}|\[::1\])$/.test(url?.hostname ?? "");
  if (url?.protocol !== "https:" && !(url?.protocol === "http:" && isLocal))
    return ["SQUARE_BASE_URL must be an https:// URL (http:// only for localhost)"];
  // With SQUARE_BASE_URL, the environment is named offline. With a URL of Square, that would be
  // wrong, and the run would work on real customers.
  if ([...SQUARE_HOSTS.values()].includes(url.origin))
    return ["SQUARE_BASE_URL is Square's own URL: set SQUARE_ENVIRONMENT instead"];
  return [];
}

async function readEnvFile(): Promise<Record<string, string>> {
  // Without the file, and for a folder with this name, all settings come from the environment.
  if (statSync(".env", { throwIfNoEntry: false })?.isDirectory() ?? true) return {};
  const text = new TextDecoder().decode(readFileSync(".env"));
  // U+FFFD replaces bytes that are not UTF-8. UTF-16 from PowerShell has a NUL in each letter.
  if (text.includes("\ufffd") || text.includes("\0"))
    throw new SyncError("usage", "Cannot start: .env is not UTF-8 text", "save it again as UTF-8");
  // Loaded here, because a run without the file .env does not need it.
  const { parse } = await import("dotenv");
  return parse(text);
}
