import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, type TestContext, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { SquareEnvironment } from "square";
import { makeReady } from "../fixtures/campaign.ts";
import { inventCustomers } from "../fixtures/square.ts";
import { makeBench, PROJECT, pathWith, putFile, RUNTIME, toCommand } from "../fixtures/testing.ts";

const SCRIPTS = ["init-db", "pull-created", "pull-updated", "push-new"];
const CUSTOMERS = "SELECT * FROM customers ORDER BY local_id";
const onWindows = process.platform === "win32";
const onPosix = { skip: onWindows && "Windows has no signals and no executable files" };

// ---- The same under each runtime ----

test(`under ${RUNTIME}, two nights bring and send everything once`, async (t) => {
  const bench = await makeBench(t, { customers: inventCustomers(250), unevenPages: true });
  const counted = { unchanged: 0, linked: 0, retries: 0 };
  async function expectJson(script: string, expected: object) {
    const { code, stdout, stderr } = await bench.run(script, ["--json"]);
    assert.deepEqual([code, stderr], [0, ""], script);
    const { seconds, since, until, requests, ...said } = JSON.parse(stdout);
    const database = "database.db";
    assert.deepEqual(said, { script, environment: "offline", database, ...expected });
    return requests;
  }

  const made = await bench.run("init-db");
  assert.deepEqual(made, {
    code: 0,
    signal: null,
    stdout: "init-db: database.db is ready; made customers and sync_runs\n",
    stderr: "",
  });
  const pages = await expectJson("pull-created", {
    ...counted,
    fetched: 250,
    inserted: 250,
    updated: 0,
  });
  assert.ok(pages > 3);

  const [{ id = "" } = {}] = [...bench.square.customers.values()];
  bench.square.update(id, { given_name: "Zoë", note: "🌻" });
  await expectJson("pull-updated", { ...counted, fetched: 1, inserted: 0, updated: 1 });
  assert.deepEqual(bench.rows(`SELECT given_name, note FROM customers WHERE id = '${id}'`), [
    { given_name: "Zoë", note: "🌻" },
  ]);

  bench.sql(`INSERT INTO customers (given_name, email_address) VALUES ('Ada', 'ada@example.com');
    INSERT INTO customers (company_name, phone_number) VALUES ('Engines & Sons', '+12125550115')`);
  const pushed = await bench.json("push-new");
  assert.deepEqual([pushed.selected, pushed.created], [2, 2]);
  assert.equal(bench.square.customers.size, 252);

  const first = bench.rows(CUSTOMERS);
  assert.deepEqual([first.length, first.filter((row) => row.id === null).length], [252, 0]);
  const nothing = { ...counted, inserted: 0, updated: 0 };
  await expectJson("pull-created", { ...nothing, fetched: 2, unchanged: 2 });
  await expectJson("pull-updated", { ...nothing, fetched: 3, unchanged: 3 });
  assert.equal((await bench.json("push-new")).selected, 0);
  assert.deepEqual(bench.rows(CUSTOMERS), first);
  assert.deepEqual(bench.rows("PRAGMA integrity_check"), [{ integrity_check: "ok" }]);
  assert.deepEqual(fs.readdirSync(bench.folder), ["database.db"]);
  if (!onWindows) assert.equal(fs.statSync(join(bench.folder, "database.db")).mode & 0o777, 0o600);
});

// Under tsx itself, the README's tests hold --help to what is printed there.
if (RUNTIME !== "tsx")
  test(`under ${RUNTIME}, --help and a wrong option say what Node with tsx says`, async (t) => {
    const bench = await makeBench(t);
    const tsx = [process.execPath, "--import", import.meta.resolve("tsx")];
    const calls = SCRIPTS.map((name) => [name, "--help"] as const);
    for (const [name, arg] of [...calls, ["push-new", "--colour"], ["init-db", "stray"]] as const) {
      const ended = await bench.run(name, [arg]);
      const file = join(PROJECT, "scripts", `${name}.ts`);
      assert.deepEqual(ended, await bench.launch([...tsx, file, arg]).ended);
      assert.equal(ended.code, arg === "--help" ? 0 : 2);
    }
  });

test(`under ${RUNTIME}, each exit code is what it promises`, async (t) => {
  const bench = await makeBench(t);
  const expectCode = async (code: number, script: string, env = {}) => {
    const ended = await bench.run(script, [], env);
    assert.equal(ended.code, code, ended.stderr);
    assert.match(ended.stderr, new RegExp(`^${script}: `));
  };
  makeReady(bench);
  await expectCode(2, "pull-created", { SQUARE_ACCESS_TOKEN: "" });
  await expectCode(4, "pull-created", { SQUARE_ACCESS_TOKEN: "nobody" });
  bench.sql("INSERT INTO customers (given_name, email_address) VALUES ('Eve', 'no address')");
  await expectCode(3, "push-new");
  putFile(bench, "database.db.lock", `${process.pid} another`);
  await expectCode(75, "pull-created");
  fs.rmSync(join(bench.folder, "database.db.lock"));
  putFile(bench, "database.db", "This is no database, though it is long enough to be one.\n");
  await expectCode(1, "pull-created");
});

