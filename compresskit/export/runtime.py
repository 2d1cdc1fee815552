"""ONNX Runtime on this machine's CPU: sessions, batches for them, and latencies that can be compared."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from torch import Tensor

from compresskit.progress import track

SHAPES = ((1, 16), (1, 64), (8, 64))
HEADLINE = "1x64"
_WARMUP = 5


def default_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(model: Path, *, threads: int) -> ort.InferenceSession:
    """A CPU session with a fixed number of threads that sleep when idle, and every optimisation on."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning workers of one session would take the cores from the next one, and from themselves on a busy machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def run_session(session: ort.InferenceSession, inputs: Mapping[str, Tensor | np.ndarray]) -> np.ndarray:
    """The session's one output."""
    feed = {value.name: np.asarray(inputs[value.name]) for value in session.get_inputs()}
    return np.asarray(session.run(None, feed)[0])


def random_inputs(session: ort.InferenceSession, shape: tuple[int, int], vocabulary: int) -> dict[str, np.ndarray]:
    """Unpadded inputs of random tokens, the same on every call; token types are zero."""
    ids = np.random.default_rng(0).integers(0, vocabulary, shape)
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {value.name: known[value.name] for value in session.get_inputs()}


def compare_latency(
    sessions: Mapping[str, ort.InferenceSession], *, vocabulary: int, rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Latency of each session at each of `SHAPES`, taken in turns, so that a busy moment hits all alike.

    Returns:
        `{name: {"1x64": {"p50": ms, "p95": ms, "speed": …}}}`; speed is the median over rounds of the first session's
        time divided by this one's.
    """
    table: dict[str, dict[str, dict[str, float]]] = {name: {} for name in sessions}
    first = next(iter(sessions))
    for shape in SHAPES:
        inputs = {name: random_inputs(session, shape, vocabulary) for name, session in sessions.items()}
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
            table[name][f"{shape[0]}x{shape[1]}"] = row
    return table


def latency_entry(rows: dict[str, dict[str, float]]) -> dict[str, Any]:
    """p50 and p95 at the headline shape, and at each shape by its name."""
    return {
        "p50": rows[HEADLINE]["p50"],
        "p95": rows[HEADLINE]["p95"],
        **{shape: {"p50": row["p50"], "p95": row["p95"]} for shape, row in rows.items()},
    }


def speed_entry(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """Speed relative to the first session, by shape."""
    return {shape: row["speed"] for shape, row in rows.items()}
