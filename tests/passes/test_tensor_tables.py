"""Tables in factors: exact errors, frequencies, tensor trains, and the pass on models with and without a tied head."""

import copy
import dataclasses
import math
import re

import pytest
import torch
from families import FAMILIES, answer, student_of, tiny, tiny_student

from compresskit.data import Sequences
from compresskit.engine import prove_reloads
from compresskit.errors import CompressKitError
from compresskit.evaluate import count_parameters
from compresskit.export import OnnxExport
from compresskit.layers.quant_linear import QuantLinear
from compresskit.layers.tensor_train import TensorTrainEmbedding, TensorTrainHead
from compresskit.passes import Distill, LowRank, PruneWidth, Quantize, TensorDecomposition
from compresskit.passes.tensor_tables import (
    column_digits,
    low_rank_table,
    rank_within,
    row_digits,
    row_frequencies,
    table_error,
    table_metric,
    tensor_train_cores,
    train_ranks,
    train_weights,
)
from compresskit.recipe import Recipe
from compresskit.report import render_html
from compresskit.student import load_student_model, save_student
from compresskit.surgery.edits import get_module

EYE = torch.eye(12, dtype=torch.float64)


def table_and_use(rows: int = 60, columns: int = 12, *, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(rows, columns, generator=draw, dtype=dtype)
    hidden = torch.randn(200, columns, generator=draw, dtype=dtype) @ torch.randn(columns, columns, generator=draw).to(
        dtype
    )
    frequencies = torch.rand(rows, generator=draw, dtype=torch.float64) ** 6
    return table, frequencies / frequencies.sum(), hidden


def test_frequencies_are_counts_with_what_good_and_turing_expect_of_unseen_rows():
    found = row_frequencies(torch.tensor([[0, 0, 0], [1, 2, 2]]), 8)  # n₁ = 1, n₀ = 5
    expected = torch.tensor([3.2, 1.2, 2.2, 0.2, 0.2, 0.2, 0.2, 0.2], dtype=torch.float64)
    torch.testing.assert_close(found, expected / expected.sum())
    assert float(row_frequencies(torch.tensor([0, 0]), 4).min()) > 0, "rows count though none was seen once"
    unseen_rarer = row_frequencies(torch.tensor([0, 1, 2, 3, 4]), 6)
    assert unseen_rarer[5] < unseen_rarer[0]


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_predicted_error_of_a_table_is_the_measured_one(rank, with_head):
    table, frequencies, hidden = table_and_use()
    metric = table_metric(table, frequencies, hidden.T @ hidden / len(hidden) if with_head else None)
    R, P, predicted = low_rank_table(table, rank, frequencies=frequencies, metric=metric)
    measured = table_error(table - R @ P, frequencies=frequencies, metric=metric)
    assert predicted == pytest.approx(measured, rel=1e-6)
    assert 0 < measured < table_error(table, frequencies=frequencies, metric=metric)


def test_the_head_part_of_the_metric_is_the_error_of_the_logits():
    table, frequencies, hidden = table_and_use()
    moment = hidden.T @ hidden / len(hidden)
    logits = (hidden @ table.T).square().mean(0) @ frequencies
    added = table_metric(table, frequencies, moment) - table_metric(table, frequencies, None)
    ratio = added / moment
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0, 0])))
    whole = table_error(table, frequencies=frequencies, metric=moment)
    assert whole == pytest.approx(float(logits), rel=1e-12)


def test_full_rank_is_the_table():
    table, frequencies, hidden = table_and_use()
    metric = table_metric(table, frequencies, hidden.T @ hidden)
    for given in (None, metric):
        R, P, error = low_rank_table(table, 12, frequencies=frequencies, metric=given)
        torch.testing.assert_close(R @ P, table, atol=1e-9, rtol=1e-9)
        assert error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rank", [2, 6])
def test_weighted_rows_lose_less_where_the_tokens_are_than_plain_ones(rank):
    table, frequencies, _ = table_and_use()
    plain = torch.ones(len(table), dtype=torch.float64)
    errors = []
    for p in (frequencies, plain):
        R, P, _ = low_rank_table(table, rank, frequencies=p)
        errors.append(table_error(table - R @ P, frequencies=frequencies, metric=EYE))
    U, s, V = torch.linalg.svd(table, full_matrices=False)
    truncated = table_error(table - U[:, :rank] * s[:rank] @ V[:rank], frequencies=frequencies, metric=EYE)
    assert errors[0] < errors[1]
    assert errors[1] == pytest.approx(truncated, rel=1e-9), "without frequencies it is the truncated SVD"


