"""Command lines with mistakes in them, of every command: one line that begins with `error:` and exit code 2.

Commands run as processes of their own, forked from one that has loaded JAX once, so that each takes a fraction of a
second. Everything that a mistake could get past ends at a tokenizer or checkpoint that does not exist.
"""

import functools
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUICK = 25
ROOT = Path(__file__).parents[2]
SECONDS = 60.0  # for one command; most take a tenth of a second
COMMANDS = {
    "fusion_jax.train": ["--config=good.py", "--workdir=work"],
    "fusion_jax.evaluate": ["--checkpoint=gone", "--data_dir=."],
    "fusion_jax.chat": ["--checkpoint=gone"],
    "fusion_jax.serve": ["--checkpoint=gone"],
    "fusion_jax.plan": ["--config=good.py", "--topology=v5p:1"],
    "fusion_jax.benchmark": ["checkpoint", "--config=good.py"],
    "fusion_jax.visualize": [
        "--checkpoint=gone",
        "--image=a.png",
        "--question=What?",
        "--word=What",
    ],
    "fusion_jax.synthesize": ["--config=good.py", "--out=out"],
    "fusion_jax.convert": ["export", "--checkpoint=gone", "--out=to", "--format=transformers"],
    "fusion_jax.shards": ["--json_path=gone.json", "--out=out"],
    "fusion_jax.inspect": ["--config=good.py"],
    "fusion_jax.study": ["--config=good.py", "--out=study"],
}
_DICT = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict"
CONFIGS = {
    "good.py": None,  # tests/helpers/tiny_run.py, whose tokenizer does not exist
    "syntax.py": "def get_config(:\n  pass",
    "indent.py": "def get_config():\nreturn 1",
    "empty.py": "",
    "raises.py": "def get_config():\n    return {}['x']",
    "value.py": "def get_config():\n    raise ValueError('two\\nlines')",
    "type.py": "def get_config():\n    raise TypeError",
    "divides.py": "x = 1 / 0",
    "none.py": "def get_config():\n    pass",
    "number.py": "def get_config():\n    return 5",
    "dict.py": "def get_config():\n    return {'stages': []}",
    "exits.py": "def get_config():\n    import sys\n    sys.exit(0)",
    "reads.py": "def get_config():\n    return open('nowhere.txt').read()",
    "recursion.py": "def get_config():\n    return get_config()",
    "imports.py": "import a_package_that_is_not_there",
    "asserts.py": "def get_config():\n    assert False",
    "other.py": f"{_DICT}({{'a': 1, 'b': {{'c': [1]}}}})",
    "strange.py": f"{_DICT}({{'stages': 5, 'model': 'x'}})",
    "argument.py": "def get_config(x):\n    return x",
    "user.py": "from fusion_jax.errors import UserError\ndef get_config():\n    raise UserError('Not like this.')",
    "nul.py": "def get_config():\n    return '\0'",
    "binary.py": b"\xff\xfe\x00\x01" * 50,
}


def _words(text: str) -> list[str]:
    return text.split()


PATHS = _words(
    """. / gone a.png folder pipe /dev/zero /dev/null /dev/null/x /proc/1/x gs://bucket/x
    file:///etc ~ - good.py:x a:b"""
)
PATHS += ["", "x" * 300, "a/" * 3000, "\udcff\udcfe", "\n", "a\x1b[2Jb", "é" * 200]
NUMBERS = _words("x -1 0 1e9 1.5 99999999999999999999999 nan inf -inf 0x10 ½ 1_000 True 1e400 [1] None")
NUMBERS += ["", " 1", "9" * 5000]
OVERRIDES = _words(
    """stages[7].x stages[0].steps stages[-9].name stages[0] stages model model.llm seed dtype model.llm.layers
    model.llm.layers.x . .. stages[x] stages[ nothing mesh mesh.data learning_rate tokenizer stages[0].batch_size
    stages[0].learning_rate model.latent_counts é model.latent_counts[5] stages[99999999999999999999] __class__ _fields
    model.vision lock"""
)
OVERRIDES += ["", "x y"]
FLAGS = _words(
    """steps workdir checkpoint out port max_tokens workers shards limit tasks image latents data_dir json_path
    image_folder topology mesh batch_size records_per_shard host format max_bad_records check nocheck stage samples from
    vision llm lengths temperature dtype flagfile profile_steps process_id num_processes stages retry_failed word
    layers config"""
)
ODD = _words("-- --- - --= -x --no --nothing = --config.")


