"""Defines the config of a synthesis run as frozen dataclasses: the keys of configs/synthesize*.py."""

from dataclasses import dataclass, field

from fusion_jax.errors import check, check_choice
from fusion_jax.models.limits import within
from fusion_jax.synth.backends.config import ImageConfig, ModelConfig, ScorerConfig, check_ranges

ENGINES = ("local", "ray")
ROLES = ("llm", "images", "scorer", "vision", "cpu")  # kinds of workers of the engine "ray"

# The smallest and the largest value of each numeric field; None is valid where it is allowed.
_SHARE, _SCORE = (0, 1), (-10, 10)
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


@dataclass(frozen=True)
class PoolConfig:
    """One source of captions."""

    path: str
    """A .txt (a caption a line), .jsonl or .parquet file, `tfds:name[/config][:version]:split`, or captions that the
    embedded backend writes: `embedded:COUNT` or `embedded:STYLE:COUNT`."""
    text: str = "caption"
    """Field with the caption (TFDS: `captions/text`)."""
    image: str = ""
    """Field with the caption's own image, if it has one, relative to image_folder."""
    image_folder: str = ""
    """Folder of the captions' own images; empty: the folder that holds the file."""
    limit: int = 0
    """Number of captions to use; 0: all."""
    source: str = ""
    """The captions' source, kept with every record; required, except for embedded captions."""
    licence: str = ""
    """The captions' licence, kept with every record; required, except for embedded captions."""
    data_dir: str = ""
    """TFDS's data folder; empty: its default."""
    kinds: dict[str, float] = field(default_factory=dict)
    """{kind: weight} for this pool's captions; empty: the run's kinds."""
    split: str = ""
    """File for this pool's records, such as held_out for a test, which then is not part of any mixture; empty: the file
    of their stage."""

    def __post_init__(self):
        check(self.limit >= 0, f"pool {self.path}: limit={self.limit} must not be negative.")
        if not self.path.startswith("embedded:"):
            for name in ("source", "licence"):
                check(bool(getattr(self, name)), f"pool {self.path}: give its {name}, which every record will name.")


@dataclass(frozen=True)
class FilterConfig:
    """Thresholds of the text filters (filters.py), by default those published; None turns a filter off."""

    alphanumeric_min: float | None = 0.60
    """Smallest share of letters and digits among the characters."""
    perplexity_max: float | None = 5500.0
    """Largest perplexity under `perplexity_model`."""
    perplexity_model: str = ""
    """KenLM file for the perplexity; empty: the perplexity is not measured."""
    flagged_words: bool = True
    """Whether texts with flagged words are dropped."""
    flagged_words_file: str = ""
    """Flagged words, one a line; empty: the built-in ones."""
    character_repetition_max: float | None = 0.0937
    """Largest share of repeated n-grams of characters."""
    word_repetition_max: float | None = 0.0309
    """Largest share of repeated n-grams of words."""
    special_min: float | None = 0.165
    """Smallest share of characters that are not letters."""
    special_max: float | None = 0.420
    """Largest share of characters that are not letters."""
    ngram: int = 10
    """Lengths of the n-grams of characters and of words whose repetition counts."""
    blip_min: float | None = 0.8
    """Smallest image-text matching score of captions with an image, from the pool's field `blip_score`."""
    clip_min: float | None = 0.28
    """Smallest CLIP score of captions with an image, from the pool's field `clip_score`, or computed where that is
    missing and a scorer is configured."""
    understood_min: float | None = 0.6
    """Smallest share of a caption's content words that the embedded backend's scene keeps (worlds/scenes/reading.py);
    other backends are not measured."""

    def __post_init__(self):
        check_ranges(self, _FILTER_RANGES)
        if self.special_min is not None and self.special_max is not None:
            least, most = self.special_min, self.special_max
            check(least <= most, f"special_min={least} lies above special_max={most}: no text passes.")


@dataclass(frozen=True)
class SelectConfig:
    """Which finished samples become records."""

    image_score_min: float | None = 0.0
    """Smallest CLIPScore + 0.5 SSIM_a of a sample, checked as soon as its image is scored; None: no scoring."""
    ssim_scale: float = 0.5
    """Factor by which SSIM_a reduces an image."""
    keep: float = 1.0
    """Share of each kind to keep, ranked by the mean CLIPScore of statements, without a scorer by the image score."""
    text_similarity: float | None = 0.8
    """Jaccard similarity of word 3-shingles from which on texts count as duplicates; None: duplicates are kept."""
    image_distance: int = 4
    """Differing bits of 64-bit perceptual hashes up to which images count as duplicates; -1: duplicates are kept."""
    validation: float = 0.0
    """Share of the samples that is written to validation.json."""

    def __post_init__(self):
        check_ranges(self, _SELECT_RANGES)


