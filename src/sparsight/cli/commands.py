"""The commands, made from the verbs in `sparsight.api`: arguments and options are their parameters and the fields of their
records; this file has what a command prints, and what it does beside its verb."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Optional, get_args, get_origin

import typer
from typer.core import TyperCommand

from sparsight import api
from sparsight.cli.costs import cost_shown, recipe_cost
from sparsight.cli.flags import add_fields, flag, with_flags
from sparsight.cli.output import check_eval, show, write_eval
from sparsight.cli.progress import progress_display
from sparsight.errors import SparsightError
from sparsight.files import check_output
from sparsight.options import Argument, Option, options, types_of
from sparsight.shared_spec import SharedSpec
from sparsight.specs import SPECS, PruneSpec, RestoreSpec

WRITERS = ("prune", "restore", "pack", "unpack", "search")  # commands that write a folder, new or replaced
READ = ("model", "sparse", "packed", "data")  # what they read, which must not lie in it

Values = dict[str, Any]
Shown = tuple[Any, Sequence[Any], bool]  # facts for --json, what is printed else, whether all is well


@dataclass(frozen=True)
class Extra:
    """An option that only the command line has."""

    name: str
    help: str
    kind: Any = bool
    default: Any = False


@dataclass(frozen=True)
class Command:
    """A verb as a command: what it prints, its further options, and what may replace the verb.

    `show(result, values)` gives facts, parts and whether all is well. `instead(values)` gives the same for options that
    replace the verb, else None; it may also refuse options before the verb runs.
    """

    verb: str
    show: Callable[[Any, Values], Shown]
    extras: tuple[Extra, ...] = ()
    instead: Callable[[Values], Shown | None] = lambda values: None
    more: Callable[[], list[inspect.Parameter]] = list  # options of other records
    quiet: bool = True  # whether it has progress to show
    json: bool = True
    after: Callable[[Any, Values], None] = field(default=lambda result, values: None)


def make(name: str, command: Command) -> Callable[..., None]:
    """Return the function that typer turns into a command."""
    function = getattr(api, command.verb)
    parameters = [*verb_parameters(command.verb), *spec_parameters(SPECS.get(command.verb))]
    extras = {extra.name for extra in command.extras}
    parameters += [extra_parameter(extra) for extra in command.extras] + command.more()
    add_fields(p.name for p in parameters)
    if command.json:
        parameters.append(extra_parameter(Extra("json", "Print JSON for machines.")))
    if command.quiet:
        parameters.append(extra_parameter(Extra("quiet", "Show no progress.")))
    lists = tuple_fields(command.verb)

    def call(**values: Any) -> None:
        as_json, quiet = values.pop("json", False), values.pop("quiet", False)
        values = {key: ",".join(x) if key in lists else x for key, x in values.items()}
        shown = command.instead(values)
        if shown is not None:
            return _end(shown, as_json)
        if name in WRITERS:  # before torch is imported
            check_output(values["out"], values["overwrite"], [values.get(key) for key in READ])
        verb = getattr(api, command.verb)  # as it is now
        own = {key: value for key, value in values.items() if key not in extras}
        if command.quiet:
            with progress_display(name, quiet) as progress:
                result = verb(**own, progress=progress)
        else:
            result = verb(**own)
        _end(command.show(result, values), as_json, lambda: command.after(result, values))
        return None

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__doc__ = with_flags((function.__doc__ or "").splitlines()[0])
    return call


def _end(shown: Shown, as_json: bool, after: Callable[[], None] = lambda: None) -> None:
    facts, parts, fine = shown
    try:
        after()  # files first: what is printed may go to a pipe that is closed
    finally:
        show(facts, as_json, *parts)
    if not fine:
        raise typer.Exit(1)


def tuple_fields(verb: str) -> set[str]:
    """The fields of a verb's record that are lists of words."""
    fields = options(SPECS[verb]) if verb in SPECS else {}
    return {name for name, (kind, _) in fields.items() if get_origin(types_of(kind)[0][0]) is tuple}


def verb_parameters(verb: str) -> list[inspect.Parameter]:
    """The arguments and options of a verb's own parameters: those with a help text beside their type."""
    fields = options(SPECS[verb]) if verb in SPECS else {}
    parameters = []
    function = getattr(api, verb)
    for p in inspect.signature(function).parameters.values():
        hint = eval(p.annotation, function.__globals__) if p.name not in fields else None
        if not hasattr(hint, "__metadata__"):
            continue
        kind, text = get_args(hint)[:2]
        shape: Any = list[str] if get_origin(kind) is Sequence else kind if kind is int else str
        shape = bool if bool in (kind, *get_args(kind)) else shape
        required = p.default is p.empty or (isinstance(text, Argument) and text.required)
        required = required and (p.name, verb) not in (("out", "run"), ("out", "sweep"))  # `cost` needs none
        if isinstance(text, Argument):
            default = None if p.default is p.empty else p.default
            info = typer.Argument(... if required else default, help=with_flags(text), show_default=False)
            parameters.append(_parameter(p.name, shape if required else Optional[shape], info))  # noqa: UP045
        else:
            parameters.append(_option(p.name, shape, ... if required else p.default, text))
    return parameters


