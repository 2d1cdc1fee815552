"""How large a model is: weights by number, and bytes as safetensors stores them."""

import json

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.float_types import float_types
from compresskit.layers.stored import holds, weights_of
from compresskit.surgery.bitsandbytes_edits import bitsandbytes_layers, stock_weights
from compresskit.surgery.edits import Edit
from compresskit.surgery.plugin import stock_config

#: safetensors' names of dtypes, in the order in which its files hold them (widest first).
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_METADATA = {"format": "pt"}  # what transformers writes into every file


def count_parameters(model: nn.Module) -> int:
    """The number of weights: float parameters that are stored once count once, and a packed code is one weight.

    Scales and zero points of quantised layers are how weights are stored, not weights; they count as bytes only.
    Works on the meta device.
    """
    floats = {_storage_key(parameter): parameter.numel() for parameter in model.parameters()}
    return sum(floats.values()) + sum(_coded_weights(module) for module in model.modules())


def _coded_weights(module: nn.Module) -> int:
    """Weights that a quantised layer holds in its own buffer `codes`; 0 for any other module."""
    if dict(module.named_buffers(recurse=False)).get("codes") is None:
        return 0
    for rows, columns in (("out_features", "in_features"), ("num_embeddings", "embedding_dim")):
        if hasattr(module, rows) and hasattr(module, columns):
            return getattr(module, rows) * getattr(module, columns)
    raise ValueError(f"{type(module).__name__} holds codes, but neither in_features nor embedding_dim says how many")


def _storage_key(tensor: Tensor) -> tuple[int, int, int]:
    """Equal for tensors that see the same memory in the same way; meta tensors are told apart by identity."""
    pointer = 0 if tensor.device.type == "meta" else tensor.data_ptr()
    return (0, id(tensor), 0) if pointer == 0 else (pointer, tensor.numel(), tensor.element_size())


def checkpoint_bytes(model: PreTrainedModel, original: PreTrainedModel, edits: list[Edit]) -> int:
    """The size in bytes of the file that a student is saved in.

    Args:
        model: the student; on the meta device its weights count in the original's float type, all of them, and what
            bitsandbytes writes as text has a usual length.
        original: says the float types, and whether a stock checkpoint can hold the student.
        edits: that made the one of the other.
    """
    is_stock = bool(bitsandbytes_layers(model)) and stock_config(original, edits) is not None
    return state_dict_bytes(model, float_types(original).stored, stock=is_stock)


def state_dict_bytes(model: nn.Module, stored: torch.dtype = torch.float32, *, stock: bool = False) -> int:
    """The size in bytes of the safetensors file that a model is stored in, shared tensors once.

    Args:
        model: float32 or quantised.
        stored: the float type of weights that it holds without loss; on the meta device, of all.
        stock: whether bitsandbytes' layers are written as transformers reads them, and not as ours hold them.

    Computed from names, shapes and dtypes alone (also on the meta device): 8 bytes, a JSON header padded to a multiple
    of 8, and the tensors. A model that transformers splits into several files has a header in each; not counted here.
    """
    weights = weights_of(model)
    unique: dict[tuple[int, int, int], tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.numel():
            dtype = stored if name in weights and holds(stored, tensor) else tensor.dtype
            unique.setdefault(_storage_key(tensor), (name, tensor.to("meta", dtype)))
    tensors = dict(unique.values())
    order = list(_DTYPES)
    written = stock_weights(model, tensors) if stock else tensors
    held = sorted(written.items(), key=lambda entry: (order.index(entry[1].dtype), entry[0]))
    header: dict[str, object] = {"__metadata__": _METADATA}
    end = 0
    for name, tensor in held:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end
