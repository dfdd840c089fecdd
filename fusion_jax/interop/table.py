"""Maps tensor names of Hugging Face folders to our parameter paths, and back.

A row of the table has the published name, our path (or several for a fused tensor) with the index in its stack, and the
transform.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fusion_jax.errors import UserError
from fusion_jax.files import shown
from fusion_jax.models.config import FusionConfig

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Row:
    """A published tensor `name` of `shape`; `paths` are ours, (path, index in the stack or None), in fused order."""

    name: str
    shape: tuple[int, ...]
    paths: tuple[tuple[str, int | None], ...]
    transform: str


# A published Linear stores (out, in); ours is (in, out).
VISION = "model.vision_tower.vision_tower.vision_model."
TOWER = "vision/layers/layer/"  # our stacks of its layers
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_VISION_LAYER = [
    ("layer_norm1.weight", "norm1/scale", "same"),
    ("layer_norm1.bias", "norm1/bias", "same"),
    ("self_attn.q_proj.weight", "query/kernel", "linear"),
    ("self_attn.q_proj.bias", "query/bias", "same"),
    ("self_attn.k_proj.weight", "key/kernel", "linear"),
    ("self_attn.k_proj.bias", "key/bias", "same"),
    ("self_attn.v_proj.weight", "value/kernel", "linear"),
    ("self_attn.v_proj.bias", "value/bias", "same"),
    ("self_attn.out_proj.weight", "out/kernel", "linear"),
    ("self_attn.out_proj.bias", "out/bias", "same"),
    ("layer_norm2.weight", "norm2/scale", "same"),
    ("layer_norm2.bias", "norm2/bias", "same"),
    ("mlp.fc1.weight", "mlp/in/kernel", "linear"),
    ("mlp.fc1.bias", "mlp/in/bias", "same"),
    ("mlp.fc2.weight", "mlp/out/kernel", "linear"),
    ("mlp.fc2.bias", "mlp/out/bias", "same"),
]
_PROJECTOR = [
    ("0.weight", "in/kernel", "linear"),
    ("0.bias", "in/bias", "same"),
    ("2.weight", "out/kernel", "linear"),
    ("2.bias", "out/bias", "same"),
]
_EXCHANGE = [
    ("proj_in.weight", "in", "linear"),
    ("proj_context.weight", "context/kernel", "linear"),
    ("cross_attn.q_proj.0.weight", "query_norm/scale", "same"),
    ("cross_attn.q_proj.0.bias", "query_norm/bias", "same"),
    ("cross_attn.q_proj.1.weight", "query/kernel", "linear"),
    ("cross_attn.k_proj.0.weight", "key_norm/scale", "same"),
    ("cross_attn.k_proj.0.bias", "key_norm/bias", "same"),
    ("cross_attn.k_proj.1.weight", "key/kernel", "linear"),
    ("cross_attn.v_proj.0.weight", "value_norm/scale", "same"),
    ("cross_attn.v_proj.0.bias", "value_norm/bias", "same"),
    ("cross_attn.v_proj.1.weight", "value/kernel", "linear"),
    ("cross_attn.o_proj.weight", "out/kernel", "linear"),
    ("norm.weight", "norm/scale", "same"),
    ("norm.bias", "norm/bias", "same"),
    ("proj_out.linear_1.weight", "mlp/in/kernel", "linear"),
    ("proj_out.linear_2.weight", "mlp/out/kernel", "linear"),
]
_LLM_LAYER = [
    ("input_layernorm.weight", ("attention_norm/scale",), "same"),
    ("self_attn.o_proj.weight", ("out/kernel",), "linear"),
    ("post_attention_layernorm.weight", ("mlp_norm/scale",), "same"),
    ("mlp.down_proj.weight", ("down/kernel",), "linear"),
]
_SPLIT = [
    ("self_attn.q_proj.weight", ("query/kernel",), "linear"),
    ("self_attn.k_proj.weight", ("key/kernel",), "linear"),
    ("self_attn.v_proj.weight", ("value/kernel",), "linear"),
    ("mlp.gate_proj.weight", ("gate/kernel",), "linear"),
    ("mlp.up_proj.weight", ("up/kernel",), "linear"),
]
_FUSED = [
    ("self_attn.qkv_proj.weight", ("query/kernel", "key/kernel", "value/kernel"), "linear"),
    ("mlp.gate_up_proj.weight", ("gate/kernel", "up/kernel"), "linear"),
]
_BIASES = [(f"self_attn.{n}_proj.bias", (f"{ours}/bias",), "same") for n, ours in zip("qkv", ("query", "key", "value"))]


def _places(config: FusionConfig) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(path prefix, index in the stack) of every decoder layer and of every exchange layer."""
    layers, exchanges = [], []
    for s, stack in enumerate(config.stacks()):
        for block in range(stack.blocks):
            if stack.exchange:
                exchanges.append((f"llm/stack_{s}/exchange", block))
            layers += [(f"llm/stack_{s}/layer_{j}", block) for j in range(stack.layers)]
    return layers, exchanges


