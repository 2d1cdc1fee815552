"""Ways to run a model for a while: without its cache, with another attention."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


@contextmanager
def without_cache(model: PreTrainedModel) -> Iterator[None]:
    """Run a decoder without filling its key/value cache."""
    config = model.config.get_text_config()
    had = getattr(config, "use_cache", None)
    if had is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if had is not None:
            config.use_cache = had


@contextmanager
def attention_by(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Compute attention by this implementation: `eager` shows the probabilities."""
    before = model.config._attn_implementation or "eager"
    if before != implementation:
        model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        if before != implementation:
            model.set_attn_implementation(before)
