"""How transformers reads a packed folder: `AutoModel....from_pretrained(FOLDER)` after `import sparsight`.

By default every weight is expanded while it is loaded, and the result is an ordinary dense model: it can be trained, saved
and pruned. With `packed` in the folder's `quantization_config`, linear layers stay packed in memory (`SparseLinear`), and
whatever else is packed, as fused experts, is expanded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import suppress
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
from sparsight.packing.tensor import BITS, SCALE, Packed

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
        self.parts = (BITS, SCALE) if quantization_config.values == "int8" else (BITS,)
        self.places: dict[str, tuple[str, str]] = {}  # what a stored name becomes, and the pattern that collects it
        self.conversions: list[tuple[Any, Any]] = []  # the model's own, and what is run for each

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Nothing is needed beside torch."""

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The model's own conversions, with an expansion before each, and one for tensors that none of them collects.

        Patterns match the names of tensors and not those of their parts. So every stored name gets its place here, the one
        that its tensor has by the model's own rules, and is hidden from them while a model is loaded.
        """
        run = [_expand_first(c, self) if isinstance(c, WeightConverter) else c for c in weight_conversions]
        self.conversions = list(zip(weight_conversions, run, strict=True))
        renamings = [c for c in run if isinstance(c, WeightRenaming)]
        converters = [c for c in run if isinstance(c, WeightConverter)]
        known, prefix = model.state_dict(), model.base_model_prefix
        for key in self.quantization_config.layers:
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:  # as transformers does
                name, pattern = rename_source_key(key, [], [], prefix, known)
            self.places |= {key + part: (name, (pattern or Collect.PATTERN) + part) for part in ("", *self.parts)}
        return [Hide(self.places), Collect(self), *run]

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
        # for saving, which runs them in the opposite order
        model._weight_conversions = [own for own, run in self.conversions if run.was_used()]
        if self.in_memory:
            parts = [
                (key + part, f"{path}.weight{part}") for key, path in self.in_memory.items() for part in ("", *self.parts)
            ]
            stored, inside = zip(*parts, strict=True)
            model._weight_conversions = [Show(stored), *model._weight_conversions, Hide(inside)]
        config = self.quantization_config
        for path in self.in_memory.values():
            layer = model.get_submodule(path)
            layer.requires_grad_(False)
            with suppress(SparsightError):  # of a damaged file, transformers says more
                layer.count()  # before torch.compile looks at it
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

    def __init__(
        self, quantizer: PackedQuantizer, sources: list[str], targets: Sequence[str] = (), then: Sequence[Any] = ()
    ) -> None:  # fmt: skip
        self.quantizer = quantizer
        self.sources, self.targets, self.then = sources, targets, then  # the conversion, without parts of tensors
        self.dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: Any) -> Expand:
        return Expand(self.quantizer, self.sources, self.targets, copy.deepcopy(self.then, memo))

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """`{pattern: [tensors]}` with patterns of bits and scales -> the same without them, dense.

        **Raises** `SparsightError` for damaged files and for weights that are split over devices.
        """
        name, model = str(kwargs.get("full_layer_name")), kwargs.get("model")
        try:
            if (getattr(model, "_tp_size", None) or 1) > 1:
                raise SparsightError(
                    "a packed weight cannot be split over devices (tensor parallel); unpack the folder first"
                )
            layer = self._sparse_layer(model, name)
            dense = self._convert(input_dict, layer)
            if not self.targets and layer is None:  # nothing follows
                self._check_shape(dense[Collect.PATTERN], model, name)
        except (SparsightError, RuntimeError) as error:
            errors.append(f"{name}: {first_line(error)}")  # transformers hides it in a report
            raise
        if not self.targets:
            return {name + key.removeprefix(Collect.PATTERN): tensors for key, tensors in dense.items()}
        for operation in self.then:
            dense = operation.convert(dense, **{**kwargs, "source_patterns": self.sources, "target_patterns": self.targets})
        return dense

    def _convert(self, input_dict: dict[str, Any], layer: SparseLinear | None) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name in self.sources:
            values, bits, scale = (_listed(input_dict.get(name + part)) for part in ("", BITS, SCALE))
            if not values and not bits:
                continue
            if len(values) < len(bits):
                raise SparsightError(f"{len(bits) - len(values)} masks have no values; copy the folder again")
            if layer is None and SCALE in self.quantizer.parts and len(scale) != len(bits):
                raise SparsightError(f"{len(bits)} masks have {len(scale)} scales; copy the folder again")
            if layer is None:
                result[name] = self._expand_all(values, bits, scale)
                continue
            kept = self._cast(unsqueeze(values[0]) if values[0].dtype == torch.uint8 else values[0]).reshape(-1)
            if bits and len(kept) == len(layer.weight):  # else the report says more
                layer.count(Packed(kept, bits[0], (layer.out_features, layer.in_features), scale[0] if scale else None))
            result |= {name: [kept]} | {name + part: other for part, other in ((BITS, bits), (SCALE, scale)) if other}
        return result

    def _expand_all(self, values: list[Any], bits: list[Any], scale: list[Any]) -> list[torch.Tensor]:
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
            raise SparsightError(f"{len(left)} masks have no values; copy the folder again")
        return dense

    @staticmethod
    def _check_shape(tensors: list[torch.Tensor], model: Any, name: str) -> None:
        """Refuse what is not of its parameter's shape: kept values without their bits, which transformers may take."""
        path, _, leaf = name.rpartition(".")
        expected = getattr(model.get_submodule(path), leaf).shape
        if tensors[0].shape != expected:
            raise SparsightError(f"is {list(tensors[0].shape)} and should be {list(expected)}; copy the folder again")

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    @staticmethod
    def _sparse_layer(model: Any, name: str) -> SparseLinear | None:
        """The layer that a tensor stays packed for."""
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or model is None:
            return None
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            return None
        return layer if isinstance(layer, SparseLinear) else None

    @property
    def reverse_op(self) -> ConversionOps:
        """Nothing: models are saved by the conversions of their own."""
        return self


