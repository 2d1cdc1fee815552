"""Watching a block run: what its linears read and give, and the sums that their outputs are added into."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compresskit.errors import CompressKitError

_ADDITIONS = {torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__radd__}
_ADDITIONS.add(torch.Tensor.__iadd__)


class AllSeenError(Exception):
    """Ends a block's forward as soon as everything wanted from it is there."""


class Watch(TorchFunctionMode):
    """Records what named linears of a block read and give, and the sum that a stream writer's output is added into.

    Copies are kept: a block may go on to change its tensors in place.

    Args:
        linears: modules by name whose outputs are wanted.
        writers: those of them whose sum is wanted too.
        read: modules by name whose inputs are wanted.
        stop_early: leave the block once all is seen.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        writers: Collection[str] = (),
        *,
        read: Mapping[str, nn.Module],
        stop_early: bool,
    ) -> None:
        super().__init__()
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.streams: dict[str, Tensor] = {}
        self._linears, self._writers, self._read, self._stop_early = linears, writers, read, stop_early
        self._given: dict[str, Tensor] = {}

    def _was_given(self, name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.inputs[name] = args[0].clone()
        self._stop_if_complete()

    def _gave(self, name: str, _module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        self.outputs[name] = output.clone()
        if name in self._writers:
            self._given[name] = output
        self._stop_if_complete()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`; where it adds the watched output of a writer, keep the sum."""
        result = func(*args, **(kwargs or {}))
        if func in _ADDITIONS:
            for name in self._writers:
                if name in self._given and name not in self.streams and _one_is(self._given[name], args[:2]):
                    self.streams[name] = result.clone()
                    self._stop_if_complete()
        return result

    def _stop_if_complete(self) -> None:
        seen = len(self.inputs) + len(self.outputs) + len(self.streams)
        if self._stop_early and seen == len(self._read) + len(self._linears) + len(self._writers):
            raise AllSeenError

    def run(self, call: Callable[[], Tensor]) -> Tensor | None:
        """What the block gives, under watch; None where it was left early."""
        handles = [module.register_forward_hook(partial(self._gave, name)) for name, module in self._linears.items()]
        handles += [m.register_forward_pre_hook(partial(self._was_given, name)) for name, m in self._read.items()]
        try:
            with self:
                return call()
        except AllSeenError:
            return None
        finally:
            self._given.clear()
            for handle in handles:
                handle.remove()


def check_token_rows(name: str, given: Tensor, tokens: torch.Size) -> None:
    """Make sure that a layer reads or gives one row a token, in the order of the (batch, length) `tokens`.

    Raises:
        CompressKitError: it sees them transposed (Longformer), or only some of them.
    """
    if given.shape[:-1] not in (tokens, (tokens.numel(),)):
        raise CompressKitError(
            f"sees {tuple(given.shape)} where tokens are {tuple(tokens)}: which row is which token cannot be told",
            where=name,
            fix="leave it out of targets",
        )


def _one_is(output: Tensor, args: Sequence[Any]) -> bool:
    """Whether an argument is `output`, by address: dropout in eval mode may hand on an alias."""
    return any(isinstance(a, Tensor) and a.data_ptr() == output.data_ptr() for a in args)


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Each module computes `forward` for the time of the context."""
    own = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = forward
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            if before is None:
                vars(module).pop("forward", None)
            else:
                module.forward = before
