import * as fs from "node:fs";
import { dirname } from "node:path";
import { clearInterval, setInterval } from "node:timers";
import { setTimeout as sleep } from "node:timers/promises";
import { codeOf, EXIT, SyncError } from "./errors.ts";

// sql.js works on a copy in memory, so the file on disk is ours to protect: from a second script of
// ours (the lock), from half a file (write beside, flush, rename), from other programs (the stamp).

const POLL_MS = 50;
const BUSY_MS = 5_000; // how long another script or program is waited for
const BEAT_MS = 2_000;
const DEAD_MS = 30_000; // a holder that cannot be asked is dead when its beat is missing for so long
const LARGEST_BYTES = 1.9 * 2 ** 30; // Node cannot read 2 GiB in one call, nor Deno write it

/** A lock; `isHeld` is false when another script took its holder for dead: do not save any more. */
export type Lock = { isHeld(): boolean; release(): void };

/** What tells one state of a file from the next: any commit by anybody changes it. */
export type Stamp = string;

/**
 * Takes `<path>.lock`, so that one of our scripts is at work on a file at a time, and clears away what
 * a killed one left. A dead holder is noticed at once by its process id; Deno may not ask for that
 * without --allow-run, and waits until the lock has had no beat for half a minute.
 * @throws SyncError (later) when another script holds it for more than a few seconds
 */
export async function lockFile(path: string, stop: AbortSignal): Promise<Lock> {
  const lock = `${path}.lock`;
  const name = `${process.pid} ${crypto.randomUUID()}`;
  const isHeld = () => readOwner(lock) === name;
  for (const started = Date.now(); ; await sleep(POLL_MS, undefined, { signal: stop })) {
    try {
      fs.writeFileSync(lock, name, { flag: "wx", mode: 0o600 });
      break;
    } catch (error) {
      if (codeOf(error) !== "EEXIST") throw cannot("lock", path, error);
    }
    if (isDead(lock)) {
      // Two scripts may find it dead at once: both write their name and wait, and one name stays.
      fs.writeFileSync(lock, name);
      await sleep(2 * POLL_MS, undefined, { signal: stop });
      if (isHeld()) break;
    }
    if (Date.now() - started > BUSY_MS) throw busy(path, "another script is at work on it");
  }
  const beat = setInterval(() => isHeld() && fs.utimesSync(lock, new Date(), new Date()), BEAT_MS);
  beat.unref();
  fs.rmSync(`${path}.tmp`, { force: true });
  const release = () => {
    clearInterval(beat);
    if (isHeld()) fs.rmSync(lock, { force: true });
  };
  return { isHeld, release };
}

/** The file that a path means. A link is followed, since a rename would replace the link itself. */
export function toRealPath(path: string): string {
  try {
    const isLink = fs.lstatSync(path, { throwIfNoEntry: false })?.isSymbolicLink();
    return isLink ? fs.realpathSync(path) : path;
  } catch (error) {
    throw cannot("open", path, error);
  }
}

/**
 * Reads a database file whole, in a moment when no other program is half-way through something.
 * @returns its bytes and stamp; no bytes when there is no such file
 * @throws SyncError when it stays busy, or cannot be read
 */
export async function readDatabaseFile(
  path: string,
  stop: AbortSignal,
): Promise<{ bytes: Uint8Array | undefined; stamp: Stamp }> {
  for (const started = Date.now(); ; await sleep(POLL_MS, undefined, { signal: stop })) {
    const stamp = stampOf(path);
    if (!isOpenElsewhere(path)) {
      const bytes = stamp === MISSING ? undefined : readBytes(path);
      // SQLite writes in place: what changed while we read may be half old, half new.
      if (stampOf(path) === stamp && !isOpenElsewhere(path)) return { bytes, stamp };
    }
    if (Date.now() - started > BUSY_MS)
      throw busy(path, "another program has it open, or died with it open", path);
  }
}

/**
 * Replaces a database file in one step: a crash leaves the old file or the new one, never a mixture.
 * @param stamp of the bytes that the new ones were made from
 * @returns the new stamp, or undefined when the file was changed since: then nothing was replaced
 * @throws SyncError with the old file as it was
 */
