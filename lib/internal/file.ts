/**
 * Changes a file in one short step. sql.js works on a copy of the file in memory, and other programs
 * do not see that it uses the file. Without this step, three things could go wrong:
 *
 * - A crash could leave a half-written file. So the new content is written to `<path>.tmp`, flushed,
 *   and renamed.
 * - Two scripts could each save their own copy, and the last one would win. So `<path>.tmp` is
 *   created exclusively before the file is read. It is also the lock.
 * - A save could erase what another program wrote meanwhile. So the file is compared right before
 *   the rename, and it is left alone while SQLite's -wal, -shm or -journal file shows that another
 *   program has it open.
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

// How long a step waits. For a lock, that is a little longer than it takes to become a leftover.
const LOCK_WAIT_MS = 65_000;
const PROGRAM_WAIT_MS = 5_000;
const POLL_MS = 50;

// The header of a rollback journal. After a transaction, it is all zeros or the file is gone.
const JOURNAL_HEADER_BYTES = 28;

/** The result of an attempt, or who has the file in use, so that the attempt is made again. */
type Attempt<T> = { result: T } | { busy: "another script" | "another program" };

/** The content of a file, and what identifies it. */
interface Content {
  /** Empty for a file that does not exist. */
  bytes: Uint8Array<ArrayBuffer>;
  fingerprint: string;
}

/**
 * Reads a whole file. A file that does not exist is read as an empty one.
 * @throws SyncError (temporary) if another program has it open for more than five seconds
 */
export async function readFile(path: string): Promise<Uint8Array> {
  const target = resolvePath(path);
  return (await repeat(path, () => readOnce(target))).bytes;
}

/**
 * Reads a file, lets `change` compute the new content, and replaces the file. If the script is
 * killed, the path has either the old file or the new one. `change` runs again if another program
 * has changed the file meanwhile, so it must not have effects of its own.
 * @param change returns the content to save; undefined = do not save
 * @throws SyncError (temporary) if the file stays in use, and what `change` throws
 */
export async function changeFile<T>(
  path: string,
  change: (bytes: Uint8Array) => { result: T; content: Uint8Array | undefined },
): Promise<T> {
  const target = resolvePath(path);
  return await repeat(path, () => changeOnce(target, change));
}

/** Repeats an attempt while the file is in use. */
async function repeat<T>(path: string, attempt: () => Attempt<T>): Promise<T> {
  let waitsFor = "";
  let waitsSince = 0;
  for (;;) {
    let outcome: Attempt<T>;
    try {
      outcome = attempt();
    } catch (error) {
      throw createFileError(path, error);
    }
    if ("result" in outcome) return outcome.result;
    const { busy } = outcome;
    if (busy !== waitsFor) waitsSince = performance.now();
    waitsFor = busy;
    const limit = busy === "another script" ? LOCK_WAIT_MS : PROGRAM_WAIT_MS;
    if (performance.now() - waitsSince > limit)
      throw new SyncError(
        "temporary",
        `Cannot use "${path}": ${busy} has it open`,
        "close that program, or run it again later; if none is running: VACUUM in sqlite3",
      );
    await sleep(POLL_MS);
  }
}

/** Makes one attempt to change the file. It is synchronous, so a signal cannot interrupt it. */
function changeOnce<T>(
  target: string,
  change: (bytes: Uint8Array) => { result: T; content: Uint8Array | undefined },
): Attempt<T> {
  const temporary = `${target}.tmp`;
  const handle = createLock(temporary);
  if (handle === undefined) return { busy: "another script" };
  const created = fs.fstatSync(handle, { bigint: true });
  // If this computer slept during the step, another script can have taken the lock for a leftover
  // and replaced it. Then the name belongs to the other script's file, which may be empty still.
  const isOwnLock = (): boolean => {
    const current = fs.statSync(temporary, { bigint: true, throwIfNoEntry: false });
    return current !== undefined && current.ino === created.ino && current.dev === created.dev;
  };
  try {
    const read = readOnce(target);
    if ("busy" in read) return read;
    const { bytes, fingerprint } = read.result;
    const { result, content } = change(bytes);
    if (content === undefined) return { result };
    fs.writeFileSync(handle, content);
    copyAccess(target, temporary);
    // Flush the content before the rename. Otherwise the disk can store the new name first, and
    // after a power failure the file would be empty.
    fs.fsyncSync(handle);
    // Compare as late as possible, because everything before this takes time.
    if (!isOwnLock()) return { busy: "another script" };
    if (readFingerprint(target) !== fingerprint) return { busy: "another program" };
    if (!rename(temporary, target)) return { busy: "another program" };
    flushFolder(dirname(target));
    return { result };
  } finally {
    const isOwn = isOwnLock();
    fs.closeSync(handle);
    if (isOwn) fs.rmSync(temporary);
  }
}

