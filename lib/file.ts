import * as fs from "node:fs";
import { dirname } from "node:path";
import { setInterval } from "node:timers";
import { setTimeout as sleep } from "node:timers/promises";
import { codeOf, EXIT, messageOf, SyncError } from "./errors.ts";

// sql.js works on a copy in memory, so the file on disk is ours to protect: from a second script of
// ours (the lock), from half a file (write beside, flush, rename), from other programs (the stamp).

const POLL_MS = 100;
const BUSY_MS = 5_000; // how long another script or program is waited for
const BEAT_MS = 2_000;
const DEAD_MS = 30_000; // a lock without a beat for so long is nobody's
const UNNAMED_MS = 1_000; // nor is one without a name: its maker was killed before it wrote it
const LARGEST_BYTES = 1.9 * 2 ** 30; // Node cannot read 2 GiB in one call, nor Deno write it

/**
 * Takes `<path>.lock` until this program ends, and clears away what a killed one left.
 * @returns says whether it is still held, and not by another script that took this one for dead
 * @throws SyncError (later) when another script holds it for more than a few seconds
 */
export async function lockFile(path: string, stop: AbortSignal) {
  const lock = `${path}.lock`;
  const name = `${process.pid} ${crypto.randomUUID()}`;
  const isHeld = () => read(lock).toString() === name;
  for (const started = Date.now(); ; await sleep(POLL_MS, undefined, { signal: stop })) {
    try {
      // Two scripts may find it dead at once. Both overwrite it and look again after a pause: the one
      // whose name stayed has it.
      const flag = isDead(lock) ? "w" : "wx";
      fs.writeFileSync(lock, name, { flag, mode: 0o600 });
      if (flag === "wx") break;
    } catch (error) {
      const isNowhere = ["ENOENT", "ENOTDIR"].includes(codeOf(error));
      if (isNowhere) throw cannot("use", path, "there is no such folder", EXIT.usage);
      if (codeOf(error) !== "EEXIST") throw cannot("lock", path, error);
      if (isHeld()) break;
      if (Date.now() - started > BUSY_MS) throw busy(path, "another script is at work on it");
    }
  }
  const beat = () => isHeld() && fs.utimesSync(lock, new Date(), new Date());
  setInterval(beat, BEAT_MS).unref();
  process.once("exit", () => isHeld() && fs.rmSync(lock, { force: true }));
  fs.rmSync(`${path}.tmp`, { force: true });
  return isHeld;
}

// Deno may not ask for a process, and its number can be another's by now: then the beat tells.
function isDead(lock: string): boolean {
  const pid = Number.parseInt(read(lock).toString(), 10);
  try {
    process.kill(pid, 0);
  } catch (error) {
    if (codeOf(error) === "ESRCH") return true;
  }
  const beatAt = fs.statSync(lock, { throwIfNoEntry: false })?.mtimeMs ?? Date.now();
  return Date.now() - beatAt > (pid > 0 ? DEAD_MS : UNNAMED_MS);
}

/**
 * The file that a path means. A link is followed, since a rename would replace the link itself.
 * @throws SyncError (usage) when there is something that is no file
 */
export function toRealPath(path: string): string {
  try {
    const isLink = fs.lstatSync(path, { throwIfNoEntry: false })?.isSymbolicLink();
    const real = isLink ? fs.realpathSync(path) : path;
    if (fs.statSync(real, { throwIfNoEntry: false })?.isFile() === false)
      throw new Error("it is not a file");
    return real;
  } catch (error) {
    throw cannot("use", path, error, EXIT.usage);
  }
}

/**
 * Reads a database file whole, with its stamp; a missing one is empty.
 * @throws SyncError (later) when another program is half-way through something, and stays so
 */
