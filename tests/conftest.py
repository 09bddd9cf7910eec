"""What every test sees: the tiny models on disk, no network, and torchvision beside a CPU-only torch."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import gc
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a script's background; commands under test inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

gc.disable()  # until the tests are found: what imports make stays, and looking for garbage in it takes seconds

from sparsight.cli import app as cli  # noqa: E402

import zoo  # noqa: E402

LONG = ("test_many_processes.py", "test_interrupted.py", "test_sweep.py", "test_guides.py", "test_run.py", "test_report.py",
        "test_trainer.py", "test_in_memory.py", "test_estimate.py", "test_pipeline.py", "test_adapt_kernels.py",
        "test_specs.py")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that no worker waits at the end for another."""
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _imported_modules_are_no_garbage() -> None:
    """What is alive when a file of tests begins lives on: collections, of which a restoration makes four, pass it over."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give `zoo_folder(name)`: the saved model and processor of one family, made once per session; read only."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = zoo.folder(name, tmp_path_factory.mktemp("zoo") / name)
        return made[name]

    return find


@pytest.fixture(scope="module")
def built() -> Callable[[str], tuple[Any, Any]]:
    """Give `built(name)`: the model and processor of one family in memory, made once per file of tests."""
    made: dict[str, tuple[Any, Any]] = {}

    def get(name: str) -> tuple[Any, Any]:
        if name not in made:
            made[name] = zoo.build(name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A folder with metadata.jsonl: pictures, questions, captions."""
    folder = tmp_path_factory.mktemp("scenes")
    lines = []
    for i, image in enumerate(zoo.images(12)):
        image.save(folder / f"{i}.png")
        kind = ("vqa", "caption")[i % 2]
        answer = ("red", "a blue circle on the left", "yes")[i % 3]
        lines.append(json.dumps({"image": f"{i}.png", "prompt": "what color is this?", "answer": answer, "kind": kind}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Call the command line in this process, standing in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["sparsight", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return call
