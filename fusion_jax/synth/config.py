"""What a synthesis run makes and with what: frozen dataclasses, each field a key of configs/synthesize*.py."""

from dataclasses import dataclass, field

from fusion_jax.errors import check, check_choice
from fusion_jax.models.limits import within

LANGUAGE_BACKENDS = ("embedded", "endpoint", "vllm")
IMAGE_BACKENDS = ("embedded", "endpoint", "diffusers")
STRUCTURED = ("json_schema", "json_object", "none")
ENGINES = ("local", "ray")
ROLES = ("llm", "images", "scorer", "vision", "cpu")  # workers of engine "ray"

# Least and most of the fields that are numbers; None, where it is allowed, is within.
_PRICE, _SHARE, _SCORE = (0, 1e9), (0, 1), (-10, 10)
_FILTER_RANGES = {
    "alphanumeric_min": _SHARE,
    "perplexity_max": (1, 1e12),
    "character_repetition_max": _SHARE,
    "word_repetition_max": _SHARE,
    "special_min": _SHARE,
    "special_max": _SHARE,
    "ngram": (1, 1000),
    "blip_min": _SHARE,
    "clip_min": (-1, 1),
    "understood_min": _SHARE,
}
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
    "concurrency": (1, 4096),  # each takes a thread
    "retries": (0, 1000),
    "timeout": (1e-3, 86400),
    "requests_per_second": (0, 1e6),
}
_SELECT_RANGES = {
    "image_score_min": _SCORE,
    "ssim_scale": (1e-6, 1),
    "keep": (1e-6, 1),
    "text_similarity": (1e-6, 1),
    "image_distance": (-1, 16),
    "validation": (0, 1 - 1e-6),
}
_RUN_RANGES = {
    "seed": (-(1 << 63), (1 << 63) - 1),
    "attempts": (1, 1000),
    "block": (1, 1 << 20),
    "processes": (1, 1024),
}


def _check_ranges(config: object, ranges: dict[str, tuple[float, float]]) -> None:
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if value is not None:
            within(name, value, least, most)


@dataclass(frozen=True)
class PoolConfig:
    """One source of captions.

    path: .txt (a caption a line), .jsonl, .parquet, `tfds:name[/config][:version]:split`, or captions that the
    embedded backend writes: `embedded:COUNT`, `embedded:STYLE:COUNT`. text: field with the caption (TFDS:
    `captions/text`). image: field with the caption's own image, if it has one, relative to image_folder. limit:
    captions to take, 0 for all. source, licence: what every record says of its origin; required, except of embedded
    ones. data_dir: TFDS's. kinds: {kind: weight} of this pool, where it has its own. split: file that its records go
    to, instead of their stage's and of no mixture: "held_out" for a test.
    """

    path: str
    text: str = "caption"
    image: str = ""
    image_folder: str = ""
    limit: int = 0
    source: str = ""
    licence: str = ""
    data_dir: str = ""
    kinds: dict[str, float] = field(default_factory=dict)
    split: str = ""

    def __post_init__(self):
        check(self.limit >= 0, f"pool {self.path}: limit={self.limit} must not be negative.")
        if not self.path.startswith("embedded:"):
            for name in ("source", "licence"):
                check(bool(getattr(self, name)), f"pool {self.path}: give its {name}, which every record will name.")


@dataclass(frozen=True)
class FilterConfig:
    """Thresholds of the text filters, by default as published; None turns one off.

    ngram: length of the n-grams, of characters and of words, whose repetition counts. perplexity_model: KenLM file;
    without one the perplexity filter is off. flagged_words_file: a word a line, instead of the built-in ones.
    blip_min, clip_min: image-text matching of captions that have an image, by the pool's fields `blip_score` and
    `clip_score`; a missing CLIP score is computed where a scorer is configured and the pool has images.
    understood_min: share of a caption's content words that the embedded backend's scene must keep (scene/reading.py);
    other backends are not measured.
    """

    alphanumeric_min: float | None = 0.60
    perplexity_max: float | None = 5500.0
    perplexity_model: str = ""
    flagged_words: bool = True
    flagged_words_file: str = ""
    character_repetition_max: float | None = 0.0937
    word_repetition_max: float | None = 0.0309
    special_min: float | None = 0.165
    special_max: float | None = 0.420
    ngram: int = 10
    blip_min: float | None = 0.8
    clip_min: float | None = 0.28
    understood_min: float | None = 0.6

    def __post_init__(self):
        _check_ranges(self, _FILTER_RANGES)
        if self.special_min is not None and self.special_max is not None:
            least, most = self.special_min, self.special_max
            check(least <= most, f"special_min={least} lies above special_max={most}: no text passes.")


