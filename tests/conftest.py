"""What every test sees: the tiny models on disk, no network, and torchvision beside a CPU-only torch."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path

import pytest

import zoo


@pytest.fixture(scope="session")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give `zoo_folder(name)`: the saved model and processor of one family, made once per session; read only."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = zoo.folder(name, tmp_path_factory.mktemp("zoo") / name)
        return made[name]

    return find
