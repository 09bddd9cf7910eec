"""Where images may lie, the forms they may have, transparency, and more than 8 bits."""

import base64
import io
import json
import struct

import numpy as np
import pytest
from PIL import Image

from sparsight.data import Encoder, Sample, Source, Turn, read
from sparsight.data.images import StoredImage, image_hashes
from sparsight.data.pixels import upright
from sparsight.errors import SparsightError

import zoo

FLAT = {"prompt": "how many?", "answer": "4"}


@pytest.fixture
def places(tmp_path):
    """A folder of data with a.png, and a folder of images with b.png and deep/c.png; the images by name."""
    data, far = tmp_path / "data", tmp_path / "far"
    (far / "deep").mkdir(parents=True)
    data.mkdir()
    for path, image in zip((data / "a.png", far / "b.png", far / "deep" / "c.png"), zoo.images(3), strict=True):
        image.save(path)
    return data, far


def write(folder, *records, name="data.jsonl"):
    (folder / name).write_text("".join(json.dumps({**FLAT, **record}) + "\n" for record in records), encoding="utf-8")
    return folder / name


def test_images_below_a_named_folder(places):
    data, far = places
    (data / "link.png").symlink_to(far / "b.png")
    (data / "all").symlink_to(far)
    names = [
        "a.png",
        "b.png",
        "deep/c.png",
        str(far / "b.png"),
        f"file://{far}/b.png",
        "link.png",
        "all/deep/c.png",
        str(data / "a.png"),
        "../far/b.png",
    ]
    path = write(data, *({"image": name} for name in names))
    got = read(path, images=far)
    files = [image.resolve() for sample in got for image in sample.images]
    a, b, c = data / "a.png", far / "b.png", far / "deep" / "c.png"
    assert files == [a, b, c, b, b, b, c, a, b]
    assert read(path, images=str(far)).fingerprint == got.fingerprint
    refused = {line: reason for _, line, reason in read(path, skip_bad=True).skipped}
    assert sorted(refused) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert refused[2] == "image 'b.png' does not exist; name another folder with `images`"
    assert all("`images`" in refused[line] for line in refused)


def test_what_lies_in_neither_folder_is_refused(places, tmp_path):
    data, far = places
    zoo.images(1)[0].save(tmp_path / "secret.png")
    (far / "out.png").symlink_to(tmp_path / "secret.png")
    names = ["/etc/passwd", "../secret.png", str(tmp_path / "secret.png"), "out.png", "far/../../secret.png", "none.png"]
    got = read(write(data, {"image": "a.png"}, *({"image": name} for name in names)), images=far, skip_bad=True)
    assert len(got) == 1
    assert len(got.skipped) == len(names)
    assert all("leaves the folder of the data file and that of `images`" in why for _, _, why in got.skipped[:5])
    assert "does not exist in" in got.skipped[5][2]
    for wrong in (tmp_path / "nowhere", data / "a.png"):
        with pytest.raises(SparsightError, match=r"`images`: .* is no folder; name the one that the images lie in"):
            Source(data / "data.jsonl", images=wrong)


def test_the_data_folder_comes_first(places):
    data, far = places
    zoo.images(4)[3].save(far / "a.png")
    assert read(write(data, {"image": "a.png"}), images=far)[0].images == (data / "a.png",)


def as_bytes(image, kind="PNG"):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


PICTURE = zoo.images(1)[0]
KINDS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}


