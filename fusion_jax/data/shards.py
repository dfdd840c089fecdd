"""Records that carry their images: shards that `python -m fusion_jax.shards` writes, and TensorFlow Datasets.

    SHARDS/manifest.json                         what there is: counts, sizes and hashes of all files, skipped records
    SHARDS/shard-00000-of-00611.array_record     the records
    SHARDS/text-00000-of-00611.array_record      the same without images: planning by length need not read an image

    record of a shard   4 bytes N, little-endian | N bytes of JSON in UTF-8 | the images' files, one after the other
    record of a text    those N bytes of JSON
    JSON                {"id": "7", "number": 12, "conversations": [...],
                         "images": [{"name": "a/b.jpg", "format": "JPEG", "width": 640, "height": 480, "bytes": 51234}]}

`number` is the record's place in the converted file. Files are ArrayRecord with groups of one record, uncompressed
(images are compressed already), so reading a record costs one read wherever it lies.

Opening reads the manifest and one folder listing; a shard's own index is read with its first record. Shards lie on a
local disk, in gs:// (ArrayRecord reads it; the manifest goes through gcsfs) or anywhere that fsspec reaches, s3:// for
example: each shard is then copied once, checked by its hash, to the folder in FUSION_JAX_CACHE, by default
~/.cache/fusion_jax.
"""

import functools
import hashlib
import json
import os
import re
import resource
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from fusion_jax.data.decoding import MAX_BYTES, MAX_SIDE
from fusion_jax.data.media import kind_of_key
from fusion_jax.errors import BadRecord, UserError, first_line, no_key
from fusion_jax.files import brief, open_file, parse_json, read_file, shown

FORMAT, VERSION = "fusion_jax shards", 1
MANIFEST = "manifest.json"
_MAX_MANIFEST = 1 << 28  # bytes
_LENGTH = struct.Struct("<I")
_WRITING = "group_size:1,uncompressed"
_READING = "readahead_buffer_size:0,max_parallelism:0"
_NAME = re.compile(r"[\w.+-]{1,200}\.array_record")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_TFDS = re.compile(r"tfds:([\w./=,-]+(?::\d+\.\d+\.\d+)?):(.+)")
# Open shards of a process, all sources together: a reader dropped here is opened again when it is needed.
_OPEN_READERS = max(64, min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))


class DuplicateKey(ValueError):
    """A JSON object or YAML mapping names a key twice; without this the last one would win silently."""


def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """For json's `object_pairs_hook`: the object as a dict. Raises DuplicateKey."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise DuplicateKey(f"the key {brief(key)} stands there twice")
        result[key] = value
    return result


def is_url(path: str | Path) -> bool:
    """Whether the path names a remote place, which pathlib must not touch."""
    return bool(_URL.match(str(path)))


def pack(header: Mapping[str, Any], images: Sequence[bytes] = ()) -> tuple[bytes, bytes]:
    """A record's text and its whole, as the two files store it."""
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half a surrogate pair can only be written as an escape
        text = json.dumps(header, separators=(",", ":")).encode()
    return text, b"".join([_LENGTH.pack(len(text)), text, *images])


