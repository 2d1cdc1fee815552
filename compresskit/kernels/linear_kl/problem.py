"""What `linear_kl` computes, checked and in one piece; every implementation reads this."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compresskit.kernels import checks
from compresskit.kernels.buckets import TopK
from compresskit.kernels.divergence import Divergence
from compresskit.kernels.linear_kl.head import Head

# T tokens, V vocabulary, H hidden, K entries of a top-k cache


@dataclass(frozen=True)
class Projected:
    """A teacher given by its hidden states and head."""

    hidden: Tensor
    head: Head


Teacher = Projected | TopK | Tensor


@dataclass(frozen=True)
class Problem:
    """A student, its teacher and what each token counts.

    Attributes:
        hidden: the student's, (T, H).
        head: the student's.
        teacher: hidden states with a head, a cache, or logits (T, V_t).
        weight: w (T,).
        labels: (T,) int64, or None; read where `label_weight` is not 0.
        label_weight: c (T,); None exactly where `labels` is.
        divergence: what is measured.
        vocabulary: the columns that are compared: the shorter of both.
    """

    hidden: Tensor
    head: Head
    teacher: Teacher
    weight: Tensor
    labels: Tensor | None
    label_weight: Tensor | None
    divergence: Divergence
    vocabulary: int

    def counts(self) -> Tensor:
        """Whether each token counts for anything, (T,)."""
        counts = self.weight != 0
        return counts if self.label_weight is None else counts | (self.label_weight != 0)

    def active_rows(self) -> Tensor:
        """The tokens that count for anything, ascending."""
        return self.counts().nonzero().flatten()


def choose_teacher(hidden: Tensor | None, head: Head | None, logits: Tensor | None, topk: TopK | None) -> Teacher:
    """The teacher that was given.

    Raises:
        ValueError: none or several, or hidden states without a head.
    """
    given = [
        name
        for name, one in (("teacher_hidden", hidden), ("teacher_logits", logits), ("teacher_topk", topk))
        if one is not None
    ]
    if len(given) != 1:
        seen = ", ".join(given) or "none"
        raise ValueError(f"exactly one of teacher_hidden, teacher_logits and teacher_topk is expected, got {seen}")
    if (hidden is None) != (head is None):
        raise ValueError("teacher_hidden and teacher_head belong together, and only one of them is given")
    if hidden is not None and head is not None:
        return Projected(hidden, head)
    chosen = topk if logits is None else logits
    assert chosen is not None
    return chosen


def checked_problem(
    hidden: Tensor,
    head: Head,
    teacher: Teacher,
    weight: Tensor,
    labels: Tensor | None,
    label_weight: Tensor | None,
    divergence: Divergence,
) -> Problem:
    """The problem, nothing of it computed yet.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree, or values that mean nothing; with what was seen and
            what was expected.
    """
    checks.check_matrix("student_hidden", hidden)
    tokens = len(hidden)
    _check_head("student", hidden, head, tokens)
    vocabulary = head.weight.shape[0]
    if isinstance(teacher, Projected):
        _check_head("teacher", teacher.hidden, teacher.head, tokens)
        parts = {f"teacher_{name}": one for name, one in vars(teacher.head).items() if isinstance(one, Tensor)}
        checks.check_constant(teacher_hidden=teacher.hidden, **parts)
        theirs, vocabulary = teacher.hidden, min(vocabulary, teacher.head.weight.shape[0])
    elif isinstance(teacher, TopK):
        checks.check_devices(student_hidden=hidden, indices=teacher.indices)
        theirs = teacher.log_probs
        checks.check_constant(teacher_topk=theirs)
    else:
        checks.check_matrix("teacher_logits", teacher, tokens)
        checks.check_constant(teacher_logits=teacher)
        theirs, vocabulary = teacher, min(vocabulary, teacher.shape[1])
    checks.check_vocabulary(vocabulary)
    checks.check_floats(student_hidden=hidden, teacher=theirs, token_weight=weight, label_weight=label_weight)
    checks.check_devices(student_hidden=hidden, labels=labels)
    checks.check_weights(tokens, token_weight=weight, label_weight=label_weight)
    checks.check_labels(labels, label_weight, tokens, vocabulary)
    problem = Problem(hidden, head, teacher, weight, labels, label_weight, divergence, vocabulary)
    if isinstance(teacher, TopK):
        checks.check_top_k(teacher, problem.counts(), weight != 0, vocabulary)
    return problem


def autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    """What autocast runs the products of these hidden states in; None where it leaves them alone."""
    device = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _check_head(who: str, hidden: Tensor, head: Head, tokens: int) -> None:
    """Refuse a head whose parts do not fit one another, or the hidden states (T, H)."""
    weight, reduce = head.weight, head.reduce
    if len(weight.shape) != 2:
        raise ValueError(f"the {who}'s weight must be (V, H), got {tuple(weight.shape)}")
    vocabulary, width = weight.shape
    if reduce is not None:
        checks.check_matrix(f"the {who}'s reduce", reduce, width)
        width = reduce.shape[1]
    checks.check_matrix(f"{who}_hidden", hidden, tokens, width)
    checks.check_vector(f"the {who}'s bias", head.bias, vocabulary)
    if head.softcap is not None and not (head.softcap > 0 and math.isfinite(head.softcap)):
        raise ValueError(f"the {who}'s softcap must be above 0 and finite, got {head.softcap}")
    if not math.isfinite(head.scale):
        raise ValueError(f"the {who}'s scale must be finite, got {head.scale}")
    products = {"reduce": reduce, "weight": weight if isinstance(weight, Tensor) else None}
    checks.check_floats(
        **{f"{who}_hidden": hidden, f"{who}_bias": head.bias} | {f"{who}_{name}": one for name, one in products.items()}
    )
    if autocast_dtype(hidden) is not None:
        return
    for name, one in products.items():
        if one is not None and one.dtype != hidden.dtype:
            said = "its head" if name == "weight" else f"its head's {name}"
            raise ValueError(f"the {who}'s hidden states are {hidden.dtype} and {said} {one.dtype}; cast one of them")
