"""The student: a model on its way from the original, with everything a pass needs beside it."""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskit.data import Corpus
from compresskit.surgery.edits import Edit


@dataclass
class Student:
    """A model, how it came to be, and what it is compared with.

    Attributes:
        model: the student so far, float32 or quantised, eval mode between passes.
        original: the untouched model, frozen, same task; never modified.
        tokenizer: shared by both.
        task: a key of `compresskit.models.TASKS`.
        corpus: calibration, training and evaluation sequences.
        edits: what was done to the architecture, in order.
    """

    model: PreTrainedModel
    original: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: str
    corpus: Corpus
    edits: list[Edit] = field(default_factory=list)

    def edit(self, edit: Edit) -> None:
        """Apply an edit to the model and record it."""
        edit.apply(self.model)
        self.edits.append(edit)


def save_student(student: Student, folder: Path) -> None:
    """Write weights (safetensors), config with edits, and tokenizer, so that `from_pretrained` reloads them bit for bit."""


def load_model(folder: Path, task: str) -> PreTrainedModel:
    """The saved student's model, in eval mode."""
