"""The engine against the plain forward, and the traps that a copied calibration loop falls into."""

from __future__ import annotations

import contextlib
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from sparsight import lockstep
from sparsight.allocation.plan import make_plan
from sparsight.calibration.observe import Watch
from sparsight.data.encoding import Encoder, padding_masks
from sparsight.data.sample import Sample, Turn
from sparsight.model.anatomy import anatomy
from sparsight.pruning.loop import prune

import zoo
from walks import calibration, samples


def named_blocks(model):
    return [(block.name, block.module) for block in anatomy(model).blocks]


@torch.no_grad()
def plain(model, batch):
    return model(**batch.inputs, use_cache=False).logits


@pytest.mark.parametrize("name", zoo.NAMES)
def test_logits_after_a_walk_equal_a_plain_forward_bit_for_bit(name):
    model, processor = zoo.build(name)
    ready = calibration(model, processor)
    expected = [plain(model, batch) for batch in ready]
    got, order = {}, []

    def visit(block, module, calls):
        order.append(block)
        for call in calls.values():
            call()

    blocks = named_blocks(model)
    lockstep(model, blocks, [b.inputs for b in ready], visit, on_output=lambda i, out: got.__setitem__(i, out.logits))
    assert sorted(order) == sorted(block for block, _ in blocks)
    assert len(expected) == len(got) == 2
    for i, logits in enumerate(expected):
        assert torch.equal(got[i], logits)


def mask_of(batch, layer):
    """Which of a layer's inputs are real tokens, told by the module's place; None for all of them."""
    if layer.component == "vision":
        return batch.padding.get("vision")
    if "decoder" not in batch.padding or ".encoder." in layer.name:
        return batch.padding["text"]
    crossing = layer.name.endswith(("EncDecAttention.k", "EncDecAttention.v"))  # these read what the encoder has written
    return batch.padding["text" if crossing else "decoder"]


@torch.no_grad()
def column_norms(model, layers, ready):
    """||x_j||_2 of every layer's real inputs, from one plain forward per batch."""
    squares, current = {}, []

    def hook(layer):
        def add(module, args):
            X, mask = args[0].flatten(0, -2), mask_of(current[-1], layer)
            real = torch.ones(len(X), dtype=torch.bool) if mask is None else mask.flatten()
            assert len(real) == len(X), layer.name
            if layer.expert:  # (tokens, in) and the experts (tokens, k) that each of them goes to
                key, index = layer.expert
                real = real & (args[1] == index).any(1)
            X = X[real]
            if layer.expert and key == "down_proj":
                gate, up = (X @ module.gate_up_proj[index].T).chunk(2, dim=-1)
                X = module.act_fn(gate) * up
            squares[layer.name] = squares.get(layer.name, torch.zeros(X.shape[1])) + (X * X).sum(0)

        return layer.module.register_forward_pre_hook(add)

    hooks = [hook(layer) for layer in layers]
    for batch in ready:
        current.append(batch)
        plain(model, batch)
    for handle in hooks:
        handle.remove()
    return {name: total.sqrt() for name, total in squares.items()}


@pytest.mark.parametrize("name", zoo.NAMES)
def test_masks_equal_those_of_the_exact_procedure(name):
    """Exact: a full forward of every batch for every block, with hooks; then that block is pruned."""
    model, processor = zoo.build(name)
    ready = calibration(model, processor)
    assert not all(bool(batch.padding["text"].all()) for batch in ready)
    body = anatomy(model)
    plan = make_plan(body, sparsity=0.5)
    for block in body.blocks_with(set(plan)):
        layers = [layer for layer in body.layers if layer.block == block.name and layer.name in plan]
        norms = column_norms(model, layers, ready)
        for layer in layers:
            score = layer.weight.abs() * norms[layer.name]
            layer.weight[~plan[layer.name].keep(score)] = 0
    exact = {layer.name: layer.weight.clone() for layer in body.layers if layer.name in plan}

    walked, _ = zoo.build(name)
    parts = anatomy(walked)
    prune(walked, parts, plan, ready, method="wanda", propagate="block")
    for name_, W in exact.items():
        assert torch.equal(parts[name_].weight, W), name_


