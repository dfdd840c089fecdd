"""Every wrong configuration is refused with the key, the value and what is allowed; conversion to dicts and back."""

import dataclasses
import json

import pytest
from helpers.fixtures import tiny

from fusion_jax.config import RunConfig, StageConfig, from_dict, to_dict
from fusion_jax.errors import UserError
from fusion_jax.models.config import (
    PRESETS,
    VARIANTS,
    ExchangeConfig,
    FusionConfig,
    LLMConfig,
    RopeConfig,
    VisionConfig,
    replace,
)


def refused(make, *words):
    with pytest.raises(UserError) as error:
        make()
    message = str(error.value)
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert message.isprintable() and len(message) < 1500


@pytest.mark.parametrize(
    ("cls", "values", "words"),
    [
        (VisionConfig, {"heads": 7}, ("vision.heads=7", "vision.width=1536")),
        (VisionConfig, {"layers": 1}, ("vision.layers=1", "at least 2")),
        (VisionConfig, {"patch_size": 400}, ("vision.patch_size=400", "vision.image_size=384")),
        (VisionConfig, {"patch_size": 0}, ("vision.patch_size=0",)),
        (RopeConfig, {"kind": "yarn"}, ("llm.rope.kind='yarn'", "default, llama3, longrope")),
        (LLMConfig, {"heads": 7, "kv_heads": 7}, ("llm.heads=7", "llm.width=3072", "llm.head_dim")),
        (LLMConfig, {"kv_heads": 5}, ("llm.kv_heads=5", "llm.heads=32")),
        (LLMConfig, {"head_dim": 5}, ("5", "odd")),
        (LLMConfig, {"rope": RopeConfig("longrope", short_factors=(1.0,) * 3)}, ("llm.rope.short_factors", "3", "48")),
        (
            LLMConfig,
            {"rope": RopeConfig("longrope", short_factors=(1.0,) * 48)},
            ("llm.rope.long_factors", "0 values", "48"),
        ),
        (FusionConfig, {"mask": "papers"}, ("model.mask='papers'", "paper, released")),
        (FusionConfig, {"taps": "all"}, ("model.taps='all'", "paper, released")),
        (FusionConfig, {"context": "pixels"}, ("model.context='pixels'", "image, quadrants")),
        (FusionConfig, {"latent_init": "zero"}, ("model.latent_init='zero'", "learned, pooled")),
        (FusionConfig, {"text_only": "mean"}, ("model.text_only='mean'", "none, zero_image")),
        (FusionConfig, {"latent_counts": (4, 8)}, ("8", "square")),
        (FusionConfig, {"latent_counts": (0,)}, ("0", "square")),
        (FusionConfig, {"latent_counts": (4, 16, 4)}, ("model.latent_counts", "twice", "4, 16, 4")),
        (FusionConfig, {"latent_counts": ()}, ("model.latent_counts", "model.semantic_exchange=False")),
        (FusionConfig, {"image_tokens": 300}, ("300", "square")),
        (FusionConfig, {"mapping_loss_weight": -0.1}, ("model.mapping_loss_weight=-0.1",)),
        (FusionConfig, {"exchange": ExchangeConfig(0, 3, 12)}, ("model.exchange", "layers=12", "layers=32")),
        (FusionConfig, {"exchange": ExchangeConfig(0, 0, 2)}, ("model.exchange", "stride=0")),
        (FusionConfig, {"exchange": ExchangeConfig(-1, 1, 2)}, ("model.exchange", "start=-1")),
        (FusionConfig, {"exchange": ExchangeConfig(heads=7)}, ("model.exchange.heads=7", "llm.width=3072")),
    ],
)  # fmt: skip
def test_invalid_model_is_refused(cls, values, words):
    cls()
    refused(lambda: cls(**values), *words)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("cls", "values", "words"),
    [
        *((VisionConfig, {name: 10**12}, (f"vision.{name}=1000000000000",)) for name in ("width", "mlp_dim", "layers")),
        (VisionConfig, {"image_size": 10**9}, ("vision.image_size=1000000000", "65536")),
        (VisionConfig, {"image_size": 65536, "patch_size": 1}, ("vision.image_size / vision.patch_size=65536", "4096")),
        (VisionConfig, {"heads": 0}, ("vision.heads=0",)),
        *((VisionConfig, {"norm_eps": eps}, ("vision.norm_eps",)) for eps in (NAN, INFINITY, 0.0, -1e-6, 1e-45)),
        *((RopeConfig, {"theta": theta}, ("llm.rope.theta",)) for theta in (NAN, INFINITY, 0.0, -1.0, -INFINITY)),
        *((RopeConfig, {"factor": factor}, ("llm.rope.factor",)) for factor in (NAN, INFINITY, 0.0, -8.0)),
        (RopeConfig, {"low_freq_factor": 0.0}, ("llm.rope.low_freq_factor",)),
        (RopeConfig, {"high_freq_factor": NAN}, ("llm.rope.high_freq_factor",)),
        (RopeConfig, {"low_freq_factor": 4.0}, ("llm.rope.low_freq_factor=4.0", "below")),
        (RopeConfig, {"original_length": 1}, ("llm.rope.original_length=1", "at least 2")),
        (RopeConfig, {"max_length": 0}, ("llm.rope.max_length=0",)),
        (RopeConfig, {"short_factors": (1.0, NAN)}, ("llm.rope.short_factors[1]=nan",)),
        (RopeConfig, {"long_factors": (0.0,)}, ("llm.rope.long_factors[0]=0.0",)),
        *((LLMConfig, {name: 10**12}, (f"llm.{name}=1000000000000",)) for name in ("width", "layers", "vocab_size")),
        *((LLMConfig, {"norm_eps": eps}, ("llm.norm_eps",)) for eps in (NAN, INFINITY, 0.0, -1e-6)),
        (LLMConfig, {"head_dim": -2}, ("llm.head_dim=-2",)),
        (LLMConfig, {"sliding_window": -1}, ("llm.sliding_window=-1",)),
        (FusionConfig, {"mapping_loss_weight": NAN}, ("model.mapping_loss_weight=nan",)),
        (FusionConfig, {"mapping_loss_weight": INFINITY}, ("model.mapping_loss_weight=inf",)),
        (FusionConfig, {"latent_counts": (-4,)}, ("-4", "square")),
        (FusionConfig, {"latent_counts": (10**12,)}, ("1000000000000", "too large")),
        (FusionConfig, {"latent_counts": (4,) * 300}, ("len(model.latent_counts)=300",)),
        (FusionConfig, {"image_tokens": -4}, ("-4", "square")),
        (FusionConfig, {"tile_tokens": -4}, ("model.tile_tokens=-4",)),
        (FusionConfig, {"tile_grids": ((10**6, 10**6),)}, ("model.tile_grids", "1024")),
        (FusionConfig, {"exchange": ExchangeConfig(0, 1, -1)}, ("model.exchange", "layers=-1")),
        (FusionConfig, {"exchange": ExchangeConfig(heads=0)}, ("model.exchange.heads=0",)),
        (FusionConfig, {"exchange": ExchangeConfig(heads=-16)}, ("model.exchange.heads=-16",)),
    ],
)
def test_numbers_that_no_model_has_are_refused(cls, values, words):
    refused(lambda: cls(**values), *words)


