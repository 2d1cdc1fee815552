"""The quantize pass: which layers get which integers, and what is refused."""

import pytest
import torch
from families import FAMILIES, answer, random_sequences, student_of, tiny, tiny_student
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from compresskit.errors import CompressKitError
from compresskit.layers.int8_linear import Int8Linear
from compresskit.layers.quant_embedding import QuantEmbedding
from compresskit.layers.quant_linear import QuantLinear
from compresskit.layerwise.gptq import DAMPING
from compresskit.layerwise.moments import Moments, ridged
from compresskit.layerwise.weights import require_finite
from compresskit.passes import quantize_rounding
from compresskit.passes.low_rank import LowRank
from compresskit.passes.quantize import Quantize, smoothing_factors
from compresskit.passes.quantize_rounding import RoundingProblem, _prepare
from compresskit.student import load_student_model, save_student
from compresskit.surgery.edits import replay


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"bits": 8, "group_size": 16}, 0.02),
        ({"bits": 4, "group_size": 16, "embeddings": 4}, 0.4),
        ({"bits": 4, "group_size": 16, "embeddings": 4, "symmetric": True, "method": "gptq"}, 0.4),
        ({"bits": 8, "group_size": "channel", "symmetric": False}, 0.02),
        ({"bits": 8, "group_size": "channel", "act": "int8"}, 0.06),
        ({"bits": 8, "group_size": "channel", "act": "int8", "method": "gptq"}, 0.06),
        ({"bits": 8, "group_size": "channel", "act": "int8_static"}, 0.06),
        ({"bits": 4, "group_size": 16, "act": "int8"}, 0.4),
        ({"bits": 4, "group_size": "channel", "act": "int8_static", "symmetric": True, "method": "gptq"}, 0.5),
        ({"bits": "auto", "mean_bits": 6, "group_size": 16, "act": "int8", "method": "gptq"}, 0.3),
    ],
)
def test_the_student_stays_close_and_no_float_matrix_is_left(family, options, bound):
    original = tiny(family)
    student = student_of(original)
    notes = Quantize(**options).apply(student, generator=torch.Generator())
    lost = (answer(student.model) - answer(original)).norm() / answer(original).norm()
    assert lost < bound
    assert notes["kept_float"] == []
    assert not any(isinstance(module, torch.nn.Linear) for module in student.model.modules())
    kinds = {type(module) for module in student.model.modules()}
    assert QuantEmbedding in kinds
    assert (Int8Linear if "act" in options else QuantLinear) in kinds


def test_a_table_that_multiplies_what_it_looks_up_still_does():
    student = tiny_student("gemma3")
    table = student.original.requires_grad_(False).get_input_embeddings()
    Quantize(bits=8, group_size=16, targets="*q_proj").apply(student, generator=torch.Generator())
    integers, ids = student.model.get_input_embeddings(), torch.arange(90)
    assert isinstance(integers, QuantEmbedding)
    assert integers.multiplier == pytest.approx(32**0.5)
    torch.testing.assert_close(integers(ids), table(ids), atol=0.02 * float(table(ids).abs().max()), rtol=0)
    torch.testing.assert_close(integers.dequantize(), table.weight, atol=0.02 * float(table.weight.abs().max()), rtol=0)


def test_tables_that_are_tied_become_one_which_is_stored_once(tmp_path):
    student = tiny_student("t5")
    names = [name for name, module in student.model.named_modules() if name.endswith(("shared", "embed_tokens"))]
    assert len(names) == 2
    notes = Quantize(bits=8, group_size=16).apply(student, generator=torch.Generator())
    assert sum(name in notes["layers"] for name in names) == 1
    save_student(student, tmp_path)
    assert sum("embed_tokens" in key or "shared" in key for key in load_file(tmp_path / "model.safetensors")) == 2
    model, _ = load_student_model(tmp_path, student.task)
    assert torch.equal(answer(model), answer(student.model))
    ids = torch.arange(96)
    assert torch.equal(*(model.get_submodule(name)(ids) for name in names))


