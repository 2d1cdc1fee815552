"""ONNX Runtime on this machine's CPU: sessions, batches for them, and latencies that can be compared."""

import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from compresskit.data import Batch
from compresskit.export.sizes import FREE, Sizes
from compresskit.export.steps import PAST, positions
from compresskit.progress import track

_SHAPES = ((1, 16), (1, 64), (8, 64))
#: batches of images and other inputs of one shape
_BATCHES = (1, 8)
#: tokens before the one that is timed
_PASTS = (64, 256)
_WARMUP = 5
#: Optimisation levels of ONNX Runtime, the least first.
LEVELS = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "layout": ort.GraphOptimizationLevel.ORT_ENABLE_LAYOUT,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def default_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(
    model: Path,
    *,
    threads: int,
    exact: bool = False,
    level: str = "all",
    spin: bool = False,
    profile: Path | None = None,
) -> ort.InferenceSession:
    """A CPU session with a fixed number of threads that sleep when idle.

    Args:
        exact: products that ONNX Runtime makes of DequantizeLinear and MatMul keep their input in float32.
        level: what ONNX Runtime may rewrite as it loads the file, one of `LEVELS`.
        spin: between the nodes of one run threads wait awake, ONNX Runtime's own default: faster where nothing else
            runs.
        profile: how the names of files begin in which ONNX Runtime writes the time of each node.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning workers of one session would take the cores from the next one, and from themselves on a busy machine.
    name = "session.force_spinning_stop" if spin else "session.intra_op.allow_spinning"
    options.add_session_config_entry(name, "1" if spin else "0")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def session_sizes(session: ort.InferenceSession) -> Sizes:
    """What the session's file takes at once."""
    shapes = {value.name: value.shape for value in session.get_inputs()}
    shape = shapes.get("input_ids") or next(iter(shapes.values()))
    batch, length, *_ = [size if isinstance(size, int) else None for size in shape]
    return Sizes(batch, length if "input_ids" in shapes else None)


