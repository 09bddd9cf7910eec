"""The samples of an evaluation as a task of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), in a folder.

The folder has `NAME.yaml`, `utils.py`, `samples.jsonl` with a sample a line, and `images/`. The prompts are those that the
model was asked, in its own words, and lmms-eval adds nothing to them. A picture is copied as it is where lmms-eval opens it
as Sparsight does, and written as PNG where it does not. The folder names no other place, so it may be moved.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sparsight.checkpoint.folder import atomic_folder
from sparsight.checks import check_paths
from sparsight.data.pixels import converts, opened
from sparsight.data.sample import PLACEHOLDER, Sample
from sparsight.errors import Notice, SparsightError, quote
from sparsight.files import check_output, write_text
from sparsight.tasks import TASKS
from sparsight.tasks.wording import Decoding

SAMPLES, PICTURES, SPLIT = "samples.jsonl", "images", "test"
COPIED = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}  # formats that are copied as they are, with their suffix
ORIENTATION = 0x0112  # in EXIF data
YAML = """\
# lmms-eval --include_path FOLDER --tasks {name} --log_samples --output_path LOGS ...; FOLDER is this one
task: {name}
dataset_path: text
dataset_kwargs:
  data_files:
    {split}: {samples}
test_split: {split}
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: !function utils.doc_to_target
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: {tokens}
  num_beams: {beams}
  do_sample: false
  temperature: 0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""
UTILS = '''\
"""What lmms-eval asks, and how it scores: an answer is right if it is one of the answers, up to case and white space."""

import json
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent


def read(doc):
    return json.loads(doc["text"])


def doc_to_visual(doc):
    return [Image.open(HERE / name) for name in read(doc)["images"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return read(doc)["prompt"]


def doc_to_target(doc):
    return doc["text"]  # whole, for `sparsight report`


def process_results(doc, results):
    return {"exact_match": float(plain(results[0]) in map(plain, read(doc)["answers"]))}


def plain(text):
    return " ".join(text.casefold().split())
'''


def check_export(folder: str | Path, data: Any = None) -> Path:
    """The folder for a task, which must be new or empty. **Raises** `SparsightError`."""
    check_paths(export_task=folder)
    try:
        target = check_output(folder, inputs=(data if isinstance(data, str | Path) else None,))
    except SparsightError as error:
        raise SparsightError(f"`export_task`: {str(error).replace(', or add `overwrite`', '')}") from error
    if not re.search(r"\w", target.name):
        raise SparsightError(f"`export_task`: {folder} has no name for a task; give a folder with a name, as scenes-task")
    return target


def write_task(
    folder: str | Path, samples: Sequence[Sample], way: Decoding, *, processor: Any = None, task: str = ""
) -> Path:  # fmt: skip
    """Write samples as a task of lmms-eval, `sparsight_` and the name of `folder`, `_` for what is no letter and no digit.

    The two names differ, since lmms-eval takes a task's name for a folder where there is one of that name.

    The samples have the prompts that the model is asked; `way` says how it answers. Transparent pictures stay so where the
    `processor` takes them as they are. `task` is the benchmark that they are of.

    A length penalty is said to be left out. **Raises** `SparsightError` for a sample that lmms-eval cannot ask alike, and
    for a folder that is not empty.
    """
    target = check_export(folder)
    alpha = converts(processor)
    check_samples(samples)
    name = "sparsight_" + re.sub(r"\W+", "_", target.name)
    total = {"total": len(samples)} if task and TASKS[task].complete else {}  # by which a log of a part is known
    with atomic_folder(target) as new:
        (new / PICTURES).mkdir()
        with (new / SAMPLES).open("w", encoding="ascii") as file:
            for sample in samples:
                file.write(json.dumps({**_line(sample, new, alpha, task), **total}) + "\n")
        text = YAML.format(name=name, split=SPLIT, samples=SAMPLES, tokens=way.max_new_tokens, beams=way.beams)
        write_text(new / f"{name}.yaml", text)
        write_text(new / "utils.py", UTILS)
    if way.length_penalty != 1:
        warnings.warn(
            f"{folder}: has no length penalty, and these answers have {way.length_penalty:g}; lmms-eval may differ: "
            "set `length_penalty=1` or `beams=1` where the answers shall be equal",
            Notice,
            2,
        )
    return target


def check_samples(samples: Sequence[Sample]) -> None:
    """Refuse samples that lmms-eval would ask otherwise: it asks one question, behind its pictures.

    **Raises** `SparsightError` for the first of them.
    """
    for sample in samples:
        parts = {
            "a dialogue": len(sample.turns) > 1,
            "a system text": bool(sample.system),
            "pictures inside its text": PLACEHOLDER in sample.prompt,
        }
        for part in (part for part, there in parts.items() if there):
            raise SparsightError(
                f"`export_task`: sample {quote(sample.id)} has {part}, and lmms-eval asks one question behind its pictures; "
                "leave such samples out, or leave out `export_task`"
            )


def _line(sample: Sample, folder: Path, alpha: bool, task: str) -> dict[str, Any]:
    facts = {
        "id": sample.id, "kind": sample.kind, "prompt": sample.prompt, "answers": list(sample.answers),
        "images": _pictures(sample, folder, alpha), "options": list(sample.options), "task": task,
    }  # fmt: skip
    return {key: value for key, value in facts.items() if value or key not in ("options", "task")}


def _pictures(sample: Sample, folder: Path, alpha: bool) -> list[str]:
    """Write the pictures of a sample into a folder, where they are not there yet; their names in it."""
    names = []
    for i, entry in enumerate(sample.images):
        content, suffix = _plain_content(entry)
        if content is None:
            made = io.BytesIO()
            sample.load_images(alpha=alpha)[i].save(made, "PNG")
            content, suffix = made.getvalue(), ".png"
        name = f"{PICTURES}/{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
        if not (folder / name).exists():
            (folder / name).write_bytes(content)
        names.append(name)
    return names


def _plain_content(entry: Any) -> tuple[bytes | None, str]:
    """The content of an encoded picture that every reader opens alike, RGB and upright, and its suffix; else None."""
    if isinstance(entry, Image.Image):
        return None, ""
    content = entry if isinstance(entry, bytes) else entry.read_bytes()
    with opened(io.BytesIO(content)) as image:
        plain = image.mode == "RGB" and not image.has_transparency_data and image.getexif().get(ORIENTATION, 1) == 1
        suffix = COPIED.get(image.format or "", "")
    return (content if plain and suffix else None), suffix
