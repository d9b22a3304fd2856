// Runs E2B's own JavaScript clients, as they come, against a server: `clients.mjs URL KEY CASES`. Ends with 0 if the client got what it should.
//
// They find the server by the environment alone, as programs do that are moved. A case is a function in `cases`; what it asserts is what E2B's programs rely on.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";

const [url, key, names] = process.argv.slice(2);

// The three variables that move a program, and nothing else of E2B's. Before the clients are loaded, which read them.
for (const variable of Object.keys(process.env).filter((variable) => variable.startsWith("E2B_"))) {
  delete process.env[variable];
}
Object.assign(process.env, { E2B_API_URL: url, E2B_SANDBOX_URL: url, E2B_API_KEY: key });

const cases = {
  async versions() {
    const version = async (client) =>
      JSON.parse(await readFile(new URL(`../node_modules/${client}/package.json`, import.meta.url))).version;
    assert.equal(await version("e2b"), "2.51.0");
    assert.equal(await version("@e2b/code-interpreter"), "2.8.0");
  },

  async a_wrong_key_is_told_as_one() {
    const { Sandbox, AuthenticationError } = await import("@e2b/code-interpreter");
    const wrong = { apiKey: `e2b_${"0".repeat(64)}` };
    await assert.rejects(Sandbox.create(wrong), AuthenticationError);
  },
};

for (const name of names.split(",")) await cases[name]();
