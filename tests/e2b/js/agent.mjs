// Works with files, commands and terminals as E2B's own JavaScript client does, as it comes: `agent.mjs URL KEY CASES`. Ends with 0 if the client got what it should.

import assert from "node:assert/strict";

const [url, key, names] = process.argv.slice(2);

// The three variables that move a program, and nothing else of E2B's. Before the clients are loaded, which read them.
for (const variable of Object.keys(process.env).filter((variable) => variable.startsWith("E2B_"))) {
  delete process.env[variable];
}
Object.assign(process.env, { E2B_API_URL: url, E2B_SANDBOX_URL: url, E2B_API_KEY: key });

const { Sandbox, CommandExitError, FileNotFoundError, NotFoundError, TimeoutError } = await import("e2b");
const sandbox = await Sandbox.create({ timeoutMs: 600_000 });

const until = async (what) => {
  for (let tries = 0; tries < 200; tries++) {
    if (what()) return;
    await new Promise((done) => setTimeout(done, 100));
  }
  assert.fail("it did not come");
};

const cases = {
  async files() {
    const { files } = sandbox;
    assert.equal((await files.write("a/ü😀.txt", "here ü")).path, "/home/user/a/ü😀.txt");
    assert.equal(await files.read("/home/user/a/ü😀.txt"), "here ü");
    await files.write("empty", "");
    assert.equal(await files.read("empty"), "");
    const several = await files.write([
      { path: "/tmp/one/x.txt", data: "1" },
      { path: 'two/"y".txt', data: new Blob(["2"]) },
    ]);
    assert.deepEqual(several.map((file) => file.path), ["/tmp/one/x.txt", '/home/user/two/"y".txt']);
    assert.equal(await files.read('two/"y".txt'), "2");
    const big = new Uint8Array(20 * 1024 * 1024).map((_, at) => (at * 31) % 251);
    await files.write("big", new Blob([big]));
    assert.equal(Buffer.compare(Buffer.from(await files.read("big", { format: "bytes" })), Buffer.from(big)), 0);
    await assert.rejects(files.read("nothing"), FileNotFoundError);
    assert.equal(await files.makeDir("d/e"), true);
    assert.equal(await files.makeDir("d/e"), false);
    assert.deepEqual((await files.list("d")).map(({ name, type, path }) => [name, type, path]), [["e", "dir", "/home/user/d/e"]]);
    assert.equal((await files.rename("big", "d/big")).path, "/home/user/d/big");
    assert.equal((await files.getInfo("d/big")).size, 20 * 1024 * 1024);
    await files.remove("d");
    assert.equal(await files.exists("d"), false);
    const signed = await fetch(await sandbox.downloadUrl("two/\"y\".txt"));
    assert.deepEqual([signed.status, await signed.text()], [200, "2"]);
  },

  async changes() {
    const heard = [];
    await sandbox.files.makeDir("w");
    const handle = await sandbox.files.watchDir("w", (event) => heard.push([event.name, event.type]));
    await sandbox.files.write("w/x", "1");
    await until(() => heard.some(([, type]) => type === "write"));
    assert.deepEqual(heard, [["x", "create"], ["x", "write"]]);
    await handle.stop();
  },

  async commands() {
    const { commands } = sandbox;
    const heard = [];
    const ran = await commands.run("echo one; sleep 0.3; echo two >&2; echo é😀", {
      onStdout: (text) => heard.push(text),
      onStderr: (text) => heard.push(text),
    });
    assert.deepEqual([ran.exitCode, ran.stdout, ran.stderr], [0, "one\né😀\n", "two\n"]);
    assert.equal(heard[0], "one\n");
    await assert.rejects(commands.run("exit 3"), (error) => error instanceof CommandExitError && error.exitCode === 3);
    await assert.rejects(commands.run("sleep 4243", { timeoutMs: 2000 }), TimeoutError);
    const cat = await commands.run("cat", { background: true, stdin: true });
    assert.ok((await commands.list()).some((process) => process.pid === cat.pid));
    await commands.sendStdin(cat.pid, "typed");
    await commands.closeStdin(cat.pid);
    assert.equal((await cat.wait()).stdout, "typed");
    const sleeping = await commands.run("sleep 1000", { background: true });
    const joined = await commands.connect(sleeping.pid);
    assert.equal(await sleeping.kill(), true);
    await assert.rejects(joined.wait(), (error) => error.exitCode === -1 && error.error === "signal: killed");
    assert.equal(await commands.kill(sleeping.pid), false);
    await assert.rejects(commands.connect(999_999), NotFoundError);
  },

  async terminals() {
    let shown = "";
    const terminal = await sandbox.pty.create({ cols: 100, rows: 30, onData: (bytes) => (shown += Buffer.from(bytes)) });
    await sandbox.pty.resize(terminal.pid, { cols: 77, rows: 24 });
    await sandbox.pty.sendInput(terminal.pid, Buffer.from("stty size; exit\n"));
    await terminal.wait();
    assert.match(shown, /24 77/);
  },
};

for (const name of names.split(",")) await cases[name]();
assert.equal(await sandbox.kill(), true);
