"""ONNX Runtime on this machine's CPU: sessions, batches for them, and latencies that can be compared."""

import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from torch import Tensor

from compresskit.data import Batch
from compresskit.progress import track

_SHAPES = ((1, 16), (1, 64), (8, 64))
#: batches of images and other inputs of one shape
_BATCHES = (1, 8)
_WARMUP = 5


def default_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(model: Path, *, threads: int, exact: bool = False) -> ort.InferenceSession:
    """A CPU session with a fixed number of threads that sleep when idle, and every optimisation on.

    Args:
        exact: products that ONNX Runtime makes of DequantizeLinear and MatMul keep their input in float32.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning workers of one session would take the cores from the next one, and from themselves on a busy machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def run_session(session: ort.InferenceSession, inputs: Mapping[str, Tensor | np.ndarray]) -> np.ndarray:
    """The session's one output."""
    feed = {value.name: np.asarray(inputs[value.name]) for value in session.get_inputs()}
    return np.asarray(session.run(None, feed)[0])


def text_shapes(positions: int | None) -> list[tuple[int, int]]:
    """The (texts, tokens) that latencies are told for: one text of 16 and of 64 tokens, eight of 64.

    Args:
        positions: tokens that the model can place, where that has an end; longer shapes are cut to it.
    """
    return list(dict.fromkeys((texts, min(length, positions or length)) for texts, length in _SHAPES))


def repeated_cases(examples: Batch) -> dict[str, Batch]:
    """The first of some examples, once and in batches."""
    return by_shape(
        {name: tensor[:1].repeat_interleave(size, 0) for name, tensor in examples.items()} for size in _BATCHES
    )


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
        inputs = {
            name: {value.name: np.asarray(case[value.name]) for value in session.get_inputs()}
            for name, session in sessions.items()
        }
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
    """The largest timed shape of one example, which stands for all."""
    single = [shape for shape in shapes if shape.startswith("1x")]
    return max(single, key=lambda shape: math.prod(map(int, shape.split("x"))))


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
