"""Every family: what is encoded runs, its labels are the answers, and training sees what generation would."""

import subprocess
import sys

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from sparsight.data import Encoder, Sample, Turn, batches
from sparsight.errors import SparsightError

import zoo

CHAT = ("llava", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "gemma3", "smolvlm")
PLAIN = tuple(name for name in zoo.NAMES if name not in CHAT)
SEQ2SEQ = ("instructblip-t5", "blip2-t5")
BLIP = ("instructblip-t5", "instructblip-llama", "blip2-opt", "blip2-t5")

A, B, C, D = zoo.images(4)


def ask(name, image, *turns, kind=""):
    images = image if isinstance(image, tuple) else (image,)
    return Sample(name, images, tuple(Turn(prompt, (answer,)) for prompt, answer in turns), kind)


ONE = ask("one", A, ("what color is the square?", "red"))
TWO = ask("two", B, ("which shape is in this picture of the model", "a green circle, yes!"))
TALK = ask("talk", C, ("describe this", "two stars"), ("how many?", "Ünknown 42"))
SAMPLES = [ONE, TWO, TALK]


@pytest.fixture(params=zoo.NAMES)
def family(request, built):
    model, processor = built(request.param)
    return request.param, model, processor, Encoder(processor, model)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs)


def spoken(processor, labels):
    """The texts of the labelled runs of each row."""
    rows = []
    for row in labels:
        runs, last = [], -2
        for i in (row != -100).nonzero().flatten().tolist():
            if i != last + 1:
                runs.append([])
            runs[-1].append(int(row[i]))
            last = i
        rows.append([processor.tokenizer.decode(run) for run in runs])
    return rows


def end_of(name, processor):
    return {"gemma3": "<end_of_turn>"}.get(name) or processor.tokenizer.eos_token


def test_labels_are_the_answers_and_their_end(family):
    name, model, processor, encoder = family
    batch = encoder.encode(SAMPLES)
    out = logits(model, batch.inputs)
    assert torch.isfinite(out.loss)
    assert out.loss > 0
    rows = [[turn.answer + end_of(name, processor) for turn in sample.turns] for sample in batch.samples]
    runs = spoken(processor, batch.inputs["labels"])
    assert [[text.strip() for text in row] for row in runs] == rows
    assert [len(sample.turns) for sample in batch.samples] == ([1, 1, 2] if name in CHAT else [1, 1, 1, 1])


def test_masks_mark_the_padding(family):
    name, _, processor, encoder = family
    batch = encoder.encode(SAMPLES)
    text = batch.padding["text"]
    assert text.dtype == torch.bool
    assert text.shape == batch.inputs["input_ids"].shape
    assert not text.all()
    assert (batch.inputs["input_ids"][~text] == processor.tokenizer.pad_token_id).all()
    assert (text.int().diff(dim=1) <= 0).all(), "padding stands on the right"
    assert ("decoder" in batch.padding) == (name in SEQ2SEQ)
    if name in SEQ2SEQ:
        decoder = batch.padding["decoder"]
        assert torch.equal(decoder, batch.inputs["labels"] != -100)
        assert decoder.shape[1] != text.shape[1]
    else:
        assert (batch.inputs["labels"][~text] == -100).all()


def test_padding_changes_nothing(family):
    name, model, _, encoder = family
    together = encoder.encode(SAMPLES)
    out = logits(model, together.inputs).logits
    row = 0
    for sample in SAMPLES:
        alone = encoder.encode([sample])
        single = logits(model, alone.inputs).logits
        for i in range(len(single)):
            mask, chosen = together.inputs["labels"][row] != -100, alone.inputs["labels"][i] != -100
            if name not in SEQ2SEQ:  # what foretells the answers
                mask, chosen = mask.roll(-1), chosen.roll(-1)
            torch.testing.assert_close(out[row][mask], single[i][chosen], atol=2e-4, rtol=1e-3)
            row += 1
    assert row == len(together.samples)


def test_training_continues_the_prompt_of_generation(family):
    name, _, _, encoder = family
    if name in SEQ2SEQ:
        pytest.skip("the answer is in the decoder")
    for sample in SAMPLES:
        asked = encoder.prompts([sample])["input_ids"][0].tolist()
        batch = encoder.encode([sample])
        row, labels = batch.inputs["input_ids"][-1].tolist(), batch.inputs["labels"][-1].tolist()
        row = row[: int(batch.padding["text"][-1].sum())]
        assert row[: len(asked)] == asked
        answer = labels[len(asked) : len(row)]
        end = max(i for i, label in enumerate(answer) if label != -100)
        assert answer[: end + 1] == row[len(asked) : len(asked) + end + 1]