def forms(content, kind="png"):
    text = base64.b64encode(content).decode()
    uri = f"data:image/{kind};base64,{text}"
    return {
        "uri": uri,
        "upper case": "DATA:" + uri[5:],
        "raw": text,
        "lines": "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        "url safe": text.replace("+", "-").replace("/", "_"),
        "unpadded": text.rstrip("="),
        "struct": {"bytes": text, "path": "x.png"},
        "percent": "data:image/png," + "".join(f"%{byte:02x}" for byte in content),
        "no type": f"data:;base64,{text}",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_images_in_the_record(places, kind):
    data, _ = places
    content = as_bytes(PICTURE, KINDS[kind])
    (data / "same.img").write_bytes(content)
    whole = read(write(data, {"image": "same.img", "id": "x"}))
    for form, entry in forms(content, kind).items():
        got = read(write(data, {"image": entry, "id": "x"}))
        assert got[0].images == (content,), form
        assert got.fingerprint == whole.fingerprint, form
        assert np.array_equal(got[0].load_images()[0], whole[0].load_images()[0])


def test_images_in_parts_of_messages(places):
    data, _ = places
    content = as_bytes(PICTURE)
    text = base64.b64encode(content).decode()
    uri = f"data:image/png;base64,{text}"
    parts = [
        {"type": "image_url", "image_url": {"url": uri, "detail": "low"}},
        {"type": "image_url", "image_url": uri},
        {"type": "input_image", "image_url": uri},
        {"type": "image", "image": uri},
        {"type": "image", "url": uri},
        {"type": "image", "base64": text},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": text}},
        {"type": "image", "image": {"bytes": text, "path": None}},
        {"type": "image", "text": None, "image": uri},
    ]
    lines = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "what?"}, part]},
                {"role": "assistant", "content": "4"},
            ]
        }
        for part in parts
    ]
    path = data / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    got = read(path)
    assert [sample.images for sample in got] == [(content,)] * len(parts)
    assert {sample.prompt for sample in got} == {"what?\n<image>"[:5] + "<image>"}


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("data:image/png;base64,????", "the image is no base64"),
        ("data:image/png;base64", "is no data URI: a comma is missing"),
        ("data:image/png;base64,", "not an image"),
        ("data:image/svg+xml;base64,PHN2Zz48L3N2Zz4=", "not an image that Pillow knows"),
        ({"bytes": "AAAA"}, "not an image that Pillow knows"),
        ({"bytes": None, "path": None}, "needs something under 'bytes' or 'path'; got the keys"),
        ({"bytes": None, "path": "none.png"}, "'none.png' does not exist"),
        ({}, "needs something under"),
        (base64.b64encode(as_bytes(PICTURE)[:400]).decode(), "truncated|cannot be read"),
    ],
)
def test_what_is_no_image_in_the_record(places, entry, reason):
    with pytest.raises(SparsightError, match=reason) as caught:
        read(write(places[0], {"image": entry}))
    assert "\n" not in str(caught.value)


def parquet(path, rows, keep=None, **features):
    import datasets

    made = datasets.Dataset.from_dict({key: [row[key] for row in rows][:keep] for key in rows[0]})
    for column, feature in features.items():
        made = made.cast_column(column, feature)
    made.to_parquet(path)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_parquet_file(places, cache):
    import datasets

    data, far = places
    content = as_bytes(PICTURE)
    entries = {
        "raw bytes": content,
        "struct": {"bytes": content, "path": "x.png"},
        "path": "a.png",
        "far": {"bytes": None, "path": "b.png"},
        "base64": base64.b64encode(content).decode(),
    }
    for name, entry in entries.items():
        path = parquet(data / f"{name}.parquet", [{**FLAT, "image": entry}] * 2)
        got = read(path, images=far)
        expected = {"path": (data / "a.png",), "far": (far / "b.png",)}.get(name, (content,))
        if name == "struct":  # which stays in the file until it is used
            assert {type(sample.images[0]) for sample in got} == {StoredImage}
            assert {sample.load_images()[0].tobytes() for sample in got} == {PICTURE.convert("RGB").tobytes()}
            continue
        assert [sample.images for sample in got] == [expected] * 2, name
        assert got.split == ""
    typed = parquet(data / "typed.parquet", [{**FLAT, "image": {"bytes": content, "path": None}}], image=datasets.Image())
    assert np.array_equal(read(typed)[0].load_images()[0], PICTURE)
    several = parquet(data / "several.parquet", [{**FLAT, "images": [{"bytes": content, "path": None}] * 2}])
    assert [image.tobytes() for image in read(several)[0].load_images()] == [PICTURE.convert("RGB").tobytes()] * 2
    with pytest.raises(SparsightError, match="has no splits, so there is no 'test'"):
        read(typed, split="test")
    with pytest.raises(SparsightError, match="no such file"):
        read(data / "none.parquet")


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("Image", b"x", "unknown key 'Image'; did you mean 'image'"),
        ("image_path", "a.png", "'image_path' without 'image'"),
        ("video", "x.mp4", "only images and texts are read"),
        ("promt", "x", "did you mean 'prompt'"),
    ],
)
def test_a_column_that_was_meant_is_not_ignored(places, cache, column, value, reason):
    path = parquet(places[0] / "x.parquet", [{**FLAT, column: value}])
    with pytest.raises(SparsightError, match=reason):
        read(path)


