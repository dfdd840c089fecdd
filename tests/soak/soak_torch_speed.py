"""Compares speed on CPU with the same model in PyTorch: `python tests/soak/soak_torch_speed.py [--rounds 5]`.

The model of configs/benchmark_cpu.py and its batch, in float32; PyTorch has its export (`fusion_jax/interop/torch`)
with eager attention (scores, softmax, product), as the published code computes it. Its step is forward, backward,
clipping and AdamW, with gradient checkpointing if asked for. Both sides take turns in one process, and each ratio is
that of a pair, in CPU seconds of all threads. Beside other work on the machine give `--threads 1`: PyTorch's threads
wait for each other busily, which counts as CPU time, and XLA's do not.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from helpers import exported_model
from helpers.exported_model import torch

from configs.benchmark_cpu import get_config
from fusion_jax.benchmarking import common, steps
from fusion_jax.inference import decoding
from fusion_jax.inference.sampling import Sampling
from fusion_jax.models import fusion, weights


def eager(q, k, v, attn_mask=None, is_causal=False):
    """Computes attention in PyTorch as its plain operations do."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if is_causal:
        attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


def pairs(name: str, theirs: Callable, ours: Callable, rounds: int) -> None:
    """Times both in turn, each once before, and prints the medians; each returns how much it did, in any unit."""
    figures: dict[str, list[float]] = {"PyTorch": [], "fusion_jax": []}
    for i in range(rounds + 1):
        for side, run in zip(figures, (theirs, ours)):
            begun, wall = time.process_time(), time.perf_counter()
            done = run()
            seconds = time.process_time() - begun
            if i:
                figures[side].append(seconds / done)
                print(f"{name}, {side}: {seconds:.3f} CPU s, {time.perf_counter() - wall:.3f} s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(*figures.values()))
    medians = ", ".join(f"{side} {statistics.median(values):.4f}" for side, values in figures.items())
    print(f"{name}: CPU seconds {medians}; {ratio:.2f} times as fast, median of {rounds} pairs", flush=True)


def torch_step(model, batch, checkpointing: bool) -> Callable[[], int]:
    inputs = exported_model.torch_inputs(batch)
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)

    def run() -> int:
        optimizer.zero_grad()
        model.train()(**inputs, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return 1

    return run


def jax_step(config, work) -> Callable[[], int]:
    step = steps.compile_step(dataclasses.replace(work, model=common.build_model(config)))

    def run() -> int:
        jax.block_until_ready(step.run())
        return 1

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", default="prefill,decode,step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in PyTorch")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of PyTorch")
    parser.add_argument("--encoder-layers", type=int, default=26)
    parser.add_argument("--dtype", default="float32", help="of fusion_jax; PyTorch computes in float32")
    options = parser.parse_args()
    config = get_config()
    config.model.vision.layers = options.encoder_layers
    config.dtype = options.dtype
    work = steps.benchmark_work(config)
    model = work.model
    params = fusion.init(model.config, jax.random.key(0))
    torch.set_num_threads(options.threads)
    torch.nn.functional.scaled_dot_product_attention = eager
    with tempfile.TemporaryDirectory() as folder:
        theirs = exported_model.export(Path(folder), model.config, params)
    params = weights.unstack(params)
    prompt = common.equal_batch(model.config, 1, config.question_tokens, 0)
    inputs = exported_model.torch_inputs(prompt, labels=False)
    ready, length = jax.tree.map(jnp.asarray, prompt), prompt.tokens.shape[1]

    @torch.no_grad()
    def torch_prefill():
        torch_prefill.result = theirs.eval()(**inputs, use_cache=True, logits_to_keep=1)
        return 1

    capacity, limit = length + config.decode_tokens, np.full(1, config.decode_tokens, np.int32)
    jax_prefill = functools.partial(decoding.prefill, model, params, ready, capacity, limit)

    @torch.no_grad()
    def torch_decode():
        cache, token = torch_prefill.result.cache, torch.zeros((1, 1), dtype=torch.long)
        mask = torch.ones((1, cache.get_seq_length()), dtype=torch.long)
        for _ in range(config.decode_tokens):
            mask = torch.cat([mask, mask[:, :1]], 1)
            token = theirs(token, attention_mask=mask, cache=cache, use_cache=True).logits[:, -1:].argmax(-1)
        cache.crop(-config.decode_tokens)
        return config.decode_tokens

    if "prefill" in options.what:
        pairs("prefill", torch_prefill, lambda: bool(jax.block_until_ready(jax_prefill())), options.rounds)
        gap = np.abs(np.asarray(jax_prefill()[0][0]) - torch_prefill.result.logits[0, -1].numpy()).max()
        print(f"greatest difference of the logits: {gap:.2g}", flush=True)
    if "decode" in options.what:
        torch_prefill()
        state = decoding.first_state(model, params, ready, [Sampling(max_tokens=config.decode_tokens + 1)])

        def jax_decode():
            copy = jax.block_until_ready(jax.tree.map(jnp.copy, state))
            jax.block_until_ready(decoding.decode(model, params, copy, config.decode_tokens, (), False))
            return config.decode_tokens

        pairs("decode, one token", torch_decode, jax_decode, options.rounds)
    if "step" in options.what:
        pairs("step", torch_step(theirs, work.batch, options.checkpointing), jax_step(config, work), options.rounds)


if __name__ == "__main__":
    main()