@dataclass(frozen=True)
class RayConfig:
    """The cluster of the engine "ray"; its workers are `llm`, `images`, `scorer`, `vision` and `cpu`."""

    address: str = ""
    """Address of the cluster; empty: starts a local one."""
    actors: dict[str, int] = field(default_factory=dict)
    """{worker: number of them}, by default 1 of each."""
    gpus: dict[str, float] = field(default_factory=dict)
    """{worker: GPUs for each of them}, by default 0."""
    cpus: dict[str, float] = field(default_factory=dict)
    """{worker: CPUs for each of them}, by default 0.1, as workers that call endpoints mostly wait."""

    def __post_init__(self):
        for name, least, most in (("actors", 1, 1 << 16), ("gpus", 0, 1 << 16), ("cpus", 0, 1 << 16)):
            for role, count in getattr(self, name).items():
                check_choice(f"{name}: worker ", role, ROLES)
                within(f"{name}[{role!r}]", count, least, most)


@dataclass(frozen=True)
class SynthConfig:
    """A whole synthesis run."""

    pools: tuple[PoolConfig, ...]
    """Sources of captions."""
    kinds: dict[str, float]
    """{kind: weight}; each caption becomes a sample of one kind, drawn by seed in proportion to the weights."""
    stages: dict[str, str] = field(default_factory=dict)
    """{kind: training stage} for kinds that are not used in their own stage (synth/kinds)."""
    seed: int = 0
    """Seed of all random choices."""
    filters: FilterConfig = FilterConfig()
    """Text filters."""
    llm: ModelConfig = ModelConfig()  # noqa: RUF009 (frozen)
    """The model that judges captions and writes descriptions, questions and answers."""
    vision: ModelConfig = ModelConfig()  # noqa: RUF009 (frozen)
    """The model that verifies answers by the images."""
    images: ImageConfig = ImageConfig()  # noqa: RUF009 (frozen)
    """The image generator."""
    scorer: ScorerConfig = ScorerConfig()  # noqa: RUF009 (frozen)
    """The model that compares images with texts."""
    select: SelectConfig = SelectConfig()
    """Which finished samples become records."""
    attempts: int = 3
    """Most requests to a model until its answer keeps the limits."""
    judge: bool = True
    """Whether the LLM first judges if a caption can be drawn."""
    verify: bool = True
    """Whether answers are verified."""
    block: int = 256
    """Captions that are processed and saved together."""
    engine: str = "local"
    """local (this machine) or ray (a cluster)."""
    processes: int = 1
    """Processes of a local run; more than one only with the embedded backend, which is bound by the CPU."""
    ray: RayConfig = RayConfig()
    """The cluster of the engine ray."""
    journal: str = ""
    """Folder of paid replies; empty: the run's own. The folder of another run lets this one use its replies."""
    shards: bool = True
    """Whether ArrayRecord shards are written besides the JSON files."""
    mixtures: dict[str, dict[str, str]] = field(default_factory=dict)
    """{stage: {other stage: sampling strategy}}: records that a stage's mixture has besides its own."""
    tokenizer: int = 0
    """Pieces of a SentencePiece vocabulary to train on the stages' texts, for models without pretraining; 0: none."""

    def __post_init__(self):
        from fusion_jax.data.data_sets import parse_strategy
        from fusion_jax.synth.kinds import KINDS, STAGES  # kinds hold prompts and schemas: loaded when needed

        check(len(self.pools) > 0, "config.pools is empty; name at least one source of captions.")
        for pool in self.pools:
            check(
                not pool.split or (pool.split.isidentifier() and pool.split not in STAGES),
                f"pool {pool.path}: split={pool.split!r} must be a plain name such as held_out, and not a stage.",
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
        check_ranges(self, _RUN_RANGES)
        backends = {self.llm.backend, self.vision.backend, self.images.backend}
        check(
            self.processes == 1 or backends == {"embedded"},
            "config.processes above 1 is for the embedded backend; endpoints take `concurrency`, GPUs engine='ray'.",
        )

    @property
    def used_kinds(self) -> list[str]:
        """The kinds that any pool's captions may become."""
        return sorted(set().union(*(pool.kinds or self.kinds for pool in self.pools)))


# Fields that may change when a run is continued, because they do not change the result.
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
