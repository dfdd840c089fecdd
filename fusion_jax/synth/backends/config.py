"""Defines the configs of a synthesis run's models: the keys of `llm`, `vision`, `images`, `scorer`."""

from dataclasses import dataclass

from fusion_jax.errors import check, check_choice
from fusion_jax.models.limits import within

LANGUAGE_BACKENDS = ("embedded", "endpoint", "vllm")
IMAGE_BACKENDS = ("embedded", "endpoint", "diffusers")
STRUCTURED = ("json_schema", "json_object", "none")

# The smallest and the largest value of each numeric field.
_PRICE = (0, 1e9)
_MODEL_RANGES = {
    "temperature": (0, 100),
    "max_tokens": (1, 1 << 20),
    "price_prompt": _PRICE,
    "price_completion": _PRICE,
}
_IMAGE_RANGES = {
    "width": (16, 4096),
    "height": (16, 4096),
    "steps": (1, 10_000),
    "guidance": (0, 1000),
    "price_image": _PRICE,
}
_TRAFFIC_RANGES = {
    "concurrency": (1, 4096),  # each needs a thread
    "retries": (0, 1000),
    "timeout": (1e-3, 86400),
    "requests_per_second": (0, 1e6),
}


def check_ranges(config: object, ranges: dict[str, tuple[float, float]]) -> None:
    """Raises UserError unless the named fields are within their limits, or None where a field allows that."""
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if value is not None:
            within(name, value, least, most)


@dataclass(frozen=True)
class ModelConfig:
    """A language or vision model."""

    backend: str = "embedded"
    """embedded; endpoint (OpenAI-compatible: vLLM, SGLang, Ollama, hosted); vllm (in this process)."""
    model: str = ""
    """The model's name as it is served, or vLLM's model folder."""
    base_url: str = ""
    """Address of the endpoint up to and with /v1; empty: the variable OPENAI_BASE_URL."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never part of a config."""
    temperature: float = 0.7
    """Sampling temperature."""
    max_tokens: int = 2048
    """Longest answer, in tokens."""
    concurrency: int = 16
    """Requests that may be open at the same time."""
    requests_per_second: float = 0.0
    """Limit of requests a second; 0: no limit."""
    timeout: float = 120.0
    """Seconds that a whole request may take."""
    retries: int = 8
    """Further tries of one request after overload, a cut connection and the like."""
    structured: str = "json_schema"
    """How the form of the answer is requested, of json_schema, json_object and none; an endpoint without it gets the
    next weaker one."""
    price_prompt: float = 0.0
    """Price of a million prompt tokens, for the report."""
    price_completion: float = 0.0
    """Price of a million completion tokens, for the report."""

    def __post_init__(self):
        check_choice("backend=", self.backend, LANGUAGE_BACKENDS)
        check_choice("structured=", self.structured, STRUCTURED)
        check(self.backend == "embedded" or bool(self.model), f"backend={self.backend!r} needs a model.")
        check_ranges(self, _MODEL_RANGES | _TRAFFIC_RANGES)


@dataclass(frozen=True)
class ImageConfig:
    """The image generator."""

    backend: str = "embedded"
    """embedded; endpoint (OpenAI-compatible /images/generations); diffusers (any text-to-image pipeline)."""
    model: str = "black-forest-labs/FLUX.1-dev"
    """The model's name as it is served, or the pipeline's name or local folder."""
    width: int = 384
    """Width of the images, in pixels."""
    height: int = 384
    """Height of the images, in pixels."""
    steps: int = 50
    """Denoising steps of a diffusers pipeline."""
    guidance: float = 3.5
    """Guidance scale of a diffusers pipeline."""
    dtype: str = "bfloat16"
    """Dtype of a diffusers pipeline: bfloat16, float16 or float32."""
    device: str = ""
    """Device of a diffusers pipeline; empty: cuda where there is one."""
    base_url: str = ""
    """Address of the endpoint up to and with /v1; empty: the variable OPENAI_BASE_URL."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never part of a config."""
    concurrency: int = 8
    """Requests that may be open at the same time."""
    requests_per_second: float = 0.0
    """Limit of requests a second; 0: no limit."""
    timeout: float = 300.0
    """Seconds that a whole request may take."""
    retries: int = 8
    """Further tries of one request after overload, a cut connection and the like."""
    price_image: float = 0.0
    """Price of an image, for the report."""
    image_hosts: tuple[str, ...] = ()
    """HOST:PORT of servers on a private network that replies may name as addresses of images; the endpoint's own is
    always allowed, as are ports 80 and 443 on the internet."""

    def __post_init__(self):
        check_choice("backend=", self.backend, IMAGE_BACKENDS)
        check_ranges(self, _IMAGE_RANGES | _TRAFFIC_RANGES)
        for place in self.image_hosts:
            host, _, port = place.rpartition(":")
            check(
                bool(host) and "/" not in host and port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 1 << 16,
                f"images.image_hosts: {place!r} must be HOST:PORT.",
            )


@dataclass(frozen=True)
class ScorerConfig:
    """CLIP or SigLIP for CLIPScores."""

    path: str = ""
    """Local folder of the model; empty: no CLIPScores, images are judged by SSIM_a alone."""
    device: str = ""
    """Device of the model; empty: cuda where there is one."""
    weight: float = 2.5
    """Factor of CLIPScore = weight * max(cosine, 0), 2.5 as in its paper."""

    def __post_init__(self):
        within("weight", self.weight, 1e-6, 1e6)