def test_exchange_is_not_looked_at_where_it_is_off():
    FusionConfig(semantic_exchange=False, exchange=ExchangeConfig(0, 3, 12), latent_counts=())
    FusionConfig(exchange=ExchangeConfig(0, 0, 0, 7))


STAGE = {"name": "one", "data": "data.json", "max_length": 40, "batch_size": 6}
RUN = {"model": to_dict(tiny()), "tokenizer": "tokenizer", "stages": [STAGE]}


def run_with(changes=(), stage=(), drop=()):
    values = {**RUN, **dict(changes), "stages": dict(changes).get("stages", [{**STAGE, **dict(stage)}])}
    return lambda: from_dict(RunConfig, {k: v for k, v in values.items() if k not in drop})


def with_model(**changes):
    model = to_dict(tiny())
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        (model[part] if part else model)[name] = value
    return run_with({"model": model})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        # Values.
        (run_with(stage={"accumulation": 4}), ("'one'", "accumulation=4", "batch_size=6")),
        (run_with(stage={"accumulation": 0}), ("'one'", "accumulation=0", "at least 1")),
        (run_with(stage={"batch_size": 0}), ("'one'", "batch_size=0")),
        (run_with(stage={"max_rounds": 0}), ("'one'", "max_rounds=0")),
        (run_with(stage={"max_question_length": 0}), ("'one'", "max_question_length=0")),
        (run_with(stage={"epochs": 0}), ("'one'", "epochs", "steps")),
        (run_with(stage={"warmup_ratio": 1.0}), ("'one'", "warmup_ratio=1.0")),
        (run_with(stage={"warmup_ratio": -0.1}), ("'one'", "warmup_ratio=-0.1")),
        (run_with(stage={"learning_rate": -1e-4}), ("'one'", "learning_rate=-0.0001")),
        *((run_with(stage={name: -1e-3}), ("'one'", f"{name}=-0.001")) for name in ("b1", "b2", "eps", "weight_decay")),
        *((run_with(stage={name: 1.0}), ("'one'", f"{name}=1.0", "0.9999")) for name in ("b1", "b2", "warmup_ratio")),
        *((run_with(stage={name: 0.99999999}), ("'one'", f"{name}=0.99999999")) for name in ("b1", "b2")),
        (run_with(stage={"learn_rows": [-1]}), ("'one'", "learn_rows=-1", "at least 0")),
        (run_with(stage={"learn_rows": [3, 3]}), ("'one'", "learn_rows", "twice")),
        (run_with(stage={"eps": 0.0}), ("'one'", "eps=0.0")),
        (run_with(stage={"clip_norm": -1.0}), ("'one'", "clip_norm=-1.0", "at least 0")),
        (run_with(stage={"steps": -1}), ("'one'", "steps=-1", "at least 0")),
        (run_with(stage={"learning_rate_by_path": {"llm": -1.0}}), ("'one'", "learning_rate_by_path['llm']=-1.0")),
        (run_with(stage={"learning_rate": 1e39}), ("'one'", "learning_rate=1e+39", "between 0 and 3.4e+38")),
        *(
            (run_with(stage={name: 10**12}), ("'one'", f"{name}=1000000000000", "between"))
            for name in ("max_length", "max_question_length", "max_images", "batch_size", "epochs", "steps")
        ),
        *(
            (run_with({name: 10**12}), (f"config.{name}=1000000000000", "between"))
            for name in ("log_every", "keep_checkpoints", "sample_answers", "loader_threads", "hang_minutes")
        ),
        (run_with({"max_skipped_steps": 0}), ("config.max_skipped_steps=0", "at least 1")),
        (run_with({"validate_every": -1}), ("config.validate_every=-1", "at least 0")),
        *((run_with(stage={"name": name}), ("the name must be",)) for name in ("", "..", "a/b", "\x1b[2J")),
        *((run_with(stage={"name": name}), ("other things",)) for name in ("compiled", "run.lock", "config.json")),
        (run_with(stage={"name": "n" * 300}), ("200 bytes",)),
        (run_with({"mesh": {"data": 10**12}}), ("config.mesh.data=1000000000000", "between")),
        # 9 image tokens and 4 latents.
        (run_with(stage={"max_length": 13}), ("'one'", "max_length=13", "13 visual", "9 of the", "4 latents")),
        (run_with({"stages": [STAGE, STAGE]}), ("config.stages", "one, one")),
        (run_with({"stages": []}), ("config.stages", "at least one")),
        (run_with({"remat": "some"}), ("config.remat='some'", "none, dots, attention, full")),
        (run_with({"dtype": "float16"}), ("config.dtype='float16'", "float32, bfloat16")),
        (run_with({"template": "vicuna"}), ("config.template='vicuna'", "phi3", "llama3")),
        (run_with({"log_every": 0}), ("config.log_every=0",)),
        (run_with({"checkpoint_every": 0}), ("config.checkpoint_every=0",)),
        (run_with({"keep_checkpoints": 0}), ("config.keep_checkpoints=0",)),
        (run_with({"loader_threads": 0}), ("config.loader_threads=0",)),
        (run_with({"max_bad_records": 1.5}), ("config.max_bad_records=1.5", "between 0 and 1")),
        # Unknown and missing keys.
        (run_with({"remats": "full"}), ("config.remats", "is not a key; did you mean remat")),
        (run_with({"zzz": 1}), ("config.zzz", "known keys", "loader_threads")),
        (run_with(stage={"weight_decy": 1.0}), ("stages[0].weight_decy is not a key; did you mean weight_decay?",)),
        (run_with(stage={"rate": 1.0}), ("stages[0].rate is not a key; did you mean learning_rate or",)),
        (run_with({"templates": "phi3"}), ("config.templates is not a key; did you mean template?",)),
        (run_with({"template": "phi"}), ("config.template='phi' is unknown; allowed: ", "; did you mean phi3?")),
        (run_with({"dtype": "bfloat"}), ("config.dtype='bfloat' is unknown", "; did you mean bfloat16 or float32?")),
        (run_with(stage={"learning_rates": 1.0}), ("[0].learning_rates is not a key; did you mean learning_rate",)),
        (with_model(maks="paper"), ("config.model.maks", "is not a key; did you mean mask")),
        (with_model(vision__widht=16), ("config.model.vision.widht", "is not a key; did you mean width")),
        (with_model(llm__rope={"thta": 1.0}), ("config.model.llm.rope.thta", "is not a key; did you mean theta")),
        (run_with(drop=("tokenizer",)), ("config.tokenizer", "missing")),
        (run_with({"stages": [{"name": "one"}]}), ("config.stages[0].data", "missing")),
        # Types.
        (run_with({"seed": "42"}), ("config.seed", "int", "'42'")),
        (run_with({"seed": 1.5}), ("config.seed", "int", "1.5")),
        (run_with({"seed": True}), ("config.seed", "int", "True")),
        (run_with({"tokenizer": 3}), ("config.tokenizer", "str", "3")),
        (run_with({"stages": "one"}), ("config.stages", "list", "'one'")),
        (run_with({"stages": ["one"]}), ("config.stages[0]", "mapping", "'one'")),
        (run_with({"model": 3}), ("config.model", "mapping", "3")),
        (run_with(stage={"learning_rate": "1e-4"}), ("config.stages[0].learning_rate", "float", "'1e-4'")),
        *((run_with(stage={"eps": eps}), ("config.stages[0].eps", "finite float")) for eps in (NAN, INFINITY, 10**400)),
        (run_with({"x\x1b[2J" * 99: 1}), ("config.x", "known keys")),
        (run_with({"seed": "9" * 9999}), ("config.seed", "int", "'999")),
        (run_with(stage={"learning_rate": True}), ("config.stages[0].learning_rate", "float", "True")),
        (run_with(stage={"freeze": "vision"}), ("config.stages[0].freeze", "list", "'vision'")),
        (run_with(stage={"freeze": ["vision", 3]}), ("config.stages[0].freeze[1]", "str", "3")),
        (run_with(stage={"learning_rate_by_path": [1]}), ("config.stages[0].learning_rate_by_path", "mapping")),
        (run_with(stage={"learning_rate_by_path": {"x": "y"}}), ("learning_rate_by_path['x']", "float", "'y'")),
        (with_model(text_guided=1), ("config.model.text_guided", "bool", "1")),
        (with_model(latent_counts=[4.0]), ("config.model.latent_counts[0]", "int", "4.0")),
        (with_model(vision__heads="2"), ("config.model.vision.heads", "int", "'2'")),
        # The parts' own checks are reached.
        (with_model(vision__heads=3), ("vision.heads=3", "vision.width=16")),
        (with_model(mask="nothing"), ("model.mask='nothing'",)),
    ],
)  # fmt: skip
def test_invalid_run_is_refused(make, words):
    run_with()()
    refused(make, *words)


