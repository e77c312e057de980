/**
 * Locks the database file, so that only one script at a time works on it. Each script changes a
 * copy in memory and then replaces the whole file. Without a lock, the script that saves last would
 * erase the rows that another script has saved meanwhile.
 *
 * The lock is the file `<path>.lock`. It contains the process number of its owner, and the owner
 * updates the time of the file every two seconds (the heartbeat). When a script is killed, its lock
 * file stays. Such a lock is stale, and the next script takes it over.
 *
 * Hand-written because proper-lockfile has only a heartbeat. After a script was killed, the next
 * one would have to wait until the heartbeat is old. With the process number, it can take over the
 * lock at once.
 */
import * as fs from "node:fs";
import { setInterval } from "node:timers"; // Deno's global one returns a number without unref().
import { setTimeout as sleep } from "node:timers/promises";
import { codeOf, ignoreErrors } from "./errors.ts";
import { createBusyError, createFileError } from "./file-errors.ts";

// A script waits this long for the lock of another script.
const WAIT_MS = 5_000;
const POLL_MS = 100;

const HEARTBEAT_MS = 2_000;

// The two limits of isStale, which explains why both are needed. Saving a large file can delay a
// heartbeat by up to 20 seconds, so STALE_MS is longer than that.
const STALE_MS = 30_000;
const UNCHANGED_MS = 2 * HEARTBEAT_MS;

// A script creates the lock file, and writes its process number into it within milliseconds. If the
// file is still empty after this time, the script was killed in between.
const EMPTY_MS = 1_000;

export interface Lock {
  /** Whether this script still owns the lock. If it was suspended, another can have taken over. */
  isOwned(): boolean;
}

interface LockFile {
  /** The owner's process number and a random part. Empty until the owner has written them. */
  owner: string;
  /** The time of the last heartbeat, in milliseconds since 1970. */
  heartbeatAt: number;
}

/**
 * Acquires the lock of a database file. The lock is released when the process ends, also by exit().
 * @param options.waitMs how long to wait for another script; 5 seconds by default
 * @throws SyncError (temporary) if another script still owns the lock after that time
 */
export async function acquireLock(path: string, options: { waitMs?: number } = {}): Promise<Lock> {
  const lockPath = `${path}.lock`;
  const owner = `${process.pid} ${crypto.randomUUID()}`;
  await waitForLock(path, owner, options.waitMs ?? WAIT_MS);

  // The heartbeat and the release must not stop the script or change its exit code, so errors are
  // ignored. If one fails, the next script finds the lock stale. That is safe, because each save
  // checks isOwned().
  setInterval(() => {
    ignoreErrors(() => {
      if (isOwnedBy(owner, path)) fs.utimesSync(lockPath, new Date(), new Date());
    });
  }, HEARTBEAT_MS).unref();
  process.once("exit", () => {
    ignoreErrors(() => {
      if (isOwnedBy(owner, path)) fs.rmSync(lockPath, { force: true });
    });
  });
  return { isOwned: () => isOwnedBy(owner, path) };
}

async function waitForLock(path: string, owner: string, waitMs: number): Promise<void> {
  // Waits are measured with performance.now(), which does not change when the clock is set.
  const startedAt = performance.now();
  let previous: LockFile | undefined;
  let unchangedSince = startedAt;
  let isTakeover = false;
  // In each round, the lock is free (create it), stale (remove it, and try again), or taken (wait).
  for (;;) {
    if (createLockFile(path, owner)) {
      // Two scripts can find the same lock stale. The first removes it and creates its own. Then
      // the second removes this new lock and creates another. So each waits for a moment after its
      // takeover, and only the script that owns the last lock continues.
      if (isTakeover) await sleep(POLL_MS);
      if (isOwnedBy(owner, path)) return;
      isTakeover = false;
    }

    const found = readLockFile(path);
    if (found?.owner !== previous?.owner || found?.heartbeatAt !== previous?.heartbeatAt) {
      previous = found;
      unchangedSince = performance.now();
    }
    if (found !== undefined && isStale(found, performance.now() - unchangedSince)) {
      removeLockFile(path);
      isTakeover = true;
      continue;
    }

    if (performance.now() - startedAt > waitMs) {
      const pid = readPid(found?.owner ?? "");
      const name = pid ? `another script (process ${pid})` : "another script";
      throw createBusyError(
        path,
        `${name} is working on it`,
        "run it again when the other has finished",
      );
    }
    await sleep(POLL_MS);
  }
}