for (const [signal, code] of [
  ["SIGTERM", 143],
  ["SIGINT", 130],
] as const)
  test(`under ${RUNTIME}, ${signal} ends a script at once with ${code}`, onPosix, async (t) => {
    const { bench, running, holder } = await makeWaiting(t);
    const before = fs.readFileSync(join(bench.folder, "database.db"));
    const at = Date.now();
    process.kill(holder, signal);
    const ended = await running.ended;
    assert.equal(ended.code, code);
    assert.equal(
      ended.stderr,
      `pull-created: Cannot go on: stopped by ${signal}\nTry: run it again\n`,
    );
    assert.ok(Date.now() - at < 10_000);
    assert.deepEqual(fs.readdirSync(bench.folder), ["database.db"]);
    assert.deepEqual(fs.readFileSync(join(bench.folder, "database.db")), before);
  });

test(`under ${RUNTIME}, a killed script does not hold its lock for ever`, onPosix, async (t) => {
  const { bench, running, holder } = await makeWaiting(t);
  process.kill(holder, "SIGKILL");
  await running.ended;
  bench.square.set({ latencyMs: 0 });
  const lock = join(bench.folder, "database.db.lock");
  assert.ok(fs.existsSync(lock));
  if (RUNTIME === "deno") {
    // Deno may not ask whether a process lives: the lock's last beat has to be half a minute old.
    assert.equal((await bench.run("pull-created")).code, 75);
    const halfAMinuteAgo = new Date(Date.now() - 31_000);
    fs.utimesSync(lock, halfAMinuteAgo, halfAMinuteAgo);
  }
  assert.equal((await bench.json("pull-created")).fetched, 5);
  assert.deepEqual(fs.readdirSync(bench.folder), ["database.db"]);
});

/** A pull that holds the lock and waits for an answer, which takes a minute. */
async function makeWaiting(t: TestContext) {
  const bench = await makeBench(t, { customers: inventCustomers(5), latencyMs: 60_000 });
  makeReady(bench);
  const running = bench.start("pull-created");
  while (bench.square.requests.length === 0 && running.child.exitCode === null) await sleep(20);
  const lock = fs.readFileSync(join(bench.folder, "database.db.lock"), "utf8");
  // The process that works: what was started can be a wrapper around it.
  return { bench, running, holder: Number.parseInt(lock, 10) };
}

const script = "/usr/bin/script";
const onTerminal = {
  skip:
    (process.platform !== "linux" || !fs.existsSync(script)) &&
    "util-linux's script, which makes a terminal, is not here",
};

test(`under ${RUNTIME}, a terminal gets a bar, and gets its line back`, onTerminal, async (t) => {
  const bench = await makeBench(t, { customers: inventCustomers(500), latencyMs: 400 });
  makeReady(bench);
  const command = [...toCommand("pull-created", bench.square), "--concurrency", "1"];
  const line = command.map((word) => `'${word}'`).join(" ");
  const { code, stdout } = await bench.launch([script, "-qec", line, "/dev/null"]).ended;
  assert.equal(code, 0, stdout);
  assert.match(stdout, /[█░]+ 400\/500 customers, \d+ a second, \d+s left/);
  assert.ok(stdout.includes("\u001b[2Kpull-created (offline): 500 read, 500 new"), stdout);
  // Whoever waits hears why, on a line of its own: the bar makes room.
  bench.square.set({
    fault: ({ number }) =>
      number % 4 === 0 ? { kind: "status", status: 503, code: "SERVICE_UNAVAILABLE" } : undefined,
  });
  const slow = await bench.launch([script, "-qec", `${line} --since all`, "/dev/null"]).ended;
  const screen = slow.stdout.replaceAll("\u001b[2K", "\n").trimEnd();
  assert.match(screen, /^\/v2\/customers\/search: SERVICE_UNAVAILABLE; trying again/m);
  assert.match(screen, /^pull-created \(offline\): 500 read, 0 new[^\n]*$(?!\n)/m);
  const quiet = await bench.launch([script, "-qec", `${line} --since all --quiet`, "/dev/null"])
    .ended;
  assert.deepEqual([quiet.code, quiet.stdout], [0, ""]);
});

// ---- As a command ----

const asCommand = { skip: onPosix.skip || (RUNTIME !== "tsx" && "they are run by tsx") };