def test_generation_in_a_batch_is_generation_alone(family):
    _, model, processor, encoder = family
    side = processor.tokenizer.padding_side

    def write(samples):
        inputs = encoder.prompts(samples)
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id)
        skip = inputs["input_ids"].shape[1] if ids.shape[1] > inputs["input_ids"].shape[1] else 0
        return inputs, processor.tokenizer.batch_decode(ids[:, skip:], skip_special_tokens=True)

    inputs, texts = write(SAMPLES)
    assert len(texts) == len(SAMPLES)
    assert texts == [write([sample])[1][0] for sample in SAMPLES]
    right = model.config.get_text_config().is_encoder_decoder
    ends = inputs["attention_mask"][:, 0 if right else -1]
    assert ends.all()
    assert not inputs["attention_mask"].all()
    encoder.encode(SAMPLES)
    assert processor.tokenizer.padding_side == side


def test_bfloat16_models_take_the_batch(family):
    name, _, processor, _ = family
    model, _ = zoo.build(name, dtype=torch.bfloat16)
    encoder = Encoder(processor, model)
    inputs = encoder.encode(SAMPLES).inputs
    assert inputs["pixel_values"].dtype == encoder.prompts(SAMPLES)["pixel_values"].dtype == torch.bfloat16
    assert torch.isfinite(logits(model, inputs).loss)


@pytest.mark.parametrize("name", CHAT)
def test_text_mixes_with_images(name, built):
    model, processor = built(name)
    encoder = Encoder(processor, model)
    text = ask("text", (), ("is the star yellow?", "no"))
    several = ask("several", (C, D), ("is one red?", "yes"))
    for samples in ([text, ONE, several], [ONE, text], [text]):
        batch = encoder.encode(samples)
        assert torch.isfinite(logits(model, batch.inputs).loss)
        runs = spoken(processor, batch.inputs["labels"])
        assert [row[0].strip() for row in runs] == [s.turns[0].answer + end_of(name, processor) for s in samples]
    assert "pixel_values" not in encoder.prompts([text])


@pytest.mark.parametrize("name", CHAT)
def test_placeholders_say_where_images_are(name, built):
    model, processor = built(name)
    encoder = Encoder(processor, model)
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    placed = ask("placed", (A, B), ("is <image> red", "no"), ("and <image>?", "yes"))
    batch = encoder.encode([placed])
    assert torch.isfinite(logits(model, batch.inputs).loss)
    assert [len(row) for row in spoken(processor, batch.inputs["labels"])] == [2]
    assert [text.strip() for text in spoken(processor, batch.inputs["labels"])[0]] == [
        "no" + end_of(name, processor), "yes" + end_of(name, processor)
    ]  # fmt: skip
    images = (batch.inputs["input_ids"][0] == token).nonzero().flatten()
    first = (batch.inputs["labels"][0] != -100).nonzero()[0]
    assert images[0] < first < images[-1]
    with pytest.raises(SparsightError, match="sample 'x': 1 <image> in the prompts but 2 images"):
        encoder.encode([ask("x", (A, B), ("is <image> red", "no"))])


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_most_frequent_answer_is_encoded(name, built):
    model, processor = built(name)
    sample = Sample("x", (A,), (Turn("what?", ("blue", "red", "red", "blue", "green")),))
    labels = Encoder(processor, model).encode([sample]).inputs["labels"]
    assert spoken(processor, labels)[0][0].strip() == "blue" + end_of(name, processor)


@pytest.mark.parametrize("name", BLIP)
def test_blip_takes_exactly_one_image(name, built):
    model, processor = built(name)
    encoder = Encoder(processor, model)
    for images, count in (((), 0), ((A, B), 2)):
        sample = ask("x", images, ("what?", "red"))
        for call in (encoder.encode, encoder.prompts):
            with pytest.raises(SparsightError, match=f"sample 'x': this model takes exactly one image, got {count}"):
                call([ONE, sample])


