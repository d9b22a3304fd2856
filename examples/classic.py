"""The classic routes with requests, where the server has them (`[doors.classic]`): only the base URL is this server's, and it has the key in it."""

import os

import requests

BASE_URL = f"{os.environ['CELLBLOCK_URL']}/t/{os.environ['CELLBLOCK_API_KEY']}"
USER = {"user_id": "example"}


def post(route, **how):
    answer = requests.post(f"{BASE_URL}/{route}", timeout=130, **how)
    answer.raise_for_status()
    return answer.json()


print(post("start_session", data=USER)["message"])
try:
    post("execute", json={**USER, "code": "x = 40"})
    print(post("execute", json={**USER, "code": "print(x + 2)"})["output"], end="")
finally:
    print(post("end_session", data=USER)["message"])
