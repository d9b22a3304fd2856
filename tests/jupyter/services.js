// Runs JupyterLab's own client library (@jupyterlab/services), as it comes, against a server: `services.js PACKAGES URL KEY`. Ends with 0 if it got what it should.
"use strict";

const assert = require("node:assert");
const path = require("node:path");
const [packages, url, key] = process.argv.slice(2);
const services = require(path.resolve(packages, "node_modules", "@jupyterlab/services"));
const { KernelManager, KernelSpecManager, ServerConnection, SessionManager } = services;

const serverSettings = ServerConnection.makeSettings({
  baseUrl: `${url}/`,
  wsUrl: `${url.replace("http", "ws")}/`,
  token: key,
  appendToken: true,
});

// Ends what waits for something that does not come, and says what that was.
function within(seconds, what, promise) {
  let timer;
  const late = new Promise((_, reject) => (timer = setTimeout(() => reject(new Error(`waited ${seconds} s for ${what}`)), seconds * 1000)));
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

function until(signal, what, wanted) {
  return within(30, what, new Promise(resolve => {
    const look = (sender, value) => {
      if (!wanted(value, sender)) return;
      signal.disconnect(look);
      resolve(value);
    };
    signal.connect(look);
  }));
}

// Runs code; answers with its reply and what it put out.
async function run(kernel, code, answer) {
  const future = kernel.requestExecute({ code, allow_stdin: answer !== undefined, stop_on_error: true });
  const put = [];
  future.onIOPub = message => put.push(message);
  future.onStdin = message => {
    if (message.header.msg_type === "input_request") future.sendInputReply({ status: "ok", value: answer(message.content.prompt) }, message.header);
  };
  const reply = await within(60, code, future.done);
  const text = put.filter(m => m.header.msg_type === "stream").map(m => m.content.text).join("");
  return { reply: reply.content, put, text, kinds: put.map(m => m.header.msg_type) };
}

async function executes(kernel) {
  const info = await within(60, "the kernel's information", kernel.info);
  assert.strictEqual(info.language_info.name, "python");
  const got = await run(kernel, "x = 20\nprint('printed')\nfrom IPython.display import display\nh = display({'text/html': '<b>1</b>'}, raw=True, display_id=True)\nh.update({'text/html': '<b>2</b>'}, raw=True)\nx + 1");
  assert.strictEqual(got.reply.status, "ok");
  assert.deepStrictEqual(got.kinds, ["status", "execute_input", "stream", "display_data", "update_display_data", "execute_result", "status"]);
  assert.strictEqual(got.text, "printed\n");
  assert.strictEqual(got.put[4].content.data["text/html"], "<b>2</b>");
  assert.strictEqual(got.put[5].content.data["text/plain"], "21");
  assert.strictEqual(got.put[4].content.transient.display_id, got.put[3].content.transient.display_id);

  const failed = await run(kernel, "1/0");
  assert.deepStrictEqual([failed.reply.status, failed.reply.ename], ["error", "ZeroDivisionError"]);
  assert.ok(failed.kinds.includes("error"));
  const both = await Promise.all([run(kernel, "import time; time.sleep(.2); 1/0"), run(kernel, "never = 1")]);
  assert.strictEqual(both[1].reply.status, "aborted");

  const completed = await kernel.requestComplete({ code: "pri", cursor_pos: 3 });
  assert.ok(completed.content.matches.includes("print"), completed.content.matches);
  const inspected = await kernel.requestInspect({ code: "print", cursor_pos: 5, detail_level: 0 });
  assert.strictEqual(inspected.content.found, true);
  assert.strictEqual((await kernel.requestIsComplete({ code: "for n in x:" })).content.status, "incomplete");
}

async function asks(kernel) {
  const got = await run(kernel, "print('hello ' + input('name? '))", prompt => (assert.strictEqual(prompt, "name? "), "Hanna"));
  assert.strictEqual(got.text, "hello Hanna\n");
  const denied = await run(kernel, "input()");
  assert.strictEqual(denied.reply.ename, "StdinNotImplementedError");
}

async function interrupts(kernel) {
  const future = kernel.requestExecute({ code: "print('begun', flush=True)\nwhile True: pass" });
  await within(30, "its first word", new Promise(resolve => (future.onIOPub = m => m.header.msg_type === "stream" && resolve())));
  assert.strictEqual(kernel.status, "busy");
  await kernel.interrupt();
  const reply = await within(30, "the end of what was interrupted", future.done);
  assert.strictEqual(reply.content.ename, "KeyboardInterrupt");
  assert.strictEqual((await run(kernel, "x")).put.find(m => m.header.msg_type === "execute_result").content.data["text/plain"], "20");
}

// A comm from either side, with bytes beside its JSON both ways.
async function comms(kernel) {
  const defined = await run(kernel, `
from comm import create_comm, get_comm_manager
def opened(comm, message):
    def said(message):
        comm.send({'sum': sum(bytes(message['buffers'][0])), 'given': message['content']['data']}, buffers=[b'\\x00\\x01\\xff'])
    comm.on_msg(said)
get_comm_manager().register_target('theirs', opened)`);
  assert.strictEqual(defined.reply.status, "ok");
  const comm = kernel.createComm("theirs");
  const answered = within(30, "an answer on the comm", new Promise(resolve => (comm.onMsg = resolve)));
  await comm.open({}).done;
  comm.send({ n: 7 }, undefined, [new Uint8Array([1, 2, 255]).buffer]);
  const answer = await answered;
  assert.deepStrictEqual(answer.content.data, { sum: 258, given: { n: 7 } });
  assert.deepStrictEqual([...new Uint8Array(answer.buffers[0].buffer ?? answer.buffers[0])], [0, 1, 255]);

  const target = within(30, "a comm of the kernel's", new Promise(resolve => kernel.registerCommTarget("ours", (comm, message) => {
    comm.onMsg = second => resolve([message, second]);
  })));
  const opened = await run(kernel, "kept = create_comm('ours', data={'first': 1}, buffers=[b'abc'])\nkept.send({'second': 2})");
  assert.strictEqual(opened.reply.status, "ok", opened.reply.evalue);
  const [first, second] = await target;
  assert.deepStrictEqual([first.content.data, second.content.data], [{ first: 1 }, { second: 2 }]);
  assert.strictEqual(Buffer.from(first.buffers[0].buffer ?? first.buffers[0]).toString(), "abc");
  const listed = await kernel.requestCommInfo({ target_name: "theirs" });
  assert.deepStrictEqual(Object.keys(listed.content.comms), [comm.commId]);
}

async function restarts(kernel) {
  const told = until(kernel.statusChanged, "a restart that is told of", status => status === "restarting" || status === "autorestarting");
  await Promise.all([told, kernel.restart()]);
  await within(60, "a new kernel", kernel.info);
  assert.strictEqual((await run(kernel, "x")).reply.ename, "NameError");
  // One that dies by itself is replaced, and its client is told, and goes on.
  const died = kernel.requestExecute({ code: "import os; os._exit(3)" });
  const ended = died.done.then(() => "answered", () => "given up");
  await until(kernel.statusChanged, "a death that is told of", status => status === "autorestarting");
  // It drops what it waited for, opens another connection, and asks who is there.
  await until(kernel.statusChanged, "a kernel that is there again", status => status === "idle");
  assert.ok(["answered", "given up"].includes(await within(30, "the end of what was running", ended)));
  assert.strictEqual((await run(kernel, "print('again')")).text, "again\n");
}

async function main() {
  const specs = new KernelSpecManager({ serverSettings });
  const kernels = new KernelManager({ serverSettings });
  const sessions = new SessionManager({ serverSettings, kernelManager: kernels });
  await within(60, "the managers", Promise.all([specs.ready, kernels.ready, sessions.ready]));
  assert.ok("python" in specs.specs.kernelspecs && "r" in specs.specs.kernelspecs, Object.keys(specs.specs.kernelspecs).join());
  assert.ok(specs.specs.default in specs.specs.kernelspecs);

  const session = await within(60, "a session", sessions.startNew({ path: "services.ipynb", name: "services.ipynb", type: "notebook", kernel: { name: specs.specs.default } }));
  const kernel = session.kernel;
  for (const part of [executes, asks, interrupts, comms, restarts]) {
    await part(kernel).catch(error => {
      throw new Error(`${part.name}: ${error.stack}`);
    });
  }

  await session.setPath("renamed.ipynb");
  await sessions.refreshRunning();
  assert.ok([...sessions.running()].some(model => model.path === "renamed.ipynb"));
  // A second client of the same kernel sees what the first one runs.
  const second = kernels.connectTo({ model: kernel.model });
  await within(60, "the second client", second.info);
  const seen = until(second.anyMessage, "what the other one prints", ({ msg }) => msg.header.msg_type === "stream" && msg.content.text === "for both\n");
  await run(kernel, "print('for both')");
  await seen;
  second.dispose();

  const old = kernel.id;
  await within(60, "another kernel", session.changeKernel({ name: "python" }));
  assert.notStrictEqual(session.kernel.id, old);
  assert.strictEqual((await run(session.kernel, "print('new')")).text, "new\n");
  await session.shutdown();
  await kernels.refreshRunning();
  const left = [...kernels.running()].map(model => model.id);
  assert.ok(!left.includes(old) && !left.includes(session.kernel?.id), left.join());
  sessions.dispose();
  kernels.dispose();
  specs.dispose();
}

main().then(
  () => process.exit(0),
  error => {
    console.error(error.stack);
    process.exit(1);
  },
);
