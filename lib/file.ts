import {
  closeSync,
  fchmodSync,
  fchownSync,
  fstatSync,
  fsyncSync,
  openSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  unlinkSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { dirname } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { codeOf, EXIT, SyncError } from "./errors.ts";

// sql.js works on a copy in memory, so the file on disk is ours to protect: from a second script of
// ours (the lock), from half a file (write beside, flush, rename) and from other programs (the stamp).

const LOCK_WAIT_MS = 5_000; // another script's quick pull is worth waiting for; a long one is not
const LOCK_POLL_MS = 50;
const LOCK_BEAT_MS = 2_000;
const LOCK_STALE_MS = 30_000; // without a beat for so long, a holder that cannot be asked is dead
const TOO_LARGE_BYTES = 1.9 * 2 ** 30; // Node cannot read 2 GiB in one call, and Deno cannot write it

/** A held lock. */
export interface Lock {
  /** False when another script took the lock for dead and took it over: do not save any more. */
  isHeld(): boolean;
  release(): void;
}

/** Whose bytes these are: any commit by anybody changes at least one of the four. */
export type Stamp = string;

/**
 * Takes `<path>.lock`, so that one of our scripts runs on the file at a time, and clears away what a
 * killed one left. A killed holder is noticed at once where the runtime may ask for its process id;
 * Deno may not without --allow-run, and waits until the beats have been missing for half a minute.
 * @throws SyncError with exit code 75 when another script holds it for longer than a few seconds
 */
export async function lockFile(path: string, stop: AbortSignal): Promise<Lock> {
  const lockPath = `${path}.lock`;
  const token = `${process.pid} ${crypto.randomUUID()}`;
  const isHeld = () => readLock(lockPath) === token;
  for (const started = Date.now(); ; await sleep(LOCK_POLL_MS, undefined, { signal: stop })) {
    try {
      writeFileSync(lockPath, token, { flag: "wx", mode: 0o600 });
      break;
    } catch (error) {
      if (codeOf(error) !== "EEXIST") throw cannot("lock", path, error);
    }
    if (isAbandoned(lockPath)) {
      // Two scripts may both find it abandoned. Each writes its name and waits; one name stays.
      writeFileSync(lockPath, token);
      await sleep(2 * LOCK_POLL_MS, undefined, { signal: stop });
      if (isHeld()) break;
    }
    if (Date.now() - started > LOCK_WAIT_MS)
      throw new SyncError(`Cannot use "${path}": another script is working on it`, {
        exitCode: EXIT.later,
        next: "run it again when the other one is done",
      });
  }
  const beat = setInterval(() => isHeld() && touch(lockPath), LOCK_BEAT_MS);
  beat.unref();
  rmSync(`${path}.tmp`, { force: true });
  const release = () => {
    clearInterval(beat);
    if (isHeld()) unlinkSync(lockPath);
  };
  return { isHeld, release };
}

/** The file that a path means: a link is followed, since a rename would replace the link itself. */
export function toRealPath(path: string): string {
  try {
    return realpathSync(path);
  } catch (error) {
    if (codeOf(error) === "ENOENT") return path;
    throw cannot("open", path, error);
  }
}

/**
 * Reads a database file whole.
 * @returns its bytes and their stamp, or undefined when there is no such file
 * @throws SyncError when another program is in the middle of something, or the file cannot be read
 */
export async function readDatabaseFile(
  path: string,
  stop: AbortSignal,
): Promise<{ bytes: Uint8Array; stamp: Stamp } | undefined> {
  for (let attempt = 1; ; attempt++) {
    const trouble = otherProgramOn(path);
    const stamp = stampOf(path);
    if (stamp === "missing" && trouble === undefined) return undefined;
    if (trouble === undefined) {
      const bytes = readBytes(path);
      // A native program writes in place: what changed while we read it may be half old, half new.
      if (stampOf(path) === stamp && otherProgramOn(path) === undefined) return { bytes, stamp };
    } else if (attempt > 60) throw trouble;
    if (attempt > 100) throw changing(path);
    await sleep(LOCK_POLL_MS, undefined, { signal: stop });
  }
}

/**
 * Replaces a database file in one step: a crash leaves the old file or the new one, never a mixture.
 * @param stamp of the bytes that the new ones were made from; "missing" for a new file
 * @returns the new stamp, or undefined when the file changed since it was read: nothing was replaced
 * @throws SyncError with the old file as it was
 */
export function replaceDatabaseFile(
  path: string,
  bytes: Uint8Array,
  stamp: Stamp,
  lock: Lock,
): Stamp | undefined {
  if (bytes.byteLength > TOO_LARGE_BYTES) throw tooLarge(path);
  const temporary = `${path}.tmp`;
  try {
    const old = stamp === "missing" ? undefined : statSync(path);
    if (old && (old.mode & 0o200) === 0)
      throw new SyncError(`Cannot save "${path}": the file is read-only`);
    const file = openSync(temporary, "wx", 0o600);
    try {
      writeFileSync(file, bytes);
      const { uid, gid } = fstatSync(file);
      if (old && (old.uid !== uid || old.gid !== gid)) fchownSync(file, old.uid, old.gid);
      if (old) fchmodSync(file, old.mode & 0o777);
      fsyncSync(file);
    } finally {
      closeSync(file);
    }
    if (!lock.isHeld())
      throw new SyncError(`Cannot save "${path}": another script took it over`, {
        exitCode: EXIT.later,
        next: "run it again; nothing of this step was saved",
      });
    if (stampOf(path) !== stamp || otherProgramOn(path)) return undefined;
    renameSync(temporary, path);
    flushFolder(dirname(path));
    return stampOf(path);
  } catch (error) {
    throw cannot("save", path, error);
  } finally {
    rmSync(temporary, { force: true });
  }
}

/** What tells one state of the file from another; "missing" when there is none. */
export function stampOf(path: string): Stamp {
  const stat = statSync(path, { bigint: true, throwIfNoEntry: false });
  return stat ? [stat.size, stat.ino, stat.mtimeNs, stat.ctimeNs].join(" ") : "missing";
}

// Rows that are only in a -wal are invisible to sql.js, and SQLite would play the old -wal or -journal
// over the file that we put in its place: the rows of both would be gone.
function otherProgramOn(path: string): SyncError | undefined {
  for (const side of ["-wal", "-shm", "-journal"]) {
    const stat = statSync(path + side, { throwIfNoEntry: false });
    // A journal that is empty or begins with a zero byte is a finished one, kept for the next time.
    if (!stat || (side === "-journal" && !isHot(path + side))) continue;
    return new SyncError(`Cannot use "${path}": another program has it open ("${path}${side}")`, {
      exitCode: EXIT.later,
      next: `close that program; if none runs, let SQLite tidy up with: sqlite3 "${path}" "PRAGMA journal_mode=DELETE; SELECT count(*) FROM sqlite_master"`,
    });
  }
  return undefined;
}

function isHot(journal: string): boolean {
  try {
    return (readFileSync(journal)[0] ?? 0) !== 0;
  } catch (error) {
    if (codeOf(error) === "ENOENT") return false;
    throw cannot("read", journal, error);
  }
}

function readBytes(path: string): Uint8Array {
  try {
    if (statSync(path).size > TOO_LARGE_BYTES) throw tooLarge(path);
    // A copy: sql.js writes into what it is given, and a small Buffer is part of a shared pool.
    return new Uint8Array(readFileSync(path));
  } catch (error) {
    throw cannot("open", path, error);
  }
}

function readLock(lockPath: string): string | undefined {
  try {
    return readFileSync(lockPath, "utf8");
  } catch {
    return undefined; // gone, or not ours to read: either way not ours
  }
}

function isAbandoned(lockPath: string): boolean {
  const stat = statSync(lockPath, { throwIfNoEntry: false });
  if (!stat) return false;
  const pid = Number.parseInt(readLock(lockPath) ?? "", 10);
  try {
    if (pid > 0 && pid !== process.pid) process.kill(pid, 0);
  } catch (error) {
    if (codeOf(error) === "ESRCH") return true;
  }
  // Without a process id it was killed between making the file and writing into it.
  return Date.now() - stat.mtimeMs > (pid > 0 ? LOCK_STALE_MS : 1_000);
}

function touch(path: string): void {
  const now = new Date();
  utimesSync(path, now, now);
}

function flushFolder(folder: string): void {
  try {
    const handle = openSync(folder, "r");
    fsyncSync(handle);
    closeSync(handle);
  } catch (error) {
    // Windows has no way to flush a folder, and some network drives refuse it.
    if (!["EISDIR", "EPERM", "EACCES", "EINVAL", "ENOTSUP"].includes(codeOf(error) ?? ""))
      throw error;
  }
}

function changing(path: string): SyncError {
  return new SyncError(`Cannot use "${path}": another program keeps changing it`, {
    exitCode: EXIT.later,
    next: "run it again when the other program is done",
  });
}

function tooLarge(path: string): SyncError {
  return new SyncError(`Cannot use "${path}": it is larger than 1.9 GiB, too large for sql.js`, {
    next: "the README says where to go when the file is outgrown",
  });
}

const STATES: Record<string, string> = {
  ENOENT: "no such file or folder",
  EACCES: "no permission",
  EPERM: "no permission",
  EROFS: "the disk is read-only",
  ENOSPC: "no space left on the disk",
  EDQUOT: "the disk quota is used up",
  EISDIR: "it is a folder",
  ENOTDIR: "a part of the path is not a folder",
};

function cannot(action: string, path: string, error: unknown): SyncError {
  if (error instanceof SyncError) return error;
  const code = codeOf(error);
  const denied = error instanceof Error && error.name === "NotCapable";
  const state = denied ? "Deno was not given the permission" : STATES[code ?? ""];
  return new SyncError(`Cannot ${action} "${path}": ${state ?? code ?? String(error)}`, {
    cause: error,
  });
}
