"""Both worlds offer the same functions with the same arguments, and every request is some world's."""

import inspect

from fusion_jax.synth import worlds
from fusion_jax.synth.backends import embedded

FUNCTIONS = ("captions", "owns", "drawable", "describe", "ask", "statements", "verify", "draw")


def test_worlds_have_one_interface():
    shapes, scenes = embedded.WORLDS
    for name in FUNCTIONS:
        one, other = (inspect.signature(getattr(world, name)) for world in (shapes, scenes))
        assert list(one.parameters) == list(other.parameters), name
        assert f"    {name}(" in worlds.__doc__


def test_every_style_belongs_to_one_world_that_owns_its_captions():
    assert not set(embedded.WORLDS[0].STYLES) & set(embedded.WORLDS[1].STYLES)
    for style in embedded.STYLES:
        (caption,) = embedded.captions(1, 0, style)
        owner = next(world for world in embedded.WORLDS if world.owns({"caption": caption}))
        assert style in owner.STYLES and owner.drawable(caption)
