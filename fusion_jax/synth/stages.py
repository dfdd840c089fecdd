"""Defines the stages, which process one sample at a time, in their order.

    caption -> filter -> judge -> describe -> refilter -> draw -> score -> qa -> verify -> statement
    -> rank -> (select.py)

A sample is a dict of JSON values. A stage adds keys to it or raises `Drop`, which the sample then has as
`dropped`: {stage, reason, detail, again}; later stages skip it. `again` marks what may succeed later (an endpoint that
was down). The keys, by the stage that adds them, are:

    pool       id, n, key (hash of caption and kind: the root of all its seeds), kind, stage, caption,
               origin {pool, record, source, licence}, and image, clip_score, blip_score where the pool has them
    describe   answer (by kind), descriptions, state; from the embedded backend also reading {understood, missed,
               invented, kept_share}: what the scene keeps of the caption, and what else it shows
    draw       images [{file, seed}]
    score      scores {clip, ssim_a, image}; hashes (perceptual, one per image) where duplicate images are dropped
    qa         pairs [{question, answer}], with options for multiple choice and the topic where the backend knows it;
               asked (number of pairs before verification)
    verify     pairs (the right ones), wrong, unverified
    statement  statements, where there is a scorer
    rank       scores.statement
    each       lineage {stage: {model, prompt, seed, attempts}}
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from fusion_jax.synth import filters, images
from fusion_jax.synth.backends.base import BackendError, Refused, Retryable
from fusion_jax.synth.kinds import KINDS, Ask, Kind
from fusion_jax.synth.kinds.common import JUDGE, STATEMENT, VERIFY
from fusion_jax.synth.models import Models
from fusion_jax.synth.replies import Invalid
from fusion_jax.synth.worlds.scenes.reading import complaint

Sample = dict[str, Any]


class Drop(Exception):
    """Drops the sample for this reason."""

    def __init__(self, reason: str, detail: str = "", again: bool = False):
        super().__init__(detail or reason)
        self.reason, self.again = reason, again


def make_seed(*parts: Any) -> int:
    """A 31-bit seed from the parts that name a draw: the same on every machine and in any order of the samples."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


def _ask(models: Models, sample: Sample, stage: str, ask: Ask, data: dict, where: str = "") -> tuple[dict, Any]:
    """The clean answer to a request and the reply that holds it. Raises Drop once all attempts are used up.

    Args:
      where: distinguishes the requests of one stage.
    """

    def call(seed: int, messages: list[dict]):
        if stage == "verify":
            pictures = [models.image(image["file"]) for image in sample["images"]]
            return models.vision.verify(pictures, messages, data["question"], data["answer"], seed, data)
        return models.llm.chat(messages, ask.schema, seed, stage, data)

    model = models.vision if stage == "verify" else models.llm
    # The name of an image file is a hash of what decides the image, so it represents the image in the request.
    pictures = [image["file"] for image in sample["images"]] if stage == "verify" else []
    drop, complaint = Drop("no_answer"), ""
    for attempt in range(models.config.attempts):
        seed = make_seed(models.config.seed, sample["key"], stage, where, attempt)
        messages = ask.messages(data, complaint)
        try:
            request = [messages, ask.schema, seed, pictures]
            reply = models.ask(model, stage, request, lambda s=seed, m=messages: call(s, m))
            answer = ask.read(reply.text, reply.parsed, data)
        except Refused as e:
            drop = Drop("refused", str(e))
            continue
        except Invalid as e:
            drop, complaint = Drop(e.reason, str(e)), str(e)
            continue
        except BackendError as e:
            raise Drop(e.reason, str(e), again=isinstance(e, Retryable)) from e
        origin = {"model": model.name, "settings": model.settings, "prompt": ask.version, "seed": seed}
        sample["lineage"][stage] = origin | {"attempts": attempt + 1}
        return answer, reply
    raise drop


def _filter(models: Models, sample: Sample) -> None:
    config = models.config.filters
    if fault := filters.failed(sample["caption"], config):
        raise Drop(*fault)
    if "image" in sample and "clip_score" not in sample and config.clip_min is not None and models.scorer is not None:
        try:
            image = images.open_file(sample["image"])
        except OSError as e:
            raise Drop("missing_image", str(e)) from e
        sample["clip_score"] = float(models.scorer.similarity([image], [sample["caption"]])[0, 0])
    for key, least in (("clip_score", config.clip_min), ("blip_score", config.blip_min)):
        if least is not None and sample.get(key, least) < least:
            raise Drop(key, f"{sample[key]:.4g}")


