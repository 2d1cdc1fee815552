"""The student: a model on its way from the original, with everything a pass needs beside it; saving and loading it."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.data import Corpus
from compresskit.errors import CompressKitError
from compresskit.models import ModelSource, load_model
from compresskit.processors import Processor
from compresskit.sentence import MEAN_POOLED, SentenceEmbedding
from compresskit.surgery.edits import Edit
from compresskit.surgery.plugin import config_with_edits, edits_of


@dataclass
class Student:
    """A model, how it came to be, and what it is compared with.

    Attributes:
        model: the student so far, float32 or quantised, eval mode between passes.
        original: the untouched model, frozen, same task; never modified.
        tokenizer: shared by both; of a vision model its image processor.
        task: a key of `compresskit.models.TASKS`.
        corpus: calibration, training and evaluation sequences.
        edits: what was done to the architecture, in order.
        sentence: how a feature extractor's hidden states become embeddings.
    """

    model: PreTrainedModel
    original: PreTrainedModel
    tokenizer: Processor
    task: str
    corpus: Corpus
    edits: list[Edit] = field(default_factory=list)
    sentence: SentenceEmbedding = MEAN_POOLED

    def edit(self, edit: Edit) -> None:
        """Apply an edit to the model and record it."""
        edit.apply(self.model)
        self.edits.append(edit)


def student_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors to store, by name; a tensor that the model ties to another is stored once, under the other's name."""
    tied = model.all_tied_weights_keys
    weights = model.state_dict()
    return {
        name: tensor.detach().contiguous()
        for name, tensor in weights.items()
        if name not in tied or tensor.data_ptr() != weights[tied[name]].data_ptr()
    }


def save_student(student: Student, folder: Path) -> None:
    """Write a checkpoint: `from_pretrained(folder)` gives the same outputs.

    Weights as safetensors, config with edits, tokenizer, and what sentence-transformers reads beside them.

    Args:
        student: its `original` gives the config that the edits start from.
        folder: made if absent; files of these names are overwritten.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(student_weights(student.model), folder / "model.safetensors", metadata={"format": "pt"})
    config = config_with_edits(student.original, student.edits)
    config.architectures = [type(student.model).__name__]
    config.save_pretrained(folder)
    if student.model.can_generate() and student.model.generation_config is not None:
        student.model.generation_config.save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)
    student.sentence.write(folder)


def load_student_model(folder: Path, task: str) -> tuple[PreTrainedModel, list[Edit]]:
    """A saved student's model, in eval mode, and its edits.

    Raises:
        CompressKitError: a folder that holds no model, or not one for this task, or whose edits are damaged.
    """
    model = load_model(ModelSource(str(folder), folder), task)
    try:
        return model, edits_of(model.config)
    except (ValueError, TypeError) as error:
        what = f"the edits in config.json cannot be read: {error}"
        raise CompressKitError(what, where=str(folder), fix="restore the folder's config.json") from error


def needs_plugin(folder: Path) -> bool:
    """Whether loading this student needs `import compresskit` (else it is a stock checkpoint)."""
    return "quantization_config" in json.loads((folder / "config.json").read_text())
