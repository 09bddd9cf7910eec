"""Tiny benchmarks in the shapes that they are published in: files of a release, and tables as on the Hub.

Names of files, keys and columns are those of the releases and of lmms-lab's datasets; questions and pictures are ours.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

SIZE = (40, 30)


def picture(number: int) -> Image.Image:
    """A picture of one color, another for every number."""
    return Image.new("RGB", SIZE, (20 + 30 * number % 200, 200 - 20 * number % 150, 90))


def png(number: int) -> bytes:
    """The content of a file of the picture."""
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def put(path: Path, content: Any = None) -> None:
    """Write JSON, a text, or the picture with a number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, int):
        path.write_bytes(png(content))
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def _people(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": i + 1} for i, answer in enumerate(answers)]


TEN = ["red"] * 6 + ["dark red"] * 3 + [""]


def vqav2(folder: Path, prefix: str = "v2_") -> None:
    asked = [{"image_id": 42 + i, "question": f"What color is {i}?", "question_id": 42000 + i} for i in range(2)]
    answers = [
        {
            "question_type": "what color", "multiple_choice_answer": "red", "answers": _people(*TEN), "image_id": 42 + i,
            "answer_type": "other", "question_id": 42000 + i,
        }
        for i in (1, 0)
    ]  # fmt: skip
    put(folder / f"{prefix}OpenEnded_mscoco_val2014_questions.json", {"info": {}, "questions": asked})
    put(folder / f"{prefix}mscoco_val2014_annotations.json", {"info": {}, "annotations": answers})
    for i in range(2):
        put(folder / f"val2014/COCO_val2014_{42 + i:012d}.jpg", i)


def okvqa(folder: Path) -> None:
    vqav2(folder, "")


def gqa(folder: Path) -> None:
    rows = {f"20100{i}": {"question": f"Is {i} red?", "imageId": f"n{i}", "answer": "yes", "semantic": []} for i in range(2)}
    put(folder / "questions1.2/testdev_balanced_questions.json", rows)
    put(folder / "questions1.2/val_balanced_questions.json", {})
    for i in range(2):
        put(folder / f"images/n{i}.jpg", i)


def captions(folder: Path, name: str, image: str) -> None:
    images = [{"id": i, "file_name": image % i, "domain": ("in-domain", "near-domain")[i]} for i in range(2)]
    rows = [{"image_id": i, "id": 10 * i + k, "caption": f"a picture {k} of {i}"} for i in range(2) for k in range(3)]
    put(folder / name, {"images": images, "annotations": rows, "licenses": []})
    for i in range(2):
        put(folder / "pictures" / (image % i), i)


def nocaps(folder: Path) -> None:
    captions(folder, "nocaps_val_4500_captions.json", "%016d.jpg")


def coco(folder: Path) -> None:
    captions(folder, "annotations/captions_val2014.json", "COCO_val2014_%012d.jpg")


def karpathy(folder: Path, name: str, pattern: str, **more: str) -> None:
    rows = [
        {"filename": pattern % i, "split": split, "sentences": [{"raw": f"a {split} picture {k}"} for k in range(5)], **more}
        for i, split in enumerate(("test", "test", "train"))
    ]
    put(folder / f"dataset_{name}.json", {"images": rows, "dataset": name})
    for i in range(2):
        put(folder / f"{more.get('filepath', f'{name}-images')}" / (pattern % i), i)


def coco_karpathy(folder: Path) -> None:
    karpathy(folder, "coco", "COCO_val2014_%012d.jpg", filepath="val2014")


def coco_lavis(folder: Path) -> None:
    rows = [{"image": f"val2014/COCO_val2014_{i:012d}.jpg", "caption": [f"a {k}" for k in "abcde"]} for i in range(2)]
    put(folder / "annotations/coco_karpathy_test.json", rows)
    put(folder / "annotations/coco_karpathy_val.json", rows[:1])
    for i in range(2):
        put(folder / f"images/{rows[i]['image']}", i)


def flickr30k(folder: Path) -> None:
    karpathy(folder, "flickr30k", "%d.jpg")


def flickr30k_token(folder: Path) -> None:
    put(folder / "results_20130124.token", "".join(f"{i}.jpg#{k}\tA picture {k} .\n" for i in range(2) for k in range(5)))
    for i in range(2):
        put(folder / f"flickr30k-images/{i}.jpg", i)


def textvqa(folder: Path) -> None:
    rows = [{"question": f"what says {i}?", "image_id": f"0a{i}", "question_id": i, "answers": TEN} for i in range(2)]
    put(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})
    for i in range(2):
        put(folder / f"train_images/0a{i}.jpg", i)