def test_columns_are_read_as_records_are(places, cache, capfd):
    data, _ = places
    (sample,) = read(parquet(data / "name.parquet", [{**FLAT, "file_name": "a.png"}]))
    assert sample.images == (data / "a.png",)
    more = {"answer": "4", "answers": ["5"], "source": "x"}
    rows = [{"question": "one?", "prompt": None, **more}, {"question": "two?", "prompt": "read", **more}]
    got = read(parquet(data / "both.parquet", rows))
    assert [(sample.prompt, sample.answers) for sample in got] == [("one?", ("4",)), ("read", ("4",))]
    assert got.ignored == {"answers (another column is read)": 2, "question (another column is read)": 1, "source": 2}
    with pytest.raises(SparsightError, match="no samples"):
        read(parquet(data / "empty.parquet", [FLAT], keep=0))
    assert "Generating" not in capfd.readouterr().err


def test_messages_in_a_parquet_file(places, cache):
    content = as_bytes(PICTURE)
    talk = [
        {"role": "system", "content": [{"type": "text", "text": "be brief", "image": None}]},
        {
            "role": "user",
            "content": [{"type": "image", "text": None, "image": content}, {"type": "text", "text": "what?", "image": None}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "4", "image": None}]},
    ]
    (sample,) = read(parquet(places[0] / "talk.parquet", [{"messages": talk}]))
    assert (sample.images, sample.system, sample.turns) == ((content,), "be brief", (Turn("what?", ("4",)),))


def test_a_path_in_a_dataset_without_a_folder(monkeypatch, places):
    import datasets

    from sparsight.data import tables

    table = datasets.Dataset.from_list([{**FLAT, "image": "b.png"}])
    monkeypatch.setattr(tables, "dataset_rows", lambda *args, **how: (tables._rows(table), ""))
    monkeypatch.setattr("sparsight.data.sources.dataset_rows", tables.dataset_rows)
    with pytest.raises(
        SparsightError, match=r"image .b\.png. is a path, and this data has no folder; name one with `images`"
    ):
        read("owner/name")
    assert read("owner/name", images=places[1])[0].images == (places[1] / "b.png",)


def test_hashes_are_those_of_the_content(places):
    data, _ = places
    content = (data / "a.png").read_bytes()
    hashes = [image_hashes(Sample("x", (image,), ())) for image in (data / "a.png", content, Image.open(data / "a.png"))]
    assert hashes[0] == hashes[1] != hashes[2]
    assert read(write(data, {"image": "a.png"})).hashes == (hashes[0],)
    with pytest.raises(SparsightError, match="sample 'x': an image cannot be read"):
        image_hashes(Sample("x", (data / "gone.png",), ()))


# transparency

CLEAR = Image.new("RGBA", (40, 36), (200, 10, 10, 0))
HALF = Image.new("RGBA", (40, 36), (200, 10, 10, 128))
OPAQUE = Image.new("RGBA", (40, 36), (200, 10, 10, 255))
RED = Image.new("RGB", (40, 36), (200, 10, 10))


def palette():
    image = RED.quantize(4)
    image.info["transparency"] = image.getpixel((0, 0))
    return image


TRANSPARENT = {"RGBA": CLEAR, "half": HALF, "LA": CLEAR.convert("LA"), "P": palette()}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_a_transparent_image_lies_on_white(kind):
    image = TRANSPARENT[kind]
    got = upright(image)
    assert got.mode == "RGB"
    expected = (228, 132, 132) if kind == "half" else (255, 255, 255)
    assert all(abs(a - b) <= 1 for a, b in zip(got.getpixel((3, 3)), expected, strict=True))
    assert upright(image, alpha=True).mode == "RGBA"


@pytest.mark.parametrize("image", [OPAQUE, RED, RED.convert("L"), RED.convert("P"), RED.convert("1"), RED.convert("CMYK")])
def test_an_opaque_image_is_plain(image):
    for alpha in (False, True):
        assert np.array_equal(upright(image, alpha=alpha), image.convert("RGB"))
        assert upright(image, alpha=alpha).mode == "RGB"


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_processor_composes_a_transparent_image_itself(name):
    model, processor = zoo.build(name)
    encoder = Encoder(processor, model)

    def pixels(image, **how):
        sample = Sample("x", (image,), (Turn("what?", ("red",)),))
        return encoder.encode([sample]).inputs["pixel_values"]

    for image in (CLEAR, HALF, TRANSPARENT["LA"]):
        own = processor.image_processor(images=[[image]] if name in ("gemma3", "smolvlm") else [image], return_tensors="pt")
        assert np.allclose(pixels(image), own["pixel_values"].reshape(pixels(image).shape), atol=1e-6)
    assert np.array_equal(pixels(OPAQUE), pixels(RED))
    processor.image_processor.do_convert_rgb = False  # then the image is laid on white before
    assert np.array_equal(pixels(CLEAR), pixels(Image.new("RGB", (40, 36), "white")))


