"""How transformers reads a packed folder: `AutoModel....from_pretrained(FOLDER)` after `import sparsight`.

By default every weight is expanded while it is loaded, and the result is an ordinary dense model: it can be trained, saved
and pruned. With `packed` in the folder's `quantization_config`, linear layers stay packed in memory (`SparseLinear`), and
whatever else is packed, as fused experts, is expanded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsight.errors import SparsightError, first_line
from sparsight.packing.linear import SMALL, SparseLinear, use_own_products
from sparsight.packing.shards import METHOD, check_layout, expand, widths
from sparsight.packing.squeeze import unsqueeze
from sparsight.packing.tensor import BITS, SCALE

errors: list[str] = []  # what went wrong with packed tensors while a model was loaded


class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed folder.

    `layers` has `[shape, kept]` by the names of the tensors in the files, `kept` None for one that is squeezed only;
    `values` is `kept` or `int8`; `packed` keeps linear layers packed in memory, those below `SMALL` only as "all".
    """

    def __init__(
        self, format: int = 0, values: str = "kept", layers: Any = None, packed: bool | str = False, **others: Any
    ) -> None:  # fmt: skip
        check_layout({"format": format, "values": values, "layers": layers}, "config.json")
        self.quant_method: Any = METHOD
        self.format, self.values, self.layers, self.packed = format, values, dict(layers), packed
        self.others = others

    @property
    def dequantize(self) -> bool:
        """Whether the model is an ordinary one once it is loaded; transformers then drops this configuration."""
        return not self.packed

    def to_dict(self) -> dict[str, Any]:
        """What is written into config.json; how a model is kept in memory is not."""
        return {"quant_method": METHOD, "format": self.format, "values": self.values, "layers": self.layers}


class PackedQuantizer(HfQuantizer):
    """Reads packed weights; see the module."""

    requires_calibration = False
    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise SparsightError("a model is not packed while it is loaded; pack its folder with `sparsight.pack`")
        layers = quantization_config.layers
        self.widths = widths(layers)
        self.in_memory: dict[str, str] = {}  # modules of layers that stay packed, by the names of their tensors
        parts = ("", BITS, SCALE) if quantization_config.values == "int8" else ("", BITS)
        leaves = dict.fromkeys(name.rpartition(".")[2] for name in layers)
        self.serialized_names = {leaf: [leaf + part for part in parts] for leaf in leaves}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Nothing is needed beside torch."""

    def get_load_operations(self) -> dict[str, Any]:
        """One operation reads a packed tensor in both modes."""
        return {"dequantize": Expand, "deserialize": Expand}

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype of a tensor of floats that is not packed; packed ones are cast once they are dense."""
        operations = [op for op in getattr(converter, "operations", ()) if isinstance(op, Expand)]
        for operation in operations:
            operation.dtype = dtype if dtype is not None and dtype.is_floating_point else None
        stored = param.get_dtype() if hasattr(param, "get_dtype") else ""
        return dtype if not operations and stored.startswith(("F", "BF")) else None

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """No parameter: packed ones come from the files as they are."""
        return False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.quantization_config.packed:
            self._put_sparse_layers(model)
        return model

    def _put_sparse_layers(self, model: Any) -> None:
        """Put a `SparseLinear` where a linear layer's weight is packed in the files."""
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        known = model.state_dict()
        int8 = self.quantization_config.values == "int8"
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        for key, (shape, kept) in self.quantization_config.layers.items():
            name, merged = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
            path, _, leaf = name.rpartition(".")
            if kept is None or merged is not None or leaf != "weight" or name not in known or name in tied:
                continue
            linear = model.get_submodule(path)
            small = linear.weight.numel() < SMALL and self.quantization_config.packed != "all"
            if type(linear) is nn.Linear and list(linear.weight.shape) == list(shape) and not small:
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, SparseLinear.empty(linear, kept, int8))
                self.in_memory[key] = path

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # the conversions that were run read packed tensors; a model is saved by those of its own
        model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
        config = self.quantization_config
        for path in self.in_memory.values():
            model.get_submodule(path).requires_grad_(False)
        if config.packed:
            use_own_products(model)
        config.layers = {key: config.layers[key] for key in self.in_memory}  # the rest is dense by now
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """What is saved: values of rows that keep the same number each have a row each."""
        state = model.state_dict()
        for path in self.in_memory.values():
            state[f"{path}.weight"] = model.get_submodule(path).packed.by_row().values
        return state, {}

    def is_serializable(self) -> bool:
        """A model with packed layers is saved as a packed folder."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed layers are for inference."""
        return False


