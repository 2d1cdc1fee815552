"""The definition of `linear_kl`: all logits, then the loss of `compresskit.kernels.reference`."""

from torch import Tensor

from compresskit.kernels.buckets import TopK
from compresskit.kernels.linear_kl.problem import Problem, Projected
from compresskit.kernels.reference import reference_loss
from compresskit.kernels.slab import TokenTerms


def reference_linear_kl(problem: Problem) -> Tensor:
    """As `linear_kl`, with autograd's own gradient. Cost: about eight tensors of (T, V)."""
    rows, width, teacher = problem.active_rows(), problem.vocabulary, problem.teacher
    student = problem.head.logits_of_reduced(problem.hidden[rows])[:, :width]
    if isinstance(teacher, TopK):
        theirs = TopK(teacher.log_probs[rows], teacher.indices[rows])
    elif isinstance(teacher, Projected):
        theirs = teacher.head.logits_of_reduced(teacher.hidden[rows])[:, :width]
    else:
        theirs = teacher[rows, :width]
    labels = None if problem.labels is None else problem.labels[rows]
    label_weight = None if problem.label_weight is None else problem.label_weight[rows]
    return reference_loss(student, theirs, TokenTerms(problem.weight[rows], labels, label_weight), problem.divergence)
