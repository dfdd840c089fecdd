"""Defines the configuration of a training run as frozen dataclasses, which validate themselves.

They are made once from a config file. Every field is a key of the file, such as `config.stages[0].batch_size` or
`config.model.llm.layers`; the line under it becomes its entry in docs/config.md. Model code never sees a ConfigDict.
"""

from dataclasses import dataclass, field

from fusion_jax.errors import check, check_choice
from fusion_jax.models.config import FusionConfig
from fusion_jax.models.limits import REMATS, within
from fusion_jax.values.dicts import from_dict as from_dict
from fusion_jax.values.dicts import to_dict as to_dict

DTYPES = ("float32", "bfloat16")
MOMENTS = (*DTYPES, "int8")
DECODES = ("exact", "fast")
TEMPLATE_NAMES = ("phi3", "llama3", "chatml", "mistral")  # of `data.templates.TEMPLATES`
GATHERS = ("layer", "step")
OPTIMIZER_NAMES = ("adamw", "muon")  # of `training.optimizers.OPTIMIZERS`
OWN_TEMPLATE = "own"  # the chat template in the tokenizer's folder, see `data.chat_template`

# The smallest and the largest value of each numeric field. A larger value is a mistake: it would fill the memory, or
# overflow a 32-bit counter or a float32.
_STEPS, _LENGTH = (1 << 31) - 1, 1 << 20
_RATE = (0, 3.4e38)
_BELOW_ONE = (0, 0.9999999)  # larger values would round to 1 in float32
_RESERVED = ("compiled", "config.json", "config.tmp", "losses.png", "losses.tmp", "run.lock")  # in a workdir
MESH_RANGES = {"data": (-1, _LENGTH), "fsdp": (-1, _LENGTH), "tensor": (-1, _LENGTH)}
STAGE_RANGES = {
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
RUN_RANGES = {
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
STAGE_CHOICES = {
    "gather": GATHERS,
    "optimizer": OPTIMIZER_NAMES,
    "first_moment": MOMENTS,
    "second_moment": MOMENTS,
    "master_weights": DTYPES,
    "gradient_sums": DTYPES,
}
RUN_CHOICES = {"template": (*TEMPLATE_NAMES, OWN_TEMPLATE), "dtype": DTYPES, "remat": REMATS, "decode": DECODES}


@dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each mesh axis; `devices.sharding` describes what each axis splits."""

    data: int = -1
    """Devices that split the rows of a batch and hold copies of the parameters; -1: all remaining devices."""
    fsdp: int = 1
    """Devices that split the rows of a batch and the parameters; -1: all remaining devices."""
    tensor: int = 1
    """Devices that split heads, hidden units of MLPs and the vocabulary; -1: all remaining devices."""

    def __post_init__(self):
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            check(size >= 1 or size == -1, f"config.mesh.{name}={size} must be at least 1, or -1 for the rest.")
            within(f"config.mesh.{name}", size, *MESH_RANGES[name])
        rest = [name for name, size in sizes.items() if size == -1]
        check(len(rest) < 2, f"config.mesh: only one size can be -1, the rest; {' and '.join(rest)} are.")


@dataclass(frozen=True)
class StageConfig:
    """One training stage: its data, its steps and its optimizer (linear warm-up, then cosine to 0)."""

    name: str
    """Name of the stage, and of its folder in the workdir."""
    data: str
    """Records: a .json or .jsonl file, a .yaml mixture, a folder of shards, or `tfds:NAME:SPLIT`."""
    image_folder: str = ""
    """Folder of the images of `data`; empty: the folder that holds `data`."""
    max_length: int = 2048
    """Positions in a row, visual tokens included; a longer conversation loses its last rounds, or is skipped. Packed
    rows may be up to twice as long where that leaves fewer gaps."""
    max_question_length: int = 256
    """Most question tokens that one pass of the vision encoder reads; the limit is applied as for `max_length`. Steps
    are as long as their questions need, in a few sizes."""
    max_rounds: int = 8
    """Most rounds in a row of `max_length` positions; the limit is applied as for `max_length`."""
    max_images: int = 1
    """Images in a conversation; the limit is applied as for `max_length`."""
    packing: bool = False
    """Whether several conversations share a row; each attends only to itself."""
    batch_size: int = 256
    """Conversations in an optimizer step over all devices; with `packing` on average, and at least one row a device."""
    accumulation: int = 1
    """Microbatches that a step is split into; must divide `batch_size`."""
    gather: str = "layer"
    """When devices gather weights along `mesh.fsdp`: for each pass of each `layer`, or once a `step`, which takes two
    more bytes a parameter on every device and sends fewer, above all with `accumulation`."""
    gradient_sums: str = "float32"
    """Dtype of the sums of products' gradients over microbatches; bfloat16 is rounded stochastically."""
    epochs: int = 1
    """How often every record is trained on; the last step holds the records that remain."""
    steps: int = 0
    """Number of optimizer steps, which replaces `epochs`; 0: `epochs` applies."""
    optimizer: str = "adamw"
    """Optimizer of the trained parameters; `muon` is for the matrices of layers, with AdamW for all else
    (docs/training.md)."""
    learning_rate: float = 1e-4
    """Highest learning rate, reached at the end of the warm-up."""
    learning_rate_by_path: dict[str, float] = field(default_factory=dict)
    """Other rates, {regular expression on the parameter path: rate}; the first match applies."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    """Decoupled weight decay, not on norms and biases."""
    b1: float = 0.9
    """Decay of Adam's running mean of the gradient."""
    b2: float = 0.999
    """Decay of Adam's running mean of the squared gradient."""
    eps: float = 1e-8
    """Added to the root of the squared gradient's mean."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0: no clipping."""
    first_moment: str = "float32"
    """How the running mean of the gradient is stored: `int8` takes one byte a parameter (docs/training.md)."""
    second_moment: str = "float32"
    """How Adam's running mean of the squared gradient is stored, as `first_moment`."""
    master_weights: str = "float32"
    """Dtype of the weights of matrix products between steps; bfloat16 is rounded stochastically after each update."""
    freeze: tuple[str, ...] = ()
    """Regular expressions on parameter paths; parameters that match are not trained."""
    learn_rows: tuple[int, ...] = ()
    """Rows of a frozen word embedding that are trained all the same, at `learning_rate`, such as new tokens."""

    def __post_init__(self):
        where = f"stage {self.name!r}"
        check(
            self.name not in ("", ".", "..") and "/" not in self.name and self.name.isprintable(),
            f"{where}: the name must be one of a folder, without a slash.",
        )
        check(len(self.name.encode()) <= 200, f"stage {self.name[:50]!r}...: the name must not have over 200 bytes.")
        check(self.name not in _RESERVED, f"{where}: a run keeps other things under this name; give the stage another.")
        for name, (least, most) in STAGE_RANGES.items():
            within(f"{where}: {name}", getattr(self, name), least, most)
        for path, rate in self.learning_rate_by_path.items():
            within(f"{where}: learning_rate_by_path[{path!r}]", rate, *_RATE)
        check(
            self.batch_size % self.accumulation == 0,
            f"{where}: accumulation={self.accumulation} does not divide batch_size={self.batch_size}.",
        )
        check(self.steps > 0 or self.epochs > 0, f"{where}: give epochs or steps, at least 1.")
        for name, allowed in STAGE_CHOICES.items():
            check_choice(f"{where}: {name}=", getattr(self, name), allowed)
        for row in self.learn_rows:
            within(f"{where}: learn_rows", row, 0, _STEPS)
        check(len(set(self.learn_rows)) == len(self.learn_rows), f"{where}: learn_rows has a row twice.")


@dataclass(frozen=True)
class RunConfig:
    """A whole training run: the model, its stages in order, and how they are run."""

    model: FusionConfig
    """The model, see below."""
    stages: tuple[StageConfig, ...]
    """Stages, trained in this order, each from the parameters of the one before."""
    tokenizer: str
    """Local folder of the tokenizer."""
    template: str = "phi3"
    """Chat template; `own`: the one in the folder of the tokenizer."""
    seed: int = 42
    """Seed of new parameters, the order of the records and the drawn numbers of latents."""
    init_from: str = ""
    """Checkpoint whose parameters the first stage starts from; empty: new parameters."""
    init_without: tuple[str, ...] = ()
    """Regular expressions on parameter paths; parameters that match are not loaded from `init_from`."""
    dtype: str = "bfloat16"
    """Dtype of the computation; the parameters are kept in float32, or as `master_weights` of a stage says."""
    remat: str = "full"
    """What the backward pass recomputes, from nothing (`none`) to everything (`full`); see `models.remat`."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis, see below."""
    log_every: int = 10
    """Steps between two log lines."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    checkpoint_minutes: float = 30.0
    """Largest number of minutes between two checkpoints; 0: only `checkpoint_every` applies."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints are kept."""
    keep_every: int = 0
    """Checkpoints of every n-th step are kept for good; 0: none."""
    validate_every: int = 500
    """Steps between two validations; 0: never."""
    validation_data: str = ""
    """Records for validation, as `data` of a stage; empty: none."""
    validation_image_folder: str = ""
    """Folder of the images of `validation_data`; empty: the folder that holds `validation_data`."""
    validation_batches: int = 8
    """Batches, of the stage's `batch_size`, from the first usable records; 0: all records."""
    sample_answers: int = 4
    """Answers generated for the log at each validation."""
    evaluate_every: int = 0
    """Steps between two runs of the benchmarks; 0: never."""
    evaluation_tasks: tuple[str, ...] = ()
    """Benchmarks, by their names in `--tasks` of `fusion_jax.evaluate`."""
    evaluation_data: str = ""
    """Folder with the benchmarks' data."""
    evaluation_limit: int = 100
    """Questions asked of each benchmark; 0: all."""
    max_bad_records: float = 0.01
    """Share of bad records above which the run stops."""
    max_skipped_steps: int = 20
    """Steps in a row with a loss, gradient or update that is not finite, after which the run stops."""
    decode: str = "exact"
    """`exact`: pixels as published; `fast`: large JPEGs are decoded at a reduced size (docs/performance.md)."""
    loader_threads: int = 16
    """Threads that decode images."""
    hang_minutes: float = 15.0
    """Minutes without progress after which all threads' stacks are logged; 0: never."""
    wandb_project: str = ""
    """Weights & Biases project that receives the metrics too; empty: none."""

    def __post_init__(self):
        check(len(self.stages) > 0, "config.stages is empty; give at least one stage.")
        names = [stage.name for stage in self.stages]
        check(len(set(names)) == len(names), f"config.stages: names must differ, got {', '.join(names)}.")
        for name, allowed in RUN_CHOICES.items():
            check_choice(f"config.{name}=", getattr(self, name), allowed)
        for name, (least, most) in RUN_RANGES.items():
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
