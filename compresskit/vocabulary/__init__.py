"""Fewer tokens: which ones a text needs, a tokenizer of these alone, and texts of the whole one said in it."""

from compresskit.vocabulary.choice import choose_tokens, count_tokens
from compresskit.vocabulary.content import Content, read_content
from compresskit.vocabulary.translation import Translator, cut_tokenizer, refuse_prompts

__all__ = ["Content", "Translator", "choose_tokens", "count_tokens", "cut_tokenizer", "read_content", "refuse_prompts"]
