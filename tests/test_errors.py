"""Sentences about names that mean nothing, and that no number flag is taken as it comes."""

import ast
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from fusion_jax.benchmarking import common
from fusion_jax.errors import UserError, check_choice, first_line, nearest, no_key

ROOT = Path(__file__).parents[1]
# Numbers that a function of the command looks at, which says the flag's name.
LOOKED_AT = {
    "benchmark.py": {"workers", "latents"},
    "chat.py": {"max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "latents"},
    "train.py": {"num_processes", "process_id"},
    "plan.py": {"latents"},
    "inspect.py": {"limit", "images", "rows", "devices"},
    "shards.py": {"shards", "records_per_shard", "workers"},
    "evaluate.py": {"limit", "batch_size"},
    "serve.py": {"max_upload_bytes"},
    "study.py": {"seeds"},
}


def test_nearest_names():
    known = ("learning_rate", "learning_rate_by_path", "weight_decay", "b1", "b2")
    assert nearest("weight_decy", known) == "did you mean weight_decay?"
    assert nearest("rate", known) == "did you mean learning_rate or learning_rate_by_path?"  # a word of it
    assert nearest("colour", known) == nearest("", known) == nearest("x" * 10**6, known) == ""
    assert (
        str(no_key("config.x", "lerning_rate", known[:1]))
        == "config.x.lerning_rate is not a key; did you mean learning_rate?"
    )
    assert str(no_key("config.x", "zzz", known[3:])) == "config.x.zzz is not a key; known keys: b1, b2."


def test_first_line_of_an_error():
    assert first_line(ValueError("\n a\x1b[0m \nb")) == "a\\x1b[0m "
    assert first_line(ValueError()) == "ValueError" and len(first_line(ValueError("x" * 5000))) < 320
    hidden = KeyError("params")
    hidden.__cause__ = OSError("the disk is full")
    assert first_line(hidden) == "the disk is full"


def test_choices():
    check_choice("task ", "pope", ("pope", "mme"))
    for value, said in (
        ("popp", "task 'popp' is unknown; allowed: pope, mme; did you mean pope?"),
        ("z\n", "task 'z\\n' is unknown; allowed: pope, mme."),
        (3, "task 3 is unknown; allowed: pope, mme."),
        (None, "task 'None' is unknown; allowed: pope, mme."),
    ):
        with pytest.raises(UserError) as error:
            check_choice("task ", value, ("pope", "mme"))
        assert str(error.value) == said


def test_every_number_of_the_command_line_has_bounds():
    for path in sorted((ROOT / "fusion_jax").rglob("*.py")):
        name = str(path.relative_to(ROOT / "fusion_jax"))
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("DEFINE_integer", "DEFINE_float"):
                flag = call.args[0].value
                bounded = any(word.arg == "lower_bound" for word in call.keywords)
                assert bounded != (flag in LOOKED_AT.get(name, ())), f"{name}: --{flag}"


def test_benchmark_settings_are_counts():
    common.check_counts(ConfigDict({"repeats": 1, "batch_size": 2}))
    for wrong in ({"repeats": 0}, {"batch_size": -2}, {"decode_rows": 10**9}):
        with pytest.raises(UserError, match=rf"config\.{next(iter(wrong))}=.* must be"):
            common.check_counts(ConfigDict(wrong))