@dataclass(frozen=True)
class ModelConfig:
    """A language or vision model.

    backend: embedded; endpoint (OpenAI-compatible: vLLM, SGLang, Ollama, hosted); vllm (in this process).
    model: as served, or vLLM's model folder. base_url: of the endpoint up to and with /v1; empty: OPENAI_BASE_URL.
    api_key_env: the environment variable that holds the key; the key itself is never part of a config.
    concurrency: requests under way. requests_per_second: 0 for no limit. timeout: seconds for a whole request.
    retries: of one request after overload, cut connections and the like. structured: how the answer's form is asked
    for; where the endpoint does not offer it, the next weaker one is taken.
    price_prompt, price_completion: per million tokens, for the books.
    """

    backend: str = "embedded"
    model: str = ""
    base_url: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float = 0.7
    max_tokens: int = 2048
    concurrency: int = 16
    requests_per_second: float = 0.0
    timeout: float = 120.0
    retries: int = 8
    structured: str = "json_schema"
    price_prompt: float = 0.0
    price_completion: float = 0.0

    def __post_init__(self):
        check_choice("backend=", self.backend, LANGUAGE_BACKENDS)
        check_choice("structured=", self.structured, STRUCTURED)
        check(self.backend == "embedded" or bool(self.model), f"backend={self.backend!r} needs a model.")
        _check_ranges(self, _MODEL_RANGES | _TRAFFIC_RANGES)


@dataclass(frozen=True)
class ImageConfig:
    """The image generator.

    backend: embedded; endpoint (OpenAI-compatible /images/generations); diffusers (any text-to-image pipeline).
    model: as served, or the pipeline's name or local folder. steps, guidance: of diffusers pipelines.
    dtype, device: of diffusers; device empty: cuda where there is one. The rest as in `ModelConfig`.
    price_image: of one image. image_hosts: HOST:PORT of servers on a private network that the endpoint's replies may
    name in the addresses of images; its own is always allowed, as are ports 80 and 443 on the internet.
    """

    backend: str = "embedded"
    model: str = "black-forest-labs/FLUX.1-dev"
    width: int = 384
    height: int = 384
    steps: int = 50
    guidance: float = 3.5
    dtype: str = "bfloat16"
    device: str = ""
    base_url: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    requests_per_second: float = 0.0
    timeout: float = 300.0
    retries: int = 8
    price_image: float = 0.0
    image_hosts: tuple[str, ...] = ()

    def __post_init__(self):
        check_choice("backend=", self.backend, IMAGE_BACKENDS)
        _check_ranges(self, _IMAGE_RANGES | _TRAFFIC_RANGES)
        for place in self.image_hosts:
            host, _, port = place.rpartition(":")
            check(
                bool(host) and "/" not in host and port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 1 << 16,
                f"images.image_hosts: {place!r} must be HOST:PORT.",
            )


@dataclass(frozen=True)
class ScorerConfig:
    """CLIP or SigLIP for CLIPScores. path: local folder; empty: no CLIPScores, images are judged by SSIM_a alone.

    weight: CLIPScore = weight * max(cosine, 0), 2.5 as in its paper.
    """

    path: str = ""
    device: str = ""
    weight: float = 2.5

    def __post_init__(self):
        within("weight", self.weight, 1e-6, 1e6)


@dataclass(frozen=True)
class SelectConfig:
    """What is kept of the finished samples.

    image_score_min: CLIPScore + 0.5 SSIM_a below this drops a sample as soon as its image is scored; None: images are
    not scored. ssim_scale: how far SSIM_a sizes an image down. keep: share of each kind kept after ranking by the
    statements' mean CLIPScore (without a scorer, by the image score). text_similarity: Jaccard similarity of word
    3-shingles from which texts are the same; None: texts may be alike. image_distance: differing bits of 64-bit
    perceptual hashes up to which images are the same; -1: images may be alike. validation: share of the samples that
    goes into validation.json.
    """

    image_score_min: float | None = 0.0
    ssim_scale: float = 0.5
    keep: float = 1.0
    text_similarity: float | None = 0.8
    image_distance: int = 4
    validation: float = 0.0

    def __post_init__(self):
        _check_ranges(self, _SELECT_RANGES)


@dataclass(frozen=True)
class RayConfig:
    """Of engine "ray". address: of the cluster; empty starts a local one.

    actors: workers for each of `llm`, `images`, `scorer`, `vision` and `cpu`, 1 by default. gpus, cpus: what one worker
    of each takes, 0 and 0.1 by default: workers that ask endpoints mostly wait.
    """

    address: str = ""
    actors: dict[str, int] = field(default_factory=dict)
    gpus: dict[str, float] = field(default_factory=dict)
    cpus: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        for name, least, most in (("actors", 1, 1 << 16), ("gpus", 0, 1 << 16), ("cpus", 0, 1 << 16)):
            for role, count in getattr(self, name).items():
                check_choice(f"{name}: worker ", role, ROLES)
                within(f"{name}[{role!r}]", count, least, most)