@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name != "qwen3-vl-moe"])
def test_stages_equal_the_exact_procedure_layer_by_layer(name):
    """Exact: a full forward of every batch for every layer, in the order of the calls; then that layer is pruned."""
    model, processor = zoo.build(name)
    ready = calibration(model, processor)
    body = anatomy(model)
    plan = make_plan(body, sparsity=0.5)
    walked, _ = zoo.build(name)
    order, parts = [], anatomy(walked)
    record = prune(walked, parts, plan, ready, propagate="layer", progress=lambda stop, done, all_: order.append(stop))
    assert sorted(order) == sorted(plan)
    for stop in order:
        layer = body[stop]
        score = layer.weight.abs() * column_norms(model, [layer], ready)[stop]
        layer.weight[~plan[stop].keep(score)] = 0
        assert torch.equal(parts[stop].weight, layer.weight), stop
    assert set(record.layer_errors) == set(record.tokens) == set(plan)
    assert record.block_errors == {}


def test_a_walk_over_layers_lets_the_inputs_of_the_layer_before_go():
    """The inputs of an MLP's last layer are the widest: no batch's is left once all have reached the next block."""
    model, processor = zoo.build("llava")
    ready = calibration(model, processor)
    body = anatomy(model)
    wide = model.config.text_config.intermediate_size
    shapes = [(*batch.inputs["input_ids"].shape, wide) for batch in ready]
    left = []

    def look(module, inputs):
        left.append(sum(type(found) is torch.Tensor and tuple(found.shape) in shapes for found in gc.get_objects()))

    model.get_submodule("model.language_model.layers.1.input_layernorm").register_forward_pre_hook(look)
    prune(model, body, make_plan(body, sparsity=0.5), ready, propagate="layer")
    assert left[-1] == 0 < len(left)


class Toy(nn.Module):
    """Two blocks, with whatever a test wants around them."""

    def __init__(self, forward=None, width=4):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.inner = forward or (lambda self, x: self.blocks[1](self.blocks[0](x)))

    def forward(self, x):
        return self.inner(self, x)

    def named(self):
        return [(str(i), block) for i, block in enumerate(self.blocks)]

    def hooks(self):
        return sum(len(block._forward_pre_hooks) for block in self.blocks)


@pytest.mark.parametrize("twice", [False, True])
def test_a_batch_that_went_on_leaves_nothing_behind(twice):
    toy = Toy(lambda self, x: self.blocks[1](self.blocks[0](x + 0)))
    earlier, left = [], []

    def look(module, inputs):
        left.append(sum(ref() is not None for ref in earlier))
        earlier.append(weakref.ref(inputs[0]))

    toy.blocks[0].register_forward_pre_hook(look)
    batches = [{"x": torch.ones(2, 4)} for _ in range(3)]
    how = {"ahead": lambda name, i, run: run()} if twice else {}
    lockstep(toy, toy.named(), batches, lambda name, block, calls: None, **how)
    assert left == [0] * (6 if twice else 3)


def inputs(n=3):
    return [{"x": torch.full((1, 4), float(i + 1))} for i in range(n)]


def test_weights_changed_in_a_visit_are_what_the_batches_walk_on_through():
    model = Toy()

    def visit(name, block, calls):
        block.weight.data.mul_(2)

    got = {}
    lockstep(model, model.named(), inputs(), visit, on_output=lambda i, y: got.__setitem__(i, y))
    with torch.no_grad():
        for i, batch in enumerate(inputs()):
            assert torch.equal(got[i], model(**batch))


def test_a_second_walk_ahead_sees_every_block_as_it_was():
    """Its outputs are the unchanged model's, also where a batch skips a block and more than the blocks has changed."""
    model = Toy(lambda self, x: self.blocks[1](x if x[0, 0] == 2 else self.blocks[0](self.scale * x)))
    model.scale = nn.Parameter(torch.ones(1))
    outputs, dense, visited = {}, {}, []
    hooks = [b.register_forward_hook(lambda m, a, y, k=k: outputs.update({k: y})) for k, b in model.named()]
    for i, batch in enumerate(inputs()):
        outputs.clear()
        with torch.no_grad():
            model(**batch)
        dense |= {(k, i): y for k, y in outputs.items()}
    for hook in hooks:
        hook.remove()
    model.scale.data.fill_(3)

    @contextlib.contextmanager
    def as_it_was():
        model.scale.data.fill_(1)
        yield
        model.scale.data.fill_(3)

    got, now = {}, []

    def visit(name, block, calls):
        assert model.scale == 3
        visited.append((name, list(calls)))
        got.update({(name, i): y for i, y in now})
        now.clear()
        block.weight.data.mul_(2)

    def ahead(name, i, run):
        now.append((i, run()))

    lockstep(model, model.named(), inputs(), visit, ahead=ahead, as_it_was=as_it_was)
    assert visited == [("0", [0, 2]), ("1", [0, 1, 2])]
    assert got.keys() == dense.keys()
    assert all(torch.equal(got[key], y) for key, y in dense.items())
    assert model.hooks() == 0
    assert not any(block._forward_hooks for block in model.blocks)


