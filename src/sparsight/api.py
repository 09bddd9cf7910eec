"""The verbs: a model or a folder in, the model or a folder out.

A verb takes a folder or hub name and writes a folder, or takes a model in memory and changes it in place. Its settings are
the fields of its record in `specs.py`, as keywords or as a record, `spec=`. The command line is made from these functions:
a parameter with a help text beside its type is an argument or an option. Every check that needs no model runs before a
model is loaded, and nothing is written before the work is done.
"""

from __future__ import annotations

import inspect as _inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sparsight.arguments import anatomy_of, check_folder_data, check_recipe, in_memory_spec, is_folder, need, paths, places
from sparsight.checks import check_paths
from sparsight.looks import ask as ask
from sparsight.looks import diff as diff
from sparsight.options import Argument, options
from sparsight.progress import Progress
from sparsight.specs import (
    SPECS,
    BenchSpec,
    EvaluateSpec,
    FamilySpec,
    PackSpec,
    PlanSpec,
    PruneSpec,
    RestoreSpec,
    SearchSpec,
)

if TYPE_CHECKING:
    from sparsight.allocation.plan import PlannedModel
    from sparsight.checkpoint.folder import Record
    from sparsight.estimation.estimate import Estimate
    from sparsight.evaluation import Result
    from sparsight.model.anatomy import Anatomy
    from sparsight.pruning.record import PruneRecord
    from sparsight.sweeps.search import SearchResult

Model = Annotated[Any, Argument("Folder of a model, or a hub name.")]
Out = Annotated[Any, Argument("Folder to write; it appears once the work is done.", required=True)]
Data = Annotated[Any, "JSONL file, folder with metadata.jsonl, or a `datasets` name."]
CalibrationData = Annotated[Any, "Calibration data; see README."]
HeldOut = Annotated[Any, "Samples to score on, which are not those of `data`."]
Overwrite = Annotated[bool, "Replace OUT if it holds a model."]
Resume = Annotated[bool, "Continue the interrupted work of the same command."]
Recipe = Annotated[str | Path, Argument("YAML file: model, data, held_out, and the verbs' settings; see recipes/.")]
RunOut = Annotated[str | Path, Argument("Folder for the results; an interrupted run in it is continued.")]
Changes = Annotated[Sequence[str], Argument("KEY=VALUE; replaces a value of the file.")]


def inspect(model: Model, spec: FamilySpec | None = None, **settings: Any) -> Anatomy:
    """Show components, blocks and layers, what is never pruned and why, and the sparsity now.

    Of a folder only headers are read. A layer's `weight` is read where it is asked for, one block at a time.
    """
    (model,), spec = places(model=model), FamilySpec.make(spec, settings)
    return anatomy_of(model, spec)


def plan(
    model: Model,
    data: CalibrationData = None,
    spec: PlanSpec | None = None,
    *,
    processor: Any = None,
    progress: Progress | None = None,
    **settings: Any,
) -> PlannedModel:
    """Show where the zeros will be; nothing is changed.

    Some policies measure the model first, on `samples` of `data`, or on batches of your own for a model in memory.
    `policy` may be a function `(layers, budget)` or `(layers, budget, probe)` that gives a sparsity by layer name.

    **Raises** `SparsightError` for invalid settings, an invalid model or invalid data.
    """
    (model, data), spec = places(model=model, data=data), PlanSpec.make(spec, settings)
    from sparsight.pruning.verb import plan_model

    if is_folder(model):
        check_folder_data(None, processor)
    else:
        spec = in_memory_spec(model, spec)
    return plan_model(model, data, spec, processor=processor, progress=progress)


