"""Saving and restoring a state: failures of the folder, damage, what is kept, other devices, other configs."""

import base64
import dataclasses
import json
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
from helpers.forged import forge, without
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fusion_jax.config import RunConfig, StageConfig, to_dict
from fusion_jax.data.templates import find_template, first_ids
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import UserError
from fusion_jax.models.config import PAPER, ExchangeConfig, FusionConfig, LLMConfig, VisionConfig, replace
from fusion_jax.training import checkpoint, integrity, optim, optimizers, resume
from fusion_jax.training.about import describe_run, save_tokenizer
from fusion_jax.training.checkpoint_folders import steps_in
from fusion_jax.training.state import TrainState, create

ABOUT = {"json": json.dumps({"config": {}})}


def state_at(step):
    """Parameters and moments that differ by step."""
    numbers = jnp.arange(64 * 64, dtype=jnp.float32).reshape(64, 64) + step
    counters = (jnp.int32(step), jnp.int32(1), jnp.int32(0))
    return TrainState(counters[0], {"a": {"kernel": numbers}}, {"mu": numbers * 2}, *counters[1:])


def saved(folder, *steps, **keep):
    """Checkpoints of those steps, each complete."""
    checkpoints = checkpoint.Checkpoints(folder, ABOUT, **keep)
    for step in steps:
        checkpoints.save(step, state_at(step), {"next": step})
    checkpoints.close()
    return checkpoints


def assert_is(restored, step):
    number, state, data = restored
    assert number == step and data == {"next": step}
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(state_at(step)), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_newest_checkpoint_comes_back_and_old_ones_go(tmp_path):
    checkpoints = saved(tmp_path, 2, 4, 6, 8, 10, keep=2, keep_every=4)
    assert checkpoints.steps() == [4, 8, 10]
    assert_is(checkpoints.restore(jax.eval_shape(lambda: state_at(0))), 10)
    assert checkpoint.Checkpoints(tmp_path / "none", ABOUT).restore(state_at(0)) is None


def test_checkpoints_whose_parameters_never_gave_a_finite_loss_are_set_aside(tmp_path, caplog):
    checkpoints = saved(tmp_path, 2, 4, 6, 8)
    checkpoints.distrust(6)
    assert checkpoints.steps() == [4] and "6.diverged: no step after it was finite" in caplog.text
    assert (tmp_path / "6.diverged" / "params").is_dir() and (tmp_path / "8.diverged").is_dir()
    assert_is(saved(tmp_path).restore(state_at(0)), 4)
    checkpoints.finish(6, state_at(6), {"next": 6}, patience=0)
    checkpoints.distrust(6)  # once more: the folder that lies aside is replaced
    assert checkpoints.steps() == [4]
    checkpoints.finish(6, state_at(6), {"next": 6}, patience=0)
    assert checkpoints.steps() == [4, 6]


def test_the_only_checkpoints_are_never_set_aside(tmp_path, caplog):
    """The next start would begin the stage again without a word."""
    checkpoints = saved(tmp_path, 4, 6)
    checkpoints.distrust(4)
    assert checkpoints.steps() == [4, 6] and "move that folder away to begin" in caplog.text
    checkpoints.distrust(7)
    saved(tmp_path / "none").distrust(0)


def test_a_checkpoint_of_a_skipped_step_replaces_no_older_one(tmp_path):
    """A run that is stopped there saves what may be ruined parameters."""
    checkpoints = saved(tmp_path, 2, 4, keep=2)
    checkpoints.finish(6, dataclasses.replace(state_at(6), skipped_in_row=jnp.int32(1)), {"next": 6}, patience=0)
    assert checkpoints.steps() == [2, 4, 6]
    checkpoints.finish(8, state_at(8), {"next": 8}, patience=0)
    assert checkpoints.steps() == [6, 8]