def spec_parameters(
    spec: Any, names: Sequence[str] | None = None, rename: Callable[[str], str] = str, note: str = ""
) -> list[inspect.Parameter]:
    """The options of a record's fields; with `names` only these, without defaults and with a `note` before the help."""
    parameters = []
    for name, (kind, option) in (options(spec) if spec else {}).items():
        if names is not None and name not in names:
            continue
        kinds, _ = types_of(kind)
        listed = get_origin(kinds[0]) is tuple
        shape: Any = list[str] if listed else kinds[0] if kinds[0] in (bool, int, float) and len(kinds) == 1 else str
        default = None if names is not None else list(getattr(spec, name)) if listed else getattr(spec, name)
        parameters.append(_option(rename(name), shape, default, note + option.help, option))
    return parameters


def extra_parameter(extra: Extra) -> inspect.Parameter:
    """The option that only the command line has."""
    return _option(extra.name, extra.kind, extra.default, extra.help)


def _option(name: str, shape: Any, default: Any, text: str, option: Option | None = None) -> inspect.Parameter:
    shown = default not in (None, ..., []) and shape is not bool
    if option is not None:
        LAZY_HELP[flag(name), text] = option
    info = typer.Option(default, flag(name), help=text, show_default=shown)
    return _parameter(name, Optional[shape] if default is None else shape, info)  # noqa: UP045


def _parameter(name: str, shape: Any, info: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=shape)


LAZY_HELP: dict[tuple[str, str], Option] = {}  # help whose names are read from their tables when it is printed


class LazyHelp(TyperCommand):
    """A command that fills the names of tables into its help when the help is printed."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options into the help, the names of tables among them."""
        parameter: Any
        for parameter in self.params:
            if text := getattr(parameter, "help", None):
                option = LAZY_HELP.get((parameter.opts[0], text))
                names = ", ".join(option.names()) if option and "{names}" in text else ""
                parameter.help = with_flags(text.replace("{names}", names))
        super().format_options(ctx, formatter)


# what the commands print


def _inspected(body: Any, values: Values) -> Shown:
    from sparsight.cli import tables

    facts = tables.anatomy_facts(body, tables.zeros_of(body, values["model"], values["count"]))
    return facts, tables.anatomy_tables(facts, values["layers"]), True


def _planned(made: Any, values: Values) -> Shown:
    from sparsight.allocation.plan import plan_facts
    from sparsight.cli import tables

    facts = plan_facts(made.anatomy, made.plan)
    layers = [tables.planned_layers(made.anatomy, made.plan)] if values["layers"] else []
    return facts, [tables.plan_table(facts["components"]), *layers], True


def _pruned(record: Any, values: Values) -> Shown:
    from sparsight.cli import tables

    facts = {"out": values["out"], **record.sparsity, "metrics": record.metrics}
    head = tables.pruned_table(record.sparsity, f"Pruned by {record.sparsity['method']}")
    return facts, [head, *tables.prune_notes(record.metrics, values["out"])], True


def _restored(record: Any, values: Values) -> Shown:
    from sparsight.cli import tables

    facts = {"out": values["out"], **record.sparsity, "metrics": record.metrics}
    head = tables.pruned_table(record.sparsity, f"Restored with {values['adapter']}")
    return facts, [head, *tables.restore_notes(record.metrics, values["out"])], True


def _evaluated(result: Any, values: Values) -> Shown:
    from sparsight.cli import tables

    counts = f"{len(result.predictions)} samples" if result.predictions else f"{result.rows[0]['n']} answer tokens"
    title = f"{values['model']} on {counts}"
    lines = [*tables.data_lines(result.data), *tables.skipped_line(result.skipped)]
    return json.loads(result.to_json()), [tables.scores_table(result.rows, title), *lines], True


def _verified(facts: Any, values: Values) -> Shown:
    return (*_print("tables.verify_lines")(facts, values)[:2], not facts["differences"])


def _print(where: str) -> Callable[[Any, Values], Shown]:
    """What a function in a file beside this one prints, "file.function"; it may take the options `out` and `layers`."""
    module, _, part = where.partition(".")

    def shown(facts: Any, values: Values) -> Shown:
        chosen = {key: values[key] for key in ("out", "layers") if key in values}
        return {**chosen, **facts}, getattr(import_module(f"sparsight.cli.{module}"), part)(facts, **chosen), True

    return shown


def _ran(facts: Any, values: Values) -> Shown:
    from sparsight.cli import tables

    return facts, tables.run_tables(facts), not facts["verify"]["differences"]


