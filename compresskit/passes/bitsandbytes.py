"""bitsandbytes: linears in NF4, FP4 or LLM.int8, saved as the checkpoint that transformers reads by itself.

    before  y = W x + b        after  y = (T[codes] · absmax) x + b         nf4, fp4: blocks of 64 weights
                                      y = s_x s_w Σ q(x) codes + b          int8: outlier columns of x in float

The codes are those that bitsandbytes gives today's weight (arXiv:2305.14314, arXiv:2208.07339): no calibration, no
anchor, no clip search. They are for serving with transformers or what builds on it, on a CPU or a GPU. Where ONNX
Runtime or the smallest file is wanted, use `quantize`: its tables and heads are integers too, which here stay float, as
does all that stands outside the blocks, and what the model's class keeps in float32 when transformers quantises it
(T5's `wo`). Not before training, and not for GPT-2's Conv1D.

Checkpoint: where a stock config can say the student's shapes, plain `from_pretrained` reads it (bitsandbytes installed,
compresskit not needed); after passes that need our plug-in (factors, uneven widths), so does this. What is evaluated is
float32. On CPUs with AVX512-BF16 bitsandbytes' own layers multiply 4 bits in bfloat16, whatever the compute dtype:
`served_difference` in the step's notes is how far they move the answer on the machine that ran the pass, 0 where they
compute the same. Those kernels take rows in multiples of 32 and columns of 64, so these are asked for everywhere. A
model that has answered there must not be saved again: bitsandbytes 0.50 then loses its absmaxes
(`surgery.bitsandbytes_edits`).

ONNX: 4 bits are `com.microsoft::MatMulBnb4` with the same codes, absmaxes decoded where they are quantised too.
LLM.int8 has no operator: its codes become 8-bit weights with one scale a row that read the input as it is;
`onnx_difference` in the notes, and `re_expressed` in the export's parity, say how far that is from the student. At the
export's default `accuracy_level: 4` ONNX Runtime rounds that input to 8 bits after all, in blocks and without regard to
outliers: `parity.shipped` says what that adds.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from compresskit.errors import CompressKitError
from compresskit.layers.bitsandbytes_linear import BLOCK
from compresskit.layers.forms import re_expressed, swapped
from compresskit.layerwise.answer import read_answer
from compresskit.layerwise.output_pca import relative_error
from compresskit.layerwise.weights import require_finite
from compresskit.passes.base import PASSES, Pass, TextPart, Trait
from compresskit.passes.quantize_grids import other_matrices, refuse_integers, refuse_transposed, say_others
from compresskit.student import Student
from compresskit.surgery.bitsandbytes_edits import (
    Format,
    HoldBitsAndBytes,
    bitsandbytes_layers,
    encode_weight,
    load_bitsandbytes,
    served_layer,
)
from compresskit.surgery.edits import Edit
from compresskit.surgery.sites import find_blocks, select

#: What bitsandbytes' CPU kernel for bfloat16 takes rows in multiples of.
_ROWS = 32
#: Calibration sequences on which answers are compared.
_COMPARED = 8
#: The largest float16, in which bitsandbytes rounds weights to 8 bits.
_LARGEST_HALF = 65504.0


@PASSES.add
class BitsAndBytes(Pass):
    """Hold linears as bitsandbytes does: NF4, FP4 or LLM.int8."""

    kind: Literal["bitsandbytes"] = "bitsandbytes"
    format: Format = Field(default="nf4", description="4 bits by a table of 16 values, or LLM.int8")
    double_quant: bool = Field(default=False, description="of nf4 and fp4: absmaxes in 8 bits too")
    threshold: float = Field(
        default=6.0, ge=0, description="of int8: |input| from which a column is multiplied in float"
    )
    targets: str = Field(default="*", description="glob over the names of linears inside blocks")
    on_misfit: Literal["error", "keep"] = Field(
        default="error",
        description="shapes that 4 bits do not fit, and a mixture's experts: an error; or they stay float, listed",
    )

    adds: ClassVar[frozenset[Trait]] = frozenset({"quantized"})
    refuses: ClassVar[frozenset[Trait]] = frozenset({"quantized"})
    needs: ClassVar[frozenset[TextPart]] = frozenset({"calibration"})

    @model_validator(mode="after")
    def _consistent(self) -> "BitsAndBytes":
        if self.format == "int8" and self.double_quant:
            raise ValueError("double_quant is of nf4 and fp4; int8 has one float scale a row")
        if self.format != "int8":
            self._refuse_idle("threshold", "format: int8")
        return self

    def plan(self, model: nn.Module) -> list[Edit]:
        """One edit for all layers."""
        load_bitsandbytes()
        refuse_integers(model)
        return [self._edit(self._layers(model)[0])]

    def keeps(self, model: nn.Module) -> tuple[str, ...]:
        """Shapes that 4 bits do not fit, a mixture's experts, and what transformers leaves in float32."""
        return tuple(self._layers(model)[1])

    def _edit(self, names: list[str]) -> HoldBitsAndBytes:
        return HoldBitsAndBytes(
            targets=tuple(names), format=self.format, double_quant=self.double_quant, threshold=self.threshold
        )

    def _layers(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """The linears that are converted, and the matrices that were asked for and stay float.

        Raises:
            CompressKitError: no linear in any block, a glob that matches none, or shapes that do not fit.
        """
        blocks = find_blocks(model)
        refuse_transposed(model, blocks)
        inside = tuple(f"{block}." for block in blocks)
        parts = {name: part for name, part in model.named_modules() if name.startswith(inside)}
        linears = {name: part for name, part in parts.items() if type(part) is nn.Linear}
        chosen = select(list(linears), self.targets)
        float_only: list[str] = list(getattr(model, "_keep_in_fp32_modules", None) or ())
        wanted = [name for name in chosen if should_convert_module(name, float_only)]
        if not wanted:
            what = f"transformers leaves {', '.join(chosen)} in float32 whenever it loads a {type(model).__name__}"
            raise CompressKitError(what, where="targets", fix="target other layers, or use quantize")
        misfits = {} if self.format == "int8" else {name: linears[name] for name in wanted if not _fits(linears[name])}
        fitting = [name for name in wanted if name not in misfits]
        others = other_matrices(model, blocks) if self.targets == "*" else []
        if (misfits or others) and (self.on_misfit == "error" or not fitting):
            raise _misfit_error(self.format, misfits, others, any_fits=bool(fitting))
        return fitting, [*(name for name in chosen if name not in fitting), *others]

    @torch.no_grad()
    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        """Round every layer, and measure how far bitsandbytes' layers and the ONNX form are from the student."""
        model = student.model
        refuse_integers(model)
        names, kept = self._layers(model)
        require_finite(model)
        olds: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in names}  # type: ignore[misc]
        if self.format == "int8":
            _require_half(olds)
        student.edit(self._edit(names))
        layers: dict[str, dict[str, Any]] = {}
        for name, new in bitsandbytes_layers(model).items():
            encode_weight(new, olds[name].weight.detach())
            if new.bias is not None:
                new.bias.copy_(olds[name].bias)
            lost = relative_error(olds[name].weight.detach(), new.dequantize(), None)
            layers[name] = {"format": self.format, "relative_error": lost}
        served = {name: served_layer(layer) for name, layer in bitsandbytes_layers(model).items()}
        notes = {"layers": layers, "kept_float": kept, "served_difference": _difference(student, served)}
        return notes | ({"onnx_difference": _difference(student, re_expressed(model))} if self.format == "int8" else {})


