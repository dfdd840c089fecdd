"""Options of the compiler: which programs get them."""

import pytest

from fusion_jax.devices import compiler
from fusion_jax.models import partition


def test_tpus_alone_have_options():
    assert compiler.options("tpu") and compiler.options("cpu") is compiler.options("gpu") is None


def test_functions_take_the_options_of_the_platform_that_they_run_on(monkeypatch):
    scaled = compiler.ForPlatform(lambda x, by: x * by, static_argnames=("by",))
    assert scaled(2.0, by=3) == 6
    monkeypatch.setattr(compiler, "options", lambda platform: {f"no_option_of_{platform}": True})
    for platform in ("tpu", "gpu"):
        with partition.compiled_for(platform):
            programs = scaled.trace(2.0, by=3).lower(), scaled.lower(2.0, by=3)
        for program in programs:
            with pytest.raises(Exception, match=f"no_option_of_{platform}"):
                program.compile()
    assert scaled(2.0, by=4) == 8  # the CPU's program of before is kept
