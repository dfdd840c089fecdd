"""Backends by their names in a config. Each is imported only when a run wants it."""

import importlib
from types import ModuleType

from fusion_jax.synth.backends.base import ImageGenerator, LanguageModel, Scorer, VisionModel
from fusion_jax.synth.config import ImageConfig, ModelConfig, ScorerConfig


def embedded() -> ModuleType:
    """The backend without network and weights: a module with the classes LanguageModel, VisionModel and ImageGenerator,
    made without arguments, `captions(count, seed)` which yields captions, and the texts SOURCE and LICENCE."""
    return importlib.import_module("fusion_jax.synth.backends.embedded")


def language_model(config: ModelConfig, what: str = "llm", share: float = 1.0) -> LanguageModel:
    """Args: `what` is the config's key; `share` the part of the configured traffic that this process may make."""
    if config.backend == "embedded":
        return embedded().LanguageModel()
    if config.backend == "vllm":
        from fusion_jax.synth.backends.vllm import VllmModel

        return VllmModel(config)
    from fusion_jax.synth.backends.endpoint import ChatEndpoint

    return ChatEndpoint(config, what, share)


def vision_model(config: ModelConfig, share: float = 1.0) -> VisionModel:
    if config.backend == "embedded":
        return embedded().VisionModel()
    return language_model(config, "vision", share)


def image_generator(config: ImageConfig, share: float = 1.0) -> ImageGenerator:
    if config.backend == "embedded":
        return embedded().ImageGenerator()
    if config.backend == "diffusers":
        from fusion_jax.synth.backends.diffusion import Diffusion

        return Diffusion(config)
    from fusion_jax.synth.backends.endpoint import ImageEndpoint

    return ImageEndpoint(config, "images", share)


def scorer(config: ScorerConfig) -> Scorer | None:
    """None where no model is configured."""
    if not config.path:
        return None
    from fusion_jax.synth.backends.clip import ClipScorer

    return ClipScorer(config)
