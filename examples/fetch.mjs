// A session with JavaScript's fetch: made, asked twice, ended. Node 20 or later, without packages.

const { CELLBLOCK_URL: url, CELLBLOCK_API_KEY: key } = process.env;

async function ask(method, path, body) {
  const headers = { Authorization: `Bearer ${key}`, "Content-Type": "application/json" };
  const answer = await fetch(`${url}/v1${path}`, { method, headers, body: body && JSON.stringify(body) });
  if (!answer.ok) throw new Error(`${method} ${path}: ${answer.status} ${await answer.text()}`);
  return answer.json();
}

const session = await ask("POST", "/sessions", {});
try {
  for (const code of ["x = 40", "print(x + 2)"]) {
    const ran = await ask("POST", `/sessions/${session.id}/executions`, { code });
    console.log(ran.status, ran.stdout.trim());
  }
} finally {
  await ask("DELETE", `/sessions/${session.id}`);
}