def test_batches_at_different_blocks_are_visited_earliest_first():
    """A text-only batch skips the first block and waits until the others have come to the second."""
    model = Toy(lambda self, x: self.blocks[1](x if x[0, 0] == 2 else self.blocks[0](x)))
    seen = []
    lockstep(model, model.named(), inputs(), lambda name, block, calls: seen.append((name, list(calls))))
    assert seen == [("0", [0, 2]), ("1", [0, 1, 2])]


def test_a_block_entered_again_stops_once_and_runs_on():
    model = Toy(lambda self, x: self.blocks[1](self.blocks[0](self.blocks[0](x))))
    seen, outputs = [], {}
    lockstep(
        model, model.named(), inputs(), lambda name, block, calls: seen.append((name, list(calls))),
        on_output=lambda i, y: outputs.__setitem__(i, y),
    )  # fmt: skip
    assert seen == [("0", [0, 1, 2]), ("1", [0, 1, 2])]
    with torch.no_grad():
        assert all(torch.equal(outputs[i], model(**batch)) for i, batch in enumerate(inputs()))
    assert model.hooks() == 0


def test_a_cache_among_the_arguments_is_the_same_for_every_run_of_a_block():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, past_key_values):
            keys, _ = past_key_values.update(self.linear(x)[:, None, None], self.linear(x)[:, None, None], 0)
            return keys.sum((1, 2))

    model = Toy(lambda self, x: self.blocks[1](self.blocks[0](x, past_key_values=DynamicCache())))
    model.blocks[0] = Remembers()
    again, outputs = [], {}

    def visit(name, block, calls):
        again.extend(torch.equal(call(), call()) for call in calls.values())

    lockstep(model, model.named(), inputs(), visit, on_output=lambda i, y: outputs.__setitem__(i, y))
    assert all(again)
    with torch.no_grad():
        assert all(torch.equal(outputs[i], model(**batch)) for i, batch in enumerate(inputs()))


def test_a_block_entered_after_its_turn_raises():
    model = Toy(lambda self, x: self.blocks[1](self.blocks[0](x)) if x[0, 0] == 1 else self.blocks[0](self.blocks[1](x)))
    with pytest.raises(RuntimeError, match="block 0 was entered after its turn"):
        lockstep(model, model.named(), inputs(), lambda *_: None)
    assert model.hooks() == 0


@pytest.mark.parametrize("where", ["visit", "model"])
def test_an_error_unwinds_every_forward_and_removes_every_hook(where):
    left = []

    def forward(self, x):
        try:
            x = self.blocks[0](x)
            if where == "model" and x.shape[0]:
                raise ValueError("in model")
            return self.blocks[1](x)
        finally:
            left.append(1)

    model = Toy(forward)

    def visit(name, block, calls):
        if where == "visit":
            raise ValueError("in visit")

    with pytest.raises(ValueError, match=f"in {where}"):
        lockstep(model, model.named(), inputs(), visit)
    assert len(left) == 3
    assert model.hooks() == 0


def residual(self, x):
    x = x * 1  # the batch's own tensor lives as long as the batch
    for block in self.blocks:
        x = x + block(x)
    return x


@pytest.mark.parametrize("which", ["toy", "llava"])
def test_a_walk_holds_one_block_s_inputs_and_leaves_nothing(which):
    """While a block is visited the inputs of those before it are gone already, and after the walk all are.

    Of LLaVA the language blocks behind the first, whose input the model's own forward keeps, as it does every state of
    the vision tower.
    """
    if which == "toy":
        model = Toy(residual)
        blocks, batches = model.named(), inputs()
    else:
        model, processor = zoo.build("llava")
        blocks = [(block.name, block.module) for block in anatomy(model).blocks if block.component == "language"][1:]
        batches = [batch.inputs for batch in calibration(model, processor, 6, 2)]
    assert len(blocks) > 1
    met = {name: [] for name, _ in blocks}  # weak references to each block's inputs, of every batch

    def note(name):
        def hook(module, args, kwargs):
            met[name].append(weakref.ref(args[0] if args else kwargs["hidden_states"]))

        return hook

    hooks = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in blocks]
    order, alive = [], {}

    def visit(name, block, calls):
        assert len(calls) == len(batches)
        for call in calls.values():
            call()
        assert len(met[name]) == len(batches)
        alive[name] = {other: sum(ref() is not None for ref in met[other]) for other in [*order, name]}
        order.append(name)

    lockstep(model, blocks, batches, visit)
    for hook in hooks:
        hook.remove()
    for name in order:
        assert alive[name].pop(name) == len(batches)
        assert not any(alive[name].values()), f"at {name} inputs of earlier blocks are still held"
    runs = [2 * len(batches)] * (len(blocks) - 1) + [len(batches)]  # nothing goes on through the last one
    assert [len(met[name]) for name in order] == runs
    assert not any(ref() is not None for refs in met.values() for ref in refs)


