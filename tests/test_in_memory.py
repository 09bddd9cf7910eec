"""Models in memory, used as in a notebook: own batches, own training loop, and nothing changed but the weights."""

from __future__ import annotations

import copy
import json
import random
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

import sparsight
from sparsight import SparsightError
from sparsight.data import Encoder, batches, read

import walks
import zoo

NAMES = ("instructblip-t5", "instructblip-llama", "llava", "qwen2.5-vl")


@pytest.fixture(scope="module")
def built():
    """The dense model and the processor of a family; for reading only."""
    made: dict = {}

    def get(name):
        if name in zoo.NEEDS_TORCHVISION:
            pytest.importorskip("torchvision")
        if name not in made:
            model, processor = zoo.build(name)
            made[name] = model, processor, by_hand(name, processor, walks.samples(6))
        return made[name]

    return get


@pytest.fixture(params=NAMES)
def family(request, built):
    return request.param, *built(request.param)


@pytest.fixture
def llava(built):
    model, processor, own = built("llava")
    return copy.deepcopy(model), processor, own


@pytest.fixture
def mine(tmp_path):
    """The samples of `walks` as a JSONL file."""
    lines = []
    for sample in walks.samples(6):
        sample.images[0].save(tmp_path / f"{sample.id}.png")
        question, answer = sample.prompt, sample.answers[0]
        lines.append(json.dumps({"image": f"{sample.id}.png", "prompt": question, "answer": answer}) + "\n")
    (tmp_path / "mine.jsonl").write_text("".join(lines))
    return tmp_path / "mine.jsonl"


