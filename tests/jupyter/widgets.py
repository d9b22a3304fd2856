"""A slider of ipywidgets in a kernel, and a client that moves it: `widgets.py URL KEY`. Ends with 0 if either side heard what the other did.

The client is jupyter_server's for gateways, which JupyterLab's server and nbclient use; what the widget's drawing would send is sent here as it is on the wire.
"""

import asyncio
import sys

VIEW = "application/vnd.jupyter.widget-view+json"
SLIDER = """import ipywidgets
from IPython.display import display
heard = []
def observer(change):
    heard.append(change['new'])
    print('observed', change['new'])
slider = ipywidgets.IntSlider(value=3, max=50)
slider.observe(observer, 'value')
display(slider)"""


class Client:
    def __init__(self, kernel):
        self.kernel = kernel

    async def all_of(self, msg_id):
        """What was published for a message, to its end."""
        published = []
        while not (published and published[-1]["content"].get("execution_state") == "idle"):
            message = await self.kernel.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") == msg_id:
                published.append(message)
        return published

    async def run(self, code):
        msg_id = self.kernel.execute(code)
        published = await self.all_of(msg_id)
        failed = [message["content"] for message in published if message["msg_type"] == "error"]
        assert not failed, failed
        return published

    async def comm(self, comm_id, data):
        message = self.kernel.session.msg("comm_msg", {"comm_id": comm_id, "data": data})
        self.kernel.shell_channel.send(message)
        return await self.all_of(message["header"]["msg_id"])

    async def ask(self, msg_type, content):
        message = self.kernel.session.msg(msg_type, content)
        self.kernel.shell_channel.send(message)
        while True:
            reply = await self.kernel.get_shell_msg(timeout=60)
            if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
                return reply["content"]


def of_type(published, msg_type):
    return [message["content"] for message in published if message["msg_type"] == msg_type]


def printed(published):
    return "".join(content["text"] for content in of_type(published, "stream"))


async def main(url, key):
    from jupyter_server.gateway.gateway_client import GatewayClient
    from jupyter_server.gateway.managers import GatewayKernelManager

    GatewayClient.instance().url = f"{url}/t/{key}"
    manager = GatewayKernelManager()
    await manager.start_kernel(kernel_name="data")
    kernel = manager.client()
    await kernel.start_channels()
    try:
        await kernel.wait_for_ready(timeout=60)
        await moves(Client(kernel))
    finally:
        kernel.stop_channels()
        await manager.shutdown_kernel()


async def moves(client):
    published = await client.run(SLIDER)
    opened = {content["comm_id"]: content["data"]["state"] for content in of_type(published, "comm_open")}
    names = sorted(state["_model_name"] for state in opened.values())
    assert names == ["IntSliderModel", "LayoutModel", "SliderStyleModel"], names
    assert all(message["metadata"]["version"] for message in published if message["msg_type"] == "comm_open")
    (shown,) = of_type(published, "display_data")
    slider = shown["data"][VIEW]["model_id"]
    assert opened[slider]["_model_name"] == "IntSliderModel" and opened[slider]["value"] == 3, opened

    # A person moves it: the kernel's observer runs, prints, and the new state is echoed to whoever draws it too.
    moved = await client.comm(slider, {"method": "update", "state": {"value": 42}, "buffer_paths": []})
    assert printed(moved) == "observed 42\n", moved
    (echo,) = of_type(moved, "comm_msg")
    assert echo["comm_id"] == slider and echo["data"]["method"] == "echo_update" and echo["data"]["state"] == {"value": 42}, echo
    # More than it goes to: the kernel says what it made of it.
    moved = await client.comm(slider, {"method": "update", "state": {"value": 99}, "buffer_paths": []})
    corrected = [content["data"] for content in of_type(moved, "comm_msg") if content["data"]["method"] == "update"]
    assert printed(moved) == "observed 50\n" and [data["state"]["value"] for data in corrected] == [50], moved
    assert printed(await client.run("print(slider.value, heard)")) == "50 [42, 50]\n"

    # Code moves it.
    moved = of_type(await client.run("slider.value = 7"), "comm_msg")
    assert [(content["comm_id"], content["data"]["state"]) for content in moved] == [(slider, {"value": 7})], moved
    # Who comes later asks what there is.
    listed = (await client.ask("comm_info_request", {"target_name": "jupyter.widget"}))["comms"]
    assert set(listed) == set(opened), listed
    told = of_type(await client.comm(slider, {"method": "request_state"}), "comm_msg")
    assert told[0]["data"]["state"]["value"] == 7, told

    # A button, whose handler fails: what it says is its own, and the kernel goes on.
    await client.run("button = ipywidgets.Button()\nbutton.on_click(lambda _: 1/0)\ndisplay(button)")
    button = printed(await client.run("print(button.model_id)")).strip()
    clicked = await client.comm(button, {"method": "custom", "content": {"event": "click"}})
    assert "ZeroDivisionError" in printed(clicked) or of_type(clicked, "error"), clicked
    closed = of_type(await client.run("slider.close()"), "comm_close")
    assert slider in [content["comm_id"] for content in closed], closed


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
