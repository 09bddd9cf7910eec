"""Run one recipe: evaluate the dense model, prune, restore, evaluate both, verify, report.

A folder holds `run.json` (the resolved recipe), `dense/` (scores only), `pruned/`, `restored/` and `report.html`. Started
again after a kill, it continues: finished stages are skipped, and an interrupted one is resumed. Every set of weights is
loaded once and every sample read once: the dense model is scored and then pruned in memory, the pruned one is scored as it
was written, and the restored one is loaded from its files, scored, and compared with the zeros that it had before.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsight import recipe as recipes
from sparsight.allocation.plan import check_plan
from sparsight.checkpoint.folder import family_of, read_record, source_of
from sparsight.checkpoint.lock import locked
from sparsight.checkpoint.stages import stages_of
from sparsight.checkpoint.unfinished import parents
from sparsight.checkpoint.verify import Zeros, verify
from sparsight.checks import need_packages
from sparsight.data import Source, read, read_with
from sparsight.errors import Interrupted, NotWritten, SparsightError, quote
from sparsight.evaluation.record import SCORES
from sparsight.evaluation.verb import evaluate_folder
from sparsight.files import write_json
from sparsight.model.anatomy import anatomy
from sparsight.model.load import load
from sparsight.model.source import ModelSource
from sparsight.progress import Progress, prefix
from sparsight.pruning.verb import check_prune, prune_folder
from sparsight.recipe import BESIDE, in_recipe, spec_of
from sparsight.restoring.adapters import ADAPTERS
from sparsight.restoring.division import held_out_count
from sparsight.restoring.verb import check_restore, restore_folder

FILE, PAGE = "run.json", "report.html"
DENSE, PRUNED, RESTORED = "dense", "pruned", "restored"


def run(
    recipe: str | Path, out: str | Path, *, changes: Sequence[str] = (), progress: Progress | None = None
) -> dict[str, Any]:
    """Run a recipe; see `sparsight.run`. **Raises** `SparsightError`, and `NotWritten` where a file cannot be written."""
    settings = recipes.read(recipe, changes, extra=("search",))
    scored = settings.get("evaluate", {}) is not None
    searched = settings.get("search") is not None
    if scored or searched:
        recipes.held_out_of(settings, recipe)
    if scored:
        need_packages("the report of a run", "report", matplotlib="matplotlib")
    if searched:
        from sparsight.sweeps.search import check_search

        with in_recipe("search"):
            check_search(spec_of(settings, "search"))
    for section in stages_of(settings, "restore"):
        with in_recipe("restore"):
            check_restore(spec_of(settings, "restore", section))
    if read_record(settings["model"]):
        raise SparsightError(
            f"{settings['model']}: is pruned already; a run begins with the dense model that it was made of"
        )
    pipeline = _Pipeline(settings, Path(out), scored, progress)
    with locked(out):
        pipeline.check()
        try:
            return pipeline.run()
        except (KeyboardInterrupt, Interrupted) as stop:
            raise Interrupted(f"interrupted; what is done is in {out}: the same command goes on") from stop
        except OSError as error:
            reason = error.strerror or error
            raise NotWritten(f"{out}: could not be written to ({reason}); what is done stays there") from error
        except SparsightError as error:
            if error.work is not None:
                again = f"what was done is in {error.work}: the same command goes on from there"
                anew = f"with other settings delete {error.work} first, or give another folder"
                error.advice = again if error.retry else anew
            raise


class _Pipeline:
    """One run: its settings, its folder, its data, and the one model in memory."""

    def __init__(self, settings: dict[str, Any], folder: Path, scored: bool, progress: Progress | None) -> None:
        self.settings, self.folder, self.scored, self.progress = settings, folder, scored, progress
        self.spec = spec_of(settings, "evaluate")
        self.sources: dict[Any, Source] = {}
        self.read: dict[str, Any] = {}  # what was read of the data, where that is not all
        self.loaded: tuple[str, Any, Any] | None = None  # the name of the model, the model, its processor
        self.zeros: Zeros | None = None  # those of the pruned model

    def source(self, data: Any, spec: Any, *, held_out: bool = False) -> Source | None:
        """A data source as settings read it, opened once; `held_out` for one to score on."""
        if data is None:
            return None
        task = {"task": spec.task, "prompt": spec.prompt} if held_out else {}
        key = (str(data), spec.split, str(spec.images), held_out)
        if key not in self.sources:
            self.sources[key] = Source(data, spec.split, images=spec.images, held_out=held_out, **task)
        return self.sources[key]

    def model(self, name: str, path: str | Path) -> tuple[Any, Any]:
        """The model of a stage and its processor, in memory."""
        if self.loaded is None or self.loaded[0] != name:
            self.loaded = None  # never two models in memory
            self.loaded = (name, *load(path, dtype=self.spec.dtype, device=self.spec.device))
        return self.loaded[1], self.loaded[2]

    def check(self) -> None:
        """Refuse a folder that holds another run.

        The paths of the data may have changed, and so may the settings of stages that have not begun.
        """
        settings, folder = self.settings, self.folder
        self.facts = {**settings, "files": source_of(settings["model"])}
        first = next((verb for verb in ("prune", "search", "restore") if stages_of(settings, verb)), "prune")
        learned = spec_of(settings, first, next(iter(stages_of(settings, first)), {}))
        specs = {"data": learned, **({"held_out": self.spec} if self.scored else {})}
        for key, spec in specs.items():
            if (source := self.source(settings.get(key), spec, held_out=key == "held_out")) is not None:
                samples = read(source, skip_bad=spec.skip_bad)
                self.facts[f"{key}_fingerprint"] = samples.fingerprint
                self.read |= {key: samples.facts} if samples.facts else {}
        facts = json.loads(json.dumps(self.facts, default=str))
        earlier = recipes.read_state(folder, FILE, "run")
        begun = {verb: any(folder.glob(f"{PRUNED}*")) for verb in ("prune", "search")}
        begun |= {"restore": any(folder.glob(f"{RESTORED}*")), "evaluate": any(folder.glob(f"*/{SCORES}"))}
        free = {"data", "held_out", "images", *(key for key, done in begun.items() if not done)}
        for key in {**(earlier or {}), **facts}.keys() - free:
            if earlier is not None and self.work(key, earlier.get(key)) != self.work(key, facts.get(key)):
                raise SparsightError(
                    f"{folder}: holds a run with {key}={quote(earlier.get(key))}, this one has {quote(facts.get(key))}; "
                    "give another folder"
                )

    def work(self, key: str, value: Any) -> Any:
        """What must stay as it was for a run to go on: not how the samples are divided to fit into memory."""
        if key == "evaluate" and isinstance(value, Mapping):
            return {name: setting for name, setting in value.items() if name != "batch_size"}
        if key != "restore":
            return value
        sections = stages_of({key: value}, key)
        beside = [{name: section[name] for name in BESIDE[key] if name in section} for section in sections]
        return [
            (spec_of(self.settings, key, section).same_work, more) for section, more in zip(sections, beside, strict=True)
        ]

    def run(self) -> dict[str, Any]:
        """Run every stage that is not finished."""
        folder, dense = self.folder, self.settings["model"]
        searched = self.settings.get("search") is not None
        pruned, prunings = folder / PRUNED, stages_of(self.settings, "prune") or ([] if searched else [{}])
        restorations = stages_of(self.settings, "restore")
        with _state(folder, self.facts):
            if not pruned.is_dir() and not searched:
                for section in prunings:
                    self.check_pruning(section)
            for section in restorations:
                spec = spec_of(self.settings, "restore", section)
                self.check_fingerprint(section, spec, spec.seed if spec.samples else None)
            self.evaluate(DENSE, dense, folder / DENSE)
            if not pruned.is_dir():
                found = pruned if not prunings else folder / f"{PRUNED}-0"
                if searched and not found.is_dir():
                    self.search(found)
                self.prune(str(found) if searched else dense, pruned, prunings)
        self.evaluate(PRUNED, pruned)
        last = pruned
        for number, section in enumerate(restorations, 1):
            name = RESTORED if number == len(restorations) else f"{RESTORED}-{number}"
            self.restore(last, folder / name, section)
            last = folder / name
        if restorations:
            self.evaluate(RESTORED, last)
        return self.finish(last, pruned, restorations)

    def check_pruning(self, section: Mapping[str, Any]) -> None:
        """Refuse an invalid pruning before anything is computed."""
        spec = spec_of(self.settings, "prune", section)
        with in_recipe("prune"):
            _, policy = check_prune(spec, section.get("data", self.settings.get("data")))
            self.check_fingerprint(section, spec, spec.seed)
            model, _ = self.model(self.settings["model"], self.settings["model"])
            check_plan(anatomy(model, family_of(None, spec.family)), spec, policy)

    def check_fingerprint(self, section: Mapping[str, Any], spec: Any, seed: int | None) -> None:
        """Refuse other samples than those that a recipe was written from."""
        source = self.samples_of(section, spec)
        if source is None or "fingerprint" not in section:
            return
        parts = [read(source, limit=spec.samples, seed=seed, skip_bad=spec.skip_bad)]
        other = getattr(spec, "held_out", None)
        if other is not None and held_out_count(other) is None:
            parts.append(read_with(other, spec, held_out=True))
        if "".join(part.fingerprint for part in parts) != section["fingerprint"]:
            raise SparsightError(
                f"{source}: holds other samples than those that the recipe was written from; give those, or take "
                f"{spec.verb}.fingerprint out of the recipe"
            )

    def search(self, out: Path) -> None:
        """Write the model that a search finds."""
        from sparsight.sweeps.search import search

        self.loaded = None
        settings = self.settings
        with in_recipe("search"):
            search(
                settings["model"], out, spec_of(settings, "search"), data=settings["data"], held_out=settings["held_out"],
                progress=prefix(self.progress, "search"),
            )  # fmt: skip

    def prune(self, model: str, out: Path, sections: Sequence[Mapping[str, Any]]) -> None:
        """Prune a model in memory, step by step where there are several, and write every step."""
        for number, section in enumerate(sections, 1):
            target = out if number == len(sections) else out.with_name(f"{out.name}-{number}")
            if not target.is_dir():
                begun = target.with_name(f"{target.name}.unfinished").is_dir()
                loaded = self.model(model, model)
                self.loaded = None  # it is changed from here on
                spec = spec_of(self.settings, "prune", section)
                with in_recipe("prune"):
                    prune_folder(
                        model, target, spec, data=self.samples_of(section, spec), resume=begun,
                        loaded=loaded, progress=prefix(self.progress, "prune"),
                    )  # fmt: skip
                self.loaded = (str(target), *loaded)
            model = str(target)

    def restore(self, sparse: Path, out: Path, section: Mapping[str, Any]) -> None:
        """Restore the pruned model, which is in memory if it was pruned or scored just now."""
        if out.is_dir():
            return
        spec = spec_of(self.settings, "restore", section)
        source = ModelSource(sparse, device=spec.device)
        if self.loaded is not None and self.loaded[0] == str(sparse):
            source = ModelSource(sparse, self.loaded[1], self.loaded[2], spec.device)
            self.zeros = self.zeros or Zeros.of(self.loaded[1], str(sparse))
        self.loaded = None
        with in_recipe("restore"):
            restore_folder(
                sparse, out, spec, data=self.samples_of(section, spec),
                teacher=section.get("teacher", self.settings["model"]),
                resume=out.with_name(f"{out.name}.unfinished").is_dir(), progress=prefix(self.progress, "restore"),
                source=source,
            )  # fmt: skip

    def samples_of(self, section: Mapping[str, Any], spec: Any) -> Source | None:
        """The data of a section: its own, or the recipe's."""
        return self.source(section.get("data", self.settings.get("data")), spec)

    def evaluate(self, name: str, model: str | Path, record: bool | Path = True) -> None:
        """Score a model and record the scores, unless they are there."""
        if self.scored and not (self.folder / name / SCORES).is_file():
            with in_recipe("evaluate"):
                evaluate_folder(
                    model, self.source(self.settings["held_out"], self.spec, held_out=True), self.spec, record=record,
                    loaded=self.model(str(model), model), progress=prefix(self.progress, name),
                )  # fmt: skip

    def finish(self, last: Path, pruned: Path, restorations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Verify the zeros in the files of the last model, and write the report."""
        masked = all(ADAPTERS[spec_of(self.settings, "restore", section).adapter].masked for section in restorations)
        read_back = self.loaded[1] if restorations and self.loaded and self.loaded[0] == str(last) else None
        proof = verify(last, (self.zeros or pruned) if restorations and masked else None, read_back)
        shown = [self.folder / DENSE, pruned, *([last] if restorations else [])] if self.scored else []
        done = {"out": str(self.folder), "runs": [str(path) for path in shown], "verify": proof, "report": None}
        done |= {"data": self.read} if self.read else {}
        if self.scored:
            from sparsight.reporting.report import report

            done["report"] = str(report(shown, out=self.folder / PAGE, overwrite=True))
        return done


@contextlib.contextmanager
def _state(folder: Path, facts: Mapping[str, Any]) -> Iterator[None]:
    """Write run.json; remove it if the first stage raises before anything else is written."""
    with parents(folder / FILE):
        write_json(folder / FILE, facts)
        try:
            yield
        except BaseException:
            if [path.name for path in folder.iterdir()] == [FILE]:
                (folder / FILE).unlink()
            raise
