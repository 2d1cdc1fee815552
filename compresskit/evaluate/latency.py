"""How long one forward takes, measured so that two figures of one run can be compared.

Machines drift: clocks change, neighbours come and go. Everything that will be compared is therefore called in turn,
round after round, in one loop: a b c a b c …
"""

import gc
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskit.data import Batch, token_positions
from compresskit.evaluate.quality import evaluating, on_device
from compresskit.progress import track


def measure_latency(
    callables: dict[str, Callable[[], object]], *, rounds: int = 30, warmup: int = 5
) -> dict[str, dict[str, float]]:
    """The median and the 95th percentile of each callable's wall time in milliseconds, strictly alternating.

    Args:
        callables: what to time, by name; each must return only when its work is done.
        rounds: timed calls of each, ≥ 1.
        warmup: calls of each before the timed ones.

    Returns:
        For each name `p50_ms` and `p95_ms`.
    """
    if rounds < 1 or not callables:
        raise ValueError(f"{rounds} rounds of {len(callables)} callables")
    times: dict[str, list[int]] = {name: [] for name in callables}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in track(range(warmup + rounds), "measuring latency"):
            for name, call in callables.items():
                start = time.perf_counter_ns()
                call()
                elapsed = time.perf_counter_ns() - start
                if turn >= warmup:
                    times[name].append(elapsed)
    finally:
        if collecting:
            gc.enable()
    return {
        name: {"p50_ms": float(np.percentile(own, 50)) / 1e6, "p95_ms": float(np.percentile(own, 95)) / 1e6}
        for name, own in times.items()
    }


def timed_length(model: PreTrainedModel, length: int = 64) -> int:
    """Tokens of the text that a model is timed on: `length`, cut to the positions that it has."""
    return min(length, token_positions(model) or length)


def random_batch(tokenizer: PreTrainedTokenizerBase, batch: int, length: int) -> Batch:
    """Ordinary tokens (no special ones), shape (batch, length), without padding; the same in each call."""
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    drawn = torch.randint(len(ordinary), (batch, length), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(ordinary)[drawn]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def forward_call(model: PreTrainedModel, inputs: Batch) -> Callable[[], None]:
    """A callable that runs `model` on `inputs` once, without gradients, and waits until the device is done."""
    inputs = on_device(inputs, model)
    on_gpu = model.device.type == "cuda"

    def call() -> None:
        model(**inputs)
        if on_gpu:
            torch.cuda.synchronize(model.device)

    return call


def model_latency(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch: int = 1,
    length: int = 64,
    rounds: int = 30,
    warmup: int = 5,
) -> dict[str, float]:
    """`p50_ms` and `p95_ms` of one forward of `model` in torch on (batch, length) ordinary tokens."""
    return batch_latency(model, random_batch(tokenizer, batch, length), rounds=rounds, warmup=warmup)


def batch_latency(model: PreTrainedModel, inputs: Batch, *, rounds: int = 30, warmup: int = 5) -> dict[str, float]:
    """`p50_ms` and `p95_ms` of one forward of `model` in torch on `inputs`."""
    with evaluating(model):
        call = forward_call(model, inputs)
        return measure_latency({"model": call}, rounds=rounds, warmup=warmup)["model"]
