"""What rounding leaves of the divergences: near the teacher, under offsets, where a cache or a weight says nothing."""

import math
from typing import get_args

import pytest
import torch

from compresskit.kernels.buckets import TopK, bucket_loss_
from compresskit.kernels.divergence import Divergence, Kind, summand_and_slope
from compresskit.kernels.forward_kl import forward_kl_, stretch
from compresskit.kernels.linear_kl import Head, linear_kl
from compresskit.kernels.reference import reference_loss
from compresskit.kernels.slab import Readout, TokenTerms, slab_loss_

KINDS = get_args(Kind)
PLAIN = (Readout(), Readout())


def draw(near: float, offset: float = 0.0, vocabulary: int = 4000, tokens: int = 8):
    """Slabs of a teacher and of a student that is `near` it, (V, C) float32."""
    generator = torch.Generator().manual_seed(1)
    teacher = 4 * torch.randn(vocabulary, tokens, generator=generator)
    return teacher + near * torch.randn(vocabulary, tokens, generator=generator) + offset, teacher


def errors(found, truth, grad, true_grad):
    return abs(float(found) - float(truth)) / float(truth), float((grad - true_grad).norm() / true_grad.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("near", "temperature"), [(1e-2, 1.0), (1e-3, 1.0), (1e-2, 20.0), (0.1, 0.5)])
def test_near_the_teacher_float32_is_as_near_to_float64_as_its_logits_allow(kind, near, temperature):
    student, teacher = draw(near)
    tokens, divergence = TokenTerms(torch.ones(8)), Divergence(kind, 0.3, temperature)
    wide = student.double()
    truth = slab_loss_(wide, teacher.double(), TokenTerms(torch.ones(8).double()), divergence, PLAIN, wants_grad=True)
    leaf = student.T.clone().requires_grad_()
    plain = reference_loss(leaf, teacher.T, tokens, divergence)
    found = slab_loss_(student, teacher, tokens, divergence, PLAIN, wants_grad=True)
    value, grad = errors(found, truth, student, wide)
    plain_value, plain_grad = errors(plain.detach(), truth, torch.autograd.grad(plain, leaf)[0].T, wide)
    # ln q − ln p is rounded to float32 at the size of ln p; D is of second order in it.
    apart = near / temperature
    assert value <= min(plain_value + 1e-5 / apart, 5e-5 / apart)
    if kind != "total_variation":  # its signs are noise below the tie
        assert grad <= min(plain_grad + 2e-7 / apart, 2e-6 / apart)


def test_jsd_adds_nothing_of_first_order():
    student, teacher = draw(1e-3)
    divergence, wide = Divergence("jsd", 0.3), draw(1e-3)[0].double()
    truth = slab_loss_(wide, teacher.double(), TokenTerms(torch.ones(8).double()), divergence, PLAIN, wants_grad=False)
    found = slab_loss_(student, teacher, TokenTerms(torch.ones(8)), divergence, PLAIN, wants_grad=False)
    assert abs(found - truth) <= 2e-3 * truth


