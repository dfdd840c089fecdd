"""Makes backends by their names in a config; each is imported only when a run uses it."""

import importlib
from types import ModuleType
from typing import Any

from fusion_jax.synth.backends.base import ImageGenerator, LanguageModel, Scorer, VisionModel
from fusion_jax.synth.backends.config import ImageConfig, ModelConfig, ScorerConfig


def embedded() -> ModuleType:
    """The module of the backend without network and weights.

    It has the classes LanguageModel, VisionModel and ImageGenerator, which take no arguments, `captions(count, seed,
    style)`, which yields captions, STYLES, the number VERSION, which changes whenever its output does, and the texts
    SOURCE and LICENCE.
    """
    return importlib.import_module("fusion_jax.synth.backends.embedded")


class Factory:
    """Makes the models of one process; those at one address share its rate limit."""

    def __init__(self, share: float = 1.0):
        """Args: share: the share of the configured traffic that this process may cause."""
        self._share = share
        self._rates: dict[str, Any] = {}

    def language_model(self, config: ModelConfig, what: str = "llm") -> LanguageModel:
        """Makes the model that writes. Args: what: the config's key, for messages."""
        if config.backend == "embedded":
            return embedded().LanguageModel()
        if config.backend == "vllm":
            from fusion_jax.synth.backends.vllm import VllmModel

            return VllmModel(config)
        from fusion_jax.synth.backends.endpoint import ChatEndpoint

        return ChatEndpoint(config, what, self._rates, self._share)

    def vision_model(self, config: ModelConfig) -> VisionModel:
        """Makes the model that verifies answers."""
        return embedded().VisionModel() if config.backend == "embedded" else self.language_model(config, "vision")

    def image_generator(self, config: ImageConfig) -> ImageGenerator:
        """Makes the model that draws."""
        if config.backend == "embedded":
            return embedded().ImageGenerator()
        if config.backend == "diffusers":
            from fusion_jax.synth.backends.diffusion import Diffusion

            return Diffusion(config)
        from fusion_jax.synth.backends.endpoint import ImageEndpoint

        return ImageEndpoint(config, "images", self._rates, self._share)

    def scorer(self, config: ScorerConfig) -> Scorer | None:
        """Makes the model that compares images with texts; None where none is configured."""
        if not config.path:
            return None
        from fusion_jax.synth.backends.clip import ClipScorer

        return ClipScorer(config)
