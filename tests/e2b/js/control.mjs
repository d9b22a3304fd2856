// Makes, finds, changes and ends sandboxes as E2B's own JavaScript client does, as it comes: `control.mjs URL KEY CASES`. Ends with 0 if the client got what it should.

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";

const [url, key, names] = process.argv.slice(2);

// The three variables that move a program, and nothing else of E2B's. Before the clients are loaded, which read them.
for (const variable of Object.keys(process.env).filter((variable) => variable.startsWith("E2B_"))) {
  delete process.env[variable];
}
Object.assign(process.env, { E2B_API_URL: url, E2B_SANDBOX_URL: url, E2B_API_KEY: key });

const { Sandbox, NotFoundError, SandboxError } = await import("e2b");

const left = async (sandbox) => ((await sandbox.getInfo()).endAt - Date.now()) / 1000;

const cases = {
  async life() {
    const metadata = { "a b": "c&d", user: "ada" };
    const sandbox = await Sandbox.create({ timeoutMs: 120_000, metadata, envs: { MINE: "a b" } });
    const info = await sandbox.getInfo();
    assert.deepEqual([info.sandboxId, info.templateId, info.name, info.state], [sandbox.sandboxId, "e2b", "base", "running"]);
    assert.deepEqual(info.metadata, metadata);
    assert.equal((await sandbox.commands.run("echo $MINE")).stdout, "a b\n");
    await sandbox.setTimeout(600_000);
    assert.ok((await left(sandbox)) > 590);
    const again = await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 10_000 });
    assert.ok((await left(again)) > 500);
    assert.equal((await again.getMetrics()).length, 1);
    assert.equal(await again.pause(), true);
    assert.equal(await sandbox.pause(), false);
    assert.equal(await sandbox.isRunning(), false);
    await sandbox.connect({ timeoutMs: 100_000 });
    assert.equal(await sandbox.isRunning(), true);
    assert.ok((await left(sandbox)) <= 100);
    assert.equal(await sandbox.kill(), true);
    assert.equal(await sandbox.kill(), false);
    for (const gone of [sandbox.sandboxId, "unknown"]) {
      await assert.rejects(Sandbox.getInfo(gone), NotFoundError);
      await assert.rejects(Sandbox.connect(gone), NotFoundError);
      await assert.rejects(Sandbox.setTimeout(gone, 1000), NotFoundError);
    }
  },

  async lists() {
    const run = `run 50% & ${randomUUID()}`;
    const made = [];
    for (const n of ["0", "1"]) made.push(await Sandbox.create({ timeoutMs: 120_000, metadata: { run, n } }));
    const ids = made.map((sandbox) => sandbox.sandboxId);
    const pages = async (opts) => {
      const [found, paginator] = [[], Sandbox.list(opts)];
      while (paginator.hasNext) found.push((await paginator.nextItems()).map((info) => info.sandboxId));
      return found;
    };
    assert.deepEqual(await pages({ query: { metadata: { run } } }), [[ids[1], ids[0]]]);
    assert.deepEqual(await pages({ query: { metadata: { run } }, limit: 1 }), [[ids[1]], [ids[0]]]);
    assert.deepEqual(await pages({ query: { metadata: { run, n: "1" }, state: ["running", "paused"] } }), [[ids[1]]]);
    assert.deepEqual(await pages({ query: { metadata: { run }, state: ["paused"] } }), [[]]);
    for (const sandbox of made) await sandbox.kill();
  },

  async refusals() {
    const says = (word, promise) => assert.rejects(promise, (error) => error instanceof SandboxError && error.message.includes(word));
    await says("/templateID", Sandbox.create("nothing-of-that-name"));
    await says("/timeout", Sandbox.create({ timeoutMs: 10_000_000_000 }));
    await says("/allow_internet_access", Sandbox.create({ allowInternetAccess: true }));
    await says("/network/denyOut/0", Sandbox.create({ network: { denyOut: ["10.0.0.0/8"] } }));
    const sandbox = await Sandbox.create({ timeoutMs: 120_000 });
    await says("container", sandbox.createSnapshot());
    await sandbox.kill();
  },
};

for (const name of names.split(",")) await cases[name]();
// Connections of the client are kept for a while, and the process with them.
process.exit(0);
