"""Projections from a student's width to its teacher's, trained beside the student and thrown away with the loss.

    s (…, H_s)  ->  s Pᵀ (…, H_t)        one P for each hidden layer that is compared, or one for sentences

Only for a teacher of another width: a student that was cut from its teacher needs none (`compresskit.distill.lineage`).
Source: FitNets (arXiv:1412.6550).
"""

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from compresskit.distill.outputs import Outputs


class HiddenBridge(nn.Module):
    """One projection for each of the student's hidden layers that is compared; rows orthonormal at first."""

    def __init__(self, layers: Iterable[int], student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.projections = nn.ModuleList([projection(student_width, teacher_width) for _ in self.layers])

    def forward(self, student: Outputs) -> Outputs:
        """The same with these layers as wide as the teacher's."""
        assert student.hidden is not None
        hidden = list(student.hidden)
        for layer, project in zip(self.layers, self.projections, strict=True):
            hidden[layer] = project(hidden[layer])
        return replace(student, hidden=tuple(hidden))


class SentenceBridge(nn.Module):
    """One projection for sentence embeddings; rows orthonormal at first."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.projection = projection(student_width, teacher_width)

    def forward(self, student: Outputs) -> Outputs:
        """The same with embeddings as wide as the teacher's."""
        return replace(student, sentence=self.projection(student.sentence))


def projection(student_width: int, teacher_width: int) -> nn.Linear:
    """(H_t, H_s) without a bias, orthonormal along its shorter side: lengths and angles are kept or only cut."""
    linear = nn.Linear(student_width, teacher_width, bias=False)
    nn.init.orthogonal_(linear.weight)
    return linear
