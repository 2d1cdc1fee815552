"""The student: a model on its way from the original, with everything a pass needs beside it; saving and loading it.

In memory it is float32. Its weights are stored in the original's float type, and rounded to it before anything is
measured (`round_to_stored`), so what is measured, exported and stored is one model.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskit.data import Corpus, Sequences, token_rows
from compresskit.errors import CompressKitError
from compresskit.fingerprint import model_fingerprint
from compresskit.float_types import FloatTypes, float_types
from compresskit.layers.stored import holds, round_weights, stored_form, weights_of
from compresskit.model_folder import BITSANDBYTES_METHOD, STUDENT_METHOD, quant_method
from compresskit.models import ModelSource, load_model
from compresskit.processors import Processor
from compresskit.sentence import MEAN_POOLED, SentenceEmbedding
from compresskit.surgery.bitsandbytes_edits import adopt_stock_layers, stock_quantization, stock_weights
from compresskit.surgery.edits import Edit
from compresskit.surgery.plugin import config_with_edits, edits_of
from compresskit.surgery.provenance import Provenance
from compresskit.surgery.vocabulary_edits import PruneVocabulary, narrowed
from compresskit.vocabulary import Translator, cut_tokenizer


@dataclass(frozen=True)
class Whole:
    """How the original reads, beside a student with fewer tokens.

    Attributes:
        tokenizer, corpus: the original's.
        kept: the ids that the student kept, ascending.
        narrowed: the original with these tokens alone.
        growth: tokens of the held-out text as the student reads it, for one of the original's.
        kept_share: the share of the original's tokens of the held-out text that are kept.
    """

    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    kept: tuple[int, ...]
    narrowed: PreTrainedModel
    growth: float
    kept_share: float


@dataclass(frozen=True)
class HeldOut:
    """The held-out text as a student with fewer tokens reads it.

    Attributes:
        sequences: one for each of the original's.
        reference: the original, reading these and answering in the student's tokens.
        growth: tokens here for one of the original's.
    """

    sequences: Sequences
    reference: PreTrainedModel
    growth: float


@dataclass
class Student:
    """A model, how it came to be, and what it is compared with.

    Attributes:
        model: the student so far, float32 or quantised, eval mode between passes.
        original: the untouched model, frozen, same task; never modified.
        tokenizer: the student's, and the original's until tokens are dropped; of a vision model its image processor.
        task: a key of `compresskit.models.TASKS`.
        corpus: calibration, training and evaluation sequences, in the student's tokens.
        edits: what was done to the architecture, in order.
        sentence: how a feature extractor's hidden states become embeddings.
        whole: once tokens were dropped, how the original reads; else the two read the same.
    """

    model: PreTrainedModel
    original: PreTrainedModel
    tokenizer: Processor
    task: str
    corpus: Corpus
    edits: list[Edit] = field(default_factory=list)
    sentence: SentenceEmbedding = MEAN_POOLED
    whole: Whole | None = None

    @property
    def reference(self) -> PreTrainedModel:
        """The original as it reads the student's tokens: where some were dropped, a twin with the kept ones alone."""
        return self.whole.narrowed if self.whole else self.original

    @property
    def original_corpus(self) -> Corpus:
        """The same sequences as `corpus`, in the original's tokens."""
        return self.whole.corpus if self.whole else self.corpus

    @property
    def original_tokenizer(self) -> Processor:
        """The original's."""
        return self.whole.tokenizer if self.whole else self.tokenizer

    @property
    def held_out(self) -> HeldOut | None:
        """The held-out text as the student reads it, where that is not how the original does."""
        if self.whole is None:
            return None
        sequences = self.corpus.evaluation
        assert isinstance(sequences, Sequences)
        return HeldOut(sequences, self.whole.narrowed, self.whole.growth)

    @property
    def float_types(self) -> FloatTypes:
        """The original's: those of the student's checkpoint too."""
        return float_types(self.original)

    def fingerprint(self) -> str:
        """sha256 of its weights and the original's config: the same once it is stored and read again."""
        return model_fingerprint(self.model, self.original.config)

    def round_to_stored(self) -> list[str]:
        """Round the model's weights to what its checkpoint holds; the names of those that stay float32 for their size.

        A weight that the original holds in more digits than most of its weights keeps them.
        """
        stored, provenance, originals = self.float_types.stored, Provenance(self.edits), self.original.state_dict()

        def finer(name: str) -> bool:
            original = originals.get(provenance.original_name(name))
            return original is not None and not holds(stored, original)

        return round_weights(self.model, stored, finer=finer)

    def edit(self, edit: Edit) -> None:
        """Apply an edit to the model and record it."""
        edit.apply(self.model)
        self._record(edit)

    def with_edits(self, edits: list[Edit]) -> "Student":
        """Itself, where `edits` have been applied to the model already: a checkpoint that was read."""
        for edit in edits:
            self._record(edit)
        return self

    def _record(self, edit: Edit) -> None:
        self.edits.append(edit)
        if isinstance(edit, PruneVocabulary):
            self._read_with(edit.kept())

    def _read_with(self, kept: list[int]) -> None:
        """Change tokenizer and text to the tokens `kept` of today's; what they replace is found under `whole`."""
        tokenizer = self.tokenizer
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        smaller = cut_tokenizer(tokenizer, kept)
        before, rows = self.whole, token_rows(self.corpus.evaluation)
        translator = Translator(tokenizer, smaller, kept)
        self.whole = Whole(
            tokenizer=before.tokenizer if before else tokenizer,
            corpus=before.corpus if before else self.corpus,
            kept=tuple(before.kept[index] for index in kept) if before else tuple(kept),
            narrowed=narrowed(self.reference, kept),
            growth=translator.growth(rows) * (before.growth if before else 1.0),
            kept_share=translator.kept_share(rows) * (before.kept_share if before else 1.0),
        )
        self.tokenizer, self.corpus = smaller, translator.corpus(self.corpus)


