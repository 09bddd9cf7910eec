"""Benchmarks by name: how each is read, asked and scored. One file per task, one line here."""

from __future__ import annotations

from sparsight.tasks.ai2d import AI2D
from sparsight.tasks.chartqa import CHARTQA
from sparsight.tasks.coco import COCO
from sparsight.tasks.docvqa import DOCVQA
from sparsight.tasks.flickr30k import FLICKR30K
from sparsight.tasks.gqa import GQA
from sparsight.tasks.mmbench import MMBENCH
from sparsight.tasks.mme import MME
from sparsight.tasks.mmmu import MMMU
from sparsight.tasks.nocaps import NOCAPS
from sparsight.tasks.okvqa import OKVQA
from sparsight.tasks.pope import POPE
from sparsight.tasks.scienceqa import SCIENCEQA
from sparsight.tasks.seed import SEED
from sparsight.tasks.task import Task, Whole
from sparsight.tasks.textvqa import TEXTVQA
from sparsight.tasks.vizwiz import VIZWIZ
from sparsight.tasks.vqav2 import VQAV2

__all__ = ["TASKS", "Task", "Whole"]

TASKS: dict[str, Task] = {
    "vqav2": VQAV2,
    "okvqa": OKVQA,
    "gqa": GQA,
    "nocaps": NOCAPS,
    "coco": COCO,
    "flickr30k": FLICKR30K,
    "textvqa": TEXTVQA,
    "vizwiz": VIZWIZ,
    "pope": POPE,
    "mme": MME,
    "scienceqa": SCIENCEQA,
    "chartqa": CHARTQA,
    "docvqa": DOCVQA,
    "mmbench": MMBENCH,
    "seed": SEED,
    "mmmu": MMMU,
    "ai2d": AI2D,
}
