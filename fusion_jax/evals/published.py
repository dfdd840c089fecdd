"""Lists the figures published for models of this family, and how they were measured.

Those of FLARE are from the paper's comparison (ICLR 2026), those of FUSION from the table of the released code
(github.com/starriver030515/FUSION, README of April 2025), which arXiv 2504.09925 describes. Most were measured with
lmms-eval; CV-Bench, MMVP and TextVQA were measured with the code's own scripts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FLARE = ("FLARE-L 3B", "FLARE-X 3B", "FLARE-X 8B")
FUSION = ("FUSION 3B", "FUSION-X 3B", "FUSION-L 3B", "FUSION 8B", "FUSION-X 8B", "FUSION-L 8B")
MODELS = (*FLARE, *FUSION)
# Visual tokens in the language model, in the order of MODELS; a mean over the benchmarks where resolution is dynamic.
TOKENS = (630, 1400, 1400, 780, 620, 308, 780, 620, 308)
_NOT_THERE = (None, None, None)


@dataclass(frozen=True)
class Row:
    """One column of the published tables.

    Attributes:
      title: the benchmark. task, figure: our task and its figure that measure the same.
      values: one for each of MODELS, in the units of `figure`; None where nothing was published.
      measured: how the published values were measured, and where ours are measured differently.
    """

    title: str
    task: str
    figure: str
    values: tuple[float | None, ...]
    measured: str

    def own(self, tasks: Mapping[str, Mapping[str, Any]]) -> tuple[float | None, str, str]:
        """Our own value, by the published rule where there is one, and the names of its task and figure.

        Args:
          tasks: figures by task; those by the published rule belong to a task NAME_published, or have the rule in their
            own names.
        """
        for task in (f"{self.task}_published", self.task):
            for figure in (f"{self.figure} (rule=published)", self.figure):
                value = tasks.get(task, {}).get(figure)
                if isinstance(value, int | float):
                    return float(value), task, figure
        return None, self.task, self.figure


def _row(title: str, task: str, figure: str, flare: tuple, fusion: tuple, measured: str) -> Row:
    assert len(flare) == len(FLARE) and len(fusion) == len(FUSION)
    return Row(title, task, figure, (*flare, *fusion), measured)


_LMMS = "lmms-eval"
ROWS = (
    _row(
        "MMBench-EN", "mmbench_en_dev", "circular",
        (79.6, 81.4, 83.6), (79.5, 80.3, 77.6, 80.5, 82.0, 80.0),
        f"{_LMMS}; dev or test split is not said, here dev",
    ),
    _row(
        "MMBench-CN", "mmbench_cn_dev", "circular",
        _NOT_THERE, (71.7, 74.8, 70.8, 74.9, 76.2, 73.6),
        f"{_LMMS}; dev or test split is not said, here dev",
    ),
    _row(
        "VizWiz", "vizwiz", "accuracy",
        _NOT_THERE, (64.6, 66.1, 65.3, 59.5, 62.9, 59.9),
        f"{_LMMS}; val or test split is not said, here val",
    ),
    _row(
        "POPE", "pope", "f1",
        (88.8, 88.6, 89.1), (88.9, 88.7, 88.3, 89.3, 88.8, 88.5),
        f"{_LMMS}; F1 or accuracy is not said, here F1, the mean of three splits",
    ),
    _row(
        "MM-Vet", "mmvet", "total",
        (59.1, 61.9, 62.8), (57.2, 60.3, 56.7, 60.0, 60.0, 57.3),
        "graded by a judge; another judge gives other figures",
    ),
    _row(
        "MME perception", "mme", "perception",
        _NOT_THERE, (1595.9, 1582.1, 1573.7, 1592.3, 1607.5, 1601.7),
        f"{_LMMS}; points, of 2000",
    ),
    _row(
        "MME cognition", "mme", "cognition",
        _NOT_THERE, (416.5, 440.0, 406.8, 396.1, 337.2, 338.9),
        f"{_LMMS}; points, of 800",
    ),
    _row(
        "SEED-Bench image", "seed_image", "accuracy",
        (74.2, 76.3, 78.7), (74.6, 75.3, 74.1, 77.2, 78.2, 75.9),
        f"{_LMMS}; questions about images alone",
    ),
    _row(
        "HallusionBench", "hallusion_bench", "aAcc_images_only",
        _NOT_THERE, (51.4, 51.9, 48.7, 52.6, 51.4, 46.7),
        f"{_LMMS}, image split; aAcc or the mean with fAcc and qAcc is not said, here aAcc of questions with a picture",
    ),
    _row(
        "LLaVA-Bench (Wild)", "llava_wild", "relative",
        _NOT_THERE, (84.7, 85.2, 77.6, 86.9, 88.0, 82.1),
        "graded by a judge; another judge gives other figures",
    ),
    _row(
        "MMStar", "mmstar", "average",
        _NOT_THERE, (52.4, 50.9, 44.7, 52.4, 52.7, 49.3),
        f"{_LMMS}; its mean over the finer categories",
    ),
    _row(
        "MME-RealWorld", "mme_realworld", "accuracy",
        _NOT_THERE, (41.5, 41.7, 39.5, 46.0, 44.7, 42.3),
        f"{_LMMS}; the whole in English, by the figures of other models in that table",
    ),
    _row(
        "RealWorldQA", "realworldqa", "accuracy",
        _NOT_THERE, (65.1, 63.7, 61.8, 65.2, 66.1, 65.1),
        _LMMS,
    ),
    _row(
        "CV-Bench", "cv_bench", "accuracy",
        (78.2, 80.1, 81.5), (76.4, 78.3, 76.2, 78.7, 79.2, 78.2),
        "the released script; mean of 2D and 3D",
    ),
    _row(
        "MMVP", "mmvp", "accuracy",
        _NOT_THERE, (76.0, 78.1, 77.0, 78.7, 79.9, 76.7),
        "the released script, which counts single questions, not the benchmark's pairs",
    ),
    _row(
        "AI2D", "ai2d", "accuracy",
        (79.4, 81.2, 83.6), (78.9, 79.2, 77.3, 80.4, 81.4, 79.2),
        f"{_LMMS}; pictures with masked labels",
    ),
    _row(
        "MathVista", "mathvista", "accuracy",
        _NOT_THERE, (54.3, 54.9, 48.6, 56.6, 59.4, 55.2),
        f"{_LMMS}, testmini, answers extracted by a judge; without one here by rules",
    ),
    _row(
        "MMMU", "mmmu", "accuracy",
        _NOT_THERE, (44.7, 44.2, 43.4, 43.1, 42.2, 41.8),
        f"{_LMMS}; validation split",
    ),
    _row(
        "ScienceQA", "scienceqa", "image_accuracy",
        _NOT_THERE, (87.1, 87.3, 85.6, 89.2, 90.3, 88.3),
        f"{_LMMS}; all questions or those with a picture is not said, here those with a picture",
    ),
    _row(
        "TextVQA", "textvqa", "accuracy",
        (73.3, 77.2, 79.7), (71.8, 73.9, 71.4, 77.3, 74.7, 72.8),
        "the released script, with OCR tokens in the prompt; here without, but by rule=published",
    ),
    _row(
        "OCRBench", "ocrbench", "accuracy",
        _NOT_THERE, (60.0, 63.7, 56.9, 63.8, 66.6, 59.5),
        f"{_LMMS}; percent of the 1000 questions",
    ),
    _row(
        "ChartQA", "chartqa", "relaxed_accuracy",
        _NOT_THERE, (75.7, 75.8, 67.7, 80.3, 79.8, 73.0),
        f"{_LMMS}; human and augmented questions together",
    ),
    _row(
        "DocVQA", "docvqa", "anls",
        _NOT_THERE, (70.9, 71.1, 63.5, 78.6, 77.8, 66.0),
        f"{_LMMS}; val or test split is not said, here val",
    ),
)  # fmt: skip

# Number of questions in a task's whole split, so that a part of it is recognised; several numbers are those of several
# releases. They were counted in the files on the hub in 2026.
SIZES: dict[str, tuple[int, ...]] = {
    "pope": (9000, 8910), "mmvet": (218,), "textvqa": (5000,), "ai2d": (3088,), "cv_bench": (2638,), "mmvp": (300,),
    "mme": (2374,), "scienceqa": (4241, 2017), "chartqa": (2500,), "docvqa": (5349,), "docvqa_test": (5188,),
    "infovqa": (2801,), "infovqa_test": (3288,), "ocrbench": (1000,), "mmmu": (900,), "mmmu_test": (10500,),
    "mmstar": (1500,), "realworldqa": (765,), "vizwiz": (4319,), "vizwiz_test": (8000,), "mathvista": (1000,),
    "llava_wild": (60,), "mme_realworld": (23609,), "mme_realworld_cn": (5917,), "mme_realworld_lite": (1919,),
}  # fmt: skip


def part(task: str, questions: int) -> str:
    """`8 of 9000` where a task's data are not the whole of a release, else ""."""
    sizes = SIZES.get(task.removesuffix("_published"), (questions,))
    return "" if questions in sizes else f"{questions} of {' or '.join(map(str, sizes))}"
