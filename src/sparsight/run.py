"""The whole road of one recipe: evaluate the dense model, prune, restore, evaluate both, prove, report.

A folder holds `run.json` (the resolved recipe), `dense/` (scores only), `pruned/`, `restored/` and `report.html`. Started
again after a kill it goes on: what is finished is not done again, what was interrupted is resumed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsight import recipe as recipes
from sparsight import verbs
from sparsight.data import read
from sparsight.errors import Interrupted, NotWritten, SparsightError
from sparsight.evaluate.record import SCORES
from sparsight.model.checkpoint import identity, read_record
from sparsight.model.unfinished import parents

Progress = Callable[[str, int, int], None]

SECTIONS = ("prune", "restore", "evaluate")
FILE, PAGE = "run.json", "report.html"
DENSE, PRUNED, RESTORED = "dense", "pruned", "restored"


def run(
    recipe: str | Path, out: str | Path, *, changes: Sequence[str] = (), progress: Progress | None = None
) -> dict[str, Any]:
    """Take the whole road of a recipe: prune, restore, evaluate the dense, the pruned and the restored model, prove, report.

    `changes` are `key.sub=value` and stand for what the file says. `out` gets the models `pruned` and `restored`, the scores
    of the dense one and `report.html`. Started again after a kill, it goes on.

    **Raises** `SparsightError` before anything is computed for a recipe that cannot be run, and for a folder that holds
    something else, or a run with other settings.
    """
    asked = recipes.read(recipe, changes, sections=SECTIONS)
    recipes.check_values(asked)
    if not isinstance(asked.get("held_out"), str):
        raise SparsightError(f"{recipe}: held_out is missing; name the samples to score on, which are not those of data")
    if read_record(asked["model"]):
        raise SparsightError(f"{asked['model']}: is pruned already; a run begins with the dense model that it was made of")
    folder = Path(out)
    told = {**asked, "files": identity(asked["model"])}
    for key in ("data", "held_out"):
        told[f"{key}_fingerprint"] = read(asked[key], skip_bad=bool(asked.get("skip_bad"))).fingerprint
    _check(folder, json.loads(json.dumps(told, default=str)))
    try:
        return _take(asked, folder, told, progress)
    except (KeyboardInterrupt, Interrupted) as stop:
        raise Interrupted(f"interrupted; what is done is in {folder}: the same command goes on") from stop
    except OSError as error:
        raise NotWritten(
            f"{folder}: could not be written to ({error.strerror or error}); what is done stays there"
        ) from error


def _take(asked: Mapping[str, Any], folder: Path, told: Mapping[str, Any], progress: Progress | None) -> dict[str, Any]:
    """Stage after stage, those that are finished left out."""
    shared = {key: asked[key] for key in ("dtype", "device", "family", "skip_bad") if asked.get(key) is not None}
    score = {**{k: v for k, v in shared.items() if k != "family"}, **(asked.get("evaluate") or {})}

    def evaluate(name: str, model: str | Path, record: bool | Path = True) -> Any:
        if (folder / name / SCORES).is_file():
            return None
        return verbs.evaluate(model, data=asked["held_out"], record=record, progress=_part(progress, name), **score)

    pruned, restored = folder / PRUNED, folder / RESTORED
    with _told(folder, told):
        if not pruned.is_dir():
            how = {**shared, **(asked.get("prune") or {})}
            begun = pruned.with_name(f"{PRUNED}.unfinished").is_dir()
            verbs.prune(asked["model"], pruned, data=asked["data"], resume=begun, progress=_part(progress, "prune"), **how)
    evaluate(DENSE, asked["model"], folder / DENSE)
    evaluate(PRUNED, pruned)
    shown = [folder / DENSE, pruned]
    if asked.get("restore") is not None:
        if not restored.is_dir():
            how = {**shared, **asked["restore"]}
            begun = restored.with_name(f"{RESTORED}.unfinished").is_dir()
            verbs.restore(
                pruned, restored, data=asked["data"], teacher=asked["model"], resume=begun,
                progress=_part(progress, "restore"), **how,
            )  # fmt: skip
        evaluate(RESTORED, restored)
        shown.append(restored)
    last = shown[-1]
    dense_merge = (asked.get("restore") or {}).get("adapter") == "lora"
    found = verbs.verify(last, None if last == pruned or dense_merge else pruned)
    page = verbs.report(shown, out=folder / PAGE, overwrite=True)
    return {"out": str(folder), "runs": [str(path) for path in shown], "verify": found, "report": str(page)}


def _part(progress: Progress | None, stage: str) -> Progress | None:
    """Progress of one stage, with its name in front."""
    if progress is None:
        return None
    return lambda note, done, total: progress(f"{stage}: {note}", done, total)


@contextlib.contextmanager
def _told(folder: Path, told: Mapping[str, Any]) -> Iterator[None]:
    """Write down what the folder is for; it is gone again where the first stage refuses."""
    with parents(folder / FILE):
        (folder / FILE).write_text(json.dumps(told, indent=1, default=str) + "\n", encoding="utf-8")
        try:
            yield
        except BaseException:
            if [path.name for path in folder.iterdir()] == [FILE]:
                (folder / FILE).unlink()
            raise


def _check(folder: Path, facts: Mapping[str, Any]) -> None:
    """Refuse a folder that holds anything but this very run; its data may lie elsewhere now.

    Settings of what is not yet begun may be others, so that a mistake in them costs nothing that is done.
    """
    earlier = recipes.told(folder, FILE, "run")
    begun = {"restore": any(folder.glob(f"{RESTORED}*")), "evaluate": any(folder.glob(f"*/{SCORES}"))}
    open_ = {"data", "held_out", *(key for key, done in begun.items() if not done)}
    for key in {**(earlier or {}), **facts}.keys() - open_:
        if earlier is not None and earlier.get(key) != facts.get(key):
            raise SparsightError(
                f"{folder}: holds a run with {key}={earlier.get(key)!r}, this one has {facts.get(key)!r}; "
                "give another folder"
            )