def unpack(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """A record's JSON and its images. ValueError where the bytes are no record."""
    if len(data) < _LENGTH.size:
        raise ValueError(f"{len(data)} bytes are no record")
    at = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    header = parse_header(data[_LENGTH.size : at])
    said = at + sum(image["bytes"] for image in header["images"])
    if said != len(data):  # before anything is copied
        raise ValueError(f"the record has {len(data)} bytes and its header says {said}")
    images = []
    for image in header["images"]:
        images.append(data[at : at + image["bytes"]])
        at += image["bytes"]
    return header, images


def parse_header(text: bytes) -> dict[str, Any]:
    """A record's JSON. ValueError where it is none, or its images' sizes are no sizes."""
    header = parse_json(text, unique)
    images = header.get("images") if isinstance(header, dict) else None
    if not isinstance(images, list):
        raise ValueError("the record has no list of images")
    if type(header.get("number", 0)) is not int or not 0 <= header.get("number", 0) < 1 << 63:
        raise ValueError("the record's number is none")
    for image in images:
        if not isinstance(image, dict) or not isinstance(image.get("name"), str):
            raise ValueError("an image of the record has no name")
        for key, least, most in (("width", 1, MAX_SIDE), ("height", 1, MAX_SIDE), ("bytes", 0, MAX_BYTES)):
            if type(image.get(key)) is not int or not least <= image[key] <= most:
                raise ValueError(f"an image of the record has no {key} between {least} and {most}")
    return header


def open_writer(path: str | Path) -> ArrayRecordWriter:
    return ArrayRecordWriter(str(path), _WRITING)


def open_reader(path: str | Path) -> ArrayRecordReader:
    return ArrayRecordReader(str(path), _READING, file_reader_buffer_size=1 << 15)


class Shards:
    """The records of one folder of shards. Can be pickled; threads may share it."""

    def __init__(self, folder: str | Path):
        """Raises UserError: no such folder, no manifest or another version's, a missing or changed shard."""
        self.folder = str(folder).rstrip("/")
        manifest = read_manifest(self.folder)
        check_files(self.folder, manifest)
        self._shards = [(s["shard"], s["text"]) for s in manifest["shards"]]
        self._ends = np.cumsum([s["records"] for s in manifest["shards"]])
        # What a run is compared by when it goes on: hashes of all shards, with images and without.
        self.identity = repr([[one["sha256"], text["sha256"]] for one, text in self._shards])
        self.bytes = sum(one["bytes"] for one, _ in self._shards)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, i: int) -> tuple[dict[str, Any], list[bytes], str]:
        """The record's JSON, its images and where it lies. Raises BadRecord (corrupt_record) where it is damaged."""
        return self._read(i, 0)

    def text(self, i: int) -> tuple[dict[str, Any], list[bytes], str]:
        """The same with an empty image for each image, which is all that reading the texts alone can give."""
        return self._read(i, 1)

    def _read(self, i: int, which: int) -> tuple[dict[str, Any], list[bytes], str]:
        k = int(np.searchsorted(self._ends, i, side="right"))
        file = self._shards[k][which]
        at = i - int(self._ends[k - 1]) if k else i
        path = f"{self.folder}/{file['name']}"
        reader = _reader(path, file["bytes"], file["sha256"])
        try:
            data = reader.read([at])[0]
            header, images = unpack(data) if which == 0 else (parse_header(data), None)
        except (RuntimeError, ValueError, IndexError) as e:
            detail = f"the record is damaged ({shown(e)}); `python -m fusion_jax.shards --check` tells more"
            raise BadRecord("corrupt_record", f"{path}, record {at}", detail) from e
        return header, [b""] * len(header["images"]) if images is None else images, f"{path}, record {at}"


@functools.lru_cache(_OPEN_READERS)
def _reader(path: str, size: int, sha256: str) -> ArrayRecordReader:
    # Size and hash are part of the key: a folder written anew has other readers.
    if is_url(path) and not path.startswith("gs://"):
        path = _fetch(path, size, sha256)
    try:
        return open_reader(path)
    except (RuntimeError, ValueError, OSError) as e:
        raise UserError(f"Cannot open the shard {path}: {e}.") from e


os.register_at_fork(after_in_child=_reader.cache_clear)  # a file position must not be shared


def _fetch(url: str, size: int, sha256: str) -> str:
    """A local copy of a remote shard, named by its hash."""
    folder = Path(os.environ.get("FUSION_JAX_CACHE") or Path.home() / ".cache" / "fusion_jax") / "shards"
    target = folder / f"{sha256}.array_record"
    if target.exists() and target.stat().st_size == size:
        return str(target)
    part = folder / f"{sha256}.{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)  # a leftover, which may be a link
        fs, path = _filesystem(url)
        fs.get_file(path, str(part))
        if (found := hash_file(part)) != sha256:
            raise UserError(f"The shard {url} has changed: its hash is {found}, the manifest says {sha256}.")
        os.replace(part, target)
    except OSError as e:
        raise UserError(f"Cannot copy the shard {url} to {folder}: {e}.") from e
    finally:
        part.unlink(missing_ok=True)
    return str(target)


