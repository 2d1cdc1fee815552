"""Text to three parts of token sequences that never overlap."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskit.cache import cache_folder
from compresskit.data.cache import read_rows, write_rows
from compresskit.data.sequences import Corpus, Sequences
from compresskit.data.source import DataSource, Prompted, Text, open_source
from compresskit.errors import CompressKitError
from compresskit.progress import track

#: Raised by one whenever the same text and options would give other sequences.
VERSION = 2
#: Evaluation and calibration need this many sequences (or as many as were asked for, where that is fewer).
SMALLEST_PART = 8
T = TypeVar("T", bound=Text)
_TEXTS_AT_A_TIME = 500
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """Sequences in each part, in the order in which parts take theirs."""

    evaluation: int
    calibration: int
    training: int

    @property
    def total(self) -> int:
        """Sequences in all parts."""
        return self.evaluation + self.calibration + self.training

    def within(self, available: int) -> "Sizes":
        """These sizes where `available` sequences hold them; else at most a fifth for each of the first two."""
        if available >= self.total:
            return self
        evaluation, calibration = min(self.evaluation, available // 5), min(self.calibration, available // 5)
        return Sizes(evaluation, calibration, min(self.training, available - evaluation - calibration))


def order_by_hash(texts: Iterable[T], seed: int) -> list[T]:
    """The different texts, sorted by the sha256 of seed and text: an order that no other text can change."""

    def key(text: Text) -> bytes:
        said = text if isinstance(text, str) else "\0".join(text)
        return hashlib.sha256(f"{seed}\0{said}".encode("utf-8", "replace")).digest()

    return sorted(set(texts), key=key)


def split_sequences(encoded: Iterable[list[int]], sizes: Sizes) -> list[list[list[int]]]:
    """Evaluation, calibration and training rows: different sequences, taken in order; no more are read than needed."""
    rows: dict[tuple[int, ...], None] = {}
    for row in encoded:
        if row:
            rows[tuple(row)] = None
        if len(rows) == sizes.total:
            break
    found = [list(row) for row in rows]
    sizes = sizes.within(len(found))
    first, second = sizes.evaluation, sizes.evaluation + sizes.calibration
    return [found[:first], found[first:second], found[second : sizes.total]]


def window_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: a begin-of-text token, or nothing.

    Models that always saw one answer far worse without it (Gemma: lm-evaluation-harness, pull request 1465).
    """
    begin = tokenizer.bos_token_id
    return [begin] if isinstance(begin, int) and tokenizer("")["input_ids"][:1] == [begin] else []


def split_windows(
    encoded: Iterable[list[int]], sizes: Sizes, *, length: int, end_token_id: int, start: Sequence[int] = ()
) -> list[list[list[int]]]:
    """Evaluation, calibration and training windows of exactly `length` tokens; no document is in two parts.

    Args:
        encoded: documents as token ids, in the order in which parts take them; read only as far as needed.
        sizes: windows in each part.
        length: tokens in a window.
        end_token_id: follows every document.
        start: begins every window, and is counted in its `length`.
    """
    documents: list[list[int]] = []
    bare = length - len(start)
    parts = _fill(_remember((d for d in encoded if d), documents), sizes, bare, end_token_id)
    if sum(map(len, parts)) < sizes.total:
        available = sum(len(document) + 1 for document in documents) // bare
        parts = _fill(iter(documents), sizes.within(available), bare, end_token_id)
    return [[[*start, *window] for window in part] for part in parts]


def _remember(items: Iterable[list[int]], seen: list[list[int]]) -> Iterator[list[int]]:
    for item in items:
        seen.append(item)
        yield item


