/**
 * Reading and replacing the database file safely. sql.js works on a copy of the file in memory and takes
 * no locks that other programs see. So these functions protect the file on disk:
 *
 * - from half-written files: the new file is written next to the old one, flushed, and then renamed;
 * - from lost changes: a fingerprint shows whether another program changed the file since it was read;
 * - from programs that have the file open: their -wal, -shm or -journal file shows that they do.
 *
 * Hand-written because write-file-atomic and atomically use random temporary names and need --allow-sys,
 * both of which fail under Deno's narrow permissions. The temporary file is always `<path>.tmp`.
 */
import * as fs from "node:fs";
import { dirname } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { codeOf, SyncError } from "./errors.ts";
import { busyError, fileError, isDeniedByDeno } from "./file-errors.ts";
import type { Lock } from "./lock.ts";

const POLL_MS = 100;
const WAIT_MS = 5_000; // how long another program is waited for
const MAX_BYTES = 1.9 * 2 ** 30; // Node cannot read 2 GiB in one call, and Deno cannot write it
const JOURNAL_HEADER_BYTES = 28;

/** What fsync of a folder, or opening it, reports where a folder cannot be flushed. */
const CANNOT_FLUSH = [
  "EACCES",
  "EBADF",
  "EINVAL",
  "EISDIR",
  "ENOSYS",
  "ENOTSUP",
  "EOPNOTSUPP",
  "EPERM",
];

/**
 * Finds the file that a path means. A symbolic link is followed, because a rename would replace the link
 * and leave the file behind it unchanged.
 * @throws SyncError (usage) for a folder or a device
 */
export function resolveDatabasePath(path: string): string {
  try {
    const isLink = fs.lstatSync(path, { throwIfNoEntry: false })?.isSymbolicLink();
    const resolved = isLink ? fs.realpathSync(path) : path;
    if (fs.statSync(resolved, { throwIfNoEntry: false })?.isFile() === false)
      throw new SyncError(
        "usage",
        `Cannot use "${path}": it is not a file`,
        "name another file with --db",
      );
    return resolved;
  } catch (error) {
    throw fileError("use", path, error, "usage");
  }
}

/**
 * Checks that the file can be replaced, so that a script does not read from Square or send anything
 * before it fails. Makes an empty temporary file as a save would, and removes it; also one that a killed
 * script left. Call it after acquireLock: the temporary file can belong to a running script otherwise.
 * @throws SyncError if a save would fail
 */
export function checkReplaceable(path: string): void {
  const temporary = `${path}.tmp`;
  try {
    fs.rmSync(temporary, { force: true });
    fs.closeSync(fs.openSync(temporary, "wx", 0o600));
    copyAccess(path, temporary);
    fs.rmSync(temporary);
    checkMount(path, temporary);
  } catch (error) {
    succeeds(() => fs.rmSync(temporary, { force: true }));
    throw fileError("save", path, error);
  }
}

/**
 * Checks that the file is not a mount by itself, such as `docker run -v ./database.db:/app/database.db`.
 * Nothing can be renamed over such a file (EBUSY).
 *
 * The system does not create a hard link from one mount to another (EXDEV), not even within a file system
 * that is mounted twice. So the attempt to link the file to the temporary name finds the mount. Comparing
 * device numbers would not: they are equal in a file system that is mounted twice.
 *
 * The link is removed at once. It is harmless if the script is killed before that, because the temporary
 * file is only ever removed or created, and never opened for writing when it exists.
 */
function checkMount(path: string, temporary: string): void {
  try {
    fs.linkSync(path, temporary);
  } catch (error) {
    // Other errors say nothing about mounts. The file may not exist yet, FAT has no hard links, and Linux
    // does not let users link some files of others.
    if (codeOf(error) !== "EXDEV") return;
    const message = `Cannot save "${path}": it is mounted as a single file and cannot be replaced`;
    const nextStep = "mount the folder that contains the file, for example with -v ./data:/data";
    throw new SyncError("failed", message, nextStep, error);
  }
  fs.rmSync(temporary);
}

/**
 * Reads a whole database file. A missing file is returned as an empty one.
 * @throws SyncError (temporary) if another program has it open for more than five seconds
 */
