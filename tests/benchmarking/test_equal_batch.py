"""The batches that benchmarks time: equal conversations of exactly the configured sizes."""

import numpy as np
import pytest
from helpers.fixtures import tiny

from fusion_jax.benchmarking.common import equal_batch
from fusion_jax.devices import flops


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_equal_conversations_have_exactly_their_sizes(preset):
    config = tiny(preset)
    latents = max(config.drawn_latent_counts)
    batch = equal_batch(config, rows=2, question=4, answer=3)
    shape = flops.shape_of(batch)
    length = 13 + 4 + 3 + config.tokens_per_image + latents
    assert shape.lengths == (length,) * 2 and batch.tokens.shape == (2, length)
    assert (shape.crops, shape.supervised, shape.rounds, shape.latent_count) == ((4, 4), 6, 2, latents)
    assert shape.plain == (8 if config.uses_quadrants else 0)


def test_without_an_answer_they_are_prompts():
    batch = equal_batch(tiny(), rows=1, question=4, answer=0)
    assert not batch.loss_weights.any()
    assert batch.round_end.tolist() == [[batch.tokens.shape[1] - 1]]


def test_without_latents_there_are_none():
    batch = equal_batch(tiny(semantic_exchange=False), rows=1, question=4, answer=3)
    assert batch.latent_count == 0 and batch.latent_start.size == 0
    assert np.all(batch.segment_ids == 1) and batch.tokens.shape[1] == 11 + 4 + 3 + tiny().tokens_per_image
