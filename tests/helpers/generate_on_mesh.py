"""Answers from parameters sharded over fsdp 2 x tensor 2 x data 2; test_generate.py runs it as a process."""

import sys

import jax
from helpers import generation, tiny_run

from fusion_jax.config import MeshConfig
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.devices import sharding
from fusion_jax.inference import generate
from fusion_jax.models.fusion import Fusion
from fusion_jax.training import state

mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
places = jax.tree.map(lambda p: p.sharding, state.abstract_parameters(tiny_run.MODEL, mesh))
params = jax.device_put(generation.weights(), places)
largest = max(jax.tree.leaves(params), key=lambda leaf: leaf.size)
assert largest.addressable_shards[0].data.size * 4 <= largest.size
model, tokenizer = Fusion(tiny_run.MODEL), load_tokenizer(sys.argv[1])
answerer = generate.Answerer(model, params, generation.config(), tokenizer, rows=3, max_tokens=6, mesh=mesh)
assert answerer.rows == 4
print(answerer.answer(generation.MIXED))
