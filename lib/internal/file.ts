/**
 * Reads and replaces the database file safely. sql.js works on a copy of the file in memory, and
 * other programs do not see that it uses the file. Without these functions, three things could go
 * wrong:
 *
 * - A crash during a save could leave a half-written file. So the new content is written to a
 *   temporary file, flushed, and renamed.
 * - A save could erase the changes of another program. So a fingerprint shows whether the file
 *   changed since it was read.
 * - Another program could have the file open and write to it later. SQLite shows this with a -wal,
 *   -shm or -journal file next to it. While such a file is in use, the database is neither read nor
 *   replaced.
 *
 * Hand-written because write-file-atomic and atomically use random temporary names and need
 * --allow-sys, both of which fail under Deno's narrow permissions. The temporary file is always
 * `<path>.tmp`.
 */
import * as fs from "node:fs";
import { dirname } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { codeOf, ignoreErrors, SyncError } from "./errors.ts";
import { createBusyError, createFileError, isDeniedByDeno } from "./file-errors.ts";
import type { Lock } from "./lock.ts";

// A read waits this long for another program to close the file.
const WAIT_MS = 5_000;
const POLL_MS = 100;

// Node cannot read 2 GiB in one call, and Deno cannot write 2 GiB in one call.
const MAX_BYTES = 1.9 * 2 ** 30;

// The header of a rollback journal. SQLite fills it with zeros at the end of a transaction if it
// keeps the journal file (PRAGMA journal_mode = PERSIST).
const JOURNAL_HEADER_BYTES = 28;

// The error codes with which systems report that a folder cannot be opened or flushed. They do not
// mean that the disk failed.
const FOLDER_FLUSH_UNSUPPORTED = [
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
 * Returns the path of the file to read and replace. A symbolic link is followed. Otherwise a save
 * would replace the link, and the file that it points to would keep the old content.
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
    // createFileError returns a SyncError unchanged.
    throw createFileError("use", path, error, "usage");
  }
}

/**
 * Checks that the file can be replaced. Without this check, a script would read from Square or send
 * rows, and only then find out that it cannot save the result.
 *
 * The check creates an empty temporary file, as a save does, and removes it. It also removes a
 * temporary file that a killed script left. So call it after acquireLock, because without the lock,
 * the temporary file can belong to a running script.
 * @throws SyncError if a save would fail
 */
export function checkReplaceable(path: string): void {
  const temporary = `${path}.tmp`;
  try {
    fs.rmSync(temporary, { force: true });
    fs.closeSync(fs.openSync(temporary, "wx", 0o600));
    copyAccess(path, temporary); // Its warning is ignored here. replaceDatabaseFile prints it.
    fs.rmSync(temporary);
    checkMount(path, temporary);
  } catch (error) {
    ignoreErrors(() => fs.rmSync(temporary, { force: true }));
    throw createFileError("save", path, error);
  }
}

/**
 * Checks that the file is not a mount, as with `docker run -v ./database.db:/app/database.db`. No
 * file can be renamed to the path of a mount (EBUSY).
 *
 * The check tries to create a hard link from the file to the temporary name, because the system
 * never links from one mount to another (EXDEV). Comparing device numbers is not enough: they are
 * equal if the file and its folder are on the same file system, although the file is a mount.
 *
 * The link is removed at once. If the script is killed before that, the next script finds a
 * temporary file that is the database file under a second name. That is safe, because a temporary
 * file that exists is only ever removed, and never opened for writing.
 */
function checkMount(path: string, temporary: string): void {
  try {
    fs.linkSync(path, temporary);
  } catch (error) {
    // Other errors do not mean a mount. The file may not exist yet, FAT has no hard links, and
    // Linux does not let a user link some files of other users.
    if (codeOf(error) !== "EXDEV") return;
    const message = `Cannot save "${path}": it is mounted as a single file and cannot be replaced`;
    const nextStep = "mount the folder that contains the file, for example with -v ./data:/data";
    throw new SyncError("failed", message, nextStep, error);
  }
  fs.rmSync(temporary);
}

/**
 * Reads the whole database file. A file that does not exist yet is read as an empty one.
 * @throws SyncError (temporary) if another program has it open for more than five seconds
 */