def prune(
    model: Model,
    out: Out = None,
    spec: PruneSpec | None = None,
    *,
    data: CalibrationData = None,
    processor: Any = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Record | PruneRecord:
    """Prune MODEL with a few calibration samples and write the sparse model to OUT.

    A model in memory is pruned in place instead: `prune(model, batches, sparsity=0.5)` with a list of dicts or a DataLoader,
    or `prune(model, data="mine.jsonl", processor=processor)`; the record of layer errors is returned.

    `data` is a source for `sparsight.data.read`; `samples` of it are drawn with `seed`. Methods that use the weights alone
    (random, magnitude) need no `data`; without it no errors are measured. A field that takes a name also takes a function.
    Earlier prunings stay in the record, and so does their dense model. An interrupted run leaves `OUT.unfinished`;
    `resume` continues after its last finished block. Several processes of `torchrun` share the work and write the weights
    of one process, bit for bit.

    **Raises** `SparsightError`, one line, for anything wrong with the settings, the model or the data. Nothing is left
    behind but `OUT.unfinished`, once a block is finished.
    """
    (model, data), spec = places(model=model, data=data), PruneSpec.make(spec, settings)
    from sparsight.pruning.verb import prune_folder, prune_model

    if not is_folder(model):
        data, out = (out, None) if data is None else (data, out)
        spec = in_memory_spec(model, spec, out=out, overwrite=overwrite, resume=resume)
        return prune_model(model, data, spec, processor=processor, progress=progress)
    check_paths(out=out)
    check_folder_data(data, processor)
    return prune_folder(model, out, spec, data=data, overwrite=overwrite, resume=resume, progress=progress)


def restore(
    sparse: Annotated[Any, Argument("Folder of a sparse model.")],
    out: Out = None,
    spec: RestoreSpec | None = None,
    *,
    data: Data = None,
    teacher: Annotated[Any, "The dense original. [default: the recorded one]"] = None,
    processor: Any = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Record | dict[str, Any]:
    """Restore a SPARSE model with SparseLoRA and distillation; every zero is kept.

    A model in memory is restored in place instead: `restore(model, batches, teacher=dense)`, or with `data` and `processor`;
    the measurements are returned. `teacher` is the dense original, by default the one in `sparsity.json`; `kl=0` needs
    none. `held_out` (a number of samples to take out of the data, or other data) is scored at every checkpoint. The best
    checkpoint is written; training stops after `patience` checkpoints without a better one.

    **Raises** `SparsightError`, one line, for anything wrong with the settings, the models or the data.
    """
    sparse, data, teacher = places(sparse=sparse, data=data, teacher=teacher)
    if spec is None and hasattr(sparse, "device"):
        settings.setdefault("device", str(sparse.device))  # some settings depend on it
    spec = RestoreSpec.make(spec, settings)
    (held_out,) = places(held_out=spec.held_out)
    from sparsight.estimation.fit import fit_batch
    from sparsight.restoring.verb import restore_folder, restore_model

    spec = spec if held_out is spec.held_out else replace(spec, held_out=held_out)
    if not is_folder(sparse):
        data, out = (out, None) if data is None else (data, out)
        adapter = spec.save_adapter
        spec = in_memory_spec(sparse, spec, out=out, overwrite=overwrite, resume=resume, save_adapter=adapter)
        return restore_model(sparse, data, spec, processor=processor, teacher=teacher, progress=progress)
    check_paths(out=out, teacher=teacher)
    check_folder_data(data, processor)
    need(data, "data", "training samples")
    need(out, "out", "a folder to write")
    return restore_folder(
        sparse, out, spec, data=data, teacher=teacher, overwrite=overwrite, resume=resume, progress=progress, fit=fit_batch
    )[0]  # fmt: skip


def evaluate(
    model: Model,
    data: Data = None,
    spec: EvaluateSpec | None = None,
    *,
    processor: Any = None,
    record: Annotated[bool | str | Path, "Keep scores and answers beside the weights, for report."] = False,
    export_task: Annotated[str | Path | None, "Write the samples to this folder, as a task of lmms-eval."] = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """Score MODEL's answers to held-out samples, per kind, with 95 % intervals.

    `record` keeps scores, answers and small pictures beside the weights, where `report` finds them, and puts the scores on
    the model card; for a dense model it may name another folder. Batches of your own have no questions to answer: their
    answer tokens are scored, by accuracy and perplexity.

    `task` names a benchmark, whose release, parquet files or `.tsv` file `data` is; without `data` it is read from the Hub.

    **Raises** `SparsightError`, one line, for anything wrong with the settings, the model or the data.
    """
    from sparsight.arguments import check_task_data

    check_task_data(spec, settings, data)
    (model, data), spec = places(model=model, data=data), EvaluateSpec.make(spec, settings)
    from sparsight.evaluation.verb import evaluate_folder, evaluate_model

    if not is_folder(model):
        spec = in_memory_spec(model, spec, adapters=True, packed=True, record=record, export_task=export_task)
        return evaluate_model(model, data, spec, processor=processor, progress=progress)
    check_folder_data(data, processor)
    return evaluate_folder(model, data, spec, record=record, export_task=export_task, progress=progress)


def verify(
    model: Model,
    against: Annotated[Any, "A sparse folder whose every zero must be here too."] = None,
    *,
    family: Annotated[str | None, "Where a model of unknown type, without a record, keeps its blocks."] = None,
) -> dict[str, Any]:
    """Recount every zero; exit code 1 and the layers by name on any difference.

    A model in memory is compared with `against`: another model, a folder, a plan, or the record that `prune` returned.
    Returns `{"layers", "zeros", "sparsity", "differences": {layer: [what differs]}}`.

    **Raises** `SparsightError` if there is nothing to compare with.
    """
    model, against = places(model=model, against=against)
    from sparsight.checkpoint.verify import verify

    return verify(model, against, family=family)


def pack(
    sparse: Annotated[str | Path, Argument("Folder of a sparse model.")],
    out: Annotated[str | Path, Argument("Folder to write; it appears once the work is done.")],
    spec: PackSpec | None = None,
    *,
    overwrite: Overwrite = False,
    resume: Resume = False,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Write a SPARSE model in fewer bytes: the weights that were kept, and a bit per weight.

    Nothing is lost, but with `values="int8"`. After `import sparsight`, `from_pretrained` reads the folder as any other, and
    so does every verb; `load(OUT, packed=True)` keeps it packed in memory. One tensor at a time is in memory. Returns the
    content of `packed.json`: bytes before and after and, for int8, the output error of every weight.

    **Raises** `SparsightError`, one line, for a folder without zeros and for damaged files.
    """
    sparse, out = paths(sparse=sparse, out=out)
    from sparsight.checkpoint.pack import pack_folder

    return pack_folder(sparse, out, PackSpec.make(spec, settings), overwrite=overwrite, resume=resume, progress=progress)


def unpack(
    packed: Annotated[str | Path, Argument("Folder that `pack` wrote.")],
    out: Annotated[str | Path, Argument("Folder to write; it appears once the work is done.")],
    *,
    overwrite: Overwrite = False,
    resume: Resume = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the ordinary folder that a PACKED one was made from, byte for byte; of int8 values, what they stand for.

    **Raises** `SparsightError`, one line, for a folder that is not packed and for damaged files.
    """
    packed, out = paths(packed=packed, out=out)
    from sparsight.checkpoint.pack import unpack_folder

    return unpack_folder(packed, out, overwrite=overwrite, resume=resume, progress=progress)


def bench(
    folder: Annotated[str | Path, Argument("Folder of a sparse model, packed or not.")],
    spec: BenchSpec | None = None,
    *,
    record: Annotated[bool, "Keep the figures beside the weights, in bench.json, for report."] = False,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Time a sparse model on this CPU, dense and packed: its layers, tokens per second, memory and load.

    Dense and packed are timed in turn, in bfloat16, with weights that no cache holds, by the threads that torch has. Where
    packed is slower, it says so. Layers at 2:4 are also timed on a CUDA device where there is one. With `record`, the
    report of this folder shows them in a figure.

    **Raises** `SparsightError` for a model without zeros.
    """
    (folder,) = paths(folder=folder)
    from sparsight.evaluation.bench import bench_folder

    return bench_folder(folder, BenchSpec.make(spec, settings), record=record, progress=progress)


def estimate(
    model: Any,
    *,
    data: Any = None,
    prune: PruneSpec | Mapping[str, Any] | None = None,
    restore: RestoreSpec | Mapping[str, Any] | None = None,
    evaluate: EvaluateSpec | Mapping[str, Any] | None = None,
    timed: bool = True,
) -> Estimate:
    """Estimate FLOPs, bytes and peak memory of load, prune, restore and evaluate, on a CPU, before anything runs.

    No weight is read or allocated: `model` may be a folder with a configuration and a processor only. Token counts are
    those of the first samples of `data`, else of a picture of 640 × 480 with a question of 16 words and an answer of 4;
    without data, restoration takes 100 steps. `timed` measures this CPU's rate of matrix products, for rough times.

    **Raises** `SparsightError` for a method, policy or adapter of unknown cost, and where the stages themselves would.
    """
    from sparsight.estimation.estimate import estimate

    model, data = places(model=model, data=data)
    return estimate(
        model, PruneSpec.make(prune, {}), RestoreSpec.make(restore, {}), EvaluateSpec.make(evaluate, {}),
        data=data, timed=timed,
    )  # fmt: skip


def run(
    recipe: Recipe, out: RunOut, changes: Changes = (), *, progress: Progress | None = None
) -> dict[str, Any]:  # fmt: skip
    """Run a RECIPE: prune, restore, evaluate, verify, report; started again after a kill, it continues.

    `changes`, as `key.sub=value`, replace values of the file. `out` gets the models `pruned` and `restored`, the scores of
    the dense one and `report.html`. The `recipe.yaml` beside the weights of a model is a recipe: it makes the same bytes.

    **Raises** `SparsightError` before anything is computed for a recipe that cannot be run, and for a folder that holds
    something else, or a run with other settings.
    """
    check_recipe(recipe, out, changes)
    from sparsight.pipeline import run

    return run(recipe, out, changes=changes, progress=progress)


def sweep(
    recipe: Recipe,
    out: RunOut,
    changes: Changes = (),
    *,
    jobs: Annotated[int, "Processes that work in parallel."] = 1,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Prune, restore and score a model in every way of a grid; started again after a kill, it continues.

    `changes`, as `key.sub=value`, replace values of the file. A cell that `out` holds is not run again. `jobs` processes
    work in parallel, each with a model of its own and its share of the threads, or a GPU of its own. `out` gets a record
    and the answers of every cell, `results.csv`, figures and a page; the records are returned.

    The number of threads changes the order of sums: last bits, and rarely an answer, may depend on `jobs`.

    **Raises** `SparsightError` before anything is computed or written for a recipe that cannot be run, and for a folder
    that holds something else, or a sweep of another model.
    """
    check_recipe(recipe, out, changes)
    from sparsight.sweeps.sweep import sweep

    return sweep(recipe, out, changes=changes, jobs=jobs, progress=progress)


def search(
    model: Model,
    out: Out,
    spec: SearchSpec | None = None,
    *,
    data: Data,
    held_out: HeldOut,
    overwrite: Overwrite = False,
    progress: Progress | None = None,
    **settings: Any,
) -> SearchResult:
    """Find the split of a budget that harms the answers least, and write the model pruned by it to OUT.

    `sparsity` is the split to start from and to compare with; its zeros are the budget. The search moves zeros between
    components, and with `over="blocks"` between their blocks, too. Plans are compared by their divergence from the dense
    model on calibration samples; the best and the first one are then scored on `held_out`. With `within` the search finds
    the sparsest plan of that shape whose score is at most `within` below the dense model's.

    **Raises** `SparsightError`, one line, for anything wrong with the settings, the model or the data.
    """
    check_paths(model=model, out=out, data=data, held_out=held_out)
    model, data, held_out = places(model=model, data=data, held_out=held_out)
    from sparsight.sweeps.search import search

    return search(
        model, out, SearchSpec.make(spec, settings), data=data, held_out=held_out, overwrite=overwrite, progress=progress
    )  # fmt: skip


def report(
    runs: Annotated[Sequence[str | Path], Argument("Folders evaluated with `record` or of sweeps; logs of lmms-eval.")],
    *,
    out: Annotated[str | Path, "The page to write."] = "report.html",
    metric: Annotated[str | None, "Compare by this metric. [default: exact match]"] = None,
    figures: Annotated[str | Path | None, "Folder for every figure as SVG and PNG, too."] = None,
    overwrite: Annotated[bool, "Replace an earlier page."] = False,
) -> Path:
    """Compare runs with the first one, on one HTML page: scores, figures, answers side by side.

    Logs of lmms-eval are runs, too. **Raises** `SparsightError` for runs without scores, and to save another page.
    """
    from sparsight.reporting.report import report

    return report(runs, out=out, metric=metric, figures=figures, overwrite=overwrite)


def _show_fields() -> None:
    """Let `help` and notebooks show the fields of a verb's record as its keywords."""
    for name, kind in SPECS.items():
        function = globals()[name]
        signature = _inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields = [
            _inspect.Parameter(field, _inspect.Parameter.KEYWORD_ONLY, default=getattr(kind, field), annotation=hint)
            for field, (hint, _) in options(kind).items()
        ]
        function.__signature__ = signature.replace(parameters=[*own, *fields])


_show_fields()