def _swept(records: Any, values: Values) -> Shown:
    from sparsight.cli import tables

    return records, tables.sweep_tables(records, values["out"]), all(record["verified"] for record in records)


def _searched(result: Any, values: Values) -> Shown:
    return _print("tables.search_tables")(result.facts, values)


def _reported(page: Any, values: Values) -> Shown:
    return None, [f"Report: {page}", *([f"Figures: {values['figures']}"] if values["figures"] else [])], True


# what replaces a verb

PLAN = options(SPECS["plan"])
PRUNE_COST = [name for name, (_, option) in options(PruneSpec).items() if option.cost and name not in PLAN]
RESTORE_COST = [
    name for name, (_, option) in options(RestoreSpec).items() if option.cost and name not in options(SharedSpec)
]
RESTORE_COST = [name for name in RESTORE_COST if name not in ("samples", "epochs", "split")]  # `steps` covers them


def _restore_name(name: str) -> str:
    return f"restore_{name}" if name in PLAN else name


def _cost_parameters() -> list[inspect.Parameter]:
    note = "With `cost`: "
    return [
        *spec_parameters(PruneSpec, PRUNE_COST, note=note),
        *spec_parameters(RestoreSpec, RESTORE_COST, _restore_name, note=note),
    ]


def _plan_cost(values: Values) -> Shown | None:
    """What `plan --cost` prints; without it, refuse options that only the estimate reads."""
    named = {name: values.pop(name) for name in [*PRUNE_COST, *map(_restore_name, RESTORE_COST)]}
    named = {name: value for name, value in named.items() if value is not None}
    if not values.pop("cost"):
        for name in named:
            raise SparsightError(f"`{name}`: says what the estimate is of; add `cost`, or leave it out")
        return None
    if values["device"] != "cpu":
        raise SparsightError(
            f"`device`: `cost` estimates the memory of a process on the CPU, not on {values['device']}; leave it out"
        )
    if values["layers"]:
        raise SparsightError("`layers`: `cost` estimates whole stages; leave one of the two out")
    prune = {name: values[name] for name in PLAN} | {n: named[n] for n in PRUNE_COST if n in named}
    own = {n: named[_restore_name(n)] for n in RESTORE_COST if _restore_name(n) in named}
    try:
        restore = RestoreSpec.of(own)
    except SparsightError as error:
        raise SparsightError(re.sub(r"^`(\w+)`", lambda m: f"`{_restore_name(m[1])}`", str(error))) from error
    return cost_shown(api.estimate(values["model"], data=values["data"], prune=prune, restore=restore))


def _dry_run(verb: str, check: Callable[[Values], None] = lambda values: None) -> Callable[[Values], Shown | None]:
    def instead(values: Values) -> Shown | None:
        check(values)
        if (count := values.pop("dry_run")) is None:
            return None
        from sparsight.cli.dry_run import dry_run

        return dry_run(verb, values, count)

    return instead


DRY_RUN = Extra("dry_run", "Show so many samples as the model gets them, sizes, steps and cost, and stop.", int, None)
LAYERS = Extra("layers", "List every layer by name.")
COUNT = Extra("count", "Count zeros, which reads all weights. [default: those on record, or of a small model]")
COST = Extra("cost", "FLOPs, bytes and peak memory of every stage instead; no weight is read.")
RECIPE_COST = Extra("cost", "FLOPs, bytes and peak memory of every stage instead; OUT is left alone.")
EVAL_FILES = (
    Extra("json_file", "Also write the scores here.", str, None),
    Extra("predictions", "Write every answer here, as JSONL.", str, None),
)
COMMANDS: dict[str, Command] = {
    "inspect": Command("inspect", _inspected, (LAYERS, COUNT), quiet=False),
    "plan": Command("plan", _planned, (LAYERS, COST), _plan_cost, _cost_parameters),
    "prune": Command("prune", _pruned, (DRY_RUN,), _dry_run("prune")),
    "restore": Command("restore", _restored, (DRY_RUN,), _dry_run("restore")),
    "eval": Command("evaluate", _evaluated, (*EVAL_FILES, DRY_RUN), _dry_run("evaluate", check_eval), after=write_eval),
    "verify": Command("verify", _verified, quiet=False),
    "ask": Command("ask", _print("looks.answers_table"), quiet=False),
    "diff": Command("diff", _print("looks.diff_tables"), (LAYERS,), quiet=False),
    "pack": Command("pack", _print("packed.pack_tables")),
    "unpack": Command("unpack", _print("packed.unpack_lines")),
    "bench": Command("bench", _print("packed.bench_tables")),
    "run": Command("run", _ran, (RECIPE_COST,), recipe_cost("run")),
    "sweep": Command("sweep", _swept, (RECIPE_COST,), recipe_cost("sweep")),
    "search": Command("search", _searched),
    "report": Command("report", _reported, quiet=False, json=False),
}
