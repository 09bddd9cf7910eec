"""What the verbs print: rich tables from plain records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from sparsight.allocation.plan import PlanRow
from sparsight.checkpoint.card import component_totals
from sparsight.checkpoint.folder import read_record
from sparsight.errors import quote
from sparsight.evaluation.evaluate import headline
from sparsight.evaluation.metrics import title_of
from sparsight.masks.pattern import Pattern
from sparsight.model.anatomy import Anatomy
from sparsight.model.families import COMPONENTS

COUNTED = 100_000_000  # parameters; zeros of smaller models are counted without `--count`


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], text_columns: int = 1) -> Table:
    """A table whose first `text_columns` columns are text and whose others are figures."""
    made = Table(
        title=title,
        min_width=len(title) + 2,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=box.SIMPLE_HEAD,
    )
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < text_columns else "right", overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def zeros_of(body: Anatomy, model: str, count: bool) -> dict[str, int] | None:
    """The zeros of every layer of a folder: those on record, or counted where that is asked for or quick; else None."""
    record = None if count else read_record(model)
    if record is not None:
        return {name: entry["zeros"] for name, entry in record["layers"].items()}
    if not count and body.parameters > COUNTED:
        return None
    return {layer.name: layer.zeros for layer in body.layers}


def anatomy_facts(body: Anatomy, zeros: Mapping[str, int] | None) -> dict[str, Any]:
    """What `inspect` prints, as plain values; `zeros` by layer, None where they were not counted."""
    components = {}
    for component in COMPONENTS:
        layers = body.component(component)
        size = sum(rows * columns for rows, columns in (layer.shape for layer in layers))
        count = None if zeros is None else sum(zeros.get(layer.name, 0) for layer in layers)
        components[component] = {
            "blocks": sum(block.component == component for block in body.blocks),
            "layers": len(layers),
            "parameters": size,
            "zeros": count,
            "sparsity": None if count is None else count / size if size else 0.0,
        }
    skipped = [{"name": s.name, "reason": s.reason, "parameters": s.parameters} for s in body.skipped]
    return {
        "family": str(body.family),
        "found": [{"path": mark.path, "component": mark.component, "reason": mark.reason} for mark in body.marks],
        "missing": list(body.missing),
        "parameters": body.parameters,
        "components": components,
        "skipped": skipped,
        "layers": [{"name": x.name, "component": x.component, "shape": list(x.shape)} for x in body.layers],
    }


def anatomy_tables(facts: Mapping[str, Any], layers: bool) -> list[Any]:
    """What can be pruned, where it was found, what is never pruned, and with `layers` every layer."""
    rows = [
        (
            name,
            c["blocks"],
            c["layers"],
            f"{c['parameters']:,}",
            "?" if c["zeros"] is None else f"{c['sparsity']:.2%}",
        )
        for name, c in facts["components"].items()
    ]
    uncounted = any(c["zeros"] is None for c in facts["components"].values())
    tables: list[Any] = [
        table("What can be pruned", ("component", "blocks", "layers", "parameters", "sparsity now"), rows),
        table(
            "Where the blocks are",
            ("component", "path", "found by"),
            [(x["component"], x["path"], x["reason"]) for x in facts["found"]],
            text_columns=3,
        ),
        table(
            f"What is never pruned (of {facts['parameters']:,} parameters)",
            ("name", "why", "parameters"),
            [(s["name"], s["reason"], f"{s['parameters']:,}") for s in facts["skipped"] if s["parameters"]],
            text_columns=2,
        ),
    ]
    tables += ["Zeros are not on record; --count counts them, which reads all weights"] if uncounted else []
    tables += [f"The model has no {name} layers that can be pruned" for name in facts["missing"]]
    if layers:
        named = [(x["name"], x["component"], "×".join(map(str, x["shape"]))) for x in facts["layers"]]
        tables.append(table("Layers", ("name", "component", "out×in"), named, text_columns=2))
    return tables


def plan_table(rows: Sequence[PlanRow]) -> Table:
    """Layers and zeros of a plan, per component."""
    cells = [(r.component, r.layers, r.pruned, f"{r.parameters:,}", f"{r.zeros:,}", f"{r.sparsity:.2%}") for r in rows]
    return table("The plan", ("component", "layers", "pruned", "parameters", "zeros", "sparsity"), cells)


def planned_layers(anatomy: Anatomy, plan: Mapping[str, Pattern]) -> Table:
    """Pattern and sparsity of every layer, dense layers too."""
    rows = []
    for layer in anatomy.layers:
        pattern, (out, columns) = plan.get(layer.name), layer.shape
        share = pattern.zeros(layer.shape) / (out * columns) if pattern else 0.0
        rows.append((layer.name, layer.component, f"{out}×{columns}", pattern.kind if pattern else "dense", f"{share:.2%}"))
    return table("Layers", ("name", "component", "out×in", "pattern", "sparsity"), rows, text_columns=2)


def pruned_table(sparsity: Mapping[str, Any], title: str) -> Table:
    """Layers and zeros of a pruned model, per component."""
    rows = [
        (component, count, f"{zeros:,}", f"{zeros / size:.2%}")
        for component, (count, zeros, size) in component_totals(sparsity).items()
    ]
    return table(title, ("component", "layers", "zeros", "sparsity"), rows)


def scores_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Scores with 95 % intervals, per kind and metric."""
    cells = []
    for r in rows:
        interval = f"{r['low']:.4f} to {r['high']:.4f}" if r["low"] is not None else "–"
        cells.append((r["kind"], r["metric"].replace("_", " "), f"{r['value']:.4f}", interval, r["n"]))
    return table(title, ("kind", "metric", "score", "95 % interval", "samples"), cells, text_columns=2)


