"""Run configurations: frozen dataclasses, made once from the ConfigDict of a config file and validated here.

Model code never sees a ConfigDict. Every field is a key of the config files: `config.stages[0].batch_size`,
`config.model.llm.layers`, ...
"""

from dataclasses import dataclass, field

from fusion_jax.errors import check, check_choice
from fusion_jax.models.config import FusionConfig
from fusion_jax.models.limits import REMATS, within
from fusion_jax.values.dicts import from_dict as from_dict
from fusion_jax.values.dicts import to_dict as to_dict

DTYPES = ("float32", "bfloat16")
DECODES = ("exact", "fast")
TEMPLATE_NAMES = ("phi3", "llama3", "chatml", "mistral")  # of `data.conversation.TEMPLATES`
OWN_TEMPLATE = "own"  # the chat template that lies with the tokenizer, see `data.chat_template`

# Least and most of the fields that are numbers. A value beyond the most is a mistake: it would fill the memory, or
# overflow a counter of 32 bits or a float32.
_STEPS, _LENGTH = (1 << 31) - 1, 1 << 20
_RATE = (0, 3.4e38)
_BELOW_ONE = (0, 0.9999999)  # much more is 1 as a float32
_RESERVED = ("compiled", "config.json", "config.tmp", "losses.png", "losses.tmp", "run.lock")  # in a workdir
_STAGE_RANGES = {
    "max_length": (1, _LENGTH),
    "max_question_length": (1, _LENGTH),
    "max_rounds": (1, 4096),
    "max_images": (1, 4096),
    "batch_size": (1, _LENGTH),
    "accumulation": (1, _LENGTH),
    "epochs": (0, 1_000_000),
    "steps": (0, _STEPS),
    "learning_rate": _RATE,
    "weight_decay": (0, 1e6),
    "warmup_ratio": _BELOW_ONE,
    "b1": _BELOW_ONE,
    "b2": _BELOW_ONE,
    "eps": (1e-20, 1.0),
    "clip_norm": (0, 1e12),
}
_RUN_RANGES = {
    "log_every": (1, _STEPS),
    "checkpoint_every": (1, _STEPS),
    "checkpoint_minutes": (0, 1e6),
    "keep_checkpoints": (1, _STEPS),
    "keep_every": (0, _STEPS),
    "validate_every": (0, _STEPS),
    "validation_batches": (0, _STEPS),
    "sample_answers": (0, 1024),
    "evaluate_every": (0, _STEPS),
    "evaluation_limit": (0, _STEPS),
    "max_skipped_steps": (1, _STEPS),
    "loader_threads": (1, 1024),
    "hang_minutes": (0, 1e6),
    "seed": (0, (1 << 32) - 1),
    "max_bad_records": (0, 1),
}
_RUN_CHOICES = {"template": (*TEMPLATE_NAMES, OWN_TEMPLATE), "dtype": DTYPES, "remat": REMATS, "decode": DECODES}


