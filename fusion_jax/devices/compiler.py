"""Gives programs the compiler's options of the platform that they are compiled for."""

import functools

import jax

from fusion_jax.models import partition

# The default for TPUs is to split a product with a sharded weight into one product per shard, each a hop of the ring
# away: over 128 chips they are 32 wide, which leaves the matrix unit idle, and take many minutes to compile.
TPU_OPTIONS = {
    "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false",
}


def options(platform: str) -> dict[str, str] | None:
    """Returns the compiler's options for any program on that kind of device: cpu, gpu or tpu."""
    return TPU_OPTIONS if platform == "tpu" else None


class ForPlatform:
    """A jitted function with the compiler's options of whatever platform it is called or traced for.

    `jax.jit` takes options once, where a module is imported, when the platform is not known yet.
    """

    def __init__(self, function, **how):
        functools.update_wrapper(self, function)
        self._on = functools.cache(lambda platform: jax.jit(function, compiler_options=options(platform), **how))

    def __call__(self, *arguments, **named):
        return self._on(partition.platform())(*arguments, **named)

    def trace(self, *arguments, **named):
        return self._on(partition.platform()).trace(*arguments, **named)

    def lower(self, *arguments, **named):
        return self._on(partition.platform()).lower(*arguments, **named)
