"""The contract of a loss: options as fields, one scalar per batch, and a check before anything is trained."""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.config import Config, Registry
from compresskit.data import Batch
from compresskit.distill.outputs import Need, Outputs, StepWeights, Wanted


class Loss(Config, ABC):
    """One way to compare a student with its teacher. Instances are frozen options and hold no other state."""

    kind: str
    weight: float = Field(default=1.0, ge=0, description="what this loss counts beside the others")
    weight_end: float | None = Field(
        default=None, ge=0, description="what it counts at the last step, reached along a line; by default `weight`"
    )

    @model_validator(mode="after")
    def _counts(self) -> "Loss":
        if not self.weight and not self.weight_end:
            raise ValueError("weight is 0 from beginning to end; raise it, or leave this loss out")
        return self

    #: The outputs that this loss reads.
    needs: ClassVar[frozenset[Need]] = frozenset()

    @property
    def final_weight(self) -> float:
        """What it counts at the end, which is what held-out losses are compared by."""
        return self.weight if self.weight_end is None else self.weight_end

    def weight_at(self, step: int, steps: int) -> float:
        """What it counts at `step`, 0 to steps − 1."""
        return self.weight + (self.final_weight - self.weight) * step / max(steps - 1, 1)

    def wants(self, student: PreTrainedModel) -> frozenset[Wanted]:
        """What it reads of this student: `needs`, and perhaps some of its layers."""
        return frozenset(self.needs)

    def asks(self, student: PreTrainedModel) -> frozenset[Wanted]:
        """What of that it reads of the teacher too."""
        return self.wants(student)

    def bridge(self, student: PreTrainedModel, teacher: PreTrainedModel) -> nn.Module | None:
        """What has to be learnt to compare the two: student's Outputs → Outputs as wide as the teacher's.

        It is trained beside the student and is never part of it. None where nothing has to be learnt.
        """
        return None

    @abstractmethod
    def check(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Refuse models that this loss does not suit; shapes alone are read, so both may be on the meta device.

        Raises:
            CompressKitError: with the loss that suits instead.
        """

    @abstractmethod
    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, weights: StepWeights) -> Tensor:
        """The loss of one batch, a scalar, without the factor `weight`.

        Sums over an optimiser step's batches to the step's mean, because `weights` are normalised over the step.
        """


LOSSES: Registry[Loss] = Registry("loss")
AnyLoss = Annotated[SerializeAsAny[Loss], BeforeValidator(LOSSES.parse)]
