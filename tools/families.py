"""Write docs/families.md: what was found, pruned, restored and verified in a tiny model of every type of transformers.

    python tools/families.py

The models are those of tests/tiny.py; each goes through the steps of tests/every_type.py. It takes about two minutes.
"""

from __future__ import annotations

import datetime
import re
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import transformers  # noqa: E402

import every_type  # noqa: E402

import tiny  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
HEAD = """# Every model type

One row per type of transformers' image-text-to-text mapping, and what was done with a tiny random model of it:

* **parts**: the lists of blocks, and the number of layers that can be pruned in them. `–`: the model has none.
* **walk**: the logits of a walk, every block run twice, are those of a plain forward, bit for bit.
* **pruned**: by Wanda to 50 % and to 2:4; the zeros are where the plan wants them, and nothing else has changed.
* **trained**: two steps of SparseLoRA in a plain loop; the merge keeps every zero.
* **restored**: two steps with distillation from the dense model.
* **saved**: as a folder that `verify` accepts.
* **loaded**: by stock transformers, with the same logits.

Where a step is missing, the last column says why. `python tools/families.py` makes this page.
"""


def main() -> None:
    """Take every type through the steps and write the page."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    today = datetime.date.today()
    lines = [HEAD, f"{today}, transformers {transformers.__version__}, torch on a CPU.", ""]
    lines.append("| type | vision | connector | language | walk | pruned | trained | restored | saved | loaded | |")
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    whole = 0
    for kind in tiny.TYPES:
        if kind in tiny.RESIST:
            lines.append(f"| {kind} |" + " |" * 9 + f" not tried: {tiny.RESIST[kind]} |")
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = every_type.walk_through(kind, Path(folder) / "model")
        whole += row.failed is None
        lines.append(line(row))
        print(kind, "" if row.failed is None else row.failed)
    lines[1] += f" {whole} of {len(tiny.TYPES)} types succeed in every step."
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def line(row: every_type.Row) -> str:
    """The row of one type."""
    assert row.body is not None
    cells = [row.kind]
    for component in ("vision", "connector", "language"):
        paths = row.body.family.paths(component)
        count = len(row.body.component(component))
        cells.append(f"{' '.join(f'`{path}`' for path in paths)} {count}" if count else "–")
    done = {*row.done}
    for steps in (("walk",), ("prune", "2:4"), ("lora",), ("restore",), ("save",), ("reload",)):
        cells.append("yes" if done.issuperset(steps) else "")
    reason = "" if row.failed is None else row.failed[1].partition(": ")[2]
    reason = re.sub(r"\S+/model: ", "", reason).replace("|", "/")
    return f"| {' | '.join(cells)} | {reason[:200]} |"


if __name__ == "__main__":
    main()
