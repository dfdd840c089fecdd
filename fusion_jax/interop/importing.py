"""Hugging Face folders into our parameters: a whole published model, or a vision tower and a language model.

folders --headers--> names, shapes, dtypes --table--> what goes where        (all that can be wrong is found here)
        --tensor by tensor, several at once--> memory-mapped parameters --Orbax--> checkpoint
"""

import base64
import functools
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import tqdm
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data.tokenizer import Tokenizer, load_tokenizer
from fusion_jax.data.tokenizer_base import VISION_END, VISION_START
from fusion_jax.errors import UserError, check, check_choice, first_line
from fusion_jax.files import brief, shown
from fusion_jax.interop import gguf_file, hf_config, table
from fusion_jax.interop.checking import check_sizes, check_tensors
from fusion_jax.interop.gguf_file import GgufFile
from fusion_jax.interop.tensors import (
    DTYPES,
    TensorFolder,
    allocate,
    assign,
    check_room,
    new_folder,
    size_of,
)
from fusion_jax.models import fusion
from fusion_jax.models.config import PRESETS, FusionConfig, replace
from fusion_jax.training import checkpoint

# In the files, but neither applied nor trained by the published code.
UNUSED = ("post_layernorm.weight", "post_layernorm.bias", "rotary_emb.inv_freq", "embeddings.position_ids")
# Parts of a SigLIP folder that are not its vision encoder.
_NOT_VISION = ("text_model.", "logit_scale", "logit_bias")
ADDED_TOKENS = (VISION_START, VISION_END)
_MOST_UNUSED = 1 << 24  # bytes; they are some vectors, and are kept inside the checkpoint's description


@dataclass(frozen=True)
class Source:
    """One folder to read: its tensors, which row each belongs to, and rows of the vocabulary that are taken."""

    tensors: TensorFolder | GgufFile
    rows: list[table.Row]
    vocabulary: int = 0


@dataclass(frozen=True)
class Plan:
    """An import, all checked and nothing loaded yet.

    Attributes:
      model: the model config. template: its chat template. tokenizer: or None where the folder has none.
      sources: what is read. dtypes: of each of our parameters by path (keys of `DTYPES`).
      origin: kept with the checkpoint for the way back: config.json, and tensors that no arithmetic uses (base64).
      kept: what must last as long as the plan: the tokenizer files out of a GGUF file.
    """

    model: FusionConfig
    template: str
    tokenizer: Tokenizer | None
    sources: list[Source]
    dtypes: dict[str, str]
    origin: dict[str, Any] = field(default_factory=dict)
    kept: tempfile.TemporaryDirectory | None = None


