"""The edit that holds linears in bitsandbytes' formats, and the checkpoint that transformers reads by itself.

    student  X.codes X.absmax …   ⇄   checkpoint  X.weight X.weight.absmax X.weight.quant_state.bitsandbytes__nf4 …
                                      config.json quantization_config: {quant_method: bitsandbytes, …}

Written from the student's own tensors, never from bitsandbytes' layers: on a CPU with AVX512-BF16 these rearrange their
weights at the first call and keep absmaxes as transposed bfloat16, and bitsandbytes 0.50 saves these without turning
them back, so that a model which has answered once and is saved loads as another one.
"""

import importlib
import importlib.util
import json
import re
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from compresskit.errors import CompressKitError
from compresskit.layers.bitsandbytes_linear import BLOCK, NESTED_BLOCK, Bnb4Linear, Bnb8Linear, code_table
from compresskit.model_folder import BITSANDBYTES_METHOD
from compresskit.surgery.edits import EDITS, Replacing, set_module

Format = Literal["nf4", "fp4", "int8"]
#: As many digits as the offset of absmaxes usually has; it stands for one that is not there yet.
_USUAL_OFFSET = 0.01234567890123456


@EDITS.add
class HoldBitsAndBytes(Replacing):
    """Hold linears as NF4, FP4 or LLM.int8."""

    kind: Literal["bitsandbytes"] = "bitsandbytes"
    targets: tuple[str, ...]
    format: Format
    #: whether absmaxes of 4-bit formats are 8-bit codes themselves
    double_quant: bool = False
    #: of int8: |input| from which a column is multiplied in float
    threshold: float = 6.0

    def apply(self, model: nn.Module) -> None:
        """Insert layers of zero codes; the pass fills them."""
        for name in self.targets:
            old = self._linear(model, name)
            shape: dict[str, Any] = {"bias": old.bias is not None, "device": old.weight.device}
            if self.format == "int8":
                new: nn.Module = Bnb8Linear(old.in_features, old.out_features, threshold=self.threshold, **shape)
            else:
                form: dict[str, Any] = {"form": self.format, "double_quant": self.double_quant}
                new = Bnb4Linear(old.in_features, old.out_features, **form, **shape)
            set_module(model, name, new)


def load_bitsandbytes() -> ModuleType:
    """The package itself, which is optional and takes seconds to import.

    Raises:
        CompressKitError: it is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CompressKitError("bitsandbytes is not installed", fix="pip install 'compresskit[bitsandbytes]'")
    return importlib.import_module("bitsandbytes")


def bitsandbytes_layers(model: nn.Module) -> dict[str, Bnb4Linear | Bnb8Linear]:
    """The layers that hold one of the formats, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Bnb4Linear | Bnb8Linear)}


@torch.no_grad()
def encode_weight(layer: Bnb4Linear | Bnb8Linear, weight: Tensor) -> None:
    """Fill a layer with the codes that bitsandbytes gives an (out, in) float32 weight."""
    functional = load_bitsandbytes().functional
    if isinstance(layer, Bnb8Linear):
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        layer.codes.copy_(codes.masked_fill(scales[:, None] == 0, 0))  # 0 / 0 has no one code
        layer.scales.copy_(scales)
        return
    nested = {"compress_statistics": layer.double_quant}
    packed, state = functional.quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type=layer.form, **nested)
    _take_4bit(layer, packed, state)


def _take_4bit(layer: Bnb4Linear, packed: Tensor, state: Any) -> None:
    """Take over codes and bitsandbytes' `QuantState`."""
    layer.codes.copy_(packed.view(-1))
    layer.absmax.copy_(state.absmax)
    if layer.nested_absmax is not None and layer.nested_map is not None and layer.offset is not None:
        layer.nested_absmax.copy_(state.state2.absmax)
        layer.nested_map.copy_(state.state2.code)
        layer.offset.copy_(state.offset)


