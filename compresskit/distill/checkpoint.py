"""The state of a training that is under way, in a folder of its own: whole or not there, safetensors and JSON.

    state.safetensors   weights that learn, AdamW's moments, the best weights, random state, what the teacher remembers
    state.json          step, losses, counts, and the version of this layout

The order of the text is not stored: it follows from the generator, and is drawn again up to the step.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compresskit.cache import writing_to_cache
from compresskit.errors import CompressKitError
from compresskit.whole import whole_folder

log = logging.getLogger(__name__)

_LAYOUT = 2


def save_state(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Put the state in place of the one that `folder` holds.

    Raises:
        RunFailedError: the disk is full or refuses; the state that was there stays.
    """
    with writing_to_cache(folder), whole_folder(folder) as scratch:
        cpu = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        save_file(cpu, scratch / "state.safetensors")
        (scratch / "state.json").write_text(json.dumps({"layout": _LAYOUT, **facts}), encoding="utf-8")


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The state in `folder`; None where there is none.

    Raises:
        CompressKitError: files that are damaged, or of another layout.
    """
    if not folder.is_dir():
        return None
    try:
        facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if facts.pop("layout") != _LAYOUT:
            raise ValueError(f"not of layout {_LAYOUT}")
        return load_file(folder / "state.safetensors"), facts
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        what = f"the training under way cannot be read ({error})"
        raise CompressKitError(what, where=str(folder), fix=f"delete {folder}: training then starts anew") from error


def forget_state(folder: Path) -> None:
    """Training is over: remove what it left."""
    shutil.rmtree(folder, ignore_errors=True)


def forget_old_states(home: Path, *, besides: Path, days: float = 14) -> None:
    """Remove the states in `home` that nobody came back for: last written more than `days` ago, all but `besides`.

    What a killed process left half-written goes with them.
    """
    if not home.is_dir():
        return
    oldest = time.time() - days * 24 * 3600
    for folder in home.iterdir():
        try:
            is_old = folder != besides and folder.is_dir() and _written(folder) < oldest
        except FileNotFoundError:  # another run has just ended
            continue
        if is_old:
            log.info("distill: a training that was never resumed is forgotten: %s", folder)
            forget_state(folder)


def _written(folder: Path) -> float:
    """When its newest file was written; of an empty one when it was made."""
    return max((path.stat().st_mtime for path in folder.iterdir()), default=folder.stat().st_mtime)


def prefixed(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under `name`."""
    return {f"{name}|{key}": value for key, value in tensors.items()}


def under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was put under `name`."""
    start = f"{name}|"
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}


def optimizer_tensors(optimizer: torch.optim.Optimizer, learned: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Each parameter's state, by its name."""
    found: dict[str, Tensor] = {}
    for name, value in learned.items():
        found |= prefixed(name, optimizer.state.get(value, {}))
    return found


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    learned: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    place: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Put each parameter's state back; `place` gives what is held of a tensor that belongs to a parameter."""
    for name, value in learned.items():
        state = under(name, tensors)
        if state:
            optimizer.state[value] = {key: place(one, value) for key, one in state.items()}  # step too: it is fused


def random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's global random state, of the device too."""
    states = {"cpu": torch.get_rng_state()}
    return states if device.type != "cuda" else states | {"cuda": torch.cuda.get_rng_state(device)}


def restore_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put it back."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
