"""Parameters of a checkpoint for a model with parts more or less: everything else arrives where it belongs."""

import dataclasses
import json

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from flax.traverse_util import flatten_dict
from helpers.fixtures import flat, params, shapes, tiny

from fusion_jax.config import RunConfig, StageConfig, to_dict
from fusion_jax.errors import UserError
from fusion_jax.interop import table
from fusion_jax.models import fusion
from fusion_jax.training import init_from
from fusion_jax.training.checkpoint_folders import FOLDER
from fusion_jax.training.loading import load_params

MODEL = tiny("paper", latent_counts=(1, 4), **{"llm.layers": 5, "exchange.start": 1, "exchange.stride": 2})
STAGE = StageConfig("s", "d.json", max_length=200)
EXCHANGE, LATENTS = "/exchange/", "^latents_"


def run_config(model, **changes):
    return RunConfig(model, (STAGE,), "", **changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A step folder of a model with exchange layers after decoder layers 1 and 3 of 5."""
    step = tmp_path_factory.mktemp("run") / "s" / FOLDER / "8"
    about = {"json": json.dumps({"config": to_dict(run_config(MODEL)), "tokenizer": {}})}
    ocp.save_checkpointables(step, {"params": params(MODEL), "about": about})
    return step


def changed(**changes):
    return dataclasses.replace(MODEL, **changes)


def exchange(**changes):
    return changed(exchange=dataclasses.replace(MODEL.exchange, **changes))


@pytest.mark.parametrize(
    ("model", "without"),
    [
        (MODEL, ()),
        (changed(semantic_exchange=False), (EXCHANGE, LATENTS)),
        (exchange(start=0, stride=1, layers=5), (EXCHANGE,)),
        (changed(text_guided=False, mapping_loss_weight=0.0), ("^text_to_vision/",)),
        (changed(latent_counts=(1, 4, 9)), ("^latents_9$",)),
    ],
)
def test_every_layer_arrives_where_it_belongs(saved, model, without):
    loaded = flat(init_from.take_parameters(saved, MODEL, model, shapes(model), without, seed=3))
    ours, theirs = params(MODEL), shapes(model)
    before, wanted = flat(ours), {path: leaf.shape for path, leaf in flatten_dict(theirs, sep="/").items()}
    assert {path: leaf.shape for path, leaf in loaded.items()} == wanted
    # The table that exports a model says on its own where each layer is.
    (there, _), (here, _) = (table._places(config) for config in (MODEL, model))
    for (old, i), (new, k) in zip(there, here, strict=True):
        kinds = [path.removeprefix(f"{new}/") for path in loaded if path.startswith(f"{new}/")]
        assert "down/kernel" in kinds
        for kind in kinds:
            np.testing.assert_array_equal(loaded[f"{new}/{kind}"][k], before[f"{old}/{kind}"][i])
    random = {path for path in loaded if path == "latents_9" or (EXCHANGE in path and EXCHANGE in without)}
    fresh = flat(fusion.init(model, jax.random.key(3))) if random else {}
    for path, leaf in loaded.items():
        if "/layer_" in path:
            continue
        np.testing.assert_array_equal(leaf, fresh[path] if path in random else before[path], err_msg=path)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            changed(semantic_exchange=False),
            "it has latent tables of 1, 4 and exchange layers after decoder layers 1, 3, which the config's model "
            "lacks. config.init_without=['^latents_', '/exchange/'] takes none",
        ),
        (exchange(layers=0), "it has exchange layers after decoder layers 1, 3, which"),
        (exchange(layers=1), "it has exchange layers after decoder layers 3, which"),
        (
            exchange(start=2, layers=1),
            "it has exchange layers after decoder layers 1, 3, which the config's model lacks; it lacks exchange "
            "layers after decoder layers 2 of the config's model.",
        ),
        (changed(latent_counts=(4, 9)), "it has latent tables of 1, which the config's model lacks; it lacks latent "
         "tables of 9"),
        (changed(text_guided=False, mapping_loss_weight=0.0), "it has the text-to-vision projector, which"),
        (changed(tile_grids=((1, 2),)), "it lacks the row-end token of the config's model. config.init_without="
         "['^row_end'] takes"),
    ],
)  # fmt: skip
def test_other_parts_are_one_sentence_before_anything_is_read(saved, model, expected, capfd):
    config = run_config(model, init_from=str(saved))
    with pytest.raises(UserError) as error:
        init_from.check_initial(config, shapes(model))
    with pytest.raises(UserError, match="parameters of another model"):
        init_from.initial_parameters(config, shapes(model))
    assert f"{saved} holds parameters of another model: {expected}" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert "Traceback" not in "".join(capfd.readouterr())


def test_parts_that_neither_guide_nor_are_mapped_are_told_apart(saved):
    """A alone and B alone keep every parameter: they may be left out without a word."""
    for model in (changed(text_guided=False), changed(mapping_loss_weight=0.0)):
        assert not init_from.match_parameters(saved, MODEL, model, flatten_dict(shapes(model), sep="/"), ()).new


@pytest.mark.parametrize(
    ("without", "expected"),
    [(("exchnge",), "'exchnge' matches no parameter of the model or the checkpoint"), (("(",), "no.* expression")],
)
def test_patterns_that_mean_nothing_are_refused(saved, without, expected):
    with pytest.raises(UserError, match=expected.replace("no.*", "is not a regular")):
        init_from.match_parameters(saved, MODEL, MODEL, flatten_dict(shapes(MODEL), sep="/"), without)


def test_leaving_out_needs_a_checkpoint():
    with pytest.raises(UserError, match=r"init_without=.* says what is not taken from init_from, which is empty"):
        run_config(MODEL, init_without=(EXCHANGE,))


def test_checkpoint_with_more_than_its_own_config_knows(saved):
    config = changed(semantic_exchange=False, exchange=dataclasses.replace(MODEL.exchange, layers=0))
    with pytest.raises(
        UserError, match=r"parameters of another model: it has latents_1 and \d+ more, which its config"
    ):
        load_params(saved, shapes(config))