def test_a_state_that_moves_on_while_it_is_saved_is_saved_as_it_was(tmp_path):
    """The step donates the buffers that are being written."""
    checkpoints = checkpoint.Checkpoints(tmp_path, ABOUT)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 3, s), donate_argnums=0)
    state = state_at(5)
    checkpoints.save(5, state, {"next": 5})
    for _ in range(3):
        state = step(state)
    jax.block_until_ready(state)
    checkpoints.close()
    assert_is(checkpoints.restore(state_at(0)), 5)


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_damaged_newest_checkpoint_falls_back_one_and_says_so(tmp_path, caplog, damage):
    checkpoints = saved(tmp_path, 1, 2, 3)
    path = max((p for p in (tmp_path / "3").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "changed" else content[:-1])
    with caplog.at_level("WARNING", "fusion_jax"):
        assert_is(checkpoints.restore(state_at(0)), 2)
    says = {"truncated": "bytes instead of", "changed": "has changed", "missing": "is missing"}[damage]
    assert says in caplog.text and path.name in caplog.text and "going back to step 2" in caplog.text
    assert checkpoints.steps() == [1, 2] and (tmp_path / "3.damaged").is_dir()
    checkpoints.finish(3, state_at(3), {"next": 3}, patience=0)  # training comes by again
    assert_is(saved(tmp_path).restore(state_at(0)), 3)


LISTS = {
    "a list": [],
    "nothing": {},
    "null": None,
    "a number": 5,
    "a text": "x",
    "an entry that is a number": {"a": 1},
    "an empty entry": {"params/x": []},
    "a size that is a text": {"params/_METADATA": ["1", 2]},
    "a path out of the folder": {"../../outside": [4, 3632233996]},
    "an absolute path": {"/etc/hostname": [1, 2]},
    "one file alone": {"orbax.checkpoint": [0, 0]},
}


@pytest.mark.parametrize("form", LISTS)
def test_list_of_files_of_another_form_falls_back(tmp_path, caplog, form):
    checkpoints = saved(tmp_path / "stage" / "checkpoints", 1, 2)
    (tmp_path / "stage" / "outside").write_text("test")
    (checkpoints.folder / "2" / "files.0.json").write_text(json.dumps(LISTS[form]))
    assert_is(checkpoints.restore(state_at(0)), 1)
    assert "2 is damaged: " in caplog.text and "going back to step 1" in caplog.text


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("about", lambda about: without(about, "config")),
        ("about", lambda about: []),
        ("about", lambda about: None),
        ("about", lambda about: {**about, "config": []}),
        ("about", lambda about: {**about, "tokenizer": ["tokenizer.model"]}),
        ("about", lambda about: "{"),
        ("about", lambda about: "[" * 100_000),
        ("data", lambda data: {**data, "more": 1}),
        ("data", lambda data: {"other": 1}),
        ("data", lambda data: None),
        ("data", lambda data: "{"),
    ],
)
def test_about_or_input_state_of_another_form_falls_back(tmp_path, caplog, part, change):
    """Also where the list of files knows of nothing wrong."""

    def accept(step, data):
        if data != {"next": step}:
            raise ValueError("another position")

    checkpoints = saved(tmp_path, 1, 2)
    forge(tmp_path / "2", part, change)
    assert integrity.problem(tmp_path / "2") is None
    assert_is(checkpoints.restore(state_at(0), accept), 1)
    assert "going back to step 1" in caplog.text


@pytest.mark.parametrize("kind", ["pipe", "folder", "gone", "endless", "elsewhere", "loop"])
@pytest.mark.parametrize("name", ["params/_METADATA", "files.0.json", "about/_strings.json", "_CHECKPOINT_METADATA"])
def test_what_is_no_file_falls_back(tmp_path, name, kind):
    checkpoints = saved(tmp_path / "checkpoints", 1, 2)
    (tmp_path / "elsewhere").write_text("test")
    path = tmp_path / "checkpoints" / "2" / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.symlink_to({"endless": "/dev/zero", "elsewhere": tmp_path / "elsewhere", "loop": path}[kind])
    gone = name == "files.0.json" and kind == "gone"
    assert_is(checkpoints.restore(state_at(0)), 2 if gone else 1)


