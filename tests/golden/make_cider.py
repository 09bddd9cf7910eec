"""Make cider.json with the reference CIDEr-D, in an environment that holds pycocoevalcap 1.2 and numpy:

    python tests/golden/make_cider.py

The class is called CIDEr there, but clips and damps as CIDEr-D does. Its Java tokenizer is not used: captions are
words with single spaces, of which either tokenizer makes the same.
"""

from __future__ import annotations

import json
import random
from importlib.metadata import version
from pathlib import Path

from pycocoevalcap.cider.cider import Cider

GROUPS = [
    [
        ("a red circle above a blue square", ["a red circle above a blue square", "red circle over blue square"]),
        ("a green star", ["two green stars on black", "a small green star", "a green star in the dark"]),
        ("the dog runs", ["a dog runs on the beach", "the brown dog is running"]),
        ("", ["an empty room", "nothing but an empty room"]),
        ("cat", ["cat", "a cat"]),
        ("a a a a a a", ["a dog and a cat and a bird", "a dog near a cat"]),
        ("a man riding a horse on a beach", ["a man rides a horse on the beach near the water at sunset"]),
    ],
    [("one caption alone", ["one caption alone", "another"])],
    [("same words", ["same words"]), ("same words", ["same words"])],
    [("x y", ["x y"]), ("y x z", ["x y z", "z y x", "x"]), ("", ["x"]), ("w", ["w", "w w", "w w w"])],
]


def main() -> None:
    """Write cider.json beside this file."""
    random.seed(0)
    vocabulary = "red green blue circle square star on above left of a the two"

    def caption(low: int = 0) -> str:
        return " ".join(random.choices(vocabulary.split(), k=random.randint(low, 12)))

    drawn = [[(caption(), [caption(1) for _ in range(random.randint(1, 5))]) for _ in range(n)] for n in (2, 5, 12)]
    groups = []
    for group in GROUPS + drawn:
        predictions, references = [p for p, _ in group], [r for _, r in group]
        _, scores = Cider().compute_score(dict(enumerate(references)), {i: [p] for i, p in enumerate(predictions)})
        groups.append({"predictions": predictions, "references": references, "scores": scores.tolist()})
    golden = {"source": f"pycocoevalcap {version('pycocoevalcap')}", "groups": groups}
    Path(__file__).with_name("cider.json").write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
