"""Which outputs of the original's linears the student still has: the map between the two, read from the edits."""

from collections.abc import Iterable

import torch
from torch import Tensor

from compresskit.surgery.cuts import PruneFusedHeads, PruneHeads, PruneNeurons
from compresskit.surgery.edits import Edit, read_ranges


def kept_outputs(edits: Iterable[Edit]) -> dict[str, Tensor]:
    """For each linear whose outputs were cut: the indices, in the original's numbering, that are left, ascending.

    Linears that are absent kept all their outputs. Cuts compose: the second one's indices count what the first left.
    """
    kept: dict[str, Tensor] = {}

    def cut(name: str, keep: Tensor) -> None:
        kept[name] = kept[name][keep] if name in kept else keep

    for edit in edits:
        if isinstance(edit, PruneNeurons):
            keep = torch.tensor(read_ranges(edit.keep))
            for name in edit.inputs:
                cut(name, keep)
        elif isinstance(edit, PruneHeads):
            rows, rows_kv = edit.rows()
            cut(edit.query, rows)
            cut(edit.key, rows_kv)
            cut(edit.value, rows_kv)
        elif isinstance(edit, PruneFusedHeads):
            cut(edit.projection, edit.projection_rows())
    return kept