def test_names_that_are_no_steps_are_left_alone(tmp_path, caplog):
    checkpoints = saved(tmp_path, 1, 2)
    for name in ("007", "٣", "1٣", "4²", "1e3", "-5", "99999999999999999999", "5.writing2"):
        shutil.copytree(tmp_path / "2", tmp_path / name)
    (tmp_path / "12").write_text("a file")
    (tmp_path / "13").symlink_to("nowhere")
    assert steps_in(tmp_path) == [1, 2]
    assert_is(checkpoints.restore(state_at(0)), 2)
    checkpoints.finish(12, state_at(12), {"next": 12}, patience=0)  # where the file lies
    assert_is(checkpoints.restore(state_at(0)), 12)


def test_empty_newest_folder_falls_back(tmp_path, caplog):
    checkpoints = saved(tmp_path, 1, 2)
    (tmp_path / "9").mkdir()
    (tmp_path / "8").mkdir()
    shutil.copy(tmp_path / "2" / "files.0.json", tmp_path / "8")
    assert_is(checkpoints.restore(state_at(0)), 2)
    assert "9 is damaged: it is empty" in caplog.text and "8 is damaged: " in caplog.text


def test_files_are_listed_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    """A kill at any moment leaves a folder with another name, or one whose bytes can be checked."""
    seen, write = [], integrity.write

    def watched(folder, process):
        seen.append((folder.name, (tmp_path / "1").exists()))
        write(folder, process)

    monkeypatch.setattr(integrity, "write", watched)
    checkpoints = saved(tmp_path, 1)
    assert seen == [("1.writing", False)]
    assert [path.name for path in tmp_path.iterdir()] == ["1"] and not integrity.unlisted(tmp_path / "1")
    shutil.copytree(tmp_path / "1", tmp_path / "2.writing")  # as a kill before the name leaves it
    assert checkpoint.Checkpoints(tmp_path, ABOUT).steps() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert_is(checkpoints.restore(state_at(0)), 1)


def test_list_that_cannot_be_written_costs_the_checkpoint(tmp_path, monkeypatch, caplog):
    checkpoints = saved(tmp_path, 1)

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(integrity, "write", fails)
    checkpoints.save(2, state_at(2), {"next": 2})
    checkpoints.close()
    assert "no checkpoint of step 2: [Errno 28] No space left on device" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_checkpoint_without_a_list_is_used_and_the_log_says_that_its_bytes_cannot_be_checked(tmp_path, caplog):
    """Such as those of other programs, and of a kill during an earlier version's save."""
    checkpoints = saved(tmp_path, 1, 2)
    assert_is(checkpoints.restore(state_at(0)), 2)
    assert "cannot be checked" not in caplog.text
    (tmp_path / "2" / "files.0.json").unlink()
    assert_is(checkpoints.restore(state_at(0)), 2)
    assert "2 has no list of its files: their bytes cannot be checked" in caplog.text


def test_array_of_another_shape_is_damage(tmp_path):
    checkpoints = saved(tmp_path, 1)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((8, *x.shape[1:]) if x.ndim else (), x.dtype), state_at(0))
    with pytest.raises(UserError, match="is intact"):
        checkpoints.restore(like)


@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_arrays_of_other_names_are_named_in_one_sentence(tmp_path, part, caplog):
    """As another version of the program, or another optimizer, asks for them."""
    checkpoints = saved(tmp_path, 1)
    like = jax.eval_shape(lambda: dataclasses.replace(state_at(0), **{part: {"another": {"one": jnp.ones(3)}}}))
    with pytest.raises(
        UserError, match=r"is intact .*it holds other arrays than this run asks for: its .* lacks"
    ) as error:
        checkpoints.restore(like)
    assert "another/one" in str(error.value) and ("kernel" if part == "params" else "mu") in str(error.value)
    [message] = [record.getMessage() for record in caplog.records if record.name == "fusion_jax"]
    assert "\n" not in message and len(message) < 500


