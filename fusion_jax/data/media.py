"""Finds the images that a record names, and the media in it that the model cannot read."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

from fusion_jax.data import formats
from fusion_jax.data.base64_text import from_base64
from fusion_jax.errors import BadRecord
from fusion_jax.files import brief, shown

_MAX_NAME = 4096  # characters of a file's path, as systems have it
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{64,}={0,2}\s*", re.ASCII)
_FILE = re.compile(
    r"[^\n]{0,4096}\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic|ppm|pgm|jp2|"
    r"(mp4|mov|avi|mkv|webm|m4v|mpe?g|mp3|wav|flac|ogg|opus|m4a|aac))(?:[?#]\S*)?",
    re.ASCII | re.IGNORECASE,
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names of keys without case, "_" and "-". The images of all keys of the first kind must be the same; those of the
# second kind, which beside an image say where it came from, count only if there is none of the first.
_IMAGES = _words(
    "image images img imgs imagepath imagepaths imgpath imgpaths imagefile imagefiles imgfile imgfiles "
    "picture pictures photo photos imagebase64 imagebytes"
)
_IMAGES_ELSE = _words("imageurl imageurls imgurl imgurls imagename imagenames imgname imgnames")
# Words in the names of keys that hold media, and of keys that only describe them.
_PICTURES = _words(
    "image images img imgs picture pictures pic pics photo photos photograph photographs screenshot screenshots "
    "media attachment attachments frame frames"
)
_OTHERS = _words("video videos movie movies gif gifs audio audios sound sounds speech voice wav mp3 mp4 pdf pdfs")
_ABOUT = _words(
    "size sizes width widths height heights w h shape count counts num number n caption captions alt text title titles "
    "description descriptions source sources license licence licenses hash hashes sha sha1 sha256 md5 type types kind "
    "format formats tag tags token tokens prompt prompts model author date split domain category categories label "
    "labels score scores quality resolution ratio has is length duration fps language lang"
)
_WHICH = _words("id ids index idx name names")  # beside an image; without one it is missing
_NUMBERED = re.compile(r"(?:image|img|picture|photo)(?:path|file)?(?:\d+|[ab])")  # one of several images
_NESTED = 6  # levels of objects and lists that are searched for media


class Named(NamedTuple):
    """An image of a record: its name, or "", and its file's bytes if the record itself has them."""

    name: str
    data: bytes | None = None


def named_images(holder: Mapping[Any, Any], where: str, what: str = "") -> tuple[str, list[Named]]:
    """Returns the first key by which an object names images, and all its images in order; "" and no image without one.

    Args:
      holder: a record, or a turn of one. what: such a turn, for messages.

    Raises:
      BadRecord: a value that does not name an image (bad_image), an address (remote_image), keys that name different
        images (contradiction).
    """
    filled = [
        (key, plain_key(key)) for key, value in holder.items() if value is not None and value != "" and value != []
    ]
    keys = [key for key, plain in filled if plain in _IMAGES] or [key for key, plain in filled if plain in _IMAGES_ELSE]
    first, images = "", []
    for key in keys:
        value = holder[key]
        named = [
            read_image(one, f"'{shown(key)}'{what}", where) for one in (value if isinstance(value, list) else [value])
        ]
        if first and named != images:
            detail = f"'{shown(first)}' and '{shown(key)}'{what} name different images; leave one of them out"
            raise BadRecord("contradiction", where, detail)
        first, images = key, named
    return first, images


def check_media(holder: Mapping[Any, Any], known: Iterable[str], images: bool, where: str, what: str = "") -> None:
    """Raises BadRecord (unknown_media) if a key holds media that nothing would read.

    Args:
      known: keys that are read otherwise. images: whether there are images; then other keys may say where these came
        from, but may hold no film, no sound and no second, numbered image. Without images, objects and lists are
        searched as well.
    """
    for key, value in holder.items():
        named = kind_of_key(key, images)
        if key in known or named == "images" or not _holds_something(value):
            continue
        kind = _looks_like_media(value) or named or ("" if images else _within(value))
        if kind == "other" or (kind and (not images or _NUMBERED.fullmatch(plain_key(key)))):
            detail = (
                f"the key '{shown(key)}'{what} holds media that are not read; images are read from 'image' or 'images'"
            )
            raise BadRecord("unknown_media", where, detail)


def kind_of_key(key: Any, images: bool = False) -> str:
    """Says by its name what a key holds: "images" that are read, a "picture" that is not, an "other" medium, or "".

    Args:
      images: whether another key has images; then a key for the name or number of a picture only describes them.
    """
    plain = plain_key(key)
    if plain in _IMAGES or plain in _IMAGES_ELSE:
        return "images"
    words = set(re.findall(r"[a-z]+[0-9]*", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(key)).lower()))
    if words & _ABOUT or (images and words & _WHICH):
        return ""
    return "other" if words & _OTHERS or plain in _OTHERS else "picture" if words & _PICTURES else ""