export async function readDatabaseFile(
  path: string,
): Promise<{ bytes: Uint8Array; fingerprint: string }> {
  const startedAt = performance.now();
  for (;;) {
    const fingerprint = readFingerprint(path);
    const bytes = readIfExists(path);
    // SQLite writes in place. If the file changed while it was read, the bytes can be half old, half new.
    // A file that another program has open gets another fingerprint each time, so it never passes here.
    if (readFingerprint(path) === fingerprint) return { bytes, fingerprint };
    if (performance.now() - startedAt > WAIT_MS) {
      const sql = "PRAGMA journal_mode = DELETE; SELECT count(*) FROM sqlite_schema";
      throw busyError(
        path,
        "another program has it open, or was stopped while it had it open",
        `close that program; if none is running: sqlite3 "${path}" "${sql}"`,
      );
    }
    await sleep(POLL_MS);
  }
}

/**
 * Replaces the database file in one step. After a crash at any moment, the path has the old file or the
 * new one, never a mixture.
 * @param expectedFingerprint of the file from which the bytes were made
 * @param warn is called if the new file's owner, group or mode differs from the old file's
 * @returns the fingerprint of the new file; or undefined if another program changed the file since it was
 *   read, and then nothing was replaced
 * @throws SyncError (temporary) if another script took over the lock
 */
export function replaceDatabaseFile(
  path: string,
  bytes: Uint8Array,
  expectedFingerprint: string,
  lock: Lock,
  warn: (text: string) => void,
): string | undefined {
  const temporary = `${path}.tmp`;
  checkOwned(path, lock);
  try {
    checkSize(path, bytes.byteLength);
    // The flag wx never opens an existing file, so it cannot write into a link that checkMount left.
    fs.rmSync(temporary, { force: true });
    fs.writeFileSync(temporary, bytes, { flag: "wx", mode: 0o600 });
    const warning = copyAccess(path, temporary);

    // Flush before the rename. Otherwise the disk may store the new name first, and after a power failure
    // the path would have an empty file.
    flush(temporary, "r+");

    // Writing took time. Check as late as possible that the file is still the one that was read.
    checkOwned(path, lock);
    if (readFingerprint(path) !== expectedFingerprint) return undefined;
    fs.renameSync(temporary, path);
    const fingerprint = readFingerprint(path);

    // Flush the folder, which stores the new name. Otherwise a power failure could bring back the old
    // file after a push has sent rows whose idempotency keys are only in the new one.
    flushFolder(dirname(path));
    if (warning) warn(warning);
    return fingerprint;
  } catch (error) {
    throw fileError("save", path, error);
  } finally {
    // Without the lock, the temporary file can belong to the script that took it over.
    if (lock.isOwned()) fs.rmSync(temporary, { force: true });
  }
}

/**
 * Reads what distinguishes one state of the file from the next. Size, inode and times change with every
 * commit of any program. A file that another program has open gets a random fingerprint, which never
 * equals another one, so that nothing is built on its content.
 * @throws SyncError if the file is too large
 */
export function readFingerprint(path: string): string {
  try {
    const stats = readStats(path);
    checkSize(path, stats?.size ?? 0);
    // Committed rows can be in the -wal file only, where sql.js does not see them. And SQLite would later
    // copy an old -wal or -journal file over the file that replaced the one it belongs to.
    if (readStats(`${path}-wal`) || readStats(`${path}-shm`) || hasHotJournal(path))
      return crypto.randomUUID();
    return stats ? [stats.size, stats.ino, stats.mtimeNs, stats.ctimeNs].join(" ") : "missing";
  } catch (error) {
    throw fileError("read", path, error);
  }
}

/** Whether the journal belongs to an unfinished transaction. That of a finished one starts with zeros. */
function hasHotJournal(path: string): boolean {
  if (!readStats(`${path}-journal`)) return false;
  const header = new Uint8Array(JOURNAL_HEADER_BYTES);
  try {
    const handle = fs.openSync(`${path}-journal`, "r");
    try {
      fs.readSync(handle, header, 0, header.length, 0);
    } finally {
      fs.closeSync(handle);
    }
  } catch (error) {
    if (codeOf(error) !== "ENOENT") throw error; // the other program has just removed it
  }
  return header.some((byte) => byte !== 0);
}

/**
 * Gives the temporary file the owner, group and mode of the file that it will replace. A new file keeps
 * its mode 0600, since it contains personal data.
 * @returns a warning if they cannot be kept, but everybody who could use the old file can use the new one
 * @throws SyncError if the old file is read-only, or if somebody would lose access or get it
 */
