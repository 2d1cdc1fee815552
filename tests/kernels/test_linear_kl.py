from typing import get_args

import pytest
import torch

from compresskit.kernels.divergence import Divergence, Kind
from compresskit.kernels.linear_kl import Head, TopK, linear_kl

KINDS = get_args(Kind)
FUSED = "chunked"  # Triton has its own test, in a process of its own
T, HS, HT, V = 7, 5, 6, 23


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(dtype=torch.float64, tokens=T, student_width=HS, vocabulary=V, **changes):
    """Keyword arguments of `linear_kl`; hidden states and the student's weight require grad."""
    weight = torch.rand(tokens, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    return {
        "student_hidden": draw(tokens, student_width, seed=1, dtype=dtype).requires_grad_(),
        "student_head": Head(draw(vocabulary, student_width, seed=2, dtype=dtype).requires_grad_()),
        "teacher_hidden": draw(tokens, HT, seed=3, dtype=dtype),
        "teacher_head": draw(vocabulary, HT, seed=4, dtype=dtype),
        "token_weight": weight,
        "memory_mb": 1,
        **changes,
    }


def leaves(given):
    head = given["student_head"]
    return [
        one
        for one in (given["student_hidden"], head.weight, head.bias, head.reduce)
        if isinstance(one, torch.Tensor) and one.requires_grad
    ]


def value_and_grads(given, impl):
    wanted = leaves(given)
    loss = linear_kl(**given, impl=impl)
    return loss.detach(), torch.autograd.grad(loss, wanted)


def rich(dtype=torch.float64, **changes):
    """Everything at once: bias, scale and cap on both sides, labels, a masked token."""
    given = arguments(dtype, **changes)
    bias = draw(V, seed=6, dtype=dtype).requires_grad_()
    labels = torch.randint(V, (T,), generator=torch.Generator().manual_seed(7))
    label_weight = torch.linspace(0, 1, T).to(dtype)
    given["token_weight"][3] = 0
    return given | {
        "student_head": Head(given["student_head"].weight, bias, scale=0.7, softcap=4.0),
        "teacher_head": Head(given["teacher_head"], draw(V, seed=8, dtype=dtype), scale=1.3, softcap=5.0),
        "labels": labels,
        "label_weight": label_weight,
    }


def teachers(given, divergence):
    """The three ways to give the teacher of `given`, the same one each time."""
    head = given["teacher_head"]
    head = head if isinstance(head, Head) else Head(head)
    logits = head.logits_of_reduced(given["teacher_hidden"])
    rest = {name: one for name, one in given.items() if not name.startswith("teacher")}
    return {
        "hidden": given,
        "logits": rest | {"teacher_logits": logits},
        "topk": rest | {"teacher_topk": TopK.of(logits, 4, temperature=divergence.temperature)},
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher", ["hidden", "logits", "topk"])
@pytest.mark.parametrize("rule", ["none", "confidence", "entropy"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_chunked_is_the_reference_with_its_autograd(kind, teacher, rule, temperature):
    divergence = Divergence(kind, 0.3, temperature, rule)
    given = teachers(rich(divergence=divergence), divergence)[teacher]
    torch.testing.assert_close(
        value_and_grads(given, FUSED), value_and_grads(given, "reference"), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("impl", [FUSED, "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_derivative_of_the_value(impl, kind):
    given = rich(divergence=Divergence(kind, 0.3, 2.0))
    head = given["student_head"]

    def loss(hidden, weight, bias):
        changed = Head(weight, bias, scale=head.scale, softcap=head.softcap)
        return linear_kl(**given | {"student_hidden": hidden, "student_head": changed}, impl=impl)

    assert torch.autograd.gradcheck(loss, (given["student_hidden"], head.weight, head.bias))
