"""Sorts the arguments of the processor, so that each conversation has its own images."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .image_fusion import KEYS
from .text_fusion import IMAGE_TAG

GROUPS = ("text_kwargs", "images_kwargs", "common_kwargs", "processor_kwargs")


def batch(conversations, images) -> tuple[list, list[list]]:
    """Conversations or texts as a list, and for each the images that it does not contain itself."""
    if isinstance(conversations, tuple):
        conversations = list(conversations)
    if isinstance(conversations, str) or (conversations and isinstance(conversations[0], dict)):
        conversations = [conversations]
    if not conversations:
        raise ValueError("There is no conversation and no text.")
    count = len(conversations)
    if images is None:
        return conversations, [[] for _ in conversations]
    images = list(images) if isinstance(images, list | tuple) else [images]
    if any(isinstance(one, list | tuple) for one in images):  # a list for each conversation
        images = [list(one) if isinstance(one, list | tuple) else [one] for one in images]
        images = [[one for one in own if one is not None] for own in images]
    elif count == 1:
        images = [[one for one in images if one is not None]]
    else:  # all of them in the order of their positions, or one for each conversation
        places = [places_of(conversation) for conversation in conversations]
        if not any(one is None for one in images) and sum(places) == len(images):
            waiting = iter(images)
            images = [[next(waiting) for _ in range(n)] for n in places]
        elif len(images) == count:
            images = [[one] * (one is not None) for one in images]
    if len(images) != count:
        raise ValueError(f"{len(images)} images for {count} conversations: give one or None for each.")
    return conversations, images


def flat(options: dict) -> dict:
    """Options without their groups, such as `text_kwargs={"padding": True}`."""
    flat = {}
    for name, value in options.items():
        flat |= dict(value or {}) if name in GROUPS else {name: value}
    return flat


def is_image(value: Any) -> bool:
    first = value[0] if isinstance(value, list | tuple) and len(value) else value
    first = first[0] if isinstance(first, list | tuple) and len(first) else first
    return isinstance(first, Image.Image | np.ndarray | torch.Tensor | bytes | Path)


def places_of(conversation: Any) -> int:
    """Number of positions for images in a text, or in a conversation for images that it does not contain."""
    if isinstance(conversation, str):
        return conversation.count(IMAGE_TAG)
    places = 0
    for message in conversation:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            places += content.count(IMAGE_TAG) if message.get("role") == "user" else 0
        else:
            for part in content or ():
                if not isinstance(part, dict):
                    continue  # `read_messages` raises the error
                kind, carried = part.get("type"), any(part.get(key) is not None for key in KEYS)
                places += kind in ("image", "image_url") and not carried
                if kind == "text" and message.get("role") == "user":
                    places += str(part.get("text")).count(IMAGE_TAG)
    return places
