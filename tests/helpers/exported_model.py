# ruff: noqa: E402 (what transformers reads at import must be set before)
"""Exported PyTorch models, written and loaded back as users load them, and what their tests compare them with."""

import os
import tempfile

import jax
import numpy as np
import pytest
from helpers import fixtures
from PIL import Image
from safetensors.numpy import save_file

torch = pytest.importorskip("torch", reason="the exported model needs torch")
os.environ["HF_HUB_OFFLINE"] = "1"
# transformers copies a folder's code here before it imports it; read when transformers is imported.
MODULES = tempfile.TemporaryDirectory(prefix="hf_modules")
os.environ["HF_MODULES_CACHE"] = MODULES.name
transformers = pytest.importorskip("transformers", reason="the exported model needs transformers")

from fusion_jax.batch import PIXELS
from fusion_jax.interop import table
from fusion_jax.interop.torch import names
from fusion_jax.interop.torch.folder import write_side_files

torch.set_num_threads(1)


CHATS = {
    "image": [("What is on the  shelf ?", None)],
    "two rounds": [(" What is red?\n", "A ball."), ("And where is it? ", None)],
    "late image": [("Hello", "Hi!"), ("See <image> that", None)],
    "text only": [("How are you?", "Fine.\n"), ("Good", None)],
    "finished": [("What is this?", "A cube. "), ("Sure?", "Yes")],
}


def named_tensors(config, params) -> dict[str, np.ndarray]:
    """Our parameters under the names of the exported file."""
    flat = fixtures.flat(params)
    rows = names.rows(config, {path: leaf.shape for path, leaf in flat.items()})
    get = lambda path, index: flat[path] if index is None else flat[path][index]  # noqa: E731
    return {row.name: np.ascontiguousarray(table.to_published(row, get, config)) for row in rows}


def export(folder, config, params, tokenizer=None, template=None):
    """Writes a folder and loads it back as users do."""
    tensors = named_tensors(config, params)
    write_side_files(folder, config, tokenizer, template, "float32")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    assert set(model.state_dict()) == {*tensors, table.HEAD}  # a tied head is in the model, not in the file
    return model


def torch_inputs(batch, side: str = "right", labels: bool = True) -> dict:
    """A Batch as the PyTorch model takes it."""
    batch = jax.tree.map(np.array, batch)
    length = batch.tokens.shape[1]
    valid = batch.segment_ids > 0
    given = np.full(batch.tokens.shape, -100)
    given[:, 1:] = np.where(batch.loss_weights > 0, batch.targets, -100)[:, :-1]
    shift = (length - valid.sum(1)) * (side == "left")
    place = lambda x: np.stack([np.roll(row, s) for row, s in zip(x, shift)])  # noqa: E731
    pixels = np.concatenate([batch.quadrants, batch.crops[:, :, None]], 2).transpose(0, 1, 2, 5, 3, 4) / 127.5 - 1
    pixels = np.where((batch.crop_kind == PIXELS)[..., None, None, None, None], pixels, 0).astype(np.float32)
    values = {
        "input_ids": place(batch.tokens),
        "attention_mask": place(valid.astype(np.int64)),
        "visual_index": batch.visual_index,  # this and the two below count from the row's first token
        "pixel_values": pixels,
        "image_kind": batch.crop_kind,
        "question_ids": batch.crop_text,
        "question_mask": batch.crop_text_mask,
        "round_image": batch.round_crop,
        "round_end": batch.round_end,
        "latent_start": batch.latent_start,
        **({"labels": place(given)} if labels else {}),
    }
    values = {key: torch.tensor(value) for key, value in values.items()}
    return {key: value.long() if value.dtype == torch.int32 else value for key, value in values.items()}


def assert_close(actual, expected, atol, where=None):
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    if where is not None:
        actual, expected = actual[where], expected[where]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (31, 47, 3)).astype(np.uint8))


def messages(rounds, image=None) -> list[dict]:
    """HF form: the tag in a text becomes an image part."""
    out = []
    for question, answer in rounds:
        before, tag, behind = question.partition("<image>")
        parts = [{"type": "text", "text": before}]
        if tag:
            parts += [{"type": "image", "image": image}, {"type": "text", "text": behind}]
        out.append({"role": "user", "content": parts if tag else question})
        if answer is not None:
            out.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return out