def prune_notes(metrics: Mapping[str, Any], out: str) -> list[str]:
    """Lines on a pruning: errors, exceptions, seconds."""
    facts = metrics["prune"]
    lines = []
    if facts["block_errors"]:
        worst = max(facts["block_errors"], key=lambda name: facts["block_errors"][name])
        lines.append(f"Largest relative output error of a block: {facts['block_errors'][worst]:.3f} at {worst}")
    if fitted := list(facts["reconstructed"].values()):
        before, after = (sum(pair[i] for pair in fitted) / len(fitted) for i in (0, 1))
        lines.append(f"Reconstruction: mean relative distance of blocks from the dense model {before:.3f} -> {after:.3f}")
    if sparser := facts.get("sparser"):
        most = max(sparser, key=lambda name: sparser[name])
        lines.append(
            f"More zeros than planned, since zeros stay zeros: {sparser[most]:.1%} in {most}, layers: {len(sparser)}"
        )
    if facts["permuted"]:
        lines.append(f"Channels regrouped in front of {len(facts['permuted'])} layers")
    if facts["damping"]:
        worst = max(facts["damping"].values())
        lines.append(f"{len(facts['damping'])} Gram matrices needed more damping than 0.01, at most {worst:g}")
    if facts["ungraded"]:
        names = ", ".join(facts["ungraded"][:3]) + (" ..." if len(facts["ungraded"]) > 3 else "")
        lines.append(f"The loss does not depend on {len(facts['ungraded'])} layers, scored as Wanda does: {names}")
    if unreached := facts.get("unreached"):
        names = ", ".join(unreached[:3]) + (" ..." if len(unreached) > 3 else "")
        lines.append(f"No calibration sample reached {len(unreached)} layers, which stay dense: {names}")
    if facts["pooled"]:
        names = ", ".join(facts["pooled"][:3]) + (" ..." if len(facts["pooled"]) > 3 else "")
        lines.append(f"{len(facts['pooled'])} experts saw too few tokens and took the moments of all: {names}")
    lines += data_lines(facts.get("data", {}))
    return [*lines, *skipped_line(facts["skipped_samples"]), f"{facts['seconds']:.1f} s · wrote {out}"]


def data_lines(facts: Mapping[str, Any], noun: str = "data") -> list[str]:
    """What was read of the data, where that is not all."""
    lines = [f"Read the split {facts['split']!r} of the {noun}"] if "split" in facts else []
    lines += [f"Asked: {prompt!r}" for prompt in facts.get("prompts", ())]
    if "decoding" in facts:
        ways = [f"{name.replace('_', ' ')} {value:g}" for name, value in facts["decoding"].items()]
        lines.append(f"Answers: {', '.join(ways)}")
    if "without_images" in facts:
        lines.append(f"None of the {facts['without_images']} samples has an image")
    if ignored := facts.get("ignored_keys"):
        lines.append("Ignored keys: " + ", ".join(f"{quote(key)} ({count} samples)" for key, count in ignored.items()))
    return lines + ([f"Left out {facts['empty_answers']} empty answers"] if "empty_answers" in facts else [])


def _read_lines(read: Mapping[str, Any]) -> list[str]:
    return [*data_lines(read.get("data", {})), *data_lines(read.get("held_out", {}), "held-out data")]