@functools.cache
def parameter_shapes(config: FusionConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter shapes by path, without allocating anything."""
    tree = jax.eval_shape(lambda: fusion.init(config, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def kept_shapes(config: FusionConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of what an import's checkpoint holds: the tower whole, which loading cuts to the layers that run."""
    return table.all_shapes(config, parameter_shapes(config))


def plan_published(folder: str | Path, allow_pickle: bool = False, dtype: str | None = None) -> Plan:
    """A folder in the published format: the whole model, `released` preset.

    Raises:
      UserError: a missing file, or a tensor that is missing, left over or of the wrong shape.
    """
    folder = Path(folder)
    raw = hf_config.read_config(folder)
    where = str(folder / "config.json")
    check(
        hf_config.is_published(raw),
        f"{where}: model_type {raw.get('model_type')!r} is no published FUSION model (fusion_llama, fusion_phi); "
        "import backbones with --vision and --llm.",
    )
    with hf_config.reading(where):
        model = hf_config.published_model(raw, where)
    tensors = TensorFolder(folder, allow_pickle)
    check_sizes(tensors, table.VISION, model.vision, model.llm)
    shapes = kept_shapes(model)
    rows = table.published_rows(model, shapes, hf_config.is_fused(raw))
    check_tensors(rows, tensors, UNUSED, {})
    unused = [name for name, e in sorted(tensors.entries.items()) if name.endswith(UNUSED) and e.dtype in DTYPES]
    kept = size_of((tensors.entries[name].shape, tensors.entries[name].dtype) for name in unused)
    check(kept <= _MOST_UNUSED, f"{folder} has {kept:,} bytes of tensors that nothing uses ({brief(unused[:1])}, ...).")
    source = Source(tensors, rows, model.llm.vocab_size)
    tokenizer = _tokenizer(folder)
    _check_vocabulary(tokenizer, model.llm.vocab_size, folder)
    return Plan(
        model=model,
        template=hf_config.find_template(raw["model_type"], tokenizer),
        tokenizer=tokenizer,
        sources=[source],
        dtypes=_dtypes([source], shapes, dtype),
        origin={"config": raw, "unused": {name: _pack(tensors.get(name)) for name in unused}},
    )


def plan_backbones(
    vision: str | Path, llm: str | Path, preset: str = "paper", allow_pickle: bool = False, dtype: str | None = None
) -> Plan:
    """A vision tower and a language model, a folder or a GGUF file; the rest starts from random values: projectors,
    exchange layers and learned latents.

    The vocabulary is cut to the tokenizer's, and `<vision_start>`, `<vision_end>` get the mean of its rows.

    Raises:
      UserError: an unknown architecture, or tensors that do not fit the folder's config.
    """
    check_choice("preset ", preset, PRESETS)
    vision, llm = Path(vision), Path(llm)
    packed = gguf_file.find(llm)
    text = None if packed is None else GgufFile(packed)
    raw = hf_config.read_config(llm) if text is None else text.config
    with hf_config.reading(where := str(vision / "config.json")):
        tower = hf_config.vision_config(hf_config.read_config(vision), where)
    with hf_config.reading(where := str(packed or llm / "config.json")):
        decoder = hf_config.llm_config(raw, where)
    # It says where the two added tokens go: behind its own, which are often fewer than the embedding's rows.
    tokenizer, kept = (load_tokenizer(llm), None) if text is None else text.tokenizer(llm)
    known = len_of(tokenizer)
    check(
        known <= decoder.vocab_size,
        f"{llm}: the tokenizer has {known} tokens, but {'config.json gives' if packed is None else 'its tensors give'} "
        f"the model a vocabulary of {decoder.vocab_size}.",
    )
    check(
        known > 0 and tokenizer.vocab_size == known + len(ADDED_TOKENS),
        f"{llm}: the tokenizer has other tokens behind {' or '.join(ADDED_TOKENS)}; they must be its last, or absent.",
    )
    model = FusionConfig(
        vision=tower,
        llm=replace(decoder, vocab_size=known + len(ADDED_TOKENS)),
        exchange=hf_config.default_exchange(decoder),
        **PRESETS[preset],
    )
    # Rows as the folder has them: its own vocabulary, more or less than what we keep.
    seen, text = TensorFolder(vision, allow_pickle), text or TensorFolder(llm, allow_pickle)
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in seen.entries) else ""
    check_sizes(seen, prefix, tower, None)
    check_sizes(text, "", None, decoder)
    shapes = kept_shapes(model)
    vision_rows = table.vision_rows(model, shapes, prefix)
    dropped = f"{prefix}encoder.layers.{tower.layers}."
    check(
        any(name.startswith(dropped) for name in seen.entries),
        f"{vision} lacks {dropped[:-1]}, the last of the {tower.layers + 1} layers that its config.json speaks of.",
    )
    check_tensors(vision_rows, seen, UNUSED, {}, (*_NOT_VISION, f"{prefix}head.", dropped))
    llm_rows = table.llm_rows(model, shapes, hf_config.is_fused(raw))
    vocabulary = (decoder.vocab_size, decoder.width)
    tied = (table.HEAD,) if decoder.tied_head else ()
    check_tensors(llm_rows, text, UNUSED, {table.EMBEDDING: vocabulary, table.HEAD: vocabulary}, tied)
    sources = [Source(seen, vision_rows), Source(text, llm_rows, known)]
    return Plan(
        model=model,
        template=hf_config.find_template(raw["model_type"], tokenizer),
        tokenizer=tokenizer,
        sources=sources,
        dtypes=_dtypes(sources, shapes, dtype),
        origin={"config": raw},
        kept=kept,
    )


def _tokenizer(folder: Path) -> Tokenizer | None:
    if any(os.path.lexists(folder / name) for name in ("tokenizer.model", "tokenizer.json")):
        return load_tokenizer(folder)
    return None


def len_of(tokenizer: Tokenizer) -> int:
    """Ids of a tokenizer without the two tokens that are appended to it."""
    return min(tokenizer.vision_start_id, tokenizer.vision_end_id, tokenizer.vocab_size)


def _check_vocabulary(tokenizer: Tokenizer | None, rows: int, folder: Path) -> None:
    check(
        tokenizer is None or tokenizer.vocab_size <= rows,
        f"{folder}: the tokenizer has {tokenizer and tokenizer.vocab_size} tokens, but the embedding has {rows} rows.",
    )


def _dtypes(sources: list[Source], shapes: Mapping[str, tuple[int, ...]], dtype: str | None) -> dict[str, str]:
    """Each parameter has its source's dtype; new ones that of the embedding."""
    if dtype is not None:
        check_choice("dtype ", dtype, DTYPES)
    if dtype is not None:
        return dict.fromkeys(shapes, dtype)
    named = {
        path: source.tensors.entries[row.name].dtype
        for source in sources
        for row in source.rows
        for path, _ in row.paths
    }
    return {path: named.get(path, named["llm/embedding"]) for path in shapes}


