"""Every shipped training config: what is meant to learn moves in one step, what is meant to stay does not."""

import dataclasses
import functools
import importlib
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from helpers import fixtures
from helpers.fixtures import flat

from fusion_jax.config import OPTIMIZER_NAMES, TEMPLATE_NAMES, RunConfig, from_dict, to_dict
from fusion_jax.data import templates
from fusion_jax.data.tiles import choose_tiling
from fusion_jax.errors import UserError
from fusion_jax.models import remat
from fusion_jax.models.limits import REMATS
from fusion_jax.training import optim, optimizers

CONFIGS = Path(__file__).parents[1] / "configs"
NO_STAGES = ("benchmark_cpu", "common", "quickstart_data", "synthesize", "synthesize_endpoint", "studies")
STUDIES = {
    f"study_{name}" for name in ("components", "lambda", "latents", "exchange", "mask", "guide")
}  # tests/studies
FINETUNE = ("finetune:CHECKPOINT,DATA", "finetune:CHECKPOINT,DATA,all", "finetune:CHECKPOINT,my.json")
SHIPPED = ("fusion:3b", "fusion:x_8b", "fusion:l_3b", "flare:l_3b", "flare:x_3b", "quickstart:", *FINETUNE)
SHIPPED += ("ablations:l_3b", "ablations:l_3b,A", "ablations:l_3b,B", "ablations:l_3b,C", "ablations:l_3b,A,B,C")
NEW_TOKENS = [52, 53]  # of the batch


class Tokens:
    vision_start_id, vision_end_id = NEW_TOKENS


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Configs by name; `finetune` goes on from a checkpoint of the tiny model, whose tokenizer has the new tokens."""
    import configs.finetune

    for name in ("stage1", "stage1_5", "stage2"):
        (tmp_path / f"{name}.yaml").write_text("")
    (tmp_path / "validation.json").write_text("[]")
    about = {"config": {"model": to_dict(fixtures.tiny())}, "tokenizer": {}}
    monkeypatch.setattr(configs.finetune, "find_checkpoint", lambda path: path)
    monkeypatch.setattr(configs.finetune, "load_about", lambda path: about)
    monkeypatch.setattr(configs.finetune, "save_tokenizer", lambda about, folder: None)
    monkeypatch.setattr(configs.finetune, "load_tokenizer", lambda folder: Tokens)

    def from_name(name: str) -> RunConfig:
        module, _, argument = name.partition(":")
        found = importlib.import_module(f"configs.{module}").get_config(argument.replace("DATA", str(tmp_path)))
        return from_dict(RunConfig, found.to_dict())

    return from_name


def small(model):
    """The model's every choice at the fixtures' sizes; one table of latents, since a step draws one."""
    sizes = fixtures.tiny()
    return dataclasses.replace(
        model,
        vision=sizes.vision,
        llm=dataclasses.replace(sizes.llm, tied_head=model.llm.tied_head, qkv_bias=model.llm.qkv_bias),
        exchange=sizes.exchange,
        latent_counts=(4,),
        image_tokens=4 if model.image_tokens else 0,
        tile_tokens=4 if model.tile_tokens else 0,
        mapping_loss_weight=0.1 if model.mapping_loss_weight else 0.0,
    )


@functools.cache
def gradients(model):
    if not model.tile_grids:
        batch = fixtures.mixed_batch(model)
        assert set(NEW_TOKENS) <= set(batch.tokens.ravel().tolist())
    else:
        tiling, side = choose_tiling((640, 480), model.tile_grids, model.vision.image_size), model.vision.image_size
        crops = np.random.default_rng(0).integers(0, 256, (tiling.crops, 1, side, side, 3)).astype(np.uint8)
        one = dataclasses.replace(fixtures.example(model, 0), crops=crops, tilings=(tiling,))
        batch = fixtures.lay(model, [one])
    return flat(fixtures.grad_fn(model)(fixtures.params(model), batch)[1])


def test_names_in_the_config_are_those_of_the_code():
    assert tuple(templates.TEMPLATES) == TEMPLATE_NAMES and tuple(remat.POLICIES) == REMATS
    assert tuple(optimizers.OPTIMIZERS) == OPTIMIZER_NAMES


def test_all_files_are_looked_at():
    assert {path.stem for path in CONFIGS.glob("*.py")} - {"__init__"} == {
        *NO_STAGES,
        *STUDIES,
        *(name.partition(":")[0] for name in SHIPPED),
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_one_step_moves_what_is_meant_to_learn(load, name):
    config = load(name)
    model = small(config.model)
    weights, grads = fixtures.params(model), gradients(model)
    alone = name in ("finetune:CHECKPOINT,DATA", "finetune:CHECKPOINT,my.json")
    for stage in config.stages:
        labels, tx = optim.labels(stage, weights), optim.optimizer(stage, weights)
        named = flat(labels)
        seen = {
            path: 0 * g if named[path] == optim.FROZEN else g * _rows(g, stage) if named[path] == optim.ROWS else g
            for path, g in grads.items()
        }
        seen = unflatten_dict(seen, sep="/")
        squares = optim.squares(seen)
        updates, _ = tx.update(seen, tx.init(weights), weights, norm=optim.norm(squares), squares=squares)
        changes = optim.changes(updates, optim.learning_rates(stage, 50, 100), labels)
        new, old = flat(optim.apply_changes(weights, changes, labels, stage.learn_rows)), flat(weights)
        for path in old:
            frozen = alone and path.startswith(("vision/", "llm/")) and "/exchange/" not in path
            moved = np.abs(new[path] - old[path]).reshape(len(old[path]), -1).max(1)
            if frozen:
                expected = NEW_TOKENS if path == "llm/embedding" else []
                assert moved.nonzero()[0].tolist() == expected, (stage.name, path)
            elif not path.endswith(("key/bias", "key_norm/bias")):  # which no output depends on
                assert moved.max() > 0, (stage.name, path)
    assert not alone or any("/exchange/" in path for path in grads)


def _rows(g, stage):
    return np.isin(np.arange(len(g)), stage.learn_rows)[:, None]


def test_fine_tuning_reads_what_the_data_engine_writes(load, tmp_path):
    config = load("finetune:CHECKPOINT,DATA")
    assert [stage.name for stage in config.stages] == ["stage1", "stage1_5", "stage2"]
    assert config.validation_data == str(tmp_path / "validation.json")
    assert all(stage.packing and stage.steps for stage in config.stages)
    (tmp_path / "stage1.yaml").unlink()
    (tmp_path / "validation.json").unlink()
    config = load("finetune:CHECKPOINT,DATA")
    assert [stage.name for stage in config.stages] == ["stage1_5", "stage2"] and not config.validation_data
    for path in tmp_path.glob("*.yaml"):
        path.unlink()
    with pytest.raises(UserError, match=r"a folder without stage1\.yaml, stage1_5\.yaml, stage2\.yaml"):
        load("finetune:CHECKPOINT,DATA")


def test_fine_tuning_on_one_file_is_one_stage(load):
    for data in ("my.json", "mixture.yaml", "tfds:coco:train"):
        (stage,) = load(f"finetune:CHECKPOINT,{data}").stages
        assert (stage.name, stage.data, stage.steps, stage.epochs, stage.packing) == ("finetune", data, 0, 1, True)
    for wrong in ("", "CHECKPOINT", "CHECKPOINT,", ",my.json", "CHECKPOINT,my.json,al", "CHECKPOINT,my.json,all,x"):
        with pytest.raises(UserError, match=r"CHECKPOINT,DATA|'al' is unknown; allowed: connectors, all"):
            load(f"finetune:{wrong}")
