"""A tokenizer of fewer tokens, and token sequences of the whole one said in it."""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from compresskit.data.sequences import PARTS, Corpus, Sequences, token_rows
from compresskit.errors import CompressKitError
from compresskit.vocabulary.content import Content, read_content

_TEXTS_AT_A_TIME = 1000


def cut_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    """The tokenizer of the tokens `kept` (ascending ids), numbered from 0 in their order; the given one stays as it is.

    Raises:
        CompressKitError: one that `read_content` refuses, or whose tokens cannot be numbered so.
    """
    content = read_content(tokenizer)
    backend = Tokenizer.from_str(json.dumps(content.cut(kept)))
    wanted = {content.tokens[old]: new for new, old in enumerate(kept)}
    if backend.get_vocab(with_added_tokens=True) != wanted:
        what = "its added tokens stand between others, so that fewer tokens cannot be numbered in their order"
        raise CompressKitError(what, where="model", fix="leave prune_vocab out")
    smaller: Any = copy.deepcopy(tokenizer)
    smaller._tokenizer = backend
    return smaller


@dataclass(frozen=True)
class _Run:
    """Neighbouring ordinary tokens of a row, one of them dropped, and where their translation goes."""

    row: int
    place: int
    ids: list[int]


class Translator:
    """Says token sequences in fewer tokens.

    A run of kept tokens between special ones keeps them. Where a token was dropped, the run is tokenised anew from its
    text, as the smaller tokenizer will do it for whoever uses the student.

    Args:
        tokenizer: that made the sequences.
        smaller: `cut_tokenizer` of it.
        kept: ascending ids.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, smaller: PreTrainedTokenizerBase, kept: Sequence[int]
    ) -> None:
        self._content = read_content(tokenizer)
        self._new = {old: new for new, old in enumerate(kept)}
        self._old_backend, self._backend = (_unpadded(one) for one in (tokenizer, smaller))
        self._apart = self._content.added | {self._content.unknown}

    def kept_share(self, rows: Sequence[Sequence[int]]) -> float:
        """The share of the tokens of `rows` that are kept."""
        total = sum(map(len, rows))
        return sum(token in self._new for row in rows for token in row) / max(total, 1)

    def growth(self, rows: Sequence[list[int]]) -> float:
        """How many of the smaller tokenizer's tokens `rows` have for one of their own."""
        return sum(map(len, self.rows(rows))) / max(sum(map(len, rows)), 1)

    def rows(self, rows: Sequence[list[int]]) -> list[list[int]]:
        """Each row in the smaller tokenizer's ids; some are longer, none is empty."""
        pieces = [self._pieces(row) for row in rows]
        runs = [
            _Run(row, place, ids)
            for row, parts in enumerate(pieces)
            for place, ids in enumerate(parts)
            if any(token not in self._new for token in ids)
        ]
        for first in range(0, len(runs), _TEXTS_AT_A_TIME):
            some = runs[first : first + _TEXTS_AT_A_TIME]
            found = self._backend.encode_batch(self._texts([run.ids for run in some]), add_special_tokens=False)
            for run, encoding in zip(some, found, strict=True):
                pieces[run.row][run.place] = encoding.ids
        renewed = {(run.row, run.place) for run in runs}
        said = [
            [
                token
                for place, ids in enumerate(parts)
                for token in (ids if (row, place) in renewed else map(self._new.__getitem__, ids))
            ]
            for row, parts in enumerate(pieces)
        ]
        return [row or [self._new.get(self._content.unknown or 0, 0)] for row in said]

    def _pieces(self, row: list[int]) -> list[list[int]]:
        """The row as runs of ordinary tokens and runs of tokens that stand apart."""
        return [list(run) for _, run in groupby(row, key=lambda token: token in self._apart)]

    def _texts(self, runs: list[list[int]]) -> list[str]:
        if self._content.kind != "WordPiece":
            return self._old_backend.decode_batch(runs, skip_special_tokens=False)
        prefix = self._content.model["continuing_subword_prefix"]  # the decoder's clean-up would change words
        return ["".join(_joined(self._content, ids, prefix)).strip() for ids in runs]

    def corpus(self, corpus: Corpus) -> Corpus:
        """All parts of a corpus; rows that grow past the longest of their part are cut as a tokenizer cuts texts."""
        parts = {name: self._sequences(getattr(corpus, name)) for name in PARTS}
        return replace(corpus, **parts)

    def _sequences(self, given: Sequences) -> Sequences:
        refuse_prompts(given)
        rows = token_rows(given)
        longest = max(map(len, rows), default=0)
        ends = [row[-1:] if row[-1] in self._content.added else [] for row in rows]
        said = self.rows(rows)
        cut = [
            row if len(row) <= longest else [*row[: longest - len(end)], *(self._new[token] for token in end)]
            for row, end in zip(said, ends, strict=True)
        ]
        return Sequences(cut, self._new[given.pad_token_id])


def refuse_prompts(text: Sequences) -> None:
    """Refuse text whose prompts are marked.

    Raises:
        CompressKitError: said in fewer tokens, it would no longer tell where a prompt ends.
    """
    if text.prompts is not None:
        what = "text with prompts cannot be said in fewer tokens: where a prompt ends would be lost"
        raise CompressKitError(what, where="data.prompt", fix="leave prompt out, or prune_vocab")


def _joined(content: Content, ids: list[int], prefix: str) -> Iterator[str]:
    """WordPiece's tokens as text: words apart by a space."""
    for index in ids:
        token = content.tokens[index]
        continues = token.startswith(prefix) and token != prefix
        yield token.removeprefix(prefix) if continues else f" {token}"


def _unpadded(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Its backend, a copy that neither cuts nor pads."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    backend.no_truncation()
    backend.no_padding()
    return backend
