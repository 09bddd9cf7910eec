"""Merging into files, one part of the model at a time, against merging in memory."""

from __future__ import annotations

import pytest

import sparsight
from sparsight import api
from sparsight.model.skeleton import Unfit
from sparsight.model.stream import Stream
from sparsight.restoring import merge, verb

CASES = [
    ("llava", "sparselora", "wanda", "float16"),  # the teacher's weights below
    ("llava", "lora", "sparsegpt", "auto"),
    ("qwen3-vl-moe", "sparselora", "sparsegpt", "auto"),  # fused experts
    ("instructblip-t5", "sparselora", "wanda", "bfloat16"),  # tied embeddings
]


@pytest.mark.parametrize(("name", "adapter", "method", "dtype"), CASES)
def test_files_are_those_of_a_merge_in_memory(name, adapter, method, dtype, zoo_folder, scenes, tmp_path, monkeypatch):
    sparse = tmp_path / "sparse"
    api.prune(zoo_folder(name), sparse, data=scenes, sparsity=0.5, method=method, samples=4, dtype=dtype)
    held, put = [], Stream.put

    def watched(stream, part, tensors):
        put(stream, part, tensors)
        held.append({b.name for b in stream.anatomy.blocks if not next(b.module.parameters()).is_meta})

    monkeypatch.setattr(Stream, "put", watched)
    settings = {"data": scenes, "steps": 1, "batch_size": 4, "adapter": adapter, "dtype": dtype}
    api.restore(sparse, tmp_path / "parts", **settings)
    assert max(map(len, held)) == 1

    def whole(*args):
        raise Unfit("asked for")

    monkeypatch.setattr(verb, "write_merged", whole)
    api.restore(sparse, tmp_path / "whole", **settings)
    names = {path.name for path in (tmp_path / "whole").iterdir() if path.is_file()}
    assert names == {path.name for path in (tmp_path / "parts").iterdir() if path.is_file()}
    for file in names - {"metrics.json", "README.md", "recipe.yaml"}:  # which have times and names
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    if adapter == "sparselora":
        assert not api.verify(tmp_path / "parts", against=sparse)["differences"]


def test_another_architecture_is_merged_in_memory(zoo_folder, scenes, tmp_path):
    model, processor = sparsight.load(zoo_folder("llava"))
    sparsight.prune(model, data=scenes, processor=processor, sparsity=0.5, samples=4)
    with pytest.raises(Unfit, match="is not as in"):
        merge.write_merged(sparsight.sparse_lora(model), zoo_folder("gemma3"), tmp_path, None, "cpu")
