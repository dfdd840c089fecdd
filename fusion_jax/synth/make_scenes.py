"""Makes the default data set: pictures of simple shapes with captions, questions and answers, and a fitting tokenizer.

    python -m fusion_jax.synth.make_scenes --out data/scenes

    data/scenes/
      manifest.json                     counts, arguments, origin and licence
      images/train/000/000000.png ...   mostly PNG, some JPEG, a thousand to a folder
      stage1.json stage1_5.json stage2.json        LLaVA records: captions, sentences, short answers
      stage1.yaml stage1_5.yaml stage2.yaml        the mixtures a training run names
      validation.json held_out.json                one question each; held_out has unseen pairs of colour and shape
      tokenizer/                                   Phi-3 form

The stages share their pictures: picture i carries a caption, a conversation in sentences and one in short answers.
Every picture has a random generator of its own, seeded by (seed, split, index), so neither the number of workers nor
their order matters.
"""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator

import tqdm
from absl import app, flags

from fusion_jax.errors import UserError
from fusion_jax.synth import questions, scenes
from fusion_jax.synth.scene.shapes import Picture
from fusion_jax.synth.tokenizer import train_tokenizer

VERSION = 3
STAGES = ("stage1", "stage1_5", "stage2")
# Later stages keep some of the earlier ones' records: a model from scratch that goes over at once undoes much of what
# its encoder has learned.
MIXTURES = {
    "stage1": {"stage1": "all"},
    "stage1_5": {"stage1_5": "all", "stage1": "random:25%", "stage2": "random:50%"},
    "stage2": {"stage2": "all", "stage1": "random:10%"},
}
TESTS = ("validation", "held_out")
PER_FOLDER = 1000
CHUNK = 50
JPEG_SHARE = 0.15
TEXT_ONLY_SHARE = 0.03
TOKENIZER_TEXTS = 20_000
SYSTEM_PROMPT = "You are a helpful AI assistant."


@dataclasses.dataclass(frozen=True)
class ScenesConfig:
    """What is made; the data depends on these values and nothing else.

    Attributes:
      seed: of everything random.
      stage1, stage1_5, stage2, validation, held_out: records in each file. The largest stage sets the number of
        training pictures.
      pixels: side of the pictures.
    """

    seed: int = 0
    stage1: int = 12_000
    stage1_5: int = 12_000
    stage2: int = 12_000
    validation: int = 240
    held_out: int = 480
    pixels: int = 96


def check_config(config: ScenesConfig) -> None:
    """Raises a `UserError` for sizes that cannot be made."""
    for name in (*STAGES, *TESTS):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} is {getattr(config, name)}: a whole number of at least 1 is needed.")
    if not 24 <= config.pixels <= 1024:
        raise UserError(f"--pixels is {config.pixels}: pictures are drawn from 24 to 1024 pixels wide.")


def make_scenes(out: str | os.PathLike, config: ScenesConfig, workers: int = 2, progress: bool = True) -> pathlib.Path:
    """Writes the data set to `out`, whole or not at all, and returns the folder; one of the same config is kept."""
    check_config(config)
    if workers < 1:
        raise UserError(f"--workers is {workers}: a whole number of at least 1 is needed.")
    out = pathlib.Path(out)
    if _is_complete(out, config):
        print(f"{out} already holds this data set; kept as it is.")
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename stays on one disk.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        building = pathlib.Path(temporary) / "data"
        building.mkdir()
        _build(building, config, workers, progress)
        if out.exists():
            out.rmdir()  # empty, or `_is_complete` would have objected
        os.replace(building, out)
    return out


def _is_complete(out: pathlib.Path, config: ScenesConfig) -> bool:
    if not out.exists():
        return False
    if not out.is_dir():
        raise UserError(f"{out} is a file; --out names a folder.")
    if not any(out.iterdir()):
        return False
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        found = manifest["version"], manifest["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{out} holds files that are not a scene data set; name a new or empty folder with --out."
        ) from None
    if found != (VERSION, dataclasses.asdict(config)):
        raise UserError(
            f"{out} holds scenes made with other arguments; name another folder with --out, or delete this one."
        )
    return True


