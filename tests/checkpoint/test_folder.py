"""Folders appear whole or not at all, and verify finds every kind of damage by the layer's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsight import SparsightError, api, recipe
from sparsight.checkpoint.folder import atomic_folder, read_recipe, read_record
from sparsight.files import check_output

LAYER = "model.language_model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, zoo_folder):
    out = tmp_path_factory.mktemp("pruned") / "out"
    api.prune(zoo_folder("llava"), out, method="magnitude", pattern="2:4")
    return out


def damaged(pruned, tmp_path, change):
    """A copy of the pruned folder with one layer's weight changed in the file."""
    folder = shutil.copytree(pruned, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    key = next(k for k in tensors if k.endswith("layers.0.mlp.up_proj.weight"))
    tensors[key] = change(tensors[key].clone())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def fill_one(W):
    W.view(-1)[(W.view(-1) == 0).nonzero()[0]] = 1.0
    return W


def swap_within_group(W):
    group = W[0, :4].clone()
    W[0, :4] = torch.where(group == 0, group.sum(), 0.0)
    return W


def move_zero(W):
    W.view(-1, 4)[[0, 1]] = W.view(-1, 4)[[1, 0]]
    W[0, :4], W[0, 4:8] = torch.tensor([0.0, 1, 1, 1]), torch.tensor([0.0, 0, 0, 1])
    return W


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (fill_one, "zeros, recorded"),
        (swap_within_group, "mask hash differs"),
        (move_zero, "does not hold the pattern 2:4"),
        (lambda W: W * 2, "weight hash differs"),
    ],
)
def test_verify_names_the_layer_and_the_damage(pruned, tmp_path, change, says):
    assert api.verify(pruned)["differences"] == {}
    found = api.verify(damaged(pruned, tmp_path, change))
    assert set(found["differences"]) == {LAYER}
    assert says in "; ".join(found["differences"][LAYER])


def test_verify_against(pruned, tmp_path, zoo_folder):
    lost = api.verify(damaged(pruned, tmp_path, fill_one), against=pruned)["differences"]
    assert "1 zeros lost" in lost[LAYER]
    more_zeros = damaged(pruned, tmp_path / "b", lambda W: W * 0)
    (more_zeros / "sparsity.json").unlink()
    assert api.verify(more_zeros, against=pruned)["differences"] == {}  # the support may shrink, never grow
    dense = api.verify(zoo_folder("llava"), against=pruned)["differences"]
    assert len(dense) == 33
    with pytest.raises(SparsightError, match="holds no zeros to compare with"):
        api.verify(pruned, against=zoo_folder("llava"))


