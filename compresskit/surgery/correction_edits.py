"""The edit that puts a low-rank path beside integer layers."""

from typing import Literal

from pydantic import Field
from torch import nn

from compresskit.errors import CompressKitError
from compresskit.layers.corrected_linear import CorrectedLinear
from compresskit.layers.quant_linear import QuantLinear
from compresskit.surgery.edits import EDITS, Edit, get_module, set_module


@EDITS.add
class AddCorrection(Edit):
    """Add B A x, float, to what integer layers give."""

    kind: Literal["add_correction"] = "add_correction"
    targets: tuple[str, ...]
    rank: int = Field(ge=1)

    def apply(self, model: nn.Module) -> None:
        """Insert zero factors; the pass fills them."""
        for name in self.targets:
            base = get_module(model, name)
            if not isinstance(base, QuantLinear):
                what = f"{name} is a {type(base).__name__}, not an integer layer with float activations"
                raise CompressKitError(what, where=self.kind)
            set_module(model, name, CorrectedLinear(base, self.rank))