class Hide(WeightRenaming):
    """Gives tensors of packed layers names that no other renaming knows."""

    MARK = "sparsight/"

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(self.MARK, self.MARK)
        self.numbers = {name: f"{self.MARK}{number}" for number, name in enumerate(names)}

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The hidden name; any other as it is."""
        return self.numbers.get(source_key, source_key), None

    def reverse_transform(self) -> Hide:
        """The same: it is for one direction."""
        return self


class Show(WeightRenaming):
    """Gives hidden tensors the names that they have in files."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(Hide.MARK, Hide.MARK)
        self.names = list(names)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name in files of a hidden one; any other as it is."""
        _, mark, number = source_key.rpartition(Hide.MARK)
        return (self.names[int(number)] if mark else source_key), None

    def reverse_transform(self) -> Show:
        """The same: it is for one direction."""
        return self


class Collect(WeightConverter):
    """Gives hidden names their places, and expands the tensors that no conversion of the model collects."""

    PATTERN = "packed"

    def __init__(self, quantizer: PackedQuantizer) -> None:
        patterns = [self.PATTERN + part for part in ("", *quantizer.parts)]
        super().__init__(patterns, self.PATTERN, [Expand(quantizer, patterns[:1])])
        self.places = _Shared(quantizer.places.values())

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """What a hidden name becomes, and the pattern that collects its tensor."""
        _, mark, number = source_key.rpartition(Hide.MARK)
        return self.places[int(number)] if mark else (source_key, None)


class _Shared(tuple[Any, ...]):
    """Entries that every copy of a conversion shares; transformers makes one for each tensor."""

    def __deepcopy__(self, memo: Any) -> _Shared:
        return self


def _expand_first(converter: Any, quantizer: PackedQuantizer) -> Any:
    """A conversion of a model that collects the parts of its tensors, too, and expands them before its own operations."""
    sources, targets = list(converter.source_patterns), list(converter.target_patterns)
    parts = [source + part for source in sources for part in quantizer.parts]
    expand = Expand(quantizer, sources, targets, converter.operations)
    return converter.copy([*sources, *parts], list(converter._original_target_patterns), operations=[expand])


def _listed(tensors: Any) -> list[torch.Tensor]:
    return [] if tensors is None else list(tensors) if isinstance(tensors, list) else [tensors]


def register() -> None:
    """Make the reader known to transformers; a second call changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(PackedConfig)
        register_quantizer(METHOD)(PackedQuantizer)
