from pathlib import Path
from typing import Any

import pytest
import torch
from families import ENCODER_SHAPE, tiny
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    MixtralConfig,
    MPNetConfig,
    PretrainedConfig,
)

from compresskit.errors import ManyErrors
from compresskit.forecast import Forecast, _replay_and_run, foretell
from compresskit.models import find_model, load_empty
from compresskit.recipe import parse_recipe
from compresskit.surgery.cuts import PruneNeurons
from compresskit.surgery.sites import obstacle


def _foretell(folder: Path, config: PretrainedConfig, *passes: dict[str, Any]) -> Forecast:
    AutoModel.from_config(config).save_pretrained(folder)
    recipe = parse_recipe({"model": str(folder), "passes": list(passes)})
    return foretell(recipe, find_model(folder), "feature-extraction")


@pytest.mark.parametrize(
    ("keep", "said"), [({"heads": 0.5}, "number of heads that"), ({"heads": 0.5, "ffn": 0.5}, "number of heads that")]
)
def test_a_width_that_another_part_relies_on_is_found_from_shapes_alone(
    tmp_path: Path, keep: dict[str, float], said: str
) -> None:
    mpnet = MPNetConfig(**ENCODER_SHAPE, relative_attention_num_buckets=8)
    ffn = {"kind": "prune_width", "keep": {"ffn": 0.5}}
    with pytest.raises(ManyErrors) as caught:
        _foretell(tmp_path, mpnet, ffn, {"kind": "prune_width", "keep": keep})
    (error,) = caught.value.errors
    assert error.where == "passes[1] (prune_width)"
    assert error.what.startswith("a part of MPNetModel depends on the number of heads")
    assert said in error.what
    assert error.fix == "leave heads out of keep"


def test_a_pass_that_changes_nothing_is_told(tmp_path: Path) -> None:
    passes = [{"kind": "prune_width", "keep": keep} for keep in (1, 0.5)]
    forecast = _foretell(tmp_path, BertConfig(**ENCODER_SHAPE), *passes)
    assert forecast.warnings == ("passes[0] (prune_width) changes nothing with these options",)


def test_what_stays_float_by_on_misfit_is_told(tmp_path: Path) -> None:
    shape = ENCODER_SHAPE | {"intermediate_size": 40, "num_hidden_layers": 4}
    forecast = _foretell(tmp_path, BertConfig(**shape), {"kind": "quantize", "on_misfit": "keep"})
    named = ", ".join(f"encoder.layer.{index}.output.dense" for index in range(3))
    assert forecast.warnings == (f"passes[0] (quantize): matrices left as they are: 4 ({named} and 1 more)",)


def test_bytes_that_the_text_may_lessen_are_an_upper_bound_from_there_on(tmp_path: Path) -> None:
    passes = [{"kind": "prune_width", "keep": 0.5}, {"kind": "prune_vocab"}, {"kind": "quantize", "group_size": 16}]
    forecast = _foretell(tmp_path, BertConfig(**ENCODER_SHAPE), *passes)
    assert [step.at_most for step in forecast.steps] == [False, False, True, True]


def test_the_heads_of_t5_are_what_its_position_bias_relies_on_and_its_neurons_are_not(tmp_path: Path) -> None:
    tiny("t5").save_pretrained(tmp_path)
    said = {"model": str(tmp_path), "task": "token-classification"}

    def forecast(keep: dict[str, float]) -> Forecast:
        recipe = parse_recipe({**said, "passes": [{"kind": "prune_width", "keep": keep}]})
        return foretell(recipe, find_model(tmp_path), "token-classification")

    with pytest.raises(ManyErrors, match="T5ForTokenClassification depends on the number of heads"):
        forecast({"heads": 0.5})
    assert forecast({"ffn": 0.5}).is_stock


@pytest.mark.parametrize(
    ("options", "stock"),
    [({}, True), ({"allocation": "per_layer"}, False), ({"bias": True}, False), ({"keep": {"heads": 0.5}}, True)],
)
def test_check_knows_which_widths_need_the_plugin(tmp_path: Path, options: dict[str, Any], stock: bool) -> None:
    tiny("llama").save_pretrained(tmp_path)
    one = {"kind": "prune_width", "keep": 0.5, **options}
    recipe = parse_recipe({"model": str(tmp_path), "task": "text-generation", "passes": [one]})
    assert foretell(recipe, find_model(tmp_path), "text-generation").is_stock == stock


def test_widths_that_nothing_relies_on_pass_the_same_check(tmp_path: Path) -> None:
    mpnet = MPNetConfig(**ENCODER_SHAPE, relative_attention_num_buckets=8)
    forecast = _foretell(tmp_path, mpnet, {"kind": "prune_width", "keep": {"ffn": 0.5}})
    assert forecast.steps[1].params < forecast.steps[0].params


def test_a_model_that_cannot_run_without_values_is_not_judged() -> None:
    class Asking(BertModel):
        def forward(self, input_ids: torch.Tensor, **more: Any) -> Any:
            return super().forward(input_ids[:, : int(input_ids.max()) + 2], **more)

    with torch.device("meta"):
        bert = Asking(BertConfig(**ENCODER_SHAPE)).eval()
    block = "encoder.layer.0"
    edit = PruneNeurons(inputs=(f"{block}.intermediate.dense",), output=f"{block}.output.dense", keep="0-31")
    assert "meta tensors" in str(obstacle(bert))
    _replay_and_run([edit], bert, "prune_width")
    assert bert.get_submodule(f"{block}.output.dense").in_features == 32


@pytest.mark.parametrize(("keep", "columns"), [({"ffn": 0.375}, 24), ({"heads": 0.75}, 24)])
def test_widths_that_a_later_quantiser_cannot_group_are_found_from_shapes_alone(
    tmp_path: Path, keep: dict[str, float], columns: int
) -> None:
    passes = [{"kind": "prune_width", "keep": keep}, {"kind": "quantize", "bits": 4, "group_size": 16}]
    with pytest.raises(ManyErrors, match=f"{columns} columns"):
        _foretell(tmp_path, BertConfig(**ENCODER_SHAPE), *passes)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_mixture_is_planned_without_its_weights(tmp_path: Path, stored: torch.dtype) -> None:
    config = MixtralConfig(**ENCODER_SHAPE, num_key_value_heads=2, num_local_experts=4)
    AutoModelForCausalLM.from_config(config).to(stored).save_pretrained(tmp_path)
    empty = load_empty(find_model(tmp_path), "text-generation")
    before = empty.get_experts_implementation()
    assert obstacle(empty) is None
    assert empty.get_experts_implementation() == before
    passes = [{"kind": "low_rank", "keep": 0.5}, {"kind": "quantize", "bits": 4, "group_size": 16}]

    def forecast(misfit: str) -> Forecast:
        said = [passes[0], passes[1] | {"on_misfit": misfit}]
        recipe = parse_recipe({"model": str(tmp_path), "task": "text-generation", "passes": said})
        return foretell(recipe, find_model(tmp_path), "text-generation")

    sizes = [step.size_bytes for step in forecast("keep").steps]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    with pytest.raises(ManyErrors, match=r"experts\.gate_up_proj"):
        forecast("error")
