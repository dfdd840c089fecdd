"""Defines the model class through which lmms-eval runs its tasks on a checkpoint.

    pip install -e '.[lmms_eval]'
    python -m lmms_eval --model fusion_jax --model_args checkpoint=runs/a --tasks mme

lmms-eval finds the class through lmms_eval_plugin.py. Answers are greedy, end at the first `until` text and have
at most `max_new_tokens` tokens. Perplexities and conversations of several rounds are not supported.
"""

import io
from collections.abc import Sequence

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from fusion_jax.data import decoding, image
from fusion_jax.data.grey import is_deep_colour
from fusion_jax.data.sources import Record
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.inference.generate import Answerer
from fusion_jax.training.loading import load_model

_LONGEST = 1024  # tokens of an answer, where a task sets no limit


class FusionModel(lmms):
    """A checkpoint behind lmms-eval's interface for generation."""

    def __init__(self, checkpoint: str = "", batch_size: int | str = 16, device: str | None = None, **unknown):
        """Args:
          checkpoint: step folder, stage folder or workdir.
          batch_size: questions in a batch; 16 where it is not a number.
          device: ignored; lmms-eval passes it, and JAX chooses its own.

        Raises:
          UserError: there is no checkpoint, or an argument is unknown.
        """
        super().__init__()
        unknown.pop("max_batch_size", None)
        if not checkpoint or unknown:
            wrong = f"unknown: {', '.join(unknown)}; " if unknown else ""
            raise UserError(f"{wrong}give --model_args checkpoint=DIR, and batch_size=N if need be.")
        loaded = load_model(checkpoint)
        rows = int(batch_size) if str(batch_size).isdigit() else 16
        self.batch_size = rows
        self._answerer = Answerer(loaded.model, loaded.params, loaded.config, loaded.tokenizer, rows=rows)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Returns the answers in the order of the requests.

        Each batch holds requests with the same longest answer; the longest prompts come first.
        """
        order = sorted(range(len(requests)), key=lambda i: (_longest(requests[i]), -len(requests[i].args[0])))
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), desc="answers", disable=self.rank != 0) as bar:
            while order:
                length = _longest(requests[order[0]])
                batch = [i for i in order[: self.batch_size] if _longest(requests[i]) == length]
                order = order[len(batch) :]
                self._answerer.max_tokens = length
                try:
                    texts = self._answerer.answer([self._record(requests[i]) for i in batch])
                except BadRecord as bad:
                    raise UserError(f"{bad.where}: {bad.detail}.") from bad
                for i, answer in zip(batch, texts):
                    answers[i] = _cut(answer, requests[i].args[1].get("until", []))
                    self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                bar.update(len(batch))
        return [answers[i] for i in range(len(requests))]

    def _record(self, request: Instance) -> Record:
        words, _, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        where = f"{task}, document {doc_id}"
        images = tuple(_bytes(visual, where) for visual in visuals or ())
        # Tasks that choose the positions of their images write the tag themselves; for others images come first.
        if words.count("<image>") != len(images):
            words = "<image>\n" * len(images) + words.replace("<image>", "")
        return Record(str(doc_id), None, [{"from": "human", "value": words}], where, images)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise UserError("fusion_jax answers in words: choose tasks whose output_type is generate_until.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise UserError("fusion_jax answers single rounds here: choose tasks whose output_type is generate_until.")


def _longest(request: Instance) -> int:
    return int(request.args[1].get("max_new_tokens", _LONGEST))


def _cut(answer: str, until: str | Sequence[str]) -> str:
    """Returns the answer up to the first stop text."""
    for stop in [until] if isinstance(until, str) else until:
        answer = answer.split(stop)[0] if stop else answer
    return answer.strip()


def _bytes(visual: object, where: str) -> bytes:
    """Encodes an image as PNG, which keeps its pixels exactly."""
    if not isinstance(visual, Image.Image):
        raise UserError(f"{where}: fusion_jax reads images only, not {type(visual).__name__}.")
    data = io.BytesIO()
    with image.refusals(where, "the picture"):
        decoding.in_eight_bits(visual, is_deep_colour(visual)).save(data, "PNG", compress_level=1)
    return data.getvalue()
