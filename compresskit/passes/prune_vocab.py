"""Fewer tokens: the table and the head lose the rows that a corpus does not use, the tokenizer forgets their tokens.

    before  tokens V, table W (V, D), logits h Wᵀ        after  tokens K ⊂ V, W[K], h W[K]ᵀ

No weight changes. A text whose tokens are all kept gives the same tokens and the same hidden states, and the logits of
the kept tokens are those of the original (`vocabulary.content` says why). Any other text is still read, in smaller
pieces: kept beside the corpus's tokens are the special and added ones, an alphabet, and what merges pass through.

For a model whose table is a large share of it (small multilingual encoders most of all) and that will read one language
or domain; the words of a chat template stay. Not for texts of every kind: words that fell apart cost quality and time.
What it cost is measured with the passes after it: comparisons token by token are over the kept tokens, embeddings and
classes are compared with the original reading its own tokens, and perplexity counts for each of the original's tokens.

Source: Load What You Need (arXiv:2010.05609), which cuts multilingual BERT so; also for BPE and Unigram here.
"""

import copy
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from jinja2 import TemplateError
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskit.data import Corpus, DataSource, Sequences, token_rows
from compresskit.data.prepare import encode, padded_position_table
from compresskit.data.source import called, open_source
from compresskit.errors import CompressKitError
from compresskit.passes.base import PASSES, Pass, TextPart, Trait
from compresskit.processors import Processor
from compresskit.student import Student
from compresskit.surgery.edits import Edit, write_ranges
from compresskit.surgery.vocabulary_edits import PruneVocabulary, config_token_ids, vocabulary_parameters
from compresskit.vocabulary import Content, choose_tokens, count_tokens, read_content, refuse_prompts

#: Put before a chat template, it keeps the day's date out: what stays must not depend on it.
_UNDATED = "{%- macro strftime_now(format) -%}{%- endmacro -%}"


