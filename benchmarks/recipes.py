"""The estimated cost of the recipes for real weights, for their headers: the numbers of `run --cost` and `sweep --cost`.

No weights are needed: every model is its published configuration (sizes from the config.json on the hub) with a processor
of its class, of the real picture size, and a small tokenizer. Data are pictures of 640 × 480, a question of 16 words and an
answer of 4; 25,000 samples to train on, 1,000 to score on.

    python benchmarks/recipes.py [RECIPE ...]
"""

from __future__ import annotations

import csv
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import zoo  # noqa: E402  isort: skip, before transformers

from sparsight.demo import MODELS as EMBEDDED  # noqa: E402
from sparsight.estimation import machine  # noqa: E402
from sparsight.estimation.recipe import estimate_recipe  # noqa: E402

SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
LLAMA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "head_dim": 128,
}  # fmt: skip
VIT_G = {
    "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16, "image_size": 224,
    "patch_size": 14,
}  # fmt: skip
QFORMER = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "encoder_hidden_size": 1408, "vocab_size": 30523, "max_position_embeddings": 512,
}  # fmt: skip
T5_XL = {
    "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 32,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "vocab_size": 32128,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {  # a model of the zoo, and the values of its configuration and processor to change
    "instructblip-flan-t5-xl": {
        "zoo": "instructblip-t5",
        "config": {"vision_config": VIT_G, "qformer_config": QFORMER, "text_config": T5_XL, "num_query_tokens": 32},
        "processor": {"num_query_tokens": 32}, "picture": {"size": {"height": 224, "width": 224}},
    },
    "instructblip-vicuna-7b": {
        "zoo": "instructblip-llama",
        "config": {
            "vision_config": VIT_G, "qformer_config": QFORMER, "text_config": {**LLAMA_7B, "vocab_size": 32001},
            "num_query_tokens": 32,
        },
        "processor": {"num_query_tokens": 32}, "picture": {"size": {"height": 224, "width": 224}},
    },
    "llava-1.5-7b": {
        "zoo": "llava",
        "config": {
            "vision_config": {
                "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                "image_size": 336, "patch_size": 14, "projection_dim": 768,
            },
            "text_config": {**LLAMA_7B, "vocab_size": 32064}, "image_seq_length": 576,
        },
        "processor": {"patch_size": 14},
        "picture": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    },
    "qwen2.5-vl-7b": {
        "zoo": "qwen2.5-vl",
        "config": {
            "vision_config": {
                "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
                "out_hidden_size": 3584, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
            },
            "text_config": {
                "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 152064, "layer_types": ["full_attention"] * 28,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            },
        },
        "processor": {}, "picture": {"patch_size": 14, "size": {"shortest_edge": 3136, "longest_edge": 12845056}},
    },
    "gemma-3-4b": {
        "zoo": "gemma3",
        "config": {
            "vision_config": {**SIGLIP, "image_size": 896},
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
                "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "query_pre_attn_scalar": 256,
                "sliding_window": 1024,
                "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(34)],
            },
            "mm_tokens_per_image": 256,
        },
        "processor": {"image_seq_length": 256}, "picture": {"size": {"height": 896, "width": 896}},
    },
    "smolvlm-2.2b": {
        "zoo": "smolvlm",
        "config": {
            "vision_config": {**SIGLIP, "image_size": 384},
            "text_config": {
                "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
                "num_key_value_heads": 32, "head_dim": 64, "vocab_size": 49280,
            },
            "scale_factor": 3,
        },
        "processor": {"image_seq_len": 81},
        "picture": {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}},
    },
    "qwen3-vl-8b": {
        "zoo": "qwen3-vl",
        "config": {
            "vision_config": {
                "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
                "out_hidden_size": 4096, "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
            },
            "text_config": {
                "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
                "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
            },
        },
        "processor": {}, "picture": {"patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 16777216}},
    },
    "gemma-4-e4b": {
        "zoo": "gemma4",
        "config": {
            "vision_config": {
                "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 12,
                "num_key_value_heads": 12, "head_dim": 64, "patch_size": 16, "pooling_kernel_size": 3,
            },
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42, "num_attention_heads": 8,
                "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 262144, "vocab_size_per_layer_input": 262144,
                "hidden_size_per_layer_input": 256, "num_kv_shared_layers": 18, "sliding_window": 512,
                "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(42)],
                "per_layer_config": {str(i): {"head_dim": 512 if i % 6 == 5 else 256} for i in (1, 3, *range(5, 42, 6))},
            },
        },
        "processor": {"image_seq_length": 280},
        "picture": {"patch_size": 16, "pooling_kernel_size": 3, "max_soft_tokens": 280},
    },
    "internvl3-8b": {
        "zoo": "internvl",
        "config": {
            "vision_config": {
                "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                "image_size": [448, 448], "patch_size": [14, 14],
            },
            "text_config": {
                "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151674, "layer_types": ["full_attention"] * 28,
            },
            "image_seq_length": 256,
        },
        "processor": {"image_seq_length": 256}, "picture": {"size": {"height": 448, "width": 448}, "max_patches": 12},
    },
    "llama-3.2-11b-vision": {
        "zoo": "mllama",
        "config": {
            "vision_config": {
                "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_global_layers": 8,
                "attention_heads": 16, "image_size": 560, "patch_size": 14, "vision_output_dim": 7680,
                "intermediate_layers_indices": [3, 7, 15, 23, 30],
            },
            "text_config": {
                "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 40, "num_attention_heads": 32,
                "num_key_value_heads": 8, "vocab_size": 128256, "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
            },
        },
        "processor": {}, "picture": {"size": {"height": 560, "width": 560}},
    },
}  # fmt: skip


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the values of `new`, in sections, too."""
    return old | {
        k: merged(old[k], v) if isinstance(old.get(k), dict) and isinstance(v, dict) else v for k, v in new.items()
    }


def configured(name: str, folder: Path) -> Path:
    """A folder with the real configuration and a processor for it."""
    wanted = MODELS[name]
    model, processor = zoo.build(wanted["zoo"])
    config = merged(model.config.to_dict(), wanted["config"]) | {"dtype": "bfloat16"}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for key, value in wanted["processor"].items():
        setattr(processor, key, value)
    for key, value in wanted["picture"].items():
        setattr(processor.image_processor, key, value)
    processor.save_pretrained(folder)
    return folder


def samples(folder: Path, count: int) -> Path:
    folder.mkdir()
    Image.new("RGB", (640, 480)).save(folder / "0.png")
    line = {"image": "0.png", "prompt": " ".join(["what"] * 16) + "?", "answer": " ".join(["red"] * 4)}
    (folder / "metadata.jsonl").write_text((json.dumps(line) + "\n") * count)
    return folder


def main() -> None:
    asked, rows = sys.argv[1:] or list(MODELS), []
    base = machine.measured_base(str(EMBEDDED["llava"]), torch.bfloat16)  # memory of the libraries, the same for all
    machine.measured_base = lambda where, dtype: base
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        data, held_out = samples(home / "train", 25_000), samples(home / "test", 1_000)
        for name in asked:
            path = next((ROOT / "recipes").rglob(f"{name}.yaml"))
            model = configured(name, home / name)
            made = estimate_recipe(path, [f"model={model}", f"data={data}", f"held_out={held_out}"], timed=False)
            peaks = {stage.name: stage.peak / 1e9 for stage in made.stages}
            work = {stage.name: stage.work * made.times.get(stage.name, 0) / 1e15 for stage in made.stages}
            print(f"{name}: {made.tokens}")
            for stage, peak in peaks.items():
                print(
                    f"  {stage:<9} x {made.times.get(stage, 1):>2}  {work[stage]:>10,.1f} PFLOPs in all  {peak:>6.1f} GB",
                    flush=True,
                )
                rows.append([name, stage, made.times.get(stage, 1), f"{work[stage]:.1f}", f"{peak:.1f}"])
    with Path(__file__).with_suffix(".csv").open("w", newline="") as file:
        today = datetime.date.today()
        columns = ("date", "torch", "recipe", "stage", "times", "PFLOPs in all", "peak GB")
        csv.writer(file).writerows([columns, *([today, torch.__version__, *row] for row in rows)])


if __name__ == "__main__":
    main()
