"""Train a demo model from scratch, in stages, on nothing but digit scenes.

    cd tools && python -m demo_models.train instructblip|llava OUT [--seed 0] [--threads 2]

1. **see**: the vision tower learns to name the digit and the colour under each patch, through a linear head that is
   then thrown away. Trained end to end from the start, a model of this size never begins to look.
2. **connect**: the tower learns to tell where each patch is, too, and the Q-Former to carry the digit and the colour of
   cell i in query i, again through heads that are thrown away; BLIP-2, too, trains its Q-Former before its language model.
   LLaVA's projector learns to write each patch as a sum of the language model's own word vectors.
3. **answer**: the tower is frozen; connector and language model learn to answer and to describe.
4. **polish** (InstructBLIP): everything together.
5. **practise**: as 3, with the hard kinds of question asked three times as often; LLaVA is asked one question of every
   kind about each scene, packed into one row, which is five times the questions in the same time.
6. **refine** (LLaVA): everything together, the hard kinds twice as often.

The model is saved after every stage, in float16 as it ships; `--start STAGE` goes on from what lies in OUT,
`--end STAGE` stops early.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsight.demo.scenes import CELL, KINDS, NAMES, SIZE, Drawing, ask, draw

from demo_models.build import PATCH, build
from demo_models.feed import batch, captions, check, llava_pack, pixels, pool, questions
from demo_models.score import load, samples, score

STAGES = ("see", "connect", "answer", "polish", "practise", "refine")
NAMED = 11 + len(NAMES) + 1  # classes of digits and of colours, each with nothing


@dataclass(frozen=True)
class Course:
    """How long and how fast each stage goes: steps, scenes a step, learning rate; and how many scenes are drawn."""

    see: int = 5000
    connect: int = 600
    answer: int = 800
    polish: int = 1000
    practise: int = 700
    refine: int = 0
    see_size: int = 64
    answer_size: tuple[int, int] = (48, 12)  # questions, captions
    packed: int = 0  # in practice, scenes a step with one question of every kind each, packed; LLaVA's way
    rates: tuple[float, ...] = (1e-3, 1e-3, 1.5e-3, 1e-3, 7e-4, 0)
    hard: tuple[str, ...] = ("count", "beside", "compare", "exists")  # asked three times as often in practice
    pool: int = 30_000
    scored: tuple[int, int] = (400, 100)  # held-out questions and captions after a stage


LLAVA = Course(
    connect=400,
    answer=400,
    polish=0,
    practise=1200,
    refine=1500,
    rates=(1e-3, 1e-3, 2e-3, 0, 2e-3, 1.5e-3),
    packed=24,
    hard=("count", "where", "beside", "exists"),
)
COURSES = {"instructblip": Course(), "llava": LLAVA}


@dataclass
class Log:
    """A training curve as it goes to `training.json`."""

    start: float = field(default_factory=time.perf_counter)
    stages: list[dict[str, Any]] = field(default_factory=list)

    def begin(self, stage: str, **facts: Any) -> None:
        """Open a stage."""
        self.start = time.perf_counter()
        self.stages.append({"stage": stage, **facts, "curve": []})

    def note(self, step: int, **numbers: float) -> None:
        """Add a point to the curve of the open stage, and show it."""
        seconds = round(time.perf_counter() - self.start, 1)
        point = {"step": step, "seconds": seconds} | {name: round(value, 4) for name, value in numbers.items()}
        self.stages[-1]["curve"].append(point)
        print(self.stages[-1]["stage"], json.dumps(point), flush=True)

    def end(self, **results: Any) -> None:
        """Close the open stage with its time and its results."""
        self.stages[-1] |= {"seconds": round(time.perf_counter() - self.start, 1), **results}
        print(self.stages[-1]["stage"], "done", json.dumps(results), flush=True)


def fit(
    parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], steps: int, rate: float, decay: float, log: Log
) -> None:
    """Minimize `loss` in place: AdamW, a short warm-up, then half a cosine down to nothing."""
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=decay)
    warm = min(100, steps // 10 + 1)
    recent: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        recent.append(value.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            log.note(step + 1, loss=sum(recent) / len(recent))
            recent.clear()


def tower(model: Any) -> Any:
    """The vision tower of a demo model."""
    return model.vision_model if hasattr(model, "vision_model") else model.model.vision_tower


def patch_cells() -> Tensor:
    """The cell (0 to 3) under each patch, in reading order."""
    side = torch.arange(SIZE // PATCH) * PATCH // CELL
    return (2 * side[:, None] + side[None, :]).flatten()


def read(model: Any, head: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Name the digit (n, patches, 11) and the colour (n, patches, 7) under each patch; the last class is nothing."""
    logits = head(tower(model)(images).last_hidden_state[:, 1:])
    return logits[..., :11], logits[..., 11:]


