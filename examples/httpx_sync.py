"""A session with httpx: made, asked twice, ended."""

import os

import httpx

URL = os.environ["CELLBLOCK_URL"]
KEY = os.environ["CELLBLOCK_API_KEY"]

with httpx.Client(base_url=f"{URL}/v1", headers={"Authorization": f"Bearer {KEY}"}, timeout=130) as client:
    session = client.post("/sessions", json={}).raise_for_status().json()["id"]
    try:
        for code in ["x = 40", "print(x + 2)"]:
            ran = client.post(f"/sessions/{session}/executions", json={"code": code}).raise_for_status().json()
            print(ran["status"], ran["stdout"], end="\n" if not ran["stdout"] else "")
    finally:
        client.delete(f"/sessions/{session}")
