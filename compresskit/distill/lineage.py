"""What of its teacher each part of a student stands for, read from the record of edits.

    hidden state k           the state that the next block read in the original        (blocks were dropped)
    what a block reads       the state that its original read; of the first one always the embeddings
    layer m's channels K     the original layer's channels K                           (neurons, heads were cut)
    attention map of a head  the same head's map, in the block that it comes from

So a cut student is compared with what is left of the original, and nothing has to be learnt to compare them. A teacher
of other shapes has no such record: whole hidden states are then mapped evenly, or through a projection that is trained
beside the student and thrown away.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from compresskit.distill.outputs import Inner, Maps, Outputs, Stream, Wanted
from compresskit.errors import CompressKitError
from compresskit.surgery.depth_edits import find_stack, get_stack
from compresskit.surgery.edits import Edit
from compresskit.surgery.provenance import Provenance

_Part = Inner | Maps | Stream


def even_layer(layer: int, student_blocks: int, teacher_blocks: int) -> int:
    """The teacher's layer for the student's, both 0 (embeddings) to their number of blocks; halves round up."""
    return (2 * layer * teacher_blocks + student_blocks) // (2 * student_blocks)


@dataclass(frozen=True)
class Lineage:
    """The map from a student's parts to its teacher's.

    Attributes:
        provenance: which layers, heads and neurons of the teacher the student still has.
        layers: which of the teacher's hidden states (0 the embeddings) stand for the student's, in order; None is all.
    """

    provenance: Provenance
    layers: tuple[int, ...] | None = None

    @classmethod
    def of(cls, edits: Sequence[Edit], original: PreTrainedModel) -> "Lineage":
        """The map from what `edits` made of `original` to it."""
        provenance = Provenance(edits)
        stack = next(iter(provenance.stacks), None)
        if stack is None:
            return cls(provenance)
        return cls(provenance, provenance.hidden_layers(stack, len(get_stack(original, stack))))

    @classmethod
    def to_other(cls, student: PreTrainedModel, teacher: PreTrainedModel) -> "Lineage":
        """The map to a teacher that the student was not cut from: block by block, evenly, the last to the last."""
        provenance = Provenance()
        try:
            stack = find_stack(student)
            ours, theirs = len(get_stack(student, stack)), len(get_stack(teacher, stack))
        except (CompressKitError, AttributeError):  # no blocks, or others: then no inner layer is compared
            return cls(provenance)
        if ours != theirs:
            provenance.stacks[stack] = [even_layer(block + 1, ours, theirs) - 1 for block in range(ours)]
        return cls(provenance)

    def asked(self, needs: frozenset[Wanted]) -> frozenset[Wanted]:
        """What the teacher has to show where the student shows `needs`."""
        return frozenset(self._source(one) if isinstance(one, _Part) else one for one in needs)

    def left_of(self, needs: frozenset[Wanted], teacher: Outputs) -> Outputs:
        """The teacher's outputs for `asked(needs)`, cut to what the student has and under the student's names."""
        inner = {one: self._cut(one, teacher.inner[self._source(one)]) for one in needs if isinstance(one, _Part)}
        hidden = teacher.hidden
        if hidden is not None and self.layers is not None:
            hidden = tuple(hidden[layer] for layer in self.layers)
        return replace(teacher, hidden=hidden, inner=inner)

    def _source(self, one: _Part) -> _Part:
        if isinstance(one, Inner):
            return replace(one, module=self.provenance.original_name(one.module))
        blocks = next(iter(self.provenance.stacks.values()), None)
        if isinstance(one, Stream):
            return replace(one, place=self._place(one.place, blocks))
        query = self.provenance.original_name(one.query)
        return replace(one, query=query, block=one.block if blocks is None else blocks[one.block])

    def _place(self, place: int, blocks: Sequence[int] | None) -> int:
        """Where the teacher's stream is what the student's is at `place`: as for hidden states."""
        if self.layers is not None:
            return self.layers[place]
        return place if blocks is None or place == 0 else blocks[place - 1] + 1

    def _cut(self, one: _Part, given: Tensor) -> Tensor:
        if isinstance(one, Stream):
            return given
        if isinstance(one, Inner):
            return self.provenance.left_of(one.module, given)
        kept = self.provenance.kept.get(self.provenance.original_name(one.query))
        if kept is None:
            return given
        heads = kept[:: one.head_dim] // one.head_dim  # rows of a kept head stand together, in its order
        return given.index_select(1, heads[heads < given.shape[1]].to(given.device))  # fused: the queries come first


def missing_layer(lineage: Lineage, needs: frozenset[Wanted], teacher: PreTrainedModel) -> str | None:
    """The first layer that the teacher would have to show for `needs` and does not have."""
    named = {name for name, _ in teacher.named_modules()}
    asked = sorted(_module_of(one) for one in lineage.asked(needs) if isinstance(one, _Part))
    return next((name for name in asked if name not in named), None)


def _module_of(one: _Part) -> str:
    if isinstance(one, Stream):
        return one.stack
    return one.module if isinstance(one, Inner) else one.query