/**
 * Whether a lock is stale: the process of its owner has ended, or the heartbeat has stopped.
 *
 * The process number alone is not enough. After the owner was killed, another process can get the
 * same number. And Deno cannot check a process without --allow-run.
 *
 * The age of the heartbeat alone is not enough, because the clock of the computer can be set. If it
 * is set forward, the heartbeat of a running script looks old until the next one. If it is set
 * back, the heartbeat of a killed script lies in the future, and would look recent for hours. So a
 * heartbeat has stopped if its time is far from now, in the past or in the future, and if it also
 * did not change for two intervals.
 * @param unchangedMs for how long this script has seen the same owner and heartbeat
 */
function isStale(lock: LockFile, unchangedMs: number): boolean {
  if (lock.owner === "") return unchangedMs > EMPTY_MS;
  if (isProcessGone(readPid(lock.owner))) return true;
  const isFarFromNow = Math.abs(Date.now() - lock.heartbeatAt) > STALE_MS;
  return isFarFromNow && unchangedMs > UNCHANGED_MS;
}

/**
 * Whether no process has this number. The process of a script in another container does not exist
 * in this one, so its lock is taken over although that script runs. No rows are lost: that script
 * checks isOwned() before it replaces the file, and stops.
 */
function isProcessGone(pid: number | undefined): boolean {
  if (pid === undefined) return false;
  try {
    // Signal 0 does not stop the process. It only checks whether the process exists.
    process.kill(pid, 0);
    return false;
  } catch (error) {
    // Other errors do not mean that the process has ended. EPERM is a process of another user.
    return codeOf(error) === "ESRCH";
  }
}

/**
 * Parses the process number of an owner. Zero and negative numbers are left out, because
 * process.kill takes them for groups of processes.
 */
function readPid(owner: string): number | undefined {
  const pid = Number.parseInt(owner, 10);
  return pid > 0 ? pid : undefined;
}

/** Creates the lock file. Returns false if it exists already. */
function createLockFile(path: string, owner: string): boolean {
  try {
    // All users can read the lock file, because several users can share the database file.
    fs.writeFileSync(`${path}.lock`, owner, { flag: "wx", mode: 0o644 });
    return true;
  } catch (error) {
    if (codeOf(error) === "EEXIST") return false;
    // The lock file is the first file that a script writes. If its folder does not exist, --db is
    // wrong.
    const isFolderMissing = ["ENOENT", "ENOTDIR"].includes(codeOf(error));
    throw createFileError("lock", path, error, isFolderMissing ? "usage" : "failed");
  }
}

function isOwnedBy(owner: string, path: string): boolean {
  return readLockFile(path)?.owner === owner;
}

/** Reads the lock file. Returns undefined if it does not exist. */
function readLockFile(path: string): LockFile | undefined {
  const lockPath = `${path}.lock`;
  try {
    const heartbeatAt = fs.statSync(lockPath).mtimeMs;
    return { owner: readOwner(lockPath), heartbeatAt };
  } catch (error) {
    if (codeOf(error) === "ENOENT") return undefined;
    throw createFileError("lock", path, error);
  }
}

function readOwner(lockPath: string): string {
  try {
    return fs.readFileSync(lockPath, "utf8");
  } catch (error) {
    // The lock file belongs to another user with a strict umask. Its owner is another script in any
    // case, and its heartbeat can be read without permission for the content.
    if (codeOf(error) === "EACCES") return "unknown";
    throw error;
  }
}

function removeLockFile(path: string): void {
  try {
    fs.rmSync(`${path}.lock`, { force: true });
  } catch (error) {
    throw createFileError("lock", path, error);
  }
}
