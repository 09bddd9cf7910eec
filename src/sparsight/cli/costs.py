"""`--cost` of a recipe: what `run` and `sweep` print in place of their work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsight.checks import need_packages
from sparsight.errors import SparsightError
from sparsight.recipe import content


def recipe_cost(verb: str) -> Callable[[dict[str, Any]], tuple[Any, Sequence[Any], bool] | None]:
    """The function that gives what `verb --cost` prints, None without `cost`; only that needs no folder to write to."""

    def instead(values: dict[str, Any]) -> tuple[Any, Sequence[Any], bool] | None:
        changes = list(values["changes"] or ())
        if not values.pop("cost"):
            if values["out"] is None:
                raise SparsightError("`out`: is missing; give a folder for the results, or add `cost`")
            if verb == "run" and content(values["recipe"], changes).get("evaluate", {}) is not None:
                need_packages("the report of a run", "report", matplotlib="matplotlib")
            return None
        first = [values["out"]] if "=" in (values["out"] or "") else []  # a change in the place of the folder
        changes = [*first, *changes]
        check_data(values["recipe"], changes)
        from sparsight.estimation.recipe import estimate_recipe

        return cost_shown(estimate_recipe(values["recipe"], changes, verb=verb))

    return instead


def check_data(recipe: str, changes: Sequence[str]) -> None:
    """Refuse, before anything large is imported, a recipe whose files of data are not there: their samples are counted.

    **Raises** `SparsightError`.
    """
    settings = content(recipe, changes)
    for key in ("data", "held_out"):
        value = settings.get(key)
        if isinstance(value, str) and value.endswith((".json", ".jsonl", ".parquet")) and not Path(value).exists():
            raise SparsightError(
                f"{recipe}: {key}: {value} is not there, and the cost is that of its samples; add {key}=FILE to the command"
            )


def cost_shown(estimate: Any) -> tuple[Any, Sequence[Any], bool]:
    """The facts of an estimate, its tables, and that all is well."""
    from sparsight.cli import tables

    facts = estimate.facts()
    return facts, tables.cost_tables(facts), True
