"""Files and folders have the modes that the user's umask gives, whatever wrote them."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from sparsight import api
from sparsight.files import make_beside, replace_file, set_modes

UMASKS = [0o022, 0o027, 0o077, 0o002]


@pytest.fixture(params=UMASKS, ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder):
    """Every mode of a folder, its own first: of folders, and of files."""
    found = {True: set(), False: set()}
    for path in (folder, *folder.rglob("*")):
        found[path.is_dir()].add(stat.S_IMODE(path.stat().st_mode))
    return found[True], found[False]


def test_a_written_model(umask, zoo_folder, scenes, tmp_path):
    api.prune(zoo_folder("llava"), tmp_path / "sparse", method="magnitude", sparsity=0.5)
    assert modes(tmp_path / "sparse") == ({0o777 & ~umask}, {0o666 & ~umask})
    if umask == 0o027:
        cache, out = tmp_path / "cache", tmp_path / "out"
        how = {"data": scenes, "steps": 2, "batch_size": 4, "save_adapter": True}
        api.restore(tmp_path / "sparse", out, teacher_mode="cached", teacher_cache=cache, **how)
        for folder in (out, cache):
            assert modes(folder) == ({0o777 & ~umask}, {0o666 & ~umask})
        assert (out / "adapter" / "sparse_lora.safetensors").is_file()


def test_a_folder_that_is_replaced(umask, zoo_folder, tmp_path):
    for _ in range(2):
        api.prune(zoo_folder("llava"), tmp_path / "out", method="magnitude", sparsity=0.5, overwrite=True)
    assert modes(tmp_path / "out") == ({0o777 & ~umask}, {0o666 & ~umask})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("write", ["text", "safetensors", "torch"])
def test_a_replaced_file(write, umask, tmp_path):
    path = tmp_path / "file"
    with replace_file(path) as beside:
        if write == "text":
            beside.write_text("a")
        elif write == "torch":
            torch.save(torch.ones(2), beside)
        else:
            save_file({"a": torch.ones(2)}, beside)
    assert modes(tmp_path)[1] == {0o666 & ~umask}
    assert list(tmp_path.iterdir()) == [path]


def test_set_modes_leaves_links_and_what_they_point_to(umask, tmp_path):
    (tmp_path / "own").write_text("")
    (tmp_path / "own").chmod(0o600)
    folder = make_beside(tmp_path / "folder")
    (folder / "link").symlink_to(tmp_path / "own")
    (folder / "broken").symlink_to(tmp_path / "nothing")
    (folder / "file").write_text("")
    (folder / "file").chmod(0o640)
    set_modes(folder)
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o666 & ~umask
    assert sorted(path.name for path in folder.iterdir()) == ["broken", "file", "link"]
