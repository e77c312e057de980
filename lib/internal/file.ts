/**
 * Changes a file in one short step. sql.js works on a copy of the file in memory, and other programs
 * do not see that it uses the file. So a step prevents three things:
 *
 * - A crash leaves a half-written file. The new content is written to `<path>.tmp`, flushed, and
 *   renamed.
 * - Two scripts save their own copies, and the last one wins. `<path>.tmp` is created exclusively
 *   before the file is read, so it is also the lock.
 * - A save erases what another program wrote meanwhile. The file is compared right before the
 *   rename, and left alone while a -wal, -shm or -journal file shows that it is in use.
 *
 * Hand-written because write-file-atomic and atomically use random temporary names and need
 * --allow-sys, which fail under Deno's narrow permissions, and proper-lockfile does not see a
 * suspended owner.
 */
import * as fs from "node:fs";
import { dirname } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { codeOf, isDeniedByDeno, messageOf, SyncError } from "./errors.ts";

// A lock that is older than this is the leftover of a killed script. A step takes seconds at most.
const LEFTOVER_MS = 60_000;
const POLL_MS = 50;

/** Computes what to save from the content of the file. With `undefined`, nothing is saved. */
type Change<T> = (bytes: Uint8Array) => { result: T; content: Uint8Array | undefined };

/** Ends an attempt, because another program uses the file. `repeat` makes the next one. */
class FileInUse extends Error {
  user = "another program";
  maxWaitMs = 5_000;
}

/** Another script has the lock. The wait is a little longer than a lock takes to be a leftover. */
class FileLocked extends FileInUse {
  override user = "another script";
  override maxWaitMs = 65_000;
}

/** Reads a whole file. A file that does not exist is read as an empty one. */
export async function readFile(path: string): Promise<Uint8Array> {
  return (await repeat(path, readOnce)).bytes;
}

/**
 * Reads a file, lets `change` compute the new content, and replaces the file. If the script is
 * killed, the path has either the old file or the new one.
 * @param change runs again if another program has changed the file meanwhile, so it must have no
 *   effects outside its result
 */
export async function changeFile<T>(path: string, change: Change<T>): Promise<T> {
  return await repeat(path, (target) => changeOnce(target, change));
}

/** Repeats an attempt while the file is in use. Turns an error of the file system into a message. */
async function repeat<T>(path: string, attempt: (target: string) => T): Promise<T> {
  const startedAt = performance.now();
  for (;;) {
    try {
      return attempt(resolvePath(path));
    } catch (error) {
      if (error instanceof FileInUse) {
        if (performance.now() - startedAt > error.maxWaitMs)
          throw new SyncError(
            "temporary",
            `Cannot use "${path}": ${error.user} has it open`,
            "close that program, or run it again later; if none is running: VACUUM in sqlite3",
          );
        await sleep(POLL_MS);
        continue;
      }
      // runScript has its own words for a permission that Deno lacks.
      if (codeOf(error) === "" || isDeniedByDeno(error)) throw error;
      const nextStep =
        "check the path, the permissions of its folder, and the free space of the disk";
      throw new SyncError("failed", `Cannot use "${path}": ${messageOf(error)}`, nextStep, error);
    }
  }
}

/** Makes one attempt to change the file. It is synchronous, so a signal cannot interrupt it. */
function changeOnce<T>(target: string, change: Change<T>): T {
  const lock = `${target}.tmp`;
  const handle = createLock(lock);
  try {
    const { bytes, fingerprint } = readOnce(target);
    const { result, content } = change(bytes);
    if (content === undefined) return result;
    fs.writeFileSync(handle, content);
    copyAccess(target, lock);
    // Flush the content before the rename. Otherwise the disk can store the new name first, and
    // after a power failure the file would be empty.
    fs.fsyncSync(handle);
    if (!isStillAt(lock, handle)) throw new FileLocked();
    requireFingerprint(target, fingerprint);
    rename(lock, target);
    flushFolder(dirname(target));
    return result;
  } finally {
    // After a rename, or if another script has replaced the lock, there is nothing to remove.
    if (isStillAt(lock, handle)) fs.rmSync(lock);
    fs.closeSync(handle);
  }
}

