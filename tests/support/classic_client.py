"""A client of the classic routes as people have written them, with `requests` and no headers: `classic_client.py BASE_URL`. Ends with 0 if it got what it should."""

import sys

import requests


class Sandbox:
    def __init__(self, base_url, user_id):
        self.base_url, self.user_id = base_url, user_id

    def form(self, route, **more):
        return requests.post(f"{self.base_url}/{route}", data={"user_id": self.user_id}, timeout=120, **more)

    def json(self, route, **fields):
        return requests.post(f"{self.base_url}/{route}", json={"user_id": self.user_id, **fields}, timeout=120)

    def run(self, code):
        answer = self.json("execute", code=code)
        assert answer.status_code == 200, (answer.status_code, answer.text)
        return answer.json()["output"]


def main(base_url):
    sandbox = Sandbox(base_url, "user_test")
    assert sandbox.json("execute", code="1").status_code == 404

    started = sandbox.form("start_session")
    assert started.status_code == 200, started.text
    assert started.json()["message"] == "Session started successfully"
    assert started.json()["notebook_path"].endswith("/user_test/notebook_user_test.ipynb"), started.text

    assert sandbox.run('print("Hello, World!")') == "Hello, World!\n"
    assert sandbox.run("x = 20") == ""
    assert sandbox.run("print('a'); x + 1") == "a\n21"

    failed = sandbox.json("execute", code="1/0")
    assert failed.status_code == 400, failed.text
    detail = failed.json()["detail"]
    assert detail["error"] == "Execution error" and "ZeroDivisionError" in "".join(detail["traceback"]), detail
    assert sandbox.run("x") == "20", "an exception costs no variable"

    late = sandbox.json("execute", code="import time\ntry:\n    time.sleep(60)\nfinally:\n    stopped = True")
    assert (late.status_code, late.json()) == (408, {"detail": "Code execution timed out"}), late.text
    assert sandbox.run("stopped, x") == "(True, 20)", "it was interrupted, and nothing is lost"

    installed = sandbox.json("install_package", package_name="ipython")
    assert installed.status_code == 200, installed.text
    assert installed.json()["message"] == "Successfully installed and imported ipython"
    assert isinstance(installed.json()["output"], str)
    assert sandbox.run("IPython.__name__") == "'IPython'"
    refused = sandbox.json("install_package", package_name="left-pad")
    assert refused.status_code == 403 and "left-pad" in refused.json()["detail"], refused.text

    sent = requests.post(
        f"{base_url}/upload_file", data={"user_id": "user_test"}, files={"file": ("data.csv", b"a,b\n1,2\n")}, timeout=60
    )
    assert sent.status_code == 200, sent.text
    assert sandbox.run("open('data.csv').read()") == repr("a,b\n1,2\n")
    assert sandbox.run(f"open({sent.json()['file_path']!r}).read(3)") == "'a,b'"

    reset = sandbox.form("reset")
    assert (reset.status_code, reset.json()) == (200, {"message": "Kernel reset successful"}), reset.text
    assert sandbox.json("execute", code="x").status_code == 400, "variables are gone"
    assert sandbox.run("json.dumps(1)") == "'1'", "what is imported before is imported again"

    notebook = requests.get(f"{base_url}/notebook/user_test", timeout=60).json()
    assert notebook["nbformat"] == 4 and any("Hello" in "".join(cell["source"]) for cell in notebook["cells"]), notebook
    same = requests.get(base_url + started.json()["notebook_path"], timeout=60).json()
    assert same["cells"] == notebook["cells"]

    assert sandbox.form("start_session").status_code == 200
    assert sandbox.json("execute", code="x").status_code == 400, "another session"
    ended = sandbox.form("end_session")
    assert (ended.status_code, ended.json()) == (200, {"message": "Session ended successfully"}), ended.text
    gone = sandbox.form("end_session")
    assert gone.status_code == 404 and isinstance(gone.json()["detail"], str), gone.text
    wrong = requests.post(f"{base_url}/start_session", timeout=60)
    assert wrong.status_code == 422 and wrong.json()["detail"][0]["loc"] == ["body", "user_id"], wrong.text
    assert wrong.json()["detail"][0]["type"] == "missing"


if __name__ == "__main__":
    main(sys.argv[1])
