"""Samples that only the processor refuses, and samples that are too long, are found before anything is computed."""

import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from sparsight.data import Encoder, Sample, Turn
from sparsight.data.limits import Limits
from sparsight.errors import SparsightError

import zoo

A = zoo.images(1)[0]
CHAT = ("llava", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "gemma3", "smolvlm")
QWEN = ("qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe")


def ask(name, prompt="what color?", answer="red", image=A):
    return Sample(name, (image,), (Turn(prompt, (answer,)),))


GOOD = [ask(f"good{i}") for i in range(11)]


def among(bad, place=9):
    return [*GOOD[:place], bad, *GOOD[place:]]


THIN = Image.new("RGB", (3000, 8), "red")


@pytest.mark.parametrize("name", QWEN)
def test_an_image_of_extreme_shape_names_its_sample(name, built):
    model, processor = built(name)
    samples = among(ask("thin", image=THIN))
    for call in (Encoder(processor, model).usable, Encoder(processor, model).encode, Encoder(processor, model).prompts):
        with pytest.raises(SparsightError, match=r"^sample 'thin' cannot be written by .*aspect ratio") as caught:
            call(samples)
        assert "template" not in str(caught.value)
        assert "\n" not in str(caught.value)
    encoder = Encoder(processor, model, skip_bad=True)
    assert encoder.usable(samples) == GOOD
    ((identity, reason),) = encoder.skipped
    assert identity == "thin"
    assert "aspect ratio" in reason
    assert len(encoder.encode(samples).samples) == 11
    with pytest.raises(SparsightError, match=r"none of the 2 samples can be taken: cannot be written .*aspect ratio"):
        Encoder(processor, model, skip_bad=True).usable([ask("a", image=THIN), ask("b", image=THIN)])


MARKS = [(name, "<|image_pad|>") for name in QWEN] + [("qwen2.5-vl", "<|video_pad|>"), ("gemma3", "<start_of_image>")]


@pytest.mark.parametrize(("name", "mark"), [*MARKS, ("gemma3", "<image_soft_token>")])
def test_a_token_of_images_in_a_text_names_its_sample(name, mark, built):
    model, processor = built(name)
    system = replace(ask("bad"), system=f"a {mark}")
    for bad in (ask("bad", f"what is {mark}?"), ask("bad", answer=f"a {mark}"), system):
        with pytest.raises(
            SparsightError, match=r"^sample 'bad': its text holds <.*>, which stands for an image; take it out"
        ):
            Encoder(processor, model).usable(among(bad))
        encoder = Encoder(processor, model, skip_bad=True)
        assert encoder.usable(among(bad)) == GOOD
        assert [identity for identity, _ in encoder.skipped] == ["bad"]


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_text_with_the_end_of_an_answer_names_its_sample(name, built):
    model, processor = built(name)
    end = processor.tokenizer.eos_token
    images = tuple(zoo.images(1))
    for turn, system in (
        (Turn("what?", (f"red{end}",)), ""),
        (Turn("what?", ("red", f"red{end} blue", "red")), ""),
        (Turn(f"one{end} two?", ("red",)), ""),
        (Turn("what?", ("red",)), f"be brief{end}"),
    ):
        with pytest.raises(SparsightError, match=f"sample 'a': its text holds {re.escape(end)}, at which the model ends"):
            Encoder(processor, model).usable([Sample("a", images, (turn,), system=system)])


@pytest.mark.parametrize(
    "error", [IndexError("a\nb"), KeyError("x"), RuntimeError("shape"), StopIteration(), OSError("gone")]
)
def test_a_processor_may_raise_anything(error, built):
    def fail(processor, samples, config):
        if any(sample.id == "bad" for sample in samples):
            raise error
        return whole.encode(processor, samples, config)

    encoder = Encoder(*reversed(built("llava")), skip_bad=True)
    whole = encoder.style
    encoder.style = replace(whole, encode=fail)
    assert encoder.usable(among(ask("bad"))) == GOOD
    ((identity, reason),) = encoder.skipped
    assert (identity, "\n" in reason) == ("bad", False)
    assert reason.endswith("mend the sample, or leave it out with `skip_bad`")


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_longest_sample_is_a_setting(name, built):
    model, processor = built(name)
    long = ask("long", "what is this? " + "red " * 60)
    plain = Encoder(processor, model)
    limit = int(plain.encode(GOOD[:1]).padding["text"].sum(1).max())
    assert plain.usable(among(long)) == among(long)
    with pytest.raises(SparsightError, match=rf"sample 'long': \d+ tokens, more than `max_length={limit}`"):
        Encoder(processor, model, max_length=limit).usable(among(long))
    encoder = Encoder(processor, model, max_length=limit, skip_bad=True)
    assert encoder.usable(among(long)) == GOOD
    assert [identity for identity, _ in encoder.skipped] == ["long"]


def test_a_sample_with_one_turn_too_long_is_left_out_whole(built):
    model, processor = built("blip2-t5")
    talk = Sample("talk", (A,), (Turn("what?", ("red",)), Turn("red " * 60, ("red",))))
    encoder = Encoder(processor, model, max_length=30, skip_bad=True)
    assert encoder.usable([GOOD[0], talk]) == GOOD[:1]


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_limits_of_the_families(name, built):
    model, processor = built(name)
    limits = Limits.of(model.config, processor)
    assert limits.fixed == (512 if name == "blip2-opt" else None)
    assert limits.qformer == (256 if name.startswith("instructblip") else None)
    if name.endswith("t5"):
        assert limits.usual is None, "positions are relative, and the tokenizer of the zoo says nothing"
    else:
        assert limits.usual == model.config.get_text_config().max_position_embeddings


@pytest.mark.parametrize("name", ["instructblip-t5", "instructblip-llama", "blip2-opt"])
def test_a_sample_beyond_a_table_of_positions_is_refused_and_not_a_traceback(name, built):
    model, processor = built(name)
    size = 256 if name.startswith("instructblip") else 512
    long = ask("long", "red " * (size + 40))
    for longest in (None, 100_000):
        encoder = Encoder(processor, model, max_length=longest)
        for call in (encoder.usable, encoder.encode):
            with pytest.raises(SparsightError, match=rf"sample 'long': .*more than the {size} positions of the"):
                call([GOOD[0], long])
    encoder = Encoder(processor, model, skip_bad=True)
    with torch.no_grad():
        assert torch.isfinite(model(**encoder.encode([GOOD[0], long]).inputs).loss)
    assert [identity for identity, _ in encoder.skipped] == ["long"]


def test_rotary_positions_are_a_limit_that_a_setting_may_raise():
    model, processor = zoo.build("llava")
    long = ask("long", "red " * 1100)
    with pytest.raises(SparsightError, match=r"tokens, more than the 1024 positions of the model; shorten .* `max_length`"):
        Encoder(processor, model).usable([long])
    assert Encoder(processor, model, max_length=5000).usable([long]) == [long]
    assert Encoder(processor, model).encode([long]).rows == 1, "a batch of one's own is not checked"


@pytest.mark.parametrize(("said", "limit"), [(40, 40), (10**30, None), (int(1e6), None), (0, None)])
def test_the_tokenizer_says_it_where_the_model_does_not(said, limit):
    model, processor = zoo.build("blip2-t5")
    processor.tokenizer.model_max_length = said
    assert Limits.of(model.config, processor).usual == limit
    if limit:
        with pytest.raises(SparsightError, match=r"sample 'long': .* more than the 40 tokens of its tokenizer; shorten"):
            Encoder(processor, model).usable([ask("long", "red " * 60)])