def _fits(layer: nn.Linear) -> bool:
    return layer.in_features % BLOCK == 0 and layer.out_features % _ROWS == 0


def _misfit_error(
    form: str, misfits: Mapping[str, nn.Linear], others: Sequence[str], *, any_fits: bool
) -> CompressKitError:
    listed = "".join(f"\n    {n}: {one.out_features} × {one.in_features}" for n, one in misfits.items())
    keep = ["say on_misfit: keep to leave them in float"] if any_fits else []
    if not misfits:
        return CompressKitError(say_others(others), where="targets", fix=keep[0])
    fixes = ["narrow targets", "set round_to: 64 in the passes that cut these widths", *keep, "use format: int8"]
    what = (
        f"{form} takes rows in multiples of {_ROWS} and columns of {BLOCK}; {len(misfits)} layers have others:{listed}"
    )
    whats = [what, *([say_others(others)] if others else [])]
    return CompressKitError("\n  ".join(whats), where="format", fix="; or ".join(fixes))


def _require_half(layers: Mapping[str, nn.Linear]) -> None:
    large = [name for name, layer in layers.items() if float(layer.weight.abs().max()) > _LARGEST_HALF]
    if large:
        what = f"{', '.join(large)}: weights past {_LARGEST_HALF:g}, and bitsandbytes rounds to int8 from float16"
        raise CompressKitError(what, where="format", fix="leave these layers out of targets, or use format: nf4")


def _difference(student: Student, layers: Mapping[str, nn.Module]) -> float:
    """‖other − student‖ / ‖student‖ of the answers to calibration sequences, other layers in the place of some."""
    batch = next(student.corpus.calibration.batches(_COMPARED, limit=_COMPARED))
    expected = read_answer(student.model, batch)
    with swapped(student.model, layers):
        found = read_answer(student.model, batch)
    return float((found - expected).double().norm() / expected.double().norm())
