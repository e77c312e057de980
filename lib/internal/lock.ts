/**
 * A lock file next to the database file, so that one script at a time works on it. Each script changes a
 * copy in memory and then replaces the whole file. Without a lock, the script that saves last would erase
 * the rows of the other.
 *
 * Hand-written because proper-lockfile only has a heartbeat: after a script was killed, the next one would
 * have to wait for the heartbeat to expire. This lock also names the owner's process.
 */
import * as fs from "node:fs";
import { setInterval } from "node:timers";
import { setTimeout as sleep } from "node:timers/promises";
import { codeOf } from "./errors.ts";
import { busyError, fileError } from "./file-errors.ts";

const POLL_MS = 100;
const WAIT_MS = 5_000; // how long another script is waited for
const HEARTBEAT_MS = 2_000; // how often the owner updates the time of the lock file
const STALE_MS = 30_000; // large saves keep an owner from its heartbeat for up to 20 seconds
const WATCH_MS = 2 * HEARTBEAT_MS;
const UNNAMED_MS = 1_000; // a script writes its name within milliseconds after it created the lock

export interface Lock {
  /** Whether the lock is still ours. Another script can take it over after this one was suspended. */
  isOwned(): boolean;
}

interface LockFile {
  /** The owner's process number and a random part. Empty if the owner was killed before it wrote it. */
  owner: string;
  /** The time of the last heartbeat, in milliseconds since 1970. */
  heartbeatAt: number;
}

/**
 * Takes the lock `<path>.lock`. It is removed when the process ends, also by process.exit().
 * @param options.waitMs how long to wait for another script; 5 seconds if not given
 * @throws SyncError (temporary) if another script still owns the lock after that time
 */
export async function acquireLock(path: string, options: { waitMs?: number } = {}): Promise<Lock> {
  const lockPath = `${path}.lock`;
  const owner = `${process.pid} ${crypto.randomUUID()}`;
  await waitForLock(path, owner, options.waitMs ?? WAIT_MS);

  const isOwned = () => readLockFile(path)?.owner === owner;
  setInterval(() => {
    ignoreErrors(() => isOwned() && fs.utimesSync(lockPath, new Date(), new Date()));
  }, HEARTBEAT_MS).unref();
  process.once("exit", () => {
    ignoreErrors(() => isOwned() && fs.rmSync(lockPath, { force: true }));
  });
  return { isOwned };
}

async function waitForLock(path: string, owner: string, waitMs: number): Promise<void> {
  // Waits are measured with performance.now(), which does not change when somebody sets the clock.
  const startedAt = performance.now();
  let watched: LockFile | undefined;
  let watchedSince = startedAt;
  let isTakeover = false;
  for (;;) {
    if (createLockFile(path, owner)) {
      if (!isTakeover) return;
      // Two scripts can find a lock stale at the same moment. Each removes it and creates its own, and
      // the second removes the new lock of the first. After a pause, only one lock is left, and only
      // its owner goes on.
      await sleep(POLL_MS);
      if (readLockFile(path)?.owner === owner) return;
      isTakeover = false;
    }

    const found = readLockFile(path);
    if (found?.owner !== watched?.owner || found?.heartbeatAt !== watched?.heartbeatAt) {
      watched = found;
      watchedSince = performance.now();
    }
    if (found && isStale(found, performance.now() - watchedSince)) {
      removeLockFile(path);
      isTakeover = true;
      continue;
    }

    if (performance.now() - startedAt > waitMs) {
      const pid = readPid(found?.owner ?? "");
      const name = pid ? `another script (process ${pid})` : "another script";
      throw busyError(path, `${name} is working on it`, "run it again when the other has finished");
    }
    await sleep(POLL_MS);
  }
}

/**
 * A lock is stale when the process of its owner is gone, or when its heartbeat stopped.
 *
 * The process number alone is not enough. Another process can have the number by now, and under Deno a
 * script cannot look for a process without --allow-run.
 *
 * The time of the heartbeat alone is not enough either, because the clock can be set. When it is set
 * forward, the heartbeat of a running script looks old until the next one. When it is set back, the
 * heartbeat of a killed script lies in the future and would look recent for hours. So a heartbeat counts as
 * stopped when its time is far from now in either direction, and did not change while we watched it for two
 * intervals.
 */
function isStale(lock: LockFile, unchangedMs: number): boolean {
  if (lock.owner === "") return unchangedMs > UNNAMED_MS;
  if (isProcessGone(readPid(lock.owner))) return true;
  const isFarFromNow = Math.abs(Date.now() - lock.heartbeatAt) > STALE_MS;
  return isFarFromNow && unchangedMs > WATCH_MS;
}

/**
 * Whether no process has this number. A script in another container has a number that does not exist here,
 * so its lock is taken over although it runs. This loses nothing: that script checks isOwned() before it
 * replaces the file, and stops.
 */
function isProcessGone(pid: number | undefined): boolean {
  if (pid === undefined) return false;
  try {
    process.kill(pid, 0); // signal 0 only checks whether the process exists
    return false;
  } catch (error) {
    return codeOf(error) === "ESRCH"; // EPERM is a process of another user
  }
}

/** The process number in an owner. Zero and negative numbers mean groups of processes. */
function readPid(owner: string): number | undefined {
  const pid = Number.parseInt(owner, 10);
  return pid > 0 ? pid : undefined;
}

/** Creates the lock file, or returns false if it exists. */
function createLockFile(path: string, owner: string): boolean {
  try {
    // Readable for all, so that another user who shares the database file sees who owns the lock.
    fs.writeFileSync(`${path}.lock`, owner, { flag: "wx", mode: 0o644 });
    return true;
  } catch (error) {
    if (codeOf(error) === "EEXIST") return false;
    // The lock is the first file that a script writes, so a folder that does not exist shows here.
    const isUsage = ["ENOENT", "ENOTDIR"].includes(codeOf(error));
    throw fileError("lock", path, error, isUsage ? "usage" : "failed");
  }
}

/** Reads the lock file, or returns undefined if there is none. */
function readLockFile(path: string): LockFile | undefined {
  const lockPath = `${path}.lock`;
  try {
    const heartbeatAt = fs.statSync(lockPath).mtimeMs;
    return { owner: readOwner(lockPath), heartbeatAt };
  } catch (error) {
    if (codeOf(error) === "ENOENT") return undefined;
    throw fileError("lock", path, error);
  }
}

function readOwner(lockPath: string): string {
  try {
    return fs.readFileSync(lockPath, "utf8");
  } catch (error) {
    // The lock of another user with a strict umask. It is not ours, and its heartbeat still counts.
    if (codeOf(error) === "EACCES") return "unknown";
    throw error;
  }
}

function removeLockFile(path: string): void {
  try {
    fs.rmSync(`${path}.lock`, { force: true });
  } catch (error) {
    throw fileError("lock", path, error);
  }
}

/**
 * For the heartbeat and the removal at the end, which must not stop the script or change its exit code. If
 * they fail, the lock looks stale to the next script. That is safe, since each save checks isOwned().
 */
function ignoreErrors(step: () => unknown): void {
  try {
    step();
  } catch {}
}