def _build(folder: pathlib.Path, config: ScenesConfig, workers: int, progress: bool) -> None:
    records: dict[str, list[dict]] = {name: [] for name in (*STAGES, *TESTS)}
    jobs = list(_jobs(folder, config))
    total = sum(len(job[3]) for job in jobs)
    # A terminal gets a live bar; a log file a line now and then.
    slow = {} if sys.stderr.isatty() else {"mininterval": 10.0}
    with tqdm.tqdm(total=total, unit="image", desc="scenes", disable=not progress, **slow) as bar:
        for job, made in zip(jobs, _in_order(jobs, workers)):
            for name, record in made:
                records[name].append(record)
            bar.update(len(job[3]))
    records["stage2"] = _with_text_only(records["stage2"], config)

    for name, listed in records.items():
        lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in listed)
        (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    for stage in STAGES:
        parts = [
            f'  - json_path: {name}.json\n    image_folder: .\n    sampling_strategy: "{strategy}"\n'
            for name, strategy in MIXTURES[stage].items()
        ]
        (folder / f"{stage}.yaml").write_text("datasets:\n" + "".join(parts), encoding="utf-8")
    train_tokenizer(_tokenizer_texts(records), folder / "tokenizer")

    manifest = {
        "source": "fusion_jax scene generator",
        "version": VERSION,
        "licence": "Generated data, drawn by this program alone: free to use, change and share for any purpose.",
        "arguments": dataclasses.asdict(config),
        "seed": config.seed,
        "images": {"train": _train_images(config), "validation": config.validation, "held_out": config.held_out},
        "records": {name: len(listed) for name, listed in records.items()},
        "rounds_by_kind": {
            name: dict(sorted(Counter(kind for record in listed for kind in record["kinds"]).items()))
            for name, listed in records.items()
        },
        "held_out_pairs": [" ".join(pair) for pair in scenes.UNSEEN],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _train_images(config: ScenesConfig) -> int:
    return max(config.stage1, config.stage1_5, config.stage2)


Job = tuple[pathlib.Path, ScenesConfig, str, range]


def _jobs(folder: pathlib.Path, config: ScenesConfig) -> Iterator[Job]:
    """Chunks of pictures; their folders are made here, once, before the workers write into them."""
    sizes = {"train": _train_images(config), "validation": config.validation, "held_out": config.held_out}
    for split, size in sizes.items():
        for start in range(0, size, PER_FOLDER):
            (folder / _image_name(split, start, "png")).parent.mkdir(parents=True)
        for start in range(0, size, CHUNK):
            yield folder, config, split, range(start, min(size, start + CHUNK))


def _in_order(jobs: list[Job], workers: int) -> Iterator[list[tuple[str, dict]]]:
    if workers == 1 or len(jobs) == 1:
        yield from map(make_chunk, jobs)
        return
    # spawn: the caller may have started threads (JAX does), which do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as pool:
        yield from pool.imap(make_chunk, jobs)


def _image_name(split: str, index: int, ending: str) -> str:
    return f"images/{split}/{index // PER_FOLDER:03d}/{index:06d}.{ending}"


def make_chunk(job: Job) -> list[tuple[str, dict]]:
    """Draws the pictures of one chunk and returns (file, record) for all that is said about them."""
    folder, config, split, indices = job
    return [made for index in indices for made in _make_one(folder, config, split, index)]


def _make_one(folder: pathlib.Path, config: ScenesConfig, split: str, index: int) -> Iterator[tuple[str, dict]]:
    picture = Picture(config.seed, split, index)
    drawn, jpeg = picture.draw(config.pixels, JPEG_SHARE)
    name = _image_name(split, index, "jpg" if jpeg else "png")
    if jpeg:
        drawn.save(folder / name, quality=92, subsampling=0)  # full colour resolution: colour is asked about
    else:
        drawn.save(folder / name, compress_level=1)

    identity = f"{split}-{index:06d}"
    if split != "train":
        yield split, _record(identity, name, [picture.asked])
        return
    for stage, suffix in zip(STAGES, ("1", "1.5", "2")):
        if index < getattr(config, stage):
            yield stage, _record(f"{identity}-{suffix}", name, picture.rounds(stage))


def _record(identity: str, image: str | None, rounds: list[questions.Round]) -> dict:
    """One LLaVA record; the image's mark stands before the first question."""
    turns = []
    for i, asked in enumerate(rounds):
        mark = "<image>\n" if image is not None and i == 0 else ""
        turns.append({"from": "human", "value": mark + asked.question})
        turns.append({"from": "gpt", "value": asked.answer})
    shown = {} if image is None else {"image": image}
    return {"id": identity, **shown, "conversations": turns, "kinds": [asked.kind for asked in rounds]}


def _with_text_only(records: list[dict], config: ScenesConfig) -> list[dict]:
    """Puts a question without an image in the place of a few records, evenly spread."""
    every = round(1 / TEXT_ONLY_SHARE)
    mixed = list(records)
    for index in range(every - 1, len(mixed), every):
        asked = questions.text_round(random.Random(f"{config.seed}/text/{index}"))
        mixed[index] = _record(f"text-{index:06d}", None, [asked])
    return mixed


def _tokenizer_texts(records: dict[str, list[dict]]) -> list[str]:
    texts = [SYSTEM_PROMPT] * 20
    # Every name at least a few times, however small the data set.
    names = (*scenes.SHAPES, *map(questions.plural, scenes.SHAPES), *scenes.COLOURS, *scenes.WORDS, *questions.NUMBERS)
    texts += [" ".join(names)] * 3
    for stage in STAGES:
        said = (turn["value"] for record in records[stage] for turn in record["conversations"])
        texts += [text.removeprefix("<image>\n") for text in said][:TOKENIZER_TEXTS]
    return texts


def _define_flags() -> None:
    defaults = ScenesConfig()
    flags.DEFINE_string("out", None, "Folder to write.", required=True)
    flags.DEFINE_integer("seed", defaults.seed, "Seed of everything random.")
    for name in (*STAGES, *TESTS):
        flags.DEFINE_integer(name, getattr(defaults, name), f"Records in {name}.json.")
    flags.DEFINE_integer("pixels", defaults.pixels, "Side of the pictures.")
    flags.DEFINE_integer("workers", 2, "Processes that draw; does not change the result.")


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise UserError(f"{argv[1]!r} is not understood; the folder is named by --out.")
        values = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(ScenesConfig)}
        out = make_scenes(flags.FLAGS.out, ScenesConfig(**values), flags.FLAGS.workers)
    except UserError as error:
        raise SystemExit(_complain(error)) from None
    counts = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["records"]
    print(f"{out}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


def _complain(error: UserError) -> int:
    print(error, file=sys.stderr)
    return 2


if __name__ == "__main__":
    _define_flags()
    app.run(main)
