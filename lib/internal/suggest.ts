/**
 * Builds commands for the `Try:` line of an error. Each command works as it is printed: in the
 * current working directory, with the runtime in use, and with files that exist. That matters when
 * a user has copied a single script to another project.
 */
import { existsSync, readFileSync } from "node:fs";
import { dirname, extname, join, relative } from "node:path";
import { isRecord } from "./json.ts";

export const IS_DENO = "Deno" in globalThis;
export const IS_BUN = "bun" in process.versions;

/**
 * Builds the command that runs another script, for example `npm run init-db` in the project folder,
 * and `npx tsx ../kit/scripts/init-db.ts` in another folder.
 * @param args options for the script, already quoted where needed
 * @returns undefined if the other script does not exist next to the running one
 */
export function buildCommand(script: string, args = ""): string | undefined {
  const runningFile = process.argv[1];
  if (runningFile === undefined) return undefined;
  const file = join(dirname(runningFile), script + extname(runningFile));
  if (!fileExists(file)) return undefined;

  const path = formatRelativePath(file);
  const packageCommand = findPackageCommand(script, path, args);
  return packageCommand ?? appendArgs(`${findRunner(file)} ${quoteArgument(path)}`, args);
}

/**
 * Finds the command of package.json that runs a file, for example `npm run demo`.
 * @param name the name of the command in package.json
 * @param path the file, relative to the current working directory
 * @returns undefined if the file does not exist, or if the package.json of the current working
 *   directory has no such command
 */
export function findPackageCommand(name: string, path: string, args = ""): string | undefined {
  // `bun run` would start the command of package.json with Node, which may not be installed.
  if (IS_BUN || !fileExists(path) || !readPackageScript(name).includes(path)) return undefined;
  if (IS_DENO) return appendArgs(`deno task ${name}`, args);
  return appendArgs(`npm run ${name}`, args && `-- ${args}`);
}

/** True if a file exists. Deno throws if it may not look; the file is then not suggested. */
export function fileExists(path: string): boolean {
  try {
    return existsSync(path);
  } catch {
    return false;
  }
}

/** Puts quotes around an argument that a shell would split or expand. */
export function quoteArgument(text: string): string {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `"${text.replace(/["$`\\]/g, "\\$&")}"`;
}

/** Returns the command that runs a TypeScript file with the runtime in use. */
function findRunner(file: string): string {
  if (IS_DENO) return "deno run -A";
  if (IS_BUN) return "bun";
  // Newer versions of Node run TypeScript without tsx.
  const usesTsx = [...process.execArgv, process.env.NODE_OPTIONS].join(" ").includes("tsx");
  return usesTsx ? findTsx(file) : "node";
}

/**
 * Returns `npx tsx`, with --prefix where npx needs it. npx looks for tsx in node_modules of the
 * current working directory and of the folders above it. If it finds none, it downloads tsx, or
 * fails without a network. So outside the project of the script, --prefix names the folder that has
 * tsx.
 */
function findTsx(file: string): string {
  for (let folder = dirname(file); folder !== dirname(folder); folder = dirname(folder)) {
    if (!fileExists(join(folder, "node_modules", "tsx"))) continue;
    const isCwdInside = !relative(folder, process.cwd()).startsWith("..");
    return isCwdInside
      ? "npx tsx"
      : `npx --prefix ${quoteArgument(formatRelativePath(folder))} tsx`;
  }
  return "npx tsx";
}

/** Reads a command of package.json. Returns an empty text if it does not exist. */
function readPackageScript(name: string): string {
  try {
    const manifest: unknown = JSON.parse(readFileSync("package.json", "utf8"));
    const scripts = isRecord(manifest) ? manifest.scripts : undefined;
    const command = isRecord(scripts) ? scripts[name] : undefined;
    return typeof command === "string" ? command : "";
  } catch {
    // package.json does not exist, is invalid, or Deno has no permission to read it. The suggested
    // command then names the file instead.
    return "";
  }
}

/** Formats a path relative to the current working directory, with `/` on Windows too. */
function formatRelativePath(path: string): string {
  return relative(process.cwd(), path).replaceAll("\\", "/");
}

function appendArgs(command: string, args: string): string {
  return args === "" ? command : `${command} ${args}`;
}
