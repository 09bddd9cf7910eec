"""The demo models load as any model does, are small, read digits they never saw, and can be trained again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from sparsight.demo import MODELS
from sparsight.demo.scenes import CAPTION_PROMPT, ask, scenes
from sparsight.demo.scenes import KINDS as QUESTIONS

from demo_models.build import LONGEST_ANSWER, build
from demo_models.feed import batch, check, conversation, llava_pack, pixels, pool
from demo_models.score import answer, load, samples, score
from demo_models.train import Course, train

KINDS = sorted(MODELS)


@pytest.mark.parametrize("kind", KINDS)
def test_folder_loads_without_a_word(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(MODELS[kind], dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(MODELS[kind])
    assert model.config.model_type == kind
    assert "warn" not in "".join(capfd.readouterr()).lower()
    assert processor.tokenizer.decode(processor.tokenizer("a red 3 at the top left").input_ids, True).split() != []
    assert not model.generation_config.do_sample


@pytest.mark.parametrize("kind", KINDS)
def test_folder_is_small_and_holds_no_more_than_it_must(kind: str) -> None:
    files = {path.relative_to(MODELS[kind]).as_posix(): path.stat().st_size for path in MODELS[kind].rglob("*.*")}
    assert sum(files.values()) < 8_000_000
    assert not [name for name in files if name.endswith((".pt", ".bin", ".pth", ".pkl"))]
    assert json.loads((MODELS[kind] / "training.json").read_text())["kind"] == kind


@pytest.mark.parametrize("kind", KINDS)
def test_linear_maps_divide_into_groups_of_eight(kind: str) -> None:
    model, _ = build(kind)
    maps = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert maps
    assert all(module.in_features % 8 == 0 for module in maps)


@pytest.mark.parametrize("kind", KINDS)
def test_digits_never_seen_are_read(kind: str) -> None:
    results = score(*load(MODELS[kind]), samples(120, 32, seed=11))
    assert results["questions"] >= 0.9
    assert results["caption"] >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_at_least_95_per_cent_of_the_questions(kind: str) -> None:
    """Each of 2,000 held-out questions about digits that were never trained on; the docs' table is made the same way."""
    assert score(*load(MODELS[kind]), samples(2000, 100, seed=2026))["questions"] >= 0.95


def test_packed_questions_give_the_logits_they_give_one_by_one() -> None:
    model, processor = load(MODELS["llava"])
    drawing, rng = pool(3, 0, crowd=False), np.random.default_rng(0)
    found = [[ask(drawing.digits(i), name, rng) for name in QUESTIONS] for i in range(3)]
    asked = [[(question.prompt, question.answer) for question in row if question] for row in found]
    packed = llava_pack(processor, pixels(drawing.pixels), asked)
    labels = packed.pop("labels")[:, 1:]
    with torch.no_grad():
        together = model(**packed).logits[:, :-1][labels != -100]
        alone = []
        for i, row in enumerate(asked):
            for prompt, answer in row:
                single = batch(processor, pixels(drawing.pixels[[i]]), [prompt], [answer])
                told = single.pop("labels")[:, 1:]
                alone.append(model(**single).logits[:, :-1][told != -100])
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_the_batch(kind: str) -> None:
    model, processor = load(MODELS[kind])
    drawn = scenes("test", 6, seed=4)
    prompts = [CAPTION_PROMPT, "how many digits are there?"] * 3
    images = [scene.image for scene in drawn]
    assert answer(model, processor, images, prompts) == answer(model, processor, images, prompts, size=1)
    longest = max(len(scene.caption.split()) for scene in scenes("test", 300, seed=5))
    assert longest < LONGEST_ANSWER


@pytest.mark.parametrize("kind", KINDS)
def test_training_batches_are_what_the_shipped_processor_makes(kind: str) -> None:
    check(AutoProcessor.from_pretrained(MODELS[kind]), pool(60, seed=8, crowd=False))


def test_chat_template_marks_what_the_assistant_says() -> None:
    processor = AutoProcessor.from_pretrained(MODELS["llava"])
    text = processor.apply_chat_template(conversation("how many digits are there?", "3"))
    assert text == "USER: <image>\nhow many digits are there? ASSISTANT: 3</s>"
    words = processor.tokenizer
    talk = [{"role": "user", "content": "what color is the 3?"}, {"role": "assistant", "content": "red"}]
    encoded = words.apply_chat_template(
        talk,
        chat_template=processor.chat_template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    said = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert words.convert_ids_to_tokens(said) == ["red", "</s>"]


def test_unknown_model_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="llava"):
        build("blip3")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_trains_the_same_weights(kind: str, tmp_path: Path) -> None:
    steps = dict.fromkeys(("see", "connect", "answer", "polish", "practise", "refine"), 2)
    rates = (1e-3,) * len(steps)
    course = Course(
        **steps, rates=rates, see_size=4, answer_size=(4, 2), packed=2 * (kind == "llava"), pool=64, scored=(8, 2)
    )
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        train(kind, tmp_path / name, seed, course)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"]
    assert weights["a"] != weights["c"]
