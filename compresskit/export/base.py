"""The contract of an exporter: its fields are its options, `write` makes a folder that another runtime runs."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from compresskit.config import Config, Registry
from compresskit.student import Student


class Exporter(Config, ABC):
    """One form to ship a student in. Instances are frozen options and hold no other state."""

    kind: str

    #: Raised by one whenever the same options would write another file; part of the result's fingerprint.
    version: ClassVar[int] = 1

    def check(self, model: PreTrainedModel, task: str) -> None:
        """Refuse options that do not fit a model, from shapes alone: it may be on the meta device and is not changed.

        Raises:
            CompressKitError: a misfit; `where` is the option.
        """
        return

    def predict_bytes(self, model: PreTrainedModel, task: str) -> int | None:
        """The bytes of what `write` will write for a student of these shapes; None where nothing can be said.

        Args:
            model: may be on the meta device and is not changed.
            task: what it does.
        """
        return None

    @abstractmethod
    def write(self, student: Student, folder: Path) -> dict[str, Any]:
        """Write the student to `folder`, prove it, and return the report's entry.

        An entry that holds `predicted_bytes` says what `predict_bytes` says of the student as it is; a run puts there
        what it said before, of the shapes that were planned.

        Args:
            student: read, never changed.
            folder: appears whole or not at all; an earlier one is replaced.

        Raises:
            RunFailedError: what was written does not compute what the student computes, or cannot be written.
        """


EXPORTERS: Registry[Exporter] = Registry("exporter")
