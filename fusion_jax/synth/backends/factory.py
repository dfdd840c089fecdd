"""Makes backends by their names in a config; each is imported only when a run uses it."""

import importlib
from types import ModuleType
from typing import Any

from fusion_jax.synth.backends.base import ImageGenerator, LanguageModel, Scorer, VisionModel
from fusion_jax.synth.backends.config import ImageConfig, ModelConfig, ScorerConfig


def embedded() -> ModuleType:
    """The backend without network and weights: a module with the classes LanguageModel, VisionModel and ImageGenerator,
    made without arguments, `captions(count, seed, style)` which yields captions, STYLES, the number VERSION that
    changes with what it makes, and the texts SOURCE and LICENCE."""
    return importlib.import_module("fusion_jax.synth.backends.embedded")


class Factory:
    """Makes the models of one process; those at one address share its rate."""

    def __init__(self, share: float = 1.0):
        """Args: share: the part of the configured traffic that this process may make."""
        self._share = share
        self._rates: dict[str, Any] = {}

    def language_model(self, config: ModelConfig, what: str = "llm") -> LanguageModel:
        """The model that writes. Args: what: the config's key, for messages."""
        if config.backend == "embedded":
            return embedded().LanguageModel()
        if config.backend == "vllm":
            from fusion_jax.synth.backends.vllm import VllmModel

            return VllmModel(config)
        from fusion_jax.synth.backends.endpoint import ChatEndpoint

        return ChatEndpoint(config, what, self._rates, self._share)

    def vision_model(self, config: ModelConfig) -> VisionModel:
        """The model that verifies answers."""
        return embedded().VisionModel() if config.backend == "embedded" else self.language_model(config, "vision")

    def image_generator(self, config: ImageConfig) -> ImageGenerator:
        """The model that draws."""
        if config.backend == "embedded":
            return embedded().ImageGenerator()
        if config.backend == "diffusers":
            from fusion_jax.synth.backends.diffusion import Diffusion

            return Diffusion(config)
        from fusion_jax.synth.backends.endpoint import ImageEndpoint

        return ImageEndpoint(config, "images", self._rates, self._share)

    def scorer(self, config: ScorerConfig) -> Scorer | None:
        """The model that compares images with texts; None where none is configured."""
        if not config.path:
            return None
        from fusion_jax.synth.backends.clip import ClipScorer

        return ClipScorer(config)
