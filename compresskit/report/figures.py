"""What a report says, as rows of text: values, what each pass changed, and the verdict on every export.

Pure functions of `report.json`'s content; the terminal's table and the page are made of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compresskit.export.runtime import headline

#: Figures in which a change is told in points of per cent; the others are told as plain differences.
_SHARES = frozenset({"top1_flips", "label_flips"})
_LABELS = {
    "p50_ms": "torch p50 ms",
    "p95_ms": "torch p95 ms",
    "mean_cosine": "mean cosine",
    "top10_overlap": "top-10 overlap",
    "spearman": "Spearman",
    "perplexity": "perplexity",
    "kl_to_original": "KL to original",
    "top1_flips": "top-1 flips",
    "label_flips": "label flips",
    "relative_error": "relative error",
}
_BASELINES = {"baseline": "original, float ONNX", "stock_int8": "original, onnxruntime's stock dynamic int8"}


@dataclass(frozen=True)
class Cell:
    """A figure and, where there is one to compare with, what the pass changed in it."""

    text: str
    change: str = ""


@dataclass(frozen=True)
class PassRow:
    """One line of the table of passes."""

    kind: str
    options: dict[str, Any]
    params: Cell
    size: Cell
    #: bytes, as a share of the original's
    share: float
    metrics: dict[str, Cell]
    seconds: str
    notes: dict[str, Any]


@dataclass(frozen=True)
class SpeedRow:
    """One line of an export's table: the student's file or a baseline."""

    name: str
    size: str
    size_share: str
    p50: str
    p95: str
    speed: str


def write_bytes(count: float) -> str:
    """`22 700 000` as `22.7 MB` (decimal units, three digits)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            amount = count / size
            return f"{amount:,.{2 if amount < 10 else 1 if amount < 100 else 0}f} {unit}"
    return f"{count:.0f} B"


def write_figure(name: str, value: Any) -> str:
    """A metric's value in the digits that are worth reading."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "not finite" if value is None else str(value)
    if not math.isfinite(value):
        return "not finite"
    if name in _SHARES:
        return f"{value:.2%}"
    if name.endswith("_ms"):
        return f"{value:.2f}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"


def write_change(name: str, value: Any, before: Any) -> str:
    """The difference from the row before, with its sign; empty where either is missing."""
    if not (_is_finite(value) and _is_finite(before)):
        return ""
    difference = value - before
    text = write_figure(name, abs(difference))
    return "±0" if float(text.rstrip("%").replace(",", "")) == 0 else f"{'+' if difference > 0 else '−'}{text}"


def write_ratio_change(value: float, before: float) -> str:
    """The relative difference in per cent, with its sign."""
    if before == 0 or value == before:
        return "±0"
    return f"{value / before - 1:+.1%}".replace("-", "−")


def label(name: str) -> str:
    """A metric's name as a person reads it."""
    return _LABELS.get(name, name.replace("_", " "))


def metric_names(report: dict[str, Any]) -> list[str]:
    """Every metric that some pass has: quality first, times last."""
    names = list(dict.fromkeys(name for entry in report["passes"] for name in entry["metrics"]))
    return sorted(names, key=lambda name: name.endswith("_ms"))


def pass_rows(report: dict[str, Any]) -> list[PassRow]:
    """The table of passes; changes are from the row before, for metrics from the last row that was measured."""
    rows: list[PassRow] = []
    entries = report["passes"]
    measured: dict[str, Any] = {}
    for before, entry in zip([None, *entries], entries, strict=False):
        params = _size_cell("{:,}".format, entry["params"], before and before["params"])
        size = _size_cell(write_bytes, entry["size_bytes"], before and before["size_bytes"])
        metrics = {
            name: Cell(write_figure(name, value), write_change(name, value, measured.get(name)))
            for name, value in entry["metrics"].items()
        }
        share = entry["size_bytes"] / entries[0]["size_bytes"]
        seconds = f"{entry['elapsed_s']:,.1f}" if before else ""
        rows.append(
            PassRow(entry["kind"], entry["options"], params, size, share, metrics, seconds, entry.get("notes") or {})
        )
        measured |= entry["metrics"]
    return rows


def _size_cell(write: Callable[[int], str], value: int, before: int | None) -> Cell:
    return Cell(write(value), "" if before is None else write_ratio_change(value, before))


def speed_rows(entry: dict[str, Any]) -> list[SpeedRow]:
    """An export's file beside its baselines, all timed in one run; shares and speeds are of the float baseline."""
    base = entry.get("baseline")
    found = [(f"student ({entry['kind']})", entry)]
    found += [(name, entry[key]) for key, name in _BASELINES.items() if entry.get(key)]
    rows = []
    for name, own in found:
        latency = own["latency_ms"]
        share = f"{own['size_bytes'] / base['size_bytes']:.1%}" if base else ""
        speed = f"{_times_as_fast(own, base):.2f} ×" if base else ""
        times = (f"{latency['p50']:.2f}", f"{latency['p95']:.2f}")
        rows.append(SpeedRow(name, write_bytes(own["size_bytes"]), share, *times, speed))
    return rows


