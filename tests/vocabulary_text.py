"""Made-up text and small tokenizers trained on it: WordPiece, BPE on bytes, BPE with byte fallback, Unigram."""

import json
import random
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

KINDS = ("wordpiece", "byte_bpe", "fallback_bpe", "unigram")
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
_START = ("", "b", "br", "d", "f", "g", "k", "l", "m", "n", "pl", "r", "s", "st", "t", "tr", "v")
_END = ("a", "e", "i", "o", "u", "an", "en", "is", "or", "um", "é")


def lines(count: int, *, seed: int = 0, words: int = 600) -> list[str]:
    """Sentences of made-up words, common ones short and often, with numbers, capitals, quotes and marks."""
    draw = random.Random(0)
    known = ["".join(draw.choice(_START) + draw.choice(_END) for _ in range(1 + i % 4)) for i in range(words)]
    weights = [1 / (i + 3) for i in range(words)]
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        text = " ".join(draw.choices(known, weights, k=draw.randint(2, 12)))
        marks = (".", "!", "?", " – ok", f" {draw.randint(0, 2030)}", " 'x'", ",  so")
        found.append(text.capitalize() + draw.choice(marks) if draw.random() < 0.6 else text)
    return found


@cache
def _trained(kind: str, ends: bool) -> str:
    text = lines(3000)
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)  # type: ignore[attr-defined]
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[attr-defined]
        tokenizer.decoder = decoders.WordPiece()  # type: ignore[attr-defined]
        trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIAL)
    elif kind == "byte_bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[attr-defined]
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[attr-defined]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet)
    elif kind == "fallback_bpe":  # as Gemma's: one word is the whole text
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")  # type: ignore[attr-defined]
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")  # type: ignore[attr-defined]
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(parts)  # type: ignore[attr-defined]
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[attr-defined]
        tokenizer.decoder = decoders.Metaspace()  # type: ignore[attr-defined]
        trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(text, trainer)
    if ends:
        first, last = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
        around = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", first), ("</s>", last)])
        tokenizer.post_processor = around  # type: ignore[attr-defined]
    content = json.loads(tokenizer.to_str())
    if kind == "fallback_bpe":
        vocabulary = content["model"]["vocab"]
        for byte in range(256):
            vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    return json.dumps(content)


def trained(kind: str, *, ends: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of one of `KINDS`, trained on `lines(3000)`; with `ends` it puts <s> and </s> around a text."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(kind, ends)),
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
