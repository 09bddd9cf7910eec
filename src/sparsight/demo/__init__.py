"""Small trained models and the scenes they were trained on, to try every verb in minutes."""

from pathlib import Path

_FOLDER = Path(__file__).parent / "models"
MODELS: dict[str, Path] = {"instructblip": _FOLDER / "instructblip", "llava": _FOLDER / "llava"}
"""Folders for `from_pretrained`, by model type; docs/demo-models.md says how they were made and how good they are."""
