"""What of the original the student still has: the map between their names, read from the record of edits."""

from collections.abc import Iterable

import torch
from torch import Tensor

from compresskit.surgery.channel_edits import PruneChannels
from compresskit.surgery.cuts import PruneFusedHeads, PruneHeads, PruneNeurons
from compresskit.surgery.depth_edits import DropBlocks
from compresskit.surgery.edits import Edit, read_ranges


class Provenance:
    """Where the student's modules come from. Cuts compose: the second one's indices count what the first left.

    Args:
        edits: what was done to the original, in order. Edits name modules as the model called them at their time.

    Attributes:
        kept: for each layer of the original whose outputs were cut, the indices that are left, ascending; layers
            that are absent kept all their outputs.
        stacks: for each list of blocks that was cut, which of the original's blocks its blocks are.
    """

    def __init__(self, edits: Iterable[Edit] = ()) -> None:
        self.kept: dict[str, Tensor] = {}
        self.stacks: dict[str, list[int]] = {}
        for edit in edits:
            self.add(edit)

    def add(self, edit: Edit) -> None:
        """Take one more edit into account."""
        if isinstance(edit, PruneNeurons):
            self._cut(edit.inputs, torch.tensor(read_ranges(edit.keep)))
        elif isinstance(edit, PruneHeads):
            rows, rows_kv = edit.rows()
            self._cut((edit.query,), rows)
            self._cut((edit.key, edit.value), rows_kv)
        elif isinstance(edit, PruneFusedHeads):
            self._cut((edit.projection,), edit.projection_rows())
        elif isinstance(edit, PruneChannels):
            for cut in edit.cuts:
                if cut.outputs is not None:
                    self._cut((cut.module,), torch.tensor(read_ranges(cut.outputs)))
        elif isinstance(edit, DropBlocks):
            kept, before = read_ranges(edit.keep), self.stacks.get(edit.stack)
            self.stacks[edit.stack] = kept if before is None else [before[index] for index in kept]

    def _cut(self, names: Iterable[str], keep: Tensor) -> None:
        for name in map(self.original_name, names):
            self.kept[name] = self.kept[name][keep] if name in self.kept else keep

    def original_name(self, name: str) -> str:
        """What the original calls the student's module `name` (the same, but for the numbers of blocks)."""
        for stack, blocks in self.stacks.items():
            if name.startswith(f"{stack}."):
                number, dot, rest = name[len(stack) + 1 :].partition(".")
                return f"{stack}.{blocks[int(number)]}{dot}{rest}"
        return name

    def left_of(self, name: str, outputs: Tensor, *, dim: int = -1) -> Tensor:
        """What the original's layer of the student's layer `name` gives, cut to what the student's gives too.

        Args:
            name: as the student calls it.
            outputs: of the original's layer, `dim` its channels.
        """
        kept = self.kept.get(self.original_name(name))
        return outputs if kept is None else outputs.index_select(dim, kept.to(outputs.device))

    def is_left(self, name: str) -> bool:
        """Whether the block that holds the original's module `name` is still there."""
        for stack, blocks in self.stacks.items():
            if name.startswith(f"{stack}."):
                return int(name[len(stack) + 1 :].partition(".")[0]) in blocks
        return True

    def hidden_layers(self, stack: str, blocks: int) -> tuple[int, ...]:
        """Of the original's hidden states (0 the embeddings, N = `blocks` the last), those the student's stand for.

        What a student's block gives should be what the next one's original read: the state before it. So what the
        blocks between them did is asked of the block before the gap, and the last state is the last.
        """
        kept = self.stacks.get(stack, list(range(blocks)))
        return (0, *kept[1:], blocks)
