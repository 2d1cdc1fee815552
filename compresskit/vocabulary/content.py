"""What a tokenizer.json holds, and the same with fewer tokens.

    before  vocabulary V, merges M        after  vocabulary K ⊂ V, merges {(a, b) ∈ M : a, b and ab ∈ K}

A text whose tokens are all in K is cut into the same tokens as before:
- WordPiece takes the longest known piece: that of V is in K, and K knows no longer one.
- BPE applies the merge of the lowest rank first. All merges inside a token are its derivation, the same in every text,
  and `needs` says what it passes through: where that is in K, each next merge of before is there, and none before it.
- Unigram takes the pieces of the highest sum of scores: the best of V is in K. An unknown character costs 10 more than
  the least score, so the token of the least score is kept.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from compresskit.errors import CompressKitError
from compresskit.processors import Processor

#: The kinds of `tokenizers` models that can be cut.
KINDS = ("WordPiece", "BPE", "Unigram")
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def read_content(tokenizer: Processor) -> "Content":
    """What the tokenizer's tokenizer.json holds.

    Raises:
        CompressKitError: no tokenizer, one without a tokenizer.json (slow, or sentencepiece alone), or one of a kind
            that is not understood.
    """
    name = type(tokenizer).__name__
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        what = f"{name} reads no text: there is no vocabulary to prune"
        raise CompressKitError(what, where="model", fix="leave prune_vocab out")
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        what = f"{name} has no tokenizer.json, which is what prune_vocab rewrites"
        fix = "save a fast one beside the model: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        raise CompressKitError(what, where="model", fix=fix)
    content = json.loads(backend.to_str())
    model = content["model"]
    if model.get("type") not in KINDS:
        what = f"a tokenizer of kind {model.get('type')!r} cannot be pruned; {', '.join(KINDS)} can"
        raise CompressKitError(what, where="model", fix="leave prune_vocab out")
    if model["type"] != "WordPiece" and not content.get("decoder"):
        what = "a tokenizer without a decoder cannot give text back"
        raise CompressKitError(what, where="model", fix="leave prune_vocab out")
    if model["type"] == "BPE" and model.get("continuing_subword_prefix"):
        what = f"BPE with pieces that continue by {model['continuing_subword_prefix']!r} is not understood"
        raise CompressKitError(what, where="model", fix="leave prune_vocab out")
    return Content(content)


@dataclass(frozen=True)
class Content:
    """A tokenizer.json, read."""

    raw: dict[str, Any]

    @property
    def model(self) -> dict[str, Any]:
        """The part that cuts words into tokens."""
        return self.raw["model"]

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return self.model["type"]

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of every token, added ones too."""
        vocabulary = self.model["vocab"]
        own = {piece: i for i, (piece, _) in enumerate(vocabulary)} if self.kind == "Unigram" else dict(vocabulary)
        return own | {token["content"]: token["id"] for token in self.raw["added_tokens"]}

    @cached_property
    def tokens(self) -> dict[int, str]:
        """The token of every id."""
        return {index: token for token, index in self.ids.items()}

    @cached_property
    def added(self) -> frozenset[int]:
        """Ids of added tokens, special ones too: found in text before it is cut into words."""
        return frozenset(token["id"] for token in self.raw["added_tokens"])

    @cached_property
    def unknown(self) -> int | None:
        """The id of what stands for a piece that is not known."""
        if self.kind == "Unigram":
            return self.model.get("unk_id")
        return self.ids.get(self.model.get("unk_token") or "")

    def always_kept(self) -> set[int]:
        """Ids without which the tokenizer would not work on every text, or not as before.

        Added tokens, those that the post-processor puts around a text, the unknown one, an alphabet (bytes where the
        tokenizer falls back to them, else single characters) and Unigram's token of the least score.
        """
        kept = set(self.added) | {holder[at] for holder, at in _processor_ids(self.raw.get("post_processor"))}
        kept |= set() if self.unknown is None else {self.unknown}
        kept |= {index for token, index in self.ids.items() if self._in_alphabet(token)}
        if self.kind == "Unigram":
            scores = [score for _, score in self.model["vocab"]]
            kept.add(min(range(len(scores)), key=scores.__getitem__))
        return kept

    def _in_alphabet(self, token: str) -> bool:
        if self.model.get("byte_fallback"):
            return token in _BYTE_TOKENS
        prefix, suffix = self.model.get("continuing_subword_prefix") or "", self.model.get("end_of_word_suffix") or ""
        return len(token.removeprefix(prefix) or token) == 1 or len(token.removesuffix(suffix) or token) == 1

    def needs(self, index: int) -> frozenset[int]:
        """Ids of the tokens that BPE passes through on its way to this one, itself too; of other kinds itself alone."""
        if self.kind != "BPE" or index in self.added:
            return frozenset((index,))
        suffix = self.model.get("end_of_word_suffix") or ""
        found = derive(self.tokens[index], self._merges, suffix=suffix)
        return frozenset((index, *(self.ids[piece] for piece in found if piece in self.ids)))

    @cached_property
    def _merges(self) -> dict[tuple[str, str], int]:
        """The rank of each pair that BPE joins."""
        return {pair: rank for rank, pair in reversed(list(enumerate(map(_pair, self.model["merges"]))))}

    def cut(self, kept: Sequence[int]) -> dict[str, Any]:
        """The tokenizer.json of the tokens `kept` (ascending), numbered from 0 in their order."""
        new = {old: index for index, old in enumerate(kept)}
        raw = json.loads(json.dumps(self.raw))
        model = raw["model"]
        if self.kind == "Unigram":
            model["vocab"] = [model["vocab"][old] for old in kept if old < len(model["vocab"])]
            model["unk_id"] = new.get(model["unk_id"]) if model.get("unk_id") is not None else None
        else:
            model["vocab"] = {piece: new[old] for piece, old in model["vocab"].items() if old in new}
        if self.kind == "BPE":
            pieces = model["vocab"]
            pairs = ((merge, _pair(merge)) for merge in model["merges"])
            model["merges"] = [m for m, (a, b) in pairs if a in pieces and b in pieces and a + b in pieces]
        raw["added_tokens"] = [token | {"id": new[token["id"]]} for token in raw["added_tokens"]]
        for holder, at in _processor_ids(raw.get("post_processor")):
            holder[at] = new[holder[at]]
        if raw.get("padding"):
            raw["padding"]["pad_id"] = new.get(raw["padding"]["pad_id"], 0)
        return raw


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def derive(token: str, merges: dict[tuple[str, str], int], *, suffix: str = "") -> list[str]:
    """The pieces that BPE passes through from characters to `token`, both included; none where it does not get there.

    Args:
        token: as the vocabulary has it.
        merges: the rank of each pair; the lowest comes first, the leftmost of equal ones.
        suffix: what marks the end of a word, a part of its last character.
    """
    body = token.removesuffix(suffix) if suffix else token
    pieces = list(body)
    if suffix and body != token and pieces:
        pieces[-1] += suffix
    passed = list(pieces)
    while len(pieces) > 1:
        ranked = [(merges[pair], at) for at, pair in enumerate(pairwise(pieces)) if pair in merges]
        if not ranked:
            return []
        _, at = min(ranked)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        passed.append(pieces[at])
    return passed


def _processor_ids(processor: dict[str, Any] | None) -> Iterable[tuple[list[Any], int]]:
    """Where a post-processor holds a token id: each list, and the position in it."""
    if not processor:
        return
    for part in processor.get("processors", []):
        yield from _processor_ids(part)
    if processor["type"] == "TemplateProcessing":
        for special in processor["special_tokens"].values():
            yield from ((special["ids"], at) for at in range(len(special["ids"])))
    for end in ("sep", "cls"):
        if isinstance(processor.get(end), list):
            yield processor[end], 1