def test_paligemma_needs_an_image_and_takes_several(built):
    model, processor = built("paligemma")
    encoder = Encoder(processor, model)
    with pytest.raises(SparsightError, match="sample 'x': this model needs an image"):
        encoder.encode([ask("x", (), ("what?", "red"))])
    batch = encoder.encode([ask("x", (A, B), ("what?", "red")), ONE])
    assert torch.isfinite(logits(model, batch.inputs).loss)
    prefix = batch.inputs["token_type_ids"][0] == 0
    assert (batch.inputs["labels"][0][prefix] == -100).all()


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_decoder_and_encoder_never_have_one_length(name, built):
    model, processor = built(name)
    encoder = Encoder(processor, model)
    length = encoder.encode([ONE]).padding["text"].shape[1]
    words = " ".join(["red"] * (length - 1))
    batch = encoder.encode([ask("x", A, (ONE.prompt, words))])
    assert batch.padding["text"].shape[1] == length
    assert batch.padding["decoder"].shape[1] == length + 1
    assert batch.padding["decoder"].sum() == length
    assert torch.isfinite(logits(model, batch.inputs).loss)


def test_too_long_samples_are_named_or_skipped(family):
    _, model, processor, encoder = family
    long = ask("long", A, ("what is this?", "red " * 300))
    limit = int(encoder.encode(SAMPLES).padding["text"].sum(1).max())
    with pytest.raises(SparsightError, match=rf"sample 'long': \d+ tokens, more than `max_length={limit}`"):
        Encoder(processor, model, max_length=limit).encode([ONE, long])
    skipping = Encoder(processor, model, max_length=limit, skip_bad=True)
    assert [sample.id for sample in skipping.encode([ONE, long, TWO]).samples] == ["one", "two"]
    assert [identity for identity, _ in skipping.skipped] == ["long"]
    with pytest.raises(SparsightError, match="no sample of this batch can be encoded: 'long'"):
        skipping.encode([long])


def test_a_sample_without_answers_is_refused(built):
    model, processor = built("llava")
    for turns in ((), (Turn("what?", ()),)):
        with pytest.raises(SparsightError, match="sample 'x': it has no turn, or a turn without an answer"):
            Encoder(processor, model).encode([Sample("x", (), turns)])


def test_marks_in_the_template_change_nothing(built):
    model, processor = built("llava")
    _, plain = zoo.build("llava")
    for mark in ("{% generation %}", "{% endgeneration %}"):
        assert mark in plain.chat_template
        plain.chat_template = plain.chat_template.replace(mark, "")
    marked, unmarked = (Encoder(p, model).encode(SAMPLES).inputs for p in (processor, plain))
    assert all(torch.equal(marked[key], unmarked[key]) for key in marked)


def test_an_answer_that_the_template_leaves_open_gets_an_end():
    model, processor = zoo.build("llava")
    processor.chat_template = processor.chat_template.replace("{{ eos_token }}", " ")
    batch = Encoder(processor, model).encode([TALK, ONE])
    assert spoken(processor, batch.inputs["labels"]) == [["two stars", "Ünknown 42</s>"], ["red</s>"]]


def test_templates_that_hide_the_answer_are_refused():
    model, processor = zoo.build("qwen3-vl")
    good = processor.chat_template
    processor.chat_template = good.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    with pytest.raises(SparsightError, match="sample 'one': the chat template writes an answer not right behind"):
        Encoder(processor, model).encode([ONE])
    processor.chat_template = good.replace("{{ part.text }}", "{{ part.text | upper }}")
    with pytest.raises(SparsightError, match="sample 'one': the chat template writes an answer not right behind"):
        Encoder(processor, model).encode([ONE])
    model, processor = zoo.build("llava")
    plain = processor.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    processor.chat_template = plain.replace("ASSISTANT:{%", "ASSISTANT: {%")
    with pytest.raises(SparsightError, match="sample 'one': the tokenizer joins an answer"):
        Encoder(processor, model).encode([ONE])


