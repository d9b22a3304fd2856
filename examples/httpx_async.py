"""Three runs at once with httpx, each in a container of its own that is thrown away."""

import asyncio
import os

import httpx

URL = os.environ["CELLBLOCK_URL"]
KEY = os.environ["CELLBLOCK_API_KEY"]


async def run(client, code):
    return (await client.post("/runs", json={"code": code})).raise_for_status().json()


async def main():
    async with httpx.AsyncClient(base_url=f"{URL}/v1", headers={"Authorization": f"Bearer {KEY}"}, timeout=130) as client:
        for ran in await asyncio.gather(*(run(client, f"print({n} ** 2)") for n in range(3))):
            print(ran["status"], ran["stdout"], end="")


asyncio.run(main())
