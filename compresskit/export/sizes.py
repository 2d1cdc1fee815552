"""Files that take so many texts of so many tokens and nothing else, for runtimes that need to know (phones, NPUs).

    5 ragged texts  →  [2 × 128] [2 × 128] [2 × 128]  →  the file  →  5 answers, each as long as its batch was

Texts are cut at the end or padded there with masked zeros; the last batch is filled up with copies of its last text.
Scales of integer activations are those of the whole batch, padding included, so there an answer depends on it a little.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from compresskit.data import Batch


@dataclass(frozen=True)
class Sizes:
    """What a file takes at once; None is any number.

    Attributes:
        batch: texts, or other examples.
        length: tokens of a text.
    """

    batch: int | None = None
    length: int | None = None

    def fit(self, inputs: Batch) -> list[Batch]:
        """`inputs` as batches that the file takes, in their order.

        Args:
            inputs: the first axis counts texts; where `length` is fixed, the second counts tokens.
        """
        if self.length is not None:
            inputs = {name: F.pad(value, (0, self.length - value.shape[1])) for name, value in self.cut(inputs).items()}
        if self.batch is None:
            return [inputs]
        rows = len(next(iter(inputs.values())))
        order = torch.arange(-(-rows // self.batch) * self.batch).clamp(max=rows - 1)
        return [{name: value[index] for name, value in inputs.items()} for index in order.split(self.batch)]

    def cut(self, inputs: Batch) -> Batch:
        """`inputs` without the tokens for which there is no place."""
        return inputs if self.length is None else {name: value[:, : self.length] for name, value in inputs.items()}

    def join(self, parts: list[np.ndarray], inputs: Batch) -> np.ndarray:
        """One output for `inputs`, made of what the file gave for each batch of `fit(inputs)`.

        Args:
            parts: (batch, …); of three axes or more the second counts tokens.
            inputs: what went into `fit`.
        """
        rows, *rest = next(iter(inputs.values())).shape
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole[:rows] if self.length is None or whole.ndim < 3 else whole[:rows, : rest[0]]


#: Any number of texts of any length.
FREE = Sizes()
