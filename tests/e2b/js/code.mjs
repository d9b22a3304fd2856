// Runs code as E2B's own JavaScript client does, as it comes: `code.mjs URL KEY CASE`. Ends with 0 if the client got what it should.

import assert from "node:assert/strict";

const [url, key, name] = process.argv.slice(2);

// The three variables that move a program, and nothing else of E2B's. Before the clients are loaded, which read them.
for (const variable of Object.keys(process.env).filter((variable) => variable.startsWith("E2B_"))) {
  delete process.env[variable];
}
Object.assign(process.env, { E2B_API_URL: url, E2B_SANDBOX_URL: url, E2B_API_KEY: key });

const { Sandbox, NotFoundError, TimeoutError } = await import("@e2b/code-interpreter");

const cases = {
  async state_and_callbacks(sandbox) {
    await sandbox.runCode("x = 20");
    const heard = { stdout: [], stderr: [], results: [], errors: [] };
    const ran = await sandbox.runCode("import sys\nprint('out')\nprint('err', file=sys.stderr)\nx + 1", {
      onStdout: (message) => heard.stdout.push(message.line),
      onStderr: (message) => heard.stderr.push(message.line),
      onResult: (result) => heard.results.push(result.text),
      onError: (error) => heard.errors.push(error.name),
    });
    assert.equal(ran.text, "21");
    assert.deepEqual(heard, { stdout: ["out\n"], stderr: ["err\n"], results: ["21"], errors: [] });
    const failed = await sandbox.runCode("1 / 0", { onError: (error) => heard.errors.push(error.name) });
    assert.equal(failed.error.name, "ZeroDivisionError");
    assert.match(failed.error.traceback, /1 \/ 0/);
    assert.deepEqual(heard.errors, ["ZeroDivisionError"]);
  },

  async pictures_charts_and_data(sandbox) {
    const drawn = await sandbox.runCode("import matplotlib.pyplot as plt\nplt.bar(['a', 'b'], [1, 2])\nplt.title('bars')\nplt.show()");
    assert.equal(Buffer.from(drawn.results[0].png, "base64").subarray(1, 4).toString(), "PNG");
    assert.equal(drawn.results[0].chart.type, "bar");
    assert.equal(drawn.results[0].chart.title, "bars");
    const frame = await sandbox.runCode("import pandas as pd\npd.DataFrame({'a': [1, 2]})");
    assert.deepEqual(frame.results[0].data, { a: [1, 2] });
  },

  async text_of_any_kind(sandbox) {
    const line = "\u{1f600}é\u2028\u0085".repeat(2000);
    const ran = await sandbox.runCode(`import sys\nfor _ in range(40):\n    print("\\U0001f600\\u00e9\\u2028\\x85" * 2000)\n    sys.stdout.flush()`);
    assert.equal(ran.logs.stdout.join(""), `${line}\n`.repeat(40));
  },

  async contexts_and_languages(sandbox) {
    const before = await sandbox.listCodeContexts();
    assert.deepEqual([before[0].language, before[0].cwd], ["python", "/home/user"]);
    const context = await sandbox.createCodeContext({ language: "javascript", cwd: "/tmp" });
    assert.deepEqual([context.language, context.cwd], ["javascript", "/tmp"]);
    assert.equal((await sandbox.runCode("globalThis.n = 4; n * 2", { context })).text, "8");
    await sandbox.restartCodeContext(context);
    assert.equal((await sandbox.runCode("typeof globalThis.n", { context })).text, "undefined");
    assert.equal((await sandbox.listCodeContexts()).at(-1).id, context.id);
    await sandbox.removeCodeContext(context);
    await assert.rejects(sandbox.runCode("1", { context }), NotFoundError);
    const ran = await sandbox.runCode("const n: number = 1; console.log(n, process.env.MINE)", { language: "ts", envs: { MINE: "yes" } });
    assert.deepEqual(ran.logs.stdout, ["1 yes\n"]);
  },

  async what_is_given_up_does_not_stand_in_the_way(sandbox) {
    await assert.rejects(sandbox.runCode("import time\ntime.sleep(60)", { timeoutMs: 3000 }), TimeoutError);
    const began = Date.now();
    assert.equal((await sandbox.runCode("1 + 1", { timeoutMs: 10_000 })).text, "2");
    assert.ok(Date.now() - began < 6000);
  },
};

const sandbox = await Sandbox.create({ timeoutMs: 600_000 });
for (const [each, act] of Object.entries(cases)) {
  if (name !== "all" && name !== each) continue;
  const began = Date.now();
  await act(sandbox);
  console.log(`${each}: ${(Date.now() - began) / 1000} s`);
}
assert.equal(await sandbox.kill(), true);
// Connections of the client are kept for a while, and the process with them.
process.exit(0);