@dataclass(frozen=True)
class SynthConfig:
    """A whole run.

    pools: captions in. kinds: {kind: weight}; each caption becomes one kind, drawn by seed in these shares.
    stages: {kind: training stage} where it is not the kind's own (see synth/kinds).
    attempts: how often a model is asked for an answer that keeps the limits. verify: whether answers are verified.
    block: captions worked on and saved together. processes: of a local run, for CPU-bound backends.
    journal: folder of paid replies, by default the run's own; another run's folder gives this one its replies.
    shards: write ArrayRecord shards besides the JSON files. mixtures: {stage: {other stage: sampling strategy}}, what a
    stage's mixture takes besides its own records. tokenizer: pieces of a SentencePiece vocabulary that is trained on
    the stages' texts, for models that start from nothing; 0 for none.
    """

    pools: tuple[PoolConfig, ...]
    kinds: dict[str, float]
    stages: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    filters: FilterConfig = FilterConfig()
    llm: ModelConfig = ModelConfig()
    vision: ModelConfig = ModelConfig()
    images: ImageConfig = ImageConfig()
    scorer: ScorerConfig = ScorerConfig()
    select: SelectConfig = SelectConfig()
    attempts: int = 3
    judge: bool = True
    verify: bool = True
    block: int = 256
    engine: str = "local"
    processes: int = 1
    ray: RayConfig = RayConfig()
    journal: str = ""
    shards: bool = True
    mixtures: dict[str, dict[str, str]] = field(default_factory=dict)
    tokenizer: int = 0

    def __post_init__(self):
        from fusion_jax.data.data_sets import parse_strategy
        from fusion_jax.synth.kinds import KINDS, STAGES  # kinds are made of prompts and schemas: loaded when needed

        check(len(self.pools) > 0, "config.pools is empty; name at least one source of captions.")
        for pool in self.pools:
            check(
                not pool.split or (pool.split.isidentifier() and pool.split not in STAGES),
                f"pool {pool.path}: split={pool.split!r} must be a plain name and no stage, as held_out.",
            )
            check(bool(pool.kinds or self.kinds), "config.kinds is empty; give at least one kind and its weight.")
        weights = {"kinds": self.kinds} | {f"pools[{i}].kinds": pool.kinds for i, pool in enumerate(self.pools)}
        for key, kinds in (weights | {"stages": self.stages}).items():
            for kind in kinds:
                check_choice(f"config.{key}: kind ", kind, KINDS)
        for key, kinds in weights.items():
            for kind, weight in kinds.items():
                check(0 < weight <= 1e9, f"config.{key}.{kind}={weight} must be above 0, at most 1e9.")
        named = {f"stages.{kind}": (stage,) for kind, stage in self.stages.items()}
        named |= {f"mixtures.{stage}": (stage, *others) for stage, others in self.mixtures.items()}
        for key, stages in named.items():
            for stage in stages:
                check_choice(f"config.{key}: stage ", stage, STAGES)
        check(
            self.tokenizer == 0 or 300 <= self.tokenizer <= 1 << 24,
            f"config.tokenizer={self.tokenizer}: a vocabulary has 300 pieces or more, 259 of them bytes and marks, "
            f"and {1 << 24} at most.",
        )
        check_choice("engine=", self.engine, ENGINES)
        for stage, others in self.mixtures.items():
            for other, how in others.items():
                parse_strategy(how, f"config.mixtures.{stage}.{other}")
        _check_ranges(self, _RUN_RANGES)
        backends = {self.llm.backend, self.vision.backend, self.images.backend}
        check(
            self.processes == 1 or backends == {"embedded"},
            "config.processes above 1 is for the embedded backend; endpoints take `concurrency`, GPUs engine='ray'.",
        )

    @property
    def used_kinds(self) -> list[str]:
        """The kinds that any pool's captions may become."""
        return sorted(set().union(*(pool.kinds or self.kinds for pool in self.pools)))


# What may differ between a run and the one that goes on with it: it does not change the result.
OPERATIONAL = {
    "": ("engine", "processes", "ray", "journal"),
    "llm": ("base_url", "api_key_env", "concurrency", "requests_per_second", "timeout", "retries"),
    "vision": ("base_url", "api_key_env", "concurrency", "requests_per_second", "timeout", "retries"),
    "images": (
        "base_url",
        "api_key_env",
        "concurrency",
        "requests_per_second",
        "timeout",
        "retries",
        "device",
        "image_hosts",
    ),
    "scorer": ("device",),
}