BROKEN = {
    "syntax": (lambda good: good + "{% if", "unexpected 'end of template'"),
    "unknown name": (lambda good: good + "{{ a.b.c }}", "'a' is undefined"),
    "text added to parts": (lambda good: good + "{{ messages[0].content + 'x' }}", "can only concatenate"),
    "no images": (lambda good: good.replace("<image>", ""), "Found total 0 <image> tokens and 1 images"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_template_is_one_line(case):
    model, processor = zoo.build("llava")
    harm, reason = BROKEN[case]
    processor.chat_template = harm(processor.chat_template)
    encoder = Encoder(processor, model)
    for call in (encoder.encode, encoder.prompts, encoder.usable):
        for samples in ([ONE], [ONE, TWO]):
            with pytest.raises(
                SparsightError, match=r"sample 'one' cannot be written by .*" + reason + ".*template"
            ) as caught:
                call(samples)
            assert "\n" not in str(caught.value)
    with pytest.raises(SparsightError, match=r"none of the 2 samples can be taken: .*" + reason + r".*template \(2\)"):
        Encoder(processor, model, skip_bad=True).usable([ONE, TWO])


def test_a_tokenizer_that_closes_the_prompt_is_refused():
    model, processor = zoo.build("instructblip-llama")
    closed = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    processor.tokenizer.backend_tokenizer.post_processor = closed
    with pytest.raises(SparsightError, match="sample 'one': the tokenizer does not begin prompt and answer as it does"):
        Encoder(processor, model).encode([ONE])


def test_a_processor_that_cannot_ask_is_refused():
    model, processor = zoo.build("llava")
    processor.chat_template = None
    with pytest.raises(SparsightError, match="LlavaProcessor has no chat template"):
        Encoder(processor, model)
    model, processor = zoo.build("blip2-opt")
    processor.num_query_tokens = None
    with pytest.raises(SparsightError, match="Blip2Processor has no num_query_tokens"):
        Encoder(processor, model).encode([ONE])


def test_blip_stops_where_its_language_model_does():
    model, processor = zoo.build("blip2-opt")
    model.config.text_config.eos_token_id = processor.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    labels = Encoder(processor, model).encode([ONE]).inputs["labels"]
    assert spoken(processor, labels) == [[" red\n"]]


def test_usable_samples_are_known_before_any_is_encoded(built):
    model, processor = built("blip2-t5")
    bad, mute = ask("bad", (), ("what?", "red")), Sample("mute", (A,), (Turn("what?", ()),))
    encoder = Encoder(processor, model)
    assert encoder.usable([ONE, TALK]) == [ONE, TALK]
    with pytest.raises(SparsightError, match="sample 'bad': this model takes exactly one image, got 0"):
        encoder.usable([ONE, bad, mute])
    encoder = Encoder(processor, model, skip_bad=True)
    assert encoder.usable([bad, ONE, mute, TWO]) == [ONE, TWO]
    assert [name for name, _ in encoder.skipped] == ["bad", "mute"]
    with pytest.raises(SparsightError, match="none of the 1 samples can be taken: this model takes exactly"):
        encoder.usable([bad])
    assert len(encoder.skipped) == 2, "the same sample is listed once"


def test_shifted_is_known_before_any_batch(family):
    name, _, _, encoder = family
    assert encoder.shifted == encoder.encode([ONE]).shifted == (name not in SEQ2SEQ)


def test_batches_keep_the_order(built):
    model, processor = built("qwen3-vl")
    samples = [ask(str(i), A, ("what?", "red")) for i in range(5)]
    cut = list(batches(samples, Encoder(processor, model), 2))
    assert [[sample.id for sample in batch.samples] for batch in cut] == [["0", "1"], ["2", "3"], ["4"]]


def test_batches_leave_skipped_samples_out(built):
    model, processor = built("blip2-t5")
    bad = ask("bad", (), ("what?", "red"))
    encoder = Encoder(processor, model, skip_bad=True)
    assert [[s.id for s in batch.samples] for batch in batches([bad, ONE, bad, bad, TWO], encoder, 2)] == [["one"], ["two"]]
    assert encoder.skipped == [("bad", "this model takes exactly one image, got 0")]
    with pytest.raises(SparsightError, match="none of 2 samples can be encoded: this model"):
        list(batches([bad, bad], encoder, 1))
    with pytest.raises(SparsightError, match="size of at least 1"):
        list(batches([ONE], encoder, 0))


def test_batch_moves_to_a_device(built):
    model, processor = built("blip2-t5")
    moved = Encoder(processor, model).encode([ONE]).to("meta")
    assert {tensor.device.type for tensor in (*moved.inputs.values(), *moved.padding.values())} == {"meta"}
    assert moved.samples == (ONE,)


def test_families_with_pillow_processors_need_no_torchvision():
    code = """
import sys
sys.prefix = "/nowhere"
import zoo
from transformers.utils import is_torchvision_available
from sparsight.data import Encoder, Sample, Turn
assert not is_torchvision_available()
for name in zoo.NAMES:
    if name not in zoo.NEEDS_TORCHVISION:
        model, processor = zoo.build(name)
        sample = Sample("x", (zoo.images(1)[0],), (Turn("what?", ("red",)),))
        assert model(**Encoder(processor, model).encode([sample]).inputs).loss > 0, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=zoo.__file__.rsplit("/", 1)[0])
    assert done.returncode == 0, done.stderr
