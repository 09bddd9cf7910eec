"""A system text reaches every model: as a message of its template, or before the first prompt."""

from dataclasses import replace

import pytest
import torch

from sparsight.data import Encoder, Sample, Turn
from sparsight.data.chat import messages, system_message
from sparsight.restoring.teacher_cache import cache_key

import zoo

CHAT = ("llava", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "gemma3", "smolvlm")
RULES = "answer in one red word"
IMAGE = zoo.images(1)[0]
ONE = Sample("one", (IMAGE,), (Turn("what color?", ("red",)), Turn("sure?", ("yes",))))
RULED = replace(ONE, system=RULES)


@pytest.fixture(params=zoo.NAMES)
def family(request):
    model, processor = zoo.build(request.param)
    return request.param, model, processor, Encoder(processor, model)


def texts(processor, inputs):
    return [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]


def test_the_text_is_there_in_training_and_in_generation(family):
    _, model, processor, encoder = family
    for sample, times in ((ONE, 0), (RULED, 1)):
        batch = encoder.encode([sample])
        asked = encoder.prompts([sample])
        for text in (*texts(processor, batch.inputs), *texts(processor, asked)):
            assert text.replace("▁", " ").count(RULES) == times
        labels = batch.inputs["labels"]
        assert all(RULES not in processor.tokenizer.decode(row[row != -100]) for row in labels)
        with torch.no_grad():
            assert torch.isfinite(model(**batch.inputs).loss)
    plain, ruled = (encoder.encode([sample]).inputs["labels"] for sample in (ONE, RULED))
    assert [row[row != -100].tolist() for row in plain] == [row[row != -100].tolist() for row in ruled]


@pytest.mark.parametrize("name", CHAT)
def test_a_template_with_the_role_writes_it(name):
    _, processor = zoo.build(name)
    assert system_message(processor, RULES) == {"role": "system", "content": [{"type": "text", "text": RULES}]}
    assert [message["role"] for message in messages(processor, RULED)][:2] == ["system", "user"]


FIRST = "{% set rules = messages[0].content if messages[0].role == 'system' else '' %}"
ROLES = {
    "refuses it": ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}", None),
    "leaves it out": ("{% set messages = messages[1:] if messages[0].role == 'system' else messages %}", None),
    "breaks": ("{% if messages[0].role == 'system' %}{{ messages[0].content.a.b }}{% endif %}", None),
    "takes a string": (
        FIRST + "{% set messages = messages[1:] if rules else messages %}{{ rules + '' if rules else '' }}",
        RULES,
    ),
}


@pytest.mark.parametrize("case", ROLES)
def test_a_template_without_the_role(case):
    model, processor = zoo.build("llava")
    before, content = ROLES[case]
    processor.chat_template = before + processor.chat_template
    found = system_message(processor, RULES)
    assert found == (None if content is None else {"role": "system", "content": content})
    batch = Encoder(processor, model).encode([RULED])
    (text,) = texts(processor, batch.inputs)
    assert text.count(RULES) == 1
    if content is None:
        assert "ASSISTANT" not in text[: text.index(RULES)]
        assert text.index("USER") < text.index(RULES) < text.index("what color?")


@pytest.mark.parametrize("role", ["USER", "ASSISTANT"])
def test_a_template_that_takes_it_for_another_role(role):
    _, processor = zoo.build("llava")
    good = processor.chat_template
    processor.chat_template = good.replace("message.role | upper", f"'{role}' if message.role == 'system' else 'USER'")
    processor.chat_template = processor.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    if role == "ASSISTANT":  # written as an answer is, too
        processor.chat_template = processor.chat_template.replace(
            "message.role == 'assistant'", "message.role in ('assistant', 'system')"
        )
    assert system_message(processor, RULES) is None
    assert [message["role"] for message in messages(processor, RULED)] == ["user", "assistant", "user", "assistant"]
    assert messages(processor, RULED)[0]["content"][1]["text"] == f"{RULES}\n\nwhat color?"


def test_only_the_first_prompt_has_it_and_no_sample_is_changed():
    prefixed = RULED.with_system_in_prompt()
    assert [turn.prompt for turn in prefixed.turns] == [f"{RULES}\n\nwhat color?", "sure?"]
    assert RULED.turns == ONE.turns
    assert ONE.with_system_in_prompt() is ONE


def test_a_cached_teacher_depends_on_it():
    model, processor = zoo.build("llava")
    encoder = Encoder(processor, model)
    keys = [cache_key(model, encoder, [sample], "f") for sample in (ONE, RULED, replace(ONE, system="other"))]
    assert len(set(keys)) == 3
