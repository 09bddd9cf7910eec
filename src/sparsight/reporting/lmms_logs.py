"""Sample logs of lmms-eval: the answers of a model to a task, `*_samples_TASK.jsonl`, with `*_results.json` beside them.

A log of a task that `export_task` of `eval` wrote holds our own samples. Its answers are scored as `eval` scores them, and
they are paired with the runs of `eval`. In logs of other tasks the scores are lmms-eval's, and the logs of one task are
paired with each other.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsight.data.sample import Sample, Turn
from sparsight.errors import SparsightError, first_line, quote
from sparsight.evaluation.evaluate import Result, metrics_of, score, score_rows
from sparsight.files import read_json
from sparsight.tasks import TASKS

ADVICE = "give a *_samples_*.jsonl that lmms-eval wrote with --log_samples"
OTHERS = {  # keys of a line that are no scores
    "doc_id", "doc", "target", "arguments", "input", "resps", "filtered_resps", "doc_hash", "prompt_hash", "target_hash",
    "token_counts",
}  # fmt: skip


@dataclass(frozen=True)
class Log:
    """A sample log: the task's name, the model's name and class as lmms-eval had them, the answers scored, and the date."""

    task: str
    model: str
    source: str
    result: Result
    date: str = ""


def read_log(path: str | Path) -> Log:
    """Read a sample log.

    **Raises** `SparsightError`, one line, for a file that is none, and for one without a score of single samples.
    """
    path = Path(path)
    rows = _rows(path)
    samples = [_own_sample(row) for row in rows]
    texts = [_text(row["filtered_resps"]).strip() for row in rows]
    own = [sample for sample in samples if sample is not None]
    date, _, name = path.stem.partition("_samples_")
    results = path.with_name(f"{date}_results.json")
    facts = read_json(results, "delete it, or run lmms-eval again") if name and results.is_file() else {}
    if len(own) == len(rows):
        names = sorted({json.loads(row["target"]).get("task") or "" for row in rows})
        if len(names) > 1 or names[0] not in ("", *TASKS):
            raise SparsightError(
                f"{path}: is of the task {quote(' and '.join(names))}, which is none of {', '.join(TASKS)}; read it with "
                "the version that exported the task"
            )
        task = TASKS.get(names[0])
        if task is not None and task.complete:
            _check_all(path, rows, names[0], facts.get("n-samples"))
        result = score(own, texts, metrics_of(own, None, task), task=task)
    else:
        result = _foreign(path, rows, texts)
    day = f"{date[:4]}-{date[4:6]}-{date[6:8]}" if date[:8].isdigit() else ""
    return Log(
        name or path.stem, str(facts.get("model_name") or path.resolve().parent.name), str(facts.get("model_source") or ""),
        result, day,
    )  # fmt: skip


def _rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, in the order of the task's documents."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SparsightError(f"{path}: cannot be read ({first_line(error)}); {ADVICE}") from error
    rows: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SparsightError(f"{path}:{number}: is not JSON ({first_line(error)}); {ADVICE}") from error
        if not isinstance(row, dict) or not {"doc_id", "target", "filtered_resps"} <= set(row):
            raise SparsightError(f"{path}:{number}: has no doc_id, target and filtered_resps; {ADVICE}")
        if not isinstance(row["doc_id"], int) or row["doc_id"] in rows:
            fault = f"the doc_id {quote(row['doc_id'])}, which {'stands twice' if row['doc_id'] in rows else 'is no number'}"
            raise SparsightError(f"{path}:{number}: has {fault}; give the log of one run of one task, with one filter")
        rows[row["doc_id"]] = row
    if not rows:
        raise SparsightError(f"{path}: is empty; {ADVICE}")
    return [rows[number] for number in sorted(rows)]


def _check_all(path: Path, rows: Sequence[Mapping[str, Any]], task: str, counts: Any) -> None:
    """Refuse the log of a part of a task whose scores need all samples, as lmms-eval's limit leaves it.

    How many there are stands in the targets, and in the `counts` of lmms-eval's results.
    """
    own = [json.loads(row["target"]).get("total") for row in rows[:1]]
    theirs = [each.get("original") for each in counts.values() if isinstance(each, dict)] if isinstance(counts, dict) else []
    whole = max((count for count in (*own, *(theirs if len(theirs) == 1 else ())) if isinstance(count, int)), default=0)
    if len(rows) < whole:
        raise SparsightError(
            f"{path}: has {len(rows):,} of the {whole:,} samples of {task}, which scores questions about an image together; "
            "run lmms-eval on all of them, without --limit and --offset"
        )


def _own_sample(row: Mapping[str, Any]) -> Sample | None:
    """The sample of a task that `eval` has exported, which stands in the target; None for another task's."""
    try:
        facts = json.loads(row["target"])
        texts = [facts["id"], facts["kind"], facts["prompt"], *facts["answers"], *facts.get("options", ())]
        if not facts["answers"] or not all(isinstance(text, str) for text in texts):
            return None
        turn = Turn(facts["prompt"], tuple(facts["answers"]))
        return Sample(facts["id"], (), (turn,), facts["kind"], options=tuple(facts.get("options", ())))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _foreign(path: Path, rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> Result:
    """The answers to another task, with lmms-eval's own scores."""
    scores = [{key: value for key in row if (value := _score(key, row[key])) is not None} for row in rows]
    if not all(scores):
        where = next(row["doc_id"] for row, own in zip(rows, scores, strict=True) if not own)
        raise SparsightError(
            f"{path}: has no score of doc_id {where}; tasks that are scored as a whole only, as captions, cannot be "
            "compared by sample: export the samples by `eval`'s `export_task`, which are scored here"
        )
    predictions = [
        {
            "id": str(row["doc_id"]), "kind": "", "prompt": str(row.get("input", "")), "prediction": text,
            "answers": _answers(row["target"]), "correct": next(iter(own.values())) >= 0.5, "scores": own,
        }
        for row, text, own in zip(rows, texts, scores, strict=True)
    ]  # fmt: skip
    return Result(tuple(score_rows([""] * len(rows), scores)), tuple(predictions))


def _score(key: str, value: Any) -> float | None:
    """A metric's value of one sample, which may stand under "score"; None for what is no number."""
    value = value.get("score") if isinstance(value, dict) else value
    if key in OTHERS or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _text(answer: Any) -> str:
    """What the model wrote: older versions put it into a list."""
    if isinstance(answer, list) and len(answer) == 1:
        return _text(answer[0])
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def _answers(target: Any) -> list[str]:
    """The right answers; lmms-eval writes a list of them as Python text."""
    try:
        several = ast.literal_eval(target)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        several = None
    return [str(each) for each in several] if isinstance(several, list) and several else [str(target)]
