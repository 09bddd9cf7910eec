"""One model, loaded once: pruned as a cell says, restored, scored, and put back as it was.

What cells share is done once: the samples are encoded once per seed, the dense model is measured once per seed (policies,
and with `propagate: dense` everything that pruning needs to know, kept on disk), cells that differ in their restoration
share a pruning, restorations share a cache of the teacher.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sparsight import verbs
from sparsight.data import Encoder, batches, read
from sparsight.errors import SparsightError
from sparsight.evaluate import Result, evaluate
from sparsight.evaluate.record import weights_of
from sparsight.memory import peak_memory
from sparsight.model.anatomy import Anatomy, Layer, anatomy
from sparsight.model.checkpoint import Record, read_metrics, save, sparsity_record
from sparsight.model.families import Family
from sparsight.model.load import load
from sparsight.model.verify import verify
from sparsight.plan.measure import Measure
from sparsight.plan.plan import Plan, find_policy, make_plan
from sparsight.plan.policy import Policy
from sparsight.prune.known import Known, served
from sparsight.prune.prune import know
from sparsight.prune.prune import prune as prune_in_place
from sparsight.prune.record import PruneRecord
from sparsight.restore.cache import cache_key
from sparsight.sweep.grid import Cell, digest

FORMAT = 1
Said = Callable[[str], None]


@dataclass
class Calibration:
    """The samples of one seed, encoded, and what was measured on them."""

    batches: list[Any]
    measure: Measure
    known: dict[str, Known] = field(default_factory=dict)


class Workbench:
    """`recipe` is one that `recipe.read` has checked; `folder` holds what is kept between cells and between runs."""

    def __init__(self, recipe: Mapping[str, Any], folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.options = {"batch_size": 32, "max_new_tokens": 32, "beams": 1, "seed": 0, **(recipe.get("evaluate") or {})}
        self.device = recipe.get("device") or "cpu"
        self.model, self.processor = load(recipe["model"], dtype=recipe.get("dtype") or "auto", device=self.device)
        self.family = Family.parse(recipe["family"]) if recipe.get("family") else None
        self.body: Anatomy = anatomy(self.model, self.family)
        self.encoder = Encoder(self.processor, self.model, skip_bad=bool(recipe.get("skip_bad")))
        taken = self.options.pop("samples", None)
        held = read(recipe["held_out"], limit=taken, seed=self.options["seed"] if taken else None, skip_bad=self._skip)
        self.held_out = self.encoder.usable(held)
        self._calibrations: dict[str, Calibration] = {}
        self._dense: dict[int, tuple[torch.nn.Parameter, torch.Tensor]] = {}

    def hash(self) -> str:
        """Of every weight of the model as it is, its configuration and its processor."""
        known = cache_key(self.model, self.encoder, (), "") + self.model.generation_config.to_json_string()
        return hashlib.blake2b(known.encode(), digest_size=16).hexdigest()

    @property
    def _skip(self) -> bool:
        return bool(self.recipe.get("skip_bad"))

    def calibration(self, cell: Cell) -> Calibration:
        key = digest([cell.prune["samples"], cell.prune["batch_size"], cell.seed])
        if key not in self._calibrations:
            samples = read(self.recipe["data"], limit=cell.prune["samples"], seed=cell.seed, skip_bad=self._skip)
            ready = batches(self.encoder.usable(samples), self.encoder, cell.prune["batch_size"])
            found = [batch.to(self.device) for batch in ready]
            self._calibrations = {key: Calibration(found, Measure(self.model, self.body, found, seed=cell.seed))}
        return self._calibrations[key]

    def plan(self, cell: Cell, measured: bool = True) -> Plan:
        """The cell's plan; without `measured` one with all layers worth the same, to see whether there is any."""
        wanted = {key: cell.prune[key] for key in ("sparsity", "pattern", "ignore")}
        if not measured:
            rule = find_policy(cell.policy)
            if isinstance(rule, Policy) and rule.data:
                rule = replace(rule, importance=_alike, scale="shift", data=False)
            return make_plan(self.body, **wanted, policy=rule)
        return make_plan(self.body, **wanted, policy=cell.policy, measure=self.calibration(cell).measure)

    def prune(self, cell: Cell, plan: Plan | None = None) -> PruneRecord:
        """Prune the model in place; `undo` takes it back."""
        plan = self.plan(cell) if plan is None else plan
        self._keep(cell, plan)
        choice, calibration = cell.choice(), self.calibration(cell)
        known = None
        if served(choice):
            asked = {key: cell.prune[key] for key in ("tokens", "samples", "batch_size")}
            key = digest([sorted(choice.needs), asked, cell.seed])
            known = calibration.known.setdefault(key, Known(self.folder / "moments" / key))
            if not known.whole:
                know(self.model, self.body, calibration.batches, known, method=choice)
        return prune_in_place(self.model, self.body, plan, calibration.batches, method=choice, seed=cell.seed, known=known)

    def _keep(self, cell: Cell, plan: Plan) -> None:
        """Remember the dense parameters of what will be changed: all of them where channels move or blocks are fitted."""
        modules = (self.body[name].module.parameters(recurse=False) for name in plan)
        everything = cell.prune["permute"] or cell.prune["reconstruct"]
        for p in self.model.parameters() if everything else itertools.chain.from_iterable(modules):
            if id(p) not in self._dense:
                self._dense[id(p)] = p, p.data.clone()

    def undo(self) -> None:
        """Put the dense parameters back, bit for bit."""
        for p, value in self._dense.values():
            p.data.copy_(value)

    def score(self, model: Any = None) -> Result:
        wanted = {key: self.options[key] for key in ("batch_size", "max_new_tokens", "beams", "seed")}
        return evaluate(self.model if model is None else model, self.processor, self.held_out, **wanted)

    def measure(self, these: Sequence[Cell], finish: Callable[[Cell, dict[str, Any], Result], None], said: Said) -> None:
        """Work through cells of one pruning; `finish(cell, facts, result)` is called after each."""
        first = these[0]
        if not first.prune:
            return finish(first, *self._facts(first, {}, said))
        said(f"prune: {first.label}, seed {first.seed}")
        began = time.perf_counter()
        try:
            plan = self.plan(first)
            pruned = self.prune(first, plan)
            spent = {"prune": self._spent(began)}
            if any(cell.restore is not None for cell in these):
                self._save(first, plan)
            for cell in these:
                errors = pruned.layer_errors
                if cell.restore is None:
                    finish(cell, *self._facts(cell, spent, said, plan, errors))
                else:
                    finish(cell, *self._restored(cell, spent, said, plan, errors))
            shutil.rmtree(self.folder / first.pruned, ignore_errors=True)  # kept after an error, to go on from
        finally:
            self.undo()
        return None

    def _spent(self, began: float) -> dict[str, Any]:
        return {"seconds": time.perf_counter() - began, "memory": peak_memory(self.device)}

    def _save(self, cell: Cell, plan: Plan) -> None:
        """The pruned model as `prune` writes it, for `restore` to read."""
        record = sparsity_record(
            self.body, plan, base_model=str(self.recipe["model"]), method=cell.named,
            mask_only=cell.choice().mask_only, family=self.family,
        )  # fmt: skip
        folder = self.folder / cell.pruned / "pruned"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save(self.model, self.processor, Record(record, {}, {"prune": cell.facts}), folder)

    def _restored(self, cell: Cell, spent: Mapping[str, Any], said: Said, plan: Plan, errors: Any) -> Any:
        said(f"restore: {cell.label}, seed {cell.seed}")
        began = time.perf_counter()
        home = self.folder / cell.pruned
        if not (home / cell.id).is_dir():  # else the sweep was killed between writing it and scoring it
            self._restore(cell, home, said)
        model, _ = load(home / cell.id, dtype=self.recipe.get("dtype") or "auto", device=self.device)
        spent = {**spent, "restore": self._spent(began)}
        facts, result = self._facts(cell, spent, said, plan, errors, model)
        facts["curve"] = read_metrics(home / cell.id)["restore"]["curve"]
        adapter = (cell.restore or {}).get("adapter", "sparselora")
        facts["verified"] = not verify(home / cell.id, None if adapter == "lora" else home / "pruned")["differences"]
        shutil.rmtree(home / cell.id)
        return facts, result

    def _restore(self, cell: Cell, home: Path, said: Said) -> None:
        """Restore `home/pruned`, going on from where an earlier process was interrupted, if it can be gone on from."""
        unfinished = home / f"{cell.id}.unfinished"

        def tell(note: str, done: int, total: int) -> None:
            said(f"restore: {cell.label}, seed {cell.seed}: {done} of {total}")

        shared = {key: self.recipe[key] for key in ("dtype", "device", "family", "skip_bad") if self.recipe.get(key)}
        how = {"teacher_cache": self.folder / "teacher", "seed": cell.seed, **shared, **(cell.restore or {})}
        how |= {"data": self.recipe["data"], "teacher": self.recipe["model"], "progress": tell}
        if unfinished.is_dir():
            try:
                verbs.restore(home / "pruned", home / cell.id, resume=True, **how)
                return
            except SparsightError:  # other bits, as with another number of threads
                shutil.rmtree(unfinished, ignore_errors=True)
        verbs.restore(home / "pruned", home / cell.id, **how)

    def _facts(
        self, cell: Cell, spent: Mapping[str, Any], said: Said, plan: Plan | None = None,
        errors: Mapping[str, float] | None = None, model: Any = None,
    ) -> tuple[dict[str, Any], Result]:  # fmt: skip
        """Score what the model is now, and write down what it is."""
        said(f"evaluate: {cell.label}, seed {cell.seed}")
        began = time.perf_counter()
        result = self.score(model)
        spent = {**spent, "evaluate": self._spent(began)}
        body = self.body if model is None else anatomy(model, self.family)
        layers = {
            name: {"component": x.component, "block": x.block, "got": float((x.weight == 0).float().mean())}
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
            **{what: {stage: x[what] for stage, x in spent.items()} for what in ("seconds", "memory")},
            "curve": [],
            "verified": all(pattern.holds(body[name].weight) for name, pattern in (plan or {}).items()),
        }
        return facts, result


def _alike(layers: Sequence[Layer], budget: Any, measure: Any) -> dict[str, float]:
    return {layer.name: 1.0 for layer in layers}


def measure(
    bench: Workbench, unit: Sequence[Cell], folder: Path, tell: Callable[..., None] = lambda note, finished=0: None
) -> None:
    """Work through cells of one pruning and write what comes of each; `tell(note, finished)` is told how it goes."""

    def finish(cell: Cell, facts: dict[str, Any], result: Result) -> None:
        _write(facts, result, folder)
        tell(f"{cell.label}, seed {cell.seed}", 1)

    bench.measure(unit, finish, tell)


def _write(facts: Mapping[str, Any], result: Result, folder: Path) -> None:
    """The answers first, then the record: a cell whose record is there is finished."""
    for name, write in (
        (f"{facts['id']}.jsonl", result.write_predictions),
        (f"{facts['id']}.json", lambda path: path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")),
    ):
        part = folder / f"{name}.part"
        write(part)
        part.replace(folder / name)