def shape_rows(entry: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """For each timed input shape, the p50 of the student and of each baseline, in the order of `speed_rows`."""
    latencies = [entry["latency_ms"], *(entry[key]["latency_ms"] for key in _BASELINES if entry.get(key))]
    shapes = [shape for shape, own in latencies[0].items() if isinstance(own, dict)]
    return [(shape, [f"{own[shape]['p50']:.2f}" if shape in own else "" for own in latencies]) for shape in shapes]


def further_facts(entry: dict[str, Any]) -> dict[str, Any]:
    """What an export says beyond its files, sizes and times: parity, operators, fidelity, also of its baselines."""
    told = ("kind", "files", "size_bytes", "latency_ms")
    facts = {key: value for key, value in entry.items() if key not in told and key not in _BASELINES}
    for key in _BASELINES:
        inner = {name: value for name, value in (entry.get(key) or {}).items() if name not in told}
        if inner:
            facts[key] = inner
    return facts


def loading(needed: str) -> str:
    """What loads a student, of what `student.loads_with` says."""
    return f"{needed} alone" if needed.startswith("transformers") else f"transformers after `import {needed}`"


def background(report: dict[str, Any]) -> list[str]:
    """Sentences on what loads the student, how far others serve it differently, how it learned, and from what text."""
    found: list[str] = []
    if report.get("loads_with"):
        found.append(f"The checkpoint loads with {loading(report['loads_with'])}.")
    for index, record in enumerate(report["passes"]):
        notes = record.get("notes") or {}
        if apart := notes.get("served_difference"):
            served = "transformers serves it with bitsandbytes' own kernels, which moved its answer by"
            found.append(f"compresskit.load gives the student that was measured; {served} {apart:.2%} in the run.")
        if "held_out_loss_before" in notes:
            found.append(_how_training_went(index, record))
    data = dict(report.get("data") or {})
    if data:
        origin = data.pop("origin")
        found.append(f"Text: {origin}; sequences: {', '.join(f'{part} {count}' for part, count in data.items())}.")
    return found


def _how_training_went(index: int, record: dict[str, Any]) -> str:
    """The held-out losses of a training and its best step, of the pass at `index` among those of the report."""
    notes, steps = record["notes"], record["options"]["steps"]
    before, after = (_write_loss(notes[f"held_out_loss_{when}"]) for when in ("before", "after"))
    told = f"Pass {index}, {record['kind']}, read {notes['tokens']:,} tokens ({notes['tokens_per_s']:,.0f} a second): "
    if not notes["best_step"]:
        return f"{told}no step had a lower held-out loss than {before}, so the student stayed as it was."
    told += f"its held-out loss went from {before} to {after}, best after step {notes['best_step']} of {steps}"
    if notes["elsewhere_before"] is not None:
        elsewhere = (_write_loss(notes[f"elsewhere_{when}"]) for when in ("before", "after"))
        told += f", on the other text from {' to '.join(elsewhere)}"
    return f"{told}."


def _write_loss(loss: Any) -> str:
    return f"{loss:.4g}" if _is_finite(loss) else "not finite"


def verdicts(report: dict[str, Any]) -> list[str]:
    """One sentence for each comparison of an export with a baseline; what is worse than a baseline comes first."""
    bad, good = [], []
    for entry in report["export"]:
        for key, name in _BASELINES.items():
            if entry.get(key):
                sentence, is_good = _compare(entry, entry[key], name)
                (good if is_good else bad).append(sentence)
    return bad + good


def _compare(entry: dict[str, Any], base: dict[str, Any], name: str) -> tuple[str, bool]:
    share = entry["size_bytes"] / base["size_bytes"]
    speed = _times_as_fast(entry, base)
    smaller, faster = share < 1, speed >= 1
    head = {
        (True, True): "Smaller and faster",
        (True, False): "Smaller but slower",
        (False, True): "Faster but larger",
        (False, False): "Larger and slower",
    }[smaller, faster]
    pace = f"{speed:.2f} times as fast" if faster else f"takes {1 / speed:.2f} times as long"
    tie = "and" if smaller == faster else "but"
    sentence = f"{head} than the {name}: the {entry['kind']} student has {share:.1%} of the bytes {tie} "
    sentence += f"is {pace}." if faster else f"{pace}."
    likeness, as_like = _compare_likeness(entry.get("fidelity"), base.get("fidelity"))
    return sentence + likeness, smaller and faster and as_like


def _compare_likeness(own: dict[str, Any] | None, other: dict[str, Any] | None) -> tuple[str, bool]:
    """How near each file's embeddings are to the original's, and whether the other's are no nearer."""
    if not own or "mean_cosine" not in own:
        return "", True
    ours = own["mean_cosine"]
    sentence = f" Its embeddings' mean cosine to the original's is {_four_digits(ours)}"
    if not other or "mean_cosine" not in other:
        return f"{sentence}.", _is_finite(ours)
    theirs = other["mean_cosine"]
    less = _is_finite(ours) and _is_finite(theirs) and round(ours, 4) < round(theirs, 4)
    sentence += f", {'less than ' if less else ''}that one's {_four_digits(theirs)}"
    return f"{sentence}.", _is_finite(ours) and not less


def _four_digits(figure: Any) -> str:
    return f"{figure:.4f}" if _is_finite(figure) else "not finite"


def _times_as_fast(own: dict[str, Any], other: dict[str, Any]) -> float:
    """How many times as fast one timed file is as another, at the longest shape of one text.

    Speeds are medians over rounds of paired times, relative to the float baseline, which has none of its own; where
    they are missing the medians are compared.
    """
    speeds = [entry.get("speed") for entry in (own, other)]
    if not any(speeds):
        return other["latency_ms"]["p50"] / own["latency_ms"]["p50"]
    ours, theirs = (speed[headline(speed)] if speed else 1.0 for speed in speeds)
    return ours / theirs


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
