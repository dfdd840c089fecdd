"""Compiles the product's programs for accelerators that are not here; run by test_targets.py, in a process of its own.

    python tests/targets/programs.py tpu [GROUP ...]

prints a line of JSON for each program: its name, seconds, and its `facts` or the error. Models are tiny, but wide and
long enough that the accelerator's attention kernels are chosen, with the published head sizes of 72, 96 and 128.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import facts
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers.fixtures import example
from jax.sharding import AxisType, Mesh

from configs import flare, fusion
from fusion_jax.batch import Batch
from fusion_jax.config import MeshConfig, RunConfig, from_dict
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import lay_out
from fusion_jax.data.plan import Sizes
from fusion_jax.devices import chips, sharding
from fusion_jax.inference import attention_maps, attention_weights, decoding, sampling
from fusion_jax.inference.decoding import CHUNK
from fusion_jax.inference.prefixes import Prefix, extend, rest_of
from fusion_jax.inference.prompts import Buckets, Steps, fit
from fusion_jax.models import fusion as fusion_model
from fusion_jax.models import partition, weights
from fusion_jax.models.config import replace
from fusion_jax.models.fusion import Fusion
from fusion_jax.planning import program, typical
from fusion_jax.server import prefills, running_batch
from fusion_jax.server.requests import MOST_LOGPROBS
from fusion_jax.training import state
from fusion_jax.training.step import compile_evaluation, compile_step

TINY = {
    "vision.image_size": 96, "vision.patch_size": 8, "vision.mlp_dim": 256, "vision.heads": 2, "vision.layers": 4,
    "llm.vocab_size": 500, "llm.width": 256, "llm.mlp_dim": 256, "llm.layers": 2, "llm.heads": 4, "llm.kv_heads": 2,
    "exchange.start": 0, "exchange.stride": 1, "exchange.layers": 2, "exchange.heads": 4, "latent_counts": (4,),
}  # fmt: skip
LENGTH, QUESTION, ROWS, ANSWER = 256, 64, 8, 32
SHARDED, TENSOR = MeshConfig(1, -1, 1), MeshConfig(1, -1, 2)


def _tiny(family, arguments: str, head: int, vision_head: int, **changes) -> RunConfig:
    """A published config, much smaller but for the sizes of its heads."""
    config = from_dict(RunConfig, family.get_config(f"{arguments},stage1").to_dict())
    factors = (1.0,) * (head // 2) if config.model.llm.rope.kind == "longrope" else ()
    heads = {
        "llm.head_dim": head,
        "llm.rope.short_factors": factors,
        "llm.rope.long_factors": factors,
        "vision.width": vision_head * TINY["vision.heads"],
    }
    model = replace(config.model, **(TINY | heads | changes))
    stage = {"max_length": LENGTH, "max_question_length": QUESTION, "batch_size": ROWS, "packing": True}
    return dataclasses.replace(config, model=model, stages=(dataclasses.replace(config.stages[0], **stage),))


FLARE = _tiny(flare, "l_3b", 96, 72)
TILES = _tiny(flare, "x_3b", 96, 96, tile_tokens=16, tile_grids=((1, 2), (2, 1)))
# 13 x 13 patches: as with the published 27 x 27 their number is odd, and windows overlap.
QUADRANTS = _tiny(fusion, "8b", 128, 72, **{"vision.image_size": 104})


@dataclasses.dataclass(frozen=True)
class Compiled:
    lowered: jax.stages.Lowered
    compiled: jax.stages.Compiled

    @property
    def results(self):
        """What the program gives, as shapes with its shardings."""
        return jax.tree.map(_at, self.lowered.out_info, self.compiled.output_shardings)


def _at(x, place) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _everywhere(tree, mesh: Mesh):
    return jax.tree.map(lambda x: _at(x, sharding.replicated(mesh)), tree)


def _compiled(lowered: jax.stages.Lowered) -> Compiled:
    return Compiled(lowered, lowered.compile())


def _compile(function, mesh: Mesh, *arguments) -> Compiled:
    return _compiled(sharding.lower(function, mesh, *arguments))


def _off_mesh(function, mesh: Mesh, *arguments) -> Compiled:
    """Compiles a function that the product calls without `sharding.use`: only arguments and results are on the mesh."""
    platform = mesh.devices.flat[0].platform
    with partition.compiled_for(platform):
        traced = jax.jit(function).trace(*arguments)
    return _compiled(traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,)))


def _model(config: RunConfig, mesh: Mesh, remat: str = "none"):
    """The model, and its parameters sharded over a mesh."""
    return Fusion(config.model, jnp.dtype(config.dtype), remat), state.abstract_parameters(config.model, mesh)


def _as_loaded(params, dtype, kind: str):
    """The parameters as `loading.load_model` stores them on one device."""
    flat = flatten_dict(params, sep="/")
    whole = sharding.replicated(next(iter(flat.values())).sharding.mesh)
    read, stored = weights.dtypes(flat, dtype), {}
    for path, x in flat.items():
        stored[path] = _at(x.update(dtype=read[path]), x.sharding)
        if kind == "int8" and weights.becomes_int8(path):
            stored[path] = _at(x.update(dtype=jnp.int8), x.sharding)
            scales = jax.ShapeDtypeStruct((*x.shape[:-2], x.shape[-1]), jnp.float32)
            stored[weights.scale_name(path)] = _at(scales, whole)
    places = {path: x.sharding for path, x in stored.items()}
    with partition.compiled_for(whole.mesh.devices.flat[0].platform):
        blocks = flatten_dict(jax.eval_shape(weights.unstack, unflatten_dict(stored, sep="/")), sep="/")
    return unflatten_dict({path: _at(x, places.get(path, whole)) for path, x in blocks.items()}, sep="/")


def _prompts(config: RunConfig, mesh: Mesh, rows: int, sizes: Buckets | Steps) -> Batch:
    """So many questions about images, laid out as answering does."""
    latents = config.model.fixed_latent_count
    prompts = [dataclasses.replace(example(config.model, i, answer=0), labels=None) for i in range(rows)]
    batch = lay_out(prompts, fit(prompts, config.model, latents, sizes), latents)
    return jax.tree.map(lambda x: _at(x, sharding.of_rows(mesh)), batch)


# Groups of programs: each generator makes those that it is listed with, in that order.


def step(config: RunConfig, mesh: Mesh, remat: str, images: bool = True, **stage) -> Iterator[Compiled]:
    """A train step."""
    stage = dataclasses.replace(config.stages[0], **stage)
    shards = sharding.batch_shards(mesh)
    one = typical.step(config, stage, shards)
    if not images:  # as the pipeline lays out rows of text alone
        spec = layout_spec(config.model, stage.max_length, stage.max_question_length, stage.max_rounds)
        sizes = Sizes(ROWS, shards, {0: 0}, stage.packing, ROWS)
        one = dataclasses.replace(one, batch=typical.abstract_batch(dataclasses.replace(spec, crops=0), sizes, 0))
    tx, labels, arguments = program.abstract_arguments(config, stage, mesh, one)
    yield _compiled(compile_step(_model(config, mesh, remat)[0], stage, tx, labels, mesh).lower(*arguments))


def validation(config: RunConfig, mesh: Mesh) -> Iterator[Compiled]:
    model, params = _model(config, mesh, config.remat)
    batch = typical.step(config, config.stages[0], sharding.batch_shards(mesh)).batch
    rows = jax.tree.map(lambda x: _at(x, sharding.of_rows(mesh)), batch)
    yield _compiled(compile_evaluation(model, mesh).lower(params, rows))


def answers(config: RunConfig, mesh: Mesh) -> Iterator[Compiled]:
    """What `generate.Answerer` runs: sample answers, benchmarks in training, and those of a checkpoint."""
    model, params = _model(config, mesh, config.remat)
    batch = _prompts(config, mesh, sharding.batch_shards(mesh), Steps())
    limit = np.full(len(batch.tokens), ANSWER, np.int32)
    prefill = _compile(decoding.prefill, mesh, model, params, batch, batch.tokens.shape[1] + ANSWER, limit)
    yield prefill
    settings = sampling.settings([sampling.Sampling()] * len(limit))
    begin = _compile(decoding.begin, mesh, *prefill.results, batch, limit, settings)
    yield begin
    yield _compile(decoding.decode, mesh, model, params, begin.results, CHUNK, (2,), False)


def serving(config: RunConfig, mesh: Mesh) -> Iterator[Compiled]:
    """What the server's engine runs, on one device."""
    model, params = _model(config, mesh)
    params, integers = _as_loaded(params, model.dtype, "full"), _as_loaded(params, model.dtype, "int8")
    buckets = Buckets((LENGTH,), (QUESTION,))
    prompts = SimpleNamespace(buckets=buckets, config=config.model)
    server = running_batch.RunningBatch(model, params, prompts, rows=4, max_tokens=ANSWER)
    batch = _prompts(config, mesh, 1, buckets)
    limit = np.full(1, ANSWER, np.int32)
    prefill = _compile(decoding.prefill, mesh, model, params, batch, server.capacity, limit, True)
    yield prefill
    *prefilled, cache, encoding = prefill.results
    whole = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch)
    prefix = Prefix(cache.keys, cache.values, np.int32(LENGTH // 2), encoding)
    yield _compile(extend, mesh, model, params, rest_of(whole, LENGTH // 2, 32), prefix, server.capacity, limit)
    words = prefills.text_only(whole, server.capacity)
    settings = sampling.settings([sampling.Sampling()])
    begin = _compile(decoding.begin, mesh, *prefilled, cache, words, limit, settings)
    yield begin
    rows = _everywhere(jax.eval_shape(server.empty), mesh)
    joined = _compile(running_batch.insert, mesh, rows, begin.results, np.int32(0))
    yield joined
    yield _compile(running_batch.release, mesh, joined.results, np.zeros(server.rows, bool))
    yield _compile(decoding.decode, mesh, model, params, joined.results, server.chunk, (2,), True)
    reported = (False, MOST_LOGPROBS, server.all_allowed())
    yield _compile(decoding.decode, mesh, model, params, joined.results, 1, (2,), True, *reported)
    small = _compile(decoding.decode, mesh, model, integers, joined.results, server.chunk, (2,), False)
    matrices = {x.shape[-2:] for x in jax.tree.leaves(integers["llm"]) if x.dtype == jnp.int8}
    restored = facts.written(small.compiled.as_text(), ("bf16", "f32"), matrices)
    assert not restored, f"int8 weights are restored: {restored[:3]}"
    yield small


def pictures(config: RunConfig, mesh: Mesh) -> Iterator[Compiled]:
    """What `fusion_jax.inference.attention_pictures` measures, on one device."""
    model, params = _model(config, mesh)
    params = _as_loaded(params, model.dtype, "full")
    one = dataclasses.replace(example(config.model, answer=0), labels=None)
    batch = attention_maps.lay_out_prompt(config.model, one, config.model.fixed_latent_count)
    words = (attention_maps.indicator([0], x.shape[-1]) for x in (batch.tokens, batch.crop_text))
    yield _compile(attention_weights.measure_word, mesh, model, params, _everywhere(batch, mesh), *words)


def beginning(config: RunConfig, mesh: Mesh) -> Iterator[Compiled]:
    """Random parameters; an import takes those that its source does not hold."""
    params = state.abstract_parameters(config.model, mesh)
    places = jax.tree.map(lambda x: x.sharding, params)
    key = _everywhere(jax.eval_shape(lambda: jax.random.key(0)), mesh)
    yield _off_mesh(lambda key: fusion_model.init(config.model, key, places), mesh, key)


def planted(config: RunConfig, mesh: Mesh) -> Iterator[Compiled]:
    """What the tests must find: a product of float32 numbers, and a call of Python."""
    x = _at(jax.ShapeDtypeStruct((256, 256), jnp.float32), sharding.replicated(mesh))

    def product(x):
        return x @ x

    def call(x):
        jax.debug.callback(lambda x: None, x[0, 0])
        return x + 1

    yield _compile(jax.jit(product), mesh, x)
    yield _compile(jax.jit(call), mesh, x)


def off_mesh(config: RunConfig, mesh: Mesh) -> Iterator[Compiled]:
    """What must not work: a prefill whose parameters are on several chips, outside of their mesh."""
    model, params = _model(config, mesh)
    batch = _prompts(config, mesh, sharding.batch_shards(mesh), Steps())
    limit = np.ones(len(batch.tokens), np.int32)
    prefill = decoding.prefill.__wrapped__  # options of a compiler cannot be given within another jitted function
    yield _off_mesh(lambda *arguments: prefill(model, *arguments, LENGTH, limit), mesh, params, batch)


@dataclasses.dataclass(frozen=True)
class Group:
    """Programs by name, and what makes them: a generator of a config and a mesh."""

    names: tuple[str, ...]
    make: Callable[..., Iterator[Compiled]]
    config: RunConfig = FLARE
    sizes: MeshConfig = SHARDED
    alone: bool = False  # on one device, without the mesh
    more: dict = dataclasses.field(default_factory=dict)


STEP = Group(("step: packed, accumulated, remat full",), step, more={"remat": "full", "accumulation": 2})
TILED = Group(("step: a record a row, tiles, remat dots",), step, TILES, more={"remat": "dots", "packing": False})
TEXT = Group(("step: text alone, remat none",), step, more={"remat": "none", "images": False})
SPLIT = Group(("step: quadrants, tensor=2, remat attention",), step, QUADRANTS, TENSOR, more={"remat": "attention"})
MUON = Group(("muon step: tensor=2, remat full",), step, FLARE, TENSOR, more={"remat": "full", "optimizer": "muon"})
VALIDATION = Group(("validation",), validation)
ANSWERS = Group(("answers: prefill", "answers: begin", "answers: decode"), answers)
SERVED = ("prefill", "rest", "begin", "join", "leave", "decode", "decode in a form", "decode with int8")
SERVING = Group(tuple(f"server: {x}" for x in SERVED), serving, alone=True)
PICTURES = Group(("pictures",), pictures, alone=True)
BEGINNING = Group(("parameters",), beginning)
PLANTED = Group(("planted: float32", "planted: callback"), planted)
OFF_MESH = Group(("planted: off the mesh",), off_mesh)


@dataclasses.dataclass(frozen=True)
class Target:
    """Described devices, and the programs that are compiled for them.

    topology: of `devices.chips`. order: of its devices on the mesh; by default that of the product.
    """

    topology: str
    groups: tuple[Group, ...]
    order: tuple[int, ...] = ()

    def mesh(self, group: Group) -> Mesh:
        devices = chips.topology(self.topology).devices()
        if group.alone:
            return sharding.make_mesh(MeshConfig(), devices[:1])
        if not self.order:
            return sharding.make_mesh(group.sizes, devices)
        places = np.array(devices)[list(self.order)].reshape(sharding.mesh_sizes(group.sizes, len(devices)))
        return Mesh(places, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))


TARGETS = {
    "tpu": Target("v5e:2x2", (STEP, TILED, TEXT, VALIDATION, ANSWERS, PLANTED, OFF_MESH)),
    # Hosts that hold every second shard, as in slices of several hosts.
    "tpu of several hosts": Target(
        "v5p:2x2x1", (SPLIT, MUON, VALIDATION, ANSWERS, SERVING, PICTURES, BEGINNING), (0, 2, 1, 3)
    ),
    "gpu": Target("h100:1", (STEP, TEXT, VALIDATION, ANSWERS, SERVING, PICTURES, PLANTED)),
    "gpus": Target("h100:4", (SPLIT, TILED, VALIDATION, ANSWERS, BEGINNING)),
}


def main(name: str, wanted: list[str]) -> None:
    target = TARGETS[name]
    for group in target.groups:
        if wanted and not any(word in one for one in group.names for word in wanted):
            continue
        making = None
        for one in group.names:
            start, line = time.perf_counter(), {"target": name, "name": one}
            try:
                making = making or group.make(group.config, target.mesh(group), **group.more)
                built = next(making)
                line |= dataclasses.asdict(facts.read(built.lowered, built.compiled))
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {error}"[:2000]
            print(json.dumps(line | {"seconds": round(time.perf_counter() - start, 1)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
