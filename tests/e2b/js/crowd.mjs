// Works with many sandboxes at once as E2B's own JavaScript client does, as it comes: `crowd.mjs URL KEY COUNT FIRST`. Ends with 0 if each client got what is its own.
//
// Says "made" when all sandboxes are there, and goes on when its input ends. Each client has a number of its own, the first of them FIRST.

import assert from "node:assert/strict";
import { text } from "node:stream/consumers";

const [url, key, count, first] = process.argv.slice(2);

// The three variables that move a program, and nothing else of E2B's. Before the clients are loaded, which read them.
for (const variable of Object.keys(process.env).filter((variable) => variable.startsWith("E2B_"))) {
  delete process.env[variable];
}
Object.assign(process.env, { E2B_API_URL: url, E2B_SANDBOX_URL: url, E2B_API_KEY: key });

const { Sandbox } = await import("@e2b/code-interpreter");
const requestTimeoutMs = 500_000;
const patient = { requestTimeoutMs, timeoutMs: requestTimeoutMs };

const works = async (sandbox, number) => {
  const ran = await sandbox.runCode(`x = ${number}\nprint('code', x)\nx * x`, patient);
  assert.deepEqual([ran.text, ran.logs.stdout.join(""), ran.error], [`${number * number}`, `code ${number}\n`, undefined]);
  const command = await sandbox.commands.run(`echo command ${number}`, patient);
  assert.deepEqual([command.exitCode, command.stdout], [0, `command ${number}\n`]);
  const written = await sandbox.files.write("mine/file.txt", `file ${number}`.repeat(1000), { requestTimeoutMs });
  assert.equal(written.path, "/home/user/mine/file.txt");
  assert.equal(await sandbox.files.read("mine/file.txt", { requestTimeoutMs }), `file ${number}`.repeat(1000));
  assert.equal(await sandbox.kill({ requestTimeoutMs }), true);
  assert.equal(await sandbox.isRunning({ requestTimeoutMs }), false);
};

const numbers = Array.from({ length: Number(count) }, (_, at) => Number(first) + at);
const made = await Promise.all(numbers.map(() => Sandbox.create({ timeoutMs: 1_200_000, requestTimeoutMs })));
console.log("made");
await text(process.stdin);
await Promise.all(made.map((sandbox, at) => works(sandbox, numbers[at])));
// Connections of the client are kept for a while, and the process with them.
process.exit(0);