@pytest.mark.parametrize(("rows", "columns"), [(30522, 384), (49152, 576), (97, 30), (96, 31)])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_digits_cover_the_table_and_the_rank_fills_the_budget(rows, columns, order):
    v, d = row_digits(rows, order), column_digits(columns, order)
    assert len(v) == len(d) == order
    assert rows <= math.prod(v) < rows * 1.2
    assert math.prod(d) == columns
    budget = rows * columns // 3
    rank = rank_within(v, d, budget)
    assert train_weights(v, d, train_ranks(v, d, rank)) <= budget < train_weights(v, d, train_ranks(v, d, rank + 1))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("order", [2, 3])
def test_a_full_train_is_the_table_and_lookups_are_its_rows(order, weighted):
    table, frequencies, _ = table_and_use(rows=50)
    rows, columns = row_digits(50, order), column_digits(12, order)
    layer = train_of(table, rows, columns, 10_000, frequencies if weighted else None)
    torch.testing.assert_close(layer(torch.arange(50)), table, atol=1e-9, rtol=1e-9)


def train_of(table, rows, columns, rank, frequencies=None) -> TensorTrainEmbedding:
    ranks = train_ranks(rows, columns, rank)
    layer = TensorTrainEmbedding(*table.shape, rows=rows, columns=columns, ranks=ranks, dtype=torch.float64)
    cores = tensor_train_cores(table, rows=rows, columns=columns, ranks=ranks, frequencies=frequencies)
    with torch.no_grad():
        for own, core in zip(layer.cores, cores, strict=True):
            own.copy_(core)
    return layer


@pytest.mark.parametrize("order", [2, 3, 4])
def test_lookups_and_head_agree_with_the_contracted_cores(order):
    table, _, hidden = table_and_use(rows=50)
    rows, columns = row_digits(50, order), column_digits(12, order)
    layer = train_of(table, rows, columns, 3)
    cores = list(layer.cores)
    whole = cores[0]  # (v₁, 1, d₁, r)
    for core in cores[1:]:
        joined = torch.einsum("vadr,wrec->vwadec", whole, core)
        whole = joined.reshape(whole.shape[0] * core.shape[0], 1, -1, core.shape[3])
    expanded = whole.reshape(-1, 12)[:50]
    indices = torch.tensor([[0, 49, 7], [7, 31, 30]])
    torch.testing.assert_close(layer(indices), expanded[indices])
    many = torch.arange(700) % 50
    torch.testing.assert_close(layer(many), expanded[many])
    head = TensorTrainHead(layer, bias=True)
    head.cores = layer.cores
    with torch.no_grad():
        head.bias.copy_(torch.arange(50.0))
    x = hidden[:6].view(2, 3, 12)
    torch.testing.assert_close(head(x), x @ expanded.T + torch.arange(50.0))


def test_weighting_digits_lowers_the_error_of_a_train_where_tokens_come_in_order_of_frequency():
    table, _, _ = table_and_use(rows=64)
    frequencies = 1 / torch.arange(1, 65, dtype=torch.float64)
    rows, columns = row_digits(64, 3), column_digits(12, 3)
    errors = []
    for p in (frequencies / frequencies.sum(), None):
        difference = table - train_of(table, rows, columns, 3, p)(torch.arange(64)).detach()
        errors.append(table_error(difference, frequencies=frequencies, metric=EYE))
    assert errors[0] < errors[1]


def test_shapes_that_do_not_cover_the_table_are_refused():
    with pytest.raises(ValueError, match="do not cover 50 by 12"):
        TensorTrainEmbedding(50, 12, rows=(7, 7), columns=(3, 4), ranks=(2,))
    with pytest.raises(ValueError, match="no chain"):
        TensorTrainEmbedding(50, 12, rows=(8, 8), columns=(3, 4), ranks=(2, 2))


METHODS = [{"embeddings": "low_rank", "round_to": 2}, {"embeddings": "tensor_train"}]


@pytest.mark.parametrize("options", METHODS)
@pytest.mark.parametrize("family", [*(name for name in FAMILIES if name != "gemma3"), "t5", "bart"])
def test_more_weights_lose_less_in_every_architecture(family, options):
    original = tiny(family)
    lost = []
    for keep in (0.3, 0.7):
        student = student_of(original)
        notes = TensorDecomposition(keep=keep, **options).apply(student, generator=torch.Generator())
        saved = count_parameters(original) - count_parameters(student.model)
        assert saved >= (1 - keep) * 96 * 32 * 0.9, "what is tied to the table is held once"
        assert not torch.equal(answer(student.model), answer(original)), "what the model reads is in factors"
        (layer,) = notes["layers"].values()
        assert 0 < layer["relative_error"] < 1
        lost.append(layer["relative_error"])
    assert lost[1] < lost[0]