def session_feed(session: ort.InferenceSession, inputs: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
    """What the session takes: its part of `inputs`, and of a decoder's keys and values zeros.

    `inputs` have the sizes that the file takes (`Sizes.fit`). Tokens that attention_mask has and input_ids has not are
    the past; most often there are none. Positions that are not given count real tokens, and token types that are not
    given are zero.
    """
    feed = {value.name: np.asarray(inputs[value.name]) for value in session.get_inputs() if value.name in inputs}
    missing = [value for value in session.get_inputs() if value.name not in feed]
    if not missing:
        return feed
    (texts, new), (_, total) = inputs["input_ids"].shape, inputs["attention_mask"].shape
    for value in missing:
        if value.name == "position_ids":
            feed[value.name] = positions(np.asarray(inputs["attention_mask"]), new)
        elif value.name == "token_type_ids":
            feed[value.name] = np.zeros((texts, new), np.int64)
        elif value.name.startswith(PAST):
            feed[value.name] = np.zeros((texts, value.shape[1], total - new, value.shape[3]), np.float32)
        else:
            raise ValueError(f"nothing to give the input {value.name}")
    return feed


def session_feeds(session: ort.InferenceSession, inputs: Batch) -> list[dict[str, np.ndarray]]:
    """What the session takes, call after call, to read a batch of any size (`Sizes.fit`)."""
    return [session_feed(session, part) for part in session_sizes(session).fit(_own(session, inputs))]


def _own(session: ort.InferenceSession, inputs: Batch) -> Batch:
    """The part of `inputs` that the session takes or `session_feed` reads."""
    wanted = {"input_ids", "attention_mask", *(value.name for value in session.get_inputs())}
    return {name: value for name, value in inputs.items() if name in wanted}


def run_outputs(session: ort.InferenceSession, names: list[str], inputs: Batch) -> list[np.ndarray]:
    """The named outputs for a batch of any size: cut, padded, split and joined again as the file asks for it."""
    sizes, given = session_sizes(session), _own(session, inputs)
    found = [session.run(names, session_feed(session, part)) for part in sizes.fit(given)]
    return [sizes.join([np.asarray(part[index]) for part in found], given) for index in range(len(names))]


def run_session(session: ort.InferenceSession, inputs: Batch) -> np.ndarray:
    """The session's first output, see `run_outputs`."""
    return run_outputs(session, [session.get_outputs()[0].name], inputs)[0]


def text_shapes(positions: int | None, sizes: Sizes = FREE) -> list[tuple[int, int]]:
    """The (texts, tokens) that latencies are told for: one text of 16 and of 64 tokens, eight of 64.

    Args:
        positions: tokens that the model can place, where that has an end; longer shapes are cut to it.
        sizes: what the file takes instead, where it is fixed.
    """
    shapes = ((sizes.batch or texts, sizes.length or min(length, positions or length)) for texts, length in _SHAPES)
    return list(dict.fromkeys(shapes))


def repeated_cases(examples: Batch, sizes: Sizes = FREE) -> dict[str, Batch]:
    """The first of some examples, once and in batches, or in those that the file takes."""
    counts = _BATCHES if sizes.batch is None else (sizes.batch,)
    return by_shape(
        {name: tensor[:1].repeat_interleave(size, 0) for name, tensor in examples.items()} for size in counts
    )


def decode_cases(positions: int | None, sizes: Sizes = FREE) -> dict[str, Batch]:
    """One token after a past, by name: "1x1+64" is the 65th.

    Args:
        positions: tokens that the model can place, where that has an end.
        sizes: the texts that the file takes, where that is fixed.
    """
    pasts = dict.fromkeys(min(past, (positions or past + 1) - 1) for past in _PASTS)
    texts = sizes.batch or 1
    one = torch.ones(texts, 1, dtype=torch.int64)
    cases = {past: {"input_ids": one, "attention_mask": one.expand(texts, past + 1)} for past in pasts}
    return {f"{texts}x1+{past}": case for past, case in cases.items()}


def by_shape(cases: Iterable[Batch]) -> dict[str, Batch]:
    """Inputs by the shape of their first tensor, as "1x64"."""
    return {"x".join(map(str, next(iter(case.values())).shape)): case for case in cases}


def compare_latency(
    sessions: Mapping[str, ort.InferenceSession], cases: Mapping[str, Batch], *, rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Latency of each session on each of `cases`, taken in turns, so that a busy moment hits all alike.

    Args:
        sessions: the first is what speeds are relative to.
        cases: inputs by the name of their shape.
        rounds: timed runs of each.

    Returns:
        `{name: {"1x64": {"p50": ms, "p95": ms, "speed": …}}}`, the cases in their order; speed is the median over
        rounds of the first session's time divided by this one's.
    """
    table: dict[str, dict[str, dict[str, float]]] = {name: {} for name in sessions}
    first = next(iter(sessions))
    for shape, case in cases.items():
        inputs = {name: session_feed(session, case) for name, session in sessions.items()}
        for name, session in sessions.items():
            for _ in range(_WARMUP):
                session.run(None, inputs[name])
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in track(range(rounds), "timing ONNX Runtime"):
            for name, session in sessions.items():
                session.run(None, inputs[name])  # untimed: brings its weights back into the caches
                start = time.perf_counter()
                session.run(None, inputs[name])
                times[name].append((time.perf_counter() - start) * 1e3)
        for name, taken in times.items():
            p50, p95 = np.percentile(taken, [50, 95])
            speed = np.median(np.array(times[first]) / np.array(taken))
            row = {"p50": round(float(p50), 3), "p95": round(float(p95), 3), "speed": round(float(speed), 3)}
            table[name][shape] = row
    return table


def headline(shapes: Iterable[str]) -> str:
    """The largest timed shape of the fewest whole examples (one, unless the file takes more), which stands for all."""
    sizes = {shape: [int(size) for size in shape.split("x")] for shape in shapes if "+" not in shape}
    return max(sizes, key=lambda shape: (-sizes[shape][0], math.prod(sizes[shape])))


def latency_entry(rows: dict[str, dict[str, float]]) -> dict[str, Any]:
    """p50 and p95 at the headline shape (one text of 64 tokens, or what fits), and at each shape by its name."""
    head = rows[headline(rows)]
    return {
        "p50": head["p50"],
        "p95": head["p95"],
        **{shape: {"p50": row["p50"], "p95": row["p95"]} for shape, row in rows.items()},
    }


def speed_entry(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """Speed relative to the first session, by shape."""
    return {shape: row["speed"] for shape, row in rows.items()}
