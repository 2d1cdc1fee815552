"""The contract of a pass: its fields are its options, `plan` says its edits, `apply` does its work."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from compresskit.config import Config, Registry
from compresskit.data import Corpus, DataSource
from compresskit.processors import Processor
from compresskit.student import Student
from compresskit.surgery.edits import Edit

if TYPE_CHECKING:
    from torch import nn

Trait = Literal["low_rank", "decomposed", "pruned", "quantized"]
TextPart = Literal["calibration", "training"]


class Pass(Config, ABC):
    """One change to a model. Instances are frozen options and hold no other state."""

    kind: str

    #: What the model is after this pass, and what it must not be before it.
    adds: ClassVar[frozenset[Trait]] = frozenset()
    refuses: ClassVar[frozenset[Trait]] = frozenset()
    #: The parts of the corpus that this pass cannot do without.
    needs: ClassVar[frozenset[TextPart]] = frozenset()
    #: Whether it learns from a teacher, and so has an option `teacher`: None, or the name of a model.
    learns: ClassVar[bool] = False
    #: Raised by one whenever the same options would give other weights; part of every step's fingerprint.
    version: ClassVar[int] = 1
    #: Whether `plan` says how much stays at most, and the data may leave less.
    plans_at_most: ClassVar[bool] = False
    #: Options that change what is told or kept on the way, and not the student.
    inert: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def plan(self, model: "nn.Module") -> list[Edit]:
        """The edits this pass will ask for, from shapes alone: `model` may be on the meta device and is not changed.

        Raises:
            CompressKitError: options that do not fit this model; every misfit is listed at once.
        """

    def keeps(self, model: "nn.Module") -> tuple[str, ...]:
        """Names of matrices that are asked for and stay as they are, because they may (`on_misfit: keep`).

        Args:
            model: one that `plan` takes.
        """
        return ()

    def plans_shapes(self) -> bool:
        """Whether `plan` says the very shapes that `apply` will make, and not only how much stays of them."""
        return True

    def deciding_options(self) -> dict[str, Any]:
        """What was asked for, as JSON: all that decides the student."""
        return self.model_dump(mode="json", serialize_as_any=True, exclude=set(self.inert))

    def models_read(self) -> tuple[str, ...]:
        """Models that it reads besides the original, as the user names them: their files count as options."""
        return ()

    def texts_read(self) -> tuple[DataSource, ...]:
        """Text that it reads besides the recipe's own: what it holds counts as an option."""
        return ()

    def check_text(self, processor: Processor, corpus: Corpus) -> None:
        """Refuse a tokenizer or a text that this pass cannot work with, before any weight is read.

        Raises:
            CompressKitError: what does not fit.
        """
        return

    @abstractmethod
    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        """Change `student.model` through `student.edit`, and return what happened, as data for the report.

        Weights are float32 here; the engine rounds them to the original's float type afterwards, before it measures.

        Args:
            student: the model so far, with its original, tokenizer and corpus.
            generator: the only source of randomness, seeded by the engine from (seed, position of the pass).
        """


PASSES: Registry[Pass] = Registry("pass")