function copyAccess(path: string, temporary: string): string | undefined {
  const old = fs.statSync(path, { throwIfNoEntry: false });
  if (!old) return undefined;
  // A rename needs no write permission for the file that it replaces, so ask for it here.
  if ((old.mode & 0o200) === 0)
    throw new SyncError("failed", `Cannot save "${path}": it is read-only`, `chmod u+w "${path}"`);

  // Only root can give a file to another user. Without root, keep at least the group. Errors are not
  // looked at, because file systems report them differently; the result is compared below.
  const mine = fs.statSync(temporary);
  if (old.uid !== mine.uid || old.gid !== mine.gid) {
    const isChanged = succeeds(() => fs.chownSync(temporary, old.uid, old.gid));
    if (!isChanged) succeeds(() => fs.chownSync(temporary, mine.uid, old.gid));
  }
  succeeds(() => fs.chmodSync(temporary, old.mode & 0o777));

  const copy = fs.statSync(temporary);
  const oldAccess = formatAccess(old);
  const newAccess = formatAccess(copy);
  if (newAccess === oldAccess) return undefined;
  const change = `${oldAccess} becomes ${newAccess}`;
  if (hasSameUsers(old, copy)) return `The owner or mode of "${path}" cannot be kept: ${change}`;
  const nextStep =
    copy.uid === old.uid
      ? `give the file a group that you are a member of: chgrp "$(id -g)" "${path}"`
      : `run it as the owner of the file, or as a member of its group after: chmod g+rw "${path}"`;
  const message = `Cannot save "${path}": its owner or mode cannot be kept (${change})`;
  throw new SyncError("failed", message, nextStep);
}

/** Whether the same users can read and write both files, although an owner, group or mode differs. */
function hasSameUsers(old: fs.Stats, copy: fs.Stats): boolean {
  const hasSameRights = (old.mode & 0o666) === (copy.mode & 0o666);
  const groupRights = (copy.mode >> 3) & 0o6;
  const otherRights = copy.mode & 0o6;
  // If the group has the same rights as all other users, it does not matter which group it is.
  const keepsGroup = copy.gid === old.gid || groupRights === otherRights;
  // The old owner is then a member of the group, or one of the other users.
  const keepsOwner = copy.uid === old.uid || groupRights === 0o6;
  return hasSameRights && keepsGroup && keepsOwner;
}

function formatAccess(stats: fs.Stats): string {
  return `${stats.uid}:${stats.gid} ${(stats.mode & 0o777).toString(8)}`;
}

function succeeds(step: () => void): boolean {
  try {
    step();
    return true;
  } catch {
    return false;
  }
}

function checkOwned(path: string, lock: Lock): void {
  if (lock.isOwned()) return;
  const state = "another script took over its lock while this one was suspended";
  throw busyError(path, state, "run it again when the other has finished");
}

function checkSize(path: string, bytes: number | bigint): void {
  if (bytes <= MAX_BYTES) return;
  const nextStep = `make it smaller, for example: sqlite3 "${path}" VACUUM`;
  throw new SyncError("failed", `Cannot use "${path}": it is larger than 1.9 GiB`, nextStep);
}

function readStats(path: string): fs.BigIntStats | undefined {
  return fs.statSync(path, { bigint: true, throwIfNoEntry: false });
}

/** Reads a file as a copy: sql.js writes into what it gets, and Node shares the memory of small Buffers. */
function readIfExists(path: string): Uint8Array {
  try {
    return new Uint8Array(fs.readFileSync(path));
  } catch (error) {
    if (codeOf(error) === "ENOENT") return new Uint8Array();
    throw fileError("read", path, error);
  }
}

/** Flushes a folder where that is possible. Windows and some network file systems have no way to. */
function flushFolder(folder: string): void {
  if (process.platform === "win32") return;
  try {
    flush(folder, "r");
  } catch (error) {
    // The new file is in place, so this is no failed save. An error of the disk (EIO) is one.
    if (!CANNOT_FLUSH.includes(codeOf(error)) && !isDeniedByDeno(error)) throw error;
  }
}

function flush(path: string, flag: "r" | "r+"): void {
  const handle = fs.openSync(path, flag);
  try {
    fs.fsyncSync(handle);
  } finally {
    fs.closeSync(handle);
  }
}