def all_shapes(config: FusionConfig, shapes: Shapes) -> Shapes:
    """`shapes` with all layers of the tower: files also have those that the taps do not read."""
    return {p: (config.vision.layers, *shape[1:]) if p.startswith(TOWER) else shape for p, shape in shapes.items()}


def vision_rows(config: FusionConfig, shapes: Shapes, prefix: str = VISION) -> list[Row]:
    """The rows of the vision tower under `prefix`: that of the published files, or `vision_model.` in a SigLIP folder.

    It has as many layers as the stacks in `shapes`, which may be more than run (`all_shapes`).
    """
    rows = _Rows(config, shapes)
    rows.add(prefix + "embeddings.patch_embedding.weight", "vision/patch_embedding/", ("kernel",), "patch")
    rows.add(prefix + "embeddings.patch_embedding.bias", "vision/patch_embedding/", ("bias",), "same")
    rows.add(prefix + "embeddings.position_embedding.weight", "vision/", ("position_embedding",), "same")
    for v in range(shapes[f"{TOWER}norm1/scale"][0]):
        for name, path, transform in _VISION_LAYER:
            rows.add(f"{prefix}encoder.layers.{v}.{name}", TOWER, (path,), transform, v)
    return rows.listed


def llm_rows(config: FusionConfig, shapes: Shapes, fused: bool) -> list[Row]:
    """The rows of the language model alone, named as in its own folder; `fused` as in `Family`."""
    rows = _Rows(config, shapes)
    for i, (prefix, index) in enumerate(_places(config)[0]):
        for name, paths, transform in _LLM_LAYER + (_FUSED if fused else _SPLIT):
            rows.add(f"model.layers.{i}.{name}", prefix + "/", paths, transform, index)
        for name, paths, transform in _BIASES if config.llm.qkv_bias else ():
            rows.add(f"model.layers.{i}.{name}", prefix + "/", paths, transform, index)
    rows.add(EMBEDDING, "llm/", ("embedding",), "vocab")
    rows.add("model.norm.weight", "llm/norm/", ("scale",), "same")
    if not config.llm.tied_head:
        rows.add(HEAD, "llm/", ("head",), "head")
    return rows.listed


def connector_rows(config: FusionConfig, shapes: Shapes) -> list[Row]:
    """The rows of projectors, exchange layers, learned latents and row end; the published code lacks the last two."""
    rows = _Rows(config, shapes)
    for name, path, transform in _PROJECTOR:
        rows.add(f"model.mm_projector.{name}", "vision_to_text/", (path,), transform)
        if config.needs_back_projection:
            rows.add(f"model.aux_projector.{name}", "text_to_vision/", (path,), transform)
    for e, (prefix, index) in enumerate(_places(config)[1]):
        for name, path, transform in _EXCHANGE:
            rows.add(f"model.vision_sampler_layers.{e}.layers.0.{name}", prefix + "/", (path,), transform, index)
    if config.semantic_exchange and config.latent_init == "learned":
        for count in config.latent_counts:
            rows.add(f"model.latents.{count}", "", (f"latents_{count}",), "same")
    if config.tile_grids:
        rows.add("model.row_end.weight", "", ("row_end",), "same")
    return rows.listed


