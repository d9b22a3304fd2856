"""Events of an execution as they happen, with httpx: a JSON object a line."""

import json
import os

import httpx

URL = os.environ["CELLBLOCK_URL"]
KEY = os.environ["CELLBLOCK_API_KEY"]
CODE = "import time\nfor n in range(3):\n    print('step', n)\n    time.sleep(0.2)"

headers = {"Authorization": f"Bearer {KEY}", "Accept": "application/x-ndjson"}
with httpx.Client(base_url=f"{URL}/v1", headers=headers, timeout=130) as client:
    with client.stream("POST", "/runs", json={"code": CODE}) as answer:
        answer.raise_for_status()
        for event in map(json.loads, answer.iter_lines()):
            print(event["type"], event.get("text", "").strip())
