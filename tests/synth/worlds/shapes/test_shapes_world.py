"""The world of plain shapes: replies keep the engine's limits, the oracle tells right from wrong, names lead back."""

import random

import pytest

from fusion_jax.synth.backends import embedded
from fusion_jax.synth.backends.base import Unusable
from fusion_jax.synth.kinds import KINDS
from fusion_jax.synth.worlds.shapes import facts
from fusion_jax.synth.worlds.shapes import picture as pictures


@pytest.mark.parametrize("kind", pictures.KINDS)
@pytest.mark.parametrize("split", pictures.SPLITS)
def test_replies_keep_the_limits_and_the_oracle_tells_right_from_wrong(kind, split):
    model, vision, rng = embedded.LanguageModel(), embedded.VisionModel(), random.Random(0)
    for number, caption in enumerate(embedded.captions(60, 3, f"shapes/{split}")):
        data = {"kind": kind, "caption": caption}
        assert model.chat([], None, 0, "judge", data).parsed == {"drawable": True}
        reply = model.chat([], None, number, "describe", data)
        answer = KINDS[kind].describe.read(reply.text, reply.parsed, data)
        data |= {"descriptions": KINDS[kind].descriptions(answer), "state": reply.state}
        if KINDS[kind].ask is None:
            assert vision.verify([], [], "Describe the image.", data["descriptions"][0], 0, data).parsed["correct"]
            continue
        reply = model.chat([], None, number, "qa", data)
        pairs = KINDS[kind].ask.read(reply.text, reply.parsed, data)["pairs"]
        assert len(pairs) == len(reply.parsed["pairs"])
        for pair in pairs:
            assert vision.verify([], [], pair["question"], pair["answer"], 0, data).parsed["correct"], pair
            wrong = rng.choice([w for w in ("mauve", "It is a boat.", "thirteen", "nowhere") if w != pair["answer"]])
            assert not vision.verify([], [], pair["question"], wrong, 0, data).parsed["correct"]


def test_wrong_answers_of_the_right_sort_are_wrong():
    for number in range(40):
        picture = pictures.Picture(1, "train", number)
        for r in picture.ask("conv_short"):
            for other in facts.ANSWERS[r.kind]:
                assert picture.correct(r.question, other) == (other == r.answer)


def test_names_and_states():
    picture = pictures.Picture(3, "held_out", 12)
    assert pictures.from_caption(picture.caption) == picture == pictures.from_json(picture.to_json())
    assert pictures.from_caption("Plain shapes, picture 3 of nowhere 0") is None
    assert pictures.from_json({"scenes": []}) is None
    with pytest.raises(ValueError, match="shapes"):
        pictures.from_json({"style": "shapes"})
    with pytest.raises(ValueError, match="not a style"):
        next(embedded.captions(1, 0, "cubes"))
    with pytest.raises(Unusable, match="conv_short"):
        embedded.LanguageModel().chat([], None, 0, "describe", {"kind": "reasoning", "caption": picture.caption})
