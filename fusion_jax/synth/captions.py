"""Reads captions from text, JSONL, Parquet and TensorFlow Datasets as streams."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusion_jax.errors import UserError, check
from fusion_jax.files import parse_json
from fusion_jax.synth.config import PoolConfig

MAX_LINE = 1 << 20  # bytes
_MAX_SCORE = 1e6


def read_pool(pool: PoolConfig, seed: int) -> Iterator[dict[str, Any]]:
    """Yields the captions of one pool, in its order.

    Yields:
      Mappings with `caption`, unchanged (None where a record has no text); `record`, its number from 0; and where the
      pool has them, `image` (a path) and the scores `clip_score` and `blip_score`.

    Raises:
      UserError: a file is missing, empty, wrongly encoded or otherwise unreadable.
    """
    count = 0
    for count, record in enumerate(_open(pool, seed), start=1):
        yield {"record": count - 1} | record
        if count == pool.limit:
            return
    check(count > 0, f"{pool.path} holds no captions.")


def _open(pool: PoolConfig, seed: int) -> Iterator[dict[str, Any]]:
    if pool.path.startswith("embedded:"):
        return _embedded(pool, seed)
    if pool.path.startswith("tfds:"):
        return _tfds(pool)
    path = Path(pool.path)
    readers = {".txt": _text, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix not in readers:
        raise UserError(
            f"{path} has an unknown suffix: captions come from {', '.join(readers)} files or tfds:NAME:SPLIT."
        )
    check(path.is_file(), f"There is no caption file {path}.")
    check(path.stat().st_size > 0, f"{path} is empty.")
    return readers[path.suffix](pool, path)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the number, from 1, and the text of each line that is not blank."""
    with open(path, "rb") as f:
        for number, line in enumerate(iter(lambda: f.readline(MAX_LINE + 1), b""), start=1):
            if len(line) > MAX_LINE:
                raise UserError(f"{path}, line {number} is longer than {MAX_LINE} bytes; give a file of captions.")
            if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise UserError(f"{path} is UTF-16, not UTF-8; convert it first: iconv -f UTF-16 -t UTF-8.")
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            try:
                text = line.decode()
            except UnicodeDecodeError as e:
                raise UserError(
                    f"{path} is not valid UTF-8 in line {number} (byte {e.start + 1} of it); convert it first."
                ) from e
            if "\0" in text:
                raise UserError(f"{path}, line {number} holds zero bytes; give a text file in UTF-8.")
            if text.strip():
                yield number, text.rstrip("\r\n")


def _text(pool: PoolConfig, path: Path) -> Iterator[dict[str, Any]]:
    del pool
    for _, line in _lines(path):
        yield {"caption": line}


def _jsonl(pool: PoolConfig, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in _lines(path):
        try:
            record = parse_json(line)
        except ValueError as e:
            raise UserError(f"{path}, line {number} is not valid JSON: {e}.") from e
        if number == 1 and (not isinstance(record, dict) or pool.text not in record):
            known = ", ".join(record) if isinstance(record, dict) else "no fields"
            raise UserError(f"{path} has no field {pool.text!r} (pool.text); its first line has {known}.")
        yield _fields(pool, record if isinstance(record, dict) else {})


def _parquet(pool: PoolConfig, path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise UserError(f"Captions in Parquet ({path}) need the package pyarrow: pip install pyarrow.") from e

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        check(
            pool.text in names, f"{path} has no column {pool.text!r} (pool.text); its columns are {', '.join(names)}."
        )
        columns = [name for name in (pool.text, pool.image, "clip_score", "blip_score") if name in names]
        for batch in file.iter_batches(columns=columns):
            for record in batch.to_pylist():
                yield _fields(pool, record)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        raise UserError(f"Cannot read {path} as Parquet: {e}.") from e


def _fields(pool: PoolConfig, record: dict[str, Any]) -> dict[str, Any]:
    caption = record.get(pool.text)
    fields: dict[str, Any] = {"caption": caption if isinstance(caption, str) else None}
    image = record.get(pool.image) if pool.image else None
    if isinstance(image, str) and image:
        fields["image"] = str(Path(pool.image_folder or Path(pool.path).parent) / image)
    for key in ("clip_score", "blip_score"):
        score = record.get(key)
        if isinstance(score, int | float) and not isinstance(score, bool) and abs(score) < _MAX_SCORE:  # and not NaN
            fields[key] = float(score)
    return fields


def _tfds(pool: PoolConfig) -> Iterator[dict[str, Any]]:
    from fusion_jax.data.tfds import TfdsRecords

    # Only the text is read, not the images.
    source = TfdsRecords(pool.path, pool.data_dir or None, {"text": pool.text}, "")
    for i in range(len(source)):
        header, _, _ = source.read(i)
        yield {"caption": header["conversations"][-1]["value"]}


def _embedded(pool: PoolConfig, seed: int) -> Iterator[dict[str, Any]]:
    from fusion_jax.synth.backends import factory

    style, _, count = pool.path.removeprefix("embedded:").rpartition(":")
    styles, style = factory.embedded().STYLES, style or "scenes"
    check(
        count.isdecimal() and int(count) > 0 and style in styles,
        f"pool {pool.path!r}: write embedded:COUNT or embedded:STYLE:COUNT, COUNT at least 1, STYLE one of "
        f"{', '.join(styles)}.",
    )
    for caption in factory.embedded().captions(int(count), seed, style):
        yield {"caption": caption}
