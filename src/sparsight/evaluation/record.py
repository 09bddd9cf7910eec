"""What an evaluation leaves beside a model's weights, where `report` finds it.

`evaluation.json` has the scores and what they were measured on, `predictions.jsonl` an answer a line, and `evaluation/`
small pictures of the first samples, `N.png` for the answer in line N, counted from 0: the data may be gone later. The last
two are parts of the held-out data, so a `.gitignore` keeps them out of what `git` and `huggingface_hub.upload_folder` take.
"""

from __future__ import annotations

import datetime
import json
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

from sparsight.data.sample import Sample
from sparsight.data.sources import Samples
from sparsight.errors import NotWritten, SparsightError
from sparsight.evaluation.evaluate import Result
from sparsight.files import read_json, with_home, without_home, write_json
from sparsight.masks.matrix import count_zeros
from sparsight.memory import peak_memory
from sparsight.model.anatomy import Anatomy
from sparsight.specs import EvaluateSpec
from sparsight.version import VERSION

FORMAT = 1
SCORES, ANSWERS, PICTURES = "evaluation.json", "predictions.jsonl", "evaluation"
SHOWN = 24  # samples with a picture
SIDE = 128  # pixels


def check_recordable(
    model: str | Path, folder: str | Path | None = None, *, instead: str = "`json_file` and `predictions`"
) -> Path:
    """Give the folder to record in, the model's own unless another is named; refuse what cannot be written to.

    Another is for a dense model whose folder is not to be touched; it is made, and nothing else is left there. `instead`
    are the settings that write elsewhere. **Raises** `SparsightError`.
    """
    if folder is not None and (Path(model) / "sparsity.json").is_file():
        raise SparsightError(
            f"`record`: the scores of {model}, a sparse model, belong beside its weights; name no other folder"
        )
    if folder is None and not Path(model).is_dir():
        raise SparsightError(
            f"`record`: {model} is not a folder; a record is kept beside the weights, so download the model into one first"
        )
    folder = Path(model if folder is None else folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SparsightError(
            f"`record`: {folder} cannot be written to ({error.strerror}); copy the model to a folder of yours, or use "
            f"{instead}"
        ) from error
    return folder


def environment() -> dict[str, str]:
    """The versions and the machine that a measurement depends on."""
    import torch

    found = {"sparsight": VERSION, "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    found["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found


def weights_of(model: Any, family: Any = None, body: Anatomy | None = None) -> dict[str, Any]:
    """Count a loaded model: parameters, bytes, bytes with the zeros left out, and per component layers, zeros, parameters.

    Zeros left out: a layer takes its kept weights and one bit per weight, or all its weights where that is less. A model
    that cannot be taken apart, unless its `body` is known, is counted as a whole.
    """
    from sparsight.model.anatomy import anatomy
    from sparsight.model.families import COMPONENTS

    size = sum(p.numel() for p in model.parameters())
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    components: dict[str, dict[str, int]] = {}
    saved = 0
    try:
        body = body or anatomy(model, family)
    except SparsightError:
        return {"parameters": size, "bytes": stored, "packed_bytes": stored, "components": components}
    for component in COMPONENTS:
        layers = body.component(component)
        counts = [(count_zeros(layer.weight), layer.weight.numel(), layer.weight.element_size()) for layer in layers]
        saved += sum(saved_bytes(*each) for each in counts)
        if layers:
            zeros, parameters = (sum(each[i] for each in counts) for i in (0, 1))
            components[component] = {"layers": len(layers), "zeros": zeros, "parameters": parameters}
    return {"parameters": size, "bytes": stored, "packed_bytes": stored - saved, "components": components}


def saved_bytes(zeros: int, parameters: int, item: int) -> int:
    """Bytes that a layer needs less when its zeros are left out and one bit per weight says where they are."""
    return max(0, zeros * item - -(-parameters // 8))


def record_evaluation(
    folder: str | Path, result: Result, samples: Sequence[Sample], facts: Mapping[str, Any], pictures: int = SHOWN
) -> Path:
    """Write scores, answers and pictures into `folder`, the scores last; an earlier evaluation there is replaced.

    `facts` are what else `report` shows: "model", "data", "fingerprint", "settings", "seconds", "memory", the state of the
    weights ("weights", see `identity`), and `weights_of`; date and environment are added. **Raises** `NotWritten`.
    """
    target = Path(folder)
    scores = {
        "format": FORMAT,
        **facts,
        "date": datetime.date.today().isoformat(),
        "environment": environment(),
        "rows": list(result.rows),
        "skipped": result.skipped,
    }
    try:
        (target / SCORES).unlink(missing_ok=True)
        ignore(target, f"/{PICTURES}/", f"/{ANSWERS}")
        write_pictures(samples[:pictures], target / PICTURES)
        result.write_predictions(target / ANSWERS)
        write_json(target / SCORES, without_home(scores))
    except OSError as error:
        raise NotWritten(f"{target}: the evaluation could not be kept there ({error})") from error
    return target / SCORES


def ignore(folder: Path, *patterns: str) -> None:
    """Add patterns to the `.gitignore` of a folder, in place, that are not in it yet."""
    path = folder / ".gitignore"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if missing := [pattern for pattern in patterns if pattern not in lines]:
        path.write_text("\n".join([*lines, *missing]) + "\n", encoding="utf-8")


def write_pictures(samples: Sequence[Sample], folder: str | Path) -> None:
    """Write the images of each sample side by side as `N.png`, at most 128 pixels high and wide each; none without images.

    The folder is emptied first.
    """
    target = Path(folder)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for i, sample in enumerate(samples):
        images = sample.load_images()
        for image in images:
            image.thumbnail((SIDE, SIDE))
        if images:
            beside = Image.new("RGB", (sum(x.width for x in images), max(x.height for x in images)), "white")
            at = 0
            for image in images:
                beside.paste(image, (at, 0))
                at += image.width
            beside.save(target / f"{i}.png", optimize=True)


def read_evaluation(folder: str | Path) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]] | None:
    """Read recorded scores and answers; None if there are none. **Raises** `SparsightError` if they are damaged."""
    path = Path(folder) / SCORES
    if not path.is_file():
        return None
    scores = with_home(read_json(path, "evaluate again with `record`"))
    try:
        if scores["format"] != FORMAT:
            raise SparsightError(f"{path}: format {scores['format']} is not {FORMAT}; evaluate again with `record`")
        if not isinstance(scores["rows"], list):
            raise TypeError("rows are no list")
        answers = read_answers(Path(folder) / ANSWERS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SparsightError(f"{path}: is damaged ({error}); evaluate again with `record`") from error
    return scores, answers


def read_answers(path: Path) -> tuple[dict[str, Any], ...]:
    """Read what `Result.write_predictions` wrote. `ValueError` with the line for what is no such answer."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                rows.append(
                    {key: row[key] for key in ("id", "kind", "prompt", "prediction", "answers", "correct", "scores")}
                )
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from error
    return tuple(rows)


def keep_evaluation(
    folder: Path, result: Result, usable: Sequence[Sample], *, name: str | Path, sparsity: Mapping[str, Any] | None,
    model: Any, samples: Samples, spec: EvaluateSpec, seconds: float, body: Anatomy | None = None,
) -> None:  # fmt: skip
    """Record an evaluation of the model `name` in `folder`, with what `report` shows of it, and put the scores on its card.

    `sparsity` is the content of its `sparsity.json`, `model` the model as it answered; `samples` are those that were read,
    `usable` those that it took.
    """
    from sparsight.checkpoint.folder import family_of, identity
    from sparsight.checks import whole_name
    from sparsight.evaluation.card import refresh_card

    facts = {
        "model": whole_name(name),
        "data": samples.source,
        "fingerprint": samples.fingerprint,
        **({"read": dict(result.data)} if result.data else {}),
        "settings": {**spec.facts(), "device": spec.device},
        "seconds": seconds,
        "memory": peak_memory(spec.device),
        "weights": identity(name) if sparsity is not None else None,
        **weights_of(model, family_of(sparsity), body),
    }
    record_evaluation(folder, result, usable, facts)
    refresh_card(folder, {**facts, "rows": list(result.rows)})
