"""The settings of every verb: one frozen record each.

A field's name, type, default and help are declared here and nowhere else. A record holds valid values: an invalid one is
refused when the record is made, by the name of its field.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from sparsight import fields
from sparsight.options import Budget, Name, Option, Ranks, Spec, above_zero, at_least_zero, below_one, count, epochs, options
from sparsight.shared_spec import FamilySpec, SharedSpec

METHODS, POLICIES = "sparsight.pruning.methods", "sparsight.allocation.plan:POLICIES"
PROPAGATE, METRICS = "sparsight.pruning.compose:PROPAGATE", "sparsight.evaluation.metrics:METRICS"
CHOICES = "sparsight.evaluation.metrics:CHOICES"
BATCH_SIZE = 32  # of a step of training, where memory allows
PARK = "sparsight.calibration.park:PARK"
ADAPTERS, DIVERGENCES = "sparsight.restoring.adapters:trainable", "sparsight.restoring.losses:DIVERGENCES"
WEIGHTS = "sparsight.restoring.losses:POWERS"
SCHEDULE: dict[str, Any] = {"kl": 0.1, "scheduler": "cosine", "warmup": 0.03, "clip": 1.0}  # of `restore`
PUBLISHED: dict[str, dict[str, Any]] = {  # arXiv 2404.02424, as its code has them
    "paper": {"kl": 0.1, "lr": 1e-4, "scheduler": "constant", "warmup": 0.0, "clip": 0.0},
}


@dataclass(frozen=True, kw_only=True)
class SparsitySpec(SharedSpec):
    """A budget of zeros, and the calibration samples to spend it by."""

    lowered = ("batch_size", "samples")

    sparsity: Annotated[
        Budget | None,
        Option(
            "Fraction of zeros: 0.5 for vision and language, or vision=0.5,language=0.6. "
            "[default: 0.5, or that of an n:m pattern]",
            cost=True,
        ),
    ] = None
    pattern: Annotated[
        Name,
        Option("row, tensor, or n:m (n kept of every m inputs), or vision=tensor,language=row.", cost=True),
    ] = "row"
    ignore: Annotated[tuple[str, ...], Option("Leave these layers dense (name, part, glob); repeatable.", cost=True)] = ()
    samples: Annotated[int, count("Calibration samples.", cost=True)] = 128
    split: fields.Split = None
    batch_size: fields.BatchSize = 8
    seed: fields.Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.pattern, Mapping):  # a key of a recipe with keys of its own
            object.__setattr__(self, "pattern", ",".join(f"{name}={kind}" for name, kind in self.pattern.items()))


@dataclass(frozen=True, kw_only=True)
class PlanSpec(SparsitySpec):
    """Settings of `plan`."""

    verb: ClassVar[str] = "plan"

    policy: Annotated[
        Name | None,
        Option("How layers share the budget: {names}. [default: uniform, or the method's own]", (POLICIES,), cost=True),
    ] = None


@dataclass(frozen=True, kw_only=True)
class MethodSpec(Spec):
    """How zeros are made."""

    method: Annotated[
        Name,
        Option("Which weights become zero: {names}.", (f"{METHODS}:METHODS", f"{METHODS}:PRESETS"), cost=True),
    ] = "wanda"
    refine: Annotated[Name | None, Option("Move the zeros: {names}.", (f"{METHODS}:REFINES",), cost=True)] = None
    update: Annotated[Name | None, Option("Solve for the kept weights: {names}.", (f"{METHODS}:UPDATES",), cost=True)] = None
    reconstruct: Annotated[int, epochs("Epochs of fitting each block to the dense model's outputs of it.")] = 0
    tokens: Annotated[Name, Option("Which calibration tokens count: {names}.", ("sparsight.calibration.tokens:TOKENS",))] = (
        "all"
    )
    propagate: Annotated[
        str,
        Option(
            "block: later blocks see pruned ones; layer: later layers too, in one forward; dense: none do.",
            (PROPAGATE,),
            cost=True,
        ),
    ] = "block"  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PruneSpec(MethodSpec, PlanSpec):
    """Settings of `prune`."""

    verb: ClassVar[str] = "prune"

    permute: Annotated[bool, Option("Regroup channels first, for n:m.", cost=False)] = False
    park: Annotated[str, Option("Put waiting batches into files: {names}.", (PARK,), cost=True, work=False)] = "auto"
    dense_targets: Annotated[
        bool, Option("Solvers fit layers to their outputs in the dense model, not to those on their own inputs.", cost=False)
    ] = False
    report_to: fields.ReportTo = ()


@dataclass(frozen=True, kw_only=True)
class SearchSpec(MethodSpec, SparsitySpec):
    """Settings of `search`."""

    verb: ClassVar[str] = "search"

    within: Annotated[
        float | None,
        below_one(
            "Find the sparsest plan instead that loses at most this much score, as 0.02.",
            "a loss of score; give a fraction, as 0.02 for two points",
        ),
    ] = None
    over: Annotated[str, Option("What shares the budget: {names}.", (("components", "blocks"),))] = "blocks"
    propagate: Annotated[
        str, Option("dense: measured once for all plans; block or layer: as in prune, for every plan.", (PROPAGATE,))
    ] = "dense"
    metric: Annotated[
        str | None, Option("Score held-out answers by: {names}. [default: exact_match, or the task's]", (METRICS,))
    ] = None
    max_new_tokens: fields.NewTokens = None
    held_out_samples: Annotated[int | None, count("How many held-out samples to draw. [default: all]")] = None
    held_out_split: fields.HeldOutSplit = None
    held_out_task: fields.HeldOutTask = None
    held_out_prompt: fields.HeldOutPrompt = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fields.check_task(self, "held_out_", self.metric and "metric")

    def prune(self, **changes: Any) -> PruneSpec:
        """The settings of pruning, with `changes`."""
        own = options(PruneSpec)
        settings = {name: getattr(self, name) for name in options(type(self)) if name in own}
        return PruneSpec(**{**settings, **changes})


@dataclass(frozen=True, kw_only=True)
class RestoreSpec(SharedSpec):
    """Settings of `restore`: adapter, teacher, loss, schedule and data."""

    verb: ClassVar[str] = "restore"

    preset: Annotated[
        str | None, Option("Settings of a publication, where they are not named: {names}.", (tuple(PUBLISHED),), work=None)
    ] = None
    adapter: Annotated[
        str, Option("What is trained: {names}; the merge of lora is dense.", (ADAPTERS,), cost=True)
    ] = "sparselora"  # fmt: skip
    tune: Annotated[
        tuple[str, ...], Option("The components to train.", ("sparsight.model.families:COMPONENTS",), cost=False)
    ] = ("vision", "connector", "language")  # fmt: skip
    rank: Annotated[
        Ranks | None, Option("Rank per component. [default: vision=4,connector=2,language=8]", cost=True)
    ] = None  # fmt: skip
    alpha: Annotated[float, above_zero("LoRA alpha; the product is scaled by alpha / rank.")] = 16
    reconstruct: Annotated[int, epochs("Epochs of fitting each block to the dense one before training.")] = 0
    teacher_mode: Annotated[
        str,
        Option(
            "How the teacher is held, {names}: the first that is possible, one copy of the weights, its hidden states on "
            "disk, a second model.",
            ("sparsight.restoring.teacher:MODES",),
            cost=True,
        ),
    ] = "auto"
    teacher_cache: Annotated[
        Any,
        Option("Folder to keep a cached teacher in for the next run. [default: beside OUT, deleted at the end]", work=False),
    ] = None
    kl: Annotated[
        float | None,
        Option(
            "Weight of distillation, 0 to 1. [default: 0.1]",
            fits=lambda x: 0 <= x <= 1,
            says="a weight from 0 to 1",
            cost=True,
        ),
    ] = None
    temperature: Annotated[float, above_zero("Temperature of distillation.")] = 1.0
    divergence: Annotated[
        str,
        Option("{names}: KL(teacher || student), KL(student || teacher), Jensen-Shannon.", (DIVERGENCES,)),
    ] = "forward"  # fmt: skip
    hidden: Annotated[
        float, at_least_zero("Weight of matching the teacher's last hidden states.", "weight", cost=False)
    ] = 0.0  # fmt: skip
    reduction: Annotated[
        str,
        Option(
            "What weighs in the loss, {names}: every token the same, an answer by the square root of its tokens, every "
            "answer the same, or as in the published code.",
            (WEIGHTS, ("paper",)),
        ),
    ] = "token"
    lr: Annotated[
        float | None,
        above_zero("Peak learning rate. [default: by adapter and size: 4e-3 for 3 million weights, 2e-4 for 7B]"),
    ] = None
    clip: Annotated[
        float | None,
        at_least_zero("Norm that a larger gradient of a step is scaled down to; 0: never. [default: 1]", "norm"),
    ] = None
    scheduler: Annotated[
        str | None, Option("One of {names}. [default: cosine]", (("cosine", "linear", "constant"),))
    ] = None  # fmt: skip
    warmup: Annotated[
        float | None,
        below_one(
            "Part of the steps in which the learning rate rises. [default: 0.03]", "a part of the steps, from 0 to below 1"
        ),
    ] = None
    epochs: Annotated[float, above_zero("Passes over the data.", cost=True)] = 1.0
    steps: Annotated[
        int | None,
        Option(
            "Optimizer steps, instead of epochs; 0 reconstructs only, with one block in memory.",
            fits=lambda steps: isinstance(steps, int) and steps >= 0, says="a whole number of at least 0", cost=True,
        ),
    ] = None  # fmt: skip
    batch_size: Annotated[
        int | None,
        count(
            "Samples per batch. [default: 32; where memory is short fewer, with as many batches more, and gradient "
            "checkpointing]",
            cost=True,
        ),
    ] = None
    accumulate: Annotated[int, count("Batches per optimizer step.", cost=True)] = 1
    workers: fields.Workers = 0
    samples: fields.Samples = None
    split: fields.Split = None
    held_out: Annotated[
        Any,
        Option(
            "Samples to score before training and at every checkpoint; the best is kept: a number of them, or other data.",
            cost=False,
        ),
    ] = None  # fmt: skip
    held_out_split: fields.HeldOutSplit = None
    held_out_task: fields.HeldOutTask = None
    held_out_prompt: fields.HeldOutPrompt = None
    patience: Annotated[int | None, count("Stop after so many checkpoints without a better one, or than the start.")] = None
    save_every: Annotated[int, count("Steps between checkpoints for `resume`.")] = 100
    report_to: fields.ReportTo = ()
    mixed_precision: Annotated[
        str, Option("One of {names}: autocast around a float32 model.", (("no", "bf16", "fp16"),), cost=False)
    ] = "no"
    gradient_checkpointing: Annotated[bool, Option("Run blocks again in backward: less memory, more time.", cost=True)] = (
        False
    )
    save_adapter: Annotated[bool, Option("Keep the adapter too, in OUT/adapter.", work=False)] = False
    seed: fields.Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in {**SCHEDULE, **PUBLISHED.get(self.preset or "", {})}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        fields.check_training(self)

    @property
    def rows(self) -> int:
        """Samples per batch."""
        return self.batch_size or BATCH_SIZE

    @property
    def same_work(self) -> dict[str, Any]:
        """The settings that interrupted work goes on with: all but those that only say how a step fits into memory."""
        split = ("batch_size", "accumulate", "teacher_mode", "gradient_checkpointing")
        facts = {name: value for name, value in self.facts().items() if name not in split}
        return {**facts, "batch_size*accumulate": self.rows * self.accumulate}

    @property
    def less_memory(self) -> tuple[str, bool]:
        """What to do where memory runs out, and whether interrupted work can go on with it."""
        part = next((n for n in range(2, self.rows + 1) if self.rows % n == 0), 1)
        lower = f"`batch_size={self.rows // part}` with `accumulate={self.accumulate * part}` takes the same steps"
        parts = [
            *([lower] if part > 1 else []),
            *(["add `gradient_checkpointing`"] if not self.gradient_checkpointing else []),
        ]
        return (", or ".join(parts), True) if parts else super().less_memory

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss uses the teacher."""
        return bool(self.kl) or self.hidden > 0


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec(SharedSpec):
    """Settings of `evaluate`."""

    verb: ClassVar[str] = "evaluate"
    lowered = ("batch_size", "beams")

    metrics: Annotated[
        tuple[Name, ...],
        Option(
            "Score by these alone: {names}. token_accuracy and perplexity need no answers to be written, and one block of "
            "the model in memory. [default: both, and by kind of sample captions by cider_d, questions by vqa_accuracy, "
            "all by exact_match]",
            (CHOICES,),
        ),
    ] = ()
    task: fields.Task = None
    prompt: fields.Prompt = None
    beams: Annotated[int | None, count("Beams; 1 is greedy. [default: 1, or those of the task]", cost=True)] = None
    length_penalty: fields.LengthPenalty = None
    max_new_tokens: fields.NewTokens = None
    batch_size: fields.BatchSize = 32
    samples: fields.Samples = None
    split: fields.ScoredSplit = None
    seed: fields.Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        fields.check_task(self, "", self.metrics and "metrics")


@dataclass(frozen=True, kw_only=True)
class PackSpec(Spec):
    """Settings of `pack`."""

    verb: ClassVar[str] = "pack"

    values: Annotated[
        str,
        Option(
            "Kept weights as they are (kept), or rounded with a scale per row (int8): faster, a little is lost, and up to "
            "50 % zeros dense int4 is smaller. One of {names}.",
            (("kept", "int8"),),
        ),
    ] = "kept"
    squeeze: Annotated[
        bool, Option("Code the exponents of bfloat16 values, too: smaller files, slower to load, the same in memory.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class BenchSpec(Spec):
    """Settings of `bench`."""

    verb: ClassVar[str] = "bench"
    repeats: Annotated[int, count("Timed calls of every product; the 10th percentile is shown.")] = 30
    new_tokens: Annotated[int, count("Tokens to generate, for tokens per second.")] = 16


_ALL = (FamilySpec, PlanSpec, PruneSpec, SearchSpec, RestoreSpec, EvaluateSpec, PackSpec, BenchSpec)
SPECS: dict[str, type[Spec]] = {spec.verb: spec for spec in _ALL}
