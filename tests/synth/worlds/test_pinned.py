"""Pictures and texts of both worlds stay the same bit for bit: a run that goes on and a seed in a paper rest on it.

The digests of pixels hold for the Pillow and the fonts of requirements.txt.
"""

import hashlib
import json

import pytest

from fusion_jax.synth.backends import embedded
from fusion_jax.synth.kinds import KINDS

# Digests of texts and of pixels by style and kind; "=" where the kind has a name that the backend does not know.
PINNED = {
    "scenes caption_color": ("890b149c08bec58c", "0a2e8f3cd370b7f0"),
    "scenes caption_count": ("cfc3e50c2fce8d33", "51a00cc031ba1237"),
    "scenes caption_long": ("639d0f091d696123", "6ec70e8ba561f3f2"),
    "scenes caption_scene": ("c6cf6fa9bb1570a7", "7a502306bddb6653"),
    "scenes caption_spatial": ("db700773af86622d", "a93ca70bb805b0f6"),
    "scenes caption_text": ("ed0116b46a003b8a", "e861279d634dbf33"),
    "scenes multi_choice": ("a18ab1704b7cb4e3", "65830c05af7c06da"),
    "scenes conv_short": ("742119f0276562d7", "030f8b90b81a843f"),
    "scenes conv_long": ("94c477d358819bd7", "28d99233d8caa9e0"),
    "scenes reasoning": ("8cca89485e419f11", "6cd6eb5f01168a1e"),
    "scenes contrast_short": ("475de36b5ba669fe", "86b1437b9d69a132"),
    "scenes contrast_long": ("e789e9fe536fb8c8", "24495846f213560e"),
    "scenes text_qa": ("f8ffa564f2c710b8", "64fe83fe59ecf8b8"),
    "scenes =conv_short": ("ca25bec6878c0469", "4b7772d8c0235a01"),
    "scenes =multi_choice": ("35675d6a2dc2569f", "4b7772d8c0235a01"),
    "scenes =contrast_short": ("ba43c1dadeae3db1", "b9f7b166938c9c8d"),
    "shapes/train caption_long": ("ab381a8a3ede6c83", "8ea1856a1526d84e"),
    "shapes/train conv_long": ("55d166e94b1e0f66", "8ea1856a1526d84e"),
    "shapes/train conv_short": ("41fee8b6f2f39ac0", "8ea1856a1526d84e"),
    "shapes/train multi_choice": ("24145104fa66b845", "8ea1856a1526d84e"),
    "shapes/validation caption_long": ("ecbc4be1e45d4575", "b4dbd6ab48134ecd"),
    "shapes/validation conv_long": ("58e72d14cdf95e4c", "b4dbd6ab48134ecd"),
    "shapes/validation conv_short": ("dbeaf17d3d7c319b", "b4dbd6ab48134ecd"),
    "shapes/validation multi_choice": ("07691c0f0c894afc", "b4dbd6ab48134ecd"),
    "shapes/held_out caption_long": ("493d46eef6ba6877", "cf13fbcaf84815ad"),
    "shapes/held_out conv_long": ("9e5ddfca2f996089", "cf13fbcaf84815ad"),
    "shapes/held_out conv_short": ("377f1076c5a94846", "cf13fbcaf84815ad"),
    "shapes/held_out multi_choice": ("c697c677df4cb1de", "cf13fbcaf84815ad"),
}


def digests(style: str, kind: str) -> tuple[str, str]:
    """Digests of all texts and of all pixels that the embedded backend makes of twelve captions."""
    name, kind = ("mine", kind[1:]) if kind.startswith("=") else (kind, kind)
    model, vision, painter = embedded.LanguageModel(), embedded.VisionModel(), embedded.ImageGenerator()
    texts, pixels = hashlib.sha256(), hashlib.sha256()

    def note(value) -> None:
        texts.update(json.dumps(value, sort_keys=True).encode())

    for number, caption in enumerate(embedded.captions(12, 5, style)):
        data = {"kind": name, "caption": caption}
        note([caption, model.chat([], None, number, "judge", data).text])
        reply = model.chat([], KINDS[kind].describe.schema, number, "describe", data)
        note([reply.text, reply.parsed, reply.state])
        data |= {"descriptions": KINDS[kind].descriptions(reply.parsed), "state": reply.state}
        for index, description in enumerate(data["descriptions"]):
            image = painter.draw(description, (96, 72), number, data | {"index": index})
            pixels.update(image.tobytes())
        if KINDS[kind].ask is None:
            note(vision.verify([], [], "Describe the image.", data["descriptions"][0], 0, data).parsed)
            continue
        asked = model.chat([], KINDS[kind].ask.schema, number, "qa", data)
        note([asked.text, asked.parsed, asked.state])
        pairs = asked.parsed["pairs"]
        note(model.chat([], None, number, "statement", data | {"pairs": pairs}).parsed)
        for pair, other in zip(pairs, [*pairs[1:], pairs[0]]):
            for answer in (pair["answer"], other["answer"]):
                note(vision.verify([], [], pair["question"], answer, 0, data).parsed)
                note(model.chat([], None, 0, "verify", data | {"question": pair["question"], "answer": answer}).parsed)
    return texts.hexdigest()[:16], pixels.hexdigest()[:16]


@pytest.mark.parametrize("name", PINNED)
def test_texts_and_pictures_are_the_same_bit_for_bit(name):
    style, kind = name.rsplit(" ", 1)
    assert digests(style, kind) == PINNED[name]