def _judge(models: Models, sample: Sample) -> None:
    if not models.config.judge:
        return
    answer, _ = _ask(models, sample, "judge", JUDGE, {"caption": sample["caption"]})
    if not answer["drawable"]:
        raise Drop("not_drawable")


def _describe(models: Models, sample: Sample) -> None:
    kind = KINDS[sample["kind"]]
    data = {"kind": kind.name, "caption": sample["caption"]}
    sample["answer"], reply = _ask(models, sample, "describe", kind.describe, data)
    sample["descriptions"] = kind.descriptions(sample["answer"])
    sample["state"] = reply.state
    # Only the embedded backend measures what it understood of a caption; the state is kept without it.
    if isinstance(reply.state, dict) and "reading" in reply.state:
        sample["reading"] = reply.state.pop("reading")
        least = models.config.filters.understood_min
        if least is not None and sample["reading"]["kept_share"] < least:
            raise Drop("too_little_understood", complaint(sample["reading"]))


def _refilter(models: Models, sample: Sample) -> None:
    for text in sample["descriptions"]:
        if fault := filters.failed(text, models.config.filters):
            raise Drop(*fault)


def _data(sample: Sample) -> dict[str, Any]:
    return {key: sample[key] for key in ("kind", "caption", "descriptions", "state")}


def _draw(models: Models, sample: Sample) -> None:
    drawn, model = [], models.generator
    for index, description in enumerate(sample["descriptions"]):
        seed = make_seed(models.config.seed, sample["key"], "draw", index)
        try:
            name = models.draw(description, seed, _data(sample) | {"index": index})
        except BackendError as e:
            raise Drop(e.reason, str(e), again=isinstance(e, Retryable)) from e
        drawn.append({"file": name, "seed": seed})
    sample["images"] = drawn
    sample["lineage"]["draw"] = {
        "model": model.name,
        "settings": model.settings,
        "seeds": [one["seed"] for one in drawn],
    }


def _score(models: Models, sample: Sample) -> None:
    config = models.config
    pictures = [models.image(image["file"]) for image in sample["images"]]
    if config.select.image_distance >= 0:
        sample["hashes"] = [f"{images.perceptual_hash(image):016x}" for image in pictures]
    sample["lineage"]["score"] = {"model": models.scorer.name if models.scorer else None}
    if config.select.image_score_min is None:
        sample["scores"] = dict.fromkeys(("ssim_a", "clip", "image"))
        return
    ssim_a = [images.ssim_a(image, config.select.ssim_scale) for image in pictures]
    clip = _clip_scores(models, pictures, sample["descriptions"], paired=True)
    values = [(clip[i] if clip else 0.0) + 0.5 * ssim_a[i] for i in range(len(pictures))]
    # For a pair of images the worse one counts.
    scores = {"ssim_a": min(ssim_a), "clip": min(clip) if clip else None, "image": min(values)}
    sample["scores"] = {key: None if value is None else round(value, 6) for key, value in scores.items()}
    if sample["scores"]["image"] < config.select.image_score_min:
        raise Drop("image_score", f"{sample['scores']['image']:.4g}")


def _clip_scores(models: Models, pictures: list, texts: list[str], paired: bool) -> list[float] | None:
    """CLIPScores, weight * max(cosine, 0), of image i with text i, or of each text with its best image."""
    if models.scorer is None:
        return None
    cosines = np.maximum(models.scorer.similarity(pictures, texts), 0) * models.config.scorer.weight
    return [float(x) for x in (np.diagonal(cosines) if paired else cosines.max(axis=0))]


def _qa(models: Models, sample: Sample) -> None:
    kind = KINDS[sample["kind"]]
    if kind.ask is None:  # the caption itself is the training text
        request = kind.turns([{"answer": ""}], make_seed(models.config.seed, sample["key"], "turns"))[0][0]
        sample["pairs"] = [{"question": request, "answer": sample["descriptions"][0]}]
    else:
        answer, reply = _ask(models, sample, "qa", kind.ask, _data(sample))
        sample["pairs"] = answer["pairs"]
        # The embedded backend knows the topics of its questions. The texts of a model are never read as topics.
        topics = reply.state.get("topics") if isinstance(reply.state, dict) else None
        for pair in sample["pairs"]:
            if isinstance(topics, dict) and pair["question"] in topics:
                pair["topic"] = topics[pair["question"]]
    sample["asked"] = len(sample["pairs"])