def _tower(layers, scale=1.0):
    """A state with a tower of so many layers, its moments factored by nothing, and a frozen part."""
    numbers = scale * jnp.arange(5 * 4 * 3, dtype=jnp.float32).reshape(5, 4, 3)[:layers]
    params = {"vision": {"layers": {"layer": {"kernel": numbers}}, "bias": jnp.ones(5)}, "llm": {"a": numbers[:2]}}
    tx = optax.masked(optax.scale_by_adam(mu_dtype="bfloat16"), {"vision": True, "llm": False})
    opt_state = tx.update(params, tx.init(params))[1]
    counters = [jnp.int32(0) for _ in range(3)]
    return TrainState(counters[0], params, opt_state, *counters[1:])


@pytest.mark.parametrize("layers", [3, 4])
def test_layers_that_no_tap_reads_are_cut_from_older_checkpoints(tmp_path, layers):
    checkpoints = checkpoint.Checkpoints(tmp_path, ABOUT)
    checkpoints.save(3, _tower(5), {})
    checkpoints.close()
    _, restored, _ = checkpoints.restore(jax.eval_shape(lambda: _tower(layers)))
    wanted = _tower(layers)
    assert jax.tree.structure(restored) == jax.tree.structure(wanted)
    for got, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def test_the_one_count_of_older_checkpoints_becomes_that_of_every_parameter(tmp_path):
    params = {"a": {"kernel": jnp.ones(3)}, "b": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}
    stage = StageConfig("s", "", freeze=("b/kernel",))
    trained = jax.tree.map(lambda label: label != optim.FROZEN, optim.labels(stage, params))
    adam = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1, mask=optimizers.decays))
    old = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(adam, trained))
    opt_state = old.init(params)
    for _ in range(3):
        opt_state = old.update(params, opt_state, params)[1]
    checkpoints = checkpoint.Checkpoints(tmp_path, ABOUT)
    counters = [jnp.int32(3), jnp.int32(0), jnp.int32(0)]
    checkpoints.save(3, TrainState(counters[0], params, opt_state, *counters[1:]), {})
    checkpoints.close()
    _, restored, _ = checkpoints.restore(jax.eval_shape(lambda: create(params, optim.optimizer(stage, params))))
    before, now = (state[1].inner_state[0] for state in (opt_state, restored.opt_state))
    assert now.count.tolist() == [3, 3]
    for name in ("mu", "nu"):
        for got, wanted in zip(
            jax.tree.leaves(getattr(now, name)), jax.tree.leaves(getattr(before, name)), strict=True
        ):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(("stored", "wanted"), [(5, 2), (3, 5), (4, 5)])
def test_other_numbers_of_layers_are_damage(tmp_path, stored, wanted):
    checkpoints = checkpoint.Checkpoints(tmp_path, ABOUT)
    checkpoints.save(3, _tower(stored), {})
    checkpoints.close()
    with pytest.raises(UserError, match=r"step 3: .*(shape|layers)"):
        checkpoints.restore(jax.eval_shape(lambda: _tower(wanted)))


def test_damage_to_any_file_is_found(tmp_path):
    saved(tmp_path, 1)
    listed = json.loads((tmp_path / "1" / "files.0.json").read_text())
    files = [p for p in (tmp_path / "1").rglob("*") if p.is_file() and p.name != "files.0.json"]
    assert sorted(listed) == sorted(p.relative_to(tmp_path / "1").as_posix() for p in files)
    for path in files:
        before = path.read_bytes()
        path.write_bytes(before + b"x")
        assert path.name in integrity.problem(tmp_path / "1", thorough=False)
        path.write_bytes(before)
    assert integrity.problem(tmp_path / "1") is None
    (tmp_path / "1" / "files.0.json").write_text("{")
    assert "files.0.json cannot be read" in integrity.problem(tmp_path / "1")


def test_without_its_list_a_damaged_checkpoint_fails_to_load_and_falls_back(tmp_path, caplog):
    """Killed between the end of a save and its list, then damaged."""
    checkpoints = saved(tmp_path, 1, 2)
    (tmp_path / "2" / "files.0.json").unlink()
    for path in (tmp_path / "2" / "train").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_is(checkpoints.restore(state_at(0)), 1)
    assert "going back to step 1" in caplog.text


