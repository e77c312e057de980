import assert from "node:assert/strict";
import { type ChildProcess, execFileSync, spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
  chmodSync,
  chownSync,
  copyFileSync,
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { describe, it, type TestContext } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import {
  addRows,
  assertEqualSides,
  assertIntegrity,
  assertOneEach,
  assertSpeech,
  makeReady,
  nthRequest,
  readWatermark,
  waitUntil,
} from "../fixtures/campaign.ts";
import { inventCustomers, type OfflineSquareOptions } from "../fixtures/square.ts";
import {
  type Bench,
  type Ended,
  makeBench,
  PROJECT,
  putFile,
  readBack,
  TOKEN,
  toCommand,
} from "../fixtures/testing.ts";

const CUSTOMERS = inventCustomers(120);
const MANY = inventCustomers(450);
const ADD_OTHER = "INSERT INTO customers (given_name) VALUES ('Other')";
const isRoot = process.getuid?.() === 0;

async function makeReadyBench(t: TestContext, options: OfflineSquareOptions = {}): Promise<Bench> {
  const bench = await makeBench(t, { customers: CUSTOMERS, ...options });
  makeReady(bench);
  return bench;
}

/** Every file of the folder with its mode and its bytes, but for locks. */
function snapshot(folder: string): Record<string, string> {
  const names = readdirSync(folder).filter((name) => !name.endsWith(".lock"));
  return Object.fromEntries(
    names.map((name) => {
      const path = join(folder, name);
      const { mode } = lstatSync(path);
      const bytes = statSync(path).isFile() ? readFileSync(path) : "";
      return [name, `${mode.toString(8)} ${createHash("sha256").update(bytes).digest("hex")}`];
    }),
  );
}

/** Runs a script that has to fail, and holds it to its word: a clear message, and not a byte lost. */
async function assertRefuses(
  bench: Bench,
  script: string,
  args: string[],
  code: number,
  says: RegExp,
): Promise<Ended> {
  const before = snapshot(bench.folder);
  const ended = await bench.run(script, [...args, "--verbose"]);
  assertSpeech(ended);
  assert.equal(ended.code, code, ended.stderr);
  assert.match(ended.stderr, says);
  assert.equal(ended.stdout, "");
  assert.deepEqual(snapshot(bench.folder), before);
  assert.deepEqual(
    readdirSync(bench.folder).filter((name) => name.endsWith(".lock")),
    [],
  );
  return ended;
}

// Another program on the file: Python's own SQLite. It runs each line that it is sent.
const OTHER_PROGRAM = `
import sqlite3, sys
connection = sqlite3.connect("database.db", isolation_level=None, timeout=5)
for line in sys.stdin:
    try:
        print([list(row) for row in connection.execute(line)], flush=True)
    except Exception as error:
        print("failed:", error, flush=True)
`;

function startOther(t: TestContext, bench: Bench) {
  const child = spawn("python3", ["-c", OTHER_PROGRAM], {
    cwd: bench.folder,
    stdio: ["pipe", "pipe", "inherit"],
  });
  t.after(() => child.kill("SIGKILL"));
  const answers = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  return {
    async run(sql: string): Promise<string> {
      child.stdin.write(`${sql.replaceAll("\n", " ")}\n`);
      const { value } = await answers.next();
      return String(value);
    },
    end: (signal?: NodeJS.Signals) => over(child, signal),
  };
}

function over(child: ChildProcess, signal?: NodeJS.Signals): Promise<void> {
  return new Promise((resolve) => {
    child.once("close", () => resolve());
    if (signal) child.kill(signal);
    else child.stdin?.end();
  });
}

describe("The file", () => {
  describe("and our own scripts", { concurrency: 3 }, () => {
    it("a second script waits for a quick one to be done", async (t) => {
      const bench = await makeReadyBench(t);
      const lock = putFile(bench, "database.db.lock", `${process.pid} a script that is quick`);
      const { ended } = bench.start("pull-created");
      setTimeout(() => rmSync(lock), 2_500);
      const end = await ended;
      assert.equal(end.code, 0, end.stderr);
      assertEqualSides(bench);
    });

    it("a second script gives up on a slow one with 75, and the file is as it was", async (t) => {
      const bench = await makeReadyBench(t, { fault: () => ({ kind: "stall-headers" }) });
      const { child, ended } = bench.start("pull-created");
      await waitUntil(() => bench.square.requests.length > 0, "the first script");
      const before = snapshot(bench.folder);
      const second = await bench.run("push-new", ["--verbose"]);
      assertSpeech(second);
      assert.equal(second.code, 75, second.stderr);
      assert.match(second.stderr, /another script/);
      assert.deepEqual(snapshot(bench.folder), before);
      assert.equal(existsSync(join(bench.folder, "database.db.lock")), true);
      child.kill("SIGTERM");
      assert.equal((await ended).code, 143);
    });

    it("a lock without a word in it, and one whose holder's number was given away, do not block", async (t) => {
      const bench = await makeReadyBench(t);
      const longAgo = new Date(Date.now() - 60_000);
      for (const text of ["", "1 7f9c"]) {
        utimesSync(putFile(bench, "database.db.lock", text), longAgo, longAgo);
        assert.equal((await bench.run("init-db")).code, 0);
      }
      assert.equal(existsSync(join(bench.folder, "database.db.lock")), false);
    });

    it("a holder that slept while another took over its lock saves nothing", async (t) => {
      const bench = await makeReadyBench(t, { latencyMs: 50 });
      const { child, ended } = bench.start("pull-created", ["--since", "all"]);
      try {
        await waitUntil(() => bench.square.requests.length > 0, "the first script");
        child.kill("SIGSTOP");
        const longAgo = new Date(Date.now() - 60_000);
        utimesSync(join(bench.folder, "database.db.lock"), longAgo, longAgo);
        const other = await bench.run("pull-updated");
        assert.equal(other.code, 0, other.stderr);
        const before = snapshot(bench.folder);
        child.kill("SIGCONT");
        const end = await ended;
        assertSpeech(end);
        assert.equal(end.code, 75, end.stderr);
        assert.deepEqual(snapshot(bench.folder), before);
      } finally {
        child.kill("SIGKILL");
      }
      assertEqualSides(bench);
    });

    it("a file keeps its mode and its owner, and what a killed script left beside it is cleared away", async (t) => {
      const bench = await makeReadyBench(t);
      const path = join(bench.folder, "database.db");
      chmodSync(path, 0o640);
      if (isRoot) chownSync(path, 65_534, 65_534);
      putFile(bench, "database.db.tmp", "half of a file");
      putFile(bench, "database.db.lock", "999999999 7f9c");
      const before = statSync(path);
      assert.equal((await bench.run("pull-created")).code, 0);
      const after = statSync(path);
      assert.deepEqual([after.mode, after.uid, after.gid], [before.mode, before.uid, before.gid]);
      assert.notEqual(after.ino, before.ino);
      assert.deepEqual(readdirSync(bench.folder), ["database.db"]);
    });

    it("a link stays a link, and the file that it means is replaced", async (t) => {
      const bench = await makeReadyBench(t);
      const folder = join(bench.folder, "elsewhere");
      mkdirSync(folder);
      copyFileSync(join(bench.folder, "database.db"), join(folder, "real.db"));
      symlinkSync("elsewhere/real.db", join(bench.folder, "link.db"));
      assert.equal((await bench.run("pull-created", ["--db", "link.db"])).code, 0);
      assert.equal(readlinkSync(join(bench.folder, "link.db")), "elsewhere/real.db");
      assert.deepEqual(readdirSync(folder), ["real.db"]);
      const count = "SELECT count(*) AS n FROM customers";
      assert.deepEqual(readBack(join(folder, "real.db"), count), [{ n: CUSTOMERS.length }]);
    });
  });

  describe("that cannot be used", { concurrency: 3 }, () => {
    it("a damaged and a cut file are refused, and each is left as it was", async (t) => {
      const bench = await makeReadyBench(t);
      addRows(bench, 500);
      bench.sql("CREATE TABLE more AS SELECT * FROM customers");
      const path = join(bench.folder, "database.db");
      const whole = readFileSync(path);
      const damaged = Buffer.from(whole);
      damaged.fill(0xa5, 8 * 4096, 9 * 4096);
      for (const bytes of [
        damaged,
        whole.subarray(0, whole.length - 4096),
        whole.subarray(0, 50),
      ]) {
        writeFileSync(path, bytes);
        await assertRefuses(bench, "pull-created", [], 1, /damaged/);
      }
    });

    it("another program's database, and one of a newer kit, are refused", async (t) => {
      const bench = await makeBench(t);
      bench.sql("CREATE TABLE customers (name TEXT); INSERT INTO customers VALUES ('theirs')");
      await assertRefuses(bench, "push-new", [], 2, /Cannot use "database.db": .*tables/);
      bench.sql("PRAGMA user_version = 99");
      await assertRefuses(bench, "pull-created", [], 2, /newer|version 99/);
    });

    it("a missing file, and one without content, are not taken for an empty directory", async (t) => {
      const bench = await makeBench(t, { customers: CUSTOMERS });
      await assertRefuses(bench, "pull-created", [], 2, /no such file/);
      putFile(bench, "empty.db", "");
      await assertRefuses(bench, "pull-created", ["--db", "empty.db"], 2, /tables/);
      assert.equal(bench.square.requests.length, 0);
    });

    it("a folder, and a path through a file, are refused", async (t) => {
      const bench = await makeReadyBench(t);
      mkdirSync(join(bench.folder, "folder.db"));
      for (const [path, says] of [
        ["folder.db", /it is not a file/],
        ["/dev/null", /it is not a file/],
        ["database.db/x.db", /not a directory|no such (file|folder)/],
        ["nowhere/x.db", /no such (file|folder)/],
      ] as const)
        for (const script of ["init-db", "pull-created"])
          await assertRefuses(bench, script, ["--db", path], 2, says);
    });

    it("a read-only file is not replaced", async (t) => {
      const bench = await makeReadyBench(t);
      chmodSync(join(bench.folder, "database.db"), 0o444);
      await assertRefuses(bench, "pull-created", [], 1, /Cannot save .*read-only/);
    });

    it("a folder without write permission is a clear error", async (t) => {
      const bench = await makeReadyBench(t);
      chmodSync(join(bench.folder, "database.db"), 0o666);
      chmodSync(bench.folder, 0o555);
      const before = snapshot(bench.folder);
      const nobody = isRoot ? { uid: 65_534, gid: 65_534 } : {};
      const command = toCommand("pull-created", bench.square);
      const ended = await bench.launch(command, { TSX_DISABLE_CACHE: "1" }, nobody).ended;
      chmodSync(bench.folder, 0o755);
      if (/(EACCES|permission denied).*tsx|Cannot find module/i.test(ended.stderr))
        return t.skip("the project cannot be read by another user");
      assertSpeech(ended);
      assert.equal(ended.code, 1, ended.stderr);
      assert.match(ended.stderr, /Cannot (lock|save) ".*": .*permission denied/);
      assert.deepEqual(snapshot(bench.folder), before);
    });

    it("a file above 1.9 GiB is refused before it is read", async (t) => {
      const bench = await makeReadyBench(t);
      const large = 2 ** 31;
      truncateSync(join(bench.folder, "database.db"), large);
      const ended = await bench.run("pull-created");
      assertSpeech(ended);
      assert.equal(ended.code, 1, ended.stderr);
      assert.match(ended.stderr, /larger than 1.9 GiB/);
      assert.equal(statSync(join(bench.folder, "database.db")).size, large);
    });
  });

  describe("on a disk that is full", { concurrency: 3 }, () => {
    it("a pull that may not write so much leaves the old file", async (t) => {
      const bench = await makeReadyBench(t, { customers: MANY });
      const before = snapshot(bench.folder);
      const ended = await runLimited(bench, "pull-created", 60);
      assertSpeech(ended);
      assert.equal(ended.code, 1, ended.stderr);
      assert.match(ended.stderr, /Cannot save "database.db": /);
      assert.deepEqual(snapshot(bench.folder), before);
    });

    it("a push that cannot save its keys sends nothing", async (t) => {
      const bench = await makeReadyBench(t, { customers: [] });
      addRows(bench, 400);
      const before = snapshot(bench.folder);
      const ended = await runLimited(bench, "push-new", 60);
      assertSpeech(ended);
      assert.equal(ended.code, 1, ended.stderr);
      assert.match(ended.stderr, /Cannot save "database.db": /);
      assert.deepEqual(snapshot(bench.folder), before);
      assert.equal(bench.square.requests.length, 0);
    });

    it("a real full disk is named, and holds the old file", async (t) => {
      const disk = mkdtempSync(join(tmpdir(), "square-customers-disk-"));
      t.after(() => rmSync(disk, { recursive: true, force: true }));
      const mounted = spawnSync("mount", ["-t", "tmpfs", "-o", "size=100k", "tmpfs", disk]);
      if (mounted.status !== 0) return t.skip("a small disk cannot be mounted here");
      try {
        const bench = await makeReadyBench(t, { customers: MANY });
        const path = join(disk, "database.db");
        copyFileSync(join(bench.folder, "database.db"), path);
        const before = snapshot(disk);
        const full = await bench.run("pull-created", ["--db", path, "--verbose"]);
        assertSpeech(full);
        assert.equal(full.code, 1, full.stderr);
        assert.match(full.stderr, /no space left/);
        assert.deepEqual(snapshot(disk), before);
        execFileSync("mount", ["-o", "remount,ro", disk]);
        const readOnly = await bench.run("pull-created", ["--db", path]);
        assert.equal(readOnly.code, 1, readOnly.stderr);
        assert.match(readOnly.stderr, /read-only/);
        assert.deepEqual(snapshot(disk), before);
      } finally {
        execFileSync("umount", [disk]);
      }
    });

    it("a summary that cannot be written is a failure, and the work is saved", async (t) => {
      if (!existsSync("/dev/full")) return t.skip("there is no /dev/full here");
      const bench = await makeReadyBench(t);
      const ended = await runInShell(bench, 'exec "$@" > /dev/full', "pull-created");
      assert.equal(ended.code, 1, ended.stderr);
      assertEqualSides(bench);
      assert.match(ended.stderr, /^pull-created: Cannot .+/m);
      assert.deepEqual(readdirSync(bench.folder), ["database.db"]);
    });
  });

  describe("and other programs", { concurrency: 3 }, () => {
    it("a file that another program has open in WAL mode is refused until it is closed", async (t) => {
      const bench = await makeReadyBench(t);
      const other = startOther(t, bench);
      await other.run("PRAGMA journal_mode = WAL");
      assert.equal(await other.run(ADD_OTHER), "[]");
      assert.notEqual(statSync(join(bench.folder, "database.db-wal")).size, 0);
      const ended = await assertRefuses(bench, "pull-created", [], 75, /another program/);
      assert.match(ended.stderr, /^Try: /m);
      assert.equal(await other.run("SELECT given_name FROM customers"), "[['Other']]");
      await other.end();
      assert.equal((await bench.run("pull-created")).code, 0);
      assert.equal(bench.rows("SELECT 1 FROM customers").length, CUSTOMERS.length + 1);
      assertIntegrity(bench);
    });

    it("an empty -wal and a lone -shm are refused too", async (t) => {
      const bench = await makeReadyBench(t);
      const wal = putFile(bench, "database.db-wal", "");
      await assertRefuses(bench, "push-new", [], 75, /another program/);
      rmSync(wal);
      putFile(bench, "database.db-shm", Buffer.alloc(32_768));
      await assertRefuses(bench, "init-db", [], 75, /another program/);
    });

    it("the hot journal of a killed program is refused, and the program's SQLite puts it right", async (t) => {
      const bench = await makeReadyBench(t);
      const names = addRows(bench, 300);
      const other = startOther(t, bench);
      await other.run("PRAGMA cache_size = 2");
      await other.run("BEGIN");
      await other.run("UPDATE customers SET given_name = 'half', note = hex(zeroblob(500))");
      await other.end("SIGKILL");
      assert.notEqual(readFileSync(join(bench.folder, "database.db-journal"))[0], 0);
      await assertRefuses(bench, "pull-created", [], 75, /another program/);
      assert.deepEqual(
        bench.rows("SELECT given_name FROM customers").map((row) => row.given_name),
        names,
      );
      assertIntegrity(bench);
    });

    it("the finished journals that other programs keep do not block", async (t) => {
      const bench = await makeReadyBench(t);
      for (const mode of ["PERSIST", "TRUNCATE"]) {
        const other = startOther(t, bench);
        await other.run(`PRAGMA journal_mode = ${mode}`);
        await other.run(ADD_OTHER);
        assert.equal(existsSync(join(bench.folder, "database.db-journal")), true);
        assert.equal((await bench.run("pull-created", ["--since", "all"])).code, 0);
        await other.end();
        rmSync(join(bench.folder, "database.db-journal"));
      }
      assert.equal(bench.rows("SELECT 1 FROM customers").length, CUSTOMERS.length + 2);
    });

    it("a transaction that another program has open is waited for, and its row survives", async (t) => {
      const bench = await makeReadyBench(t);
      const other = startOther(t, bench);
      await other.run("BEGIN IMMEDIATE");
      await other.run(ADD_OTHER);
      const ended = await bench.run("pull-created");
      assertSpeech(ended);
      const said = await other.run("COMMIT");
      if (said === "[]")
        assert.deepEqual(
          bench.rows("SELECT given_name FROM customers WHERE given_name = 'Other'"),
          [{ given_name: "Other" }],
          `the other program's commit was accepted, and lost; pull-created ended with ${ended.code}`,
        );
      assert.equal(ended.code, 75, ended.stderr);
      assert.equal(readWatermark(bench, "pull-created"), null);
    });

    it("a transaction that another program ends soon is no trouble", async (t) => {
      const bench = await makeReadyBench(t);
      const other = startOther(t, bench);
      bench.square.set({
        fault: nthRequest("search", 2, () => {
          void other.run("BEGIN IMMEDIATE");
          void other.run(ADD_OTHER);
          void sleep(1_500).then(() => other.run("COMMIT"));
          return undefined;
        }),
      });
      const ended = await bench.run("pull-created");
      assert.equal(ended.code, 0, ended.stderr);
      await waitUntil(() => !existsSync(join(bench.folder, "database.db-journal")), "the commit");
      assert.equal(bench.rows("SELECT 1 FROM customers").length, CUSTOMERS.length + 1);
    });

    it("rows that another program adds between the calls of a push survive, and get their place", async (t) => {
      const bench = await makeReadyBench(t, { customers: [] });
      const names = addRows(bench, 6);
      let count = 0;
      bench.square.set({
        fault: () => {
          bench.sql(ADD_OTHER.replace("Other", `Other ${++count}`));
          return undefined;
        },
      });
      const ended = await bench.run("push-new", ["--batch-size", "2"]);
      assert.equal(ended.code, 0, ended.stderr);
      assertOneEach(bench, names);
      bench.square.set({ fault: undefined });
      assert.equal((await bench.run("push-new")).code, 0);
      assertOneEach(bench, [...names, "Other 1", "Other 2", "Other 3"]);
      assertEqualSides(bench);
    });

    it("an older file that is put in the place of ours makes no hole, and no row is sent without its key there", async (t) => {
      const bench = await makeReadyBench(t);
      const path = join(bench.folder, "database.db");
      const backup = readFileSync(path);
      const putBack = () => {
        rmSync(path);
        writeFileSync(path, backup);
      };
      assert.equal((await bench.run("pull-created")).code, 0);
      bench.square.set({ fault: nthRequest("search", 1, () => void putBack()) });
      assert.equal((await bench.run("pull-created")).code, 0);
      assert.equal((await bench.run("pull-created")).code, 0);
      assert.equal(bench.rows("SELECT 1 FROM customers").length, CUSTOMERS.length);
      const names = addRows(bench, 2);
      const older = readFileSync(path);
      bench.square.set({
        fault: nthRequest("create", 1, () => {
          rmSync(path);
          writeFileSync(path, older);
          return undefined;
        }),
      });
      assert.equal((await bench.run("push-new", ["--batch-size", "1"])).code, 75);
      bench.square.set({ fault: undefined });
      assert.equal((await bench.run("push-new")).code, 3);
      const isLast = (profile: Record<string, unknown>) => profile.given_name === names[1];
      assert.equal([...bench.square.customers.values()].filter(isLast).length, 1);
    });

    it("a row that another program puts in the place of one that is on its way stays itself", async (t) => {
      const bench = await makeReadyBench(t, { customers: [] });
      bench.sql("INSERT INTO customers (given_name) VALUES ('Ada')");
      bench.square.set({
        fault: nthRequest("bulk-create", 1, () => {
          bench.sql(`DELETE FROM customers; ${ADD_OTHER}`);
          return undefined;
        }),
      });
      await bench.run("push-new");
      assert.equal((await bench.run("pull-created")).code, 0);
      assertOneEach(bench, ["Ada"]);
      assert.deepEqual(bench.rows("SELECT id FROM customers WHERE given_name = 'Other'"), [
        { id: null },
      ]);
    });

    it("a row that another program adds while a pull reads Square survives, and one that kept the file open is told at its next write", async (t) => {
      const bench = await makeReadyBench(t);
      const other = startOther(t, bench);
      await other.run("SELECT count(*) FROM customers");
      bench.square.set({ fault: nthRequest("search", 2, () => void bench.sql(ADD_OTHER)) });
      assert.equal((await bench.run("pull-created")).code, 0);
      assert.match(await other.run(ADD_OTHER), /^failed: .*readonly/);
      await other.end();
      const again = startOther(t, bench);
      assert.equal(await again.run(ADD_OTHER), "[]");
      await again.end();
      assert.deepEqual(bench.rows("SELECT count(*) AS n, count(id) AS ids FROM customers"), [
        { n: CUSTOMERS.length + 2, ids: CUSTOMERS.length },
      ]);
    });
  });

  describe("and what must stay inside it", { concurrency: 3 }, () => {
    it("the token is in no output, whatever fails and however much is told", async (t) => {
      const bench = await makeReadyBench(t, { customers: [] });
      addRows(bench, 2);
      const echo = {
        category: "INVALID_REQUEST_ERROR",
        code: `NO_${TOKEN}`,
        detail: TOKEN,
        field: TOKEN,
      };
      bench.square.set({
        fault: ({ token = "" }) => ({
          kind: "change",
          change: () => ({ errors: [{ ...echo, detail: `${TOKEN} ${token}` }] }),
        }),
      });
      for (const script of ["pull-created", "push-new"]) {
        const ended = await bench.run(script, ["--json", "--verbose"]);
        assert.notEqual(ended.code, 0);
        assertSpeech(ended);
      }
    });

    it("an address that is not https is refused, but for this machine", async (t) => {
      const bench = await makeReadyBench(t);
      for (const url of [
        "http://127.0.0.1.example.com",
        "http://localhost@example.com",
        "ftp://127.0.0.1",
        "https://me:secret@example.com",
      ]) {
        const ended = await bench.run("pull-created", ["--verbose"], { SQUARE_BASE_URL: url });
        assertSpeech(ended);
        assert.equal(ended.code, 2, url);
        assert.match(ended.stderr, /SQUARE_BASE_URL/);
      }
    });

    it("no control character of a customer reaches the terminal", async (t) => {
      const nasty = "A\u001b[2J\u009b31m\u0007\r\u0085\u202eZ";
      const bench = await makeReadyBench(t, { customers: [] });
      bench.sql(`INSERT INTO customers (given_name, email_address, country) VALUES
        ('${nasty}', 'a@example.com', NULL), ('${nasty} 2', 'a@example.com', NULL),
        ('B', '${nasty}', NULL), ('C', NULL, '\u009bU')`);
      for (const option of ["--dry-run", "--json"]) {
        const ended = await bench.run("push-new", [option, "--verbose"]);
        assertSpeech(ended);
        assert.equal(ended.code, 3, ended.stderr);
      }
      const [made] = bench.square.customers.values();
      assert.equal(made?.given_name, nasty);
      bench.square.set({
        fault: () => ({
          kind: "change",
          change: (body) => ({
            ...body,
            errors: [
              { category: "INVALID_REQUEST_ERROR", code: nasty, field: nasty, detail: nasty },
            ],
          }),
        }),
      });
      bench.sql("INSERT INTO customers (given_name) VALUES ('D')");
      assertSpeech(await bench.run("push-new", ["--json", "--verbose"]));
    });

    it("a name that tries SQL injection is just a name", async (t) => {
      const bench = await makeReadyBench(t, { customers: [] });
      const name = "Robert'); DROP TABLE customers; --";
      const quoted = name.replaceAll("'", "''");
      bench.square.create({ given_name: name, note: `"${name}`, reference_id: `' OR '1'='1` });
      bench.sql(`INSERT INTO customers (given_name, source, reference_id)
        VALUES ('${quoted} 2', 'x'' OR ''1''=''1', '${quoted}'), ('Ann', 'shop', NULL)`);
      const pushed = await bench.json("push-new", ["--source", "x' OR '1'='1"]);
      assert.deepEqual([pushed.selected, pushed.created], [1, 1]);
      const path = join(bench.folder, `o'brien "${name.slice(0, 8)}.db`);
      copyFileSync(join(bench.folder, "database.db"), path);
      assert.equal((await bench.run("pull-created", ["--db", path])).code, 0);
      assert.deepEqual(
        readBack(path, "SELECT given_name FROM customers WHERE id IS NOT NULL ORDER BY local_id"),
        [{ given_name: `${name} 2` }, { given_name: name }],
      );
    });

    it("secrets and databases are ignored by git, and their examples are not", (t) => {
      const folder = mkdtempSync(join(tmpdir(), "square-customers-git-"));
      t.after(() => rmSync(folder, { recursive: true, force: true }));
      execFileSync("git", ["init", "--quiet", folder]);
      copyFileSync(join(PROJECT, ".gitignore"), join(folder, ".gitignore"));
      const isIgnored = (name: string) =>
        spawnSync("git", ["check-ignore", "--quiet", name], { cwd: folder }).status === 0;
      const secret = [".env", "database.db", "shop.sqlite", "shop.sqlite3"];
      for (const end of [".tmp", ".lock", "-wal", "-shm", "-journal"])
        secret.push(`database.db${end}`);
      assert.deepEqual(
        [...secret, ".env.example", "database.db.example", "lib/schema.sql"].filter(
          (name) => !isIgnored(name),
        ),
        [".env.example", "database.db.example", "lib/schema.sql"],
      );
    });
  });
});

/** Runs a script so that no file of it may grow beyond a number of kilobytes. */
function runLimited(bench: Bench, script: string, kilobytes: number): Promise<Ended> {
  return runInShell(bench, `ulimit -f ${kilobytes * 2}; exec "$@"`, script);
}

function runInShell(bench: Bench, line: string, script: string): Promise<Ended> {
  const command = ["sh", "-c", line, "sh", ...toCommand(script, bench.square)];
  return bench.launch(command, { TSX_DISABLE_CACHE: "1" }).ended;
}