def by_hand(name, processor, samples, size=3):
    """Batches as a user makes them: what the processor returns, and labels."""
    made = []
    for start in range(0, len(samples), size):
        chosen = samples[start : start + size]
        images, questions = [s.images[0] for s in chosen], [s.prompt for s in chosen]
        answers = [s.answers[0] for s in chosen]
        how = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
        if name.startswith("instructblip"):
            inputs = dict(processor(images=images, text=questions, **how))
            words = processor.tokenizer
            rows = [
                torch.tensor([*words(text, add_special_tokens=False)["input_ids"], words.eos_token_id]) for text in answers
            ]
            labels = pad_sequence(rows, batch_first=True, padding_value=-100)
            if name == "instructblip-llama":
                asked = [ids[mask] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)]
                whole = [torch.cat(pair) for pair in zip(asked, rows, strict=True)]
                inputs["input_ids"] = pad_sequence(whole, batch_first=True, padding_value=words.pad_token_id)
                inputs["attention_mask"] = pad_sequence([torch.ones_like(ids) for ids in whole], batch_first=True)
                hidden = [torch.cat([torch.full_like(a, -100), row]) for a, row in zip(asked, rows, strict=True)]
                labels = pad_sequence(hidden, batch_first=True, padding_value=-100)
        else:
            texts = [
                processor.apply_chat_template(
                    [
                        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
                        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                    ],
                    tokenize=False,
                )
                for question, answer in zip(questions, answers, strict=True)
            ]
            inputs = dict(processor(text=texts, images=[[image] for image in images], **how))
            image = processor.tokenizer.convert_tokens_to_ids("<image>" if name == "llava" else "<|image_pad|>")
            ids = inputs["input_ids"]
            labels = ids.masked_fill((inputs["attention_mask"] == 0) | (ids == image), -100)
        made.append({**inputs, "labels": labels})
    return made


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def marks(model):
    """All of a model but its weights that a verb could leave changed."""
    facts = {}
    for name, module in model.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if "hooks" in key and isinstance(value, dict)}
        checkpointing = getattr(module, "gradient_checkpointing", None)
        cache = getattr(getattr(module, "config", None), "use_cache", None)
        facts[name] = (id(module), module.training, hooks, checkpointing, cache, "peft_config" in vars(module))
    flags = {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    return facts, flags


def stirred(model, own):
    """Give a model modes and flags of its user's own, after a forward in which transformers sets up its own hooks."""
    with torch.no_grad():
        model(**own[0], output_hidden_states=True)
    model.train()
    next(model.children()).eval()
    for p in list(model.parameters())[::7]:
        p.requires_grad_(False)
    model.config.use_cache = True
    return model


def pruned(model, own, **settings):
    model = copy.deepcopy(model)
    return model, sparsight.prune(model, own, **settings)


# prune


def test_batches_made_by_hand_prune_as_the_folder_verb_does(family, zoo_folder, mine, tmp_path):
    name, dense, _, own = family
    sparsight.prune(zoo_folder(name), tmp_path / "out", data=mine, batch_size=3)
    model, record = pruned(dense, own)
    assert same(weights(sparsight.load(tmp_path / "out")[0]), weights(model))
    assert record.plan
    assert not sparsight.verify(model, against=tmp_path / "out")["differences"]


def test_batches_made_by_hand_are_those_of_the_encoder(family):
    """Else the test above would compare other samples."""
    _, model, processor, own = family
    for batch, mine in zip(batches(walks.samples(6), Encoder(processor, model), 3), own, strict=True):
        assert all(torch.equal(batch.inputs[key], value) for key, value in mine.items() if key != "labels")


def test_padding_never_counts(family):
    """More padding, of tokens that could be words: the same tokens are summed and the same weights kept."""
    name, dense, _, own = family

    def padded(batch, mask_of_padding):
        fill = {"input_ids": 20, "attention_mask": mask_of_padding, "labels": -100, "mm_token_type_ids": 0}
        fill |= {"qformer_input_ids": 20, "qformer_attention_mask": mask_of_padding}
        sides = {"labels": (0, 4)} if name == "instructblip-t5" else {}
        return {
            key: torch.nn.functional.pad(value, sides.get(key, (0, 6)), value=fill[key]) if key in fill else value
            for key, value in batch.items()
        }

    model, record = pruned(dense, own)
    more, record_of_more = pruned(dense, [padded(batch, 0) for batch in own])
    counted, record_of_counted = pruned(dense, [padded(batch, 1) for batch in own])
    assert record_of_more.tokens == record.tokens != record_of_counted.tokens
    a, b, c = ({n: W == 0 for n, W in weights(m).items()} for m in (model, more, counted))
    assert same(a, b)
    assert not same(a, c)


def test_a_data_loader_is_read_until_there_are_enough_samples(built):
    dense, _, own = built("llava")
    one_by_one = [{key: value[i] for key, value in batch.items()} for batch in own[:1] for i in range(3)] * 2
    model, record = pruned(dense, DataLoader(one_by_one, batch_size=3), samples=3)
    again, record_of_list = pruned(dense, own[:1])
    assert same(weights(model), weights(again))
    assert record.tokens == record_of_list.tokens
    assert pruned(dense, DataLoader(one_by_one, batch_size=3), samples=6)[1].tokens != record.tokens


def test_a_processor_s_batch_and_a_generator_will_do(built):
    dense, processor, own = built("llava")
    picture, text = zoo.images(1), "USER: <image>\nhow many? ASSISTANT: two"
    feature = processor(images=picture, text=text, return_tensors="pt")
    assert same(weights(pruned(dense, [feature])[0]), weights(pruned(dense, [dict(feature)])[0]))
    assert same(weights(pruned(dense, (batch for batch in own))[0]), weights(pruned(dense, own)[0]))


def test_samples_are_encoded_by_the_processor(family, mine):
    _, dense, processor, own = family
    expected = weights(pruned(dense, own)[0])
    settings = {"processor": processor, "batch_size": 3}
    for data in (str(mine), read(mine), walks.samples(6)):
        assert same(weights(pruned(dense, data, **settings)[0]), expected)
    model = copy.deepcopy(dense)
    sparsight.prune(model, data=mine, samples=3, **settings)
    assert not same(weights(model), expected)


def test_a_model_in_half_precision_takes_batches_in_single(built):
    dense, _, own = built("llava")
    model = copy.deepcopy(dense).to(torch.bfloat16)
    assert own[0]["pixel_values"].dtype == torch.float32
    record = sparsight.prune(model, own, pattern="2:4")
    assert not sparsight.verify(model, against=record)["differences"]
    assert sparsight.evaluate(model, own).value("perplexity") > 1


@pytest.mark.parametrize(
    "settings", [{"method": "snip"}, {"policy": "sensitivity"}, {"reconstruct": 1}, {"policy": "owl"}], ids=str
)
def test_pruning_changes_only_the_weights(family, settings):
    _, dense, _, own = family
    model = stirred(copy.deepcopy(dense), own)
    before, kept = marks(model), copy.deepcopy(own)
    sparsight.prune(model, own, **settings)
    assert marks(model) == before
    assert all(same(a, b) for a, b in zip(own, kept, strict=True))
    assert sum(int((W == 0).sum()) for W in weights(model).values()) > 10_000


def without(own, *keys, **more):
    return [{**{key: value for key, value in batch.items() if key not in keys}, **more} for batch in own]


NEED_LABELS = [("method", "snip"), ("method", "fisher"), ("policy", "ecoflap"), ("policy", "sensitivity")]


@pytest.mark.parametrize(("field", "name"), NEED_LABELS)
def test_what_needs_labels_refuses_batches_without(field, name, llava):
    model, _, own = llava
    model.forward = None  # nothing may run
    none = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in own]
    for bare in (without(own, "labels"), none):
        with pytest.raises(SparsightError, match=f"^`{field}`: {name} needs labels, and .*batch 0.*"):
            sparsight.prune(model, bare, **{field: name})
        if field == "policy":
            with pytest.raises(SparsightError, match=f"^`policy`: {name} needs labels"):
                sparsight.plan(model, bare, policy=name)


