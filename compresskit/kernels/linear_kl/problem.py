"""What `linear_kl` computes, checked and in one piece; every implementation reads this."""

from dataclasses import dataclass

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
        hidden: the student's, (T, H), already reduced where the head is of low rank.
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

    def active_rows(self) -> Tensor:
        """The tokens that count for anything, ascending."""
        counts = self.weight != 0
        if self.label_weight is not None:
            counts = counts | (self.label_weight != 0)
        return counts.nonzero().flatten()


def choose_teacher(
    hidden: Tensor | None, head: Head | None, logits: Tensor | None, topk: TopK | None
) -> tuple[Teacher, int | None]:
    """The teacher that was given, and the width of its vocabulary (a cache has none of its own).

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
        return Projected(hidden, head), head.weight.shape[0]
    if logits is not None:
        return logits, logits.shape[-1]
    assert topk is not None
    return topk, None


def check_problem(problem: Problem) -> None:
    """Refuse shapes, dtypes and devices that do not agree, and values that mean nothing.

    Raises:
        ValueError: with what was seen and what was expected.
    """
    tokens, teacher = len(problem.hidden), problem.teacher
    _check_head("student", problem.hidden, problem.head, tokens)
    if isinstance(teacher, Projected):
        head = teacher.head
        _check_head("teacher", teacher.hidden, head, tokens)
        weight = head.weight if isinstance(head.weight, Tensor) else None
        checks.check_constant(teacher_hidden=teacher.hidden, teacher_weight=weight, teacher_bias=head.bias)
        theirs = teacher.hidden
    elif isinstance(teacher, TopK):
        checks.check_top_k(teacher, tokens, problem.vocabulary)
        checks.check_devices(student_hidden=problem.hidden, indices=teacher.indices)
        theirs = teacher.log_probs
        checks.check_constant(teacher_topk=theirs)
    else:
        checks.check_matrix("teacher_logits", teacher, tokens)
        checks.check_constant(teacher_logits=teacher)
        theirs = teacher
    checks.check_floats(
        student_hidden=problem.hidden, teacher=theirs, token_weight=problem.weight, label_weight=problem.label_weight
    )
    checks.check_devices(student_hidden=problem.hidden, labels=problem.labels)
    checks.check_weights(tokens, token_weight=problem.weight, label_weight=problem.label_weight)
    checks.check_labels(problem.labels, problem.label_weight, tokens, problem.vocabulary)


def _check_head(who: str, hidden: Tensor, head: Head, tokens: int) -> None:
    weight = head.weight
    checks.check_matrix(f"{who}_hidden", hidden, tokens, weight.shape[1])
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"the {who}'s softcap must be above 0, got {head.softcap}")
    checks.check_vector(f"the {who}'s bias", head.bias, weight.shape[0])
    if not isinstance(weight, Tensor):
        return
    checks.check_floats(**{f"{who}_hidden": hidden, f"{who}_weight": weight, f"{who}_bias": head.bias})
    if hidden.dtype != weight.dtype:
        raise ValueError(f"the {who}'s hidden states are {hidden.dtype} and its head {weight.dtype}; cast one of them")