def vizwiz(folder: Path) -> None:
    rows = [
        {
            "image": f"VizWiz_val_{i:08d}.jpg", "question": f"What is {i}?", "answers": _people(*TEN),
            "answer_type": "other", "answerable": 1,
        }
        for i in range(2)
    ]  # fmt: skip
    put(folder / "Annotations/val.json", rows)
    for i in range(2):
        put(folder / f"val/VizWiz_val_{i:08d}.jpg", i)


def pope(folder: Path) -> None:
    for category in ("random", "adversarial"):
        lines = [
            {
                "question_id": i + 1,
                "image": f"COCO_val2014_{i:012d}.jpg",
                "text": f"Is there a {i} in the image?",
                "label": x,
            }
            for i, x in enumerate(("yes", "no"))
        ]
        put(folder / f"output/coco/coco_pope_{category}.json", "".join(json.dumps(line) + "\n" for line in lines))
    for i in range(2):
        put(folder / f"val2014/COCO_val2014_{i:012d}.jpg", i)


def mme(folder: Path) -> None:
    root = folder / "MME_Benchmark_release_version"
    text = "Is {} red? Please answer yes or no.\tYes\nIs {} blue? Please answer yes or no.\tNo\n"
    for i, category in enumerate(("existence", "code_reasoning")):
        put(root / category / "0001.txt", text.format(i, i))
        put(root / category / "0001.jpg", i)
    put(root / "landmark/questions_answers_YN/a.txt", text.format("a", "a"))
    put(root / "landmark/images/a.jpg", 3)


def scienceqa(folder: Path) -> None:
    made = {"hint": "", "choices": ["red", "blue", "green"], "answer": 1, "subject": "natural science", "split": "test"}
    rows = {
        "3": {**made, "question": "Which is it?", "image": "image.png"},
        "7": {**made, "question": "Why?", "image": None},
    }
    rows["7"] |= {"hint": "It rains.", "answer": 0}
    put(folder / "problems.json", rows)
    put(folder / "pid_splits.json", {"train": [], "val": [], "test": ["3", "7"]})
    put(folder / "images/test/3/image.png", 0)


def chartqa(folder: Path) -> None:
    for kind in ("human", "augmented"):
        put(folder / f"test/test_{kind}.json", [{"imgname": f"{kind}.png", "query": "How many?", "label": "12.5"}])
        put(folder / f"test/png/{kind}.png", 0)
        put(folder / f"val/val_{kind}.json", [])


def docvqa(folder: Path) -> None:
    rows = [
        {
            "questionId": i, "question": f"What is the date {i}?", "image": f"documents/x{i}_1.png", "docId": i,
            "answers": ["May 1", "1 May"], "data_split": "val",
        }
        for i in range(2)
    ]  # fmt: skip
    put(folder / "val/val_v1.0.json", {"dataset_name": "docvqa", "data": rows})
    for i in range(2):
        put(folder / f"val/documents/x{i}_1.png", i)


def mmbench(folder: Path) -> None:
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "split"]
    image = base64.b64encode(png(0)).decode()
    rows = [
        ["241", '"Which ""one"" is red?"', "Look.", "left", "right", "", "", "B", "color", image, "x", "perception", "dev"],
        ["252", "Which is blue?", "nan", "left", "right", "top", "nan", "A", "color", "241", "x", "perception", "dev"],
    ]
    put(folder / "MMBench_DEV_EN.tsv", "".join("\t".join(row) + "\n" for row in [head, *rows]))


def seed(folder: Path) -> None:
    rows = [
        {
            "answer": "C", "choice_a": "one", "choice_b": "two", "choice_c": "three", "choice_d": "four",
            "question": "How many?", "data_id": f"{i}_9", "data_type": kind,
            "question_id": str(100 + i), "question_type_id": 5, "segment": [],
        }
        for i, kind in enumerate(("image", "image", "video"))
    ]  # fmt: skip
    put(
        folder / "SEED-Bench.json", {"questions": rows, "question_type": {"Scene Understanding": 1, "Instances Counting": 5}}
    )
    for i in range(2):
        put(folder / f"SEED-Bench-image/{i}_9", i)