def _fill(documents: Iterator[list[int]], sizes: Sizes, length: int, end_token_id: int) -> list[list[list[int]]]:
    """Give whole documents to one part after the other, until each has its windows."""
    windows: dict[tuple[int, ...], None] = {}
    parts = []
    for size in (sizes.evaluation, sizes.calibration, sizes.training):
        before, stream = len(windows), []
        while len(windows) - before < size and (document := next(documents, None)) is not None:
            stream += [*document, end_token_id]
            for first in range(0, len(stream) - length + 1, length):
                windows[tuple(stream[first : first + length])] = None
            del stream[: len(stream) // length * length]
        own = list(windows)[before:]
        parts.append([list(window) for window in own[:size]])
    return parts


def token_positions(model: PreTrainedModel) -> int | None:
    """How many tokens of one text the model can place; None where its config names no end.

    Position tables with a padding row (RoBERTa's, MPNet's) begin to count after it.
    """
    table = padded_position_table(model)
    if table is not None and table.padding_idx is not None:
        return table.num_embeddings - table.padding_idx - 1
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def padded_position_table(model: PreTrainedModel) -> nn.Embedding | None:
    """The position table that has a row for padding, and counts from it on; None where there is none."""
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table
    return None


def check_max_length(model: PreTrainedModel, max_length: int) -> None:
    """Refuse sequences that are longer than the model has positions for.

    Raises:
        CompressKitError: `max_length` above them.
    """
    positions = token_positions(model)
    if positions is not None and positions < max_length:
        raise CompressKitError(
            f"{max_length} is more than the model's {positions} positions",
            where="data.max_length",
            fix=f"use max_length: {positions} or less",
        )


def corpus_fingerprint(
    source: DataSource, digest: str, tokenizer: PreTrainedTokenizerBase, *, pack: bool, seed: int
) -> str:
    """sha256 of all that decides the sequences; where local files lie is not part of it, what they hold is."""
    options = source.model_dump(exclude={"path"} | (set() if source.prompt else {"prompt"}))
    facts = [VERSION, options, digest, _tokenizer_digest(tokenizer), pack, seed]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of tokenizer.json, without the cutting and padding that earlier calls leave in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.update(truncation=None, padding=None)
    else:
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    special = [tokenizer.pad_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps([content, special], sort_keys=True).encode()).hexdigest()


def encode(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, *, max_length: int, pack: bool
) -> Iterator[list[int]]:
    """Token ids of each text; [] where a text gives no token of its own.

    Texts for encoders carry special tokens and are cut to `max_length`; texts to be packed are whole and bare. A token
    of a prompt is told by its complement, ~id < 0 (`Sequences.of_marked` undoes it).
    """
    for first in range(0, len(texts), _TEXTS_AT_A_TIME):
        some = texts[first : first + _TEXTS_AT_A_TIME]
        pairs = [text for text in some if isinstance(text, Prompted)]
        if pairs:  # then all of them are
            yield from _encode_prompted(pairs, tokenizer, max_length=max_length, pack=pack)
            continue
        batch = [text for text in some if isinstance(text, str)]
        if pack:
            yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            continue
        found = tokenizer(batch, truncation=True, max_length=max_length, return_special_tokens_mask=True)
        for ids, special in zip(found["input_ids"], found["special_tokens_mask"], strict=True):
            yield [] if all(special) else ids


def _encode_prompted(
    pairs: list[Prompted], tokenizer: PreTrainedTokenizerBase, *, max_length: int, pack: bool
) -> Iterator[list[int]]:
    """As `encode`. A token is the prompt's where its first character is; special ones are nobody's."""
    cut = {} if pack else {"truncation": True, "max_length": max_length}
    found = tokenizer(
        ["".join(pair) for pair in pairs],
        add_special_tokens=not pack,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
        **cut,
    )
    lists = (found[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
    for pair, ids, spans, special in zip(pairs, *lists, strict=True):
        asks = [
            start < min(end, len(pair.prompt)) and not own for (start, end), own in zip(spans, special, strict=True)
        ]
        row = [~token if ask else token for token, ask in zip(ids, asks, strict=True)]
        yield [] if all(special) else row


def prepare_corpus(source: DataSource, tokenizer: PreTrainedTokenizerBase, *, pack: bool, seed: int = 0) -> Corpus:
    """Read, split and tokenise `source`: three parts that share no sequence; cached by fingerprint.

    Args:
        source: where text comes from and how much of it is used.
        tokenizer: of the model, with a padding or an end-of-text token.
        pack: False makes a sequence of each text (encoders); True joins texts with the end-of-text token and cuts
            full windows of `max_length` (language models), each begun as the tokenizer begins a text, and then no
            two parts share a document.
        seed: salt of the hash that decides which text falls in which part.

    Raises:
        CompressKitError: text that is not there, or too little of it.
        RunFailedError: the cache cannot be written.
    """
    pad_token_id, end_token_id = _padding_and_end(source, tokenizer, pack)
    if source.prompt is not None and not tokenizer.is_fast:
        what = f"{type(tokenizer).__name__} does not tell which characters its tokens come from"
        raise CompressKitError(what, where="data.prompt", fix="use a model with a tokenizer.json, or leave prompt out")
    opened = open_source(source)
    fingerprint = corpus_fingerprint(source, opened.digest, tokenizer, pack=pack, seed=seed)
    path = cache_folder() / "corpora" / f"{fingerprint[:32]}.tokens"
    parts = read_rows(path)
    if parts is None:
        parts = _make_parts(source, order_by_hash(opened.read(pack), seed), tokenizer, end_token_id if pack else None)
        write_rows(path, parts)
    for name, rows in parts.items():
        if len(rows) < getattr(source, name) and name in source.model_fields_set:
            _log.warning("data.%s: %d were asked for, the text gives %d", name, getattr(source, name), len(rows))
    made = Sequences if source.prompt is None else Sequences.of_marked
    sequences = {name: made(rows, pad_token_id) for name, rows in parts.items()}
    return Corpus(**sequences, fingerprint=fingerprint, origin=opened.origin)


def _padding_and_end(source: DataSource, tokenizer: PreTrainedTokenizerBase, pack: bool) -> tuple[int, int]:
    """The ids that pad a batch and that end a text; each stands in for the other where only one is needed."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if not isinstance(end, int) and (pack or not isinstance(pad, int)):
        raise CompressKitError(
            "the tokenizer has no end-of-text token" + ("" if pack else " and no padding token"),
            where="model",
            fix="set eos_token in the model's tokenizer_config.json",
        )
    if not pack and source.max_length > tokenizer.model_max_length:
        raise CompressKitError(
            f"{source.max_length} is more than the tokenizer's {tokenizer.model_max_length} tokens",
            where="data.max_length",
            fix=f"use max_length: {tokenizer.model_max_length} or less",
        )
    known = [token for token in (pad, end) if isinstance(token, int)]
    return known[0], known[-1]


def _make_parts(
    source: DataSource,
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    end_token_id: int | None,
) -> dict[str, list[list[int]]]:
    """Tokenise and split; an `end_token_id` asks for packed windows."""
    pack = end_token_id is not None
    sizes = Sizes(source.evaluation, source.calibration, source.training)
    encoded = track(encode(texts, tokenizer, max_length=source.max_length, pack=pack), "tokenising", total=len(texts))
    if end_token_id is not None:
        start = window_start(tokenizer)
        rows = split_windows(encoded, sizes, length=source.max_length, end_token_id=end_token_id, start=start)
    else:
        rows = split_sequences(encoded, sizes)
    parts: dict[str, list[list[int]]] = dict(zip(("evaluation", "calibration", "training"), rows, strict=True))
    _check_parts(source, parts, texts, pack)
    return parts


def _check_parts(source: DataSource, parts: dict[str, list[list[int]]], texts: Sequence[Text], pack: bool) -> None:
    for name, rows in parts.items():
        asked = getattr(source, name)
        needed = min(asked, 1 if name == "training" else SMALLEST_PART)
        if len(rows) < needed:
            noun = "documents" if pack else "texts"
            amount = f"{len(texts)} different {noun}, {sum(len(''.join(text)) for text in texts)} characters"
            kind = f"windows of {source.max_length} tokens" if pack else "sequences"
            raise CompressKitError(
                f"too little text: {amount} gave {len(rows)} {kind} for {name}, which needs {needed}",
                where="data",
                fix="give more text" + (", or a smaller max_length" if pack else ""),
            )
