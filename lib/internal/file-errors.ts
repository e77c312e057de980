/** Creates errors for the user from errors of the file system, with a next step for each cause. */
import { dirname } from "node:path";
import { codeOf, type ErrorKind, messageOf, SyncError } from "./errors.ts";

const NO_PERMISSION =
  "give the user who runs it read and write permission for the file and its folder";
const TOO_MANY_FILES = "close other programs, or raise the limit of open files (ulimit -n)";
const FOLDER_IN_THE_WAY = "rename or remove the folder that has this name";
const NO_FOLDER = "create the folder, or name another file with --db";

const NEXT_STEPS: Record<string, string> = {
  EACCES: NO_PERMISSION,
  EBUSY: "close the program that uses the file; in a container, mount its folder and not the file",
  EDQUOT: "free disk space or raise the disk quota of the user",
  EFBIG: "raise the limit of the file size (ulimit -f), or move the file to another file system",
  EIO: "check the disk and restore a backup if the file is damaged",
  EISDIR: FOLDER_IN_THE_WAY,
  EMFILE: TOO_MANY_FILES,
  ENAMETOOLONG: "name a file with a shorter path with --db",
  ENFILE: TOO_MANY_FILES,
  ENOENT: NO_FOLDER,
  ENOSPC: "free disk space",
  ENOTDIR: NO_FOLDER,
  EPERM: NO_PERMISSION,
  ERR_FS_EISDIR: FOLDER_IN_THE_WAY,
  EROFS: "move the file to a folder that is not read-only, and name it with --db",
};

/**
 * Creates the error `Cannot <action> "<path>": <message of the system>`, for example `Cannot save
 * "database.db": ENOSPC: no space left on device, write`. Returns a SyncError unchanged.
 */
export function createFileError(
  action: string,
  path: string,
  error: unknown,
  kind: ErrorKind = "failed",
): SyncError {
  if (error instanceof SyncError) return error;
  const message = `Cannot ${action} "${path}": ${messageOf(error)}`;
  return new SyncError(kind, message, findNextStep(path, error), error);
}

function findNextStep(path: string, error: unknown): string {
  if (isDeniedByDeno(error)) {
    const writtenFiles = [path, `${path}.tmp`, `${path}.lock`].join(",");
    return `deno run with --allow-read=${dirname(path)} and --allow-write=${writtenFiles}`;
  }
  return (
    NEXT_STEPS[codeOf(error)] ?? "copy the file to another folder, and name the copy with --db"
  );
}

/** Creates the temporary error for a file that another script or program uses. */
export function createBusyError(path: string, state: string, nextStep: string): SyncError {
  return new SyncError("temporary", `Cannot use "${path}": ${state}`, nextStep);
}

/** Whether Deno denied access for lack of a permission. Such an error has a name, but no code. */
export function isDeniedByDeno(error: unknown): boolean {
  return error instanceof Error && error.name === "NotCapable";
}
