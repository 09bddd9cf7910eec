"""What models of 7 to 235 billion parameters take, by `sparsight.estimate`: nothing of them is loaded.

Every model is a LLaVA: CLIP-L at 336 x 336 (576 image tokens), and a language model of the named size. Calibration and
training samples have one picture, a question of 16 words and an answer of 4. All in bfloat16, on the CPU that this runs on.

    python benchmarks/large.py [--models llama-7b ...]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_suffix(".csv")
SIZES: dict[str, tuple[str, dict[str, Any]]] = {  # config.json of the published models
    "llama-7b": ("llama", {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                           "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064}),
    "qwen2.5-32b": ("qwen2", {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
                              "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064}),
    "qwen2.5-72b": ("qwen2", {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
                              "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064}),
    "qwen3-235b-a22b": ("qwen3_moe", {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94,
                                      "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128,
                                      "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536,
                                      "vocab_size": 151936}),
}  # fmt: skip
COLUMNS = ("date", "model", "stage", "settings", "moment", "peak GB", "beside weights GB", "PFLOP", "disk GB")


def make_folder(folder: Path, kind: str, sizes: dict[str, Any]) -> None:
    """Write a configuration and the demo model's processor, for pictures of 336 x 336."""
    from transformers import AutoConfig, AutoProcessor, CLIPVisionConfig, LlavaConfig

    from sparsight.demo import MODELS

    processor: Any = AutoProcessor.from_pretrained(MODELS["llava"])
    side = {"height": 336, "width": 336}
    processor.patch_size, processor.image_processor.size, processor.image_processor.crop_size = 14, side, side
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = LlavaConfig(
        vision_config=vision, text_config=AutoConfig.for_model(kind, **sizes, **ids), image_seq_length=576, dtype="bfloat16",
        image_token_index=tokenizer.convert_tokens_to_ids(processor.image_token),
    )  # fmt: skip
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def rows(name: str, folder: Path) -> list[list[Any]]:
    """The stages of one model, as they would be run."""
    from sparsight import estimate

    table = []

    def add(stage: str, settings: str, wanted: Any) -> None:
        there = wanted[stage]
        weights = there.memory.get("weights", 0)
        table.append([
            datetime.date.today(), name, stage, settings, there.moment, f"{there.peak / 1e9:.1f}",
            f"{(there.peak - weights) / 1e9:.1f}", f"{there.work / 1e15:.1f}", f"{sum(there.disk.values()) / 1e9:.0f}",
        ])  # fmt: skip
        print(*table[-1], sep=", ", flush=True)

    def cost(prune: dict[str, Any], **more: Any) -> Any:
        return estimate(folder, prune={"samples": 128, "batch_size": 8, "park": "always", **prune}, **more)

    small = {"batch_size": 1, "gradient_checkpointing": True, "steps": 100, "accumulate": 32}
    found = cost({"method": "wanda", "sparsity": 0.5}, restore=small, evaluate={"batch_size": 1, "samples": 100})
    add("load", "", found)
    add("prune", "wanda, 128 samples in batches of 8, parked", found)
    add("restore", "100 steps of 32 samples one by one, checkpointing", found)
    add("evaluate", "100 samples one by one", found)
    add("prune", "sparsegpt, 128 samples in batches of 8, parked", cost({"method": "sparsegpt", "sparsity": 0.5}))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*SIZES], choices=[*SIZES])
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    made = [list(COLUMNS)]
    for name in asked.models:
        folder = Path(tempfile.mkdtemp())
        try:
            make_folder(folder, *SIZES[name])
            made += rows(name, folder)
        finally:
            shutil.rmtree(folder)
    with TABLE.open("w", newline="") as file:
        csv.writer(file).writerows(made)


if __name__ == "__main__":
    main()
