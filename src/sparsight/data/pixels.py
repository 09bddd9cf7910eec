"""From any image that Pillow opens to 8 bits per channel, upright, with or without its transparency.

Transparency: a model's processor that converts to RGB itself gets the image with its alpha channel. For all others, and for
pictures in reports, the image is laid on white. An image whose alpha channel is opaque everywhere is plain RGB.

More than 8 bits: 16 bits are divided by 257, and the 12 bits of a TIFF by 4095/255. 32-bit integers (`I`) from 0 to 255 stay
as they are, and those up to 65535 are divided by 257. Floats (`F`) from 0 to 1 are multiplied by 255. Results are rounded;
other values are refused.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


@contextlib.contextmanager
def opened(file: Path | io.BytesIO) -> Iterator[Image.Image]:
    """Open an image, without Pillow's warning about a large one. **Raises** what Pillow raises, above all for a huge one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(file)
    with image:
        yield image


def upright(image: Image.Image, *, alpha: bool = False) -> Image.Image:
    """Decode an image as RGB, turned as its EXIF data says; with `alpha` as RGBA where something shows through.

    **Raises** `ValueError` for values that are neither 8 nor 16 bits nor fractions, and what Pillow raises on a broken file.
    """
    bits = _bits(image)
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode == "F" or image.mode.startswith("I;"):
        image = _to_8_bits(image, bits)
    if image.mode == "RGB" or not image.has_transparency_data:
        return image.convert("RGB")
    clear = image.convert("RGBA")
    if clear.getchannel("A").getextrema()[0] == 255:
        return image.convert("RGB")
    return clear if alpha else on_white(clear)


def on_white(image: Image.Image) -> Image.Image:
    """Lay an RGBA image on white."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def converts(processor: Any) -> bool:
    """Whether a model's processor converts images to RGB itself."""
    return bool(getattr(getattr(processor, "image_processor", None), "do_convert_rgb", False))


def _bits(image: Image.Image) -> int | None:
    """The bits of a value of an integer image, None where the image does not say; Pillow opens 12 and 16 bits as more."""
    if image.format == "PPM" and image.mode == "I":  # Pillow has scaled any largest value to 65535
        return 16
    tags = getattr(image, "tag_v2", {})
    said = tags.get(258) if image.format == "TIFF" else None  # BitsPerSample
    if said and said[0] in (12, 16):
        return said[0]
    return 16 if image.mode.startswith("I;16") else None


def _to_8_bits(image: Image.Image, bits: int | None) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # a NaN is neither
            raise ValueError(f"mode F holds values from {low:g} to {high:g}; scale them to 0 to 1, or save 8 bits")
        scale = 255.0
    elif low < 0 or high > 65535:
        raise ValueError(f"mode {image.mode} holds values from {low:g} to {high:g}; save 8 or 16 bits")
    elif bits:
        scale = 255 / (2**bits - 1)
    else:
        scale = 1.0 if high <= 255 else 1 / 257
    return Image.fromarray(np.round(values * scale).astype(np.uint8))
