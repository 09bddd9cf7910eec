"""One model, loaded once: pruned by a cell, restored, scored, and set back to its dense weights.

Shared work is done once: the samples are read once and encoded once per seed, the dense model is measured once per seed
(for policies, and with `propagate: dense` all moments, kept on disk), cells that differ in their restoration share a
pruning, restorations share a cache of the teacher.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsight.allocation.plan import Plan, make_plan
from sparsight.calibration.moment_cache import MomentCache
from sparsight.calibration.probe import Probe
from sparsight.calibration.rehearsal import rehearse
from sparsight.checkpoint.folder import (
    Record,
    family_of,
    read_metrics,
    sparsity_record,
    write_model,
)
from sparsight.checkpoint.verify import verify
from sparsight.data import Encoder, Source
from sparsight.errors import SparsightError
from sparsight.evaluation import Result
from sparsight.evaluation.record import weights_of
from sparsight.evaluation.verb import question_facts, read_samples, score_answers
from sparsight.files import replace_file, write_json
from sparsight.memory import enough_memory, peak_memory
from sparsight.model.anatomy import Anatomy, anatomy
from sparsight.model.load import load, load_model
from sparsight.model.source import ModelSource
from sparsight.pruning.compose import describe
from sparsight.pruning.loop import can_reuse, check_walk, collect_moments, prune
from sparsight.pruning.record import PruneRecord
from sparsight.pruning.verb import as_samples, encode
from sparsight.recipe import in_recipe, spec_of
from sparsight.restoring.adapters import ADAPTERS
from sparsight.restoring.teacher_cache import cache_key
from sparsight.restoring.verb import restore_folder
from sparsight.sweeps.grid import Cell, Notify, digest

FORMAT = 1


@dataclass
class Calibration:
    """The samples of one seed, encoded, and what was measured on them."""

    batches: list[Any]
    probe: Probe
    read: dict[str, Any] = field(default_factory=dict)  # `Samples.facts`
    caches: dict[str, MomentCache] = field(default_factory=dict)


class Workbench:
    """A model and its samples; `recipe` comes from `recipe.read`, `folder` has the files shared by cells and by runs."""

    def __init__(self, recipe: Mapping[str, Any], folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.spec = spec_of(recipe, "evaluate")
        self.model, self.processor = load(recipe["model"], dtype=self.spec.dtype, device=self.spec.device)
        self.family = family_of(None, recipe.get("family"))
        self.body: Anatomy = anatomy(self.model, self.family)
        longest, skip_bad = self.spec.max_length, self.spec.skip_bad
        self.encoder = Encoder(self.processor, self.model, max_length=longest, skip_bad=skip_bad)
        self._sources: dict[Any, Source] = {}
        samples = read_samples(recipe["held_out"], self.spec)
        self.held_out_facts = {**samples.facts, **question_facts(samples, self.spec, self.model.config.model_type)}
        self.held_out = self.encoder.usable(samples)
        rehearse(self.model, self.encoder, self.held_out)
        self._calibrations: dict[str, Calibration] = {}
        self._dense: dict[int, tuple[torch.nn.Parameter, torch.Tensor]] = {}

    def hash(self) -> str:
        """A hash of the current weights, the configuration and the processor."""
        key = cache_key(self.model, self.encoder, (), "") + self.model.generation_config.to_json_string()
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def data(self, spec: Any) -> Source:
        """The training data, of the split that settings name; opened once."""
        if spec.split not in self._sources:
            self._sources[spec.split] = Source(self.recipe["data"], spec.split, images=spec.images)
        return self._sources[spec.split]

    def calibration(self, cell: Cell) -> Calibration:
        """The calibration batches of a cell's seed; those of the last one are kept."""
        spec = cell.pruning
        key = digest([spec.samples, spec.batch_size, spec.seed, *([spec.split] if spec.split else [])])
        if key not in self._calibrations:
            samples = as_samples(self.data(spec), spec)
            assert samples is not None
            ready, _ = encode(samples, self.processor, self.model, spec)
            check_walk(self.model, self.body, ready)
            self._calibrations = {
                key: Calibration(ready, Probe(self.model, self.body, ready, seed=spec.seed), samples.facts)
            }
        return self._calibrations[key]

    def plan(self, cell: Cell) -> Plan:
        """The cell's plan."""
        spec, probe = cell.pruning, self.calibration(cell).probe
        return make_plan(
            self.body, sparsity=spec.sparsity, pattern=spec.pattern, ignore=spec.ignore, policy=cell.policy, probe=probe
        )  # fmt: skip

    def prune(self, cell: Cell, plan: Plan | None = None) -> PruneRecord:
        """Prune the model in place; `undo` puts the dense weights back."""
        plan = self.plan(cell) if plan is None else plan
        spec = cell.pruning
        self._keep(plan, everything=spec.permute or bool(spec.reconstruct))
        composition, calibration = cell.composition(), self.calibration(cell)
        cache = None
        if can_reuse(composition):
            key = digest(
                [
                    sorted(composition.needs),
                    [cell.facts[k] for k in ("tokens", "samples", "batch_size", "split") if k in cell.facts],
                    cell.seed,
                ]
            )
            cache = calibration.caches.setdefault(key, MomentCache(self.folder / "moments" / key))
            if not cache.complete:
                collect_moments(self.model, self.body, calibration.batches, cache, method=composition)
        return prune(
            self.model, self.body, plan, calibration.batches, method=composition, seed=cell.seed, cache=cache
        )  # fmt: skip

    def _keep(self, plan: Plan, everything: bool) -> None:
        """Copy the dense parameters that will change: all of them where channels move or blocks are fitted."""
        modules = (self.body[name].module.parameters(recurse=False) for name in plan)
        for p in self.model.parameters() if everything else itertools.chain.from_iterable(modules):
            if id(p) not in self._dense:
                self._dense[id(p)] = p, p.data.clone()

    def undo(self) -> None:
        """Put the dense parameters back, bit for bit."""
        for p, value in self._dense.values():
            p.data.copy_(value)

    def score(self, model: Any = None) -> Result:
        """Score the answers of the model as it is, or of another, to the held-out samples."""
        return score_answers(self.model if model is None else model, self.processor, self.held_out, self.spec)

    def measure(self, cells: Sequence[Cell], finish: Callable[[Cell, dict[str, Any], Result], None], notify: Notify) -> None:
        """Work through cells of one pruning; `finish(cell, facts, result)` is called after each."""
        first = cells[0]
        if not first.prune:
            return finish(first, *self._facts(first, {}, notify))
        notify(f"prune: {first.label}, seed {first.seed}")
        began = time.perf_counter()
        try:
            with in_recipe("prune"), enough_memory(first.pruning):
                plan = self.plan(first)
                record = self.prune(first, plan)
                plan = record.pruned(plan)
            costs = {"prune": self._cost(began)}
            if any(cell.restore is not None for cell in cells):
                self._save(first, plan)
            for cell in cells:
                errors = record.layer_errors
                if cell.restore is None:
                    finish(cell, *self._facts(cell, costs, notify, plan, errors))
                else:
                    finish(cell, *self._restored_facts(cell, costs, notify, plan, errors))
            shutil.rmtree(self.folder / first.pruning_id, ignore_errors=True)  # kept after an error, to continue from
        finally:
            self.undo()
        return None

    def _cost(self, began: float) -> dict[str, Any]:
        return {"seconds": time.perf_counter() - began, "memory": peak_memory(self.spec.device)}

    def _save(self, cell: Cell, plan: Plan) -> None:
        """The pruned model as `prune` writes it, for `restore` to read; written once, so that work on it can go on."""
        record = sparsity_record(
            self.body, plan, base_model=str(self.recipe["model"]), method=describe(cell.pruning),
            mask_only=cell.composition().mask_only, family=self.family,
        )  # fmt: skip
        folder = self.folder / cell.pruning_id / "pruned"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_model(self.model, self.processor, Record(record, {}, {"prune": cell.facts}), folder)

    def _restored_facts(self, cell: Cell, costs: Mapping[str, Any], notify: Notify, plan: Plan, errors: Any) -> Any:
        notify(f"restore: {cell.label}, seed {cell.seed}")
        began = time.perf_counter()
        home = self.folder / cell.pruning_id
        if (home / cell.id).is_dir():  # the sweep was killed between writing it and scoring it
            model, _ = load(home / cell.id, dtype=self.spec.dtype, device=self.spec.device)
        else:
            model = self._restore(cell, home, notify)
        costs = {**costs, "restore": self._cost(began)}
        facts, result = self._facts(cell, costs, notify, plan, errors, model)
        facts["curve"] = read_metrics(home / cell.id)["restore"]["curve"]
        masked = ADAPTERS[spec_of(self.recipe, "restore", cell.restore).adapter].masked
        proof = verify(model, self.model) if masked else verify(home / cell.id)
        facts["verified"] = not proof["differences"]
        shutil.rmtree(home / cell.id)
        return facts, result

    def _restore(self, cell: Cell, home: Path, notify: Notify) -> Any:
        """Restore the pruned model; continue an interrupted restoration where that is possible."""
        unfinished = home / f"{cell.id}.unfinished"

        def progress(note: str, done: int, total: int) -> None:
            notify(f"restore: {cell.label}, seed {cell.seed}: {done} of {total}")

        section = {"teacher_cache": str(self.folder / "teacher"), "seed": cell.seed, **(cell.restore or {})}
        spec = spec_of(self.recipe, "restore", section)

        def restore(resume: bool) -> Any:
            sparse = ModelSource(home / "pruned", self.model, self.processor, spec.device, borrowed=True)
            with in_recipe("restore"):
                model = restore_folder(
                    home / "pruned", home / cell.id, spec, data=self.data(spec), teacher=self.recipe["model"],
                    resume=resume, progress=progress, source=sparse,
                )[1]  # fmt: skip
            return model or load_model(home / cell.id, dtype=self.spec.dtype, device=self.spec.device)

        if unfinished.is_dir():
            try:
                return restore(resume=True)
            except SparsightError:  # other bits, as with another number of threads
                shutil.rmtree(unfinished, ignore_errors=True)
        return restore(resume=False)

    def _facts(
        self, cell: Cell, costs: Mapping[str, Any], notify: Notify, plan: Plan | None = None,
        errors: Mapping[str, float] | None = None, model: Any = None,
    ) -> tuple[dict[str, Any], Result]:  # fmt: skip
        """Score the current model, and collect its facts."""
        notify(f"evaluate: {cell.label}, seed {cell.seed}")
        began = time.perf_counter()
        with in_recipe("evaluate"), enough_memory(self.spec):
            result = self.score(model)
        costs = {**costs, "evaluate": self._cost(began)}
        body = self.body if model is None else anatomy(model, self.family)
        layers = {
            name: {"component": x.component, "block": x.block, "got": x.zeros / x.weight.numel()}
            | {"error": (errors or {}).get(name)}
            for name in plan or ()
            if (x := body[name])
        }
        facts = {
            "format": FORMAT,
            "id": cell.id,
            "label": cell.label,
            "cell": cell.facts,
            **weights_of(self.model if model is None else model, self.family),
            "layers": layers,
            "scores": list(result.rows),
            "answers": len(result.predictions),
            "skipped": len(self.encoder.skipped),
            **{what: {stage: x[what] for stage, x in costs.items()} for what in ("seconds", "memory")},
            "curve": [],
            "verified": all(pattern.holds(body[name].weight) for name, pattern in (plan or {}).items()),
        }
        return facts, result


def measure(
    bench: Workbench, unit: Sequence[Cell], folder: Path, notify: Notify = lambda note, finished=0: None
) -> None:  # fmt: skip
    """Work through cells of one pruning and write the result of each; `notify(note, finished)` reports on the way."""

    def finish(cell: Cell, facts: dict[str, Any], result: Result) -> None:
        with replace_file(folder / f"{cell.id}.jsonl") as beside:  # the answers first: a cell with a record is finished
            result.write_predictions(beside)
        write_json(folder / f"{cell.id}.json", facts)
        notify(f"{cell.label}, seed {cell.seed}", 1)

    bench.measure(unit, finish, notify)
