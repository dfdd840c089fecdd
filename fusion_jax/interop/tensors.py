"""Reads and writes tensors in Hugging Face folders, one at a time.

    model.safetensors                              or     model.safetensors.index.json
                                                          model-00001-of-00002.safetensors ...

`TensorFolder` locates every tensor without loading any. `TensorWriter` lays out all files first and fills them through
memory maps in any order, so that neither ever holds more than one tensor.
"""

import json
import math
import mmap
import os
import re
import threading
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from fusion_jax.errors import UserError, check, first_line
from fusion_jax.files import brief, shown
from fusion_jax.values.foreign import read_object

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_NAMES = {code: name for name, code in _CODES.items()}
# The largest models have some 100,000 tensors; reading a header takes up to twenty times its size in memory.
_MOST_TENSORS = 1 << 18
_MOST_HEADER_BYTES = 1 << 24
_MOST_INDEX_BYTES = 1 << 26

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor's file, shape and dtype (a key of `DTYPES`, or the file's own code for other types)."""

    file: Path
    shape: Shape
    dtype: str


class TensorFolder:
    """The tensors of a folder: one safetensors file, or several with an index.

    Attributes:
      folder: the path. entries: tensor name to `Entry`.
    """

    def __init__(self, folder: str | Path, allow_pickle: bool = False):
        """Reads the headers.

        Args:
          folder: holds model.safetensors or model.safetensors.index.json.
          allow_pickle: whether to accept pytorch_model.bin, too (needs PyTorch; reads only tensors and runs no code).

        Raises:
          UserError: there are no weights, a shard is absent or damaged, or the index disagrees with its shards.
        """
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        self._pickled: dict[str, object] = {}
        self._local = threading.local()  # one reader per thread
        check(self.folder.is_dir(), f"There is no folder {self.folder}.")
        for name in ("model.safetensors", "model.safetensors.index.json"):
            path = self.folder / name
            check(
                path.is_file() or not os.path.lexists(path), f"{path} is not a regular file, or is a link to nothing."
            )
        single, pickled = self.folder / "model.safetensors", self.folder / "pytorch_model.bin"
        index = self.folder / "model.safetensors.index.json"
        if single.is_file():
            self._add(single)
        elif index.is_file():
            for file, names in _shards(index, ".safetensors").items():
                self._add(self.folder / file)
                absent = [name for name in names if self.entries.get(name, Entry(index, (), "")).file.name != file]
                check(not absent, f"{index} places {list(map(shown, absent[:1]))} in {file}, which does not hold it.")
        elif pickled.is_file() or Path(f"{pickled}.index.json").is_file():
            check(
                allow_pickle,
                f"{self.folder} holds only pickled weights (pytorch_model.bin); convert them to safetensors, or "
                "give --allow_pickle to read them without running code in them.",
            )
            self._add_pickled(pickled)
        else:
            raise UserError(f"{self.folder} has neither model.safetensors nor model.safetensors.index.json.")

    def _add(self, file: Path) -> None:
        check(os.path.lexists(file), f"{file} is missing, though the index of its folder names it.")
        check(file.is_file(), f"{file} is not a regular file, or is a link to nothing.")
        try:
            with file.open("rb") as opened:
                header = int.from_bytes(opened.read(8), "little")
            check(
                header <= min(_MOST_HEADER_BYTES, file.stat().st_size),
                f"{file} is damaged or cut short: it claims a header of {header:,} bytes.",
            )
            with safe_open(file, "numpy") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    code = part.get_dtype()
                    self._enter(name, Entry(file, tuple(part.get_shape()), _NAMES.get(code, code)))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or cut short: {first_line(error)}.") from error

    def _enter(self, name: str, entry: Entry) -> None:
        check(name not in self.entries, f"{entry.file} holds {shown(name)}, which another shard holds, too.")
        check(len(entry.shape) <= 8, f"{entry.file}: {shown(name)} has {len(entry.shape)} dimensions.")
        check(len(self.entries) < _MOST_TENSORS, f"{self.folder} holds more than {_MOST_TENSORS:,} tensors.")
        self.entries[name] = entry

    def _add_pickled(self, file: Path) -> None:
        try:
            import torch
        except ImportError as error:
            raise UserError("Reading pickled weights needs PyTorch: pip install -e '.[torch]'.") from error
        index = Path(f"{file}.index.json")
        files = [file] if file.is_file() else [self.folder / shard for shard in _shards(index, ".bin")]
        for path in files:
            check(os.path.lexists(path), f"{path} is missing, though {index} names it.")
            check(path.is_file(), f"{path} is not a regular file, or is a link to nothing.")
            _check_stored(path)
            try:
                loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # torch raises errors of many classes
                reason = first_line(error)
                raise UserError(f"{path} cannot be read as tensors without running code: {reason}") from error
            check(
                isinstance(loaded, dict)
                and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in loaded.items()),
                f"{path} holds values that are not named tensors.",
            )
            for name, tensor in loaded.items():
                self._enter(name, Entry(path, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")))
                # A view can have any size over a single stored number.
                check(
                    tensor.layout == torch.strided
                    and tensor.device.type == "cpu"
                    and tensor.nbytes <= tensor.untyped_storage().nbytes(),
                    f"{path}: {shown(name)} is not a tensor whose numbers all lie in the file.",
                )
                self._pickled[name] = tensor.detach()

    def get(self, name: str) -> np.ndarray:
        """One tensor, in its own dtype; safe to call from several threads."""
        entry = self.entries[name]
        check(entry.dtype in DTYPES, f"{entry.file}: {name} has type {entry.dtype}; allowed: {', '.join(DTYPES)}.")
        if name in self._pickled:
            tensor = self._pickled[name]
            try:
                if entry.dtype == "bfloat16":  # NumPy itself has no such type
                    import torch

                    return tensor.contiguous().view(torch.uint16).numpy().view(DTYPES["bfloat16"])
                return tensor.numpy()
            except (RuntimeError, TypeError) as error:
                raise UserError(f"{entry.file}: {shown(name)} cannot be read: {first_line(error)}.") from error
        readers = self._local.__dict__.setdefault("readers", {})
        try:
            if entry.file not in readers:
                readers[entry.file] = safe_open(entry.file, "numpy").__enter__()
            tensor = readers[entry.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{entry.file}: {name} cannot be read: {first_line(error)}.") from error
        check(tensor.shape == entry.shape, f"{entry.file} has changed since its header was read: {name}.")
        return tensor


def assign(into: np.ndarray, part: np.ndarray, name: str) -> None:
    """Assigns with a cast. Raises UserError where a number becomes infinite (float16 ends at 65504)."""
    if into.dtype == part.dtype and into.dtype.itemsize == 2:
        # NumPy copies its own types faster than registered ones such as bfloat16.
        into.view(np.uint16)[...] = part.view(np.uint16)
        return
    with np.errstate(over="ignore"):  # checked below
        into[...] = part
    if into.dtype == np.float16:
        check(bool(np.isfinite(into).all()), f"{name} has numbers beyond the range of float16; choose another --dtype.")


def _shards(index: Path, ending: str) -> dict[str, list[str]]:
    """Tensor names by file name, from an index. Raises UserError unless file names are plain and have that ending."""
    try:
        placed = read_object(index, _MOST_INDEX_BYTES).get("weight_map")
    except UserError as error:
        raise UserError(f"{index} is not a valid index of shards: it {str(error).removeprefix(f'{index} ')}") from error
    check(isinstance(placed, dict), f"{index} is not a valid index of shards: weight_map must be an object.")
    files: dict[str, list[str]] = {}
    for name, file in placed.items():
        plain = isinstance(file, str) and re.fullmatch(r"[\w-][\w.-]{0,200}", file, re.ASCII) is not None
        check(
            plain and file.endswith(ending), f"{index}: {brief(file)} is not a plain file name that ends in {ending}."
        )
        files.setdefault(file, []).append(name)
    check(bool(files), f"{index} is not a valid index of shards: weight_map is empty.")
    return files


def _check_stored(file: Path) -> None:
    """Raises UserError for a zip file with compressed entries or more bytes in entries than in the file."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"{file} cannot be read as tensors without running code: it is not a PyTorch zip file "
            f"({first_line(error)})."
        ) from error
    check(
        all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        and sum(entry.file_size for entry in entries) <= file.stat().st_size,
        f"{file} is compressed, or claims more bytes than it has; PyTorch writes no such files.",
    )