def see(model: Any, course: Course, seed: int, log: Log) -> None:
    """Teach the vision tower, in place, to tell digit and colour under each patch."""
    scenes, cells = pool(course.pool, seed, crowd=True), patch_cells()
    rng = np.random.default_rng([seed, 1])
    width = tower(model).config.hidden_size
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, NAMED))

    def loss() -> Tensor:
        index = rng.integers(len(scenes.values), size=course.see_size)
        values, colors = targets(scenes, index)
        digit, color = read(model, head, pixels(scenes.pixels[index]))
        return naming(digit, values[:, cells]) + naming(color, colors[:, cells])

    fit([*tower(model).parameters(), *head.parameters()], loss, course.see, course.rates[0], 0.05, log)
    log.end(**legible(model, head))


def naming(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of logits (n, places, classes) with classes (n, places), a little smoothed."""
    return cross_entropy(logits.flatten(0, 1), classes.flatten(), label_smoothing=0.05)


def connect(model: Any, processor: Any, course: Course, seed: int, log: Log) -> None:
    """Teach the tower, in place, to say the cell of each patch too, and the connector to pass on what the tower reads.

    The tower has no need of places to name what is there, but the connector knows the patches by nothing else. The
    Q-Former learns to carry cell i in query i. LLaVA's projector learns to write each patch as a sum of the language
    model's own words, digit and colour and place, so that a word of the question is found again in the picture.
    """
    scenes, cells = pool(course.pool, seed, crowd=False), patch_cells()
    rng = np.random.default_rng([seed, 2])
    former = getattr(model, "qformer", None)
    query = nn.Linear(former.config.hidden_size, NAMED) if former else nn.Identity()
    patch = nn.Linear(tower(model).config.hidden_size, NAMED + 4)

    def loss() -> Tensor:
        index, prompts, _ = questions(scenes, course.see_size, rng)
        (values, colors), images = targets(scenes, index), pixels(scenes.pixels[index])
        if former:
            text = processor.qformer_tokenizer(prompts, padding=True, return_tensors="pt")
            seen = model.get_image_features(images, text["input_ids"], text["attention_mask"])
            asked = query(seen.qformer_outputs.last_hidden_state[:, :4])
            total = naming(asked[..., :11], values) + naming(asked[..., 11:], colors)
        else:
            seen = tower(model)(images)
            total = worded(model, processor, seen.last_hidden_state[:, 1:], values[:, cells], colors[:, cells], cells)
        named = patch(seen.last_hidden_state[:, 1:])
        total = total + naming(named[..., :11], values[:, cells]) + naming(named[..., 11:NAMED], colors[:, cells])
        return total + naming(named[..., NAMED:], cells.expand(len(index), -1))

    trained = [*tower(model).parameters(), *query.parameters(), *patch.parameters()]
    if former:
        trained += [model.query_tokens, *former.parameters()]
    else:
        trained += [*model.model.multi_modal_projector.parameters(), model.get_input_embeddings().weight]
    fit(trained, loss, course.connect, course.rates[1], 0.01, log)
    log.end()


def worded(model: Any, processor: Any, seen: Tensor, values: Tensor, colors: Tensor, cells: Tensor) -> Tensor:
    """How badly projected patches (n, patches, width) spell what they show in the language model's word vectors.

    `values` and `colors` (n, patches) are classes, the last of which is nothing and is not spelt.
    """
    passed = model.model.multi_modal_projector(seen)
    passed = passed * passed.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    total = torch.zeros(())
    groups = [
        (list("0123456789"), values),
        (list(NAMES), colors),
        (["top", "bottom"], (cells // 2).expand(len(values), -1)),
        (["left", "right"], (cells % 2).expand(len(values), -1)),
    ]
    for words, classes in groups:
        vectors = model.get_input_embeddings().weight[processor.tokenizer.convert_tokens_to_ids(words)]
        there = classes < len(words)
        total = total + cross_entropy(passed[there] @ vectors.T, classes[there], label_smoothing=0.05)
    return total


def targets(drawing: Drawing, index: np.ndarray) -> tuple[Tensor, Tensor]:
    """Classes of digit and colour per cell (n, 4); the last class is nothing."""
    values, colors = torch.from_numpy(drawing.values[index]), torch.from_numpy(drawing.colors[index])
    return values % 11, colors % (len(NAMES) + 1)


@torch.no_grad()
def legible(model: Any, head: nn.Module) -> dict[str, float]:
    """How often the tower reads held-out digits and colours rightly, averaging over the patches of a cell."""
    drawing = draw("test", 1000, np.random.default_rng(0), augment=False, crowd=True)
    values, colors = targets(drawing, np.arange(1000))
    digit, color = read(model, head, pixels(drawing.pixels))
    average = torch.nn.functional.one_hot(patch_cells()).float()
    found = values != 10
    right = (torch.einsum("npk,pc->nck", digit.softmax(-1), average).argmax(-1) == values)[found]
    painted = (torch.einsum("npk,pc->nck", color.softmax(-1), average).argmax(-1) == colors)[found]
    return {"held_out_digits": round(right.float().mean().item(), 4), "colors": round(painted.float().mean().item(), 4)}


def answer(model: Any, processor: Any, course: Course, stage: str, seed: int, log: Log) -> None:
    """Teach the model, in place, to answer and to describe; only stage "polish" touches the vision tower."""
    scenes = pool(course.pool, seed, crowd=False)
    check(processor, scenes)
    rng = np.random.default_rng([seed, 1 + STAGES.index(stage)])
    tower(model).requires_grad_(stage in ("polish", "refine"))
    kinds = (*KINDS, *course.hard, *course.hard) if stage == "practise" else tuple(KINDS)

    def spoken(sampler: Any, size: int, *more: Any) -> Tensor:
        index, prompts, answers = sampler(scenes, size, rng, *more)
        return model(**batch(processor, pixels(scenes.pixels[index]), prompts, answers)).loss

    def packed() -> Tensor:
        index = rng.integers(len(scenes.values), size=course.packed)
        asked = []
        for i in index:
            found = [ask(scenes.digits(int(i)), kind, rng) for kind in (*KINDS, *(course.hard if stage == "refine" else ()))]
            asked.append([(question.prompt, question.answer) for question in found if question])
        return model(**llava_pack(processor, pixels(scenes.pixels[index]), asked)).loss

    def loss() -> Tensor:
        n_questions, n_captions = course.answer_size
        if stage in ("practise", "refine") and course.packed:
            return packed() + spoken(captions, n_captions)
        return spoken(questions, n_questions, kinds) + spoken(captions, n_captions)

    number = STAGES.index(stage)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fit(trained, loss, getattr(course, stage), course.rates[number], 0.01, log)
    log.end(held_out=score(model, processor, samples(*course.scored, seed=1)))


def save(model: Any, processor: Any, folder: Path, log: Log, **facts: Any) -> None:
    """Write what `from_pretrained` needs, in float16, and the training log."""
    model.half().save_pretrained(folder)
    model.float()
    processor.save_pretrained(folder)
    record = {**facts, "stages": log.stages}
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def train(
    kind: str, folder: Path, seed: int = 0, course: Course | None = None, start: str = "see", end: str = "refine"
) -> None:
    """Train a demo model of one kind, saving it after each stage; a later `start` goes on from the folder."""
    course = course or COURSES[kind]
    torch.manual_seed(seed)
    log = Log()
    model, processor = build(kind)
    if start != "see":
        model, processor = load(folder)
        log.stages = json.loads((folder / "training.json").read_text(encoding="utf-8"))["stages"]
        log.stages = [stage for stage in log.stages if STAGES.index(stage["stage"]) < STAGES.index(start)]
    model.train()
    for stage in STAGES[STAGES.index(start) : STAGES.index(end) + 1]:
        if getattr(course, stage) == 0:
            continue
        log.begin(stage, steps=getattr(course, stage), rate=course.rates[STAGES.index(stage)])
        if stage == "see":
            see(model, course, seed, log)
        elif stage == "connect":
            connect(model, processor, course, seed, log)
        else:
            answer(model, processor, course, stage, seed, log)
        model.train().requires_grad_(True)
        save(model, processor, folder, log, kind=kind, seed=seed, torch=torch.__version__)


def main() -> None:
    """Parse, train."""
    parser = argparse.ArgumentParser(prog="python -m demo_models.train", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("instructblip", "llava"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--start", choices=STAGES, default="see", help="go on with this stage from what lies in OUT")
    parser.add_argument("--end", choices=STAGES, default="refine", help="stop after this stage")
    for stage in STAGES:
        parser.add_argument(f"--{stage}", type=int, help=f"steps of stage {stage}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    given = {stage: steps for stage in STAGES if (steps := getattr(options, stage)) is not None}
    course = replace(COURSES[options.kind], **given)
    train(options.kind, options.folder, options.seed, course, options.start, options.end)


if __name__ == "__main__":
    main()
