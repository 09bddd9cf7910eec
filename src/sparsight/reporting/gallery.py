"""Samples with the answers of several runs side by side."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from sparsight.reporting.groups import Group
from sparsight.reporting.scores import estimate

COLUMNS = 6  # runs
ROWS = 12  # samples

Picture = Callable[[int], bytes | None]  # the PNG of the sample with this number


def gallery(
    groups: Sequence[Group], metric: str | None = None, labels: Sequence[str] = (), picture: Picture | None = None
) -> dict[str, Any] | None:
    """Samples with the answers side by side: of every kind in turn, the second run's mistakes first.

    `labels` are those of the runs to show; without them of many runs the first, and others from the best to the worst.
    Samples with a picture come before those without. None if no run has answers to the samples of the first.
    """
    key = groups[0].first.samples_key
    comparable = [group for group in groups if group.first.predictions and group.first.samples_key == key]
    if not comparable:
        return None
    columns = [g for g in comparable if g.label in labels] or _spread(comparable, metric)
    answers = [g.first.predictions for g in columns]
    picture = picture or _recorded_picture(groups)
    pictures = [picture(i) for i in range(len(answers[0]))]
    pool = [i for i, png in enumerate(pictures) if png is not None] or list(range(len(pictures)))
    second = answers[min(1, len(answers) - 1)]
    by_kind: dict[str, list[int]] = {}
    for i in pool:
        by_kind.setdefault(answers[0][i]["kind"], []).append(i)
    turns = itertools.zip_longest(*(sorted(kind, key=lambda i: second[i]["correct"]) for kind in by_kind.values()))
    numbers = [i for turn in turns for i in turn if i is not None][:ROWS]
    rows = [
        {
            "image": f"data:image/png;base64,{base64.b64encode(png).decode()}" if (png := pictures[i]) else "",
            "kind": answers[0][i]["kind"],
            "prompt": answers[0][i]["prompt"],
            "answers": list(dict.fromkeys(answers[0][i]["answers"])),
            "predictions": [{"text": run[i]["prediction"], "right": run[i]["correct"]} for run in answers],
        }
        for i in numbers
    ]
    more = len(comparable) - len(columns)
    return {"columns": [group.label for group in columns], "rows": rows, "more": more, "ranked": not labels}


def _spread(groups: Sequence[Group], metric: str | None) -> list[Group]:
    """All groups if they fit; else the first, and five of the others, evenly from the best to the worst."""
    if len(groups) <= COLUMNS:
        return list(groups)
    ranked = sorted(groups[1:], key=lambda g: -(score.value if (score := estimate(g, metric)) else -1e9))
    steps = [round(i * (len(ranked) - 1) / (COLUMNS - 2)) for i in range(COLUMNS - 1)]
    return [groups[0], *(ranked[i] for i in steps)]


def _recorded_picture(groups: Sequence[Group]) -> Picture:
    """The recorded pictures, each from the first run that has it."""
    folders = list(dict.fromkeys(group.first.pictures for group in groups if group.first.pictures))

    def picture(i: int) -> bytes | None:
        return next((file.read_bytes() for folder in folders if (file := folder / f"{i}.png").is_file()), None)

    return picture