class TensorWriter:
    """Writes tensors of known shapes into safetensors files of at most `shard_bytes`, in any order.

    Raises:
      UserError: the disk has no room (seen before anything is written).
    """

    def __init__(self, folder: Path, tensors: Mapping[str, tuple[Shape, str]], shard_bytes: int = 5 * 10**9):
        self._maps: dict[str, np.ndarray] = {}
        sizes = {name: _bytes(shape, dtype) for name, (shape, dtype) in tensors.items()}
        shards = _divide(sizes, shard_bytes)
        placed = {}
        for number, names in enumerate(shards, 1):
            one = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = folder / (one if len(shards) > 1 else "model.safetensors")
            placed |= dict.fromkeys(names, file.name)
            self._lay_out(file, {name: tensors[name] for name in names})
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(placed.items()))}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _lay_out(self, file: Path, tensors: Mapping[str, tuple[Shape, str]]) -> None:
        """Writes the header and maps the tensors.

        The format is eight bytes with the header's length, the header as JSON, and the tensors one after the other.
        """
        header: dict = {"__metadata__": {"format": "pt"}}
        end = 0
        # Wide dtypes come first, so that each tensor starts at a multiple of its item size.
        for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: -DTYPES[item[1][1]].itemsize):
            start, end = end, end + _bytes(shape, dtype)
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        first = 8 + len(text)
        buffer = allocate(file, first + end)
        buffer[:first] = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
        for name, (shape, dtype) in tensors.items():
            start, stop = (first + offset for offset in header[name]["data_offsets"])
            self._maps[name] = buffer[start:stop].view(DTYPES[dtype]).reshape(shape)

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor as a view of its file, to be filled."""
        return self._maps[name]


def _bytes(shape: Shape, dtype: str) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def _divide(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def allocate(file: Path, size: int) -> np.ndarray:
    """Makes a file of `size` bytes, with its disk space reserved, and maps it as writable uint8.

    Pages of a map do not count as the process's memory, and the kernel drops them when necessary. Without the
    reservation a full disk would end the process by a signal in the middle of an assignment.
    """
    with open(file, "wb+") as opened:
        try:
            os.posix_fallocate(opened.fileno(), 0, max(size, 1))
        except OSError as error:
            raise UserError(f"{size / 1e9:.2f} GB cannot be reserved in {file.parent}: {error.strerror}.") from error
        return np.frombuffer(mmap.mmap(opened.fileno(), max(size, 1)), np.uint8)[:size]


def size_of(tensors: Iterable[tuple[Shape, str]]) -> int:
    """Size in bytes of tensors, by their shapes and dtypes."""
    return sum(_bytes(shape, dtype) for shape, dtype in tensors)
