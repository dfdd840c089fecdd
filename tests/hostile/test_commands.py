"""Help and mistakes of every command: what is said, and the exit code."""

import re

import commands
import pytest


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    commands.write_files(folder)
    server = commands.Server(folder)
    yield server
    server.close()


@pytest.mark.parametrize("module", [*commands.COMMANDS, "fusion_jax.doctor"])
def test_help_is_printed_and_ends_with_0(server, module):
    for flag in ("--help", "-h", "--helpfull"):
        code, out, err = server.run(module, [flag])
        assert (code, err) == (0, ""), (flag, err)
        assert len(out.splitlines()) > 5
    code, out, err = server.run(module, ["--no_such_flag"])
    assert code == 2 and err.startswith("error: ") and "no_such_flag" in err and err.count("\n") == 1


MISTAKES = [
    (["--config=nowhere.py"], "Cannot load the config file: nowhere.py: No such file"),
    (["--config=folder"], "folder: Is a directory"),
    (["--config=pipe"], "pipe: it is a pipe"),
    (["--config=/dev/zero"], "it is a pipe, a device"),
    (["--config=syntax.py"], r"syntax.py, line 1: "),
    (["--config=raises.py"], "raises.py, line 2: KeyError: 'x'"),
    (["--config=value.py"], "value.py, line 2: ValueError: two lines"),
    (["--config=divides.py"], "divides.py, line 1: ZeroDivisionError"),
    (["--config=reads.py"], "reads.py, line 2: .*nowhere.txt"),
    (["--config=recursion.py"], "recursion.py, line 2: RecursionError"),
    (["--config=imports.py"], "imports.py, line 1: ModuleNotFoundError.*a_package"),
    (["--config=empty.py"], "get_config"),
    (["--config=none.py"], "must return a ConfigDict, not NoneType"),
    (["--config=number.py"], "must return a ConfigDict, not int"),
    (["--config=dict.py"], "must return a ConfigDict, not dict"),
    (["--config=exits.py"], "ended the program"),
    (["--config=user.py"], r"error: Not like this\.$"),
    (["--config=argument.py"], "TypeError: .*missing 1 required"),
    (["--config=good.py", "--config.stages[7].x=1"], r"--config.stages\[7\].x cannot be set: .* has no 7"),
    (["--config=good.py", "--config.model=5"], "model"),
    (["--config=good.py", "--config.seed=x"], "seed"),
    (["--config=good.py", "--config.nothing=1"], "nothing"),
    (["--config.seed=1", "--config=good.py"], "config"),
    (["--config"], "config"),
    (["--flagfile=pipe"], "Cannot read the --flagfile pipe"),
    (["--flagfile=gone"], "Cannot read the --flagfile gone"),
    (["\udcff"], "error: "),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes_of_configs_and_flags(server, arguments, message):
    code, out, err = server.run("fusion_jax.train", ["--workdir=work", *arguments])
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert re.search(message, err), err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("fusion_jax.train", ["--config=good.py", "--workdir=work", "--profile_steps=x"]),
        ("fusion_jax.evaluate", ["--checkpoint=gone", "--data_dir=.", "--limit=x"]),
        ("fusion_jax.evaluate", ["--checkpoint=a.png", "--data_dir=."]),
        ("fusion_jax.evaluate", ["--checkpoint=gone", "--data_dir=.", "--scores_file=nowhere/a.json"]),
        ("fusion_jax.train", ["--config=good.py", "--workdir=work", "--config.seed=-1"]),
        ("fusion_jax.train", ["--config=good.py", "--workdir=work", "--config.seed=99999999999999999999"]),
        ("fusion_jax.evaluate", ["--checkpoint=" + "x" * 300, "--data_dir=."]),
        ("fusion_jax.chat", ["--checkpoint=pipe"]),
        ("fusion_jax.serve", ["--checkpoint=folder", "--port=x"]),
        ("fusion_jax.plan", ["--config=good.py", "--topology=v5p:1x"]),
        ("fusion_jax.benchmark", []),
        (
            "fusion_jax.visualize",
            ["--checkpoint=folder", "--image=pipe", "--question=What?", "--word=What"],
        ),
        ("fusion_jax.convert", ["import", "--from=" + "x" * 300, "--out=to"]),
        ("fusion_jax.convert", ["import", "--from=pipe", "--out=to"]),
        ("fusion_jax.shards", ["--json_path=" + "x" * 300 + ".json", "--out=out"]),
        ("fusion_jax.shards", ["--json_path=a.json", "--out=" + "x" * 300]),
        ("fusion_jax.shards", ["--json_path=a.json", "--out=/dev/null/x"]),
        ("fusion_jax.shards", ["--out=folder", "--check"]),
        ("fusion_jax.inspect", ["--config=good.py", "--out=nowhere/page.html"]),
        ("fusion_jax.inspect", ["--config=good.py", "--devices=0"]),
        ("fusion_jax.synthesize", ["--config=other.py", "--out=out"]),
    ],
)
def test_mistakes_of_each_command(server, module, arguments):
    assert commands.attempt(server, module, arguments) == "refused"


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("convert", ["import", "--out=x", "--dtype=bf16"], "--dtype='bf16' is unknown; .* did you mean bfloat16[?]"),
        ("convert", ["export", "--format=onnx"], "--format='onnx' is unknown; allowed: published, transformers[.]"),
        ("convert", ["import", "--to=x", "--vision=a", "--llm=b"], "b has no config.json"),  # the old name of --out
        ("evaluate", ["--process_index=2", "--process_count=2", "--output_dir=x"], "--process_id=2 must be"),
        ("evaluate", ["--output=nowhere/a.json"], "--scores_file=nowhere/a.json: give the name of a file"),
    ],
)
def test_values_and_old_names_of_flags(server, module, arguments, message):
    data = ["--checkpoint=gone", "--data_dir=."] if module == "evaluate" else []
    code, out, err = server.run(f"fusion_jax.{module}", [*data, *arguments])
    assert code == 2 and re.match(f"error: {message}", err) and "Traceback" not in out + err, err