@pytest.mark.parametrize("options", METHODS)
def test_a_tied_head_gives_the_logits_of_the_expanded_table(options):
    student = tiny_student("llama")
    TensorDecomposition(keep=0.5, **options).apply(student, generator=torch.Generator())
    model = student.model
    expanded = model.model.embed_tokens(torch.arange(96)).detach()
    hidden = model.model(torch.arange(10, 20)[None]).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), hidden @ expanded.T, atol=1e-5, rtol=1e-5)
    dense = copy.deepcopy(student.original)
    dense.model.embed_tokens.weight.data.copy_(expanded)
    torch.testing.assert_close(answer(model), answer(dense), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", METHODS)
def test_shared_factors_are_stored_once_and_stay_shared_after_loading_and_training(options, tmp_path):
    student = tiny_student("llama")
    TensorDecomposition(keep=0.5, **options).apply(student, generator=torch.Generator())
    Distill(steps=1, batch_size=4).apply(student, generator=torch.Generator().manual_seed(0))
    save_student(student, tmp_path)
    prove_reloads(student, tmp_path)
    model, _ = load_student_model(tmp_path, student.task)
    assert count_parameters(model) == count_parameters(student.model)
    head = {parameter.data_ptr() for parameter in model.lm_head.parameters()}
    assert head == {parameter.data_ptr() for parameter in model.model.embed_tokens.parameters()}


@pytest.mark.parametrize("options", METHODS)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_all_tables_that_are_tied_look_up_in_the_same_factors_which_are_stored_once(family, options, tmp_path):
    student = tiny_student(family)
    names = [name for name, module in student.model.named_modules() if name.endswith(("shared", "embed_tokens"))]
    assert len(names) > 1
    TensorDecomposition(keep=0.5, **options).apply(student, generator=torch.Generator())
    expanded = student.model.get_submodule(names[0])(torch.arange(96)).detach()
    dense = copy.deepcopy(student.original)
    dense.get_submodule(names[0]).weight.data.copy_(expanded)
    torch.testing.assert_close(answer(student.model), answer(dense), atol=1e-5, rtol=1e-5)
    save_student(student, tmp_path)
    prove_reloads(student, tmp_path)
    model, _ = load_student_model(tmp_path, student.task)
    for one in (student.model, model):
        held = [{parameter.data_ptr() for parameter in one.get_submodule(name).parameters()} for name in names]
        assert all(each == held[0] for each in held)


def test_a_table_that_is_tied_to_more_than_plain_tables_and_one_head_is_refused():
    model = tiny("llama")
    model.second_head = torch.nn.Linear(32, 96, bias=False)
    model.second_head.weight = model.model.embed_tokens.weight
    with pytest.raises(CompressKitError, match=r"is tied to lm_head, second_head: factors are shared with"):
        TensorDecomposition(keep=0.5).plan(model)
    model = tiny("bart")
    model.encoder.embed_tokens.embed_scale = 2.0
    with pytest.raises(CompressKitError, match=r"shared is tied to encoder.embed_tokens: factors"):
        TensorDecomposition(keep=0.5).plan(model)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("options", METHODS)
def test_it_chains_with_the_other_passes_in_any_order_that_is_not_refused(family, options, tmp_path):
    student = tiny_student(family)
    table = TensorDecomposition(keep=0.6, **options | {"round_to": 16})
    chain = [
        PruneWidth.model_validate({"keep": 0.75}),
        table,
        LowRank(keep=0.6, round_to=16, allocation="uniform", share=True, on_misfit="keep"),
        Quantize(bits=8, group_size=16),
    ]
    for one in chain:
        edits = one.plan(student.model)
        before = len(student.edits)
        one.apply(student, generator=torch.Generator().manual_seed(0))
        assert len(student.edits) - before == len(edits)
    save_student(student, tmp_path)
    model, _ = load_student_model(tmp_path, student.task)
    assert torch.equal(answer(model), answer(student.model))
    if family == "llama" and options["embeddings"] == "low_rank":
        assert isinstance(get_module(student.model, "lm_head.expand"), QuantLinear)


def test_it_is_refused_after_quantize():
    with pytest.raises(Exception, match=r"tensor cannot run after passes\[0\] made the model quantized"):
        Recipe.model_validate({"model": "m", "passes": [Quantize(), TensorDecomposition(keep=0.5)]})


def test_keep_one_changes_nothing():
    student = tiny_student("llama")
    assert TensorDecomposition(keep=1).plan(student.model) == []


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("gemma3", {}, "does more than look rows up"),
        ("bert", {"round_to": 30}, r"embeddings.word_embeddings \(96x32\): rank 30 saves nothing above 23"),
        ("bert", {"keep": 0.01}, r"the smallest rank, 8, holds \d+\.\d% of it"),
        ("bert", {"targets": "*position*"}, r"targets: '\*position\*' matches no module"),
    ],
)
def test_tables_that_cannot_be_factorised_are_named(family, options, words):
    with pytest.raises(CompressKitError, match=words) as caught:
        TensorDecomposition.model_validate({"keep": 0.5, **options}).plan(tiny(family))
    assert caught.value.fix


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_calibration_without_tokens_is_refused(family):
    student = tiny_student(family)
    student.corpus = dataclasses.replace(student.corpus, calibration=Sequences([[], []], 0))
    with pytest.raises(CompressKitError, match="the calibration sequences hold no token"):
        TensorDecomposition(keep=0.5).apply(student, generator=torch.Generator())