WRONG = {
    "an empty list": (lambda own: [], "there is no batch"),
    "one dict": (lambda own: own[0], "dict is not a sequence of batches"),
    "a number": (lambda own: 5, "int is not a sequence of batches"),
    "a tensor": (lambda own: own[0]["input_ids"], "Tensor is not a sequence of batches"),
    "numbers": (lambda own: [5], "batch 0 is int and no dict of model inputs"),
    "a word as a value": (lambda own: without(own, id="a"), "batch 0: id is str and not a tensor"),
    "no tokens": (lambda own: without(own, "input_ids"), "batch 0 has no input_ids"),
    "one row without its dimension": (
        lambda own: [{k: v[0] for k, v in own[0].items()}],
        "input_ids has shape .*rows, tokens",
    ),
    "a short mask": (lambda own: without(own, attention_mask=own[0]["attention_mask"][:, 1:]), "attention_mask has shape"),
    "short labels": (lambda own: without(own, labels=own[0]["labels"][:, 1:]), "labels has shape"),
    "no mask": (lambda own: without(own, "attention_mask"), "batch 0 has no attention_mask, so padding cannot be told"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("verb", ["prune", "restore", "evaluate"])
def test_wrong_batches_are_one_line(verb, kind, llava):
    model, _, own = llava
    sparsight.prune(model, method="magnitude")
    make, reason = WRONG[kind]
    before = weights(model)
    with pytest.raises(SparsightError, match=f"^`data`: .*{reason}") as error:
        getattr(sparsight, verb)(model, make(own), **({"kl": 0, "steps": 1} if verb == "restore" else {}))
    assert "\n" not in str(error.value)
    assert same(weights(model), before)


def test_padding_that_cannot_be_told_is_refused(built):
    dense, _, own = built("instructblip-t5")
    model = copy.deepcopy(dense)
    bare = without(own, "qformer_attention_mask")
    with pytest.raises(SparsightError, match="batch 0 has no qformer_attention_mask, so padding cannot be told"):
        sparsight.prune(model, bare)
    with pytest.raises(SparsightError, match="batch 0 has neither labels nor decoder_input_ids"):
        sparsight.prune(model, without(own, "labels"))
    words = [{**batch, "labels": batch["labels"].clamp(min=0)} for batch in own]
    with pytest.raises(SparsightError, match="has the padding token 0 in its labels; put -100"):
        sparsight.prune(model, words)


def test_one_row_holds_no_padding(family):
    name, dense, processor, _ = family
    own = by_hand(name, processor, walks.samples(3), size=1)
    bare = without(own, "attention_mask", "qformer_attention_mask")
    assert same(weights(pruned(dense, own)[0]), weights(pruned(dense, bare)[0]))


# settings

FOLDERS_ONLY = [
    ("prune", "out", {"data": "own", "out": "folder"}),
    ("prune", "overwrite", {"data": "own", "overwrite": True}),
    ("prune", "resume", {"data": "own", "resume": True}),
    ("prune", "dtype", {"data": "own", "dtype": "float32"}),
    ("prune", "device", {"data": "own", "device": "cuda"}),
    ("prune", "batch_size", {"data": "own", "batch_size": 3}),
    ("prune", "samples", {"data": "own", "samples": 3}),
    ("prune", "processor", {"data": "samples"}),
    ("plan", "dtype", {"dtype": "bfloat16"}),
    ("plan", "device", {"device": "cuda:0"}),
    ("evaluate", "dtype", {"data": "own", "dtype": "bfloat16"}),
    ("evaluate", "record", {"data": "own", "record": True}),
    ("evaluate", "metrics", {"data": "own", "metrics": "exact_match"}),
    ("evaluate", "processor", {"data": "samples"}),
    ("restore", "out", {"data": "own", "out": "folder", "kl": 0}),
    ("restore", "save_adapter", {"data": "own", "save_adapter": True, "kl": 0}),
    ("restore", "dtype", {"data": "own", "dtype": "float16", "kl": 0}),
    ("restore", "batch_size", {"data": "own", "batch_size": 2, "kl": 0}),
    ("restore", "processor", {"data": "samples", "kl": 0}),
    ("restore", "data", {"kl": 0}),
    ("restore", "teacher", {"data": "own"}),
    ("restore", "teacher", {"data": "own", "kl": 0, "reconstruct": 1}),
    ("restore", "teacher", {"data": "own", "teacher": 5}),
    ("restore", "teacher", {"data": "own", "teacher": "model"}),
    ("restore", "teacher", {"data": "own", "teacher": "half"}),
    ("restore", "teacher_mode", {"data": "own", "teacher": "dense", "teacher_mode": "shared"}),
    ("restore", "teacher_mode", {"data": "own", "teacher": "dense", "teacher_mode": "cached"}),
    ("restore", "held_out", {"data": "own", "held_out": "samples", "kl": 0}),
    ("sparse_lora", "lr", {"lr": 1e-3}),
    ("sparse_lora", "steps", {"steps": 3}),
]


@pytest.mark.parametrize(("verb", "field", "settings"), FOLDERS_ONLY, ids=lambda x: str(x))
def test_settings_that_mean_nothing_in_memory_are_refused(verb, field, settings, llava, built):
    model, _, own = llava
    sparsight.prune(model, method="magnitude")
    before, plain = marks(model), weights(model)
    things = {"own": own, "samples": walks.samples(2), "model": model, "dense": built("llava")[0]}
    things["half"] = copy.deepcopy(things["dense"]).to(torch.bfloat16)
    settings = {key: things.get(value, value) if isinstance(value, str) else value for key, value in settings.items()}
    with pytest.raises(SparsightError, match=f"^`{field}`: ") as error:
        getattr(sparsight, verb)(model, **settings)
    assert "\n" not in str(error.value)
    assert marks(model) == before
    assert same(weights(model), plain)


def test_batches_go_with_a_model_in_memory_only(built, zoo_folder, tmp_path):
    _, processor, own = built("llava")
    with pytest.raises(SparsightError, match=r"^`data`: list is no data source; batches of your own need a model in memory"):
        sparsight.prune(zoo_folder("llava"), tmp_path / "out", data=own)
    (tmp_path / "mine.jsonl").touch()
    with pytest.raises(SparsightError, match=r"^`processor`: a folder holds its own"):
        sparsight.evaluate(zoo_folder("llava"), tmp_path / "mine.jsonl", processor=processor)
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_and_what_are_no_settings_are_one_line(llava):
    model, _, own = llava
    for verb in ("prune", "plan", "evaluate", "restore", "inspect", "sparse_lora"):
        for thing in (5, torch.nn.Linear(2, 2)):
            with pytest.raises(SparsightError, match=r"^`model`: \w+ is no transformers model"):
                getattr(sparsight, verb)(thing, *([own] if verb in ("prune", "plan", "evaluate", "restore") else []))
    with pytest.raises(SparsightError, match=r"^`spec`: float is no record of settings"):
        sparsight.prune(model, own, 0.7)


# a training loop of one's own


def train(wrapped, own, epochs=3):
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(epochs):
        for batch in own:
            loss = wrapped(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("rank", [2, {"vision": 2, "language": 3}, "connector=1"], ids=str)
def test_a_plain_loop_trains_sparse_lora_and_the_merge_keeps_every_zero(family, rank):
    _, dense, _, own = family
    model, record = pruned(stirred(copy.deepcopy(dense), own), own)
    before, start = marks(model), weights(model)
    wrapped = sparsight.sparse_lora(model, rank=rank)
    losses = train(wrapped, own)
    merged = sparsight.merge(wrapped)
    assert losses[-1] < losses[0] - 0.1
    assert merged is model
    assert all(bool((W[start[name] == 0] == 0).all()) for name, W in weights(merged).items() if name in planned(record))
    assert not sparsight.verify(merged, against=record)["differences"]
    assert not same(weights(merged), start)
    assert marks(merged) == before


def planned(record):
    return {f"{name}.weight" for name in record.plan}


def test_the_merged_model_says_what_the_wrapped_one_said(family):
    _, dense, _, own = family
    model, _ = pruned(dense, own)
    wrapped = sparsight.sparse_lora(model, rank=2)
    train(wrapped, own, epochs=1)
    with torch.no_grad():
        before = wrapped(**own[0]).logits
        assert float((sparsight.merge(wrapped)(**own[0]).logits - before).abs().max()) < 1e-5


def test_transformers_trainer_trains_it_and_goes_on_from_a_checkpoint(family, tmp_path):
    _, dense, _, own = family
    ends = []
    for run in ("whole", "resumed"):
        model, record = pruned(dense, own)
        start = weights(model)
        wrapped = sparsight.sparse_lora(model, rank=2)
        arguments = TrainingArguments(
            str(tmp_path / run), max_steps=4, per_device_train_batch_size=1, save_steps=2, learning_rate=1e-2, use_cpu=True,
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(wrapped, arguments, train_dataset=own, data_collator=lambda rows: rows[0])
        if run == "resumed":
            shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / run / "checkpoint-2")
        trainer.train(resume_from_checkpoint=run == "resumed")
        assert sparsight.merge(wrapped) is model
        assert not sparsight.verify(model, against=record)["differences"]
        assert not same(weights(model), start)
        ends.append(weights(model))
    assert same(*ends)


def test_accelerate_trains_it_and_keeps_its_state_while_another_model_is_restored(llava, built):
    model, _, own = llava
    other, _ = pruned(model, own)
    record = sparsight.prune(model, own)
    wrapped = sparsight.sparse_lora(model, rank=2)
    AcceleratorState._reset_state(reset_partial_state=True)  # that of a Trainer before
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    prepared, optimizer, loader = accelerator.prepare(wrapped, optimizer, DataLoader(own, batch_size=None))
    try:
        losses = []
        for epoch in range(2):
            for batch in loader:
                loss = prepared(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            if not epoch:
                sparsight.restore(other, own, teacher=built("llava")[0], steps=1)
                assert accelerator.mixed_precision == "bf16"
        assert losses[-1] < losses[0]
        assert sparsight.merge(accelerator.unwrap_model(prepared)) is model
        assert not sparsight.verify(model, against=record)["differences"]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_adapters_that_are_not_merged_are_refused_but_can_be_scored(llava, tmp_path):
    model, _, own = llava
    record = sparsight.prune(model, own)
    score = sparsight.evaluate(model, own).rows
    wrapped = sparsight.sparse_lora(model)
    for thing in (wrapped, model):  # the model's own modules are wrapped
        with pytest.raises(SparsightError, match=r"^`model`: has adapters that are not merged"):
            sparsight.save(thing, tmp_path / "out")
        with pytest.raises(SparsightError, match="has adapters that are not merged"):
            sparsight.verify(thing, against=record)
        with pytest.raises(SparsightError, match="has adapters that are not merged"):
            sparsight.sparse_lora(thing)
        assert sparsight.evaluate(thing, own).value("perplexity") == pytest.approx(score[1]["value"], rel=1e-5)
    sparsight.merge(wrapped)
    with pytest.raises(SparsightError, match="has no adapters to merge"):
        sparsight.merge(wrapped)


def test_sparse_lora_needs_zeros(llava):
    model, _, _ = llava
    before = marks(model)
    with pytest.raises(SparsightError, match="the model holds no zeros; prune it first"):
        sparsight.sparse_lora(model)
    assert marks(model) == before


# restore

WAYS = {
    "a teacher": {},
    "no teacher": {"kl": 0},
    "reconstruction": {"reconstruct": 1},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"mixed_precision": "bf16"},
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "a teacher") for name in NAMES),
        ("instructblip-llama", "no teacher"),
        ("qwen2.5-vl", "reconstruction"),
        ("llava", "gradient checkpointing"),
        ("instructblip-t5", "gradient checkpointing"),
        ("llava", "bfloat16"),
    ],
)
def test_restore_changes_the_kept_weights_and_nothing_else(name, way, built):
    """Neither modes, flags, hooks and configuration of the model and the teacher, nor the teacher's bits, nor the seeds."""
    dense, _, own = built(name)
    model, record = pruned(stirred(copy.deepcopy(dense), own), own)
    teacher = stirred(copy.deepcopy(dense), own)
    start, before, taught = weights(model), marks(model), (weights(teacher), marks(teacher))
    numbers = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    teachers = {} if way == "no teacher" else {"teacher": teacher}
    facts = sparsight.restore(model, own, steps=3, lr=1e-2, rank=2, **teachers, **WAYS[way])
    assert len(facts["curve"]) == 3
    assert facts["teacher"] == ("none" if way == "no teacher" else "live")
    assert bool(facts.get("reconstructed")) == (way == "reconstruction")
    assert not same(weights(model), start)
    assert not sparsight.verify(model, against=record)["differences"]
    assert all(bool((W[start[name] == 0] == 0).all()) for name, W in weights(model).items() if name in planned(record))
    assert marks(model) == before
    assert same(weights(teacher), taught[0])
    assert marks(teacher) == taught[1]
    assert numbers == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize("name", ["instructblip-t5", "llava"])