export async function readDatabaseFile(
  path: string,
): Promise<{ bytes: Uint8Array; fingerprint: string }> {
  const startedAt = performance.now();
  for (;;) {
    const fingerprint = readFingerprint(path);
    const bytes = readIfExists(path);
    // Another program can write to the file while it is read. The bytes would then be partly old
    // and partly new. While another program has the file open, readFingerprint returns a random
    // value, so the two are never equal and the loop waits.
    if (readFingerprint(path) === fingerprint) return { bytes, fingerprint };
    if (performance.now() - startedAt > WAIT_MS) {
      // With these statements, sqlite3 completes or undoes what a stopped program has left, and
      // removes its -wal, -shm or -journal file.
      const sql = "PRAGMA journal_mode = DELETE; SELECT count(*) FROM sqlite_schema";
      throw createBusyError(
        path,
        "another program has it open, or was stopped while it had it open",
        `close that program; if none is running: sqlite3 "${path}" "${sql}"`,
      );
    }
    await sleep(POLL_MS);
  }
}

/**
 * Replaces the database file in one step. After a crash at any moment, the path has either the old
 * file or the new one.
 * @param expectedFingerprint the fingerprint that the file had when it was read
 * @param warn is called if the new file cannot keep the owner, group or mode of the old one
 * @returns the fingerprint of the new file; undefined if another program changed the file since it
 *   was read, and then it is not replaced
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
  requireOwnedLock(path, lock);
  try {
    requireSupportedSize(path, bytes.byteLength);
    // The flag wx makes the write fail if the file exists. So it never writes to the database file
    // through a link that checkMount left.
    fs.rmSync(temporary, { force: true });
    fs.writeFileSync(temporary, bytes, { flag: "wx", mode: 0o600 });
    const warning = copyAccess(path, temporary);

    // Flush the content before the rename. Otherwise the disk can store the new name first, and
    // after a power failure the file would be empty.
    flush(temporary, "r+");

    // Writing takes time. So check as late as possible whether the file has changed.
    requireOwnedLock(path, lock);
    if (readFingerprint(path) !== expectedFingerprint) return undefined;
    fs.renameSync(temporary, path);
    const fingerprint = readFingerprint(path);

    // Flush the folder, which stores the new name. Otherwise a power failure could bring back the
    // old file. A push would then have sent rows whose idempotency keys are lost.
    flushFolder(dirname(path));
    if (warning) warn(warning);
    return fingerprint;
  } catch (error) {
    throw createFileError("save", path, error);
  } finally {
    // Without the lock, the temporary file can belong to the script that took over the lock.
    if (lock.isOwned()) fs.rmSync(temporary, { force: true });
  }
}

/**
 * Reads the fingerprint of the file: its size, inode and times, which change with every commit of
 * any program. While another program has the file open, the fingerprint is random. It then equals
 * no other fingerprint, so the file counts as changed, and is neither used nor replaced.
 * @returns `missing` for a file that does not exist
 * @throws SyncError if the file is too large
 */
export function readFingerprint(path: string): string {
  try {
    const stats = readStats(path);
    requireSupportedSize(path, stats?.size ?? 0);
    // Committed rows can be in the -wal file only, and sql.js does not read that file. Besides, if
    // the database file were replaced, SQLite would later copy the old -wal or -journal file into
    // the new one.
    if (readStats(`${path}-wal`) || readStats(`${path}-shm`) || hasHotJournal(path))
      return crypto.randomUUID();
    return stats ? [stats.size, stats.ino, stats.mtimeNs, stats.ctimeNs].join(" ") : "missing";
  } catch (error) {
    throw createFileError("read", path, error);
  }
}

/** Whether a journal of an unfinished transaction exists. A finished one has zeros or no bytes. */
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
    // The other program may have removed the journal since the check above.
    if (codeOf(error) !== "ENOENT") throw error;
  }
  return header.some((byte) => byte !== 0);
}

/**
 * Gives the temporary file the owner, group and mode of the file that it will replace. A file that
 * did not exist before has the mode 0600, because it contains personal data.
 * @returns a warning if owner, group or mode will change, but the same users can still read and
 *   write the file (see {@linkcode hasSameUsers})
 * @throws SyncError if the old file is read-only, or if the change would let other users in or lock
 *   users out
 */