def student_weights(model: PreTrainedModel, stored: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors to store, by name; a tensor that the model ties to another is stored once, under the other's name.

    Args:
        model: float32 or quantised.
        stored: the float type for weights that it holds without loss.
    """
    tied = model.all_tied_weights_keys
    state, weights = model.state_dict(), weights_of(model)
    return {
        name: (stored_form(tensor, stored) if name in weights else tensor).detach().contiguous()
        for name, tensor in state.items()
        if name not in tied or tensor.data_ptr() != state[tied[name]].data_ptr()
    }


def _loaded_dtype(student: Student) -> torch.dtype:
    """What from_pretrained makes of a student unless told otherwise: what it makes of the original, where that fits."""
    loaded = student.float_types.loaded
    fits = all(tensor.to(loaded).isfinite().all() for tensor in weights_of(student.model).values())
    return loaded if fits else torch.float32


def save_student(student: Student, folder: Path) -> None:
    """Write a checkpoint: `from_pretrained(folder, dtype=torch.float32)` gives the same outputs.

    Weights as safetensors, config with edits, tokenizer, and what sentence-transformers reads beside them. A weight is
    stored in the original's float type where that loses nothing; without `dtype` it loads as the original does.

    Args:
        student: its `original` gives the config that the edits start from, and the float types.
        folder: made if absent; files of these names are overwritten.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = student_weights(student.model, student.float_types.stored)
    config = config_with_edits(student.original, student.edits)
    if quant_method(getattr(config, "quantization_config", None)) != STUDENT_METHOD:
        weights = stock_weights(student.model, weights)
        quantization = stock_quantization(student.model)
        if quantization is not None:
            config.quantization_config = quantization
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [type(student.model).__name__]
    config.dtype = _loaded_dtype(student)
    config.save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets its owner alone read it
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
    if quant_method(getattr(model.config, "quantization_config", None)) == BITSANDBYTES_METHOD:
        adopt_stock_layers(model)
    try:
        return model, edits_of(model.config)
    except (ValueError, TypeError) as error:
        what = f"the edits in config.json cannot be read: {error}"
        raise CompressKitError(what, where=str(folder), fix="restore the folder's config.json") from error


def needs_plugin(folder: Path) -> bool:
    """Whether loading this student needs `import compresskit` (else it is a stock checkpoint)."""
    return _method(folder) == STUDENT_METHOD


def loads_with(folder: Path) -> str:
    """What has to be there to load this student: compresskit, transformers alone, or that and bitsandbytes."""
    return needed_for(_method(folder))


def needed_for(method: str | None) -> str:
    """As `loads_with`, of the `quant_method` that a student's config.json tells; None where it tells none."""
    if method == STUDENT_METHOD:
        return "compresskit"
    return "transformers and bitsandbytes" if method == BITSANDBYTES_METHOD else "transformers"


def _method(folder: Path) -> str | None:
    """The quantisation that a folder's config.json tells."""
    return quant_method(json.loads((folder / "config.json").read_text()).get("quantization_config"))
