"""Computes the figures of a stage: of each data set, of the whole sample and of a step."""

from collections import Counter
from typing import Any

import numpy as np

from fusion_jax.data.planner import stage_steps
from fusion_jax.inspection.sample import Sample, StageData
from fusion_jax.inspection.steps import step_statistics

SHOWN_BAD = 3  # bad records named for each reason


def summary(data: StageData, sample: Sample) -> dict[str, Any]:
    """Returns all figures of a stage, in types that JSON can hold."""
    config, stage, source = data.config, data.stage, data.source
    records = sample.records
    parts, weights = [], []
    for i, (name, size) in enumerate(source.parts):
        of_part = _figures(data, records[records["part"] == i])
        of_part |= _bad_figures(sample, i)
        parts.append({"name": name, "records": size, "share": size / len(source), **of_part})
        weights.append(size * of_part["usable"] / max(of_part["looked_at"], 1))
    costs = [(part["flops_per_sample"] or 0.0) * weight for part, weight in zip(parts, weights)]
    for part, cost in zip(parts, costs):
        part["share_of_flops"] = cost / sum(costs) if sum(costs) else None
    in_all = {"name": "all", "records": len(source), "share": 1.0, **_figures(data, records[: sample.count])}
    in_all |= {**_bad_figures(sample, None), "share_of_flops": 1.0 if sum(costs) else None}
    per_sample = sum(costs) / sum(weights) if sum(weights) else None
    in_all["flops_per_sample"] = per_sample
    steps = stage_steps(stage, len(source), data.sizes.samples)
    planned = step_statistics(data, sample)
    if planned:
        planned |= {name: planned["samples"] * in_all[name]["mean"] for name in ("text", "supervised")}
        planned |= {"flops": planned["samples"] * per_sample, "stage_flops": steps * planned["samples"] * per_sample}
    return {
        "stage": stage.name,
        "data": stage.data,
        "max_length": stage.max_length,
        "batch_size": stage.batch_size,
        "steps": steps,
        "epochs": stage.steps * data.sizes.samples / len(source) if stage.steps else stage.epochs,
        "latent_counts": list(data.latent_counts),
        "looked_at": sample.count,
        "images_decoded_of": sum(sample.decoded.values()),
        "bad_share": _bad_share(in_all),
        "max_bad_records": config.max_bad_records,
        "parts": parts,
        "all": in_all,
        "bad_records": _bad_list(sample),
        "step": planned,
    }


def lengths(data: StageData, records: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the positions of text, of images and latents, and of both, at the largest l^2, for each usable record."""
    records = records[records["good"] > 0]
    length = records["length"] + records["rounds"] * max(data.latent_counts, default=0)
    return {"text": records["text"], "visual": length - records["text"], "length": length}


def _figures(data: StageData, records: np.ndarray) -> dict[str, Any]:
    good = records[records["good"] > 0]
    images = int(good["images"].sum())
    return {
        "looked_at": len(records),
        "usable": len(good),
        **{name: _spread(values) for name, values in lengths(data, records).items()},
        "rounds": _spread(good["answers"]),
        **{name: _spread(good[name]) for name in ("question", "supervised", "images", "crops")},
        "text_only": float((good["images"] == 0).mean()) if len(good) else None,
        "tokens_per_image": float((good["length"] - good["text"]).sum()) / images if images else None,
        "shortened": int((good["dropped"] > 0).sum()),
        "dropped_rounds": int(good["dropped"].sum()),
        "flops_per_sample": float(good["flops"].mean()) if len(good) else None,
    }


def _spread(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    median, high = np.percentile(values, (50, 95), method="nearest").tolist()
    return {"mean": float(values.mean()), "median": median, "p95": high, "max": int(values.max())}


def _bad_figures(sample: Sample, part: int | None) -> dict[str, Any]:
    """Counts the bad records of one data set, or with None those of the sample."""
    records = sample.records
    bad = records[records["part"] == part] if part is not None else records[: sample.count]
    images = sum(part in (None, p) for p, _ in sample.bad_images)
    decoded = sample.decoded[part] if part is not None else sum(sample.decoded.values())
    return {"bad": int((bad["good"] == 0).sum()), "images_decoded_of": decoded, "bad_images": images}


def _bad_share(in_all: dict[str, Any]) -> float:
    """Estimates the share of bad records: those bad by their text, and others with images as often as decoded ones."""
    by_text = in_all["bad"] / in_all["looked_at"]
    if not in_all["images_decoded_of"]:
        return by_text
    return by_text + (1 - by_text) * (1 - in_all["text_only"]) * in_all["bad_images"] / in_all["images_decoded_of"]


def _bad_list(sample: Sample) -> list[dict[str, Any]]:
    """Lists the reasons, most frequent first, each with its count and its first records."""
    reasons = []
    for seen_in, every in (("text", sample.bad), ("image", sample.bad_images)):
        for reason, count in Counter(bad.reason for _, bad in every).most_common():
            examples = [str(bad) for _, bad in every if bad.reason == reason][:SHOWN_BAD]
            reasons.append({"reason": reason, "seen_in": seen_in, "count": count, "examples": examples})
    return reasons