def test_restore_takes_samples_and_a_teacher_s_folder(name, built, zoo_folder, mine):
    """The hidden states of a teacher are kept on disk then, for a model in memory as for a folder."""
    dense, processor, own = built(name)
    ends = []
    for teacher in (zoo_folder(name), copy.deepcopy(dense)):
        model, record = pruned(dense, own)
        facts = sparsight.restore(
            model, mine, teacher=teacher, processor=processor, steps=2, batch_size=3, lr=1e-2, held_out=2
        )  # fmt: skip
        assert facts["teacher"] == "cached"
        assert [row["step"] for row in facts["held_out"]] == [0, 2]
        assert not sparsight.verify(model, against=record)["differences"]
        ends.append(weights(model))
    assert same(*ends)


def test_restore_in_memory_is_restore_of_the_folder(zoo_folder, mine, tmp_path, llava):
    """The same steps from the same data: the weights agree but for the order of sums."""
    model, processor, _ = llava
    settings = {"steps": 3, "batch_size": 3, "lr": 1e-2, "teacher": zoo_folder("llava")}
    sparsight.prune(zoo_folder("llava"), tmp_path / "sparse", data=mine)
    sparsight.restore(tmp_path / "sparse", tmp_path / "out", data=mine, teacher_mode="cached", **settings)
    sparsight.prune(model, mine, processor=processor)
    sparsight.restore(model, mine, processor=processor, **settings)
    expected = weights(sparsight.load(tmp_path / "out")[0])
    assert max(float((W - expected[name]).abs().max()) for name, W in weights(model).items()) < 1e-6