def test_a_table_that_does_more_than_look_up_is_an_error_or_kept():
    class Odd(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids).tanh()

    student = tiny_student("bert")
    old = student.model.embeddings.word_embeddings
    odd = Odd(old.num_embeddings, old.embedding_dim)
    odd.weight = old.weight
    student.model.embeddings.word_embeddings = odd
    with pytest.raises(CompressKitError, match="word_embeddings is a Odd, which does more than look up"):
        Quantize(bits=8, group_size=16).apply(student, generator=torch.Generator())
    notes = Quantize(bits=8, group_size=16, on_misfit="keep").apply(student, generator=torch.Generator())
    assert notes["kept_float"] == ["embeddings.word_embeddings"]


def test_a_tied_head_reads_the_tables_integers():
    student = tiny_student("llama")
    Quantize(bits=8, group_size=16).apply(student, generator=torch.Generator())
    table, head = student.model.model.embed_tokens, student.model.lm_head
    assert isinstance(table, QuantEmbedding)
    assert isinstance(head, QuantLinear)
    assert torch.equal(head.dequantize(), table.dequantize())
    assert not any(name.startswith("lm_head") for name in student.model.state_dict())


def test_an_untied_head_has_integers_of_its_own():
    student = tiny_student("qwen3")
    Quantize(bits=4, group_size=16).apply(student, generator=torch.Generator())
    assert any(name.startswith("lm_head") for name in student.model.state_dict())


def test_embeddings_can_stay_float():
    student = tiny_student("bert")
    Quantize(bits=8, group_size=32, embeddings=None).apply(student, generator=torch.Generator())
    assert isinstance(student.model.get_input_embeddings(), torch.nn.Embedding)


def test_biases_make_each_layer_exact_in_the_mean():
    student = tiny_student("bert")
    notes = Quantize(bits=4, group_size=16, anchor=0).apply(student, generator=torch.Generator())
    layer = "encoder.layer.0.attention.self.query"
    rows = [torch.tensor([row]) for row in student.corpus.calibration.rows]
    with torch.no_grad():
        hidden = [student.model.embeddings(input_ids=row)[0] for row in rows]
        x = torch.cat(hidden)
        now = student.model.get_submodule(layer)(x).mean(0)
        was = student.original.get_submodule(layer)(x).mean(0)
    torch.testing.assert_close(now, was, atol=1e-4, rtol=1e-4)
    assert notes["layers"][layer]["relative_error"] > 0


def test_columns_that_no_group_divides_are_all_listed_with_what_fits():
    model = tiny("bert")
    from_low_rank = LowRank(keep=0.5, round_to=4)
    for edit in from_low_rank.plan(model):
        edit.apply(model)
    with pytest.raises(CompressKitError, match="does not divide the columns") as caught:
        Quantize(bits=8, group_size=32).plan(model)
    assert "encoder.layer.1.output.dense.expand" in str(caught.value)
    assert "on_misfit: keep" in str(caught.value)


