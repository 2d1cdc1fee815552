"""A student spread over the processes that train it (FSDP2, `accelerate launch --use_fsdp --fsdp_version 2`).

    replicated   each process: weights, gradients, AdamW's two moments, the best weights so far      5 × all
    sharded      each process: its rows of each of them, and what its pass needs whole just now      5 × all / processes

What learns and what rests is sharded alike, by rows. A block is a unit: its weights are gathered when it runs, forward
and backward, and given back. All else (tables, last norm, head, bridges, blocks that share weights with something else)
is one more unit, gathered for the whole of a pass: losses read the head's weight without running the head, and a tied
table is both. So a pass of losses too runs inside the unit: `Sharded.run`. Losses that read inside of blocks
(`relation`, `attention`, `hidden` with modules) leave the blocks gathered until their backward pass: of a block whose
output no loss reads, nothing else tells when that begins.

Gradients are summed, not averaged: the losses are normalised over the whole step. Each of its backward passes sums its
own, so that whole ones are never kept. The step is that of one process with the whole batch, but for the order of sums.

A copy is sharded; the student itself waits in the memory of the host, and takes the best weights at the end. So it is
never anything but an ordinary model, at the price of one whole student in host memory for each process. Writing a state
gathers it in the host memory of the main one. The teacher is whole in every process, an average of the student too, for
which all is gathered after each step. `precision: bfloat16` keeps autocast's copies of the weights until they were used
backwards; `recompute` frees them.

Source: PyTorch FSDP (arXiv:2304.11277), torch.distributed.fsdp.fully_shard.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from compresskit.distill.batching import Numbered
from compresskit.distill.heads import find_head
from compresskit.distill.outputs import observe
from compresskit.distill.processes import Processes
from compresskit.errors import CompressKitError, RunFailedError
from compresskit.surgery.sites import find_blocks


def processes_of(accelerator: Accelerator) -> Processes:
    """The processes as accelerate was asked for them: sharded under FSDP2, else each with the whole student.

    On CPUs accelerate reads what `--use_fsdp` asks for and goes on without it (`AcceleratorState` turns GPUs alone into
    FSDP); here it is done there too.

    Raises:
        CompressKitError: FSDP1, or a setting of FSDP that is not followed here.
    """
    kind, plugin = accelerator.distributed_type, None
    if kind == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
    elif kind == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        plugin = FullyShardedDataParallelPlugin()
    if plugin is None:
        return Processes(accelerator)
    _check(accelerator, plugin)
    return Sharded(accelerator, reshard=bool(plugin.reshard_after_forward))


def _check(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    dimensions = accelerator.parallelism_config
    apart = dimensions is not None and dimensions.active_mesh_dims not in ([], ["dp_shard"])
    low = accelerator.mixed_precision != "no" or plugin.mixed_precision_policy is not None
    refused = [
        (plugin.fsdp_version != 2, "of version 1", "use --fsdp_version 2"),
        (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "with weights on the host", "leave fsdp_offload_params out"),
        (bool(plugin.activation_checkpointing), "with checkpoints of its own", "use recompute: true of the training"),
        (low, "with mixed precision", "use precision: bfloat16 of the training"),
        (bool(plugin.ignored_modules), "with ignored modules", "leave fsdp_ignored_modules out"),
        (apart, "beside other dimensions of processes", "leave out all but dp_shard"),
        (
            bool(plugin.cpu_ram_efficient_loading),
            "with weights loaded in the first process alone, while each needs its teacher",
            "use --fsdp_cpu_ram_efficient_loading false",
        ),
    ]
    for wrong, how, fix in refused:
        if wrong:
            raise CompressKitError(f"training cannot use FSDP {how}", where="accelerate", fix=fix)


class _Unit(nn.Module):
    """The root: the student and the bridges, run by whatever runs in its forward pass."""

    def __init__(self, student: PreTrainedModel, bridges: Sequence[nn.Module]) -> None:
        super().__init__()
        self.student, self.bridges = student, nn.ModuleList(bridges)

    def forward(self, parts: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `parts` gives."""
        return parts()


