"""Trackers get the recipe, zeros per component, losses and layer errors; the log of tensorboard survives."""

import warnings

import pytest

from sparsight import api, trackers
from sparsight.errors import Notice, SparsightError

pytest.importorskip("tensorboardX")


@pytest.fixture(autouse=True)
def no_folder_of_the_environment(monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)


def words(folder):
    (events,) = (folder / "runs").rglob("events.out.tfevents*")
    return events.read_bytes()


def test_prune_and_restore_leave_their_logs_in_the_folder(zoo_folder, scenes, tmp_path):
    sparse = tmp_path / "sparse"
    api.prune(zoo_folder("llava"), sparse, data=scenes, samples=4, report_to="tensorboard", sparsity=0.5)
    text = words(sparse)
    for word in (b"layer_error", b"block_error", b"sparsity/vision", b"zeros/language", b"sparsight.prune.method"):
        assert word in text
    how = {"data": scenes, "steps": 2, "batch_size": 2, "samples": 6, "held_out": 2, "report_to": "tensorboard"}
    api.restore(sparse, tmp_path / "restored", **how)
    text = words(tmp_path / "restored")
    for word in (b"train/ce", b"train/kl", b"eval/loss", b"sparsity/vision", b"zeros/language"):
        assert word in text
    for word in (b"sparsight.restore.adapter", b"sparsight.prune.method", b"sparsight.base_model"):
        assert word in text
    assert api.verify(tmp_path / "restored", against=sparse)["differences"] == {}


def test_the_weights_are_the_same_with_and_without_a_tracker(zoo_folder, scenes, tmp_path):
    from zoo import digest

    for name, more in (("with", {"report_to": "tensorboard"}), ("without", {})):
        api.prune(zoo_folder("llava"), tmp_path / name, data=scenes, samples=4, **more)
    a, b = digest(tmp_path / "with"), digest(tmp_path / "without")
    assert {name: x for name, x in a.items() if not name.startswith("runs")} == b


def test_a_model_in_memory_logs_beside_the_work(built, scenes, tmp_path, monkeypatch):
    import copy

    monkeypatch.chdir(tmp_path)
    model, processor = built("llava")
    model = copy.deepcopy(model)
    record = api.prune(model, data=scenes, processor=processor, samples=4, sparsity=0.5, report_to="tensorboard")
    assert b"layer_error" in words(tmp_path)
    (tmp_path / "runs").rename(tmp_path / "earlier")
    api.restore(model, data=scenes, processor=processor, kl=0, steps=1, batch_size=2, samples=2, report_to="tensorboard")
    assert b"train/ce" in words(tmp_path)
    assert record.layer_errors


def test_a_tracker_that_fails_costs_a_line(zoo_folder, scenes, tmp_path, monkeypatch):
    def broken(names):
        raise ConnectionError("no server")

    monkeypatch.setattr(trackers, "get_reporting_integration_callbacks", broken)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=4, report_to="tensorboard")
    lines = [str(each.message) for each in seen if each.category is Notice]
    assert "a tracker of tensorboard failed (no server); the model is written" in lines
    assert api.verify(tmp_path / "sparse")["differences"] == {}


def test_settings_as_trackers_show_them():
    recipe = {"model": "m", "prune": [{"method": "wanda", "ignore": ["a", "b"]}, {"seed": 1}], "restore": {"lr": 0.1}}
    assert trackers.flat(recipe) == {
        "sparsight.model": "m", "sparsight.prune.1.method": "wanda", "sparsight.prune.1.ignore": "['a', 'b']",
        "sparsight.prune.2.seed": 1, "sparsight.restore.lr": 0.1,
    }  # fmt: skip


def test_a_tracker_that_refuses_is_one_line(zoo_folder, scenes, tmp_path, monkeypatch):
    """A real one: tensorboard is sent to a folder that is a file."""
    sparse = tmp_path / "sparse"
    api.prune(zoo_folder("llava"), sparse, method="magnitude")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file"))
    how = {"data": scenes, "steps": 2, "batch_size": 2, "samples": 4, "report_to": "tensorboard"}
    with pytest.raises(
        SparsightError, match=r"`report_to`: TensorBoard failed \(.+\); mend its settings, or leave it out"
    ) as error:
        api.restore(sparse, tmp_path / "restored", **how)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "restored").exists()


def test_a_tracker_that_fails_later_costs_a_line(zoo_folder, scenes, tmp_path, monkeypatch):
    from transformers.integrations import TensorBoardCallback

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardCallback, "on_log", fail)
    sparse = tmp_path / "sparse"
    api.prune(zoo_folder("llava"), sparse, method="magnitude")
    how = {"data": scenes, "steps": 2, "batch_size": 2, "samples": 4, "report_to": "tensorboard"}
    with pytest.warns(Notice, match="TensorBoard failed .*No space left on device.*, and hears no more of this run"):
        api.restore(sparse, tmp_path / "restored", **how)
    assert (tmp_path / "restored" / "model.safetensors").is_file()
