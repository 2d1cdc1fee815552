"""Forward KL in fewer passes: the same loss and gradient as the slab loss of every divergence."""

import pytest
import torch

from compresskit.kernels.divergence import Divergence
from compresskit.kernels.forward_kl import forward_kl_, serves, stretch
from compresskit.kernels.linear_kl import Head, linear_kl
from compresskit.kernels.slab import Readout, TokenTerms, slab_loss_

PLAIN = (Readout(), Readout())


def quick(student, teacher, tokens, temperature, readouts, *, tile):
    """`forward_kl_` of plain products; the student's slab becomes the gradient."""
    ours, theirs = (
        slab * stretch(one, temperature, slab.dtype) for slab, one in zip((student, teacher), readouts, strict=True)
    )
    loss = forward_kl_(ours, theirs, tokens, temperature, readouts, tile=tile)
    student.copy_(ours)
    return loss


def slabs(vocabulary: int = 301, tokens: int = 7, *, near: float | None = None, dtype: torch.dtype = torch.float32):
    draw = torch.Generator().manual_seed(0)
    teacher = 4 * torch.randn(vocabulary, tokens, generator=draw, dtype=dtype)
    noise = torch.randn(vocabulary, tokens, generator=draw, dtype=dtype)
    student = teacher + near * noise if near is not None else 4 * noise
    return student, teacher, torch.rand(tokens, generator=draw, dtype=dtype)


@pytest.mark.parametrize("tile", [1, 64, 700, 1 << 16])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradient_are_those_of_the_slab_loss(tile, temperature, bias):
    student, teacher, weight = slabs(dtype=torch.float64)
    shift = torch.linspace(-2, 2, len(student), dtype=torch.float64) if bias else None
    readouts = (Readout(shift, 0.5), Readout(None if shift is None else -shift, 2.0))
    divergence = Divergence("forward_kl", temperature=temperature)
    truth = student.clone()
    expected = slab_loss_(truth, teacher, TokenTerms(weight), divergence, readouts, wants_grad=True)
    found = quick(student, teacher, TokenTerms(weight), temperature, readouts, tile=tile)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(student, truth, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("tile", [64, 1 << 16])
def test_labels_are_mixed_in_as_the_slab_loss_does(tile):
    student, teacher, weight = slabs(dtype=torch.float64)
    weight[1] = 0
    labels = torch.tensor([0, 300, 5, 5, 17, 1, 2])
    label_weight = torch.tensor([0.5, 1.0, 0.0, 0.25, 2.0, 0.1, 0.0], dtype=torch.float64)
    tokens = TokenTerms(weight, labels, label_weight)
    readouts = (Readout(torch.linspace(-2, 2, len(student), dtype=torch.float64), 0.5), Readout())
    assert serves([student.dtype] * 2, Divergence(), readouts, labels=True)
    truth = student.clone()
    expected = slab_loss_(truth, teacher, tokens, Divergence(), readouts, wants_grad=True)
    found = quick(student, teacher, tokens, 1.0, readouts, tile=tile)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(student, truth, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("near", [0.0, 1e-4, 1e-2])
def test_near_the_teacher_float32_is_no_worse_than_plain_torch(near):
    student, teacher, weight = slabs(20_000, 16, near=near)
    log_p, log_q = teacher.double().log_softmax(0), student.double().log_softmax(0)
    truth = (weight.double() * (log_p.exp() * (log_p - log_q)).sum(0)).sum()
    plain = (weight * torch.nn.functional.kl_div(
        student.log_softmax(0), teacher.log_softmax(0), log_target=True, reduction="none").sum(0)).sum()  # fmt: skip
    found = quick(student, teacher, TokenTerms(weight), 1.0, PLAIN, tile=1 << 12)
    assert abs(found - truth) <= 2 * abs(plain - truth) + 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [64, 1 << 16])
@pytest.mark.parametrize("labelled", [False, True])
def test_gradients_of_narrow_slabs_are_rounded_once(dtype, tile, labelled):
    """Half a step of the dtype away, at most, from what float64 makes of the very same logits."""
    student, teacher, weight = (one.to(dtype) for one in slabs(near=0.3))
    weight = weight.float()
    labels = torch.tensor([0, 300, 5, 5, 17, 1, 2]) if labelled else None
    tokens = TokenTerms(weight, labels, None if labels is None else weight.flip(0))
    wide = TokenTerms(weight.double(), labels, None if labels is None else weight.flip(0).double())
    temperature = 1.0 if labelled else 2.5
    readouts = (Readout(torch.linspace(-2, 2, len(student)), 0.5), Readout(None, 2.0))
    assert serves([dtype] * 2, Divergence(temperature=temperature), readouts, labels=labelled)
    truth = student.double()
    expected = slab_loss_(truth, teacher.double(), wide, Divergence(temperature=temperature), readouts, wants_grad=True)
    found = quick(student, teacher, tokens, temperature, readouts, tile=tile)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    limits = torch.finfo(dtype)
    step = truth.abs().clamp_min(limits.smallest_normal) * limits.eps
    assert ((student.double() - truth).abs() <= 0.51 * step + 1e-7).all()


def test_a_narrow_bias_is_not_rounded_again():
    student, teacher, weight = slabs()
    bias = torch.randn(len(student)).bfloat16()
    readouts = (Readout(bias), Readout(-bias))
    wide = tuple(Readout(one.bias.double()) for one in readouts)
    truth = student.double()
    expected = slab_loss_(truth, teacher.double(), TokenTerms(weight.double()), Divergence(), wide, wants_grad=True)
    found = quick(student, teacher, TokenTerms(weight), 1.0, readouts, tile=64)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(student.double(), truth, rtol=1e-4, atol=1e-7)


def test_logits_of_eighty_stay_finite_and_exact():
    student, teacher, weight = slabs()
    student[5], teacher[9], student[7] = 80, 80, -80
    truth, expected_of = student.double(), teacher.double()
    expected = slab_loss_(truth, expected_of, TokenTerms(weight.double()), Divergence(), PLAIN, wants_grad=True)
    found = quick(student, teacher, TokenTerms(weight), 1.0, PLAIN, tile=64)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(student.double(), truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("divergence", "readout", "dtype", "labels"),
    [
        (Divergence("reverse_kl"), Readout(), torch.float32, False),
        (Divergence(weight_rule="entropy"), Readout(), torch.float32, False),
        (Divergence(), Readout(softcap=30.0), torch.float32, False),
        (Divergence(), Readout(torch.tensor([0.0, float("-inf")])), torch.float32, False),
        (Divergence(), Readout(), torch.bfloat16, False),  # beside a float32 teacher
        (Divergence(temperature=2.0), Readout(), torch.float32, True),
    ],
)
def test_what_it_cannot_compute_is_left_to_the_slab_loss(divergence, readout, dtype, labels):
    assert not serves([dtype, torch.float32], divergence, (readout, Readout()), labels=labels)
    assert serves([torch.float32] * 2, Divergence(), PLAIN, labels=True)


def test_columns_that_both_heads_give_minus_infinity_add_nothing():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8)
    bias = torch.zeros(20)
    bias[3:6] = float("-inf")
    teacher, every = torch.randn(5, 8), torch.full((5,), 0.2)
    keep = bias == 0
    with_columns = linear_kl(hidden, Head(weight, bias), teacher, Head(weight.flip(1), bias), token_weight=every)
    without = linear_kl(hidden, Head(weight[keep]), teacher, Head(weight.flip(1)[keep]), token_weight=every)
    torch.testing.assert_close(with_columns, without)