function copyAccess(path: string, temporary: string): string | undefined {
  const old = fs.statSync(path, { throwIfNoEntry: false });
  if (!old) return undefined;
  // A rename replaces a read-only file too, so check it here.
  if ((old.mode & 0o200) === 0)
    throw new SyncError("failed", `Cannot save "${path}": it is read-only`, `chmod u+w "${path}"`);

  // Errors are ignored, because file systems report them differently. The result is compared below.
  const created = fs.statSync(temporary);
  if (old.uid !== created.uid || old.gid !== created.gid) {
    // Set the group first, which a member of that group may do. Then set the owner too, which only
    // root may do.
    ignoreErrors(() => fs.chownSync(temporary, created.uid, old.gid));
    ignoreErrors(() => fs.chownSync(temporary, old.uid, old.gid));
  }
  ignoreErrors(() => fs.chmodSync(temporary, old.mode & 0o777));

  const copy = fs.statSync(temporary);
  const oldAccess = formatAccess(old);
  const newAccess = formatAccess(copy);
  if (newAccess === oldAccess) return undefined;
  const change = `${oldAccess} becomes ${newAccess}`;
  if (hasSameUsers(old, copy)) return `the owner or mode of "${path}" cannot be kept: ${change}`;
  // If the owner is the same, the group could not be kept, because only a member of a group may
  // give it a file. Otherwise the owner could not be kept, because only root may change it.
  const nextStep =
    copy.uid === old.uid
      ? `give the file a group that you are a member of: chgrp "$(id -g)" "${path}"`
      : `run it as the owner of the file, or let its group write it: chmod g+rw "${path}"`;
  const message = `Cannot save "${path}": its owner or mode cannot be kept (${change})`;
  throw new SyncError("failed", message, nextStep);
}

/**
 * True if the copy gives access to the same users as the old file, as far as owner, group and mode
 * show. It does not look up the members of a group, so an old owner who is not a member can lose
 * access. The warning then names the change.
 */
function hasSameUsers(old: fs.Stats, copy: fs.Stats): boolean {
  // A mode has three digits, for the owner, the group and all others. In each, 4 is read and 2 is
  // write, so 6 is both.
  const hasSameRights = (old.mode & 0o666) === (copy.mode & 0o666);
  const groupRights = (copy.mode >> 3) & 0o6;
  const otherRights = copy.mode & 0o6;
  // If the group has the same rights as all other users, it does not matter which group it is.
  const isGroupChangeHarmless = copy.gid === old.gid || groupRights === otherRights;
  // If the owner changes, the old owner has access only as a member of the group. So the group must
  // be able to read and write.
  const isOwnerChangeHarmless = copy.uid === old.uid || groupRights === 0o6;
  return hasSameRights && isGroupChangeHarmless && isOwnerChangeHarmless;
}

/** Formats the owner, group and mode of a file, for example `1001:2000 660`. */
function formatAccess(stats: fs.Stats): string {
  return `${stats.uid}:${stats.gid} ${(stats.mode & 0o777).toString(8)}`;
}

function requireOwnedLock(path: string, lock: Lock): void {
  if (lock.isOwned()) return;
  const state = "another script took over its lock while this one was suspended";
  throw createBusyError(path, state, "run it again when the other has finished");
}

function requireSupportedSize(path: string, bytes: number | bigint): void {
  if (bytes <= MAX_BYTES) return;
  const nextStep = `make it smaller, for example: sqlite3 "${path}" VACUUM`;
  throw new SyncError("failed", `Cannot use "${path}": it is larger than 1.9 GiB`, nextStep);
}

function readStats(path: string): fs.BigIntStats | undefined {
  return fs.statSync(path, { bigint: true, throwIfNoEntry: false });
}

/**
 * Reads a file; empty if it does not exist. The bytes are copied, because sql.js writes to the
 * array that it is given, and Node keeps several small Buffers in the same memory.
 */
function readIfExists(path: string): Uint8Array {
  try {
    return new Uint8Array(fs.readFileSync(path));
  } catch (error) {
    if (codeOf(error) === "ENOENT") return new Uint8Array();
    throw createFileError("read", path, error);
  }
}

/** Flushes a folder. Windows and some network file systems cannot, and then it does nothing. */
function flushFolder(folder: string): void {
  if (process.platform === "win32") return;
  try {
    flush(folder, "r");
  } catch (error) {
    // The new file is complete and has its name, so only the protection from a power failure is
    // missing. An error of the disk (EIO) is different: it can mean that the file is lost.
    if (!FOLDER_FLUSH_UNSUPPORTED.includes(codeOf(error)) && !isDeniedByDeno(error)) throw error;
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
