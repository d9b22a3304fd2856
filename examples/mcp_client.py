"""Code over the Model Context Protocol, with the protocol's own Python package: the tools that an agent has."""

import asyncio
import os

import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

URL = os.environ["CELLBLOCK_URL"]
KEY = os.environ["CELLBLOCK_API_KEY"]


async def main():
    async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}, timeout=130) as http:
        async with Client(streamable_http_client(f"{URL}/mcp", http_client=http)) as client:
            ran = await client.call_tool("run_code", {"code": "print(40 + 2)"})
            print(ran.content[0].text)
            await client.call_tool("close_session", {"session_id": ran.structured_content["session_id"]})


asyncio.run(main())
