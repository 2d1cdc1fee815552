"""The processes that train one student together: what each holds of it, and how their shares become one step.

Here each holds the whole student, which is what one process does too. `compresskit.distill.sharded` has the other way.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.distill.batching import Numbered


class Processes:
    """Each holds the whole student; gradients are summed once a step.

    Args:
        accelerator: of one process or several.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.count, self.index = accelerator.num_processes, accelerator.process_index

    @contextmanager
    def holding(self, student: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """The model that is trained; afterwards `student` is what it became."""
        yield student

    def share(
        self,
        student: PreTrainedModel,
        bridges: Sequence[nn.Module],
        learned: Mapping[str, nn.Parameter],
        *,
        reads_inside: bool,
    ) -> dict[str, nn.Parameter]:
        """What this process holds of the weights that learn, those of the bridges among them, by the same names.

        Args:
            student: what `holding` gave.
            bridges: what learns beside it.
            learned: the weights.
            reads_inside: whether a loss reads what stands between a block's input and its output.
        """
        return dict(learned)

    def run(self, parts: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `parts` gives; the student and the bridges are used in here alone."""
        return parts()

    def mine(self, batches: Sequence[Numbered]) -> Sequence[Numbered]:
        """This process's share."""
        return batches[self.index :: self.count]

    def keep_pace(self, batches: Sequence[Numbered]) -> None:
        """Do what the others need of a process whose share of `batches` was smaller."""
        return

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").to(values.device)  # type: ignore[union-attr]

    def add_up_gradients(self, learned: Mapping[str, nn.Parameter]) -> None:
        """Put the sum over all processes into each gradient of a weight that learns in this step."""
        if self.count == 1:
            return
        values = [value for value in learned.values() if value.requires_grad]
        reached = self.add_up(torch.tensor([float(value.grad is not None) for value in values]))
        for value, processes in zip(values, reached.tolist(), strict=True):
            if not processes:
                continue  # without a gradient the optimiser leaves it alone, as it does in one process
            grad = torch.zeros_like(value) if value.grad is None else value.grad
            value.grad = self.accelerator.reduce(grad, "sum")  # type: ignore[assignment]

    def shorten_gradients(self, learned: Mapping[str, nn.Parameter], norm: float) -> float:
        """Shorten the gradient to `norm` where it is longer; returns how long it was."""
        return float(torch.nn.utils.clip_grad_norm_(list(learned.values()), norm))

    def whole(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Each weight as all processes hold it together."""
        return weights

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each tensor as all processes hold it together, at least in the main process."""
        return dict(tensors)

    def place(self, whole: Tensor, like: Tensor) -> Tensor:
        """What this process holds of a tensor that belongs to `like`, on its device."""
        return whole.to(like.device)

    def join_in_writing(self, due: bool) -> bool:
        """Whether this process has a part in writing a state, where the main one finds that it is `due`."""
        return due and self.accelerator.is_main_process
