"""Trackers of experiments (TensorBoard and others) through accelerate: each loss part and tokens/s, step by step."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from compresskit.config import did_you_mean
from compresskit.errors import CompressKitError


def require_tracker(name: str) -> None:
    """Refuse a tracker that accelerate does not know, or whose package cannot be imported (it would leave it out).

    Raises:
        CompressKitError: either.
    """
    if name not in LOGGER_TYPE_TO_CLASS:
        near = did_you_mean(name, LOGGER_TYPE_TO_CLASS)
        fix = f"did you mean {near!r}?" if near else f"use one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
        raise CompressKitError(f"unknown tracker {name!r}", where="tracker", fix=fix)
    if name not in map(str, get_available_trackers()):
        what = f"the package of tracker {name!r} cannot be imported"
        raise CompressKitError(what, where="tracker", fix=f"pip install {name.replace('_', '-')}, or leave tracker out")


@contextmanager
def tracked(name: str | None, folder: str) -> Iterator[Accelerator]:
    """An accelerator that tells tracker `name` what it logs; trackers that write files put them in `folder`."""
    if name is None:
        yield Accelerator()
        return
    require_tracker(name)
    accelerator = Accelerator(log_with=name, project_dir=folder)
    accelerator.init_trackers("distill")
    try:
        yield accelerator
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
