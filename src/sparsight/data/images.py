"""Find and check the images of a record: files below allowed folders, base64, bytes, and images in memory."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from PIL import Image, UnidentifiedImageError

from sparsight.data.pixels import opened, upright
from sparsight.data.sample import Sample
from sparsight.errors import SparsightError, first_line, quote


class StoredImage:
    """An image in a table, encoded: its content is read when it is used, and not kept."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        self.read_bytes = read


Picture = Path | bytes | Image.Image | StoredImage  # a file, the content of one, an image in memory, one in a table
Find = Callable[[Any], tuple[Picture, str]]  # an image entry -> the image and the hash of its content

WHOLE = 64 * 2**20  # bytes of pictures that are decoded when they are found, some 700 photos of 640 x 480

_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{24,}={0,2}\s*")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class BadRecord(ValueError):
    """Why a record cannot be used; the reader adds the file and the line."""


class Finder:
    """Finds the image of an entry, and checks it.

    Paths are relative to `folder`, that of the data, or to `images`, a folder that the user names; absolute paths must lie
    below one of them. No other file is read. Data URIs, base64, bytes, `{"bytes": ..., "path": ...}` and images in memory
    need no folder. An entry that is a tuple becomes one of these by `named`.

    The first pictures, `WHOLE` bytes of them, are decoded. Of the others the header is read, and the end is looked for;
    their hashes are in `late`. One without an end is decoded, too.

    A call raises `BadRecord` for addresses, for paths and links that lead out, and for what Pillow cannot decode.
    """

    def __init__(
        self, folder: Path | None, images: Path | None = None, named: Callable[..., Any] | None = None
    ) -> None:  # fmt: skip
        self.allowed = [place for place in (folder, images) if place is not None]
        self.roots = [place.resolve() for place in self.allowed]
        self.images, self.named = images, named
        self.checked: set[str] = set()  # hashes of images, each checked once
        self.late: set[str] = set()
        self._bytes = 0  # of the images that were checked
        self._files: dict[str, tuple[Path, str]] = {}  # those that are good, by their entries

    def __call__(self, entry: Any) -> tuple[Picture, str]:
        """The image of an entry, and the hash of its content."""
        if isinstance(entry, tuple) and self.named is not None:
            entry = self.named(*entry)
        if isinstance(entry, Image.Image):
            return in_memory(entry)
        if isinstance(entry, StoredImage):
            return entry, self._check(entry.read_bytes())
        entry, content = _embedded(entry)
        if content is not None:
            return content, self._check(content)
        if isinstance(entry, str) and entry in self._files:  # several questions may be about one picture
            return self._files[entry]
        path = self._locate(entry)
        try:
            content = path.read_bytes()
        except (OSError, RuntimeError) as error:
            raise BadRecord(f"image {quote(entry)} cannot be read: {first_line(error)}") from error
        self._files[entry] = path, self._check(content, f"image {quote(entry)}")
        return self._files[entry]

    def _check(self, content: bytes, name: str = "") -> str:
        """Check an image that was not seen yet, since several questions may be about one, and return its hash."""
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self.checked:
            late = self._bytes >= WHOLE and has_end(content)
            self._bytes += len(content)
            _check_whole(content, name or f"the image of {len(content):,} bytes", decode=not late)
            if late:
                self.late.add(digest)
        self.checked.add(digest)
        return digest

    def _locate(self, entry: Any) -> Path:
        if not isinstance(entry, str) or not entry or "\0" in entry:
            raise BadRecord(f"an image must be a relative path, got {kind_of(entry)}; base64 and bytes are read, too")
        if not self.allowed:
            raise BadRecord(f"image {quote(entry)} is a path, and this data has no folder; name one with `images`")
        entry = unquote(entry[7:]) if entry[:8].lower() == "file:///" else entry
        whole = PurePosixPath(entry).is_absolute() or PureWindowsPath(entry).is_absolute()
        if _ADDRESS.match(entry) and not (whole and self.images is not None):
            raise BadRecord(f"image {quote(entry)} is an address; only files beside the data, or below `images`, are read")
        if whole and self.images is None:
            raise BadRecord(f"image path {quote(entry)} is absolute; name the folder that it lies below with `images`")
        out = f"image path {quote(entry)} leaves the folder of the data file"
        out += " and that of `images`" if self.images is not None else "; name the folder that it lies below with `images`"
        if ".." in PurePosixPath(entry).parts and self.images is None:
            raise BadRecord(out)
        try:
            outside = False
            for place in self.allowed:
                path = place / entry
                if not any(path.resolve().is_relative_to(root) for root in self.roots):
                    outside = True
                elif path.is_file():
                    return path
        except (OSError, RuntimeError) as error:  # a loop of links, a name too long, no permission
            raise BadRecord(f"image {quote(entry)} cannot be read: {first_line(error)}") from error
        if outside:
            raise BadRecord(out)
        where = "; name another folder with `images`"
        where = f" in {' or '.join(str(place) for place in self.allowed)}" if self.images is not None else where
        raise BadRecord(f"image {quote(entry)} does not exist{where}")