def test_a_second_time_is_a_misfit_that_is_listed_on_request():
    student = tiny_student("bert")
    TensorDecomposition(keep=0.5).apply(student, generator=torch.Generator())
    with pytest.raises(CompressKitError, match="is factorised already"):
        TensorDecomposition(keep=0.5).plan(student.model)
    notes = TensorDecomposition(keep=0.5, on_misfit="keep").apply(student, generator=torch.Generator())
    assert notes == {"layers": {}, "kept_dense": ["embeddings.word_embeddings"]}


@pytest.mark.parametrize("options", METHODS)
def test_the_report_has_plain_low_rank_of_equal_size_beside_it(options):
    student = tiny_student("llama")
    one = TensorDecomposition(keep=0.5, **options)
    layer = one.apply(student, generator=torch.Generator())["layers"]["model.embed_tokens"]
    columns = ["method", "rank", "tied head", "seen rows", "relative error", "plain low rank"]
    if one.embeddings == "low_rank":
        assert 0 < layer["relative_error"] < layer["plain_low_rank"]
    else:
        columns.append("weighted low rank")
        assert 0 < layer["weighted_low_rank"] < layer["plain_low_rank"]
        assert layer["relative_error"] > 0
    heads, cells = table_of_layers(one, {"layers": {"model.embed_tokens": layer}})
    assert heads == ["layers", *columns]
    told = dict(zip(heads, cells, strict=True))
    assert (told["layers"], told["method"], told["tied head"]) == ("model.embed_tokens", layer["method"], "lm_head")
    for name in ("relative_error", "plain_low_rank"):
        assert told[name.replace("_", " ")] == f"{layer[name]:.5g}"


def table_of_layers(one: TensorDecomposition, notes: dict) -> tuple[list[str], list[str]]:
    """Heads and cells of the one-line table that the rendered report has for the notes of a pass."""
    start = {"params": 1, "size_bytes": 1, "metrics": {}, "elapsed_s": 0.0, "options": {}, "notes": {}}
    passes = [{"kind": "original", **start}, {"kind": one.kind, **start, "options": one.model_dump(), "notes": notes}]
    said = {"model": "m", "task": "text-generation", "seed": 0, "warnings": [], "recipe": "model: m", "environment": {}}
    page = render_html({"schema_version": 1, **said, "passes": passes, "export": []})
    table = next(part for part in page.split("<table>") if part.startswith("<thead><tr><th>layers</th>"))
    heads = re.findall(r"<th>(.*?)</th>", table)
    return heads, re.findall(r"<td>(.*?)</td>", table[: table.index("</tbody>")])


@pytest.mark.parametrize("options", METHODS)
def test_the_onnx_file_agrees_and_holds_plain_operators(options, tmp_path):
    student = tiny_student("llama")
    student.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    TensorDecomposition(keep=0.5, **options).apply(student, generator=torch.Generator())
    export = OnnxExport(baselines=False, rounds=3, threads=1, texts=8, fuse=False, cache=False)
    entry = export.write(student, tmp_path / "onnx")
    assert entry["parity"]["relative_error"] < 1e-5
    assert {"Gather", "MatMul"} <= set(entry["operators"])
    assert not any("::" in name for name in entry["operators"])
    table = sum(p.numel() for p in student.model.get_input_embeddings().parameters())
    rest = count_parameters(student.model) - table
    assert entry["size_bytes"] < 4 * (rest + table) * 1.05 + 200_000, "factors that the head shares are stored once"