def test_no_whole_checkpoint_left_is_said_and_nothing_is_moved(tmp_path):
    checkpoints = saved(tmp_path, 1)
    shutil.rmtree(tmp_path / "1" / "params")
    with pytest.raises(UserError, match=r"No checkpoint in .* is intact \(step 1: .* is missing\)"):
        checkpoints.restore(state_at(0))
    assert checkpoints.steps() == [1]


def test_full_disk_costs_one_checkpoint_and_the_next_save_tries_again(tmp_path, caplog):
    checkpoints = saved(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))  # every larger file fails while it is written
    try:
        checkpoints.save(2, state_at(2), {"next": 2})
        checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "no checkpoint of step 2" in caplog.text and "training goes on" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["1"], "what was half written takes room"
    checkpoints.save(3, state_at(3), {"next": 3})
    checkpoints.close()
    assert checkpoints.steps() == [1, 3]


def test_folder_that_fails_for_a_while_is_outlived_and_one_that_stays_away_is_said(tmp_path, caplog):
    folder, away = tmp_path / "checkpoints", tmp_path / "away"
    checkpoints = saved(folder, 1)
    folder.rename(away)
    folder.write_text("not a folder")
    checkpoints.save(2, state_at(2), {"next": 2})
    with pytest.raises(UserError, match=r"checkpoint of step 3 could not be written .*make room or repair"):
        checkpoints.finish(3, state_at(3), {"next": 3}, patience=1.5)
    assert caplog.text.count("no checkpoint of step 3") == 2
    folder.unlink()
    away.rename(folder)
    checkpoints.finish(3, state_at(3), {"next": 3}, patience=1.5)
    assert checkpoints.steps() == [1, 3]


def test_leftovers_of_a_killed_save_are_removed_and_never_read(tmp_path):
    saved(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    (tmp_path / "1.deleting").mkdir()
    checkpoints = checkpoint.Checkpoints(tmp_path, ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert_is(checkpoints.restore(state_at(0)), 1)


MODEL = FusionConfig(
    vision=VisionConfig(image_size=24, patch_size=8, width=16, mlp_dim=32, layers=2, heads=2),
    llm=LLMConfig(vocab_size=640, width=32, mlp_dim=48, layers=2, heads=4, kv_heads=2),
    exchange=ExchangeConfig(start=0, stride=2, layers=1, heads=2),
    latent_counts=(1, 4),
    **PAPER,
)
STAGE = StageConfig(name="first", data="d.json", max_length=144, batch_size=4)
RUN = RunConfig(model=MODEL, stages=(STAGE,), tokenizer="t")


def checked(config):
    about = json.loads(describe_run(RUN, None)["json"])
    resume.check(config, config.stages[0], about, "WORKDIR/first")


def test_what_may_change_between_two_starts():
    stage = dataclasses.replace(
        STAGE, learning_rate=1e-5, steps=9, accumulation=2, weight_decay=0.1, data="/elsewhere.json"
    )
    checked(RUN)
    checked(
        dataclasses.replace(
            RUN, stages=(stage,), dtype="float32", remat="none", model=replace(MODEL, mapping_loss_weight=0.5)
        )
    )


def test_checkpoint_of_another_config_names_every_value():
    stage = dataclasses.replace(STAGE, batch_size=8, freeze=("^llm/",), optimizer="muon")
    model = replace(MODEL, llm=dataclasses.replace(MODEL.llm, layers=4), mask="released")
    with pytest.raises(UserError) as error:
        checked(dataclasses.replace(RUN, model=model, seed=7, stages=(stage,)))
    for part in (
        "WORKDIR/first is of another config",
        "model.llm.layers=4 (checkpoint: 2)",
        "model.mask='released' (checkpoint: 'paper')",
        "seed=7 (checkpoint: 42)",
        "first.batch_size=8 (checkpoint: 4)",
        "first.freeze=('^llm/',) (checkpoint: ())",
        "first.optimizer='muon' (checkpoint: 'adamw')",
    ):
        assert part in str(error.value)
    assert "max_length" not in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def chatml(tmp_path):
    """A folder like Qwen2's: no BOS, documents apart by the padding token."""
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "<|endoftext|>": 1, "<|im_end|>": 2}, "<unk>")
    )
    model.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    (tmp_path / "qwen").mkdir()
    model.save(str(tmp_path / "qwen" / "tokenizer.json"))
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (tmp_path / "qwen" / "tokenizer_config.json").write_text(json.dumps(roles))
    return tmp_path / "qwen"


