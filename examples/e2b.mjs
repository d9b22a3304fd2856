// Code in a sandbox with E2B's own client, which finds this server by E2B_API_URL, E2B_SANDBOX_URL and E2B_API_KEY.

import { Sandbox } from "@e2b/code-interpreter";

const sandbox = await Sandbox.create();
try {
  await sandbox.runCode("x = 40");
  const ran = await sandbox.runCode("print(x + 2)");
  console.log(ran.logs.stdout.join("").trim());
} finally {
  await sandbox.kill();
}
