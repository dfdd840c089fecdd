"""Compiled programs in the workdir: truncated ones are compiled again, the others stay."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import pytest

from fusion_jax.training.compilation_cache import keep_programs

ROOT = Path(__file__).parents[2]
RUN = """
import logging, sys
from pathlib import Path
import jax
from fusion_jax.training.compilation_cache import keep_programs
logging.basicConfig()
keep_programs(Path(sys.argv[1]), True)
print(jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8)))[0, 0])
"""


def run(folder):
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, folder], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout == "9.0\n", done.stderr
    return done.stderr


def test_programs_that_are_cut_short_are_compiled_again_and_kept(tmp_path):
    run(tmp_path)
    programs = sorted(tmp_path.glob("*-cache"))
    sizes = [path.stat().st_size for path in programs]
    assert len(programs) > 1
    for path, size in zip(programs, sizes):
        os.truncate(path, size // 2)
    os.truncate(programs[0], 0)
    assert run(tmp_path).count("is truncated") == len(programs)
    assert sorted(tmp_path.glob("*-cache")) == programs
    assert all(path.stat().st_size > size // 2 for path, size in zip(programs, sizes))
    assert run(tmp_path) == ""


@pytest.fixture
def no_cache():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_what_is_whole_or_of_another_form_stays(tmp_path, no_cache):
    whole = zlib.compress(os.urandom(200_000))
    contents = {"a-cache": whole, "b-cache": whole[:-1], "c-cache": b"", "d-cache": b"another form", "e": whole[:9]}
    contents |= {"f-cache": whole[:99_000] + b"\0\0" + whole[99_002:], "g-cache": b"\x78\xff"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder-cache").mkdir()
    keep_programs(tmp_path, first=False)
    assert len(list(tmp_path.iterdir())) == len(contents) + 1
    keep_programs(tmp_path, first=True)  # of a cache that somebody has chosen: it is set by now
    assert len(list(tmp_path.iterdir())) == len(contents) + 1
    jax.config.update("jax_compilation_cache_dir", None)
    keep_programs(tmp_path, first=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-cache", "d-cache", "e", "folder-cache"]