def skipped_line(count: int) -> list[str]:
    """What `--skip-bad` did."""
    return [f"Left out {count} broken samples"] if count else []


def restore_notes(metrics: Mapping[str, Any], out: str) -> list[str]:
    """Lines on a restoration: losses, best step, teacher, seconds."""
    facts = metrics["restore"]
    last = facts["curve"][-1] if facts["curve"] else None
    loss = f"ce {last['ce']:.3f} · kl {last['kl']:.3f} at the end · " if last else ""
    lines = [f"{loss}{facts['trained_parameters']:,} trained parameters"]
    if "best_step" in facts:
        best = min(row["eval_loss"] for row in facts["held_out"])
        lines.append(f"Held-out loss {best:.4f} at step {facts['best_step']}, the best, which is kept")
    if facts["teacher_modes"]:
        modes = (f"{mode} {_sizes(needs)}" for mode, needs in facts["teacher_modes"].items())
        lines.append(f"Teacher {facts['teacher']}; weights of both would take: {' · '.join(modes)}")
    lines += [*data_lines(facts.get("data", {})), *data_lines(facts.get("held_out_data", {}), "held-out data")]
    return [*lines, *skipped_line(facts["skipped_samples"]), f"{facts['seconds']:.1f} s · wrote {out}"]


def cost_tables(facts: Mapping[str, Any]) -> list[Any]:
    """The cost of every stage, and the terms of its peak memory."""
    rows, terms, times = [], [], facts.get("times", {})
    for stage in facts["stages"]:
        work, disk = sum(stage["flops"].values()), stage["disk"]
        least = f"{stage['seconds']:,.0f}" if stage["seconds"] is not None and work else "–"
        bytes_ = " · ".join(f"{name} {size / 1e6:,.1f}" for name, size in disk.items()) or "–"
        often = (times.get(stage["name"], "–"),) if times else ()
        rows.append(
            (stage["name"], *often, f"{work / 1e9:,.0f}" if work else "–", least, f"{stage['peak'] / 1e6:,.0f}", bytes_)
        )
        terms += [(stage["name"], stage["moment"], name, f"{size / 1e6:,.1f}") for name, size in stage["memory"].items()]
    tokens = ", ".join(f"{count:g} {kind}" for kind, count in facts["tokens_per_sample"].items())
    guess = " (no --data: a picture of 640 × 480, 16 words asked, 4 answered)" if facts["assumed"] else ""
    lines = [
        table(
            "Estimated cost",
            ("stage", *(("times",) if times else ()), "GFLOPs", "s, roughly at least", "peak MB", "MB on disk"),
            rows,
        ),
        table("Memory at the worst moment", ("stage", "at", "what", "MB"), terms, text_columns=3),
        f"Tokens per sample: {tokens}{guess}",
    ]
    if facts["rate"]:
        lines.append(f"Seconds are FLOPs by {facts['rate'] / 1e9:,.0f} GFLOPs a second, a square product measured here")
    if times:
        work = sum(facts["total"].values())
        least = f", roughly at least {work / facts['rate'] / 60:,.0f} min" if facts["rate"] else ""
        lines.append(f"In all {work / 1e12:,.1f} TFLOPs{least}")
        lines += [f"Not counted: {', '.join(facts['without'])}"] if facts["without"] else []
    return [*lines, "Nothing was run; base is interpreter and libraries, measured here"]


def _sizes(needs: Mapping[str, int]) -> str:
    disk = f" + {needs['disk'] / 1e6:,.1f} MB of disk" if "disk" in needs else ""
    return f"{needs['memory'] / 1e6:,.1f} MB{disk}"


def run_tables(facts: Mapping[str, Any]) -> list[Any]:
    """The models of a run: zeros, score, bytes; the proof; the page."""
    from sparsight.reporting.runs import read_runs

    rows, metric = [], "score"
    for run in read_runs(facts["runs"]) if facts["runs"] else ():
        amounts = [f"{x['zeros'] / x['parameters']:.2%}" if x["parameters"] else "–" for x in run.components.values()]
        score = headline(run.scores)
        metric = title_of(score["metric"])[0]
        rows.append((run.label, " ".join(amounts), _interval(score), f"{(run.packed_bytes or 0) / 1e6:.1f}"))
    columns = ("model", "zeros per component", f"{metric}, 95 % interval", "packed MB")
    scores = [table("Models", columns, rows)] if rows else []
    page = [f"Report: {facts['report']}"] if facts["report"] else []
    return [*scores, *_read_lines(facts.get("data", {})), *verify_lines(facts["verify"]), *page]


