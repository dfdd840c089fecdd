"""Checks whether the published code can open an export, and describes the tower folders that it needs.

That code opens `mm_vision_tower` of config.json like transformers, as a hub id or a folder, before it reads the model's
own weights, and chooses one of two encoders by that name. Each is written for one number of patches and for taps at
fixed layers (starriver030515/FUSION at 421b449: fusion/model/multimodal_encoder).

    "siglip2" in it   384 pixels, patches of 16, taps as of 38 or 39 layers that run      (SigLIP2-giant: 39)
    else "siglip"     384 pixels, patches of 14, taps as of 26 or 27                      (SigLIP-so400m: 26)
    else              "Unknown vision tower"
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_jax.errors import check
from fusion_jax.files import shown
from fusion_jax.interop import hf_config, table
from fusion_jax.interop.families import FAMILIES, PUBLISHED
from fusion_jax.interop.tensors import Shape
from fusion_jax.models.config import FusionConfig, VisionConfig

_SIDE = 384
_PREFIX = "vision_model."
# The conversation templates that both have; its others belong to models without text-guided encoding.
_TEMPLATES = tuple(FAMILIES[name].template for name in PUBLISHED.values())


@dataclass(frozen=True)
class _Encoder:
    """An encoder of the published code: the word that selects it, and the patches and layers that it is written for."""

    word: str
    patch_size: int
    layers: tuple[int, ...]

    def runs(self, tower: VisionConfig) -> bool:
        return (tower.image_size, tower.patch_size) == (_SIDE, self.patch_size) and tower.layers in self.layers


_ENCODERS = (_Encoder("siglip2", 16, (38, 39)), _Encoder("siglip", 14, (26, 27)))


def _chosen(name: str) -> str | None:
    """The word by which the published code chooses an encoder."""
    return next((encoder.word for encoder in _ENCODERS if encoder.word in name.lower()), None)


@dataclass(frozen=True)
class TowerFolder:
    """The folder of a tower inside an export: its name, config.json, rows of the table, and shapes of all tensors."""

    name: str
    config: dict[str, Any]
    rows: list[table.Row]
    shapes: dict[str, Shape]


def check_opens(model: FusionConfig, template: str) -> None:
    """Raises UserError where the published code has no encoder for the tower, or lacks the chat template."""
    tower = model.vision
    check(
        any(encoder.runs(tower) for encoder in _ENCODERS),
        f"The published code runs towers of {_SIDE} pixels only, with patches of 16 and 39 or 40 layers "
        "(SigLIP2-giant) or with patches of 14 and 27 or 28 layers (SigLIP-so400m); this one has "
        f"{tower.image_size} pixels, patches of {tower.patch_size} and {tower.layers + 1} layers. "
        "Use --format transformers.",
    )
    check(
        template in _TEMPLATES,
        f"The published code writes conversations as {' or '.join(_TEMPLATES)}, and this model's template is "
        f"{shown(template)}. Use --format transformers.",
    )


def place_tower(
    model: FusionConfig, described: Mapping[str, Any], target: Path, shapes: table.Shapes
) -> tuple[str, TowerFolder | None]:
    """Decides where the published code will find the tower.

    Args:
      model: one that passes `check_opens`. described: its config.json. target: the folder of the export.
      shapes: the shapes of our parameters by path.

    Returns:
      The value of `mm_vision_tower`, and the folder to write inside `target`; None where the value is a hub id, or the
      path of the folder that the model came from.

    Raises:
      UserError: the path of the target would choose the other encoder.
    """
    tower, tower_name = model.vision, described["mm_vision_tower"]
    word = next(encoder.word for encoder in _ENCODERS if encoder.runs(tower))
    own = _chosen(tower_name) == word and not Path(tower_name).is_absolute()
    if own and re.fullmatch(r"[\w.-]{1,200}", tower_name, re.ASCII) is None:
        return tower_name, None
    # The published code looks up a plain name in its current folder; an absolute path always works.
    name = tower_name if own else f"vision_{word}"
    full = tower_name if own else str(target.resolve() / name)
    check(
        _chosen(full) == word,
        f"The published code takes the encoder of its SigLIP2 for a tower whose path has siglip2 in it, and this tower "
        f"is not one: name a folder without that word instead of {shown(str(target))}.",
    )
    rows = table.vision_rows(model, shapes, _PREFIX)
    last = f"{_PREFIX}encoder.layers.{tower.layers}."
    before = f"{_PREFIX}encoder.layers.{tower.layers - 1}."
    listed = {row.name: row.shape for row in rows}
    listed |= {last + name.removeprefix(before): s for name, s in listed.items() if name.startswith(before)}
    listed |= {f"{_PREFIX}post_layernorm.{part}": (tower.width,) for part in ("weight", "bias")}
    config = {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        **hf_config.tower_config(tower),
        "num_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": False,
    }
    return full, TowerFolder(name, config, rows, listed)


def name_note(target: Path, template: str) -> str | None:
    """A warning where the folder's name would make the published loader choose a wrong model; None otherwise."""
    name = target.resolve().name.lower()
    wanted = {"phi3": "phi", "llama3": "llama3"}[template]
    others = [word for word in ("lora", "mpt", "qwen", "phi", "mistral") if word in name and word != wanted]
    if "fusion" in name and wanted in name and not others:
        return None
    return (
        f"the published loader chooses the model and its template by the folder's name: call it fusion-{wanted} or the "
        "like, without the name of another family"
    )
