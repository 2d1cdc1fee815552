"""The contract of a loss: options as fields, one scalar per batch, and a check before anything is trained."""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.config import Config, Registry
from compresskit.data import Batch
from compresskit.distill.outputs import Need, Outputs, StepWeights


class Loss(Config, ABC):
    """One way to compare a student with its teacher. Instances are frozen options and hold no other state."""

    kind: str
    weight: float = Field(default=1.0, gt=0, description="what this loss counts beside the others")

    #: The outputs that this loss reads.
    needs: ClassVar[frozenset[Need]]

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
