"""Make vqa.json with the official VQA evaluation.

The reference is PythonEvaluationTools/vqaEvaluation/vqaEval.py of https://github.com/GT-Vision-Lab/VQA at commit
c4e6a0e4e84b9702d99800d3393652d92b5df224, which is not on PyPI. Save it somewhere, then

    python tests/golden/make_vqa.py path/to/vqaEval.py

People's answers in the "accuracy" cases are in normal form already, as the official ones are, since the official code
does not bring them there (see sparsight/evaluate/vqa.py); "raw" cases are not, and there the two differ.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TEXTS = """
A red car.|The  two dogs|none|Yes!|no.|2.5|.5 miles|3.|1,000|1,000 - people!|red, white and blue|red,white|black/white
black-and-white|don't|dont|DONT|whats that|it's|its|Im|Id've|Ive been|'ow'sat|somebody'd|an apple a day|The|ten to nine
U.S.A.|www.a.com|(left)|left (side)|"stop"|a_b|a+b=c|x<y>z|me@home|`tick`|50%|$5|#1|5:30|o'clock|oclock|let's|she's
wouldntve|wouldn'tve|you're|youre|yall'll|rock'n'roll|what?!|what ? !|who;me|{a}|[b]|back\\slash|é, ü|1,2,3|3,a|a , b
"""
WORDS = """
the a an one two ten none red, blue. car's dont isnt theyre 1,000 2.5 . , ! ? - / left-right (up) yes no U.S. Im whod've
'twas
"""


def main(path: str) -> None:
    """Write vqa.json beside this file."""
    reference = _load(path)
    random.seed(0)
    texts = [text for line in TEXTS.strip().splitlines() for text in line.split("|")]
    texts += [" ".join(random.choices(WORDS.split(), k=random.randint(1, 6))) for _ in range(60)]
    scorer = reference(SimpleNamespace(getQuesIds=list), None)
    normal = {text: _normalise(scorer, text) for text in texts}
    cases = [_accuracy(reference, *case) for case in _cases(sorted({form for form in normal.values() if form}))]
    raw = [("The two dogs", ["The two dogs"] * 10), ("two", ["2"] * 4 + ["two"] * 6), ("Yes", ["Yes"] * 9 + ["no"])]
    golden = {
        "source": "GT-Vision-Lab/VQA vqaEval.py at c4e6a0e4e84b9702d99800d3393652d92b5df224",
        "normalise": normal,
        "accuracy": cases,
        "raw": [_accuracy(reference, *case) for case in raw],
        "contractions": scorer.contractions,
    }
    text = json.dumps(golden, indent=1, ensure_ascii=False) + "\n"
    Path(__file__).with_name("vqa.json").write_text(text, encoding="utf-8")


def _load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("vqaEval", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes of Python 2
        spec.loader.exec_module(module)
    return module.VQAEval


def _normalise(scorer: Any, text: str) -> str:
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return scorer.processDigitArticle(scorer.processPunctuation(text))


def _cases(forms: list[str]) -> list[tuple[str, list[str]]]:
    cases = []
    for agree in range(11):
        cases.append(("Red.", ["red"] * agree + ["blue"] * (10 - agree)))
    for _ in range(40):
        few = random.sample(forms, random.randint(1, 4))
        answers = random.choices(few, k=random.choice([4, 5, 9, 10, 10, 10]))
        cases.append((random.choice([*few, "no", f"the {few[0]}"]), answers))
    return cases


def _accuracy(reference: Any, prediction: str, answers: list[str]) -> dict[str, Any]:
    people = [{"answer": answer, "answer_id": i} for i, answer in enumerate(answers)]
    asked = {0: {"answers": people, "question_type": "", "answer_type": ""}}
    questions = SimpleNamespace(qa=asked, getQuesIds=lambda: [0])
    scorer = reference(questions, SimpleNamespace(qa={0: {"answer": prediction}}), n=12)
    scorer.updateProgress = lambda _: None
    scorer.evaluate()
    return {"prediction": prediction, "answers": answers, "accuracy": scorer.evalQA[0] / 100}


if __name__ == "__main__":
    main(sys.argv[1])
