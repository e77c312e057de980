/**
 * Commands for the `Try:` line of an error. They work from the folder in which the user stands, with the
 * runtime in use, and name only files that exist. So they also fit a copy of one script in another project.
 */
import { existsSync, readFileSync } from "node:fs";
import { dirname, extname, join, relative } from "node:path";

export const IS_DENO = "Deno" in globalThis;
export const IS_BUN = "bun" in process.versions;

/**
 * Returns the command that runs another script of the kit, for example `npm run init-db` in the project
 * folder and `npx tsx ../kit/scripts/init-db.ts` in another folder.
 * @param args options for the script, already quoted where needed
 * @returns undefined when no such file exists next to the running script
 */
export function commandFor(script: string, args = ""): string | undefined {
  const runningFile = process.argv[1];
  if (runningFile === undefined) return undefined;
  const file = join(dirname(runningFile), script + extname(runningFile));
  if (!existsSync(file)) return undefined;

  const path = relative(process.cwd(), file).replaceAll("\\", "/");
  const packageCommand = findPackageCommand(script, path, args);
  if (packageCommand !== undefined) return packageCommand;
  return appendArgs(`${findRunner(file)} ${quoteArgument(path)}`, args);
}

/**
 * Returns `npm run <name>` when package.json in the working directory has a script of this name that runs
 * this file, and the file exists.
 */
export function findPackageCommand(name: string, path: string, args = ""): string | undefined {
  // Bun would start npm's `tsx`, and with it Node, which may not be installed.
  if (IS_BUN || !existsSync(path) || !readPackageScript(name).includes(path)) return undefined;
  if (IS_DENO) return appendArgs(`deno task ${name}`, args);
  return appendArgs(`npm run ${name}`, args && `-- ${args}`);
}

/** Puts quotes around an argument that a shell would divide or expand. */
export function quoteArgument(text: string): string {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `"${text.replace(/["$`\\]/g, "\\$&")}"`;
}

function findRunner(file: string): string {
  if (IS_DENO) return "deno run -A";
  if (IS_BUN) return "bun";
  // Newer versions of Node run TypeScript without tsx.
  const usesTsx = [...process.execArgv, process.env.NODE_OPTIONS].join(" ").includes("tsx");
  return usesTsx ? findNpx(file) : "node";
}

// npx finds tsx in node_modules of the working directory and of the folders above it. From anywhere else it would
// download tsx, or fail without a network. So it is told where the script's own node_modules are.
function findNpx(file: string): string {
  for (let folder = dirname(file); folder !== dirname(folder); folder = dirname(folder)) {
    if (!existsSync(join(folder, "node_modules", "tsx"))) continue;
    const isInside = !relative(folder, process.cwd()).startsWith("..");
    const prefix = relative(process.cwd(), folder).replaceAll("\\", "/");
    return isInside ? "npx tsx" : `npx --prefix ${quoteArgument(prefix)} tsx`;
  }
  return "npx tsx";
}

function readPackageScript(name: string): string {
  try {
    const manifest: unknown = JSON.parse(readFileSync("package.json", "utf8"));
    const scripts = readProperty(manifest, "scripts");
    const command = readProperty(scripts, name);
    return typeof command === "string" ? command : "";
  } catch {
    // No package.json here, or Deno may not read it. The caller then names the file itself.
    return "";
  }
}

function readProperty(value: unknown, name: string): unknown {
  if (typeof value !== "object" || value === null) return undefined;
  return Object.getOwnPropertyDescriptor(value, name)?.value;
}

function appendArgs(command: string, args: string): string {
  return args === "" ? command : `${command} ${args}`;
}