def test_a_walk_under_autocast_sees_changed_weights():
    """Autocast keeps the weights that it has cast, so a block changed after it has run would run as it was."""
    model = Toy(residual)
    seen, got = [], []

    def visit(name, block, calls):
        before = calls[0]()
        assert before.dtype == torch.bfloat16
        assert before.any()
        block.weight.data.zero_()
        block.bias.data.zero_()
        seen.append(calls[0]())

    with torch.autocast("cpu", dtype=torch.bfloat16):
        lockstep(model, model.named(), inputs(), visit, on_output=lambda i, y: got.append((i, y)))
        assert torch.is_autocast_cache_enabled()
    assert len(seen) == 2
    assert not any(output.any() for output in seen)
    assert len(got) == 3
    for i, y in got:  # what is left of it is the sum's other part
        assert torch.equal(y, inputs()[i]["x"])


def test_grad_mode_and_autocast_belong_to_each_side_of_a_switch():
    """The model pauses inside its own autocast and no_grad; a visit may train the block meanwhile."""
    states = []

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.blocks[0](x)
            states.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        z = self.blocks[1](y.float())
        states.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return z

    model = Toy(forward)

    def visit(name, block, calls):
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
        torch.set_grad_enabled(True)  # as block reconstruction does, and leaves behind
        calls[0]().float().sum().backward()
        assert block.weight.grad is not None

    lockstep(model, model.named(), inputs(2), visit, on_output=lambda *_: None)
    assert states == [(False, True), (False, True), (False, False), (False, False)]
    assert torch.is_grad_enabled()


def test_the_cache_is_off_during_a_walk_and_back_after():
    model, processor = zoo.build("llava")
    configs = [model.config, model.config.text_config, model.config.vision_config]
    for config, value in zip(configs, (True, True, False), strict=True):  # one that was off already stays off
        config.use_cache = value
    seen = []
    ready = calibration(model, processor, 2, 2)

    def visit(name, block, calls):
        seen.extend(c.use_cache for c in configs)
        first, second = calls[0](), calls[0]()
        assert torch.equal(first[0], second[0])  # with a cache the second run would see the first one's keys

    lockstep(model, named_blocks(model), [b.inputs for b in ready], visit)
    assert not any(seen)
    assert [c.use_cache for c in configs] == [True, True, False]


def test_inference_mode_is_refused():
    model = Toy()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        lockstep(model, model.named(), inputs(), lambda *_: None)
    assert model.hooks() == 0


def test_layers_fed_the_very_same_tensor_share_one_accumulator():
    model, processor = zoo.build("llava")
    body = anatomy(model)
    ready = calibration(model, processor, 2, 2)
    block = next(b for b in body.blocks if b.component == "language")
    layers = [layer for layer in body.layers if layer.block == block.name]
    watch = Watch(layers, 1)
    with watch.open(), watch.during(ready[0].padding):
        plain(model, ready[0])
    found = {name.rsplit(".", 1)[1]: moments for name, moments in watch.moments.items()}
    assert found["q_proj"] is found["k_proj"] is found["v_proj"]
    assert found["gate_proj"] is found["up_proj"]
    assert len({id(m) for m in found.values()}) == 4


def test_padding_is_not_in_the_moments():
    """The same samples padded to a longer rectangle give the same counts and the same masks."""
    model, processor = zoo.build("llava")
    alone = calibration(model, processor, 4, 1)
    together = calibration(model, processor, 4, 4)
    assert not bool(together[0].padding["text"].all())
    body = anatomy(model)
    layers = list(body.component("language"))

    def gather(ready):
        watch = Watch(layers, len(ready))
        with watch.open():
            for batch in ready:
                with watch.during(batch.padding):
                    plain(model, batch)
        return watch.moments

    one, all_ = gather(alone), gather(together)
    for layer in layers:
        assert one[layer.name].count == all_[layer.name].count == sum(int(b.padding["text"].sum()) for b in alone)
        torch.testing.assert_close(one[layer.name].norm, all_[layer.name].norm, rtol=1e-4, atol=1e-5)