def test_a_checkpoint_of_the_first_format_keeps_the_first_token_it_was_trained_with(chatml, tmp_path, caplog):
    config = dataclasses.replace(RUN, template="chatml", tokenizer=str(chatml))
    about = json.loads(describe_run(config, load_tokenizer(chatml))["json"])
    template = find_template("chatml")
    save_tokenizer(about, tmp_path / "new")
    assert load_tokenizer(tmp_path / "new") == load_tokenizer(chatml)
    assert first_ids(load_tokenizer(tmp_path / "new"), template) == []

    old = {key: value for key, value in about.items() if key not in ("format", "conversation")}
    save_tokenizer(old, tmp_path / "old")
    assert first_ids(load_tokenizer(tmp_path / "old"), template) == [1]
    assert "trained with <|endoftext|> in front of every conversation" in caplog.text
    # Going on with a folder that asks for none is refused, and goes once the folder asks for it.
    with pytest.raises(UserError, match=r'was trained with a BOS token .* say "add_bos_token": true'):
        resume.check(config, STAGE, old, "WORKDIR/first")
    resume.check(dataclasses.replace(config, tokenizer=str(tmp_path / "old")), STAGE, old, "WORKDIR/first")
    resume.check(config, STAGE, about, "WORKDIR/first")
    # A folder that asks for it as the sentence says is no other tokenizer.
    for saved, folder in ((old, tmp_path / "old"), (about, chatml)):
        resume.check_inputs(
            dataclasses.replace(config, tokenizer=str(folder)), STAGE, None, load_tokenizer(folder), saved, tmp_path
        )
    # An import was trained elsewhere, without it; the published templates have theirs anyway.
    imported = dataclasses.replace(config, stages=(dataclasses.replace(STAGE, data=""),))
    for other in (imported, dataclasses.replace(config, template="phi3")):
        same = old | {"config": json.loads(json.dumps(to_dict(other)))}
        save_tokenizer(same, tmp_path / "same")
        assert load_tokenizer(tmp_path / "same") == load_tokenizer(chatml)


def test_a_tokenizer_that_lacks_the_first_token_it_was_trained_with_is_one_sentence(chatml, tmp_path):
    about = json.loads(describe_run(dataclasses.replace(RUN, template="chatml"), load_tokenizer(chatml))["json"])
    del about["format"]
    about["tokenizer"]["tokenizer_config.json"] = base64.b64encode(b'{"eos_token": "<|im_end|>"}').decode()
    with pytest.raises(UserError, match="its tokenizer names neither"):
        save_tokenizer(about, tmp_path / "new")


def test_environment_is_in_the_checkpoint():
    about = json.loads(describe_run(RUN, None)["json"])["environment"]
    assert about["packages"]["jax"] == jax.__version__
    assert about["devices"]["count"] == jax.device_count() and about["devices"]["processes"] == 1
    assert about["commit"] is None or len(about["commit"].removesuffix("-dirty")) == 40


def test_restores_into_the_shardings_asked_for(tmp_path):
    """On one device here; the survival tests go from eight devices to fewer."""
    checkpoints = saved(tmp_path, 4)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding if x.ndim else NamedSharding(mesh, PartitionSpec())
        ),
        state_at(0),
    )
    restored = checkpoints.restore(like)
    assert_is(restored, 4)
    assert restored[1].params["a"]["kernel"].sharding == sharding
