"""What a model costs and how true it is to the original: size, quality, latency."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskit.data import Sequences
from compresskit.evaluate.latency import batch_latency, measure_latency, model_latency, timed_length
from compresskit.evaluate.quality import Fidelity
from compresskit.evaluate.size import checkpoint_bytes, count_parameters, state_dict_bytes
from compresskit.float_types import float_types
from compresskit.processors import Processor
from compresskit.student import HeldOut

__all__ = [
    "Fidelity",
    "checkpoint_bytes",
    "count_parameters",
    "evaluate",
    "measure_latency",
    "model_latency",
    "state_dict_bytes",
    "timed_length",
]


def evaluate(
    model: PreTrainedModel,
    fidelity: Fidelity,
    tokenizer: Processor,
    *,
    batch: int = 1,
    length: int = 64,
    rounds: int = 30,
    held_out: HeldOut | None = None,
) -> dict[str, int | float]:
    """All figures of `model` in one flat mapping, the same keys for every model of one task.

    Args:
        model: the student so far, or the original itself.
        fidelity: the original on held-out text; its keys say what its task measures.
        tokenizer: of `model`; supplies ordinary tokens to time text models with; others are timed on held-out examples.
        batch, length: shape of the timed input; `length` is cut to the positions that the model has.
        rounds: timed forwards; 0 leaves latency out.
        held_out: the held-out text as `model` reads it, where that is not how the original does.

    Returns:
        `params` (weights), `size_bytes` (as its files hold it), `p50_ms` and `p95_ms` (one forward in torch), and the
        figures of `fidelity.measure`.
    """
    size_bytes = state_dict_bytes(model, float_types(model).stored)
    figures: dict[str, int | float] = {"params": count_parameters(model), "size_bytes": size_bytes}
    if rounds and not isinstance(fidelity.sequences, Sequences):
        figures |= batch_latency(model, next(fidelity.sequences.batches(batch)), rounds=rounds)
    elif rounds:
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        figures |= model_latency(model, tokenizer, batch=batch, length=timed_length(model, length), rounds=rounds)
    return figures | fidelity.measure(model, held_out)
