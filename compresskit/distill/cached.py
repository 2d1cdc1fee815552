"""A teacher on the disk: what it says of each training sequence, so that students learn without running it again.

    hidden   the states that reach its head, float32, and the head once: 4 · H bytes a token, the divergence is exact
    top_k    its k largest logits below the largest, float16, their ids, and the log-sum of all at each temperature:
             6 · k + 4 · temperatures bytes a token; the rest of the vocabulary is one bucket, so that the divergence
             is at most the exact one
    Both keep sentence embeddings (4 · H bytes a sequence) where a loss reads these.

    FOLDER/teacher.json      what it was made from, and of: refused for another teacher, text, tokenizer or length
    FOLDER/*.npy             one row a token (a sequence), in the order of the training part
    FOLDER/head.safetensors  of `hidden`

The whole training part is run through the teacher once: worth it where sequences are seen more than once, or by several
students. Losses on inner layers are too large to keep; they need the live teacher.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compresskit.cache import writing_to_cache
from compresskit.data import Batch, Sequences
from compresskit.distill.batching import Numbered, by_length
from compresskit.distill.losses import logits_of
from compresskit.distill.outputs import Outputs, Projection, Wanted
from compresskit.distill.teachers import Teacher
from compresskit.errors import CompressKitError
from compresskit.kernels.buckets import TopK
from compresskit.kernels.linear_kl import Head
from compresskit.progress import track
from compresskit.whole import whole_folder

# T tokens of the training part, N sequences, H hidden size, K entries, V vocabulary

Keep = Literal["hidden", "top_k"]
_META = "teacher.json"


@dataclass(frozen=True)
class CacheIdentity:
    """What a cache is of; two of them serve each other's students only where all of it is the same.

    Attributes:
        teacher: fingerprint of the teacher's weights and config.
        text: fingerprint of the training text, its tokenizer and its order.
        max_length: tokens of a sequence that are used.
        keep, k, temperatures: see the module; the last two are read by `top_k` alone.
        needs: the outputs that are kept, of `predictions` and `sentence`.
        vocabulary: tokens to which the teacher's head is cut; None where it is whole.
    """

    teacher: str
    text: str
    max_length: int | None
    keep: Keep
    k: int
    temperatures: tuple[float, ...]
    needs: tuple[str, ...]
    vocabulary: int | None = None

    def facts(self) -> dict[str, Any]:
        """As JSON says it."""
        shared: dict[str, Any] = {"teacher": self.teacher, "text and tokenizer": self.text}
        shared |= {"max_length": self.max_length, "keep": self.keep, "needs": list(self.needs)}
        shared |= {"vocabulary": self.vocabulary}
        if self.keep == "top_k":
            shared |= {"k": self.k, "temperatures": list(self.temperatures)}
        return shared

    @property
    def key(self) -> str:
        """A name for it."""
        return hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()[:32]


def write_cache(
    folder: Path,
    identity: CacheIdentity,
    teacher: Teacher,
    training: Sequences,
    *,
    batch_size: int,
    device: torch.device,
) -> None:
    """Run the teacher over all of `training` and put what it says at `folder`, whole or not at all.

    Raises:
        CompressKitError: a model that does not show what reaches its head. RunFailedError: a full disk.
    """
    lengths = [len(row[: identity.max_length]) for row in training.rows]
    batches = by_length(training, range(len(training)), batch_size, max_length=identity.max_length)
    with writing_to_cache(folder), whole_folder(folder) as scratch:
        writer = _Writer(scratch, identity, lengths)
        for numbered in track(batches, "caching the teacher"):
            batch = {name: values.to(device) for name, values in numbered.batch.items()}
            writer.add(numbered, teacher(batch, numbered.rows, frozenset(identity.needs)))  # type: ignore[arg-type]
        writer.close()


class _Writer:
    """The arrays of a cache that is being made, one row a token or a sequence."""

    def __init__(self, folder: Path, identity: CacheIdentity, lengths: Sequence[int]) -> None:
        self.folder, self.identity = folder, identity
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.arrays: dict[str, np.memmap] = {}

    def add(self, numbered: Numbered, told: Outputs) -> None:
        """What the teacher said of one batch."""
        real = numbered.batch["attention_mask"].sum(1).tolist()
        for name, values in self._parts(told).items():
            for i, (row, length) in enumerate(zip(numbered.rows, real, strict=True)):
                first = int(self.starts[row])
                self._array(name, values)[first : first + length] = values[i, :length].cpu().numpy()
        if told.sentence is not None:
            sentences = self._array("sentence", told.sentence[:, None])
            sentences[numbered.rows] = told.sentence.cpu().numpy()

    def close(self) -> None:
        """Flush, and say what it is."""
        size = sum(array.nbytes for array in self.arrays.values())
        for array in self.arrays.values():
            array.flush()
        facts = {**self.identity.facts(), "sequences": len(self.starts) - 1, "tokens": int(self.starts[-1])}
        facts["bytes_per_token"] = size / facts["tokens"]
        (self.folder / _META).write_text(json.dumps(facts, indent=1), encoding="utf-8")

    def _parts(self, told: Outputs) -> dict[str, Tensor]:
        """Arrays (B, L, …) of the predictions."""
        if told.predictions is None:
            return {}
        if self.identity.keep == "top_k":
            return self._top_k(told)
        if not isinstance(told.predictions, Projection) or not isinstance(told.predictions.head.weight, Tensor):
            what = "the teacher does not show what reaches its head, so the states behind its logits cannot be kept"
            raise CompressKitError(what, where="cache.keep", fix="use keep: top_k, or leave cache out")
        if not (self.folder / "head.safetensors").exists():
            _save_head(self.folder, told.predictions.head)
        return {"hidden": told.predictions.hidden.float()}

    def _top_k(self, told: Outputs) -> dict[str, Tensor]:
        assert told.predictions is not None
        assert not isinstance(told.predictions, TopK)
        mask = told.predictions.hidden if isinstance(told.predictions, Projection) else told.predictions
        if mask.ndim != 3:
            what = "the teacher predicts one thing for a whole sequence, of which there is no top k to keep"
            raise CompressKitError(what, where="cache.keep", fix="leave cache out")
        logits = logits_of(told.predictions).float().view(*mask.shape[:2], -1)
        if self.identity.k >= logits.shape[-1]:
            what = f"{self.identity.k} entries of a vocabulary of {logits.shape[-1]}"
            raise CompressKitError(what, where="cache.k", fix="use fewer, or keep: hidden")
        values, indices = logits.topk(self.identity.k)
        below = logits - values[..., :1]
        sums = torch.stack([(below / t).logsumexp(-1) for t in self.identity.temperatures], -1)
        return {"values": (values - values[..., :1]).half(), "indices": indices.int(), "sums": sums}

    def _array(self, name: str, like: Tensor) -> np.memmap:
        if name not in self.arrays:
            rows = len(self.starts) - 1 if name == "sentence" else int(self.starts[-1])
            dtype = torch.empty(0, dtype=like.dtype).numpy().dtype
            path = self.folder / f"{name}.npy"
            self.arrays[name] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(rows, like.shape[-1]))
            with path.open("r+b") as file:  # a mapped page that finds no room kills the process
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return self.arrays[name]


def _save_head(folder: Path, head: Head) -> None:
    tensors = {name: value for name, value in vars(head).items() if isinstance(value, Tensor)}
    tensors = {name: value.detach().float().cpu().contiguous().clone() for name, value in tensors.items()}
    said = {"scale": repr(head.scale), "softcap": repr(head.softcap or 0.0)}
    save_file(tensors, folder / "head.safetensors", metadata=said)
    (folder / "head.json").write_text(json.dumps(said), encoding="utf-8")


def _load_head(folder: Path, device: torch.device) -> Head:
    tensors = {name: value.to(device) for name, value in load_file(folder / "head.safetensors").items()}
    said = json.loads((folder / "head.json").read_text(encoding="utf-8"))
    return Head(scale=float(said["scale"]), softcap=float(said["softcap"]) or None, **tensors)


class CachedTeacher(Teacher):
    """Gives what a cache holds; the model that it was made from is not needed.

    Args:
        folder: of `write_cache`.
        identity: what the student needs.
        training: the training part, for its lengths.
        device: where outputs are wanted.
        temperature: of the divergence, one of `identity.temperatures`.
        live: is asked about sequences of other text; without it these are refused.

    Raises:
        CompressKitError: no cache, a damaged one, or one of another teacher, text, tokenizer or length.
    """

    def __init__(
        self,
        folder: Path,
        identity: CacheIdentity,
        training: Sequences,
        *,
        device: torch.device,
        temperature: float = 1.0,
        live: Teacher | None = None,
    ) -> None:
        self.facts = _read_facts(folder)
        _refuse_foreign(folder, self.facts, identity)
        lengths = [len(row[: identity.max_length]) for row in training.rows]
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.identity, self.device, self.temperature, self.live = identity, device, temperature, live
        try:
            self.arrays: Mapping[str, np.ndarray] = {
                path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")
            }
            whole = "predictions" in identity.needs and identity.keep == "hidden"
            self.head = _load_head(folder, device) if whole else None
        except (OSError, ValueError) as error:
            raise _damaged(folder, str(error)) from error
        wrong = [name for name, array in self.arrays.items() if len(array) != self._rows(name)]
        if wrong or not self.arrays:
            raise _damaged(folder, f"{wrong[0]}.npy has another length" if wrong else "it is empty")

    def __call__(self, batch: Batch, rows: list[int], needs: frozenset[Wanted]) -> Outputs:
        """What the cache says of these sequences."""
        if min(rows) < 0:
            if self.live is None:
                what = "the cache holds the training text alone"
                raise CompressKitError(what, where="cache", fix="leave other_text out, or use the live teacher")
            return self.live(batch, rows, needs)
        missing = sorted(str(one) for one in needs if one not in self.identity.needs)
        if missing:
            raise ValueError(f"{missing[0]} is not in the cache")
        found = Outputs()
        if "predictions" in needs:
            found = Outputs(predictions=self._predictions(batch, rows))
        if "sentence" not in needs:
            return found
        sentence = torch.from_numpy(self.arrays["sentence"][rows]).to(self.device)
        return Outputs(predictions=found.predictions, sentence=sentence)

    def _rows(self, name: str) -> int:
        return len(self.starts) - 1 if name == "sentence" else int(self.starts[-1])

    def _predictions(self, batch: Batch, rows: Sequence[int]) -> Projection | TopK:
        if self.head is not None:
            return Projection(self._padded("hidden", batch, rows), self.head)
        sums = self._padded("sums", batch, rows)[..., self.identity.temperatures.index(self.temperature)]
        values = self._padded("values", batch, rows).float() / self.temperature
        indices = self._padded("indices", batch, rows).long()
        return TopK((values - sums[..., None]).flatten(0, 1), indices.flatten(0, 1))

    def _padded(self, name: str, batch: Batch, rows: Sequence[int]) -> Tensor:
        """The tokens' rows of an array, (B, L, …), zeros at padding."""
        array = self.arrays[name]
        padded = np.zeros((*batch["input_ids"].shape, array.shape[-1]), dtype=array.dtype)
        for i, row in enumerate(rows):
            first, last = int(self.starts[row]), int(self.starts[row + 1])
            padded[i, : last - first] = array[first:last]
        return torch.from_numpy(padded).to(self.device)


def _read_facts(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _META).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CompressKitError(f"no teacher is cached in {folder}", where="cache", fix="make it first") from error
    except (OSError, ValueError) as error:
        raise _damaged(folder, str(error)) from error


def _damaged(folder: Path, reason: str) -> CompressKitError:
    what = f"the cached teacher in {folder} cannot be read: {reason}"
    return CompressKitError(what, where="cache", fix=f"delete {folder}: it is then made anew")


def _refuse_foreign(folder: Path, facts: Mapping[str, Any], identity: CacheIdentity) -> None:
    wanted = identity.facts()
    other = [name for name in wanted if facts.get(name) != wanted[name]]
    if other:
        told = ", ".join(f"{name} ({str(facts.get(name))[:16]} there, {str(wanted[name])[:16]} here)" for name in other)
        what = f"the cache in {folder} is of another {told}"
        raise CompressKitError(what, where="cache", fix="name another folder, or leave path out")