def hash_file(path: str | Path) -> str:
    with open_file(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as e:  # a package for this kind of place is missing, or there is none
        raise UserError(f"Cannot reach {url}: {e}.") from e


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The checked manifest of a folder of shards.

    Raises:
      UserError: no such folder, no manifest, one of another format or version, or one with absent or doubled keys.
    """
    path = f"{str(folder).rstrip('/')}/{MANIFEST}"
    try:
        if is_url(path):
            fs, name = _filesystem(path)
            text = fs.cat_file(name)
        else:
            text = read_file(path, _MAX_MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(
            f"{folder} is no folder of shards: it has no {MANIFEST}, which fusion_jax.shards writes last."
        ) from e
    except Exception as e:  # remote file systems have errors of their own
        raise UserError(f"Cannot read {path}: {e}.") from e
    try:
        manifest = parse_json(text, unique)
    except ValueError as e:
        raise UserError(f"{path} is no valid manifest: {e}.") from e
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is no manifest of shards: it lacks 'format': {FORMAT!r}.")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{path} is of version {brief(manifest.get('version'))}; this program reads version {VERSION}: "
            "convert again."
        )
    _check_manifest(manifest, path)
    return manifest


def _check_manifest(manifest: dict[str, Any], path: str) -> None:
    def need(mapping: Any, key: str, kind: type, where: str) -> Any:
        if not isinstance(mapping, dict) or key not in mapping:
            raise UserError(f"{path}: the key {key!r} is missing in {where}.")
        if type(mapping[key]) is not kind or (kind is int and not 0 <= mapping[key] < 1 << 53):
            raise UserError(f"{path}: {key!r} in {where} is no {kind.__name__}: {brief(mapping[key])}.")
        return mapping[key]

    total, names = need(manifest, "records", int, "the manifest"), set()
    counted = 0
    for k, shard in enumerate(need(manifest, "shards", list, "the manifest")):
        counted += need(shard, "records", int, f"shard {k}")
        for part in ("shard", "text"):
            where = f"{part!r} of shard {k}"
            file = need(shard, part, dict, f"shard {k}")
            name = need(file, "name", str, where)
            need(file, "bytes", int, where)
            need(file, "sha256", str, where)
            if name in names or not _NAME.fullmatch(name):
                raise UserError(f"{path}: {where} has no file name of its own: {brief(name)}.")
            names.add(name)
        # A record takes a byte and more; a count that lies would be drawn from, which takes memory.
        if shard["records"] > shard["text"]["bytes"]:
            raise UserError(f"{path}: shard {k} cannot hold {shard['records']} records in its bytes.")
    if counted != total:
        raise UserError(f"{path}: the shards hold {counted} records, the manifest says {total}.")
    if not total:
        raise UserError(f"{path}: the shards hold no records.")


def check_files(folder: str | Path, manifest: dict[str, Any]) -> None:
    """UserError for a shard that is missing or whose size is not the manifest's. One listing, however many shards."""
    try:
        if is_url(folder):
            fs, name = _filesystem(str(folder))
            sizes = {os.path.basename(f["name"].rstrip("/")): f["size"] for f in fs.ls(name, detail=True)}
        else:
            sizes = {f.name: f.stat().st_size for f in os.scandir(folder) if f.is_file()}
    except OSError as e:
        raise UserError(f"Cannot list {folder}: {e}.") from e
    for shard in manifest["shards"]:
        for file in (shard["shard"], shard["text"]):
            if file["name"] not in sizes:
                raise UserError(f"The shard {folder}/{file['name']} is missing; {MANIFEST} lists it.")
            if sizes[file["name"]] != file["bytes"]:
                raise UserError(
                    f"The shard {folder}/{file['name']} has changed: it has {sizes[file['name']]} bytes, "
                    f"{MANIFEST} says {file['bytes']}."
                )


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
          data_dir: where the prepared datasets lie; by default where TFDS puts them. Nothing is ever downloaded.
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
        """The features of the usual names. UserError for media that would be left out."""
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
        """As `Shards.read`."""
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

    text = read  # the images lie with the texts here


def _medium(feature: Any) -> str:
    """ "picture" or "other" where a feature of TFDS is one, or has one somewhere in it, by its type; else ""."""
    kind = {"Image": "picture", "LabeledImage": "picture", "Video": "other", "Audio": "other"}
    parts = feature.values() if hasattr(feature, "values") else [getattr(feature, "feature", None)]
    own = kind.get(type(feature).__name__, "")
    return own or next((inner for part in parts if part is not None and (inner := _medium(part))), "")


def _part(example: Any, name: str) -> Any:
    for step in name.split("/"):
        example = example[step] if isinstance(example, Mapping) else [one[step] for one in example]
    return example


def _plain(value: Any) -> Any:
    """Lists, dicts and texts in place of arrays and bytes."""
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
    """Conversations in any of the three ways to store them; what is none is left for the record's own check."""
    if isinstance(value, str):
        try:
            return parse_json(value)
        except ValueError:
            return value
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, row)) for row in zip(*value.values())]
    return value
