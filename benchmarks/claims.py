"""The paper's claims, one by one, on sweeps of recipes/figures: does each hold here, with intervals?

Reads what `sparsight sweep recipes/figures/NAME.yaml FOLDER/MODEL-NAME model=demo:MODEL` has written for fixed-sum,
one-component and patterns, and prints Markdown. Differences are paired by sample and seed, in points of exact match (the
mean of questions and captions), with 95 % bootstrap intervals over samples and seeds.

    python benchmarks/claims.py FOLDER [--keep benchmarks/figures]

`--keep` copies each sweep's results.csv and figures there.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from sparsight.demo import MODELS
from sparsight.reporting.groups import Group, group_runs
from sparsight.reporting.runs import read_runs
from sparsight.reporting.scores import Estimate, difference, estimate

FIGURES = {"fixed-sum": ("fixed-sum",), "one-component": ("components",), "patterns": ("patterns", "restoration")}


def points(found: Estimate | None, sign: bool = False) -> str:
    if found is None:
        return ""
    plus = "+" if sign else ""
    return f"{100 * found.value:{plus}.1f} [{100 * found.low:{plus}.1f}, {100 * found.high:{plus}.1f}]"


def split(group: Group) -> tuple[float, float]:
    return round(group.first.target_sparsity("vision"), 3), round(group.first.target_sparsity("language"), 3)


def zeros(group: Group) -> int:
    return sum(counts["zeros"] for counts in group.first.components.values())


def score(group: Group) -> float:
    found = estimate(group)
    return found.value if found else 0.0


def table(head: str, rows: list[list[str]]) -> None:
    columns = head.split("|")
    print("| " + " | ".join(columns) + " |")
    print("|---" + "|---:" * (len(columns) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def named(group: Group) -> str:
    return " : ".join(f"{100 * amount:.0f}" for amount in split(group))


def equal(groups: list[Group]) -> None:
    """Is the equal split near the best, at the same sum and at no fewer zeros?"""
    rows = []
    for total in (1.0, 1.2):
        these = [group for group in groups if abs(sum(split(group)) - total) < 1e-6]
        middle = next(group for group in these if split(group)[0] == split(group)[1])
        best = max(these, key=score)
        heavy = max((group for group in these if zeros(group) >= zeros(middle)), key=score)
        rows.append([
            f"{100 * total:.0f} %", points(estimate(middle)), named(best), points(estimate(best)),
            points(difference(best, middle), True), f"{named(heavy)}, {points(difference(heavy, middle), True)}",
        ])  # fmt: skip
    table("sum|equal split|best split|its score|best over equal|best with no fewer zeros, over equal", rows)
    for total in (1.0, 1.2):
        these = sorted((g for g in groups if abs(sum(split(g)) - total) < 1e-6), key=split)
        print(f"Sum {100 * total:.0f} %, vision : language: " + ", ".join(f"{named(g)} {100 * score(g):.1f}" for g in these))
        print()


def alone(groups: list[Group]) -> None:
    """Does one component alone cost less, and is it language that is safe to prune?"""
    at = {split(group): group for group in groups}
    rows = []
    for amount in (0.5, 0.6, 0.7):
        both, vision, language = at[amount, amount], at[amount, 0.0], at[0.0, amount]
        rows.append([
            f"{100 * amount:.0f} %", *(points(estimate(g)) for g in (both, vision, language)),
            points(difference(vision, both), True), points(difference(language, both), True),
            points(difference(language, vision), True),
        ])  # fmt: skip
    table("ratio|both|vision alone|language alone|vision over both|language over both|language over vision", rows)
    both, rows = at[0.3, 0.3], []
    for one, near in [(both, nearest(at, c, zeros(both))) for c in (0, 1)] + [
        (vision, nearest(at, 1, zeros(vision))) for vision in (at[a / 10, 0.0] for a in range(3, 8))
    ]:
        rows.append([said(one), said(near), points(difference(near, one), True)])
    table("removed from|or from|the second over the first", rows)


def nearest(at: dict[tuple[float, float], Group], component: int, wanted: int) -> Group:
    """One component alone, with about as many zeros."""
    alone = [group for amounts, group in at.items() if amounts[1 - component] == 0 < amounts[component]]
    return min(alone, key=lambda group: abs(zeros(group) - wanted))


def said(group: Group) -> str:
    vision, language = split(group)
    name = "both" if vision and language else "vision" if vision else "language"
    return f"{name}, {100 * max(vision, language):.0f} % ({zeros(group) / 1000:.0f} k zeros): {points(estimate(group))}"


def restored(groups: list[Group]) -> None:
    """Does SparseLoRA restore, and where?"""
    rows = []
    dense = next(group for group in groups if group.first.is_dense)
    key = {(g.first.cell["pattern"], split(g), g.first.is_restored): g for g in groups if not g.first.is_dense}
    for (pattern, amounts, done), before in key.items():
        if done:
            continue
        after = key[pattern, amounts, True]
        lost = score(dense) - score(before)
        back = f"{100 * (score(after) - score(before)) / lost:.0f} %" if lost > 0.03 else ""
        name = pattern if pattern != "row" else f"{100 * amounts[0]:.0f} %"
        rows.append([name, points(estimate(before)), points(estimate(after)), points(difference(after, before), True), back])
    table("pattern|pruned|restored|restored over pruned|of what was lost", rows)


CLAIMS = {"fixed-sum": equal, "one-component": alone, "patterns": restored}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", type=Path, help="copy results and figures there")
    asked = parser.parse_args()
    for name, show in CLAIMS.items():
        for model in MODELS:
            folder = asked.folder / f"{model}-{name}"
            if not (folder / "results.csv").is_file():
                continue
            groups = group_runs(read_runs([folder]))
            dense = next(group for group in groups if group.first.is_dense)
            print(f"### {model}, dense {points(estimate(dense))}\n")
            show(list(groups))
            if asked.keep:
                target = asked.keep / f"{model}-{name}"
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / "results.csv", target)
                for figure in FIGURES[name]:
                    for kind in ("svg", "png"):
                        shutil.copy(folder / "figures" / f"{figure}.{kind}", target)


if __name__ == "__main__":
    main()