def test_misfits_stay_float_and_are_listed_on_request():
    student = tiny_student("bert")
    LowRank(keep=0.5, round_to=4, targets="*intermediate*", pivot=False).apply(student, generator=torch.Generator())
    notes = Quantize(bits=8, group_size=32, on_misfit="keep").apply(student, generator=torch.Generator())
    assert notes["kept_float"] == [f"encoder.layer.{i}.intermediate.dense.expand" for i in range(2)]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"group_size": 100}, "100 is not a power of two in 16"),
        ({"act": "int8"}, "act: int8 needs group_size: channel for 8 bits"),
        ({"act": "int8", "bits": 3}, "act: int8 has integer products of 8 and 4 bits, not 3"),
        ({"act": "int8", "bits": "auto", "widths": [3, 8], "mean_bits": 5}, "of 8 and 4 bits, not 3; leave 3 out"),
        ({"act": "int8_static", "group_size": 32}, "act: int8_static needs group_size: channel for 8 bits"),
        ({"act": "static"}, "Input should be 'none', 'int8' or 'int8_static'"),
        ({"smooth": 0.4}, "act: int8 or int8_static"),
        ({"act": "int8", "group_size": "channel", "symmetric": False}, "act: int8 has symmetric weights"),
        ({"overrides": {"*key": {"group_size": 24}}}, "24 is not a power of two in 16"),
        ({"overrides": {"*key": {"act": "int8"}}}, "Input should be 'none'"),
        ({"overrides": {"*key": {"act": "none"}}}, r"overrides\.\*key\.act: no activation is rounded"),
        ({"bits": 5}, "Input should be 3, 4, 8 or 'auto'"),
        ({"bits": "auto"}, "auto has no budget; say mean_bits: 5, or budget_bytes"),
        ({"bits": "auto", "mean_bits": 5.0, "budget_bytes": 9}, "two budgets; leave one of them out"),
        ({"bits": 4, "mean_bits": 5.0}, "mean_bits has no effect without bits: auto"),
        ({"budget_bytes": 9}, "budget_bytes has no effect without bits: auto"),
        ({"method": "awq"}, "Input should be 'rtn' or 'gptq'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, match):
    with pytest.raises(ValidationError, match=match):
        Quantize(**options)


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(CompressKitError, match="matches no module"):
        Quantize(targets="*mlp*").plan(tiny("bert"))


def test_smoothing_factors_even_out_the_peaks():
    peak = torch.tensor([8.0, 2.0, 0.5], dtype=torch.float64)
    factors = smoothing_factors(peak, 0.5)
    smoothed = peak * factors.double()
    assert float(factors.log().sum()) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(smoothed / smoothed[1], (peak / peak[1]).sqrt(), rtol=1e-6, atol=0)
    assert torch.equal(smoothing_factors(peak, 0.0), torch.ones(3))


def test_inputs_that_calibration_never_saw_get_no_huge_factor():
    assert torch.equal(smoothing_factors(torch.zeros(3, dtype=torch.float64), 0.5), torch.ones(3))
    factors = smoothing_factors(torch.tensor([1.0, 0.0], dtype=torch.float64), 0.5)
    assert float(factors[1] / factors[0]) == pytest.approx(100, rel=1e-5)


def _with_an_outlier(family):
    """A student whose first block reads one channel fifty times as large, and its original with the same change."""
    original = tiny(family)
    norm = next(module for name, module in original.named_modules() if "layernorm" in name.lower())
    norm.weight.data[3] *= 50
    return original, student_of(original)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_an_error_in_the_smoothed_problem_is_the_error_of_the_same_map(method):
    """A smoothed layer multiplies its input by f and holds M / f: the moment of what it reads is f C f."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 16, generator=draw, dtype=torch.float64) @ torch.randn(16, 16, generator=draw).double()
    target, found = (torch.randn(8, 16, generator=draw, dtype=torch.float64) for _ in range(2))
    sums = Moments.zeros(16, 8)
    sums.update(x, x @ target.T)
    factors = smoothing_factors(x.abs().amax(0), 0.5)
    problem = RoundingProblem(("one",), target, sums.mean(centred=False), factors)
    ready = _prepare(problem, method, smooth=True)
    f = factors.double()
    torch.testing.assert_close(ready.target * f, target)
    read = (x * f).T @ (x * f) / len(x)
    assert ready.importance is not None
    torch.testing.assert_close(ready.importance, ridged(read, DAMPING).diagonal())
    if ready.compensation is None:
        return
    level = ready.compensation.moment.diagonal().mean() * DAMPING / (1 + DAMPING)
    moment = ready.compensation.moment - level * torch.eye(16, dtype=torch.float64)
    gap = ready.target - found / f
    smoothed, plain = (gap @ moment * gap).sum(), ((x @ (target - found).T).square().sum() / len(x))
    torch.testing.assert_close(smoothed, plain)
    unsmoothed = _prepare(problem, method, smooth=False)
    assert unsmoothed.compensation is not None
    torch.testing.assert_close(unsmoothed.compensation.moment, ridged(x.T @ x / len(x), DAMPING))


@pytest.mark.parametrize("act", ["int8", "int8_static"])
def test_smoothing_keeps_one_large_channel_from_taking_the_whole_range(act):
    def lost(smooth):
        original, student = _with_an_outlier("llama")
        options = {"bits": 8, "group_size": "channel", "act": act, "embeddings": None, "smooth": smooth}
        Quantize(**options).apply(student, generator=torch.Generator())
        return float((answer(student.model) - answer(original)).norm() / answer(original).norm())

    assert lost(0.5) < 0.6 * lost(0.0)


def test_attention_outputs_and_weight_only_layers_have_no_factors():
    student = tiny_student("bert")
    Quantize(bits=8, group_size="channel", act="int8").apply(student, generator=torch.Generator())
    smooth = {n: m.smooth is not None for n, m in student.model.named_modules() if isinstance(m, Int8Linear)}
    assert {name for name, there in smooth.items() if not there} == {
        name for name in smooth if name.endswith("attention.output.dense")
    }
    plain = tiny_student("bert")
    Quantize(bits=8, group_size="channel", act="int8", smooth=0).apply(plain, generator=torch.Generator())
    assert all(m.smooth is None for m in plain.model.modules() if isinstance(m, Int8Linear))


@pytest.mark.parametrize("smooth", [0, 0.5])
def test_a_static_range_is_what_the_calibration_text_shows(smooth, tmp_path):
    student = tiny_student("bert")
    Quantize(bits=8, group_size="channel", act="int8_static", smooth=smooth).apply(student, generator=torch.Generator())
    layers = {n: m for n, m in student.model.named_modules() if isinstance(m, Int8Linear)}
    seen = {name: torch.zeros(2) for name in layers}

    def watch(name):
        def hook(module, args):
            x = args[0] if module.smooth is None else args[0] * module.smooth
            seen[name] = torch.stack([torch.minimum(seen[name][0], x.min()), torch.maximum(seen[name][1], x.max())])

        return hook

    for name, layer in layers.items():
        layer.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for row in student.corpus.calibration.rows:
            student.model(input_ids=torch.tensor([row]))
    for name, layer in layers.items():
        low, high = seen[name]
        # Walked batch by batch, sums differ in their last digits, which may move a step of a layer before.
        assert float(layer.input_scale) == pytest.approx(float(high - low) / 255, rel=0.02), name
        assert float(layer.input_zero) == pytest.approx(float(-low / (high - low)) * 255, abs=3), name
        layer._forward_pre_hooks.clear()
    save_student(student, tmp_path)
    model, _ = load_student_model(tmp_path, student.task)
    assert torch.equal(answer(model), answer(student.model))
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(key.endswith("input_scale") for key in stored) == sum(key.endswith("input_zero") for key in stored) == 12


def test_a_table_that_no_group_divides_has_one_scale_a_row():
    model = BertModel(BertConfig(**FAMILIES["bert"].to_dict() | {"hidden_size": 36, "vocab_size": 96}))
    edits = Quantize(bits=8, group_size="channel", act="int8", embeddings=4, on_misfit="keep").plan(model)
    tables = [edit for edit in edits if edit.kind == "quantize_embedding"]
    assert [edit.group_size for edit in tables] == [0] * len(tables) != []


def test_matrices_that_are_no_linears_are_not_passed_over_in_silence():
    model = tiny("bert")
    model.encoder.layer[1].experts = torch.nn.Module()
    model.encoder.layer[1].experts.weight = torch.nn.Parameter(torch.zeros(4, 32, 64))
    with pytest.raises(CompressKitError, match="1 matrices belong to no linear layer"):
        Quantize(bits=8, group_size=16).plan(model)
    assert Quantize(bits=8, group_size=16, on_misfit="keep").plan(model)


def test_the_mean_is_exact_where_only_some_layers_of_a_site_have_a_bias():
    original = tiny("bert")
    for block in original.encoder.layer:
        block.attention.self.key.bias = None
    student = student_of(original)
    Quantize(bits=8, group_size=16, embeddings=None).apply(student, generator=torch.Generator())
    lost = (answer(student.model) - answer(original)).norm() / answer(original).norm()
    assert lost < 0.02


def _lost(family, sequences=32, **options):
    """The student's distance from the original on text that it was not calibrated on, and what the pass said."""
    student = tiny_student(family, sequences=sequences)
    notes = Quantize(embeddings=None, **options).apply(student, generator=torch.Generator())
    texts = [random_sequences(8, seed=seed) for seed in range(100, 108)]
    ours, truth = (torch.cat([answer(model, one) for one in texts]) for model in (student.model, student.original))
    return float((ours - truth).norm() / truth.norm()), notes


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_says_what_rounding_to_nearest_would_have_lost_and_loses_less_on_fresh_text(family, bits):
    lost, notes = _lost(family, 128, bits=bits, group_size=16, method="gptq")
    inside = [note for note in notes["layers"].values() if note["method"] == "gptq"]
    assert len(inside) >= 12
    assert all(note["relative_error"] < note["rtn_error"] for note in inside)
    assert notes["mean_error"]["gptq"] < notes["mean_error"]["rtn"]
    assert lost < _lost(family, 128, bits=bits, group_size=16)[0]


def test_layers_outside_the_blocks_are_rounded_to_nearest_and_named():
    _, notes = _lost("bert", bits=4, group_size=16, method="gptq")
    assert notes["rounded_to_nearest"] == ["pooler.dense"]
    assert notes["layers"]["pooler.dense"]["method"] == "rtn"
    assert "rounded_to_nearest" not in _lost("bert", bits=4, group_size=16)[1]


def _grids(student):
    layers = student.model.named_modules()
    return {name: (m.bits, m.group_size) for name, m in layers if isinstance(m, QuantLinear | QuantEmbedding)}


def test_overrides_reach_linears_tables_and_heads_and_the_last_match_counts():
    student = tiny_student("qwen3")
    overrides = {
        "*self_attn*": {"bits": 8},
        "*.v_proj": {"bits": 3, "group_size": "channel"},
        "*layers.1.mlp.down_proj": {"bits": "float"},
        "lm_head": {"bits": 4, "group_size": 32},
        "*embed_tokens": {"bits": 4, "group_size": 16},
    }
    Quantize(bits=4, group_size=16, overrides=overrides).apply(student, generator=torch.Generator())
    grids = _grids(student)
    assert grids["model.layers.0.self_attn.q_proj"] == (8, 16)
    assert grids["model.layers.0.self_attn.v_proj"] == (3, 0)
    assert grids["model.layers.0.mlp.gate_proj"] == (4, 16)
    assert grids["lm_head"] == (4, 32)
    assert grids["model.embed_tokens"] == (4, 16)
    assert "model.layers.1.mlp.down_proj" not in grids


def test_under_integer_activations_an_override_changes_the_weights_and_the_activations_where_it_says_so():
    student = tiny_student("bert")
    overrides = {
        "*intermediate*": {"bits": 4, "group_size": 16},
        "*layer.0.output*": {"bits": 3, "group_size": 16, "act": "none"},
        "*layer.1.output*": {"act": "none"},
    }
    Quantize(act="int8_static", group_size="channel", overrides=overrides).apply(student, generator=torch.Generator())
    first, second = student.model.encoder.layer[:2]
    assert isinstance(first.intermediate.dense, Int8Linear)
    assert (first.intermediate.dense.bits, first.intermediate.dense.group_size) == (4, 16)
    assert isinstance(first.output.dense, QuantLinear)
    assert first.output.dense.bits == 3
    assert isinstance(second.output.dense, QuantLinear)
    assert isinstance(second.attention.self.query, Int8Linear)
    assert second.attention.self.query.bits == 8


def test_overrides_that_no_integer_product_has_are_listed_with_their_globs():
    overrides = {"*": {"bits": 8}, "*key": {"bits": 3}, "*query": {"group_size": 32}, "*value": {"act": "none"}}
    asked = Quantize(act="int8", group_size="channel", overrides=overrides)
    with pytest.raises(CompressKitError) as caught:
        asked.plan(tiny("bert"))
    assert "'*key' gives encoder.layer.0.attention.self.key and 1 more weights of 3 bits" in caught.value.what
    assert (
        "'*query' gives encoder.layer.0.attention.self.query and 1 more weights of 8 bits in groups"
        in caught.value.what
    )
    assert caught.value.where == "overrides"
    assert "say act: none" in caught.value.fix


@pytest.mark.parametrize(
    "override",
    [
        {"*word_embeddings": {"act": "none"}},
        {"pooler.dense": {"act": "none"}},
        {"*key": {"bits": "float", "act": "none"}},
    ],
)
def test_an_override_of_activations_that_nobody_rounds_is_refused(override: dict[str, dict[str, str]]):
    asked = Quantize(act="int8", group_size="channel", overrides=override)
    with pytest.raises(CompressKitError, match="is read by no linear in the blocks that gets integers") as caught:
        asked.plan(tiny("bert"))
    assert repr(next(iter(override))) in str(caught.value)


def test_groups_that_an_override_names_are_for_the_narrow_of_the_widths_under_integer_activations():
    options = {"bits": "auto", "mean_bits": 7.9, "group_size": 32, "act": "int8"}
    student = tiny_student("bert")
    Quantize(**options, overrides={"*": {"group_size": 16}}).apply(student, generator=torch.Generator())
    layers = [module for module in student.model.modules() if isinstance(module, Int8Linear)]
    assert {(one.bits, one.in_features // one.group_size) for one in layers if one.bits == 8} == {(8, 1)}
    assert {one.group_size for one in layers if one.bits == 4} == {16}


def test_overrides_that_match_nothing_and_tables_of_3_bits_are_refused():
    with pytest.raises(CompressKitError, match=r"overrides: '\*mlp\*' matches no module"):
        Quantize(overrides={"*mlp*": {"bits": 4}}).plan(tiny("bert"))
    with pytest.raises(CompressKitError, match="3 bits are asked for"):
        Quantize(overrides={"*word_embeddings": {"bits": 3}}).plan(tiny("bert"))


def test_an_override_of_layers_that_targets_leave_out_is_refused():
    overrides = {"*v_proj": {"bits": 8}}
    with pytest.raises(
        CompressKitError, match=r"'\*v_proj' matches 2 layers, .* targets '\*q_proj' choose none"
    ) as caught:
        Quantize(bits=4, group_size=16, targets="*q_proj", overrides=overrides).plan(tiny("llama"))
    assert caught.value.where == "overrides"
    # One that reaches some of what it matches, or a table, which targets say nothing of, is read.
    overrides = {"*self_attn*": {"bits": 8}, "*embed_tokens": {"bits": 4, "group_size": 16}}
    planned = tiny("llama")
    replay(Quantize(bits=4, group_size=16, targets="*q_proj", overrides=overrides).plan(planned), planned)
    assert {m.bits for m in planned.modules() if isinstance(m, QuantLinear) and m.out_features == 32} == {8}
    assert {m.bits for m in planned.modules() if isinstance(m, QuantEmbedding)} == {4}


def test_of_overrides_the_last_match_counts_alone():
    overrides = {"*q_proj": {"group_size": 32}, "*.0.*q_proj": {"bits": 8}}
    student = tiny_student("llama")
    Quantize(bits=4, group_size=16, embeddings=None, targets="*_proj", overrides=overrides).apply(
        student, generator=torch.Generator()
    )
    grids = _grids(student)
    assert grids["model.layers.0.self_attn.q_proj"] == (8, 16)
    assert grids["model.layers.1.self_attn.q_proj"] == (4, 32)


@pytest.mark.parametrize("on_misfit", ["error", "pad", "keep"])
def test_a_4_bit_table_of_an_odd_width_is_an_error_or_kept(on_misfit):
    shape = {"hidden_size": 33, "num_attention_heads": 3, "vocab_size": 96}
    model = BertModel(BertConfig(**FAMILIES["bert"].to_dict() | shape))
    step = Quantize(bits=8, group_size="channel", embeddings=4, on_misfit=on_misfit, targets="*query")
    if on_misfit != "keep":
        with pytest.raises(CompressKitError, match=r"even number of columns, and embeddings\.word_embeddings has 33"):
            step.plan(model)
        return
    replay(step.plan(model), model)
    assert isinstance(model.embeddings.word_embeddings, torch.nn.Embedding)
    assert isinstance(model.encoder.layer[0].attention.self.query, QuantLinear)


def test_where_no_group_fits_the_message_offers_the_whole_row():
    model = BertModel(BertConfig(**FAMILIES["bert"].to_dict() | {"intermediate_size": 40}))
    with pytest.raises(CompressKitError, match="use group_size channel; or set round_to"):
        Quantize(group_size=32).plan(model)
    assert Quantize(group_size="channel").plan(model)


@pytest.mark.parametrize("on_misfit", ["error", "keep"])
def test_layers_that_store_their_weight_transposed_are_called_so(on_misfit):
    with pytest.raises(CompressKitError, match="c_attn is a Conv1D, which stores its weight transposed"):
        Quantize(on_misfit=on_misfit).plan(tiny("gpt2"))


def test_padding_fills_the_last_group_and_loses_less_than_the_one_scale_of_a_row_that_always_fits():
    original = BertModel(BertConfig(**FAMILIES["bert"].to_dict() | {"intermediate_size": 40}))
    with pytest.raises(CompressKitError, match=r"40 columns \(fit: channel\)"):
        Quantize(bits=4, group_size=32).plan(original)
    name, lost = "encoder.layer.0.output.dense", {}
    for size in (32, "channel"):
        student = student_of(original)
        step = Quantize(bits=4, group_size=size, on_misfit="pad", embeddings=None, targets=f"*{name}")
        notes = step.apply(student, generator=torch.Generator())
        assert notes["kept_float"] == []
        lost[size] = notes["layers"][name]["relative_error"]
        layer = student.model.get_submodule(name)
        assert layer.scales.shape == (32, 2 if size == 32 else 1)
        assert layer.dequantize().shape == (32, 40)
    assert lost[32] < lost["channel"]


def test_the_message_about_misfits_lists_each_layer_with_the_sizes_that_fit():
    model = BertModel(BertConfig(**FAMILIES["bert"].to_dict() | {"intermediate_size": 48}))
    with pytest.raises(CompressKitError) as caught:
        Quantize(group_size=32).plan(model)
    said = str(caught.value)
    assert "does not divide the columns of 2 layers" in said
    assert all(f"encoder.layer.{i}.output.dense: 48 columns (fit: 16, channel)" in said for i in range(2))
    assert "use group_size 16 or channel; " in said
    assert "on_misfit: pad" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_before_any_layer_is_changed(value):
    student = tiny_student("bert")
    with torch.no_grad():
        student.model.encoder.layer[1].output.dense.weight[3, 5] = value
        student.model.embeddings.word_embeddings.weight[7] = value
    with pytest.raises(CompressKitError, match="2 tensors have values that are NaN or infinite") as caught:
        Quantize(bits=8, group_size=16).apply(student, generator=torch.Generator())
    assert "encoder.layer.1.output.dense.weight: 1 of 2048" in str(caught.value)
    assert "embeddings.word_embeddings.weight: 32 of 3072" in str(caught.value)
    assert student.edits == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder.layer.1.attention.self.query.bias", "nan"),
        ("encoder.layer.0.attention.self.key.bias", "nan"),
        ("encoder.layer.0.output.LayerNorm.weight", "inf"),
        ("embeddings.position_ids_", "nan"),
    ],
)
def test_biases_norms_and_buffers_that_are_not_finite_are_refused_by_name(name, value):
    student = tiny_student("bert")
    if name.endswith("_"):
        student.model.embeddings.register_buffer("position_ids_", torch.tensor([0.0, float(value)]))
    else:
        student.model.get_parameter(name).data[1] = float(value)
    with pytest.raises(CompressKitError, match=f"1 tensors have values that are NaN or infinite:\n    {name}: 1 of"):
        Quantize(bits=8, group_size=16).apply(student, generator=torch.Generator())
    assert student.edits == []


def test_a_mask_may_hold_infinity():
    student = tiny_student("bert")
    student.model.embeddings.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    require_finite(student.model)
    student.model.embeddings.mask[0] = torch.nan
    with pytest.raises(CompressKitError, match=r"embeddings\.mask: 1 of 2"):
        require_finite(student.model)


def test_quantising_twice_is_refused():
    student = tiny_student("bert")
    Quantize(bits=8, group_size=16, targets="*query").apply(student, generator=torch.Generator())
    with pytest.raises(CompressKitError, match="holds integers already"):
        Quantize(bits=4, group_size=16, targets="*key").apply(student, generator=torch.Generator())


def test_gptq_sets_scales_and_codes_anew_in_turns(monkeypatch):
    with_turns = _lost("bert", bits=3, group_size=16, method="gptq")
    monkeypatch.setattr(quantize_rounding, "improve", lambda compensation, target, start, **grid: start)
    without = _lost("bert", bits=3, group_size=16, method="gptq")
    errors = [one[1]["mean_error"]["gptq"] for one in (with_turns, without)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_dead_inputs_and_constant_rows_are_rounded_like_any_others(method):
    original = tiny("llama")
    with torch.no_grad():
        norm = original.model.layers[0].input_layernorm.weight
        norm[3] = 0  # a channel that no input of the first projections ever shows
        original.model.layers[0].self_attn.q_proj.weight[5] = 0.02
        original.model.layers[0].self_attn.q_proj.weight[6] = 0
    student = student_of(original)
    Quantize(bits=4, group_size=16, method=method, embeddings=None, anchor=0).apply(
        student, generator=torch.Generator()
    )
    weight = student.model.model.layers[0].self_attn.q_proj.dequantize()
    old = original.model.layers[0].self_attn.q_proj.weight
    assert torch.isfinite(weight).all()
    assert torch.equal(weight[6], torch.zeros(32))
    torch.testing.assert_close(weight[5], old[5], atol=0.004, rtol=0)
    assert (weight - old)[:, 3].norm() < 0.2 * old[:, 3].norm()
    assert torch.isfinite(answer(student.model)).all()