function createLock(lock: string): number {
  try {
    return fs.openSync(lock, "wx", 0o600);
  } catch (error) {
    if (codeOf(error) !== "EEXIST") throw error;
    // A wrong guess, for example after a change of the clock, is harmless: its owner compares the
    // lock before it renames, and begins again.
    const stats = fs.statSync(lock, { throwIfNoEntry: false });
    if (stats !== undefined && Math.abs(Date.now() - stats.mtimeMs) > LEFTOVER_MS)
      fs.rmSync(lock, { force: true });
    throw new FileLocked();
  }
}

/**
 * True if a path still leads to the file that was opened. If this computer slept during the step,
 * another script can have taken the lock for a leftover, and the path leads to its new lock.
 */
function isStillAt(path: string, handle: number): boolean {
  const opened = fs.fstatSync(handle, { bigint: true });
  const current = fs.statSync(path, { bigint: true, throwIfNoEntry: false });
  return current?.ino === opened.ino && current.dev === opened.dev;
}

function readOnce(target: string) {
  const fingerprint = readFingerprint(target);
  // A copy, because sql.js writes to the array that it is given.
  const bytes = new Uint8Array(fingerprint === "missing" ? [] : fs.readFileSync(target));
  // If another program wrote during the reading, the bytes can be partly old and partly new.
  requireFingerprint(target, fingerprint);
  return { bytes, fingerprint };
}

function requireFingerprint(target: string, fingerprint: string): void {
  if (readFingerprint(target) !== fingerprint) throw new FileInUse();
}

/** Identifies the content of a file by what changes with every commit of any program. */
function readFingerprint(target: string): string {
  // Committed rows can be in the -wal file only, which sql.js does not read. Besides, SQLite would
  // later copy the old -wal or -journal file into a file that replaced this one.
  const isOpen = fs.existsSync(`${target}-wal`) || fs.existsSync(`${target}-shm`);
  const journal = `${target}-journal`;
  const header = fs.existsSync(journal) ? fs.readFileSync(journal).subarray(0, 28) : [];
  // After a transaction, a journal is deleted, empty, or has a header of zeros. SQLite writes the
  // first 12 of its 28 bytes last, so they are 0 in an open transaction too.
  if (isOpen || header.some((byte) => byte !== 0)) throw new FileInUse();
  const stats = fs.statSync(target, { bigint: true, throwIfNoEntry: false });
  if (stats === undefined) return "missing";
  return [stats.size, stats.ino, stats.mtimeNs, stats.ctimeNs].join(" ");
}

/** Gives the temporary file the mode, owner and group of the file that it will replace. */
function copyAccess(target: string, temporary: string): void {
  const old = fs.statSync(target, { throwIfNoEntry: false });
  if (old === undefined) return; // A new file keeps 0600, because it has personal data.
  if ((old.mode & 0o200) === 0)
    throw new SyncError("failed", `Cannot save "${target}": it is read-only`, "make it writable");
  try {
    fs.chmodSync(temporary, old.mode & 0o777);
    fs.chownSync(temporary, fs.statSync(temporary).uid, old.gid);
    fs.chownSync(temporary, old.uid, old.gid);
  } catch {
    // Only a member of the group may keep the group, and only root may keep another owner. A save
    // does not fail because of that.
  }
}

function rename(from: string, to: string): void {
  try {
    fs.renameSync(from, to);
  } catch (error) {
    // Windows refuses a rename while a viewer has the target open.
    if (!["EPERM", "EACCES", "EBUSY"].includes(codeOf(error))) throw error;
    throw new FileInUse();
  }
}

/** Flushes the folder, which stores the new name. Otherwise a power failure restores the old file. */
function flushFolder(folder: string): void {
  try {
    const handle = fs.openSync(folder, "r");
    fs.fsyncSync(handle);
    fs.closeSync(handle);
  } catch {
    // Windows and some network file systems cannot do this. The rename itself is complete.
  }
}

/**
 * Returns the path of the file to read and replace. A symbolic link is followed. Otherwise a save
 * would replace the link, and the file that it points to would keep the old content.
 */
function resolvePath(path: string): string {
  const isLink = fs.lstatSync(path, { throwIfNoEntry: false })?.isSymbolicLink() ?? false;
  const target = isLink ? fs.realpathSync(path) : path;
  const stats = fs.statSync(target, { throwIfNoEntry: false });
  if (stats === undefined || stats.isFile()) return target;
  throw new SyncError("usage", `Cannot use "${path}": it is not a file`, "another file with --db");
}