def sweep_tables(records: Sequence[Mapping[str, Any]], out: str) -> list[Any]:
    """The cells, those of several seeds in one row: mean, and the lowest and the highest."""
    from sparsight.reporting.groups import distinct_labels

    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        key = json.dumps({k: v for k, v in record["cell"].items() if k != "seed"}, sort_keys=True)
        groups.setdefault(key, []).append(record)
    rows = []
    labels = distinct_labels([(cells[0]["label"], cells[0]["cell"]) for cells in groups.values()])
    for label, cells in zip(labels, groups.values(), strict=True):
        first = cells[0]
        rows_of = [headline(c["scores"]) for c in cells]
        scores = [score["value"] for score in rows_of]
        metric = title_of(rows_of[0]["metric"])[0]
        amounts = [f"{x['zeros'] / x['parameters']:.1%}" if x["parameters"] else "–" for x in first["components"].values()]
        spread = f"{min(scores):.4f} to {max(scores):.4f}" if len(scores) > 1 else "–"
        rows.append((label, *amounts, f"{sum(scores) / len(scores):.4f}", spread, f"{first['packed_bytes'] / 1e6:.1f}"))
    columns = ("cell", *records[0]["components"], metric, "seeds", "packed MB")
    seconds = sum(sum(record["seconds"].values()) for record in records)
    wrong = [f"{r['label']}, seed {r['cell']['seed']}" for r in records if not r["verified"]]
    lost = [f"NOT every zero is where the plan says: {name}" for name in wrong]
    state = Path(out) / "sweep.json"
    read = json.loads(state.read_text(encoding="utf-8")).get("read", {}) if state.is_file() else {}
    return [
        table(f"{len(records)} cells", columns, rows),
        *_read_lines(read),
        *lost,
        f"{seconds:.0f} s of work · results in {out}",
    ]


def search_tables(facts: Mapping[str, Any], out: str) -> list[Any]:
    """The measured plans, the best one, and its gain over the starting split."""

    def amounts(candidate: Mapping[str, Any]) -> list[str]:
        return [f"{amount:.2%}" for amount in candidate["components"].values()]

    metric, factor = title_of(facts["dense_score"]["metric"])
    components = tuple(facts["chosen"]["components"])
    tried = [(x["name"], *amounts(x), f"{x['divergence']:.4f}") for x in facts["tried"]]
    scored = [("dense", *("0.00%" for _ in components), "–", _interval(facts["dense_score"]))]
    for name in ("given", "chosen"):
        scored.append((name, *amounts(facts[name]), f"{facts[name]['divergence']:.4f}", _interval(facts[f"{name}_score"])))
    lines: list[Any] = [table("Tried", ("plan", *components, "nats"), tried)]
    if facts["steps"]:
        steps = [
            (f"{x['budget']:.2%}", *amounts(x), f"{x['score']:.4f}", "kept" if x["fits"] else "lost") for x in facts["steps"]
        ]
        lines.append(table("Budgets", ("sparsity", *components, metric, "score"), steps))
    lines.append(table(f"At {facts['budget']:.2%} zeros", ("plan", *components, "nats", f"{metric}, 95 % interval"), scored))
    better = facts["chosen_score"]["value"] - facts["given_score"]["value"]
    note = f"the chosen plan is {factor * better:+.1f} points from the given split" if better else "both score the same"
    cost = f"{facts['measurements']} divergences, {facts['evaluations']} evaluations, {facts['seconds']:.0f} s"
    lines += _read_lines(facts.get("data", {}))
    return [*lines, f"{note} · {cost} · wrote {out}"]


def _interval(row: Mapping[str, Any]) -> str:
    there = row["low"] is not None  # scores of tokens have none
    return f"{row['value']:.4f}" + (f" [{row['low']:.4f}, {row['high']:.4f}]" if there else "")


def verify_lines(proof: Mapping[str, Any]) -> list[Any]:
    """Totals of a verification, after a table of the layers that differ, if any do."""
    total = f"{proof['layers']} layers, {proof['zeros']:,} zeros, sparsity {proof['sparsity']:.2%}"
    against = f", and no zero of {proof['against']} was lost" if proof["against"] else ""
    if not proof["differences"]:
        return [f"verified {proof['folder']}: {total}{against}"]
    rows = [(name, "; ".join(what)) for name, what in proof["differences"].items()]
    return [table(f"{len(rows)} layers of {proof['folder']} differ", ("layer", "what"), rows, text_columns=2), total]
