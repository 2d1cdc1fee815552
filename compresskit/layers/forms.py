"""Layers of a model changed for others for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from compresskit.layers.bitsandbytes_linear import Bnb4Linear, Bnb8Linear
from compresskit.layers.quant_linear import QuantLinear


@contextmanager
def swapped(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, these modules stand at these names."""
    before = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield
    finally:
        for name, layer in before.items():
            model.set_submodule(name, layer)


def onnx_forms(model: nn.Module) -> dict[str, nn.Module]:
    """By name, what layers become whose tensors no ONNX operator reads as they are."""
    layers = {
        n: layer for n, layer in model.named_modules() if isinstance(layer, QuantLinear | Bnb4Linear | Bnb8Linear)
    }
    forms = {name: layer.onnx_form() for name, layer in layers.items()}
    return {name: form for name, form in forms.items() if form is not layers[name]}


def re_expressed(model: nn.Module) -> dict[str, nn.Module]:
    """Of `onnx_forms` those that compute something else than the layer does: LLM.int8 without rounded activations."""
    return {n: layer.onnx_form() for n, layer in model.named_modules() if isinstance(layer, Bnb8Linear)}
