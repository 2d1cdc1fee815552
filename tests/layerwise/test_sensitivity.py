"""The Fisher information of layers' outputs, against what it is made of and what it promises."""

import copy

import pytest
import torch
from families import ENCODER_SHAPE, random_sequences, tiny
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from compresskit.layerwise.answer import divergence, read_answer, sampled_gradient
from compresskit.layerwise.output_pca import OutputMetric, solve_output_pca
from compresskit.layerwise.sensitivity import Fisher, collect_fisher, range_basis
from compresskit.layerwise.trials import Trials, trial_weight
from compresskit.models import answer_kind
from compresskit.surgery.sites import find_anatomy


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


KINDS = ["classes", "labels", "scores", "states"]


def information(answer: torch.Tensor, kind: str, mean_square: torch.Tensor) -> torch.Tensor:
    """The Fisher information (V, V) of one answer (V,)."""
    if kind == "classes":
        p = answer.softmax(-1)
        return p.diag() - torch.outer(p, p)
    if kind == "labels":
        p = answer.sigmoid()
        return (p * (1 - p)).diag()
    return torch.eye(len(answer), dtype=answer.dtype) / mean_square


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_gradients_have_the_information_of_the_answer(kind):
    answer = draw(1, 4).expand(200_000, 4)
    g = sampled_gradient(answer, torch.Generator().manual_seed(1), kind=kind)
    expected = information(answer[0], kind, answer[0].square().mean())
    torch.testing.assert_close(g.T @ g / len(g), expected, atol=0.01, rtol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_is_zero_for_equal_answers_and_half_the_quadratic_form_for_near_ones(kind):
    answer, step = draw(50, 6), 1e-3 * draw(50, 6, seed=1)
    assert divergence(answer, answer, kind=kind) == 0
    forms = [s @ information(a, kind, answer.square().mean()) @ s for a, s in zip(answer, step, strict=True)]
    quadratic = torch.stack(forms).mean()
    assert divergence(answer, answer + step, kind=kind) == pytest.approx(float(quadratic) / 2, rel=1e-2)


@pytest.mark.parametrize(
    ("labels", "problem", "kind"),
    [
        (1, None, "scores"),
        (3, "regression", "scores"),
        (3, "multi_label_classification", "labels"),
        (3, None, "classes"),
    ],
)
def test_every_kind_of_head_has_a_metric(labels, problem, kind):
    config = BertConfig(**ENCODER_SHAPE, num_labels=labels, problem_type=problem)
    model = BertForSequenceClassification(config).eval()
    assert answer_kind(model) == kind
    groups = [site.linears for site in find_anatomy(model).sites]
    fisher = collect_fisher(model, list(random_sequences(16).batches(4)), groups, torch.Generator().manual_seed(0))
    assert all(fisher[group].power > 0 for group in groups)


def test_half_the_form_predicts_what_a_small_change_of_weights_costs():
    """In an encoder; in a decoder tokens read each other's errors, which a form on single tokens does not hold."""
    model = tiny("bert").double()
    batches = list(random_sequences(256, seed=5).batches(32))
    layer = find_anatomy(model).feed_forwards[0].output
    fisher = collect_fisher(model, batches * 8, [(layer,)], torch.Generator().manual_seed(0))[layer,]
    linear = model.get_submodule(layer)
    change = 1e-3 * draw(*linear.weight.shape, seed=2)
    inputs: list[torch.Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        before = [read_answer(model, batch) for batch in batches]
    handle.remove()
    x = torch.cat([one[batch["attention_mask"].bool()] for one, batch in zip(inputs, batches, strict=True)])
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_submodule(layer).weight += change
        after = [read_answer(changed, batch) for batch in batches]
    measured = divergence(torch.cat(before), torch.cat(after), kind=answer_kind(model))
    error = x @ change.T
    F = fisher.matrix.double() / fisher.count
    assert float(((error @ F) * error).sum(-1).mean()) / 2 == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_collecting_changes_nothing_and_is_repeatable(family):
    model = tiny(family)
    before = copy.deepcopy(model.state_dict())
    groups = [site.linears for site in find_anatomy(model).sites]
    batches = list(random_sequences(8).batches(4))
    first, second = (collect_fisher(model, batches, groups, torch.Generator().manual_seed(3)) for _ in range(2))
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    for group in groups:
        assert torch.equal(first[group].matrix, second[group].matrix)
        assert first[group].count == tokens
        assert first[group].matrix.any()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_metric_of_a_tall_weight_is_the_whole_form_within_its_range():
    weight, g = draw(9, 4), draw(500, 9, seed=1)
    basis = range_basis(weight)
    assert basis is not None
    fisher = Fisher((basis.T @ g.T @ g @ basis).float(), float(g.square().sum()), len(g), 9)
    metric = fisher.metric(weight)
    F = g.T @ g / len(g)
    damping = 0.1 * float(F.trace()) / 9
    torch.testing.assert_close(
        metric.within(basis), basis.T @ F @ basis + damping * torch.eye(4, dtype=F.dtype), atol=1e-6, rtol=1e-6
    )
    whole = metric.within(torch.eye(9, dtype=F.dtype))
    outside = torch.eye(9, dtype=F.dtype) - basis @ basis.T
    torch.testing.assert_close(basis @ metric.matrix @ basis.T + metric.rest * outside, whole)
    assert torch.linalg.eigvalsh(whole).min() > 0


def test_a_layer_that_no_gradient_reaches_has_a_metric_all_the_same():
    metric = Fisher(torch.zeros(4, 4), 0.0, 0, 4).metric()
    assert torch.isfinite(solve_output_pca(draw(4, 6), moment=torch.eye(6).double(), metric=metric).left).all()


@pytest.mark.parametrize(("outputs", "inputs"), [(5, 9), (9, 5), (7, 7)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_predicted_error_in_a_metric_is_the_measured_one_and_least(outputs, inputs, rank):
    M, x, root = draw(outputs, inputs), draw(400, inputs, seed=1), draw(outputs, outputs, seed=2)
    F = root @ root.T
    pca = solve_output_pca(M, moment=x.T @ x / len(x), metric=OutputMetric(None, F, 1.0))
    B, A = pca.factors(rank)

    def measured(answer):
        error = x @ (M - answer).T
        return float(((error @ F) * error).sum(-1).mean())

    assert float(pca.tail[rank]) == pytest.approx(measured(B @ A), rel=1e-9, abs=1e-9)
    plain = solve_output_pca(M, moment=x.T @ x / len(x))
    B, A = plain.factors(rank)
    assert float(pca.tail[rank]) <= measured(B @ A) * (1 + 1e-9)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_trial_sees_exactly_what_the_changed_model_answers(family):
    model = tiny(family)
    batches = list(random_sequences(8).batches(4))
    trials = Trials(model, batches)
    for block, name in enumerate(find_anatomy(model).blocks):
        assert trials.divergence(block) == 0
        layer = next(m for n, m in model.named_modules() if n.startswith(name) and isinstance(m, nn.Linear))
        weight = layer.weight.detach() * 0.9
        with trial_weight([layer], weight, layer.bias), torch.no_grad():
            tried = trials.divergence(block)
            now = torch.cat([read_answer(model, batch) for batch in batches])
        with torch.no_grad():
            before = torch.cat([read_answer(model, batch) for batch in batches])
        # The whole model's batches are compared one by one, and hidden states by the variance of their batch.
        assert tried == pytest.approx(divergence(before, now, kind=answer_kind(model)), rel=0.05)
        assert tried > 0