def published_rows(config: FusionConfig, shapes: Shapes, fused: bool) -> list[Row]:
    """The whole table for one model.

    Args:
      config: the model.
      shapes: our parameter shapes by path ("llm/norm/scale"), stacked blocks included.
      fused: whether q, k, v and gate, up are fused (published Phi models) or separate (Llama, and every model in the
        `transformers` format).

    Returns:
      A row per published tensor.
    """
    return vision_rows(config, shapes) + connector_rows(config, shapes) + llm_rows(config, shapes, fused)


class _Rows:
    def __init__(self, config: FusionConfig, shapes: Shapes):
        self.config, self.shapes, self.listed = config, shapes, []

    def add(self, name: str, prefix: str, paths: tuple[str, ...], transform: str, index: int | None = None) -> None:
        full = tuple((f"{prefix}{path}", index) for path in paths)
        parts = [
            _published_shape(self.config, path, self.shapes[path][index is not None :], transform) for path, _ in full
        ]
        self.listed.append(Row(name, (sum(p[0] for p in parts), *parts[0][1:]), full, transform))


def _published_shape(config: FusionConfig, path: str, ours: tuple[int, ...], transform: str) -> tuple[int, ...]:
    if transform == "linear":
        return ours[::-1]
    if transform == "patch":
        return (ours[1], 3, config.vision.patch_size, config.vision.patch_size)
    if transform in ("vocab", "head"):
        return (config.llm.vocab_size, config.llm.width)
    return ours


def to_ours(row: Row, tensor: np.ndarray, shapes: Shapes) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """Yields (path, index in the stack, array) for one published tensor. A vocabulary keeps its unpadded rows."""
    start = 0
    for path, index in row.paths:
        shape = shapes[path][index is not None :]
        rows = shape[-1] if row.transform == "linear" else tensor.shape[0]
        part = tensor[start : start + rows]
        start += rows
        if row.transform in ("linear", "head"):
            part = part.T
        elif row.transform == "patch":
            part = part.transpose(2, 3, 1, 0).reshape(shape)
        yield path, index, part


def part_to_published(row: Row, part: np.ndarray, config: FusionConfig) -> np.ndarray:
    """Our array for one of the row's paths as in the published tensor: all of it, or a block of rows if it is fused."""
    if row.transform in ("linear", "head"):
        part = part.T
    elif row.transform == "patch":
        p = config.vision.patch_size
        part = part.reshape(p, p, 3, -1).transpose(3, 2, 0, 1)
    return part[: config.llm.vocab_size] if row.transform in ("vocab", "head") else part


def to_published(row: Row, get, config: FusionConfig) -> np.ndarray:
    """The published tensor of a row. `get(path, index)` returns our array."""
    parts = [part_to_published(row, get(path, index), config) for path, index in row.paths]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=0)


def check_complete(
    rows: list[Row], actual: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...], where: str
) -> None:
    """Raises UserError that names the first tensor that is missing, left over or of another shape.

    Args:
      rows: the expected tensors. actual: shapes by name. ignored: suffixes of names that may be left over. where: the
        folder, for messages.
    """
    expected = {row.name: row.shape for row in rows}
    missing = [name for name in expected if name not in actual]
    extra = [name for name in actual if name not in expected and not name.endswith(ignored)]
    for problem, names in (("lacks", missing), ("has the unknown tensor", extra)):
        if names:
            raise UserError(
                f"{where} {problem} {shown(names[0])}" + (f" and {len(names) - 1} more." if names[1:] else ".")
            )
    for name, shape in expected.items():
        if tuple(actual[name]) != shape:
            raise UserError(f"{where}: {name} has shape {tuple(actual[name])}; the config asks for {shape}.")
