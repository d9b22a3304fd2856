// JupyterLab, as it comes, with a server as its gateway, in a browser without a screen: `lab.js PACKAGES PYTHON CHROMIUM PICTURE URL KEY`. Does with mouse and keys
// what a person does, and ends with 0 if the page shows what it should; PICTURE is of what it shows.
"use strict";

const assert = require("node:assert");
const { spawn } = require("node:child_process");
const fs = require("node:fs");
const net = require("node:net");
const os = require("node:os");
const path = require("node:path");
const [packages, python, chromium, picture, url, key] = process.argv.slice(2);
const playwright = require(path.resolve(packages, "node_modules", "playwright-core"));

const CELLS = [
  "import matplotlib.pyplot as plt\nx = 20\nplt.plot([1, 4, 9]); plt.title('seen in a browser')\nplt.show()",
  "print('begun', flush=True)\nwhile True: pass",
  "print('x is', x)",
  "import ipywidgets\nslider = ipywidgets.IntSlider(value=3, description='speed')\nsaid = ipywidgets.Label('nothing yet')\nslider.observe(lambda change: setattr(said, 'value', f\"moved to {change['new']}\"), 'value')\nipywidgets.VBox([slider, said])",
  "input('who? ') + ' is here'",
];

// A folder that knows nothing of this machine's user, with the notebook in it.
function home() {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "lab-"));
  const cells = CELLS.map((source, n) => ({ cell_type: "code", id: `cell-${n}`, metadata: {}, source, outputs: [], execution_count: null }));
  const kernelspec = { name: "data", display_name: "data", language: "python" };
  fs.mkdirSync(path.join(folder, "work"));
  fs.writeFileSync(path.join(folder, "work", "seen.ipynb"), JSON.stringify({ cells, metadata: { kernelspec }, nbformat: 4, nbformat_minor: 5 }));
  // It would ask a person whether to fetch news.
  const settings = path.join(folder, "settings", "@jupyterlab", "apputils-extension");
  fs.mkdirSync(settings, { recursive: true });
  fs.writeFileSync(path.join(settings, "notification.jupyterlab-settings"), JSON.stringify({ fetchNews: "false", checkForUpdates: false }));
  return folder;
}

function freePort() {
  return new Promise(resolve => {
    const server = net.createServer().listen(0, "127.0.0.1", () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });
}

async function startLab(folder) {
  const port = await freePort();
  const token = "0123456789abcdef";
  const names = ["JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "HOME", "IPYTHONDIR"];
  // It logs all of it, and sends some of it to its kernels.
  const env = { PATH: process.env.PATH, LANG: "C.UTF-8", NO_PROXY: "127.0.0.1", JUPYTERLAB_SETTINGS_DIR: path.join(folder, "settings") };
  for (const name of names) env[name] = path.join(folder, name.toLowerCase());
  for (const name of names) fs.mkdirSync(env[name], { recursive: true });
  const log = fs.openSync(path.join(folder, "log"), "w");
  const options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", `--port=${port}`, "--ServerApp.port_retries=0", `--IdentityProvider.token=${token}`];
  const lab = spawn(python, ["-P", "-m", "jupyterlab", `--gateway-url=${url}/t/${key}`, `--ServerApp.root_dir=${path.join(folder, "work")}`, ...options], { env, stdio: ["ignore", log, log] });
  const ended = new Promise(resolve => lab.on("exit", resolve));
  const deadline = Date.now() + 90_000;
  while (!(await fetch(`http://127.0.0.1:${port}/api`).then(answer => answer.ok, () => false))) {
    assert.ok(lab.exitCode === null && Date.now() < deadline, `JupyterLab does not answer:\n${fs.readFileSync(path.join(folder, "log"))}`);
    await new Promise(resolve => setTimeout(resolve, 200));
  }
  const end = () => (lab.kill("SIGTERM"), ended);
  return { address: `http://127.0.0.1:${port}/lab/tree/seen.ipynb?reset&token=${token}`, end };
}

// Until then the page runs nothing, whatever it shows.
function kernelAnswers(page) {
  return new Promise(resolve => page.on("websocket", socket => socket.on("framereceived", ({ payload }) => {
    if (socket.url().includes("/channels") && String(payload).includes("kernel_info_reply")) resolve();
  })));
}

async function useIt(page, answers) {
  const cell = n => page.locator(`.jp-Notebook .jp-CodeCell[data-windowed-list-index="${n}"]`);
  const output = n => cell(n).locator(".jp-OutputArea-output");
  const run = async n => {
    await cell(n).locator(".cm-content").click();
    await page.keyboard.press("Shift+Enter");
  };
  const button = name => page.locator(`.jp-NotebookPanel-toolbar [data-command="${name}"], .jp-NotebookPanel-toolbar [data-jp-item-name="${name}"]`).first();
  const idle = page.locator('.jp-NotebookPanel-toolbar .jp-Notebook-ExecutionIndicator[data-status="idle"]');

  await cell(0).waitFor({ timeout: 90_000 });
  await Promise.race([answers, new Promise((_, reject) => setTimeout(() => reject(new Error("the kernel does not answer")), 60_000))]);
  await idle.waitFor();

  await run(0);
  const plot = output(0).locator('img[src^="data:image/png"]');
  await plot.waitFor({ timeout: 60_000 });
  const { width, height } = await plot.evaluate(image => image.decode().then(() => ({ width: image.naturalWidth, height: image.naturalHeight })));
  assert.ok(width > 200 && height > 200, `${width} by ${height}`);

  await run(1);
  await output(1).filter({ hasText: "begun" }).waitFor();
  await button("interrupt").click();
  await output(1).filter({ hasText: "KeyboardInterrupt" }).waitFor();
  await idle.waitFor();
  await run(2);
  await output(2).filter({ hasText: "x is 20" }).waitFor();

  // A person takes the slider's handle and goes two to the right.
  await run(3);
  await output(3).locator(".noUi-handle").waitFor();
  await output(3).locator(".noUi-handle").focus();
  for (const _ of [1, 2]) await page.keyboard.press("ArrowRight");
  await output(3).locator(".widget-label", { hasText: "moved to 5" }).waitFor();
  await page.screenshot({ path: picture });

  await run(4);
  await output(4).locator("input").fill("Hanna");
  await page.keyboard.press("Enter");
  await output(4).filter({ hasText: "'Hanna is here'" }).waitFor();

  await button("restart").click();
  await page.locator(".jp-Dialog .jp-mod-accept").click();
  await idle.waitFor();
  await run(2);
  await output(2).filter({ hasText: "NameError" }).waitFor({ timeout: 60_000 });
}

async function main() {
  const folder = home();
  const lab = await startLab(folder);
  // As root it has to run without a sandbox of its own; the pages that it shows are ours.
  const browser = await playwright.chromium.launch({ executablePath: chromium, args: ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"] });
  const page = await browser.newPage({ viewport: { width: 1200, height: 1500 } });
  page.setDefaultTimeout(30_000);
  try {
    const answers = kernelAnswers(page);
    await page.goto(lab.address, { timeout: 90_000 });
    await useIt(page, answers);
  } catch (error) {
    await page.screenshot({ path: picture }).catch(() => {});
    throw new Error(`${error.stack}\nthe page is in ${picture}; JupyterLab said:\n${fs.readFileSync(path.join(folder, "log"))}`);
  } finally {
    await browser.close();
    // It ends its kernels.
    await lab.end();
    fs.rmSync(folder, { recursive: true, force: true });
  }
}

main().then(
  () => process.exit(0),
  error => {
    console.error(error.stack);
    process.exit(1);
  },
);
