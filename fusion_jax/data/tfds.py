"""Reads the records of a split that TensorFlow Datasets has prepared with random access."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusion_jax.data.media import kind_of_key
from fusion_jax.data.shards import is_url
from fusion_jax.errors import BadRecord, UserError, first_line, no_key
from fusion_jax.files import parse_json, shown

_TFDS = re.compile(r"tfds:([\w./=,-]+(?::\d+\.\d+\.\d+)?):(.+)")


class TfdsRecords:
    """The records of one split of a dataset that TensorFlow Datasets has prepared in a format with random access."""

    def __init__(
        self,
        spec: str,
        data_dir: str | Path | None = None,
        features: Mapping[str, str] | None = None,
        prompt: str | None = None,
    ):
        """
        Args:
          spec: `tfds:name[/config][:version]:split`, the split with or without a slice, as in `train[:10%]`.
          data_dir: where the prepared datasets are; by default where TFDS puts them. Nothing is ever downloaded.
          features: which feature is the `image` (one or several), the `conversations` (pairs of from and value, or
            JSON) or the `text` that answers `prompt`, the `id` and the `system` text. Parts of a feature are named
            `captions/text`; of several texts the first counts. By default features of these names, `messages` for the
            conversations, `caption` for the text, and for the image another key that names images in a record.
          prompt: the question that a `text` answers.

        Raises:
          UserError: no such dataset, split or feature, a dataset that is not prepared, or a file that is missing.
        """
        match = _TFDS.fullmatch(spec)
        if match is None:
            raise UserError(f"Cannot read {spec!r}; expected tfds:name[/config][:version]:split.")
        import tensorflow_datasets as tfds

        self.spec, self.prompt = spec, prompt
        try:
            source = tfds.data_source(match[1], split=match[2], data_dir=data_dir, download=False)
        except Exception as e:  # names, versions, splits, formats: each has an exception of its own
            place = f" in {data_dir}" if data_dir is not None else ""
            raise UserError(
                f"Cannot open {spec}{place}: {first_line(e)} Prepare it first, in a format with random access: "
                f"`tfds build {match[1]} --file_format=array_record`."
            ) from e
        known = source.dataset_info.features
        self.features = self._choose(features, known)
        for file in getattr(source.data_source, "paths", None) or getattr(source.data_source, "_paths", ()):
            if not is_url(file) and not os.path.exists(file):
                raise UserError(f"{spec}: the shard {file} is missing.")
        image = self.features.get("image")
        # The image's own bytes: it is decoded like every other image of the program.
        skip = tfds.decode.SkipDecoding()
        skip.decode_batch_example_np = list  # for several images in a feature; TFDS has it for TensorFlow only
        for name in reversed(image.split("/")) if image else ():
            skip = {name: skip}
        self._source = source.__class__(source.dataset_info, split=match[2], decoders=skip if image else None)
        self.identity = repr((source.dataset_info.full_name, match[2], sorted(self.features.items()), self.prompt))
        self.bytes = int(getattr(source.dataset_info, "dataset_size", 0) or 0)

    def __len__(self) -> int:
        return len(self._source)

    def _by_name(self, known: Mapping[str, Any]) -> dict[str, str]:
        """Returns the features of the usual names. Raises UserError if media would be left out."""
        chosen = {name: name for name in ("id", "image", "conversations", "text", "system") if name in known}
        if "caption" in known and "text" not in chosen:
            chosen["text"] = "caption"
        if "messages" in known and "conversations" not in chosen:
            chosen["conversations"] = "messages"
        if "conversations" in chosen:
            chosen.pop("text", None)
        if "image" not in chosen and (images := [name for name in known if kind_of_key(name) == "images"]):
            chosen["image"] = images[0]
        for name in known.keys() - set(chosen.values()):
            kind = kind_of_key(name, "image" in chosen) or _medium(known[name])
            if kind == "other" or (kind and "image" not in chosen):
                raise UserError(
                    f"{self.spec} has the feature {name!r}, which is not read; say in `features` what is to be read."
                )
        return chosen

    def _choose(self, features: Mapping[str, str] | None, known: Mapping[str, Any]) -> dict[str, str]:
        chosen = dict(features or self._by_name(known))
        allowed = ("id", "image", "conversations", "text", "system")
        for name, feature in chosen.items():
            if name not in allowed:
                raise no_key(f"{self.spec}: features", shown(name), allowed)
            if not isinstance(feature, str) or feature.split("/")[0] not in known:
                raise UserError(
                    f"{self.spec} has no feature {feature!r} for {name}; it has {', '.join(sorted(known))}."
                )
        if ("conversations" in chosen) == ("text" in chosen):
            raise UserError(
                f"{self.spec}: name the feature with the conversations, or the one with the text, in `features`; "
                f"it has {', '.join(sorted(known))}."
            )
        if ("text" in chosen) != (self.prompt is not None) and "text" not in chosen:
            raise UserError(f"{self.spec}: `prompt` belongs to a `text`, not to conversations.")
        self.prompt = "Describe the image briefly." if "text" in chosen and self.prompt is None else self.prompt
        return chosen

    def read(self, i: int) -> tuple[dict[str, Any], list[bytes], str]:
        """Reads a record as `Shards.read` does."""
        where = f"{self.spec}, record {i}"
        try:
            example = self._source[i]
        except Exception as e:  # protocol buffers, ArrayRecord and feature decoders each raise their own
            raise BadRecord("corrupt_record", where, f"the record is damaged ({e})") from e
        image = _part(example, self.features["image"]) if "image" in self.features else b""
        images = [image] if isinstance(image, bytes) else list(image)
        images = [bytes(one) for one in images if one]
        header = {"number": i, "images": [{"name": f"{i}-{k}" if k else str(i)} for k in range(len(images))]}
        if "id" in self.features:
            header["id"] = str(_plain(_part(example, self.features["id"])))
        if "system" in self.features:
            header["system"] = _plain(_part(example, self.features["system"]))
        if "conversations" in self.features:
            header["conversations"] = _turns(_plain(_part(example, self.features["conversations"])))
        else:
            text = _plain(_part(example, self.features["text"]))
            while isinstance(text, list):
                text = text[0] if text else ""
            question = "\n".join(["<image>"] * len(images) + [self.prompt])
            header["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": text}]
        return header, images, where

    text = read  # the images are stored with the texts here


def _medium(feature: Any) -> str:
    """Returns "picture" or "other" if by its type a feature of TFDS is one, or has one somewhere in it; else ""."""
    kind = {"Image": "picture", "LabeledImage": "picture", "Video": "other", "Audio": "other"}
    parts = feature.values() if hasattr(feature, "values") else [getattr(feature, "feature", None)]
    own = kind.get(type(feature).__name__, "")
    return own or next((inner for part in parts if part is not None and (inner := _medium(part))), "")


def _part(example: Any, name: str) -> Any:
    for step in name.split("/"):
        example = example[step] if isinstance(example, Mapping) else [one[step] for one in example]
    return example


def _plain(value: Any) -> Any:
    """Returns lists, dicts and texts in place of arrays and bytes."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def _turns(value: Any) -> Any:
    """Reads conversations stored in any of three ways; anything else is left for the record's own check."""
    if isinstance(value, str):
        try:
            return parse_json(value)
        except ValueError:
            return value
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, row)) for row in zip(*value.values())]
    return value