def read_image(value: Any, what: str, where: str) -> Named:
    """Reads one image: a file's name, `{"path": ..., "bytes": ...}` as data sets are exported, a data URL or base64.

    Raises:
      BadRecord: bad_image, or remote_image for an address, since nothing is fetched while training.
    """
    if isinstance(value, Mapping):
        filled = {plain_key(key): one for key, one in value.items() if one is not None and one != ""}
        name = next((filled[key] for key in ("path", "filename", "name") if isinstance(filled.get(key), str)), "")
        for key in ("bytes", "base64", "data", "b64json"):
            if key in filled:
                return Named("" if len(name) > _MAX_NAME else name, _bytes(filled[key], f"'{key}' of {what}", where))
        for key in ("path", "url", "image", "imageurl", "file", "filename", "name"):
            if key in filled:  # its value may be such an object again, and so on
                return read_image(filled[key], f"'{key}' of {what}" if len(what) < 100 else what, where)
        raise BadRecord("bad_image", where, f"{what} has neither 'path' nor 'bytes' of an image, but {brief(value)}")
    if not isinstance(value, str) or not value:
        said = "an empty text" if value == "" else type(value).__name__
        raise BadRecord("bad_image", where, f"{what} must be a file name, not {said}")
    if value[:5].lower() == "data:":
        head, comma, data = value[5:].partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise BadRecord("bad_image", where, f"{what} is a data URL without ';base64,': {shown(value, 40)}")
        return Named("", _bytes(data, what, where))
    if value[:7].lower() == "file://":
        return Named(unquote(value[7:].removeprefix("localhost")))
    if _URL.match(value):
        detail = f"{what} is the address {shown(value)}; images are read from files: download it first"
        raise BadRecord("remote_image", where, detail)
    if _begins_an_image(value):
        return Named("", _bytes(value, what, where))
    if len(value) > _MAX_NAME:
        seems = "base64, but not of a known image format" if _BASE64.fullmatch(value) else "not the name of a file"
        raise BadRecord("bad_image", where, f"{what} is {seems}: {shown(value, 40)}")
    return Named(value)


def _bytes(value: Any, what: str, where: str) -> bytes:
    """Returns a file's contents from bytes, base64, or a list of the bytes' numbers."""
    try:
        if isinstance(value, bytes) or (isinstance(value, list) and all(type(one) is int for one in value)):
            return bytes(value)
        if isinstance(value, str):
            return from_base64(value.partition(",")[2] if value[:5] == "data:" else value)
    except ValueError:
        pass
    raise BadRecord("bad_image", where, f"{what} is not an image in base64: {shown(brief(value), 60)}")


def _begins_an_image(text: str) -> bool:
    """Returns whether a text is an image in base64, by what it decodes to: letters and slashes may be a path, too."""
    beginning = text[:64]
    if len("".join(beginning.split())) < 64 or "." in beginning:
        return False
    try:
        start = from_base64(beginning)
    except ValueError:
        return False
    return formats.format_of(start[:16]) is not None


def _holds_something(value: Any) -> bool:
    return isinstance(value, str | list | Mapping | bytes) and bool(value)


def _looks_like_media(value: Any) -> str:
    """Returns "picture", "other" for films and sound, or "" for a value that is neither by its ending or contents."""
    if isinstance(value, bytes):
        return "picture"
    if isinstance(value, str):
        if value[:5].lower() == "data:":
            return "picture" if value[5:11].lower() == "image/" else "other" if ";base64," in value[:100] else ""
        file = _FILE.fullmatch(value.strip())
        if file is None:
            return "picture" if _begins_an_image(value) else ""
        return "other" if file[2] else "picture"
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return next(
            (kind for one in value[:8] if not isinstance(one, list | Mapping) and (kind := _looks_like_media(one))), ""
        )
    return ""


def _within(value: Any, levels: int = _NESTED) -> str:
    """Says what an object or a list holds by a key or a value further down: "picture", "other", or ""."""
    if levels == 0 or not isinstance(value, list | Mapping):
        return ""
    entries = value.items() if isinstance(value, Mapping) else [("", one) for one in value[:8]]
    for key, one in entries:
        if _holds_something(one) and (kind := kind_of_key(key) or _looks_like_media(one) or _within(one, levels - 1)):
            return "other" if kind == "other" else "picture"
    return ""


def plain_key(key: Any) -> str:
    """Returns a key without case, "_", "-" and white space, in which writers differ."""
    return re.sub(r"[_\s-]", "", str(key)).lower()
