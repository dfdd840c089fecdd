"""Chat requests of the server's API, and what its parser makes of them under small limits."""

import base64
import json

from fusion_jax.server import protocol
from fusion_jax.server.protocol import Limits

LIMITS = Limits(max_tokens=64, image_pixels=10_000, image_bytes=1 << 20, images=2, text_bytes=50_000)


def data_url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def shown(data, text="What?"):
    address = {"url": data_url(data) if isinstance(data, bytes) else data}
    return [{"type": "image_url", "image_url": address}, {"type": "text", "text": text}]


def parse(messages=None, fetcher=None, **keys):
    messages = [{"role": "user", "content": "Hi"}] if messages is None else messages
    return protocol.parse(json.dumps({"messages": messages, **keys}).encode(), "fusion", LIMITS, fetcher)