export async function readFile(path: string, stop: AbortSignal) {
  for (const started = Date.now(); ; await sleep(POLL_MS, undefined, { signal: stop })) {
    const stamp = stampOf(path);
    // A copy: sql.js writes into what it is given, and a small Buffer is a part of a shared one.
    const bytes = new Uint8Array(read(path));
    // SQLite writes in place: what changed while we read may be half old, half new.
    if (stampOf(path) === stamp) return { bytes, stamp };
    if (Date.now() - started < BUSY_MS) continue;
    const tidy = `sqlite3 "${path}" "PRAGMA journal_mode = DELETE; SELECT count(*) FROM customers"`;
    const next = `close that program; or, if none runs: ${tidy}`;
    throw busy(path, "another program has it open, or died with it open", next);
  }
}

/**
 * Replaces a database file in one step: a crash leaves the old file or the new one, never a mixture.
 * @param from the stamp of what the new bytes were made from
 * @returns the new stamp, or undefined when the file was changed since: then nothing was replaced
 */
export function replaceFile(path: string, bytes: Uint8Array, from: string, isHeld: () => boolean) {
  if (!isHeld()) throw busy(path, "another script took it over");
  const temporary = `${path}.tmp`;
  try {
    checkSize(path, bytes.byteLength);
    fs.writeFileSync(temporary, bytes, { flag: "wx", mode: 0o600 });
    const mine = fs.statSync(temporary);
    const { mode, uid, gid } = fs.statSync(path, { throwIfNoEntry: false }) ?? mine;
    if ((mode & 0o200) === 0) throw new Error("it is read-only");
    if (uid !== mine.uid || gid !== mine.gid) fs.chownSync(temporary, uid, gid);
    fs.chmodSync(temporary, mode & 0o777);
    flush(temporary, "r+");
    if (!isHeld() || stampOf(path) !== from) return undefined;
    fs.renameSync(temporary, path);
    const stamp = stampOf(path);
    if (process.platform !== "win32") flush(dirname(path), "r"); // Windows has no way to
    return stamp;
  } catch (error) {
    throw cannot("save", path, error);
  } finally {
    if (isHeld()) fs.rmSync(temporary, { force: true }); // else it is another script's by now
  }
}

/**
 * What tells one state of a file from the next: any commit by anybody changes it. A file that another
 * program has open gets a new word each time, which equals nothing, so that nothing is built on it.
 * @throws SyncError when the file is too large
 */
export function stampOf(path: string): string {
  const stat = (end: string) => fs.statSync(path + end, { bigint: true, throwIfNoEntry: false });
  const file = stat("");
  checkSize(path, file?.size ?? 0);
  // Rows that are only in a -wal are invisible to sql.js, and SQLite would play an old -wal or -journal
  // over the file that we put in its place. The header of a finished journal is all zeros.
  const isHot = /[^\0]/.test(read(`${path}-journal`).toString("latin1", 0, 28));
  if (isHot || stat("-wal") || stat("-shm")) return crypto.randomUUID();
  return file ? [file.size, file.ino, file.mtimeNs, file.ctimeNs].join(" ") : "missing";
}

/** The error for a file that is in use, which passes. */
export function busy(path: string, state: string, next = "run it again when the other is done") {
  return new SyncError(`Cannot use "${path}": ${state}`, EXIT.later, next);
}

// In the system's own words, such as "ENOSPC: no space left on device, write".
function cannot(action: string, path: string, error: unknown, exitCode: number = EXIT.failed) {
  if (error instanceof SyncError) return error;
  const state = messageOf(error);
  const next = exitCode === EXIT.usage ? "another file with --db" : undefined;
  return new SyncError(`Cannot ${action} "${path}": ${state}`, exitCode, next, error);
}

function checkSize(path: string, bytes: number | bigint): void {
  if (bytes > LARGEST_BYTES) throw cannot("use", path, "it is larger than 1.9 GiB");
}

function read(path: string): Buffer {
  try {
    return fs.readFileSync(path);
  } catch (error) {
    if (codeOf(error) !== "ENOENT") throw cannot("read", path, error);
    return Buffer.alloc(0);
  }
}

function flush(path: string, flag: "r" | "r+"): void {
  const handle = fs.openSync(path, flag);
  fs.fsyncSync(handle);
  fs.closeSync(handle);
}