def finder(folder: Path | None, images: Path | None = None) -> Finder:
    """A function that finds the image of an entry; see `Finder`."""
    return Finder(folder, images)


def has_end(content: bytes) -> bool:
    """Whether the content of a JPEG or PNG file has the mark that stands at its end; other formats count as without."""
    if content.startswith(b"\xff\xd8"):
        return content.rstrip(b"\0\r\n").endswith(b"\xff\xd9")
    return content.startswith(b"\x89PNG") and b"IEND" in content[-16:]


def in_memory(entry: Any) -> tuple[Image.Image, str]:
    """Return an image that a dataset has already decoded, and the hash of its pixels; **raises** `BadRecord` for others."""
    if not isinstance(entry, Image.Image):
        raise BadRecord(f"the image column must hold images, got {kind_of(entry)}")
    try:
        content = entry.tobytes()
        upright(entry)
    except Exception as error:  # it may be decoded only now
        raise BadRecord(f"the image cannot be read: {first_line(error)}") from error
    digest = hashlib.sha256(f"{entry.mode} {entry.size} ".encode())
    digest.update(content)
    return entry, digest.hexdigest()


def image_hashes(sample: Sample) -> tuple[str, ...]:
    """The content hashes of a sample's images. **Raises** `SparsightError` for a file that cannot be read."""
    hashes = []
    for image in sample.images:
        try:
            if isinstance(image, Image.Image):
                hashes.append(in_memory(image)[1])
            else:
                content = image if isinstance(image, bytes) else image.read_bytes()
                hashes.append(hashlib.sha256(content).hexdigest())
        except (OSError, BadRecord) as error:
            raise SparsightError(f"sample {quote(sample.id)}: an image cannot be read: {first_line(error)}") from error
    return tuple(hashes)


def kind_of(value: Any) -> str:
    """The type of a value of JSON, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "nothing"}
    if isinstance(value, list | str) and not value:
        return f"an empty {'list' if isinstance(value, list) else 'string'}"
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _embedded(entry: Any) -> tuple[Any, bytes | None]:
    """A path and None, or anything and the content of the image that stands in the entry itself."""
    if isinstance(entry, Mapping):  # as parquet files of `datasets` hold images
        content = entry.get("bytes")
        if isinstance(content, str) and content:  # bytes in JSON can only be base64
            return entry, _decode_base64(content)
        if isinstance(content, bytes | bytearray | memoryview) and len(content):
            return entry, bytes(content)
        if content is not None and not isinstance(content, str | bytes | bytearray | memoryview):
            raise BadRecord(f"an image's 'bytes' must be bytes or base64, got {kind_of(content)}")
        if entry.get("path") is None:
            raise BadRecord(
                f"an image that is an object needs something under 'bytes' or 'path'; got the keys {quote(list(entry))}"
            )
        return entry["path"], None
    if isinstance(entry, bytes | bytearray | memoryview):
        return entry, bytes(entry)
    if not isinstance(entry, str):
        return entry, None
    if entry[:5].lower() == "data:":
        head, comma, body = entry[5:].partition(",")
        if not comma:
            raise BadRecord(f"image {quote(entry)} is no data URI: a comma is missing")
        return entry, _decode_base64(body) if head.lower().endswith(";base64") else unquote_to_bytes(body)
    if _BASE64.fullmatch(entry):
        try:
            content = _decode_base64(entry)
            with opened(io.BytesIO(content)):
                return entry, content
        except Exception:  # then it is a path
            return entry, None
    return entry, None


def _decode_base64(text: str) -> bytes:
    text = re.sub(r"\s+", "", unquote_to_bytes(text).decode("latin-1") if "%" in text else text).rstrip("=")
    try:
        return base64.b64decode(text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecord(f"the image is no base64 ({first_line(error)}): {quote(text)}") from error


def _check_whole(content: bytes, name: str, decode: bool = True) -> None:
    try:
        with opened(io.BytesIO(content)) as image:
            image.verify()
        if not decode:
            return
        with opened(io.BytesIO(content)) as image:  # verify() passes a file that was cut short, and spoils `image`
            upright(image)
    except UnidentifiedImageError as error:
        raise BadRecord(f"{name} cannot be read: not an image that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise BadRecord(f"{name} is too large: {first_line(error)}; make it smaller") from error
    except Exception as error:  # Pillow raises nearly everything on a broken file
        raise BadRecord(f"{name} cannot be read: {first_line(error)}") from error
