"""Code in a sandbox with E2B's own client, which finds this server by E2B_API_URL, E2B_SANDBOX_URL and E2B_API_KEY."""

from e2b_code_interpreter import Sandbox

with Sandbox.create() as sandbox:
    sandbox.run_code("x = 40")
    ran = sandbox.run_code("print(x + 2)")
    print("".join(ran.logs.stdout), end="")