def ai2d(folder: Path) -> None:
    for i in range(3):
        row = {
            "abcLabel": False,
            "answerTexts": ["sun", "moon", "rain", "snow"],
            "correctAnswer": 2,
            "questionId": f"{i}.png-0",
        }
        put(folder / f"questions/{i}.png.json", {"imageName": f"{i}.png", "questions": {f"What falls in {i}?": row}})
        put(folder / f"images/{i}.png", i)
    put(folder / "ai2d_test_ids.csv", "0\n1\n")


OFFICIAL: dict[str, Callable[[Path], None]] = {
    "vqav2": vqav2, "okvqa": okvqa, "gqa": gqa, "nocaps": nocaps, "coco": coco, "coco/karpathy": coco_karpathy,
    "coco/lavis": coco_lavis, "flickr30k": flickr30k, "flickr30k/token": flickr30k_token, "textvqa": textvqa,
    "vizwiz": vizwiz, "pope": pope, "mme": mme, "scienceqa": scienceqa, "chartqa": chartqa, "docvqa": docvqa,
    "mmbench": mmbench, "seed": seed, "ai2d": ai2d,
}  # fmt: skip


def table(path: Path, columns: dict[str, list[Any]], *images: str) -> None:
    """A parquet file as `datasets` writes it to the Hub: pictures inside, of the columns `images`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = datasets.Dataset.from_dict({key: value for key, value in columns.items() if key not in images})
    for name in images:
        kind: Any = datasets.Image()
        cells: list[Any] = columns[name]
        if any(isinstance(cell, list) for cell in cells):
            kind, made = datasets.List(kind), [[{"bytes": png(x), "path": None} for x in cell] for cell in cells]
        else:
            made = [None if x is None else {"bytes": png(x), "path": f"{x}.png"} for x in cells]
        feature = datasets.Features({name: kind})
        data = datasets.concatenate_datasets([data, datasets.Dataset.from_dict({name: made}, features=feature)], axis=1)
    data.to_parquet(path)


SHARD = "{}-00000-of-00001.parquet"
VQA_ROWS = {"question": ["What color?", "What else?"], "image": [0, 1], "question_id": [42000, 42001]}
HUB: dict[str, Callable[[Path], None]] = {
    "vqav2": lambda f: (
        table(f / "data" / SHARD.format("validation"), {
            **VQA_ROWS, "question_type": ["what", "what"], "multiple_choice_answer": ["red", "red"],
            "answers": [_people(*TEN)] * 2, "image_id": [42, 43], "answer_type": ["other", "other"],
        }, "image"),
        table(f / "data" / SHARD.format("test"), {**VQA_ROWS, "answers": [None, None]}, "image"),
    )[0],
    "okvqa": lambda f: table(f / "data" / SHARD.format("val2014"), {
        **VQA_ROWS, "answers": [TEN] * 2, "question_type": ["one", "two"], "answer_type": ["other", "other"],
    }, "image"),
    "gqa": lambda f: (
        table(f / "testdev_balanced_instructions" / SHARD.format("testdev"), {
            "id": ["1", "2"], "imageId": ["n1", "n0"], "question": ["Is it red?", "Is it blue?"], "answer": ["yes", "no"],
        }),
        table(f / "testdev_balanced_images" / SHARD.format("testdev"), {"id": ["n0", "n1"], "image": [0, 1]}, "image"),
        table(f / "train_balanced_images" / SHARD.format("train"), {"id": ["n7"], "image": [7]}, "image"),
    )[0],
    "nocaps": lambda f: table(f / "data" / SHARD.format("validation"), {
        "image": [0, 1], "image_id": [0, 1], "annotations_captions": [["a", "b"], ["c d", "d"]],
        "image_domain": ["in-domain", "out-domain"],
    }, "image"),
    "coco": lambda f: table(f / "data" / SHARD.format("val"), {
        "question_id": ["a.jpg", "b.jpg"], "image": [0, 1], "answer": [["a", "b"], ["c", "d"]],
        "question": ["Please carefully observe the image"] * 2,
    }, "image"),
    "flickr30k": lambda f: table(f / "data" / SHARD.format("test"), {
        "image": [0, 1], "caption": [["a", "b"], ["c", "d"]], "img_id": ["0", "1"], "filename": ["0.jpg", "1.jpg"],
    }, "image"),
    "textvqa": lambda f: table(f / "data" / SHARD.format("validation"), {
        **VQA_ROWS, "image_id": ["a", "b"], "answers": [TEN] * 2, "ocr_tokens": [["red"], []],
    }, "image"),
    "vizwiz": lambda f: table(f / "data" / SHARD.format("val"), {
        "question": ["What is it?", "And it?"], "image": [0, 1], "question_id": ["VizWiz_1", "VizWiz_2"],
        "answers": [TEN] * 2, "category": ["other", "other"],
    }, "image"),
    "pope": lambda f: table(f / "data" / SHARD.format("test"), {
        "id": ["0", "1", "2"], "question_id": ["1", "2", "1"], "question": ["Is there a cat?"] * 3, "image": [0, 1, 0],
        "answer": ["yes", "no", "yes"], "category": ["popular", "popular", "random"], "image_source": ["a", "b", "a"],
    }, "image"),
    "mme": lambda f: table(f / "data" / SHARD.format("test"), {
        "question_id": ["existence/1.png", "existence/1.png"], "image": [0, 0], "category": ["existence"] * 2,
        "question": ["Is it red? Please answer yes or no.", "Is it blue? Please answer yes or no."],
        "answer": ["Yes", "No"],
    }, "image"),
    "scienceqa": lambda f: (
        table(f / "ScienceQA-FULL" / SHARD.format("test"), {
            "image": [0, None], "question": ["Which?", "Why?"], "choices": [["red", "blue"], ["so", "thus", "hence"]],
            "answer": [1, 2], "hint": ["", "It rains."], "subject": ["natural science", "social science"],
        }, "image"),
        table(f / "ScienceQA-IMG" / SHARD.format("test"), {
            "image": [0], "question": ["Which?"], "choices": [["red", "blue"]], "answer": [1], "hint": [""],
            "subject": ["natural science"],
        }, "image"),
    )[0],
    "chartqa": lambda f: table(f / "data" / SHARD.format("test"), {
        "type": ["human_test", "augmented_test"], "question": ["How many?", "How much?"], "answer": ["12.5", "yes"],
        "image": [0, 1],
    }, "image"),
    "docvqa": lambda f: (
        table(f / "DocVQA" / SHARD.format("validation"), {
            "questionId": ["1", "2"], "question": ["What date?", "What name?"], "image": [0, 1],
            "answers": [["May 1"], ["A", "B"]], "docId": ["1", "2"],
        }, "image"),
        table(f / "InfographicVQA" / SHARD.format("validation"), {
            "questionId": ["9"], "question": ["?"], "image": [0], "answers": [["x"]],
        }, "image"),
    )[0],
    "mmbench": lambda f: (
        table(f / "en" / SHARD.format("dev"), {
            "index": [1, 2], "question": ["Which?", "Who?"], "hint": ["nan", "Look."], "answer": ["B", "A"],
            "A": ["left", "he"], "B": ["right", "she"], "C": ["nan", "it"], "D": ["nan", "nan"],
            "category": ["c", "c"], "L2-category": ["p", "p"], "source": ["x", "x"], "image": [0, 1],
        }, "image"),
        table(f / "cn" / SHARD.format("dev"), {"index": [1], "question": ["?"], "image": [0]}, "image"),
    )[0],
    "seed": lambda f: table(f / "data" / SHARD.format("test"), {
        "answer": ["C", "A", "D"], "choice_a": ["1"] * 3, "choice_b": ["2"] * 3, "choice_c": ["3"] * 3,
        "choice_d": ["4"] * 3, "data_id": ["a", "b", "c"], "data_type": ["image", "image", "video"],
        "question": ["How many?"] * 3,
        "question_id": ["101", "102", "103"], "question_type_id": ["5", "5", "9"], "image": [[0], [1], [0, 1]],
    }, "image"),
    "mmmu": lambda f: table(f / "data" / SHARD.format("validation"), {
        "id": ["validation_Art_Theory_1", "validation_Math_2"],
        "question": ["Which of <image 2> and <image 1>?", "<image 1> x=?"],
        "options": ["['the first', 'the second']", "[]"], "answer": ["B", "2.5"], "image_1": [0, 1], "image_2": [1, None],
        "question_type": ["multiple-choice", "open"],
    }, "image_1", "image_2"),
    "ai2d": lambda f: table(f / "data" / SHARD.format("test"), {
        "question": ["What falls?", "What shines?"], "options": [["sun", "rain"], ["sun", "rain"]], "answer": ["1", "0"],
        "image": [0, 1],
    }, "image"),
}  # fmt: skip
