"""The tensors that describe one random picture, in the form that a model takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SIDE = 32
Random = Callable[..., Tensor]  # random(*shape)
Form = Callable[[Any, int, Random], dict[str, Tensor]]  # form(model, number of the sample, random)

_GRIDS = ((8, 8), (4, 8), (8, 4))  # in patches; even, so that two by two of them can be merged


def pictures(model: Any, number: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The vision inputs of one sample; the first axis joins samples."""
    wanted = inspect.signature(model.forward).parameters
    config = model.config
    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
    kind = config.model_type

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(model.dtype)

    if kind in FORMS:
        return FORMS[kind](model, number, random)
    patch = getattr(vision, "patch_size", 4)
    patch = patch if isinstance(patch, int) else patch[0]
    if "image_grid_thw" in wanted:
        rows, columns = _GRIDS[number % 3]
        per = getattr(vision, "temporal_patch_size", getattr(vision, "patch_temporal", 1)) * 3 * patch * patch
        return {"pixel_values": random(rows * columns, per), "image_grid_thw": torch.tensor([[1, rows, columns]])}
    if hasattr(config, "image_grid_pinpoints"):
        return {
            "pixel_values": random(1, 3, 3, SIDE, SIDE),
            "image_sizes": torch.tensor([(60, 30), (30, 60)][number % 2])[None],
        }
    if "pixel_attention_mask" in wanted:
        return {"pixel_values": random(1, 1, 3, SIDE, SIDE), "pixel_attention_mask": torch.ones(1, 1, SIDE, SIDE).long()}
    if "image_sizes" in wanted and getattr(vision, "model_type", "") == "pixtral":
        sizes = torch.tensor([[(SIDE, SIDE), (16, SIDE)][number % 2]])
        return {"pixel_values": random(1, 3, SIDE, SIDE), "image_sizes": sizes}
    if "pixel_values" in wanted:
        return {"pixel_values": random(1, 3, SIDE, SIDE)}
    return {}


def _grid(number: int) -> tuple[int, int]:
    return _GRIDS[number % 3]


def _conv_patches(model: Any, number: int, random: Random) -> dict[str, Tensor]:
    """Patches (n, 3, p, p) with their grid."""
    rows, columns = _grid(number)
    patch = model.config.vision_config.patch_size
    grid = torch.tensor([[1, rows, columns]])
    return {"pixel_values": random(rows * columns, 3, patch, patch), "image_grid_thw": grid}


def _merged(model: Any, number: int, random: Random) -> dict[str, Tensor]:
    rows, columns = _grid(number)
    made = {"pixel_values": random(rows * columns, 48), "image_grid_thw": torch.tensor([[1, rows, columns]])}
    return {**made, "image_merge_sizes": torch.tensor([2])}