def test_a_loader_without_an_end_is_read_for_the_steps_only(llava):
    model, _, own = llava
    sparsight.prune(model, own)

    def endless():
        for number in range(1000):
            assert number < 4, "more was read than three steps and a held-out batch take"
            yield own[number % 2]

    facts = sparsight.restore(model, endless(), kl=0, steps=3, held_out=1)
    assert (len(facts["curve"]), facts["held_out_samples"]) == (3, 1)


def test_held_out_batches_choose_the_step(llava, built):
    model, _, own = llava
    sparsight.prune(model, own)
    for held_out in (DataLoader(own[1:], batch_size=None), 1):
        facts = sparsight.restore(copy.deepcopy(model), own, kl=0, steps=4, save_every=2, held_out=held_out, lr=1e-2)
        assert [row["step"] for row in facts["held_out"]] == [0, 2, 4]
        assert facts["best_step"] in (0, 2, 4)
        assert facts["held_out_samples"] == 1


@pytest.mark.parametrize("name", ["instructblip-t5", "llava"])
def test_a_restoration_that_fails_leaves_the_model_as_it_was(name, built):
    dense, _, own = built(name)
    model, _ = pruned(stirred(copy.deepcopy(dense), own), own)
    teacher = stirred(copy.deepcopy(dense), own)
    start, before, taught = weights(model), marks(model), marks(teacher)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sparsight.restore(model, own, teacher=teacher, steps=3, progress=stop)
    with pytest.raises(SparsightError, match="the loss became NaN or infinite"):
        sparsight.restore(model, own, teacher=teacher, steps=5, lr=1e30)
    assert same(weights(model), start)
    assert marks(model) == before
    assert marks(teacher) == taught