def stock_tensors(layer: Bnb4Linear | Bnb8Linear) -> dict[str, Tensor]:
    """A layer's tensors, bias apart, as bitsandbytes' own layer saves them, by the end of their names."""
    if isinstance(layer, Bnb8Linear):
        return {"weight": layer.codes, "SCB": layer.scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    said: dict[str, Any] = {"quant_type": layer.form, "blocksize": BLOCK, "dtype": "float32"}
    said["shape"] = [layer.out_features, layer.in_features]
    tensors = {
        "weight": layer.codes[:, None],
        "weight.absmax": layer.absmax,
        "weight.quant_map": code_table(layer.form),
    }
    if layer.nested_absmax is not None and layer.nested_map is not None and layer.offset is not None:
        offset = _USUAL_OFFSET if layer.offset.is_meta else layer.offset.item()
        said |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        tensors |= {"weight.nested_absmax": layer.nested_absmax, "weight.nested_quant_map": layer.nested_map}
    text = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    return tensors | {f"weight.quant_state.bitsandbytes__{layer.form}": text}


def stock_weights(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint with those of bitsandbytes' layers as transformers reads them."""
    layers = bitsandbytes_layers(model)
    own = {f"{name}.{buffer}" for name, layer in layers.items() for buffer, _ in layer.named_buffers()}
    stock = {f"{name}.{end}": t for name, layer in layers.items() for end, t in stock_tensors(layer).items()}
    kept = {name: tensor for name, tensor in weights.items() if name not in own}
    return kept | {name: tensor.contiguous() for name, tensor in stock.items()}


def stock_quantization(model: nn.Module) -> dict[str, Any] | None:
    """What config.json says for transformers to make these layers and no others; None for a model without any."""
    layers = bitsandbytes_layers(model)
    if not layers:
        return None
    first = next(iter(layers.values()))
    skipped = _skipped(model, list(layers))
    if isinstance(first, Bnb8Linear):
        config = BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=first.threshold, llm_int8_skip_modules=skipped
        )
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=first.form,
            bnb_4bit_use_double_quant=first.double_quant,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=skipped,
        )
    return config.to_dict() | {"quant_method": BITSANDBYTES_METHOD}


def _skipped(model: nn.Module, targets: list[str]) -> list[str]:
    """Patterns that keep transformers from converting any linear but the targets.

    Names count as beginnings, as ends and as regular expressions; one that would keep a target too is anchored.
    """
    linears = (name for name, part in model.named_modules() if type(part) is nn.Linear or isinstance(part, Conv1D))
    plain = {name: all(should_convert_module(target, [name]) for target in targets) for name in linears}
    return [name if alone else f"^{re.escape(name)}$" for name, alone in plain.items()]


def adopt_stock_layers(model: PreTrainedModel) -> None:
    """Put our layers in the place of those that transformers made of a stock checkpoint, with the same tensors."""
    bnb = load_bitsandbytes()
    made = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    found: dict[str, Any] = {name: part for name, part in model.named_modules() if isinstance(part, made)}
    for name, old in found.items():
        columns, rows, bias = old.in_features, old.out_features, old.bias is not None
        if isinstance(old, bnb.nn.Linear8bitLt):
            new: Any = Bnb8Linear(columns, rows, threshold=old.state.threshold, bias=bias)
            new.codes.copy_(old.weight.data)
            new.scales.copy_(old.weight.SCB)
        else:
            state: Any = old.weight.quant_state
            new = Bnb4Linear(columns, rows, form=state.quant_type, double_quant=state.nested, bias=bias)
            _take_4bit(new, old.weight.data, state)
        new.bias = old.bias
        set_module(model, name, new.train(old.training))
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)


def served_layer(layer: Bnb4Linear | Bnb8Linear) -> nn.Module:
    """bitsandbytes' own layer in eval mode, made of `stock_tensors` as transformers makes it of a checkpoint."""
    bnb = load_bitsandbytes()
    columns, rows, bias = layer.in_features, layer.out_features, layer.bias is not None
    tensors = {end: tensor.clone() for end, tensor in stock_tensors(layer).items()}
    weight = tensors.pop("weight")
    if isinstance(layer, Bnb8Linear):
        new = bnb.nn.Linear8bitLt(columns, rows, bias, has_fp16_weights=False, threshold=layer.threshold)
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, CB=weight, SCB=tensors["SCB"])
    else:
        new = bnb.nn.Linear4bit(columns, rows, bias, torch.float32, layer.double_quant, layer.form)
        statistics = {end.removeprefix("weight."): tensor for end, tensor in tensors.items()}
        new.weight = bnb.nn.Params4bit.from_prequantized(weight, statistics, device="cpu", module=new)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return new.requires_grad_(False).eval()