def test_padded_patches_are_not_in_the_moments():
    """SmolVLM pads images to one size; the model drops whole padding images and masks the rest."""
    model, processor = zoo.build("smolvlm")
    encoder = Encoder(processor, model)
    several = Sample("0", tuple(zoo.images(2)), (Turn("how many?", ("two",)),))
    batch = encoder.encode([several, *samples(1)])
    inputs = dict(batch.inputs)
    assert bool(batch.padding["vision"].all())
    inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"].clone()
    inputs["pixel_attention_mask"][0, 0, :, 16:] = 0  # the right half of the first image is padding
    batch = replace(batch, inputs=inputs, padding=padding_masks(inputs, model.config))
    real = int(batch.padding["vision"].sum())
    assert real == batch.padding["vision"].numel() - 8
    layers = list(anatomy(model).component("vision"))
    watch = Watch(layers, 1)
    with watch.open(), watch.during(batch.padding):
        plain(model, batch)
    assert {watch.moments[layer.name].count for layer in layers} == {real}


def test_padding_is_not_in_the_moments_of_an_encoder_decoder():
    """The encoder and the keys and values of its states have the text's padding, the decoder has its own."""
    model, processor = zoo.build("instructblip-t5")
    batch = calibration(model, processor, 4, 4)[0]
    text, decoder = batch.padding["text"], batch.padding["decoder"]
    told, said = int(text.sum()), int(decoder.sum())
    assert len({told, said, text.numel(), decoder.numel()}) == 4
    layers = list(anatomy(model).component("language"))
    watch = Watch(layers, 1)
    with watch.open(), watch.during(batch.padding):
        plain(model, batch)
    places = {"encoder": 0, "crossing": 0, "decoder": 0}
    for layer in layers:
        place = "encoder" if ".encoder.block." in layer.name else "decoder"
        if layer.name.endswith(("EncDecAttention.k", "EncDecAttention.v")):
            place = "crossing"
        places[place] += 1
        assert watch.moments[layer.name].count == (said if place == "decoder" else told), layer.name
    assert places == {"encoder": 14, "crossing": 4, "decoder": 18}


def test_padding_of_the_q_formers_text_is_not_in_the_moments():
    model, processor = zoo.build("instructblip-t5")
    batch = calibration(model, processor, 4, 4)[0]
    body = anatomy(model)
    layers = list(body.component("connector"))
    watch = Watch(layers, 1)
    with watch.open(), watch.during(batch.padding):
        plain(model, batch)
    queries, told = model.config.num_query_tokens, int(batch.padding["instruction"].sum())
    assert told < batch.padding["instruction"].numel()
    counts = {name.split("layer.0.")[-1]: m.count for name, m in watch.moments.items() if "layer.0." in name}
    assert counts["attention.attention.query"] == 4 * queries + told
    assert counts["crossattention.attention.query"] == 4 * queries
    assert counts["intermediate.dense"] == counts["output.dense"] == told
    assert counts["intermediate_query.dense"] == 4 * queries


def test_the_q_formers_masks_fit_nothing_else_by_their_length():
    """At every length of the question: the queries, and the image's features that they attend to, have no padding."""
    model, processor = zoo.build("instructblip-t5")
    encoder = Encoder(processor, model)
    queries, features = model.config.num_query_tokens, (32 // 8) ** 2 + 1
    layers = list(anatomy(model).component("connector"))
    lengths, moved = set(), 0
    for words in range(1, features + 6):
        short, long = (Turn(" ".join(["red"] * n), ("red",)) for n in (1, words))
        batch = encoder.encode([Sample(str(i), tuple(zoo.images(1)), (turn,)) for i, turn in enumerate((short, long))])
        told = batch.padding["instruction"]
        length = told.shape[1]
        lengths.add(length)
        moved += not bool(told[1].all())
        assert batch.inputs["qformer_input_ids"].shape == told.shape == batch.inputs["qformer_attention_mask"].shape
        assert not {length, queries + length} & {queries, features}
        watch = Watch(layers, 1)
        with watch.open(), watch.during(batch.padding):
            plain(model, batch)
        counts = {name: moments.count for name, moments in watch.moments.items()}
        crossing = {n: c for n, c in counts.items() if "crossattention" in n}
        assert len(crossing) >= 4
        for name, count in crossing.items():
            assert count == 2 * (features if name.endswith(("key", "value")) else queries), (words, name)
        own = [c for n, c in counts.items() if n.endswith("layer.0.attention.attention.query")]
        assert own == [2 * queries + int(told.sum())]
    assert moved == 3  # of as many questions of a length to avoid
    assert {queries + 1, features + 1, features - queries + 1} <= lengths
