"""Make tasks.json: 500 odd predictions for every kind of answer, with the scores of the benchmarks' own scorers.

Needs numpy, pandas, loguru, requests and scikit-learn, and these repositories, of which only the named files are run:

    lmms-eval  75571cfe  EvolvingLMMs-Lab/lmms-eval   tasks textvqa, chartqa, seedbench, ai2d, mmbench; api/metrics.py
    llava      c121f043  haotian-liu/LLaVA            llava/eval/eval_pope.py, eval_science_qa.py
    mmmu       bb0b95a9  MMMU-Benchmark/MMMU          mmmu/utils/eval_utils.py
    internvl   2410d1db  OpenGVLab/InternVL           internvl_chat/eval/mme/calculation.py, which is MME's own

    python tests/golden/make_tasks.py LMMS_EVAL LLAVA MMMU INTERNVL

MMMU guesses at random where it finds no option; the guess is replaced by none.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import random
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

N = 500
LETTERS = "A B C D E a b c F"
YES_NO = "yes no Yes No YES NO not yes. no. No, yes, nope yesx y n maybe There is is no, cat not. None Not"
WORDS = "red blue left right the a answer is Answer: option best . , ! I think it's (B) A) C. D: so therefore"
NUMBERS = "12 12.5 12,5 12% 0.12 1,000 1000 1e3 -3 3.0 .5 5 4.75 4.7 0 00 $5 5% 105 95 94.9 nan inf yes Yes"
OPEN = "the answer is x = so thus result could be 2.5. A red therefore final"
TEXTS = "red|Red.|the red|dogs'|dog's|1,000|a red car|two|2|don't|dont|t-shirt|tshirt|red, blue|red/blue||it's|its|ten"


def main(lmms: str, llava: str, mmmu: str, internvl: str) -> None:
    """Write tasks.json beside this file."""
    sys.path.insert(0, lmms)
    random.seed(0)
    golden: dict[str, Any] = {"source": __doc__}
    golden["yes_no"] = yes_no(
        Path(llava) / "llava/eval/eval_pope.py", Path(internvl) / "internvl_chat/eval/mme/calculation.py"
    )
    golden["letters"] = letters(Path(lmms), Path(llava) / "llava/eval/eval_science_qa.py", Path(mmmu))
    golden["open"] = open_answers(Path(mmmu))
    golden["numbers"] = numbers()
    golden["texts"] = texts(Path(lmms))
    path = Path(__file__).with_name("tasks.json")
    path.write_text(json.dumps(golden, ensure_ascii=False, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")


def phrases(words: list[str], longest: int) -> list[str]:
    """Odd predictions: some words, now and then with other spaces between them; the words alone first."""
    made = list(dict.fromkeys(words))
    while len(made) < N:
        few = random.choices(words, k=random.randint(1, longest))
        made.append(random.choice([" ", " ", " ", "\n", ". ", ""]).join(few))
    return [text.strip() for text in made[:N]]


def load(path: Path, **before: Any) -> Any:
    """A module of a file, with names that its imports ask for."""
    for name, module in before.items():
        sys.modules[name] = module
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    arguments, sys.argv = sys.argv, [str(path)]
    with contextlib.redirect_stdout(io.StringIO()):
        spec.loader.exec_module(module)
    sys.argv = arguments
    return module


def function(path: Path, name: str, **names: Any) -> Any:
    """One function of a file whose other imports are not there."""
    tree = ast.parse(path.read_text())
    node = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    node.decorator_list = []
    scope = dict(names)
    exec(compile(ast.Module([node], []), str(path), "exec"), scope)
    return scope[name]


def yes_no(pope: Path, mme: Path) -> dict[str, Any]:
    predictions = phrases(YES_NO.split(), 4)
    labels = [random.choice(["yes", "no"]) for _ in predictions]
    module, parse = load(pope), load(mme).calculate_metrics().parse_pred_ans
    answers = [{"text": text} for text in predictions]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write("".join(json.dumps({"label": label}) + "\n" for label in labels))
        file.flush()
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            module.eval_pope(answers, file.name)
    whole = dict(line.split(": ") for line in shown.getvalue().splitlines() if ": " in line)
    return {
        "predictions": predictions, "labels": labels, "pope": [answer["text"] for answer in answers],
        "pope_whole": {key: float(value) for key, value in whole.items()}, "mme": [parse(x.lower()) for x in predictions],
        "mme_whole": mme_scores(load(mme).calculate_metrics(), predictions),
    }  # fmt: skip


def mme_scores(scorer: Any, predictions: list[str]) -> dict[str, Any]:
    """Twelve pairs of every category, with a yes and a no, and the two totals."""
    categories = [
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
        "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
    ]  # fmt: skip
    rows, sides = [], ["yes", "no", "yes", "no", "no", "yes", "maybe", "Yes.", "No, there is none"]
    for category in categories:
        for i in range(12):
            rows += [[category, f"{i}.jpg", label.capitalize(), random.choice(sides)] for label in ("yes", "no")]
    with tempfile.TemporaryDirectory() as folder:
        for category in categories:
            lines = ["\t".join([row[1], "q", row[2], row[3]]) + "\n" for row in rows if row[0] == category]
            (Path(folder) / f"{category}.txt").write_text("".join(lines))
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            scorer.process_result(folder)
    totals = [float(line.split(":")[1]) for line in shown.getvalue().splitlines() if line.startswith("total score")]
    return {"rows": rows, "perception": totals[0], "cognition": totals[1]}


def letters(lmms: Path, science: Path, mmmu: Path) -> dict[str, Any]:
    predictions = phrases(
        LETTERS.split() + WORDS.split() + ["The answer is B.", "The answer is A", "B. red", "(A)", "C)"], 7
    )
    options = ["red", "blue", "the left one", "none"]
    rights = [random.choice("ABCD") for _ in predictions]
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
    from lmms_eval.tasks.seedbench.utils import seed_process_result

    ai2d = load(
        lmms / "lmms_eval/tasks/ai2d/utils.py",
        **{"lmms_eval.filters.extraction": types.SimpleNamespace(ExtendedRegexFilter=object)},
    )
    filters = ai2d.MultiChoiceRegexFilter.apply
    import re
    import string

    import numpy

    exact = function(lmms / "lmms_eval/api/metrics.py", "exact_match_hf_evaluate", np=numpy, re=re, string=string)
    bench, parse = MMBench_Evaluator(), load(mmmu / "mmmu/utils/eval_utils.py")
    parse.random = types.SimpleNamespace(choice=lambda choices: "")

    def of_ai2d(text: str, right: str) -> float:
        (letter,) = filters(None, [[text]], [None])
        return float(exact([letter], [right], ignore_case=True, ignore_punctuation=True)["exact_match"])

    def of_seed(text: str, right: str) -> float:
        made = seed_process_result({"answer": right, "data_type": "image", "question_id": 0}, [text])["seed_all"]
        return float(made["pred"].lower().strip() == made["answer"].lower().strip())

    by_letter = dict(zip("ABCD", options, strict=True))
    return {
        "predictions": predictions, "options": options, "rights": rights,
        "scienceqa": science_answers(science, predictions, options),
        "mmbench": [bench.can_infer(text, dict(by_letter)) or "" for text in predictions],
        "mmmu": [parse.parse_multi_choice_response(text, list("ABCD"), by_letter) for text in predictions],
        "seed": [of_seed(*pair) for pair in zip(predictions, rights, strict=True)],
        "ai2d": [of_ai2d(*pair) for pair in zip(predictions, rights, strict=True)],
    }  # fmt: skip


def science_answers(path: Path, predictions: list[str], options: list[str]) -> list[str]:
    """The letters that the script writes into its file of analyses, "" where it says that it failed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = [str(i) for i in range(len(predictions))]
        (folder / "pid_splits.json").write_text(json.dumps({"test": keys}))
        problems = {key: {"choices": [*options, "last"], "answer": 0} for key in keys}
        (folder / "problems.json").write_text(json.dumps(problems))
        lines = [{"question_id": key, "prompt": "<image>", "text": x} for key, x in zip(keys, predictions, strict=True)]
        (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        out = ["--output-file", str(folder / "out.json"), "--output-result", str(folder / "result.json")]
        arguments, sys.argv = sys.argv, ["x", "--base-dir", name, "--result-file", str(folder / "answers.jsonl"), *out]
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(path.read_text(), str(path), "exec"), {"__name__": "__main__"})
        sys.argv = arguments
        rows = json.loads((folder / "out.json").read_text())
    found = {row["question_id"]: row["parsed_ans"] for row in rows["correct"] + rows["incorrect"]}
    return ["" if found[key] == "FAILED" else found[key] for key in keys]