# evaluate


def test_own_batches_are_scored_by_their_answer_tokens(family):
    _, dense, _, own = family
    model = stirred(copy.deepcopy(dense), own)
    before = marks(model)
    result = sparsight.evaluate(model, own)
    assert [row["metric"] for row in result.rows] == ["token_accuracy", "perplexity"]
    assert sparsight.evaluate(model, own, metrics=["perplexity"]).rows == result.rows[1:]
    assert result.predictions == ()
    assert marks(model) == before
    surprise, tokens = 0.0, 0
    with torch.no_grad():
        for batch in own:
            shift = 0 if model.config.get_text_config().is_encoder_decoder else 1
            labels = batch["labels"][:, shift:]
            logits = dense(**batch).logits[:, : labels.shape[1]]
            surprise += float(
                torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="sum")
            )
            tokens += int((labels != -100).sum())
    assert result.value("perplexity") == pytest.approx(float(np.exp(surprise / tokens)), rel=1e-4)


def test_a_model_in_memory_answers_as_its_folder_does(family, zoo_folder, mine):
    name, dense, processor, own = family
    model = stirred(copy.deepcopy(dense), own)
    before = marks(model)
    settings = {"max_new_tokens": 4, "samples": 3}
    result = sparsight.evaluate(model, mine, processor=processor, **settings)
    assert result == sparsight.evaluate(zoo_folder(name), mine, **settings)
    assert len(result.predictions) == 3
    assert marks(model) == before