def test_verify_sees_another_dtype(pruned, tmp_path):
    folder = shutil.copytree(pruned, tmp_path / "half")
    tensors = {k: v.half() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    found = api.verify(folder)["differences"]
    assert len(found) == 33
    assert any("dtype is float16, recorded float32" in line for line in found[LAYER])


def test_verify_without_a_record(zoo_folder):
    with pytest.raises(SparsightError, match=r"has no sparsity\.json.*`against`"):
        api.verify(zoo_folder("llava"))


def test_a_damaged_record_is_one_line(pruned, tmp_path):
    folder = shutil.copytree(pruned, tmp_path / "copy")
    (folder / "sparsity.json").write_text('{"format": 1, "lay')
    with pytest.raises(SparsightError, match=r"sparsity\.json: is damaged"):
        api.verify(folder)


def test_what_lies_beside_the_weights(pruned):
    names = {p.name for p in pruned.iterdir()}
    assert {"config.json", "model.safetensors", "recipe.yaml", "sparsity.json", "metrics.json", "README.md"} <= names
    card = (pruned / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| language | 21 |" in card
    assert str(pruned.parent) not in card
    assert "sparsity_config" not in (pruned / "config.json").read_text()


def fails(out, error, overwrite=False):
    with atomic_folder(out, overwrite) as folder:
        (folder / "half.safetensors").write_text("x")
        raise error


def test_an_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(SparsightError, match=r"out: could not be written \(.*No space left"):
        fails(tmp_path / "new" / "deep" / "out", OSError(28, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def test_an_old_folder_stays_until_the_new_one_is_whole(pruned, tmp_path):
    out = shutil.copytree(pruned, tmp_path / "out")
    with pytest.raises(KeyError):
        fails(out, KeyError(), overwrite=True)
    assert (out / "sparsity.json").is_file()
    with atomic_folder(out, overwrite=True) as folder:
        (folder / "x").write_text("x")
    assert [p.name for p in out.iterdir()] == ["x"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_deletes_what_is_not_a_model(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SparsightError, match="is not a model folder"), atomic_folder(tmp_path, overwrite=True):
        pass
    with pytest.raises(SparsightError, match="not empty"), atomic_folder(tmp_path):
        pass
    assert (tmp_path / "thesis.tex").is_file()


def test_a_swap_that_fails_half_way_puts_the_old_folder_back(pruned, tmp_path, monkeypatch):
    out = shutil.copytree(pruned, tmp_path / "out")
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == 2:  # the old folder is away, the new one does not arrive
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(SparsightError, match="could not be written"), atomic_folder(out, overwrite=True) as folder:
        (folder / "x").write_text("x")
    assert len(calls) == 3
    assert api.verify(out)["differences"] == {}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(SparsightError, match="is a mount point"):
        check_output(tmp_path)


def test_outputs_that_cannot_be_folders(tmp_path):
    (tmp_path / "file").write_text("x")
    for out, says in ((tmp_path / "file" / "out", "is a file"), (tmp_path / ("x" * 300), "cannot be a folder")):
        with pytest.raises(SparsightError, match=says):
            check_output(out)


@pytest.mark.parametrize("there", [True, False], ids=["empty", "dangling"])
def test_a_link_is_followed(zoo_folder, tmp_path, there):
    (far := tmp_path / "disk" / "out").mkdir(parents=True)
    if not there:
        far.rmdir()
    (link := tmp_path / "link").symlink_to(far, target_is_directory=True)
    api.prune(zoo_folder("llava"), link, sparsity=0.5, method="magnitude")
    assert link.is_symlink()
    assert api.verify(far)["differences"] == {}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]
    assert [p.name for p in far.parent.iterdir()] == ["out"]


def test_a_loop_of_links(zoo_folder, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SparsightError, match="loop: cannot be "):
        api.prune(zoo_folder("llava"), tmp_path / "loop", sparsity=0.5, method="magnitude")
    assert [p.name for p in tmp_path.iterdir()] == ["loop"]


def test_a_folder_does_not_name_the_home_of_the_user(zoo_folder, scenes, tmp_path, monkeypatch):
    """Paths below it are written with `~`, and read again as they are for whoever reads."""
    home = tmp_path / "home" / "anna"
    shutil.copytree(zoo_folder("llava"), home / "dense")
    data = shutil.copytree(scenes, home / "data")
    monkeypatch.setenv("HOME", str(home))
    api.prune(home / "dense", home / "sparse", data=data, samples=2, method="wanda")
    api.evaluate(home / "sparse", data, samples=2, max_new_tokens=1, record=True)
    api.restore(home / "sparse", home / "restored", data=data, samples=2, steps=1, batch_size=2)
    for folder in (home / "sparse", home / "restored"):
        texts = {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".yaml", ".md")}
        assert [name for name, text in texts.items() if "anna" in text] == []
        assert json.loads(texts["sparsity.json"])["base_model"] == "~/dense"
    assert read_record(home / "sparse")["base_model"] == str(home / "dense")
    assert read_recipe(home / "sparse")["model"] == str(home / "dense")
    assert recipe.read(home / "sparse" / "recipe.yaml")["model"] == str(home / "dense")
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    assert read_record(home / "sparse")["base_model"] == str(tmp_path / "other" / "dense")