def open_answers(mmmu: Path) -> dict[str, Any]:
    module = load(mmmu / "mmmu/utils/eval_utils.py")
    predictions = phrases([*NUMBERS.split(), *OPEN.split(), "\n"], 8)
    answers = [random.sample(["12.5", "1,000", "red", "x", "5", "-3", "A"], k=random.choice([1, 1, 2])) for _ in predictions]
    scores = []
    for text, right in zip(predictions, answers, strict=True):
        gold = right if len(right) > 1 else right[0]
        scores.append(float(module.eval_open(gold, module.parse_open_response(text))))
    return {"predictions": predictions, "answers": answers, "mmmu": scores}


def numbers() -> dict[str, Any]:
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    predictions = phrases(NUMBERS.split(), 2)
    answers = [random.choice(["12.5", "12%", "0", "5", "yes", "1000", "-3", "4.7"]) for _ in predictions]
    pairs = zip(predictions, answers, strict=True)
    return {"predictions": predictions, "answers": answers, "chartqa": [float(relaxed_correctness(*pair)) for pair in pairs]}


def texts(lmms: Path) -> dict[str, Any]:
    """Open questions with ten answers: TextVQA's score, which OK-VQA and VizWiz share in lmms-eval, VQAv2's and GQA's."""
    import re
    import string

    import numpy
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    exact = function(lmms / "lmms_eval/api/metrics.py", "exact_match_hf_evaluate", np=numpy, re=re, string=string)
    pool = TEXTS.split("|")
    predictions = phrases(pool, 3)
    answers = [random.choices(random.sample(pool, 3), k=10) for _ in predictions]
    made: dict[str, list[float]] = {"textvqa": [], "vqav2": [], "gqa": [], "docvqa": []}
    anls = function(lmms / "lmms_eval/api/metrics.py", "anls", levenshtein_distance=distance)
    for text, right in zip(predictions, answers, strict=True):
        doc = {"question_id": 0, "answers": list(right)}
        made["textvqa"].append(float(textvqa_process_results(doc, [text])["exact_match"]))
        doc = {"question_id": 0, "answers": [{"answer": answer, "answer_id": i} for i, answer in enumerate(right)]}
        made["vqav2"].append(float(vqav2_process_results(doc, [text])["exact_match"]))
        match = exact([text], [right[0]], ignore_case=True, ignore_punctuation=True)["exact_match"]
        made["gqa"].append(float(match))
        made["docvqa"].append(float(anls(right, [text])["anls"]))
    return {"predictions": predictions, "answers": answers, **made}


def distance(a: str, b: str) -> int:
    """The edit distance, as a table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


if __name__ == "__main__":
    main(*sys.argv[1:5])