def _shapes(model: Any, number: int, random: Random) -> dict[str, Tensor]:
    """Rows of patches, padded to the longest, with the grid of each."""
    rows, columns = _grid(number)
    mask = (torch.arange(64) < rows * columns).long()[None]
    shapes = torch.tensor([[rows, columns]])
    return {"pixel_values": random(1, 64, 48) * mask[..., None], "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _strips(model: Any, number: int, random: Random) -> dict[str, Tensor]:
    """All pictures in one strip of patches, one after the other."""
    rows, columns = _grid(number)
    return {"pixel_values": random(1, 3, 4, 4 * rows * columns), "target_sizes": torch.tensor([[rows, columns]])}


def _flat(model: Any, number: int, random: Random) -> dict[str, Tensor]:
    """Patches with row and column in front; zeros where there is no patch."""
    rows, columns = _grid(number)
    places = torch.cartesian_prod(torch.arange(1, rows + 1), torch.arange(1, columns + 1)).float()
    patches = torch.zeros(1, 64, 50, dtype=model.dtype)
    patches[0, : rows * columns] = torch.cat([places, random(rows * columns, 48)], 1)
    return {"flattened_patches": patches}


def _tiles(model: Any, number: int, random: Random) -> dict[str, Tensor]:
    """Up to four tiles, as many as the ratio of the sides asks for."""
    tiles = (2, 1)[number % 2]
    mask = (torch.arange(4) < tiles).long()[None, None]
    pixels = random(1, 1, 4, 3, SIDE, SIDE) * mask[..., None, None, None]
    return {"pixel_values": pixels, "aspect_ratio_mask": mask, "aspect_ratio_ids": torch.tensor([[tiles]])}


def _two_sizes(model: Any, number: int, random: Random) -> dict[str, Tensor]:
    high = model.config.high_res_vision_config.image_size
    return {"pixel_values": random(1, 3, SIDE, SIDE), "high_res_pixel_values": random(1, 3, high, high)}


def _placed(model: Any, number: int, random: Random) -> dict[str, Tensor]:
    """Patches with their places."""
    rows, columns = _grid(number)
    places = torch.full((1, 64, 2), -1)
    places[0, : rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1)
    pixels = random(1, 64, _patch_width(model)) * (places[..., :1] >= 0)
    return {"pixel_values": pixels.sigmoid(), "image_position_ids": places}


def _patch_width(model: Any) -> int:
    vision = model.config.vision_config
    side = vision.patch_size
    if model.config.model_type == "gemma4_unified":
        side *= vision.pooling_kernel_size
    return 3 * side * side


def _hw(model: Any, number: int, random: Random) -> dict[str, Tensor]:
    rows, columns = _grid(number)
    return {"pixel_values": random(rows * columns, 48), "image_grid_hw": torch.tensor([[rows, columns]])}


def _robot(model: Any, number: int, random: Random) -> dict[str, Tensor]:
    """A picture, the state of a robot, and the actions to learn."""
    config = model.config
    made = {"pixel_values": random(1, 1, 3, SIDE, SIDE), "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}
    shape = (1, config.chunk_size, config.max_action_dim)
    made |= {"state": random(1, config.max_state_dim), "noise": random(*shape), "actions": random(*shape)}
    return {**made, "timestep": random(1).sigmoid()}


def _pooled(model: Any, number: int, random: Random) -> dict[str, Tensor]:
    """Patches, and which of them are pooled to one token: two by two."""
    grid = torch.arange(64).view(4, 2, 4, 2).transpose(1, 2).reshape(16, 4)
    grids = torch.tensor([[0, 0, 4, 4]])
    made = {"pixel_values": random(1, 64, 48), "image_token_pooling": grid, "image_grids": grids}
    return {**made, "image_num_crops": torch.ones(1, dtype=torch.long)}


def _noisy(model: Any, number: int, random: Random) -> dict[str, Tensor]:
    """A picture for the prompt, and a noisy text to be refined."""
    canvas = random(1, model.config.canvas_length).mul(20).long().clamp(-50, 49) + 150
    return {**_placed(model, number, random), "decoder_input_ids": canvas}


def _crops(model: Any, number: int, random: Random) -> dict[str, Tensor]:
    """The whole picture, and two crops side by side or one above the other."""
    size = [(SIDE, 2 * SIDE), (2 * SIDE, SIDE)][number % 2]
    made = {"image_pixel_values": random(1, 3, 3, SIDE, SIDE), "image_sizes": torch.tensor([size])}
    return {**made, "image_attention_mask": torch.ones(1, 3, 8, 8, dtype=torch.long)}


FORMS: dict[str, Form] = {
    "diffusion_gemma": _noisy,
    "emu3": lambda model, number, random: {
        "pixel_values": random(1, 3, SIDE, SIDE), "image_sizes": torch.tensor([[SIDE, SIDE]])
    },
    "gemma4": _placed,
    "gemma4_unified": _placed,
    "inkling2": lambda model, number, random: {
        "pixel_values": random(_grid(number)[0] * _grid(number)[1], 8, 8, 3),
        "image_grid_thw": torch.tensor([[1, *_grid(number)]]),
    },
    "inkling_mm_model": lambda model, number, random: {"pixel_values": random(4, 2, 2, 2, 3)},
    "perception_lm": lambda model, number, random: {"pixel_values": random(1, 1, 3, SIDE, SIDE)},
    "molmo2": _pooled,
    "nemotron_h_omni": _hw,
    "phi4_multimodal": _crops,
    "pi0": _robot,
    "deepseek_vl_hybrid": _two_sizes,
    "evolla": lambda model, number, random: {
        "protein_input_ids": random(1, 12).mul(20).long().clamp(-50, 49) + 100,
        "protein_attention_mask": torch.ones(1, 12, dtype=torch.long),
    },
    "fuyu": lambda model, number, random: {"image_patches": random(1, 16, 48)},
    "granite_docling": lambda model, number, random: {
        "pixel_values": random(1, 2, 3, SIDE, SIDE), "pixel_attention_mask": torch.tensor([[True, number % 2 == 0]])
    },
    "idefics": lambda model, number, random: {"pixel_values": random(1, 1, 3, SIDE, SIDE)},
    "instructblipvideo": lambda model, number, random: {"pixel_values": random(1, 2, 3, SIDE, SIDE)},
    "kimi_k25": _conv_patches,
    "kosmos-2.5": _flat,
    "lfm2_vl": _shapes,
    "minicpm_ocr": _strips,
    "minicpmv4_6": _strips,
    "minicpmv4_7": _strips,
    "mllama": _tiles,
    "paddleocr_vl": _conv_patches,
    "pix2struct": _flat,
    "video_llama_3": _merged,
}  # fmt: skip

# types whose text holds no place for a picture
WITHOUT = ("blip", "git", "mllama", "idefics", "kosmos-2", "kosmos-2.5")


def _queries(model: Any, picture: dict[str, Tensor]) -> int:
    return int(model.config.num_query_tokens) * (
        len(picture["pixel_values"][0]) if picture["pixel_values"].dim() == 5 else 1
    )


@torch.no_grad()
def _deepstack(model: Any, picture: dict[str, Tensor]) -> int:
    return len(model.model.get_image_features(**picture).deepstack_features[0][1][0])


# how many tokens a picture takes, where `get_image_features` does not say
COUNTS: dict[str, Callable[[Any, dict[str, Tensor]], int]] = {
    "blip-2": _queries,
    "instructblip": _queries,
    "instructblipvideo": _queries,
    "diffusion_gemma": lambda model, picture: int((picture["image_position_ids"][..., 0] >= 0).sum()) // 4,
    "fuyu": lambda model, picture: 16,
    "granite4_vision": _deepstack,
    "phi4_multimodal": lambda model, picture: 21 + (36 if picture["image_sizes"][0, 0] == SIDE else 40),
    "pi0": lambda model, picture: 64,
    "perception_lm": lambda model, picture: 64,
}


def _asked(model: Any, batch: dict[str, Tensor]) -> None:
    """A Q-Former reads the prompt, too."""
    batch["qformer_input_ids"] = batch["input_ids"][:, -4:].clone()
    batch["qformer_attention_mask"] = torch.ones_like(batch["qformer_input_ids"])


def _crossed(model: Any, batch: dict[str, Tensor]) -> None:
    batch["cross_attention_mask"] = batch["aspect_ratio_mask"][:, None].repeat(1, batch["input_ids"].shape[1], 1, 1)


def _apart(model: Any, batch: dict[str, Tensor]) -> None:
    """The numbers of patches go on from one sample to the next."""
    start = torch.arange(len(batch["input_ids"])).repeat_interleave(16)[:, None]
    batch["image_token_pooling"] = batch["image_token_pooling"] + 64 * start


def _seen_by_all(model: Any, batch: dict[str, Tensor]) -> None:
    batch["image_attention_mask"] = torch.ones_like(batch["input_ids"])[..., None]


def _queried(model: Any, batch: dict[str, Tensor]) -> None:
    """The picture stands after the first token, for as many tokens as there are queries."""
    ids, count = batch["input_ids"], model.config.latent_query_num
    for key, value in (("input_ids", 6), ("attention_mask", 1), ("labels", -100)):
        more = torch.full((len(ids), count), value)
        batch[key] = torch.cat([batch[key][:, :1], more, batch[key][:, 1:]], 1)
    batch["image_embeds_position_mask"] = (batch["input_ids"] == 6).long()


def _patches_alone(model: Any, batch: dict[str, Tensor]) -> None:
    """The encoder reads patches, not words."""
    batch["attention_mask"] = (batch["flattened_patches"].abs().sum(-1) > 0).long()


def _decoded(model: Any, batch: dict[str, Tensor]) -> None:
    """A decoder that reads no prompt."""
    del batch["input_ids"], batch["attention_mask"]
    start = torch.full((len(batch["labels"]), 1), model.config.text_config.decoder_start_token_id)
    batch["decoder_input_ids"] = torch.cat([start, batch["labels"][:, :-1].clamp(min=0)], 1)


def _boxes(model: Any, batch: dict[str, Tensor]) -> None:
    """Where each word stands on the page."""
    count = batch["input_ids"].numel()
    corner = torch.arange(count) % 8 / 10
    boxes = torch.stack([corner, corner, corner + 0.1, corner + 0.1], -1)
    batch["bbox"] = boxes.view(*batch["input_ids"].shape, 4)


# what else a batch needs, in place
EXTRAS: dict[str, Callable[[Any, dict[str, Tensor]], None]] = {
    "idefics": _seen_by_all,
    "instructblip": _asked,
    "instructblipvideo": _asked,
    "kosmos-2": _queried,
    "kosmos-2.5": _queried,
    "mllama": _crossed,
    "molmo2": _apart,
    "pix2struct": _patches_alone,
    "pp_formulanet": _decoded,
    "udop": _boxes,
}