/** Creates the lock, and returns its handle; undefined if another script has it. */
function createLock(temporary: string): number | undefined {
  try {
    return fs.openSync(temporary, "wx", 0o600);
  } catch (error) {
    if (codeOf(error) !== "EEXIST") throw error;
  }
  const lock = fs.statSync(temporary, { throwIfNoEntry: false });
  // A wrong guess, for example after a change of the clock, is harmless: its owner compares the
  // lock before it renames, and begins again.
  if (lock !== undefined && Math.abs(Date.now() - lock.mtimeMs) > LEFTOVER_MS)
    fs.rmSync(temporary, { force: true });
  return undefined;
}

function readOnce(target: string): Attempt<Content> {
  const fingerprint = readFingerprint(target);
  // A copy, because sql.js writes to the array that it is given.
  const bytes =
    fingerprint === "missing" ? new Uint8Array() : new Uint8Array(fs.readFileSync(target));
  // If another program wrote during the reading, the bytes can be partly old and partly new.
  const isUnchanged = fingerprint !== undefined && readFingerprint(target) === fingerprint;
  return isUnchanged ? { result: { bytes, fingerprint } } : { busy: "another program" };
}

/**
 * Identifies the content of a file by its size, inode and times, which change with every commit of
 * any program.
 * @returns `missing` for a file that does not exist; undefined while another program has it open
 */
function readFingerprint(target: string): string | undefined {
  // Committed rows can be in the -wal file only, which sql.js does not read. Besides, SQLite would
  // later copy the old -wal or -journal file into a file that replaced this one.
  const isOpen = fs.existsSync(`${target}-wal`) || fs.existsSync(`${target}-shm`);
  if (isOpen || hasLiveJournal(`${target}-journal`)) return undefined;
  const stats = fs.statSync(target, { bigint: true, throwIfNoEntry: false });
  if (stats === undefined) return "missing";
  return [stats.size, stats.ino, stats.mtimeNs, stats.ctimeNs].join(" ");
}

/** True if a journal belongs to an unfinished transaction. A finished one is empty or zeroed. */
function hasLiveJournal(journal: string): boolean {
  if (!fs.existsSync(journal)) return false;
  const handle = fs.openSync(journal, "r");
  try {
    // SQLite writes the first 12 bytes last, so they are 0 in an open transaction too.
    const header = new Uint8Array(JOURNAL_HEADER_BYTES);
    fs.readSync(handle, header);
    return header.some((byte) => byte !== 0);
  } finally {
    fs.closeSync(handle);
  }
}

/**
 * Gives the temporary file the mode, owner and group of the file that it will replace. A new file
 * keeps 0600, because it has personal data.
 */
function copyAccess(target: string, temporary: string): void {
  const old = fs.statSync(target, { throwIfNoEntry: false });
  if (old === undefined) return;
  if ((old.mode & 0o200) === 0)
    throw new SyncError("failed", `Cannot save "${target}": it is read-only`, "make it writable");
  const { uid, gid } = fs.statSync(temporary);
  // Only root may change the owner, and only a member of a group may give it a file. An owner or
  // group that cannot be kept is no reason to stop.
  const attempts = [
    () => old.gid !== gid && fs.chownSync(temporary, uid, old.gid),
    () => old.uid !== uid && fs.chownSync(temporary, old.uid, old.gid),
    () => fs.chmodSync(temporary, old.mode & 0o777),
  ];
  for (const attempt of attempts) {
    try {
      attempt();
    } catch {}
  }
}

/** Renames a file. Returns false if Windows refuses it because a viewer has the target open. */
function rename(from: string, to: string): boolean {
  try {
    fs.renameSync(from, to);
    return true;
  } catch (error) {
    if (["EPERM", "EACCES", "EBUSY"].includes(codeOf(error))) return false;
    throw error;
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
  try {
    const isLink = fs.lstatSync(path, { throwIfNoEntry: false })?.isSymbolicLink() ?? false;
    const target = isLink ? fs.realpathSync(path) : path;
    if (fs.statSync(target, { throwIfNoEntry: false })?.isFile() ?? true) return target;
  } catch (error) {
    throw createFileError(path, error);
  }
  throw new SyncError("usage", `Cannot use "${path}": it is not a file`, "another file with --db");
}

/** Turns an error of the file system into one for the user. Returns any other error unchanged. */
function createFileError(path: string, error: unknown): unknown {
  // runScript has its own words for a permission that Deno lacks.
  if (codeOf(error) === "" || isDeniedByDeno(error)) return error;
  return new SyncError(
    "failed",
    `Cannot use "${path}": ${messageOf(error)}`,
    "check the path, the permissions of its folder, and the free space of the disk",
    error,
  );
}