test("the scripts are executable, and run where tsx is on the PATH", asCommand, async (t) => {
  const bench = await makeBench(t);
  const files = SCRIPTS.map((script) => join(PROJECT, "scripts", `${script}.ts`));
  for (const file of files) {
    assert.match(fs.readFileSync(file, "utf8"), /^#!\/usr\/bin\/env tsx\n/);
    fs.accessSync(file, fs.constants.X_OK);
  }
  const env = { PATH: pathWith(join(PROJECT, "node_modules", ".bin")) };
  const { code, stderr } = await bench.launch(files.slice(0, 1), env).ended;
  assert.deepEqual([code, stderr], [0, ""]);
});

// ---- The deno lines ----

const deno = RUNTIME === "deno" ? (process.env.SCRIPT_RUNNER ?? "") : "deno";
const hasDeno = spawnSync(deno, ["--version"]).status === 0;
if (RUNTIME === "deno" && !hasDeno) throw new Error(`Cannot test: "${deno}" does not start`);
const isOther = RUNTIME !== "tsx" && RUNTIME !== "deno" && `this run is about ${RUNTIME}`;
const withDeno = { skip: isOther || (!hasDeno && "deno is not on the PATH") };

const HOSTS = "connect.squareup.com,connect.squareupsandbox.com";

/** The deno line of a script's header, word by word. */
function readLine(script: string): string[] {
  const text = fs.readFileSync(join(PROJECT, "scripts", `${script}.ts`), "utf8");
  const [, line = ""] = /^ \* +(deno run(?:.*\\\n)*.*)$/m.exec(text) ?? [];
  return line.split(/[\s\\]+(?:\* +)?/);
}

test("the deno lines name every file, variable and host, and both hosts are Square's", () => {
  const { Production, Sandbox } = SquareEnvironment;
  assert.equal([Production, Sandbox].map((url) => new URL(url).host).join(), HOSTS);
  for (const script of SCRIPTS) {
    const allowed = readLine(script).filter((word) => word.startsWith("-"));
    const isPull = script !== "init-db";
    assert.deepEqual(
      allowed.map((word) => word.split("=")[0]).sort(),
      [
        "--allow-env",
        "--allow-net",
        "--allow-read",
        "--allow-write",
        "--ignore-env",
        "--no-prompt",
      ].filter((name) => isPull || name !== "--allow-net"),
    );
    for (const word of allowed) assert.match(word, /^(--allow-\w+=\S+|--ignore-env|--no-prompt)$/);
    if (isPull) assert.ok(allowed.includes(`--allow-net=${HOSTS}`), script);
  }
});

let copy = "";
after(() => fs.rmSync(copy, { recursive: true, force: true }));

/** A copy of what a learner has after `npm ci`, without what only developing needs. */
function copyProject(): string {
  if (copy !== "") return copy;
  copy = fs.realpathSync(fs.mkdtempSync(join(tmpdir(), "square-customers-deno-")));
  const { packages } = JSON.parse(fs.readFileSync(join(PROJECT, "package-lock.json"), "utf8"));
  const wanted = Object.entries<{ dev?: boolean }>(packages).filter(([, { dev }]) => !dev);
  for (const name of ["scripts", "lib", "package.json", ...wanted.map(([path]) => path)])
    if (name !== "" && fs.existsSync(join(PROJECT, name)))
      fs.cpSync(join(PROJECT, name), join(copy, name), { recursive: true });
  return copy;
}

/** Each line that has one permission less: a whole flag, or one name of its list. */
function toPoorer(line: string[]): { cut: string; poorer: string[] }[] {
  return line.flatMap((word, place) => {
    const [flag = "", list] = word.split("=");
    if (!/^--(allow|ignore)-/.test(flag)) return [];
    const without = { cut: word, poorer: line.filter((_, other) => other !== place) };
    const names = list?.split(",") ?? [];
    if (names.length < 2) return [without];
    const shorter = names.map((name) => {
      const rest = names.filter((one) => one !== name).join(",");
      return {
        cut: `${flag}=${name}`,
        poorer: line.map((one) => (one === word ? `${flag}=${rest}` : one)),
      };
    });
    return [without, ...shorter];
  });
}

// A variable that may not be read is as if it were not set. So some are given a value that is noticed,
// and is no longer noticed without the permission.
const VARIABLES: Record<string, { env?: Record<string, string>; seen?: RegExp; unseen: RegExp }> = {
  SQUARE_ACCESS_TOKEN: { unseen: /SQUARE_ACCESS_TOKEN is not set/ },
  SQUARE_BASE_URL: { unseen: /Square \(sandbox\): Deno has no permission/ },
  SQUARE_ENVIRONMENT: {
    env: { SQUARE_ENVIRONMENT: "mars" },
    seen: /SQUARE_ENVIRONMENT is not sandbox/,
    unseen: /^$/,
  },
  DATABASE_PATH: {
    env: { DATABASE_PATH: "other.db" },
    seen: /Cannot (open|lock) "other\.db"/,
    unseen: /^$/,
  },
};

for (const script of SCRIPTS)
  test(`${script} runs with its deno line, and with nothing less`, withDeno, async (t) => {
    const bench = await makeBench(t, { customers: inventCustomers(5) });
    const project = copyProject();
    const host = new URL(bench.square.url).host;
    // Only Square's hosts are replaced, both by the one that there is here.
    const line = readLine(script).map((word) => word.replace(HOSTS, host));
    assert.deepEqual(line.slice(0, 2), ["deno", "run"]);

    const path = join(project, "database.db");
    const files = () => fs.readdirSync(project).filter((name) => name.includes(".db"));
    async function run([, ...words]: string[], env: Record<string, string> = {}) {
      for (const name of files()) fs.rmSync(join(project, name));
      if (script !== "init-db") fs.copyFileSync(join(bench.folder, "database.db"), path);
      const before = fs.existsSync(path) ? fs.readFileSync(path, "utf8") : undefined;
      bench.square.requests.length = 0;
      const ended = await bench.launch([deno, ...words], env, { cwd: project }).ended;
      const after = fs.existsSync(path) ? fs.readFileSync(path, "utf8") : undefined;
      return { ...ended, isSaved: before !== after };
    }
    const asked = () => bench.square.requests.length;

    makeReady(bench);
    bench.sql("INSERT INTO customers (given_name) VALUES ('Ada')");
    const whole = await run(line);
    assert.deepEqual([whole.code, whole.stderr, whole.isSaved], [0, "", true]);
    assert.deepEqual([files(), asked() > 0], [["database.db"], script !== "init-db"]);

    for (const { cut, poorer } of toPoorer(line)) {
      const variable = VARIABLES[/^--allow-env=(\w+)/.exec(cut)?.[1] ?? ""];
      const { env, seen, unseen = /Requires|no permission/ } = variable ?? {};
      if (seen) assert.match((await run(line, env)).stderr, seen, cut);
      const ended = await run(poorer, env);
      assert.match(ended.stderr, unseen, cut);
      assert.equal(ended.code === 0, unseen.test(""), `${cut}: ${ended.stderr}`);
      // The keys of a push are on disk before anything is sent; otherwise the file is as it was.
      const isRefused = ended.stderr.includes("Deno has no permission for its host");
      assert.equal(ended.isSaved, ended.code === 0 || (isRefused && script === "push-new"), cut);
      if (isRefused) assert.equal(asked(), 0, cut);
    }

    if (script === "init-db") return;
    const elsewhere = await run(line.map((word) => word.replace(host, "127.0.0.1:9")));
    assert.equal(elsewhere.code, 2);
    assert.match(elsewhere.stderr, /Cannot reach Square \(offline\): Deno has no permission/);
    assert.equal(asked(), 0);
    // As it stands, the line lets nobody go to another host than Square's, this computer included.
    const asItStands = await run(readLine(script));
    assert.deepEqual([asItStands.code, asked()], [2, 0]);
    for (const [environment, left] of [
      ["production", "connect.squareupsandbox.com"],
      ["sandbox", "connect.squareup.com"],
    ] as const) {
      const env = { SQUARE_BASE_URL: "", SQUARE_ENVIRONMENT: environment };
      const other = await run(
        readLine(script).map((word) => word.replace(HOSTS, left)),
        env,
      );
      assert.match(other.stderr, new RegExp(`Cannot reach Square \\(${environment}\\): Deno`));
    }
  });

test(
  "the deno lines read the whole folder because that is what flushing it takes",
  withDeno,
  async (t) => {
    const bench = await makeBench(t, { customers: inventCustomers(5) });
    const project = copyProject();
    const ends = ["", ".tmp", ".lock", "-wal", "-shm", "-journal"].map(
      (end) => `database.db${end}`,
    );
    const reads = [".env", "lib", "node_modules", ...ends].join(",");
    const [, ...line] = readLine("init-db");
    const narrow = line.map((word) => word.replace("--allow-read=.", `--allow-read=${reads}`));
    fs.rmSync(join(project, "database.db"), { force: true });
    const { code, stderr } = await bench.launch([deno, ...narrow], {}, { cwd: project }).ended;
    assert.equal(code, 1);
    assert.match(
      stderr,
      /Cannot save "database\.db": Requires read access to "(\.|[^"]*-deno-\w+)"/,
    );
  },
);
