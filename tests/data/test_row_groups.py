"""Of parquet files only the groups of rows that hold the samples which are asked for are read; nothing else changes."""

import io
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from sparsight.data import Source, read
from sparsight.data.images import StoredImage
from sparsight.data.row_groups import RowGroups
from sparsight.errors import SparsightError


def png(color):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (color, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Twelve rows in two files, in groups of two; the image of row 5 is damaged."""
    kinds = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answers": datasets.List(datasets.Value("string"))}
    )
    for shard in range(2):
        rows = range(6 * shard, 6 * shard + 6)
        cells = [{"bytes": png(10 * i) if i != 5 else b"GIF89a", "path": None} for i in rows]
        columns = {"image": cells, "question": [f"what is {i}?" for i in rows], "answers": [["a", "b"]] * 6}
        table = datasets.Dataset.from_dict(columns, features=kinds).data.table
        metadata = {b"huggingface": datasets.Dataset.from_dict(columns, features=kinds).data.schema.metadata[b"huggingface"]}
        path = tmp_path / f"train-{shard:05d}-of-00002.parquet"
        parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=2)
    return tmp_path


@pytest.fixture
def reads(monkeypatch):
    """The groups of rows that are read, in their order."""
    seen = []
    inner = parquet.ParquetFile.iter_batches

    def noted(self, *, row_groups, **how):
        seen.extend(row_groups)
        return inner(self, row_groups=row_groups, **how)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", noted)
    return seen


def test_the_same_samples_whether_all_or_some_are_read(shards):
    everything = Source(shards)
    for how in ({"limit": 3}, {"limit": 4, "seed": 1}, {"limit": 2, "seed": 5}):
        some, all_ = read(shards, skip_bad=True, **how), read(everything, skip_bad=True, **how)
        assert [sample.prompt for sample in some] == [sample.prompt for sample in all_]
        assert (some.fingerprint, some.skipped, some.split) == (all_.fingerprint, all_.skipped, "train")
        assert [x.load_images()[0].tobytes() for x in some] == [x.load_images()[0].tobytes() for x in all_]
        assert all(isinstance(sample.images[0], StoredImage) for sample in all_)


def test_only_the_groups_of_the_samples_are_read(shards, reads):
    assert len(read(shards, limit=3)) == 3
    assert reads == [0, 1]
    del reads[:]
    drawn = read(shards, limit=4, seed=2, skip_bad=True)
    numbers = [int(sample.prompt.split()[-1][:-1]) for sample in drawn]
    assert numbers == sorted(numbers)
    assert len(reads) == len({number // 2 for number in [*numbers, *(line for _, line, _ in drawn.skipped)]})


def test_skipped_rows_are_replaced_in_the_order_that_was_drawn(shards):
    whole = read(shards, limit=11, seed=3, skip_bad=True)
    assert (len(whole), [line for _, line, _ in whole.skipped]) == (11, [5])
    with pytest.raises(SparsightError, match=r"train\]:5: the image of 6 bytes cannot be read"):
        read(shards, limit=12, seed=3)


def test_rows_and_columns(shards):
    rows = RowGroups([str(path) for path in sorted(shards.glob("*.parquet"))])
    assert len(rows) == 12
    assert [rows[i]["question"] for i in (11, 0, 7)] == ["what is 11?", "what is 0?", "what is 7?"]
    assert rows.column("question") == [f"what is {i}?" for i in range(12)]
    assert rows.column("other") == []
    with pytest.raises(IndexError):
        rows[12]


def test_a_group_is_read_in_parts(tmp_path, monkeypatch):
    path = tmp_path / "one.parquet"
    parquet.write_table(pa.table({"n": range(1000), "text": [str(i) * 100 for i in range(1000)]}), path)
    monkeypatch.setattr("sparsight.data.row_groups.PART", 10_000)
    rows = RowGroups([str(path), str(path)])
    assert [rows[i]["n"] for i in (0, 5, 999, 1000, 1998, 998, 3)] == [0, 5, 999, 0, 998, 998, 3]
    assert 1 <= len(rows._part) < 500


@pytest.mark.parametrize("written", ["datasets", "arrow"])
def test_drawn_samples_are_all_that_stays_in_memory(written, tmp_path):
    """1,500 photos in a file, 50 of them drawn, in a process of its own; growth in MB, without what is imported."""
    noise = np.random.default_rng(0)
    small = [Image.fromarray(noise.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 480)) for _ in range(5)]
    files = [io.BytesIO() for _ in small]
    for file, image in zip(files, small, strict=True):
        image.save(file, "JPEG", quality=98)
    cells = [{"bytes": files[i % 5].getvalue() + bytes(str(i), "ascii"), "path": f"{i}.jpg"} for i in range(1500)]
    columns = {"image": cells, "question": ["what?"] * 1500, "answer": ["noise"] * 1500}
    path = tmp_path / "photos.parquet"
    if written == "datasets":
        text = datasets.Value("string")
        kinds = datasets.Features({"image": datasets.Image(), "question": text, "answer": text})
        datasets.Dataset.from_dict(columns, features=kinds).to_parquet(path)
    else:
        parquet.write_table(pa.table(columns), path)
    assert path.stat().st_size > 100 * 2**20
    script = """
import sys, datasets, pyarrow.parquet
from sparsight.data import read
def held():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1000
before = held()
samples = read(sys.argv[1], limit=50, seed=1)
assert {sample.load_images()[0].size for sample in samples} == {(640, 480)}
print(len(samples), held() - before)
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    count, growth = map(float, done.stdout.split())
    assert count == 50
    assert growth <= 50


def test_images_of_a_table_are_not_kept(shards):
    samples = read(shards, skip_bad=True)
    assert [type(image) for sample in samples for image in sample.images] == [StoredImage] * 11
    assert samples[3].load_images()[0].getpixel((0, 0)) == (30, 0, 0)
