"""Keeps visitors' images in one private folder, with limits on bytes, number and time per owner."""

import os
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fusion_jax.data import image
from fusion_jax.errors import BadRecord

KEPT = 24 * 3600  # seconds for which an image is kept
SPARED = 600  # seconds for which an image is kept even where another needs its space
FILES = 4096
OWN_FILES = 64  # images of one owner
OWN_PART = 8  # an owner may use a share of 1 / OWN_PART of all bytes, or keep one image
# The types that a browser may display, recognized by their first bytes, never by a name. All others are downloads.
_KINDS = (
    (b"\x89PNG\r\n", "image/png", ".png"),
    (b"\xff\xd8\xff", "image/jpeg", ".jpg"),
    (b"GIF8", "image/gif", ".gif"),
    (b"BM", "image/bmp", ".bmp"),
)


class NoRoom(Exception):
    """The folder is full."""


@dataclass(frozen=True)
class _Image:
    owner: str
    size: int
    kind: str
    born: float


class Uploads:
    """Images under names that nobody can guess, which are returned only to their owner.

    Each owner has a share, in which the oldest images are deleted for the newest. Where the folder is full, images of
    the owner with the most are deleted for owners with less; among equals, the owner's own images are, and old ones.

    Args:
      folder: where a folder of mode 0700 is made for the images. most: most bytes of all images. files: most images.
    """

    def __init__(self, folder: Path, most: int, files: int = FILES):
        self.folder, self.most, self.files = Path(tempfile.mkdtemp(dir=folder)), most, files
        self._images: dict[str, _Image] = {}  # the oldest first
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, owner: str, data: bytes) -> str:
        """Keeps an image and returns its name. Raises NoRoom, and BadRecord where the data are not an image."""
        image.read_size(data, "upload")
        kind, suffix = _kind(data)
        name = secrets.token_hex(16) + suffix
        with self._lock:
            self._make_room(owner, len(data))
            self._images[name] = _Image(owner, len(data), kind, time.monotonic())
            self._bytes += len(data)
        try:
            # Exclusive: an existing file or link is neither followed nor overwritten.
            descriptor = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with open(descriptor, "wb") as file:
                file.write(data)
        except OSError as error:
            with self._lock:
                self._forget(name)
            raise NoRoom from error
        return name

    def path(self, name: str, owner: str) -> Path:
        """The path of an image, by its name or its path. Raises BadRecord where the owner has no such image."""
        return self._find(name, owner)[0]

    def about(self, name: str, owner: str) -> tuple[int, str]:
        """An image's size in bytes and its media type. Raises as `path` does."""
        known = self._find(name, owner)[1]
        return known.size, known.kind

    def read(self, name: str, owner: str, start: int = 0, most: int = -1) -> bytes:
        """The bytes of an image, or `most` of them from `start` on. Raises as `path` does."""
        path, known = self._find(name, owner)
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                about = os.fstat(file.fileno())
                if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1 or about.st_size != known.size:
                    raise OSError("not the file that was written")
                file.seek(start)
                return file.read(most)
        except OSError as error:
            raise BadRecord("missing_image", "upload", "the image is gone; upload it again") from error

    def sweep(self) -> None:
        """Deletes images that are older than KEPT."""
        with self._lock:
            self._drop_older(KEPT)

    def close(self) -> None:
        """Deletes the folder."""
        with self._lock:
            self._images.clear()
            self._bytes = self.most
        shutil.rmtree(self.folder, ignore_errors=True)

    def _find(self, name: str, owner: str) -> tuple[Path, _Image]:
        name = name.removeprefix(f"{self.folder}/")
        with self._lock:
            known = self._images.get(name)
        if known is None or known.owner != owner:
            raise BadRecord("missing_image", "upload", "the image is not among your uploads; upload it again")
        return self.folder / name, known

    def _make_room(self, owner: str, size: int) -> None:
        """Deletes images until one of `size` bytes fits. Raises NoRoom where it cannot."""
        held = [name for name, known in self._images.items() if known.owner == owner]
        left = sum(self._images[name].size for name in held)
        while held and (len(held) >= OWN_FILES or left + size > self.most // OWN_PART):
            left -= self._images[held[0]].size
            self._forget(held.pop(0))

        def full() -> bool:
            return self._bytes + size > self.most or len(self._images) >= self.files

        if full():
            self._drop_older(KEPT)
        while full():
            files = len(self._images) >= self.files
            holds = Counter()
            for known in self._images.values():
                holds[known.owner] += 1 if files else known.size
            most = max(holds, key=holds.get, default=None)
            if most is not None and holds[most] <= holds[owner] + (1 if files else size):
                most = owner if holds[owner] else None
            if most is not None:
                self._forget(next(name for name, known in self._images.items() if known.owner == most))
                continue
            oldest = next(iter(self._images), None)
            if oldest is None or time.monotonic() - self._images[oldest].born < SPARED:
                raise NoRoom
            self._forget(oldest)

    def _drop_older(self, seconds: float) -> None:
        end = time.monotonic() - seconds
        for name in [name for name, known in self._images.items() if known.born < end]:
            self._forget(name)

    def _forget(self, name: str) -> None:
        known = self._images.pop(name, None)
        if known is not None:
            self._bytes -= known.size
            (self.folder / name).unlink(missing_ok=True)


def _kind(data: bytes) -> tuple[str, str]:
    """The media type of an image, and the suffix for its name."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp", ".webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "image/avif", ".avif"
    return next((kind for start, *kind in _KINDS if data.startswith(start)), ("application/octet-stream", ""))