class Expand(ConversionOps):
    """Dense tensors of packed ones, whatever the model's own operations then make of them."""

    supports_many_to_many = True

    def __init__(self, quantizer: PackedQuantizer) -> None:
        self.quantizer = quantizer
        self.dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: Any) -> Expand:
        return Expand(self.quantizer)

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """`{pattern: [tensors]}` with patterns of bits and scales -> the same without them, dense."""
        name = kwargs.get("full_layer_name")
        try:
            stays = self._stays_packed(kwargs.get("model"), name)
            result = self._convert(input_dict, stays)
            if not stays and source_patterns[0] in self.quantizer.serialized_names:  # nothing follows
                self._check_shape(result, kwargs.get("model"), name)
            return result
        except (SparsightError, RuntimeError) as error:
            errors.append(f"{name}: {first_line(error)}")  # transformers hides it in a report
            raise

    def _convert(self, input_dict: dict[str, Any], stays: bool) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, tensors in input_dict.items():
            if name.endswith((BITS, SCALE)) and self._is_part(name, input_dict):
                continue
            values = _listed(tensors)
            bits, scale = (_listed(input_dict.get(name + part)) for part in (BITS, SCALE))
            if not stays:
                result[name] = self._expand_all(name, values, bits, scale)
                continue
            result[name] = [self._cast(unsqueeze(v) if v.dtype == torch.uint8 else v).reshape(-1) for v in values]
            result |= {name + part: list(others) for part, others in ((BITS, bits), (SCALE, scale)) if others}
        return result

    def _expand_all(self, name: str, values: list[Any], bits: list[Any], scale: list[Any]) -> list[torch.Tensor]:
        """Expand those of `values` that are packed; their bits come in the same order."""
        left, scales, dense = list(bits), list(scale), []
        for tensor in values:
            if tensor.dtype == torch.uint8 and tensor.ndim == 1:
                tensor = unsqueeze(tensor)
            columns = self.quantizer.widths.get(tuple(left[0].shape)) if left else None
            if not left or (columns is not None and tuple(tensor.shape) == (*left[0].shape[:-1], columns)):
                dense.append(self._cast(tensor))
                continue
            dense.append(expand(tensor, left.pop(0), scales.pop(0) if scales else None, columns, self.dtype))
        if left:
            raise SparsightError(f"{name}: {len(left)} masks have no values; copy the folder again")
        return dense

    @staticmethod
    def _check_shape(result: dict[str, Any], model: Any, name: str | None) -> None:
        """Refuse what is not of its parameter's shape: kept values without their bits, which transformers would take."""
        path, _, leaf = (name or "").rpartition(".")
        (tensors,) = result.values()
        expected = getattr(model.get_submodule(path), leaf).shape
        if tensors[0].shape != expected:
            raise SparsightError(f"is {list(tensors[0].shape)} and should be {list(expected)}; copy the folder again")

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    @staticmethod
    def _is_part(name: str, inside: dict[str, Any]) -> bool:
        """Whether a name that ends as a part's does belongs to another tensor."""
        return any(name.endswith(part) and name.removesuffix(part) in inside for part in (BITS, SCALE))

    @staticmethod
    def _stays_packed(model: Any, name: str | None) -> bool:
        path, _, leaf = (name or "").rpartition(".")
        if leaf != "weight" or model is None:
            return False
        try:
            return isinstance(model.get_submodule(path), SparseLinear)
        except AttributeError:
            return False

    @property
    def reverse_op(self) -> ConversionOps:
        """Nothing: models are saved by the conversions of their own."""
        return self


def _listed(tensors: Any) -> list[torch.Tensor]:
    return [] if tensors is None else list(tensors) if isinstance(tensors, list) else [tensors]


def register() -> None:
    """Make the reader known to transformers; a second call changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(PackedConfig)
        register_quantizer(METHOD)(PackedQuantizer)