def _verify(models: Models, sample: Sample) -> None:
    if not models.config.verify:
        return
    kept, wrong, unverified = [], [], []
    for k, pair in enumerate(sample["pairs"]):
        data = _data(sample) | {"question": _whole_question(pair), "answer": pair["answer"]}
        try:
            answer, _ = _ask(models, sample, "verify", VERIFY, data, str(k))
        except Drop as e:
            if e.again:  # the endpoint failed, not the answer: the whole sample may be retried later
                raise
            unverified.append(pair | {"reason": e.reason})
            continue
        (kept if answer["correct"] else wrong).append(pair)
    sample |= {"pairs": kept, "wrong": wrong, "unverified": unverified}
    if not kept:
        raise Drop("no_right_answer", f"{len(wrong)} wrong, {len(unverified)} not verified")


def _whole_question(pair: dict) -> str:
    if "options" not in pair:
        return pair["question"]
    return f"{pair['question']} ({', '.join(pair['options'])})"


def _statement(models: Models, sample: Sample) -> None:
    """Requests statements, which only the scorer uses: without one, none is paid for."""
    if not models.config.scorer.path:
        return
    if KINDS[sample["kind"]].ask is None:
        sample["statements"] = list(sample["descriptions"])
    else:
        data = _data(sample) | {
            "pairs": [{"question": _whole_question(p), "answer": p["answer"]} for p in sample["pairs"]]
        }
        answer, _ = _ask(models, sample, "statement", STATEMENT, data)
        sample["statements"] = answer["statements"]


def _rank(models: Models, sample: Sample) -> None:
    """Computes the mean CLIPScore of the statements, each with the image that it fits better."""
    sample["scores"]["statement"] = None
    if models.scorer is None:
        return
    pictures = [models.image(image["file"]) for image in sample["images"]]
    scores = _clip_scores(models, pictures, sample["statements"], paired=False)
    sample["scores"]["statement"] = round(sum(scores) / len(scores), 6)


# In order; the model that a stage needs decides where a cluster runs it.
STAGES: dict[str, Callable[[Models, Sample], None]] = {
    "filter": _filter,
    "judge": _judge,
    "describe": _describe,
    "refilter": _refilter,
    "draw": _draw,
    "score": _score,
    "qa": _qa,
    "verify": _verify,
    "statement": _statement,
    "rank": _rank,
}
NEEDS: dict[str, tuple[str, ...]] = {
    "filter": (),
    "judge": ("llm",),
    "describe": ("llm",),
    "refilter": (),
    "draw": ("generator",),
    "score": ("scorer",),
    "qa": ("llm",),
    "verify": ("vision",),
    "statement": ("llm",),
    "rank": ("scorer",),
}


def run_stages(models: Models, sample: Sample, stages: list[str]) -> Sample:
    """Runs these stages on the sample, in place, and returns it. Only errors that end the run are raised."""
    for stage in stages:
        if "dropped" in sample:
            break
        try:
            STAGES[stage](models, sample)
        except Drop as e:
            detail = " ".join(str(e).split())[:300]
            sample["dropped"] = {"stage": stage, "reason": e.reason, "detail": detail, "again": e.again}
        except BackendError as e:  # for instance a damaged image of this run
            sample["dropped"] = {"stage": stage, "reason": e.reason, "detail": str(e)[:300], "again": False}
    return sample


def conversation(sample: Sample, kind: Kind, seed: int) -> list[dict[str, str]]:
    """The turns of a finished sample as training reads them, with image tags before the first question."""
    turns = kind.turns(sample["pairs"], make_seed(seed, sample["key"], "turns"))
    messages = []
    for i, (question, answer) in enumerate(turns):
        tags = "<image>\n" * kind.images if i == 0 else ""
        messages += [{"from": "human", "value": tags + question}, {"from": "gpt", "value": answer}]
    return messages