# inspect, plan, verify, save


def test_a_plan_is_what_prune_follows_and_changes_nothing(family):
    _, dense, _, own = family
    model = stirred(copy.deepcopy(dense), own)
    before, plain = marks(model), weights(model)
    planned_model = sparsight.plan(model, own, policy="owl", sparsity={"vision": 0.3, "language": 0.6})
    assert {layer.name for layer in sparsight.inspect(model).layers} >= set(planned_model.plan)
    assert marks(model) == before
    assert same(weights(model), plain)
    record = sparsight.prune(model, own, policy="owl", sparsity={"vision": 0.3, "language": 0.6})
    assert record.plan == planned_model.plan
    assert not sparsight.verify(model, against=planned_model)["differences"]


def test_verify_compares_with_a_record_a_plan_a_folder_and_a_model(llava, tmp_path, built):
    model, processor, own = llava
    record = sparsight.prune(model, own)
    facts = sparsight.save(model, tmp_path / "sparse", processor, record=record)
    things = {
        "record": record,
        "plan": record.plan,
        "folder": tmp_path / "sparse",
        "model": copy.deepcopy(model),
        "facts": facts,
    }
    layer = next(iter(record.plan))
    before = weights(model)
    for thing in things.values():
        proof = sparsight.verify(model, against=thing)
        assert (proof["layers"], proof["sparsity"], proof["differences"]) == (len(record.plan), 0.5, {})
    assert same(weights(model), before)
    with torch.no_grad():
        W = model.get_parameter(f"{layer}.weight")
        W[0, (W[0] == 0).nonzero()[0]] = 1.0
    for kind, thing in things.items():
        assert list(sparsight.verify(model, against=thing)["differences"]) == [layer], kind
    for thing, reason in ((built("llava")[0], "holds no zeros"), (5, "is no transformers model"), ({}, "is no plan")):
        with pytest.raises(SparsightError, match=reason):
            sparsight.verify(model, against=thing)
    with pytest.raises(SparsightError, match="`against`"):
        sparsight.verify(model)


