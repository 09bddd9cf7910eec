"""The program that several processes run to restore: `torchrun ... tests/many_restores.py FOLDER KIND`.

KIND is `ddp`, `fsdp` for FSDP2, or `offload` for FSDP2 that keeps weights, gradients and moments in main memory. Accelerate
starts it on GPUs only: here it is told that CPUs are some. What is written goes to FOLDER/KIND/NAME; `one` runs in a single
process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

# isort: off
import zoo  # noqa: F401  before transformers
import torch
from accelerate import state
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy

from sparsight import distributed
from sparsight import api
from sparsight.restoring import trainer
# isort: on

FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}  # fmt: skip
STEPS: dict[str, Any] = {"steps": 4, "lr": 5e-3, "kl": 0.3, "save_every": 2}
JOBS: dict[str, dict[str, Any]] = {
    "shared": {"held_out": 3},
    "cached": {"teacher_mode": "cached", "accumulate": 2, "hidden": 0.1, "divergence": "js"},
    "masked-full": {"adapter": "masked-full", "gradient_checkpointing": True},
    "lora": {"adapter": "lora", "reconstruct": 1},
}
BATCH = 4  # samples of a step, over all processes


def work(folder: Path, kind: str) -> None:
    for name, how in JOBS.items():
        size = BATCH // distributed.world_size() // how.get("accumulate", 1)
        api.restore(
            folder / "sparse", folder / kind / name, data=folder / "data", batch_size=size, **{**STEPS, **how}
        )  # fmt: skip


def on_cpus() -> None:
    """Let accelerate shard on CPUs, and see to it that it does."""
    begin, train = state.PartialState.__init__, trainer.RestoreTrainer.train

    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = train(self, *args, **kwargs)
        kinds = {type(p.data).__name__ for p in self.model.parameters()}
        assert kinds == {"DTensor"}, kinds
        return done

    CPUOffloadPolicy.__init__.__defaults__ = (False,)  # memory is pinned for a GPU only
    state.PartialState.__init__ = patched
    trainer.RestoreTrainer.train = watched


if __name__ == "__main__":
    if sys.argv[2] != "ddp":
        os.environ.update(FSDP | {"FSDP_OFFLOAD_PARAMS": str(sys.argv[2] == "offload").lower()})
        on_cpus()
    torch.set_num_threads(1)
    distributed.init()
    assert distributed.world_size() == 2
    work(Path(sys.argv[1]), sys.argv[2])
