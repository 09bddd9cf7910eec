"""Samples with the answers of several runs side by side."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

from sparsight.report.runs import Group
from sparsight.report.scores import estimate, same_samples

COLUMNS = 6  # runs
ROWS = 12  # samples

Picture = Callable[[int], bytes | None]  # the PNG of the sample with this number


def gallery(
    groups: Sequence[Group], metric: str | None = None, shown: Sequence[str] = (), picture: Picture | None = None
) -> dict[str, Any] | None:
    """Samples with the answers side by side: of every kind in turn, the second run's mistakes first.

    Of many runs: the first, and others from the best to the worst. Samples with a picture come before those without.
    """
    able = [g for g in groups if g.first.predictions and same_samples([groups[0].first, g.first])]
    if not able:
        return None
    wanted = [g for g in able if g.label in shown] or _spread(able, metric)
    answered = [g.first.predictions for g in wanted]
    seen: Picture = picture or _pictures(groups)
    pictured = [i for i in range(len(answered[0])) if seen(i) is not None] or list(range(len(answered[0])))
    by_kind: dict[str, list[int]] = {}
    for i in pictured:
        by_kind.setdefault(answered[0][i]["kind"], []).append(i)
    for members in by_kind.values():
        members.sort(key=lambda i: (answered[min(1, len(answered) - 1)][i]["correct"], i))
    chosen: list[int] = []
    while len(chosen) < min(ROWS, len(pictured)):
        for members in by_kind.values():
            if members and len(chosen) < ROWS:
                chosen.append(members.pop(0))
    rows = [
        {
            "image": _embedded(seen(i)),
            "kind": answered[0][i]["kind"],
            "prompt": answered[0][i]["prompt"],
            "answers": list(dict.fromkeys(answered[0][i]["answers"])),
            "given": [{"text": rows[i]["prediction"], "right": rows[i]["correct"]} for rows in answered],
        }
        for i in chosen
    ]
    return {
        "columns": [group.label for group in wanted],
        "rows": rows,
        "more": len(able) - len(wanted),
        "ranked": not shown,
    }


def _spread(groups: Sequence[Group], metric: str | None) -> list[Group]:
    """The first group, and of the others at most five, evenly from the best to the worst; in their own order if all fit."""
    if len(groups) <= COLUMNS:
        return list(groups)
    ranked = sorted(groups[1:], key=lambda g: -(found.value if (found := estimate(g, metric)) else -1e9))
    steps = [round(i * (len(ranked) - 1) / (COLUMNS - 2)) for i in range(COLUMNS - 1)]
    return [groups[0], *(ranked[i] for i in steps)]


def _pictures(groups: Sequence[Group]) -> Picture:
    """Pictures as `eval --record` has left them, of the first run that has the sample's."""
    folders = list(dict.fromkeys(group.first.pictures for group in groups if group.first.pictures))

    def find(i: int) -> bytes | None:
        return next((file.read_bytes() for folder in folders if (file := folder / f"{i}.png").is_file()), None)

    return find


def _embedded(png: bytes | None) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode() if png else ""