# more than 8 bits

RAMP = np.linspace(0, 1, 256)[None].repeat(4, 0)


def levels(image):
    return np.asarray(upright(image))[0, :, 0].astype(int)


def test_16_bits_are_scaled(places):
    image = Image.fromarray(np.round(RAMP * 65535).astype(np.uint16))
    assert image.mode.startswith("I;16")
    assert np.array_equal(levels(image), np.arange(256))
    image.save(places[0] / "deep.png")
    image.save(places[0] / "deep.tiff")
    for name in ("deep.png", "deep.tiff"):
        (loaded,) = read(write(places[0], {"image": name}))[0].load_images()
        assert np.array_equal(np.asarray(loaded)[0, :, 0], np.arange(256))
    dark = Image.fromarray(np.full((4, 4), 200, np.uint16))
    assert levels(dark).tolist() == [1] * 4, "16 bits are 16 bits, however dark"


def test_32_bit_integers_are_8_or_16_bits():
    assert np.array_equal(levels(Image.fromarray(np.round(RAMP * 255).astype(np.int32))), np.arange(256))
    assert np.array_equal(levels(Image.fromarray(np.round(RAMP * 65535).astype(np.int32))), np.arange(256))


def test_floats_are_fractions():
    assert np.array_equal(levels(Image.fromarray(RAMP.astype(np.float32))), np.arange(256))


@pytest.mark.parametrize("pixels", [12, 7])
def test_a_large_image_is_read_and_a_huge_one_refused(places, monkeypatch, pixels):
    (places[0] / "x.png").write_bytes(as_bytes(Image.new("RGB", (4, 4), "red")))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)  # Pillow warns above it, and refuses above twice as many
    source = write(places[0], {"image": "x.png"})
    if pixels == 12:
        assert read(source)[0].load_images()[0].size == (4, 4)
    else:
        with pytest.raises(SparsightError, match=r"image 'x\.png' is too large: .*16 pixels.*; make it smaller"):
            read(source)


def tiff(bits, content, width, height):
    """The bytes of a gray TIFF without compression."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 122), (277, 3, 1),
            (278, 4, height), (279, 4, len(content))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4 + content


def test_the_file_says_how_many_bits_a_value_has():
    values = np.array([[0, 17, 2048, 4095]])
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.reshape(-1, 2).tolist())
    dark = np.array([[0, 100, 200, 255]], dtype=">u2").tobytes()
    files = {
        "12 bits": (tiff(12, packed, 4, 1), [0, 1, 128, 255]),
        "16 bits, and none above 255": (tiff(16, np.array([[0, 100, 200, 255]], dtype="<u2").tobytes(), 4, 1), [0, 0, 1, 1]),
        "16 bits of a PGM": (b"P5 4 1 65535\n" + dark, [0, 0, 1, 1]),
        "9 bits of a PGM": (b"P5 4 1 511\n" + dark, [0, 50, 100, 127]),
    }
    for name, (content, expected) in files.items():
        with Image.open(io.BytesIO(content)) as image:
            assert np.asarray(upright(image))[0, :, 0].tolist() == expected, name


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0, 70000]], np.int32), "mode I holds values from 0 to 70000; save 8 or 16 bits"),
        (np.array([[-3, 5]], np.int32), "mode I holds values from -3 to 5"),
        (np.array([[0, 255]], np.float32), "mode F holds values from 0 to 255; scale them to 0 to 1"),
        (np.array([[-0.5, 0.5]], np.float32), "mode F holds values from -0.5 to 0.5"),
        (np.array([[np.nan, 0.5]], np.float32), "mode F holds values from nan"),
    ],
)
def test_other_values_are_refused(places, values, reason):
    Image.fromarray(values).save(places[0] / "odd.tiff")
    with pytest.raises(SparsightError, match=reason):
        read(write(places[0], {"image": "odd.tiff"}))
