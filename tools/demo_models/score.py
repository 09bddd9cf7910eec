"""Held-out exact match of a demo model: test scenes, whose digits no training scene shows, answered greedily.

    cd tools && python -m demo_models.score FOLDER [--questions 2000] [--captions 500]

The folder is loaded as any user would load it, in float32, and asked through its own processor.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from sparsight.demo.scenes import CAPTION_PROMPT, Question, scenes, select

from demo_models.build import LONGEST_ANSWER
from demo_models.feed import prompted

SEED = 2026


def samples(n_questions: int, n_captions: int, seed: int = SEED) -> list[tuple[Image.Image, Question]]:
    """Draw test scenes with two questions each, all kinds about equally often, and captions of the first scenes."""
    drawn = scenes("test", max(-(-n_questions // 2), n_captions), seed)
    asked: Counter[str] = Counter()
    result = [(scene.image, question) for scene in drawn for question in select(scene, 2, asked)][:n_questions]
    result += [(scene.image, Question("caption", CAPTION_PROMPT, scene.caption)) for scene in drawn[:n_captions]]
    return result


@torch.no_grad()
def answer(model: Any, processor: Any, images: list[Image.Image], prompts: list[str], size: int = 100) -> list[str]:
    """Generate an answer to each prompt, greedily, `size` at a time."""
    model.eval()
    texts: list[str] = []
    for i in range(0, len(prompts), size):
        inputs = prompted(processor, images[i : i + size], prompts[i : i + size])
        output = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER)
        if not model.config.get_text_config().is_encoder_decoder:
            output = output[:, inputs["input_ids"].shape[1] :]
        texts += processor.batch_decode(output, skip_special_tokens=True)
    return texts


def score(model: Any, processor: Any, asked: list[tuple[Image.Image, Question]]) -> dict[str, float]:
    """Exact match per kind, and over all questions ("questions": every kind but captions)."""
    order = sorted(range(len(asked)), key=lambda i: len(asked[i][1].answer))  # short answers need few steps
    given = answer(model, processor, [asked[i][0] for i in order], [asked[i][1].prompt for i in order])
    right: dict[str, list[bool]] = {}
    for i, text in zip(order, given, strict=True):
        question = asked[i][1]
        for kind in {question.kind, "caption" if question.kind == "caption" else "questions"}:
            right.setdefault(kind, []).append(text == question.answer)
    return {kind: round(sum(hits) / len(hits), 4) for kind, hits in sorted(right.items())}


def load(folder: Path) -> tuple[Any, Any]:
    """Load a demo folder's model in float32, and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(folder)


def main() -> None:
    """Print the scores of a folder as JSON."""
    parser = argparse.ArgumentParser(prog="python -m demo_models.score", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--captions", type=int, default=500)
    options = parser.parse_args()
    print(json.dumps(score(*load(options.folder), samples(options.questions, options.captions)), indent=2))


if __name__ == "__main__":
    main()