@pytest.mark.parametrize("name", ["instructblip-t5", "qwen2.5-vl"])
def test_a_saved_model_verifies_loads_and_is_restored_beside_its_original(name, built, zoo_folder, mine, tmp_path):
    _, processor, own = built(name)
    model = AutoModelForImageTextToText.from_pretrained(zoo_folder(name))
    record = sparsight.prune(model, own, pattern="2:4")
    sparsight.merge(sparsight.sparse_lora(model))
    facts = sparsight.save(model, tmp_path / "out", processor, record=record)
    assert facts["base_model"] == str(zoo_folder(name))
    assert {entry["pattern"] for entry in facts["layers"].values()} == {"2:4"}
    assert sparsight.verify(tmp_path / "out")["differences"] == {}
    assert same(weights(AutoModelForImageTextToText.from_pretrained(tmp_path / "out")), weights(model))
    sparsight.restore(tmp_path / "out", tmp_path / "restored", data=mine, steps=1, batch_size=3)
    assert sparsight.verify(tmp_path / "restored", against=model)["differences"] == {}

    again = sparsight.load(tmp_path / "restored")[0]  # once more in memory: what is on record stays so
    more = sparsight.save(again, tmp_path / "again", processor)
    assert more["base_model"] == facts["base_model"]
    assert more["method"] == "wanda + sparselora"
    assert {entry["pattern"] for entry in more["layers"].values()} == {"2:4"}


def test_a_model_that_was_never_in_a_folder_says_so_when_it_is_restored(llava, mine, tmp_path, zoo_folder):
    model, processor, own = llava
    sparsight.save(model, tmp_path / "out", processor, record=sparsight.prune(model, own))
    with pytest.raises(
        SparsightError, match=r"^`teacher`: .* was pruned from LlavaForConditionalGeneration, which is not there"
    ):
        sparsight.restore(tmp_path / "out", tmp_path / "restored", data=mine, steps=1)
    sparsight.save(model, tmp_path / "out", processor, base_model=zoo_folder("llava"), overwrite=True)
    sparsight.restore(tmp_path / "out", tmp_path / "restored", data=mine, steps=1, batch_size=3)
    assert sparsight.verify(tmp_path / "restored", against=model)["differences"] == {}


def test_what_cannot_be_saved_is_one_line_and_leaves_no_folder(llava, zoo_folder, tmp_path):
    model, processor, own = llava
    with pytest.raises(SparsightError, match="the model holds no zeros"):
        sparsight.save(model, tmp_path / "out", processor)
    dense = copy.deepcopy(model)
    record = sparsight.prune(model, own)
    with pytest.raises(SparsightError, match=r"^`record`: .* does not hold its pattern any more"):
        sparsight.save(dense, tmp_path / "out", processor, record=record)
    with pytest.raises(SparsightError, match=r"^`record`: dict is no plan"):
        sparsight.save(model, tmp_path / "out", processor, record={"curve": []})
    assert not (tmp_path / "out").exists()
    shutil.copytree(zoo_folder("llava"), tmp_path / "dense")
    loaded = sparsight.load(tmp_path / "dense")[0]
    sparsight.prune(loaded, own)
    with pytest.raises(SparsightError, match="holds what is read"):
        sparsight.save(loaded, tmp_path / "dense", processor, overwrite=True)


def test_verify_takes_a_model_of_an_unknown_type(zoo_folder):
    model, _ = sparsight.load(zoo_folder("llava"))
    record = sparsight.prune(model, method="magnitude", sparsity=0.5)
    model.config.model_type = "newer"
    assert sparsight.verify(model, against=record)["differences"] == {}
    found = sparsight.anatomy(sparsight.load(zoo_folder("llava"))[0]).family
    family = f"vision={found.vision[0]},language={found.language[0]}"
    assert sparsight.verify(model, against=record, family=family)["differences"] == {}
    with torch.no_grad():
        model.get_decoder().layers[0].mlp.down_proj.weight.fill_(1)
    assert len(sparsight.verify(model, against=record, family=family)["differences"]) == 1


def test_what_a_notebook_shows_is_short(zoo_folder):
    model, _ = sparsight.load(zoo_folder("llava"))
    shown = [sparsight.inspect(model), sparsight.plan(model, sparsity=0.5), sparsight.prune(model, method="magnitude")]
    assert [repr(value).partition("(")[0] for value in shown] == ["Anatomy", "PlannedModel", "PruneRecord"]
    assert all(len(repr(value)) < 250 for value in shown)


def test_what_is_of_another_model_or_no_model_is_named(zoo_folder, tmp_path):
    model, _ = sparsight.load(zoo_folder("llava"))
    other, _ = sparsight.load(zoo_folder("instructblip-t5"))
    with pytest.raises(SparsightError, match="`record`: is of another model, with "):
        sparsight.save(model, tmp_path / "z", record=sparsight.plan(other, sparsity=0.5))
    with pytest.raises(SparsightError, match="`model`: sparse is a folder or a hub name; `load` it first"):
        sparsight.sparse_lora("sparse")
