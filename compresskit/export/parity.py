"""Does the file compute what the student computes? ONNX Runtime against torch on held-out text.

A float student is compared end to end. One that rounds activations to 8 bits cannot be: float32 sums in another order
differ in the last bit, that pushes a value over the middle between two steps now and then, and every such flip is a
difference of a whole step to the layers after it, where it flips more. After a few layers two *correct*
implementations differ by as much as rounding itself does: 7 % on all-MiniLM-L6-v2, which rounding moves by 14 %.

So integer students are compared in segments: ONNX Runtime tells the values it rounds, torch is given these very
values at the same places, and each segment from one rounding to the next must then agree to float precision. Every
operator of the file lies in a segment, and no flip can hide an error or pass for one. The difference end to end is
measured too, and must not exceed what rounding itself does to the student.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, RuntimeException
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as OrtNotImplemented
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.data import Batch, Examples, Sequences
from compresskit.data.sequences import pad
from compresskit.errors import RunFailedError
from compresskit.export.files import save_graph
from compresskit.export.fusion import rounding_points
from compresskit.export.runtime import LEVELS, run_session, session_feed
from compresskit.layers.int8_linear import Int8Linear
from compresskit.progress import track

BOUND = 1e-3
# Inputs rounded to 8 bits in blocks of a weight-only product: 1.6 % on SmolLM2-135M.
ROUNDED_BOUND = 5e-2
_BATCH_SIZES = (1, 3, 8, 4)
# Two implementations with independent rounding noise differ by √2 of it; the rest is room for chance.
NOISE_RATIO = 2.0


def parity_batches(examples: Examples, *, texts: int, batch: int | None = None) -> Iterator[Batch]:
    """Batches of 1, 3, 8 and 4 held-out examples in turn; of text every second one is cut, one to a single token.

    Where a file takes `batch` of them, batches are of that size, as many as hold `texts` or as there are.
    """
    sizes, count = (batch,) if batch else _BATCH_SIZES, min(texts, len(examples))
    if batch and len(examples) >= batch:
        count = min(-(-texts // batch), len(examples) // batch) * batch
    start, turn = 0, 0
    while start < count:
        stop = min(start + sizes[turn % len(sizes)], count)
        yield _cut(examples, start, stop)
        start, turn = stop, turn + 1


def _cut(examples: Examples, start: int, stop: int) -> Batch:
    """The examples `start` to `stop` as one batch; every second text is cut."""
    if isinstance(examples, Sequences):
        rows = examples.rows[start:stop]
        cut = [row if i % 2 else row[: max(1, len(row) * (i % 5) // 5)] for i, row in enumerate(rows, start)]
        return pad(cut, examples.pad_token_id)
    return {name: tensor[start:] for name, tensor in next(examples.batches(stop, limit=stop)).items()}


class Difference:
    """‖got − expected‖ / ‖expected‖ over any number of pairs; values that are not finite count as infinite."""

    def __init__(self) -> None:
        self._square = self._norm = self.max_abs = 0.0

    def add(self, got: np.ndarray, expected: np.ndarray) -> None:
        """Count one more pair of equal shapes."""
        if got.shape != expected.shape:
            raise ValueError(f"shapes differ: {got.shape} and {expected.shape}")
        apart = got.astype(np.float64) - expected
        self._square += float(np.square(apart).sum())
        self._norm += float(np.square(expected.astype(np.float64)).sum())
        self.max_abs = max(self.max_abs, float(np.abs(apart).max(initial=0.0)))

    @property
    def relative(self) -> float:
        """The ratio so far."""
        if not np.isfinite(self._square) or not np.isfinite(self._norm):
            return float("inf")
        return float(np.sqrt(self._square / self._norm)) if self._norm else float(np.sqrt(self._square))


def _unmasked(values: np.ndarray, batch: Batch) -> np.ndarray:
    """The positions of (batch, length, …) values that are not padding; anything else whole."""
    if "attention_mask" not in batch:
        return values
    mask = batch["attention_mask"].numpy().astype(bool)
    return values[mask] if values.shape[:2] == mask.shape else values


def _range(values: np.ndarray) -> np.ndarray:
    """The least and the greatest value, and zero between them: what a dynamic scale is made of."""
    return np.array([min(values.min(), 0.0), max(values.max(), 0.0)])


def model_outputs(model: nn.Module, batches: list[Batch], *, output: str) -> list[np.ndarray]:
    """What the model gives for each batch, in torch."""
    with torch.no_grad():
        return [model(**batch)[output].numpy() for batch in track(batches, "running the student")]


def compare_outputs(got: list[np.ndarray], expected: list[np.ndarray], batches: list[Batch]) -> dict[str, Any]:
    """`relative_error` and `max_abs` over unmasked positions of all batches, and the `worst_batch` alone."""
    total, worst = Difference(), 0.0
    for one, truth, batch in zip(got, expected, batches, strict=True):
        alone = Difference()
        for difference in (total, alone):
            difference.add(_unmasked(one, batch), _unmasked(truth, batch))
        worst = max(worst, alone.relative)
    return {"relative_error": total.relative, "max_abs": total.max_abs, "worst_batch": worst}


def _integer_layers(model: nn.Module) -> dict[str, Int8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


@contextmanager
def _forced(model: nn.Module, inputs: Mapping[str, Tensor], seen: dict[str, Tensor]) -> Iterator[None]:
    """Inside, each named integer layer reads `inputs[name]`; what it would have read is left in `seen`."""

    def hook_for(name: str) -> Callable[..., tuple[Tensor]]:
        def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            seen[name] = args[0]
            return (inputs[name],)

        return hook

    layers = _integer_layers(model)
    handles = [layers[name].register_forward_pre_hook(hook_for(name)) for name in inputs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def write_probe(model: Path, probe: Path) -> dict[str, str]:
    """Copy an ONNX file, adding the values that it rounds to its outputs.

    Returns:
        For each layer that rounds its input, the output that holds it.
    """
    graph = ir.load(model)
    points = rounding_points(graph)
    values = {value.name: value for node in graph.graph for value in node.outputs}
    present = {value.name for value in graph.graph.outputs}
    graph.graph.outputs.extend(values[name] for name in dict.fromkeys(points.values()) if name not in present)
    save_graph(graph, probe)
    return points


def compare_segments(
    session: ort.InferenceSession, points: Mapping[str, str], model: nn.Module, batches: list[Batch], *, output: str
) -> dict[str, Any]:
    """The largest relative difference of any segment between roundings, the last one ending at the output.

    Args:
        session: of a file that `write_probe` wrote.
        points: what `write_probe` returned.
        model: the student in torch.
        batches: held-out text.
        output: the name of the output.

    Returns:
        `relative_error`, the segment's end (`worst_segment`: a layer, or the output), how many `segments`.
    """
    differences: dict[str, Difference] = {name: Difference() for name in [*points, output]}
    names = [output, *dict.fromkeys(points.values())]
    for batch in track(batches, "comparing with ONNX Runtime"):
        values = session.run(names, session_feed(session, batch))
        got = {name: np.asarray(value) for name, value in zip(names, values, strict=True)}
        seen: dict[str, Tensor] = {}
        forced = {layer: torch.from_numpy(got[value]) for layer, value in points.items()}
        with torch.no_grad(), _forced(model, forced, seen):
            expected = model(**batch)[output].numpy()
        differences[output].add(_unmasked(got[output], batch), _unmasked(expected, batch))
        for layer, value in points.items():
            ours, theirs = got[value], seen[layer].numpy()
            differences[layer].add(_unmasked(ours, batch), _unmasked(theirs, batch))
            # Padding counts by its part in the one scale of the tensor; what a query of padding that may read no token
            # gives (in sliding windows) is for each implementation to say.
            differences[layer].add(_range(ours), _range(theirs))
    worst = max(differences, key=lambda name: differences[name].relative)
    return {
        "relative_error": differences[worst].relative,
        "max_abs": differences[output].max_abs,
        "worst_segment": worst,
        "segments": len(set(points.values())) + 1,
    }


@contextmanager
def _unrounded(model: nn.Module) -> Iterator[None]:
    """Inside, integer layers multiply their float input by their dequantised weight."""

    def hook(module: Int8Linear, args: tuple[Tensor], _: Tensor) -> Tensor:
        return F.linear(args[0], module.dequantize(), module.bias)

    handles = [layer.register_forward_hook(hook) for layer in _integer_layers(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_parity(
    path: Path,
    open_model: Callable[[Path], ort.InferenceSession],
    model: nn.Module,
    batches: list[Batch],
    *,
    output: str,
) -> dict[str, Any]:
    """Everything that the report says about parity; judges nothing.

    Returns:
        `relative_error` (end to end; of the worst segment where activations are rounded), `max_abs`, `texts`,
        `shapes`; for integer students also `worst_segment`, `segments` and `end_to_end` with `relative_error`,
        `worst_batch`, `max_abs` and `rounding_noise`: how far rounding its activations moves the student.
    """
    session = open_model(path)
    expected = model_outputs(model, batches, output=output)
    end_to_end = compare_outputs([run_session(session, batch) for batch in batches], expected, batches)
    first = next(iter(batches[0]))
    compared = {
        "texts": sum(len(batch[first]) for batch in batches),
        "shapes": ["x".join(map(str, batch[first].shape)) for batch in batches],
    }
    if not _integer_layers(model):
        return end_to_end | compared
    probe = path.with_name("probe.onnx")
    points = write_probe(path, probe)
    try:
        found = compare_segments(open_model(probe), points, model, batches, output=output)
    finally:
        for file in probe.parent.glob(f"{probe.name}*"):
            file.unlink()
    with _unrounded(model):
        unrounded = model_outputs(model, batches, output=output)
    end_to_end["rounding_noise"] = compare_outputs(unrounded, expected, batches)["relative_error"]
    return found | compared | {"end_to_end": end_to_end}


def check_shipped(
    session: ort.InferenceSession, model: nn.Module, batches: list[Batch], *, output: str
) -> dict[str, Any]:
    """How far the file as it is shipped is from the student, end to end (`compare_outputs`)."""
    expected = model_outputs(model, batches, output=output)
    return compare_outputs([run_session(session, batch) for batch in batches], expected, batches)


def check_levels(open_model: Callable[..., ort.InferenceSession], path: Path, batch: Batch) -> dict[str, float]:
    """By optimisation level of ONNX Runtime, how far one batch's answer is from that at level `all`, relatively.

    `all` is what `check_parity` proves. Scales of integer activations make another comparison with torch a matter of
    chance; with another level of the same runtime it is not.

    Args:
        open_model: takes a path and `level`, as `open_session` does.
        path: the file.
        batch: a small one.

    Raises:
        RunFailedError: a level at which the file cannot be run.
    """
    answers: dict[str, np.ndarray] = {}
    for level in LEVELS:
        try:
            answers[level] = run_session(open_model(path, level=level), batch)
        except (Fail, InvalidGraph, OrtNotImplemented, RuntimeException) as error:
            raise RunFailedError(
                f"ONNX Runtime cannot run the file at optimisation level {level!r}: {str(error).splitlines()[0]}",
                where=path.name,
                fix="try 'fuse: false', or another opset",
            ) from error
    return {
        level: compare_outputs([got], [answers["all"]], [batch])["relative_error"] for level, got in answers.items()
    }


def judge_levels(found: Mapping[str, float], *, bound: float, where: str) -> None:
    """Accept what `check_levels` found, or refuse the file.

    Raises:
        RunFailedError: a level with another answer.
    """
    for level, error in found.items():
        if not error <= bound:
            raise RunFailedError(
                f"at optimisation level {level!r} ONNX Runtime gives another answer than at 'all': {error:.3g} "
                f"(relative); the bound is {bound:g}",
                where=where,
                fix="try 'fuse: false', or another opset; max_relative_error moves the bound",
            )


def noise_bound(found: Mapping[str, Any], bound: float) -> float:
    """How far a file may be from its student end to end: `bound`, and what rounding activations explains.

    Args:
        found: what `check_parity` found.
        bound: where nothing is rounded.
    """
    return bound + NOISE_RATIO * found.get("end_to_end", {}).get("rounding_noise", 0.0)


def judge_parity(found: dict[str, Any], *, bound: float, where: str) -> None:
    """Accept what `check_parity` found, or refuse the file.

    Raises:
        RunFailedError: a relative error past the bound, or a difference end to end that rounding cannot explain.
    """
    if not found["relative_error"] <= bound:
        in_integers = "worst_segment" in found
        place = f" at {found['worst_segment']}" if in_integers else ""
        cpu = "; on x86 without VNNI the integer kernels overflow" if in_integers else ""
        raise RunFailedError(
            f"ONNX Runtime differs from the student by {found['relative_error']:.3g}{place} (relative, "
            f"{found['texts']} held-out texts); the bound is {bound:g}",
            where=where,
            fix=f"try 'fuse: false'; max_relative_error moves the bound{cpu}",
        )
    whole = found.get("end_to_end")
    if whole and not whole["relative_error"] <= noise_bound(found, bound):
        raise RunFailedError(
            f"ONNX Runtime differs from the student by {whole['relative_error']:.3g} end to end, more than "
            f"{NOISE_RATIO:g} times what rounding activations does ({whole['rounding_noise']:.3g})",
            where=where,
            fix="try 'fuse: false'",
        )


def judge_shipped(found: dict[str, Any], *, bound: float, where: str) -> None:
    """Accept the difference that faster weight-only products make.

    Raises:
        RunFailedError: more than `bound`, most often `noise_bound` of `ROUNDED_BOUND`.
    """
    found["bound"] = bound
    if not found["relative_error"] <= bound:
        raise RunFailedError(
            f"rounding the inputs of weight-only products moves the student by {found['relative_error']:.3g} "
            f"(relative); the bound is {bound:g}",
            where=where,
            fix="set 'accuracy_level: 0' in the export: exact, and slow",
        )