@PASSES.add
class PruneVocab(Pass):
    """Drop the tokens that a text does not use, from the tables, the head and the tokenizer."""

    kind: Literal["prune_vocab"] = "prune_vocab"
    corpus: DataSource | None = Field(
        default=None,
        description="the text whose tokens stay, all of it; by default the recipe's calibration and training text",
    )
    keep: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of the table's rows that stay at most, the most frequent tokens first",
    )
    min_count: int = Field(default=1, ge=1, description="tokens that occur less often are dropped")
    round_to: int = Field(default=8, ge=1, description="the number of tokens is a multiple of it: unused ones stay too")

    version: ClassVar[int] = 2
    adds: ClassVar[frozenset[Trait]] = frozenset({"pruned"})
    refuses: ClassVar[frozenset[Trait]] = frozenset({"decomposed", "quantized"})
    needs: ClassVar[frozenset[TextPart]] = frozenset({"calibration"})
    plans_at_most: ClassVar[bool] = True

    def plan(self, model: nn.Module) -> list[Edit]:
        """The edit that keeps `keep` of the rows: at most so many, since the text decides which, and how many fewer."""
        assert isinstance(model, PreTrainedModel)
        names = vocabulary_parameters(model)
        if self.corpus is not None:
            with called("corpus"):
                open_source(self.corpus)
        rows = model.get_parameter(names[0]).shape[0]
        if self._limit(rows) == 0:
            what = f"{self.keep} of {rows} tokens, in multiples of {self.round_to}, leaves none"
            raise CompressKitError(what, where="keep", fix="use a larger keep or a smaller round_to")
        named = sorted(_ids_of_configs(model) & set(range(rows)))
        others = [index for index in range(rows) if index not in named]
        kept = [*named, *others][: max(self._limit(rows), len(named))]
        return [PruneVocabulary(parameters=names, keep=write_ranges(kept))]

    def texts_read(self) -> tuple[DataSource, ...]:
        """The corpus, where it is one of its own."""
        return () if self.corpus is None else (self.corpus,)

    def check_text(self, processor: Processor, corpus: Corpus) -> None:
        """Refuse a tokenizer that cannot be cut, and text with prompts."""
        read_content(processor)
        if isinstance(corpus.training, Sequences):
            refuse_prompts(corpus.training)

    def _limit(self, rows: int) -> int:
        """The most tokens that stay of a table of so many rows."""
        return rows if self.keep == 1 else int(self.keep * rows) // self.round_to * self.round_to

    def apply(self, student: Student, *, generator: torch.Generator) -> dict[str, Any]:
        """Count the tokens, choose, and cut model, tokenizer and text."""
        names = vocabulary_parameters(student.model)
        rows = student.model.get_parameter(names[0]).shape[0]
        content = read_content(student.tokenizer)
        required = _required(student.model, content, rows) | _of_template(student.tokenizer)
        counts = count_tokens(self._rows(student), rows)
        for index in content.added:
            counts[index] = 0  # they stay whatever the text holds, and do not make it one that is used
        known = [index for index in content.tokens if index < rows]
        kept = choose_tokens(
            counts,
            known=known,
            required=required,
            needs=content.needs,
            limit=self._limit(rows),
            min_count=self.min_count,
            round_to=self.round_to,
        )
        student.edit(PruneVocabulary(parameters=names, keep=write_ranges(kept)))
        assert student.whole is not None
        return {
            "tokens": len(kept),
            "tokens_before": rows,
            "used_by_the_text": int((counts >= self.min_count).sum()),
            "kept_of_held_out_text": student.whole.kept_share,
            "held_out_growth": student.whole.growth,
        }

    def _rows(self, student: Student) -> Iterable[list[int]]:
        """Token rows of the text whose tokens stay."""
        if self.corpus is None:
            return [*token_rows(student.corpus.calibration), *token_rows(student.corpus.training)]
        tokenizer = copy.deepcopy(student.tokenizer)  # tokenising leaves its mark in a tokenizer
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        marked = encode(open_source(self.corpus).read(False), tokenizer, max_length=0, pack=True)
        return Sequences.of_marked(list(marked), 0).rows


def _ids_of_configs(model: PreTrainedModel) -> set[int]:
    return config_token_ids(model.config) | config_token_ids(getattr(model, "generation_config", None))


def _of_template(tokenizer: Processor) -> set[int]:
    """Ids of the words that a chat template puts around every turn, the system's default prompt among them."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.chat_template:
        return set()
    tokenizer = copy.deepcopy(tokenizer)  # tokenising leaves its mark in a tokenizer
    turns = [{"role": role, "content": ""} for role in ("user", "assistant")]
    found: set[int] = set()
    for system in ([], [{"role": "system", "content": ""}]):
        try:
            template = _UNDATED + tokenizer.get_chat_template()
            said = tokenizer.apply_chat_template([*system, *turns], chat_template=template, tokenize=False)
        except (TemplateError, ValueError):  # some templates know no system, or no empty turn; some are several
            continue
        found |= set(tokenizer(str(said), add_special_tokens=False, verbose=False)["input_ids"])
    return found


def _required(model: PreTrainedModel, content: Content, rows: int) -> set[int]:
    """Ids that stay whatever the text: the tokenizer's own, the config's, and those that others are counted from.

    Raises:
        CompressKitError: added tokens without a row in the table.
    """
    required = content.always_kept()
    beyond = sorted(index for index in required if index >= rows)
    if beyond:
        what = f"the tokenizer's {content.tokens[beyond[0]]!r} is token {beyond[0]}, and the model has rows for {rows}"
        raise CompressKitError(what, where="model", fix="use the tokenizer that belongs to the model")
    required |= {index for index in _ids_of_configs(model) if index in content.tokens and index < rows}
    # Position tables with a padding row are read from the padding token's id on: that id must stay what it is.
    table = padded_position_table(model)
    padding = -1 if table is None or table.padding_idx is None else table.padding_idx
    return required | set(range(padding + 1))