class _Whole(Mapping[str, Tensor]):
    """Tensors that are gathered one by one as they are read, in all processes in the same order."""

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        self.held = held

    def __getitem__(self, name: str) -> Tensor:
        return _full(self.held[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def _units(root: nn.Module) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def _full(value: Tensor) -> Tensor:
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


class Sharded(Processes):
    """Each holds its rows of the student.

    Args:
        accelerator: of the processes, on whose device the pass runs.
        reshard: whether a block's weights are given back between its forward and its backward pass.
    """

    def __init__(self, accelerator: Accelerator, *, reshard: bool = True) -> None:
        super().__init__(accelerator)
        self.reshard = reshard
        self.mesh = init_device_mesh(accelerator.device.type, (self.count,))
        self.root: _Unit | None = None
        self.shards: dict[str, nn.Parameter] = {}

    @contextmanager
    def holding(self, student: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """A copy to be sharded; `student` takes its weights at the end, and where all processes fail together.

        Where one process fails alone nothing can be gathered any more, and `student` stays as it was.
        """
        student.to(torch.device("cpu"))  # type: ignore[arg-type]
        try:
            yield copy.deepcopy(student)
            self._bring_back(student)
        except RunFailedError:
            self._bring_back(student)
            raise
        finally:
            student.to(self.accelerator.device).eval().requires_grad_(False).zero_grad(set_to_none=True)
            self.root, self.shards = None, {}

    @torch.no_grad()
    def _bring_back(self, student: PreTrainedModel) -> None:
        own = dict(student.named_parameters())
        for name, value in self.shards.items():
            if name in own:
                own[name].copy_(_full(value))
        if self.root is not None:
            kept = dict(self.root.student.named_buffers())  # what BatchNorm, say, counted
            for name, value in student.named_buffers():
                value.copy_(kept[name])

    def share(
        self,
        student: PreTrainedModel,
        bridges: Sequence[nn.Module],
        learned: Mapping[str, nn.Parameter],
        *,
        reads_inside: bool,
    ) -> dict[str, nn.Parameter]:
        """Shard the student and the bridges, and return this process's rows of what learns.

        Raises:
            CompressKitError: weights that learn and are single numbers, or of several types.
        """
        _check_learned(learned)
        find_head(student)  # tried once, on the whole model
        root = _Unit(student, bridges)
        names = {id(value): name for name, value in root.named_parameters()}
        whole = self._left_whole(root)
        for block in _own_blocks(student):
            fully_shard(
                block, mesh=self.mesh, reshard_after_forward=self.reshard and not reads_inside, ignored_params=whole
            )
        fully_shard(root, mesh=self.mesh, reshard_after_forward=False, ignored_params=whole)
        for unit in _units(root):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_reduce_scatter_unused_params(True, recurse=False)  # by one process alone: experts
        self.root = root
        with torch.no_grad():
            self.run(list)  # types of gradients are settled in the first pass, while all that ever learns does
        held = dict(root.named_parameters())
        self.shards = {name: held[names[id(value)]] for name, value in learned.items()}
        for value in learned.values():
            value.data = value.data.new_empty(0)  # the caller's name for it would keep the whole
        return self.shards

    def _left_whole(self, root: nn.Module) -> set[nn.Parameter]:
        """Parameters that have no rows (single numbers) or cannot learn (integers), on the device."""
        whole = {value for value in root.parameters() if value.ndim == 0 or not value.is_floating_point()}
        for value in root.parameters():
            value.data = value.data.to(self.accelerator.device) if value in whole else value.data.contiguous()
        return whole

    def run(self, parts: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `parts` gives, inside the unit that holds what all passes need; each process has to run as many."""
        assert self.root is not None
        given = self.root(parts)
        if not torch.is_grad_enabled():  # no backward pass will
            for unit in _units(self.root):
                unit.reshard()
        return given

    def keep_pace(self, batches: Sequence[Numbered]) -> None:
        """One more pass where others have one more batch: they wait for these rows."""
        over = len(batches) % self.count
        if not over or self.index < over:
            return
        assert self.root is not None
        student, device = self.root.student, self.accelerator.device
        batch = {name: values.to(device) for name, values in batches[0].batch.items()}

        def pass_by() -> list[Tensor]:
            observe(student, batch, frozenset())
            return []

        self.run(pass_by)

    def add_up_gradients(self, learned: Mapping[str, nn.Parameter]) -> None:
        """Nothing: each backward pass has; of weights that no loss reaches too, whose 0 weight decay goes with."""
        return

    def shorten_gradients(self, learned: Mapping[str, nn.Parameter], norm: float) -> float:
        """Shorten the gradient to `norm` where it is longer; returns how long it was, over all processes."""
        return float(_full(torch.nn.utils.clip_grad_norm_(list(learned.values()), norm)))

    def whole(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Each weight, gathered when it is read: every process has to read the same ones."""
        return _Whole(weights)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each tensor in the main process's host memory, nothing in the others; one at a time is on the device."""
        found: dict[str, Tensor] = {}
        for name, value in tensors.items():
            whole = _full(value)
            if self.accelerator.is_main_process:
                found[name] = whole.cpu()
        return found

    def place(self, whole: Tensor, like: Tensor) -> Tensor:
        """This process's rows of a tensor in the shape of `like`; others (a count of steps) stay whole."""
        whole = whole.to(like.device)
        if not isinstance(like, DTensor) or whole.shape != like.shape:
            return whole
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)

    def join_in_writing(self, due: bool) -> bool:
        """Whether the main process finds that a state is due: then all have to gather it."""
        told = torch.tensor(float(due and self.accelerator.is_main_process))
        return bool(self.add_up(told))


def _check_learned(learned: Mapping[str, nn.Parameter]) -> None:
    single = next((name for name, value in learned.items() if value.ndim == 0), None)
    if single is not None:
        what = f"{single} is a single number, which cannot be sharded"
        raise CompressKitError(what, where="freeze", fix=f"freeze {single!r}, or train without FSDP")
    types = sorted({str(value.dtype).removeprefix("torch.") for value in learned.values()})
    if len(types) > 1:
        what = f"weights that learn are of several types ({', '.join(types)}), and gradients are summed in one"
        raise CompressKitError(what, where="student", fix="convert the student with .float(), or freeze the others")


def _own_blocks(student: PreTrainedModel) -> list[nn.Module]:
    """The blocks with weights that nothing else shares, each once."""
    names = find_blocks(student)
    users: dict[nn.Parameter, set[str]] = {}
    for path, value in student.named_parameters(remove_duplicate=False):
        user = next((name for name in names if path.startswith(f"{name}.")), "")
        users.setdefault(value, set()).add(user)
    blocks = {name: student.get_submodule(name) for name in names}
    return [
        block
        for name, block in blocks.items()
        if not isinstance(block, nn.ModuleList) and all(users[value] == {name} for value in block.parameters())
    ]
