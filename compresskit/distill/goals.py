"""What a student is trained for at one stage: the whole model on its losses, or before that each block alone.

    blocks   block k reads what its original read, t_k, and learns what the original gave:
             loss = mean over blocks of mean ‖b_k(t_k) − t_{k+1}‖² / ‖t_{k+1}‖²
    whole    Σ weight · loss(student, teacher), see `compresskit.distill.losses`

t_k is what the teacher's block read that the student's block k comes from, by the record of edits. Where blocks were
dropped, t_{k+1} is what the next block that is left read: so a block learns what it and the dropped ones after it did.
All blocks learn in one forward pass of the teacher and one of the student, and no gradient crosses from one to another.
What stands outside the blocks (tables, the last norm, the head) rests meanwhile. Source: block-local distillation of
Puzzle (arXiv:2411.19146). Not for students that were cut little: their blocks already agree, and what is left to learn
is how their errors add up, which only the whole model shows.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.distill.losses import Loss
from compresskit.distill.losses.embedding import relative_error
from compresskit.distill.outputs import Outputs, StepWeights, Stream, Wanted, carried, observe, precise
from compresskit.errors import CompressKitError
from compresskit.sentence import SentenceEmbedding
from compresskit.surgery.depth_edits import find_stack, get_stack
from compresskit.surgery.modes import without_cache


class Goal(Protocol):
    """What is minimised: parts with a name and a weight each.

    Attributes:
        names: of the parts, in the order of `parts`.
        asks: what the teacher has to say for it.
    """

    names: list[str]
    asks: frozenset[Wanted]

    def weights_at(self, step: int, steps: int) -> list[float]:
        """What each part counts at `step`, 0 to steps − 1, of this stage."""
        ...

    def parts(self, batch: Batch, weights: StepWeights, target: Outputs) -> list[Tensor]:
        """Each part of one batch, a scalar."""
        ...


class Whole:
    """The student as one, on its losses.

    Args:
        student, losses, pooling, teacher_shape: as `compresskit.distill.trainer.train` takes them.
        device: where what is learnt beside the student shall be.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        losses: Sequence[Loss],
        pooling: SentenceEmbedding,
        teacher_shape: PreTrainedModel,
        device: torch.device,
    ) -> None:
        self.student, self.losses, self.pooling = student, losses, pooling
        self.wants: frozenset[Wanted] = frozenset().union(*(loss.wants(student) for loss in losses))
        self.asks: frozenset[Wanted] = frozenset().union(*(loss.asks(student) for loss in losses))
        self.names = [
            loss.kind if sum(other.kind == loss.kind for other in losses) == 1 else f"{loss.kind}[{i}]"
            for i, loss in enumerate(losses)
        ]
        bridges = [loss.bridge(student, teacher_shape) for loss in losses]
        self.bridges = [None if bridge is None else bridge.to(device) for bridge in bridges]

    def bridge_parameters(self) -> dict[str, nn.Parameter]:
        """What is learnt beside the student, by name."""
        return {
            f"losses[{i}].{name}": value
            for i, bridge in enumerate(self.bridges)
            if bridge is not None
            for name, value in bridge.named_parameters()
        }

    def total(self, parts: Sequence[float]) -> float:
        """The weighted sum that is minimised at the end."""
        return sum(loss.final_weight * part for loss, part in zip(self.losses, parts, strict=True))

    def weights_at(self, step: int, steps: int) -> list[float]:
        """The weights of the losses."""
        return [loss.weight_at(step, steps) for loss in self.losses]

    def parts(self, batch: Batch, weights: StepWeights, target: Outputs) -> list[Tensor]:
        """Each loss."""
        ours = observe(self.student, batch, self.wants, self.pooling)
        return [
            loss(ours if bridge is None else bridge(ours), target, batch, weights)
            for loss, bridge in zip(self.losses, self.bridges, strict=True)
        ]


class Blocks:
    """Each block alone, on what the teacher's read and gave.

    Raises:
        CompressKitError: a student without one stack of blocks, or a teacher of another width.
    """

    def __init__(self, student: PreTrainedModel, teacher_shape: PreTrainedModel) -> None:
        self.student, self.names = student, ["blocks"]
        try:
            self.stack = find_stack(student)
        except CompressKitError as error:
            raise error.at("block_steps") from None
        self.places = [Stream(self.stack, place) for place in range(len(get_stack(student, self.stack)) + 1)]
        self.asks: frozenset[Wanted] = frozenset(self.places)
        ours, theirs = (model.config.get_text_config().hidden_size for model in (student, teacher_shape))
        if ours != theirs:
            what = f"a block of the student reads {ours} numbers, and the teacher's {theirs}"
            fix = "leave block_steps out, or use a teacher of the student's width"
            raise CompressKitError(what, where="block_steps", fix=fix)

    def weights_at(self, step: int, steps: int) -> list[float]:
        """The one part counts fully."""
        return [1.0]

    def parts(self, batch: Batch, weights: StepWeights, target: Outputs) -> list[Tensor]:
        """The mean over blocks of the weighted sum over tokens."""
        states = [target.inner[place].detach() for place in self.places]
        kept = weights.token.flatten().nonzero().flatten()
        weight = weights.token.flatten()[kept]
        given = blocks_alone(self.student, self.stack, batch, states[:-1])
        errors = [
            relative_error(precise(ours).flatten(0, 1)[kept], theirs.flatten(0, 1)[kept])
            for ours, theirs in zip(given, states[1:], strict=True)
        ]
        return [torch.stack([(weight * error).sum() for error in errors]).mean()]


def blocks_alone(model: PreTrainedModel, stack: str, batch: Batch, reads: Sequence[Tensor]) -> list[Tensor]:
    """What each block of `stack` gives, (B, L, H), where block k reads `reads[k]` instead of what the one before gave.

    Everything else that a block reads (masks, positions) is the model's own. The head is not run.
    """
    given: list[Tensor] = []

    def inject(place: int) -> Any:
        def hook(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if args:
                return (reads[place].to(args[0].dtype), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": reads[place].to(kwargs["hidden_states"].dtype)}

        return hook

    def note(_block: nn.Module, _args: Any, output: Any) -> None:
        given.append(carried(output))

    handles = []
    for place, block in enumerate(get_stack(model, stack)):
        handles.append(block.register_forward_pre_hook(inject(place), with_kwargs=True))
        handles.append(block.register_forward_hook(note))
    try:
        with without_cache(model):
            model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], return_dict=True)
    finally:
        for handle in handles:
            handle.remove()
    return given