@dataclass(frozen=True)
class MeshConfig:
    """How many devices share what; -1, at most once, is the rest of them. See `sharding` for what each axis means.

    data: rows of the batch, parameters copied. fsdp: rows and parameters. tensor: heads, MLP units and vocabulary.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            check(size >= 1 or size == -1, f"config.mesh.{name}={size} must be at least 1, or -1 for the rest.")
            within(f"config.mesh.{name}", size, -1, _LENGTH)
        rest = [name for name, size in sizes.items() if size == -1]
        check(len(rest) < 2, f"config.mesh: only one size can be -1, the rest; {' and '.join(rest)} are.")


@dataclass(frozen=True)
class StageConfig:
    """One training stage.

    Data:
      name: subfolder of the workdir. data: .json, .jsonl, .yaml mixture, a folder of shards or `tfds:NAME:SPLIT`.
      image_folder: where its images lie (default: the folder of `data`). max_length: positions of a row, visual tokens
      included. max_question_length: question tokens that an encoder pass reads. max_rounds: of a row. max_images: of a
      conversation. A conversation beyond these loses its last rounds; if that does not help it is skipped.
      packing: several conversations share a row; each sees itself alone.
    Steps:
      batch_size: samples in an optimizer step, over all devices; with packing on average, or more where every device
      needs a row. accumulation: microbatches that it is split into.
      epochs: how often every record is trained, the last step holding what is left; or steps, if not 0, instead.
    Optimizer (AdamW, cosine to 0 after a linear warm-up):
      learning_rate, and learning_rate_by_path: {regular expression on the parameter path: rate}, first match wins.
      warmup_ratio: share of the steps. weight_decay: not on norms and biases. clip_norm: global norm, 0 = off.
      first_moment: dtype of Adam's running mean; bfloat16 saves two bytes a parameter.
      freeze: regular expressions on parameter paths. learn_rows: rows of a frozen word embedding that learn, such as
      new tokens, at `learning_rate`.
    """

    name: str
    data: str
    image_folder: str = ""
    max_length: int = 2048
    max_question_length: int = 256
    max_rounds: int = 8
    max_images: int = 1
    packing: bool = False
    batch_size: int = 256
    accumulation: int = 1
    epochs: int = 1
    steps: int = 0
    learning_rate: float = 1e-4
    learning_rate_by_path: dict[str, float] = field(default_factory=dict)
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0
    first_moment: str = "float32"
    freeze: tuple[str, ...] = ()
    learn_rows: tuple[int, ...] = ()

    def __post_init__(self):
        where = f"stage {self.name!r}"
        check(
            self.name not in ("", ".", "..") and "/" not in self.name and self.name.isprintable(),
            f"{where}: the name must be one of a folder, without a slash.",
        )
        check(len(self.name.encode()) <= 200, f"stage {self.name[:50]!r}...: the name must not have over 200 bytes.")
        check(self.name not in _RESERVED, f"{where}: a run keeps other things under this name; give the stage another.")
        for name, (least, most) in _STAGE_RANGES.items():
            within(f"{where}: {name}", getattr(self, name), least, most)
        for path, rate in self.learning_rate_by_path.items():
            within(f"{where}: learning_rate_by_path[{path!r}]", rate, *_RATE)
        check(
            self.batch_size % self.accumulation == 0,
            f"{where}: accumulation={self.accumulation} does not divide batch_size={self.batch_size}.",
        )
        check(self.steps > 0 or self.epochs > 0, f"{where}: give epochs or steps, at least 1.")
        check_choice(f"{where}: first_moment=", self.first_moment, DTYPES)
        for row in self.learn_rows:
            within(f"{where}: learn_rows", row, 0, _STEPS)
        check(len(set(self.learn_rows)) == len(self.learn_rows), f"{where}: learn_rows has a row twice.")


@dataclass(frozen=True)
class RunConfig:
    """A whole run.

    model: see `models.config`. stages: trained in order, each from the parameters of the one before.
    tokenizer: local folder. template: one of `data.conversation.TEMPLATES`, or own, the chat template that lies with
    the tokenizer. init_from: checkpoint whose parameters the first stage takes.
    init_without: regular expressions on parameter paths; what matches is not taken from there.
    dtype: compute; parameters are float32 masters. remat: see `models.remat`. mesh: devices, see `MeshConfig`.
    Every N steps: log_every, checkpoint_every, validate_every, evaluate_every (0 = never).
    checkpoint_minutes: save after that long at the latest, too (0 = by steps only). keep_checkpoints: newest ones kept;
    keep_every: and those of every n-th step (0 = none).
    validation_data: as `data` of a stage; validation_image_folder: where its images lie (default: the folder of
    validation_data). validation_batches: how many times batch_size of its first records, 0 for all.
    sample_answers: generated for the log.
    evaluation_tasks: benchmarks of `fusion_jax.evaluate`, in evaluation_data; evaluation_limit: questions of each
    (0 = all).
    max_bad_records: share of bad records that stops the run. max_skipped_steps: non-finite steps in a row that stop it.
    decode: exact, the published pixels, or fast, which decodes large JPEGs at reduced size (docs/performance.md).
    loader_threads: image decoding threads. hang_minutes: without progress for that long, the stacks of all threads go
    to the log (0 = never). wandb_project: Weights & Biases project that gets the metrics too.
    """

    model: FusionConfig
    stages: tuple[StageConfig, ...]
    tokenizer: str
    template: str = "phi3"
    seed: int = 42
    init_from: str = ""
    init_without: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    remat: str = "full"
    mesh: MeshConfig = MeshConfig()
    log_every: int = 10
    checkpoint_every: int = 500
    checkpoint_minutes: float = 30.0
    keep_checkpoints: int = 3
    keep_every: int = 0
    validate_every: int = 500
    validation_data: str = ""
    validation_image_folder: str = ""
    validation_batches: int = 8
    sample_answers: int = 4
    evaluate_every: int = 0
    evaluation_tasks: tuple[str, ...] = ()
    evaluation_data: str = ""
    evaluation_limit: int = 100
    max_bad_records: float = 0.01
    max_skipped_steps: int = 20
    decode: str = "exact"
    loader_threads: int = 16
    hang_minutes: float = 15.0
    wandb_project: str = ""

    def __post_init__(self):
        check(len(self.stages) > 0, "config.stages is empty; give at least one stage.")
        names = [stage.name for stage in self.stages]
        check(len(set(names)) == len(names), f"config.stages: names must differ, got {', '.join(names)}.")
        for name, allowed in _RUN_CHOICES.items():
            check_choice(f"config.{name}=", getattr(self, name), allowed)
        for name, (least, most) in _RUN_RANGES.items():
            within(f"config.{name}", getattr(self, name), least, most)
        check(
            bool(self.init_from) or not self.init_without,
            f"config.init_without={list(self.init_without)} says what is not taken from init_from, which is empty.",
        )
        longest = max(self.model.drawn_latent_counts, default=0)
        for stage in self.stages:
            image = self.model.tokens_per_image + self.model.most_tile_tokens
            visual = image + longest
            check(
                visual < stage.max_length,
                f"stage {stage.name!r}: max_length={stage.max_length} has no room for text beside "
                f"{visual} visual tokens ({image} of the image, {longest} latents).",
            )