def write_files(folder: Path) -> None:
    for name, text in CONFIGS.items():
        text = (ROOT / "tests" / "helpers" / "tiny_run.py").read_text() if text is None else text
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "a.png").write_bytes(b"no picture")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")


def draw(random) -> tuple[str, list[str]]:
    """A command and arguments with one to three mistakes."""

    def one(values):
        return values[random.integers(len(values))]

    module = one(list(COMMANDS))
    arguments = list(COMMANDS[module])
    for _ in range(random.integers(1, 4)):
        kind = random.integers(9)
        if kind == 0:
            mistake = f"--config={one([*CONFIGS, *PATHS])}"
            kept = [word for word in arguments if not word.startswith("--config=")]
            arguments = [*kept, mistake]
        elif kind in (1, 2):
            arguments.append(f"--config.{one(OVERRIDES)}={one([*NUMBERS, *PATHS])}")
        elif kind == 3:
            arguments.append(f"--{one(FLAGS)}={one(NUMBERS)}")
        elif kind == 4:
            arguments.append(f"--{one(FLAGS)}={one(PATHS)}")
        elif kind == 5:
            arguments += [f"--{one(FLAGS)}", one([*PATHS, *NUMBERS])]
        elif kind == 6:
            arguments.append(one([*ODD, *PATHS]))
        elif kind == 7:
            arguments = [word for word in arguments if random.random() < 0.5]
        else:
            k = random.integers(len(arguments) + 1)
            arguments.insert(k, f"--{one(FLAGS)}")
    return module, arguments


def attempts(random, folder):
    write_files(folder)
    server = Server(folder)
    try:
        while True:
            module, arguments = draw(random)
            yield f"{module} {arguments}"[:400], functools.partial(attempt, server, module, arguments)
    finally:
        server.close()


def attempt(server: "Server", module: str, arguments: list[str]) -> str:
    return check(*server.run(module, arguments))


def check(code: int, out: str, err: str) -> str:
    said = f"exit code {code}; {err[-300:]!r} {out[-100:]!r}"
    assert "Traceback" not in out + err, said
    assert "Exception ignored" not in err, said
    assert code in (0, 2), said
    if code == 0:
        assert "flags:" in out or "usage" in out.lower(), said
        return "accepted"
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert len(lines[0]) < 4000, said
    return "refused"


class Server:
    """Runs commands, each in a process forked from one that has loaded the libraries."""

    def __init__(self, folder: Path):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HOME": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, __file__], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, module: str, arguments: list[str]) -> tuple[int, str, str]:
        """Exit code, standard output and standard error. RuntimeError where the command does not end in time."""
        self._process.stdin.write(json.dumps([module, arguments]).encode() + b"\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], SECONDS + 60)[0]:
            raise RuntimeError("the process that starts commands does not answer")
        answer = json.loads(self._process.stdout.readline())
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return tuple(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def serve() -> None:
    import jax  # noqa: F401  # everything below is loaded here, once
    import matplotlib.pyplot  # noqa: F401

    from fusion_jax.data import loader  # noqa: F401
    from fusion_jax.evals import registry, runner  # noqa: F401
    from fusion_jax.inference import generate  # noqa: F401
    from fusion_jax.inspection import inspect  # noqa: F401
    from fusion_jax.interop import exporting, importing  # noqa: F401
    from fusion_jax.planning import report, search  # noqa: F401
    from fusion_jax.server import api, protocol  # noqa: F401
    from fusion_jax.synth import engine  # noqa: F401
    from fusion_jax.training import (  # noqa: F401
        checkpoint,
        resume,
        step,
    )

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        module, arguments = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                _become(module, arguments, out, err)
            answer = _result(child, out, err)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _become(module: str, arguments: list[str], out, err) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.argv = ["-m", *arguments]
    code = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _result(child: int, out, err) -> list | str:
    deadline = time.monotonic() + SECONDS
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            err.seek(0)
            return f"the command did not end within {SECONDS:.0f} s; {err.read()[-300:]!r}"
        time.sleep(0.005)
    texts = []
    for file in (out, err):
        file.seek(0)
        texts.append(file.read().decode("utf-8", "replace"))
    return [os.waitstatus_to_exitcode(ended[1]), *texts]


if __name__ == "__main__":
    serve()