def read(plan: Plan, make: Callable[[str, tuple[int, ...], np.dtype], np.ndarray], progress: bool = False) -> dict:
    """Reads all tensors of a plan into arrays that `make(path, shape, dtype)` gives. Returns them as a nested dict."""
    shapes = kept_shapes(plan.model)
    params = {path: make(path, shape, DTYPES[plan.dtypes[path]]) for path, shape in shapes.items()}
    jobs = [(source, row) for source in plan.sources for row in source.rows]
    total = sum(_row_bytes(source, row) for source, row in jobs)
    with (
        tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=not progress) as bar,
        # Several files at once; each worker holds one tensor.
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as workers,
    ):

        def work(job: tuple[Source, table.Row]) -> int:
            source, row = job
            for path, index, part in table.to_ours(row, source.tensors.get(row.name), shapes):
                into = params[path] if index is None else params[path][index]
                if row.transform in ("vocab", "head"):
                    _fill_vocabulary(into, part, row.transform, source.vocabulary, plan.model.llm.vocab_size)
                else:
                    assign(into, part, row.name)
            return _row_bytes(source, row)

        for done in workers.map(work, jobs):
            bar.update(done)
    named = {path for _, row in jobs for path, _ in row.paths}
    _initialise(plan.model, {path: array for path, array in params.items() if path not in named})
    return unflatten_dict(params, sep="/")


def _row_bytes(source: Source, row: table.Row) -> int:
    entry = source.tensors.entries[row.name]
    return size_of([(entry.shape, entry.dtype)])


def _fill_vocabulary(into: np.ndarray, part: np.ndarray, transform: str, known: int, vocabulary: int) -> None:
    """The first `known` rows (columns of a head) as they are, their mean up to `vocabulary`, zeros in the padding."""
    if transform == "head":
        into, part = into.T, part.T
    assign(into[:known], part[:known], "the vocabulary")
    if known < vocabulary:
        into[known:vocabulary] = part[:known].mean(0, dtype=np.float32)
    into[vocabulary:] = 0


def _initialise(model: FusionConfig, new: dict[str, np.ndarray]) -> None:
    """Fills the parameters that no source has, as a training run from nothing would."""

    def draw(paths: tuple[str, ...]) -> None:
        # The whole initialiser is traced, but only what is asked for is computed.
        init = jax.jit(lambda: [flatten_dict(fusion.init(model, jax.random.key(0)), sep="/")[path] for path in paths])
        for path, array in zip(paths, init()):
            new[path][...] = np.asarray(array)

    if sum(array.size for array in new.values()) < 10**8:
        draw(tuple(new))
    else:
        for path in new:
            draw((path,))


def load(folder: str | Path) -> tuple[FusionConfig, dict]:
    """A published folder in memory.

    Returns:
      The model config and float32 parameters (numpy, nested dict).

    Raises:
      UserError: see `plan_published`.
    """
    plan = plan_published(folder, dtype="float32")
    return plan.model, read(plan, lambda _, shape, dtype: np.empty(shape, dtype))


def run_config(plan: Plan) -> RunConfig:
    """What a checkpoint of this import says of itself: model and template; the one stage stands for no training."""
    longest = max(plan.model.latent_counts)
    stage = StageConfig("import", data="", max_length=max(4096, plan.model.tokens_per_image + longest + 1))
    return RunConfig(model=plan.model, tokenizer="", template=plan.template, stages=(stage,))


def write_checkpoint(plan: Plan, target: str | Path, progress: bool = True) -> None:
    """Reads all tensors and writes `target`, an Orbax checkpoint of parameters and `about`, whole or not at all.

    Memory stays at a few tensors: parameters live in memory-mapped files beside the target until Orbax has written
    them, which for that time takes the disk room of the model twice.

    Raises:
      UserError: the target is not empty, or the disk is full.
    """
    shapes = kept_shapes(plan.model)
    size = size_of((shape, plan.dtypes[path]) for path, shape in shapes.items())
    check_room(target, 2 * size)
    with new_folder(target) as building:
        maps = building.parent / "parameters"
        maps.mkdir()

        def make(path: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
            file = maps / path.replace("/", ".")
            return allocate(file, size_of([(shape, plan.dtypes[path])])).view(dtype).reshape(shape)

        params = read(plan, make, progress)
        about = checkpoint.describe(run_config(plan), plan.tokenizer, plan.origin)
        context = ocp.Context()
        # Nobody changes the arrays meanwhile, and a copy would be the whole model.
        context.memory.deepcopy_host_arrays = False
        context.memory.write_concurrent_bytes = 2 * 10**9
        try:
            with context:
                ocp.save_checkpointables(building, {"params": params, "about": about}, overwrite=True)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{target} could not be written: {first_line(error)}") from error


def _pack(array: np.ndarray) -> dict[str, Any]:
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode()}


def unpack(packed: Any, where: str) -> np.ndarray:
    """A small tensor out of a checkpoint's `about`. UserError, which begins with `where`, if it is none."""
    try:
        data = np.frombuffer(base64.b64decode(packed["data"]), DTYPES[packed["dtype"]])
        return data.reshape(packed["shape"])
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{where}, is no tensor: {shown(error)}.") from error


def summary(plan: Plan) -> str:
    """One line for the terminal."""
    count = sum(int(np.prod(shape)) for shape in parameter_shapes(plan.model).values())
    dtypes = " and ".join(sorted(set(plan.dtypes.values())))
    return f"{count:,} parameters (vocabulary padded), {dtypes}, template {plan.template}"