def test_visual_tokens_are_counted_as_configured():
    # No latents, or a smaller image: then there is room.
    with_model(semantic_exchange=False)()
    stage = [{**STAGE, "max_length": 10}]
    model = to_dict(tiny(semantic_exchange=False))
    assert from_dict(RunConfig, {**RUN, "model": model, "stages": stage}).stages[0].max_length == 10
    refused(lambda: from_dict(RunConfig, {**RUN, "stages": stage}), "max_length=10")


def test_whole_numbers_stand_for_floats():
    config = run_with(stage={"learning_rate": 1, "learning_rate_by_path": {"vision": 0}})()
    assert config.stages[0].learning_rate == 1.0 and isinstance(config.stages[0].learning_rate, float)
    assert config.stages[0].learning_rate_by_path == {"vision": 0.0}


@pytest.mark.parametrize("preset", PRESETS)
def test_dict_and_json_give_the_config_back(preset):
    rope = RopeConfig("longrope", short_factors=(1.0, 2.0), long_factors=(3.0, 4.0))
    model = tiny(preset, **{"llm.rope": rope, "image_tokens": 4})
    stage = StageConfig(
        "s", "d.json", freeze=("vision", "llm/embedding"), learning_rate_by_path={"llm": 1e-5}, max_length=50
    )
    config = RunConfig(model=model, stages=(stage, dataclasses.replace(stage, name="t")), tokenizer="tok", seed=7)
    plain = to_dict(config)
    assert isinstance(plain["stages"], tuple) and isinstance(plain["model"]["vision"], dict)
    assert from_dict(RunConfig, plain) == config
    assert from_dict(RunConfig, json.loads(json.dumps(plain))) == config
    assert from_dict(RunConfig, {**plain, "model": model}) == config


def test_published_variants_survive_json():
    for sizes in VARIANTS.values():
        for config in sizes.values():
            assert from_dict(FusionConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_replace_reaches_into_the_parts():
    config = replace(tiny(), mask="released")
    assert config == dataclasses.replace(tiny(), mask="released")
    config = replace(tiny(), **{"llm.layers": 5, "llm.rope.theta": 5e5, "vision.heads": 4, "taps": "released"})
    llm = dataclasses.replace(tiny().llm, layers=5, rope=RopeConfig(theta=5e5))
    vision = dataclasses.replace(tiny().vision, heads=4)
    assert config == dataclasses.replace(tiny(), llm=llm, vision=vision, taps="released")
