"""Small real passes for tests of the rooms around passes; they are in no registry until a test puts them there."""

import os
import signal
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from compresskit.errors import CompressKitError
from compresskit.passes import Pass, Trait
from compresskit.student import Student
from compresskit.surgery.cuts import PruneNeurons
from compresskit.surgery.edits import Edit, get_module


class Shake(Pass):
    """Add noise to the weights of one linear."""

    kind: Literal["shake"] = "shake"
    #: standard deviation of the noise
    scale: float = 0.01
    target: str = "encoder.layer.0.output.dense"

    def plan(self, model: nn.Module) -> list[Edit]:
        get_module(model, self.target)
        return []

    @torch.no_grad()
    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        linear = student.model.get_submodule(self.target)
        assert isinstance(linear, nn.Linear)
        linear.weight += self.scale * torch.randn(linear.weight.shape, generator=generator)
        linear.weight += self.scale * torch.rand(())  # the global generator is seeded too
        return {"noise": self.scale}


class Halve(Pass):
    """Keep the first half of the neurons of block 0's FFN."""

    kind: Literal["halve"] = "halve"

    adds: ClassVar[frozenset[Trait]] = frozenset({"pruned"})
    refuses: ClassVar[frozenset[Trait]] = frozenset({"quantized"})

    def plan(self, model: nn.Module) -> list[Edit]:
        output = model.get_submodule("encoder.layer.0.output.dense")
        assert isinstance(output, nn.Linear)
        first = ("encoder.layer.0.intermediate.dense",)
        keep = f"0-{output.in_features // 2 - 1}"
        return [PruneNeurons(inputs=first, output="encoder.layer.0.output.dense", keep=keep)]

    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        for edit in self.plan(student.model):
            student.edit(edit)
        return {}


class Quantized(Pass):
    """Mark the model as quantised."""

    kind: Literal["quantized"] = "quantized"
    adds: ClassVar[frozenset[Trait]] = frozenset({"quantized"})

    def plan(self, model: nn.Module) -> list[Edit]:
        return []

    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        return {}


class Fail(Pass):
    """Stop in one of the ways in which a pass can go wrong."""

    kind: Literal["fail"] = "fail"
    how: Literal["bug", "mistake", "nan", "unrecorded", "misfit", "kill"] = "bug"
    #: a file: where it exists, the pass does nothing
    unless: str = ""

    def plan(self, model: nn.Module) -> list[Edit]:
        if self.how == "misfit":
            raise CompressKitError("targets 'x*' match no module", fix="use '*'")
        return []

    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        if self.unless and Path(self.unless).exists():
            return {}
        if self.how == "bug":
            raise KeyError("no such layer")
        if self.how == "mistake":
            raise CompressKitError("the calibration text is too short", fix="use more of it")
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        dense = student.model.get_submodule("encoder.layer.0.output.dense")
        assert isinstance(dense, nn.Linear)
        if self.how == "nan":
            nn.init.constant_(dense.weight, torch.nan)
        if self.how == "unrecorded":
            student.model.set_submodule("encoder.layer.0.output.extra", nn.Linear(2, 2))
        return {}


ALL = (Shake, Halve, Quantized, Fail)
