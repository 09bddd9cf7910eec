"""The options of the command line that several verbs share, or that would crowd the verbs: names, types, help."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

Model = Annotated[str, typer.Argument(help="Folder of a model, or a hub name.")]
Out = Annotated[str, typer.Argument(help="Folder to write; it appears once the work is done.")]
Data = Annotated[str, typer.Option(help="JSONL file, folder with metadata.jsonl, or a `datasets` name.")]
Sparsity = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Fraction of zeros: 0.5 for vision and language, or vision=0.5,language=0.6. [default: 0.5]"),
]
PatternOption = Annotated[str, typer.Option("--pattern", help="row, tensor, or n:m (n kept of every m inputs).")]
_POLICIES = (
    "How layers share the budget: uniform, owl, alpha, ecoflap, ecoflap-first, sensitivity, language-only or vision-only."
)
Policy = Annotated[str, typer.Option(help=_POLICIES)]
PolicyOrPreset = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--policy", help=f"{_POLICIES} [default: uniform, or the method's own]"),
]
Ignore = Annotated[Optional[list[str]], typer.Option(help="Leave these layers dense (name, part, glob); repeatable.")]  # noqa: UP045
FamilyOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--family", help="Where an unknown model type keeps its blocks: vision=PATH,language=PATH."),
]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(help="Same seed, same command: the same bytes.")]
Samples = Annotated[Optional[int], typer.Option(help="How many samples to draw from the data. [default: all]")]  # noqa: UP045
BatchSize = Annotated[int, typer.Option(help="Samples per batch.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave broken samples out, and count them.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it holds a model.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the interrupted work of the same command.")]
RecordScores = Annotated[bool, typer.Option("--record", help="Keep scores and answers beside the weights, for report.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Method = Annotated[
    str,
    typer.Option(
        help="wanda, ria, magnitude, random, snip, fisher, sparsegpt, alps; or a paper's composition: dsnot, sparseswaps, "
        "owl, ecoflap."
    ),
]
Refine = Annotated[Optional[str], typer.Option(help="Move the zeros: dsnot or swaps.")]  # noqa: UP045
Update = Annotated[Optional[str], typer.Option(help="Solve for the kept weights: pcg.")]  # noqa: UP045
Reconstruct = Annotated[int, typer.Option(help="Epochs of fitting each block to its dense outputs.")]
Permute = Annotated[bool, typer.Option("--permute", help="Regroup channels first, for n:m.")]
Tokens = Annotated[str, typer.Option(help="Which calibration tokens count: all, text, image, balanced, atv or tamp.")]
Propagate = Annotated[
    str,
    typer.Option(help="block: later blocks see pruned ones; stage: later layers too, in one forward; dense: none do."),
]
DensePropagate = Annotated[
    str,
    typer.Option("--propagate", help="dense: measured once for all plans; block or stage: as in prune, for every plan."),
]
RequiredHeldOut = Annotated[str, typer.Option("--held-out", help="Samples to score on, which are not those of --data.")]
Calibration = Annotated[Optional[str], typer.Option("--data", help="Calibration data; see README.")]  # noqa: UP045
CalibrationSamples = Annotated[int, typer.Option("--samples", help="Calibration samples.")]

Teacher = Annotated[Optional[str], typer.Option(help="The dense original. [default: the recorded one]")]  # noqa: UP045
TeacherMode = Annotated[
    str,
    typer.Option(
        help="How the teacher is held: shared (one copy of the weights), cached (its hidden states on disk), live (a second "
        "model), or auto: the first of these that is possible."
    ),
]
TeacherCache = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Folder to keep a cached teacher in for the next run. [default: beside OUT, deleted at the end]"),
]
Adapter = Annotated[
    str,
    typer.Option(
        help="sparselora; hira; masked-full (all kept weights); sparselora-fast (two products, biased gradient); or lora "
        "(its merge is dense)."
    ),
]
Tune = Annotated[str, typer.Option(help="The components to train.")]
Rank = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Rank per component. [default: vision=4,connector=2,language=8]"),
]
Alpha = Annotated[float, typer.Option(help="LoRA alpha; the product is scaled by alpha / rank.")]
ReconstructFirst = Annotated[int, typer.Option("--reconstruct", help="First fit each block to the dense one: epochs.")]
Kl = Annotated[float, typer.Option(help="Weight of the distillation, 0 to 1.")]
Temperature = Annotated[float, typer.Option(help="Temperature of the distillation.")]
Divergence = Annotated[str, typer.Option(help="forward (teacher || student), reverse, or js (Jensen-Shannon).")]
Hidden = Annotated[float, typer.Option(help="Weight of matching the teacher's last hidden states.")]
Reduction = Annotated[str, typer.Option(help="token, or paper: the divergence as the published code sums it.")]
Lr = Annotated[float, typer.Option(help="Peak learning rate.")]
Scheduler = Annotated[str, typer.Option(help="cosine, linear or constant.")]
Warmup = Annotated[float, typer.Option(help="Part of the steps in which the learning rate rises.")]
Epochs = Annotated[float, typer.Option(help="Passes over the data.")]
Steps = Annotated[Optional[int], typer.Option(help="Optimizer steps, instead of epochs.")]  # noqa: UP045
Accumulate = Annotated[int, typer.Option(help="Batches per optimizer step.")]
HeldOut = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Samples to score at every checkpoint, the best of which is kept: a number of them, or other data."),
]
Patience = Annotated[Optional[int], typer.Option(help="Stop after so many checkpoints without a better one.")]  # noqa: UP045
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints for --resume.")]
ReportTo = Annotated[str, typer.Option(help="Trackers: tensorboard, wandb or any other that transformers knows.")]
MixedPrecision = Annotated[str, typer.Option(help="no, bf16 or fp16: autocast around a float32 model.")]
GradientCheckpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Run blocks again in backward: less memory, more time.")
]
SaveAdapter = Annotated[bool, typer.Option("--save-adapter", help="Keep the adapter too, in OUT/adapter.")]

Cost = Annotated[
    bool, typer.Option("--cost", help="FLOPs, bytes and peak memory of every stage instead; no weight is read.")
]
RecipeCost = Annotated[
    bool, typer.Option("--cost", help="FLOPs, bytes and peak memory of every stage instead; OUT is left alone.")
]
CostMethod = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--method", help="With --cost: wanda, sparsegpt, ria, magnitude or random. [default: wanda]"),
]
CostRefine = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--refine", help="With --cost: swaps or dsnot, as in prune."),
]
CostUpdate = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--update", help="With --cost: pcg, as in prune."),
]
CostPropagate = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--propagate", help="With --cost: as in prune. [default: block]"),
]
CostTeacherMode = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--teacher-mode", help="With --cost: as in restore. [default: auto]"),
]
CostSteps = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--steps", help="With --cost: steps of restore. [default: one pass over the data; 100 without any]"),
]
CostBatchSize = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--restore-batch-size", help="With --cost: samples per batch of restore. [default: 32]"),
]
CostCheckpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="With --cost: as in restore.")]
