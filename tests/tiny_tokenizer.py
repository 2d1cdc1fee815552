"""A small WordPiece tokenizer, and the words that it knows whole."""

import string

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WORD_LINES = """
the a one some every no this that its their our which when where how and or but not with from into over
model student teacher layer weight matrix rank head block token text batch seed step file folder graph
keeps drops reads writes learns holds shows makes finds moves small large fast slow dense sparse exact
"""
WORDS = tuple(_WORD_LINES.split())


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer that knows WORDS whole and spells everything else in lower-case characters."""
    characters = sorted(set(string.ascii_lowercase + string.digits + string.punctuation))
    pieces = [*SPECIAL, *characters, *(f"##{c}" for c in characters), *dict.fromkeys(WORDS)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=64,
    )