export function replaceDatabaseFile(
  path: string,
  bytes: Uint8Array,
  stamp: Stamp,
  lock: Lock,
): Stamp | undefined {
  const temporary = `${path}.tmp`;
  try {
    if (bytes.byteLength > LARGEST_BYTES) throw tooLarge(path);
    const old = fs.statSync(path, { throwIfNoEntry: false });
    if (old && (old.mode & 0o200) === 0)
      throw new SyncError(`Cannot save "${path}": it is read-only`, EXIT.failed);
    const file = fs.openSync(temporary, "wx", 0o600);
    try {
      fs.writeFileSync(file, bytes);
      const mine = fs.fstatSync(file);
      if (old && (old.uid !== mine.uid || old.gid !== mine.gid))
        fs.fchownSync(file, old.uid, old.gid);
      if (old) fs.fchmodSync(file, old.mode & 0o777);
      fs.fsyncSync(file);
    } finally {
      fs.closeSync(file);
    }
    if (!lock.isHeld()) throw busy(path, "another script took it over");
    if (stampOf(path) !== stamp || isOpenElsewhere(path)) return undefined;
    fs.renameSync(temporary, path);
    flushFolder(dirname(path));
    return stampOf(path);
  } catch (error) {
    throw cannot("save", path, error);
  } finally {
    fs.rmSync(temporary, { force: true });
  }
}

const MISSING = "missing";

/** The stamp of a file as it is now. */
export function stampOf(path: string): Stamp {
  const stat = fs.statSync(path, { bigint: true, throwIfNoEntry: false });
  return stat ? [stat.size, stat.ino, stat.mtimeNs, stat.ctimeNs].join(" ") : MISSING;
}

/** Whether there is such a file. */
export function isMissing(path: string): boolean {
  return stampOf(path) === MISSING;
}

// Rows that are only in a -wal are invisible to sql.js, and SQLite would play an old -wal or -journal
// over the file that we put in its place. The header of a finished journal is all zeros.
function isOpenElsewhere(path: string): boolean {
  if (!isMissing(`${path}-wal`) || !isMissing(`${path}-shm`)) return true;
  const journal = isMissing(`${path}-journal`) ? undefined : readBytes(`${path}-journal`);
  return journal?.subarray(0, 28).some((byte) => byte !== 0) ?? false;
}

function readBytes(path: string): Uint8Array {
  try {
    if (fs.statSync(path).size > LARGEST_BYTES) throw tooLarge(path);
    // A copy: sql.js writes into what it is given, and a small Buffer is a part of a shared one.
    return new Uint8Array(fs.readFileSync(path));
  } catch (error) {
    if (codeOf(error) === "ENOENT") return new Uint8Array(); // gone meanwhile; the stamp tells
    throw cannot("open", path, error);
  }
}

function readOwner(lock: string): string {
  try {
    return fs.readFileSync(lock, "utf8");
  } catch {
    return ""; // gone, so nobody's
  }
}

function isDead(lock: string): boolean {
  const stat = fs.statSync(lock, { throwIfNoEntry: false });
  if (!stat) return false;
  const pid = Number.parseInt(readOwner(lock), 10);
  try {
    if (pid !== process.pid) process.kill(pid, 0);
  } catch (error) {
    if (codeOf(error) === "ESRCH") return true;
  }
  // Without a process id, it was killed between making the lock and writing into it.
  return Date.now() - stat.mtimeMs > (pid > 0 ? DEAD_MS : 1_000);
}

function flushFolder(folder: string): void {
  if (process.platform === "win32") return; // which has no way to
  const handle = fs.openSync(folder, "r");
  try {
    fs.fsyncSync(handle);
  } finally {
    fs.closeSync(handle);
  }
}

function busy(path: string, state: string, tidy?: string): SyncError {
  const next = "run it again when the other one is done";
  const ask = `close that program; or, if none runs: sqlite3 "${tidy}" "PRAGMA journal_mode = DELETE; SELECT count(*) FROM customers"`;
  return new SyncError(`Cannot use "${path}": ${state}`, EXIT.later, tidy ? ask : next);
}

function tooLarge(path: string): SyncError {
  return new SyncError(`Cannot use "${path}": it is larger than 1.9 GiB`, EXIT.failed);
}

const STATES: Record<string, string> = {
  ENOENT: "no such folder",
  EACCES: "no permission",
  EPERM: "no permission",
  EROFS: "the disk is read-only",
  ENOSPC: "no space left on the disk",
  EDQUOT: "the disk quota is used up",
  EFBIG: "the file may not grow so large",
  EISDIR: "it is a folder",
  ENOTDIR: "a part of the path is no folder",
};

function cannot(action: string, path: string, error: unknown): SyncError {
  if (error instanceof SyncError) return error;
  const state = STATES[codeOf(error)] ?? (error instanceof Error ? error.message : String(error));
  return new SyncError(`Cannot ${action} "${path}": ${state}`, EXIT.failed, undefined, error);
}