@pytest.mark.parametrize("mix", [1e-4, 0.3, 1 - 1e-4])
@pytest.mark.parametrize("kind", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_mixtures_of_far_probabilities_keep_their_precision(kind, mix):
    log_p, log_q = torch.cartesian_prod(*[torch.tensor([-120.0, -30.0, -9.0, -0.2, -1e-3])] * 2).T
    exact = summand_and_slope(Divergence(kind, mix), log_p.double(), log_q.double())
    for one, truth in zip(summand_and_slope(Divergence(kind, mix), log_p, log_q), exact, strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=1e-4, atol=1e-6)
    p, q = log_p.double().exp(), log_q.double().exp()
    m = mix * q + (1 - mix) * p if kind == "skew_reverse_kl" else mix * p + (1 - mix) * q
    parts = {
        "jsd": mix * p * (p / m).log() + (1 - mix) * q * (q / m).log(),
        "skew_forward_kl": p * (p / m).log() - p + m,
    }
    expected = parts.get(kind, q * (q / m).log() - q + m)
    torch.testing.assert_close(exact[0], expected, rtol=1e-9, atol=1e-15)


def test_total_variation_has_its_gradient_at_high_temperature_and_none_for_noise():
    log_p = torch.full((1,), math.log(0.1))
    roundings = torch.finfo(torch.float32).eps
    for temperature, equal, apart in ((1.0, 40, 90), (20.0, 8, 40)):
        for gap, moves in ((equal, False), (apart, True)):
            log_q = log_p + gap * roundings
            _, slope, _ = summand_and_slope(Divergence("total_variation", temperature=temperature), log_p, log_q)
            assert bool(slope > 0) == moves


@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_an_offset_costs_the_quick_forward_kl_nothing(offset):
    student, teacher = draw(1e-2, offset)
    wide, one = student.double(), stretch(Readout(), 1.0, torch.float32)
    truth = slab_loss_(wide, teacher.double(), TokenTerms(torch.ones(8).double()), Divergence(), PLAIN, wants_grad=True)
    found = forward_kl_(student * one, teacher * one, TokenTerms(torch.ones(8)), 1.0, PLAIN, tile=1 << 12)
    assert abs(found - truth) <= 8e-4 * truth


@pytest.mark.parametrize("offset", [0.0, 80.0])
def test_an_offset_costs_a_cached_teacher_nothing(offset):
    student, teacher = draw(1e-2, offset)
    cache = TopK.of(teacher.T, 64)
    wide, exact = student.double(), TopK(cache.log_probs.double(), cache.indices)
    for slab, top in ((student, cache), (wide, exact)):
        weight = torch.ones(8, dtype=slab.dtype)
        bucket_loss_(slab, top, TokenTerms(weight), Divergence(), Readout(), wants_grad=True, tile=1 << 12)
    assert (student - wide).norm() <= 6e-5 * wide.norm()


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_tail_that_rounds_to_nothing_leaves_a_finite_lower_bound(impl, kind):
    torch.manual_seed(0)
    logits = 2 * torch.randn(4, 1000)
    logits[0, 5] = 30.0
    hidden = (logits + 0.1 * torch.randn(4, 1000)).requires_grad_()
    divergence, rest = Divergence(kind, 0.3), {"token_weight": torch.tensor([1.0, 0, 0, 0]), "impl": impl}
    head = torch.eye(1000)
    whole = linear_kl(hidden, head, teacher_logits=logits, divergence=divergence, **rest)
    loss = linear_kl(hidden, head, teacher_topk=TopK.of(logits, 64), divergence=divergence, **rest)
    assert -1e-7 <= loss <= whole + 1e-6
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_every_finite_column_has_a_gradient(impl, kind):
    logits, bias = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)), torch.zeros(20)
    bias[4:7] = -math.inf
    hidden = logits.flip(0).clone().requires_grad_()
    rest = {"token_weight": torch.ones(3), "divergence": Divergence(kind, 0.3), "impl": impl}
    ours = Head(torch.eye(20), bias)
    losses = [
        linear_kl(hidden, ours, teacher_topk=TopK.of(logits + bias, 17), **rest),
        linear_kl(hidden, ours, teacher_logits=logits + bias, **rest),
    ]
    grads = [torch.autograd.grad(loss, hidden)[0] for loss in losses]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["hidden", "logits", "topk"])
def test_a_token_that_counts_for_its_label_alone_reads_no_teacher(impl, kind, form):
    generator = torch.Generator().manual_seed(0)
    teacher, hidden = torch.randn(3, 20, generator=generator), torch.randn(3, 20, generator=generator).requires_grad_()
    found = []
    for filling in (0.0, math.nan):
        cache = TopK.of(teacher, 4)
        spoilt = teacher.clone()
        spoilt[1], cache.log_probs[1] = filling, -3.0 if filling == 0 else math.nan
        given = {
            "hidden": {"teacher_hidden": spoilt, "teacher_head": torch.eye(20)},
            "logits": {"teacher_logits": spoilt},
            "topk": {"teacher_topk": cache},
        }[form]
        loss = linear_kl(
            hidden, torch.eye(20), **given, token_weight=torch.tensor([1.0, 0, 1]), labels=torch.arange(3),
            label_weight=torch.ones(3), divergence=Divergence(kind, 0.3, weight_rule="entropy"), impl=impl,
        )  # fmt: skip
        found.append((loss.detach(), torch.autograd.grad(loss, hidden)[0]))
    torch.testing.assert_close(found[0], found[1])
    assert found[0][1].isfinite().all()


@pytest.mark.parametrize(
    ("logits", "temperature", "message"),
    [
        (torch.ones(2, 5), 0.0, "above 0 and finite, got 0.0"),
        (torch.ones(2, 5), math.nan, "above 0 and finite, got nan"),
        (torch.ones(2, 5).long(), 1.0, "must be floating point, got torch.int64"),
    ],
)
def test_a_cache_of_no_distribution_is_refused(logits, temperature, message):
    with pytest.raises(ValueError, match=message):
        TopK.of(logits, 2, temperature=temperature)
