"""Reads shards: records that carry their images, as `python -m fusion_jax.shards` writes them.

    SHARDS/manifest.json                         what there is: counts, sizes and hashes of all files, skipped records
    SHARDS/shard-00000-of-00611.array_record     the records
    SHARDS/text-00000-of-00611.array_record      the same without images: planning by length need not read an image

    record of a shard   4 bytes N, little-endian | N bytes of JSON in UTF-8 | the images' files, one after the other
    record of a text    those N bytes of JSON
    JSON                {"id": "7", "number": 12, "conversations": [...],
                         "images": [{"name": "a/b.jpg", "format": "JPEG", "width": 640, "height": 480, "bytes": 51234}]}

`number` is the record's place in the converted file. Files are ArrayRecord with groups of one record, uncompressed
(images are compressed already), so reading a record costs one read wherever it is.

Opening reads the manifest and one folder listing; a shard's own index is read with its first record. Shards are on a
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from fusion_jax.data.decoding import MAX_BYTES, MAX_SIDE
from fusion_jax.data.json_records import unique
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.files import brief, open_file, parse_json, read_file, shown

FORMAT, VERSION = "fusion_jax shards", 1
FORMAT, VERSION = "fusion_jax shards", 1
MANIFEST = "manifest.json"
_MAX_MANIFEST = 1 << 28  # bytes
_LENGTH = struct.Struct("<I")
_WRITING = "group_size:1,uncompressed"
_READING = "readahead_buffer_size:0,max_parallelism:0"
_NAME = re.compile(r"[\w.+-]{1,200}\.array_record")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
# Open shards of a process, all sources together: a reader dropped here is opened again when it is needed.
_OPEN_READERS = max(64, min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))


def is_url(path: str | Path) -> bool:
    """Returns whether the path names a remote place, which pathlib must not touch."""
    return bool(_URL.match(str(path)))


def pack(header: Mapping[str, Any], images: Sequence[bytes] = ()) -> tuple[bytes, bytes]:
    """Returns a record's text and the whole record, as the two files store them."""
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half a surrogate pair can only be written as an escape
        text = json.dumps(header, separators=(",", ":")).encode()
    return text, b"".join([_LENGTH.pack(len(text)), text, *images])


def unpack(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Reads a record's JSON and its images. Raises ValueError if the bytes are not a record."""
    if len(data) < _LENGTH.size:
        raise ValueError(f"{len(data)} bytes are not a record")
    at = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    header = parse_header(data[_LENGTH.size : at])
    expected = at + sum(image["bytes"] for image in header["images"])
    if expected != len(data):  # checked before anything is copied
        raise ValueError(f"the record has {len(data)} bytes and its header says {expected}")
    images = []
    for image in header["images"]:
        images.append(data[at : at + image["bytes"]])
        at += image["bytes"]
    return header, images


def parse_header(text: bytes) -> dict[str, Any]:
    """Reads a record's JSON. Raises ValueError if it is not that of a record, or an image has no valid size."""
    header = parse_json(text, unique)
    images = header.get("images") if isinstance(header, dict) else None
    if not isinstance(images, list):
        raise ValueError("the record has no list of images")
    if type(header.get("number", 0)) is not int or not 0 <= header.get("number", 0) < 1 << 63:
        raise ValueError("the record's number is not a whole number from 0")
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
        """Raises UserError if folder, manifest or a shard is missing, of another version, or changed."""
        self.folder = str(folder).rstrip("/")
        manifest = read_manifest(self.folder)
        check_files(self.folder, manifest)
        self._shards = [(s["shard"], s["text"]) for s in manifest["shards"]]
        self._ends = np.cumsum([s["records"] for s in manifest["shards"]])
        # Compared when a run continues: hashes of all shards, with images and without.
        self.identity = repr([[one["sha256"], text["sha256"]] for one, text in self._shards])
        self.bytes = sum(one["bytes"] for one, _ in self._shards)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, i: int) -> tuple[dict[str, Any], list[bytes], str]:
        """Reads a record's JSON, its images and where it is. Raises BadRecord (corrupt_record) if it is damaged."""
        return self._read(i, 0)

    def text(self, i: int) -> tuple[dict[str, Any], list[bytes], str]:
        """Reads the same with an empty image for each image, which is all that the texts alone can give."""
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
            detail = f"the record is damaged ({shown(e)}); `python -m fusion_jax.shards --check` lists all damage"
            raise BadRecord("corrupt_record", f"{path}, record {at}", detail) from e
        return header, [b""] * len(header["images"]) if images is None else images, f"{path}, record {at}"


@functools.lru_cache(_OPEN_READERS)
def _reader(path: str, size: int, sha256: str) -> ArrayRecordReader:
    # Size and hash are part of the key, so that a rewritten folder gets new readers.
    if is_url(path) and not path.startswith("gs://"):
        path = _fetch(path, size, sha256)
    try:
        return open_reader(path)
    except (RuntimeError, ValueError, OSError) as e:
        raise UserError(f"Cannot open the shard {path}: {e}.") from e


os.register_at_fork(after_in_child=_reader.cache_clear)  # a file position must not be shared


def _fetch(url: str, size: int, sha256: str) -> str:
    """Returns a local copy of a remote shard, named by its hash."""
    folder = _cache_folder()
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


def local_copy(path: str) -> str:
    """Returns the path of a file beside shards, or for a URL that of a copy, which its name must identify.

    Raises:
      FileNotFoundError: there is none. UserError: it cannot be copied.
    """
    if not is_url(path):
        return path
    target = _cache_folder() / path.rsplit("/", 1)[1]
    if not target.exists():
        fs, name = _filesystem(path)
        part = target.with_suffix(f".{os.getpid()}.part")
        try:
            data = fs.cat_file(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            os.replace(part, target)
        except FileNotFoundError:
            raise
        except OSError as e:
            raise UserError(f"Cannot copy {path} to {target.parent}: {e}.") from e
    return str(target)


def _cache_folder() -> Path:
    return Path(os.environ.get("FUSION_JAX_CACHE") or Path.home() / ".cache" / "fusion_jax") / "shards"


def hash_file(path: str | Path) -> str:
    with open_file(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as e:  # the package for this kind of place is missing, or no such kind exists
        raise UserError(f"Cannot reach {url}: {e}.") from e


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Reads and checks the manifest of a folder of shards.

    Raises:
      UserError: no such folder, no manifest, one of another format or version, or one with missing or duplicate keys.
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
            f"{folder} is not a folder of shards: it has no {MANIFEST}, which fusion_jax.shards writes last."
        ) from e
    except Exception as e:  # remote file systems have errors of their own
        raise UserError(f"Cannot read {path}: {e}.") from e
    try:
        manifest = parse_json(text, unique)
    except ValueError as e:
        raise UserError(f"{path} is not a valid manifest: {e}.") from e
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not a manifest of shards: it lacks 'format': {FORMAT!r}.")
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
            raise UserError(f"{path}: {key!r} in {where} is not of type {kind.__name__}: {brief(mapping[key])}.")
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
                raise UserError(f"{path}: {where} has no valid and unique file name: {brief(name)}.")
            names.add(name)
        # A record takes a byte at least; a false count would cost memory, as records are drawn from it.
        if shard["records"] > shard["text"]["bytes"]:
            raise UserError(f"{path}: shard {k} cannot hold {shard['records']} records in its bytes.")
    if counted != total:
        raise UserError(f"{path}: the shards hold {counted} records, the manifest says {total}.")
    if not total:
        raise UserError(f"{path}: the shards hold no records.")


def check_files(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Raises UserError if a shard is missing or has another size than in the manifest. Lists the folder only once."""
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
