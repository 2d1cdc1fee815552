"""Does the fused linear-KL run at the speed of its matrix products, and in how much memory?

    python tools/bench_linear_kl.py                    forward KL, fp32 and bf16, three shapes, on the CPU
    python tools/bench_linear_kl.py --device cuda      larger shapes, beside liger-kernel where it is installed

Methods run in turn, round by round, so that a slow minute hits all of them; a row gives the least and the median time
and its ratio to the floor's in the same rounds (the median of the ratios). The floor is the four bare products, each in
its fastest orientation, without a loss. Memory is measured in a process of its own for each method: the peak above what
is resident once the inputs stand. Prints one JSON object. Needs torch alone, and triton for --device cuda.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PACKAGE = Path(__file__).resolve().parent.parent / "compresskit"
if "compresskit" not in sys.modules:
    # The package itself imports transformers and more; its kernels need torch alone.
    sys.modules["compresskit"] = types.ModuleType("compresskit")
    sys.modules["compresskit"].__path__ = [str(PACKAGE)]

from compresskit.kernels.linear_kl import Divergence, Head, linear_kl  # noqa: E402

# tokens, student's width, teacher's width, vocabulary
CPU_SHAPES = [(2048, 384, 384, 30522), (512, 576, 576, 49152), (256, 640, 640, 262144)]
GPU_SHAPES = [(8192, 4096, 4096, 128256), (8192, 896, 3584, 151936)]
QUICK_SHAPES = [(256, 384, 384, 30522)]
Step = Callable[[], object]


class Inputs:
    """Random hidden states and heads of one shape; logits of a few units, as models have them."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
        tokens, student, teacher, vocabulary = shape
        draw = torch.Generator(device=device).manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*size, generator=draw, device=device).mul_(scale).to(dtype)

        self.hidden, self.head = normal(tokens, student), normal(vocabulary, student, scale=student**-0.5)
        self.teacher, self.teacher_head = normal(tokens, teacher), normal(vocabulary, teacher, scale=teacher**-0.5)
        self.weight = torch.full((tokens,), 1 / tokens, device=device)

    def leaves(self, *, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """Hidden states and head that require grad."""
        return self.hidden.detach().requires_grad_(), self.head.detach().requires_grad_(not frozen)


def floor(inputs: Inputs) -> Step:
    """The four products; of each the orientation that is fastest here."""
    size = (len(inputs.head), len(inputs.hidden))
    slab, other, weight_grad = (
        inputs.hidden.new_empty(shape) for shape in (size, size[::-1], tuple(inputs.head.shape))
    )
    slab.fill_(0.5)
    other.fill_(0.5)
    forward: dict[str, Step] = {
        "W·Xᵀ": lambda: torch.mm(inputs.head, inputs.hidden.T, out=slab),
        "X·Wᵀ": lambda: torch.mm(inputs.hidden, inputs.head.T, out=other),
    }
    teacher: dict[str, Step] = {
        "W·Xᵀ": lambda: torch.mm(inputs.teacher_head, inputs.teacher.T, out=slab),
        "X·Wᵀ": lambda: torch.mm(inputs.teacher, inputs.teacher_head.T, out=other),
    }
    to_hidden: dict[str, Step] = {
        "Wᵀ·Z": lambda: torch.mm(inputs.head.T, slab),
        "Zᵀ·W": lambda: torch.mm(other, inputs.head),
    }
    to_weight: dict[str, Step] = {
        "Z·X": lambda: torch.mm(slab, inputs.hidden, out=weight_grad),
        "Zᵀ·X": lambda: torch.mm(other.T, inputs.hidden, out=weight_grad),
    }
    chosen = [min(ways.values(), key=lambda way: min(seconds(way) for _ in range(3)))
              for ways in (forward, teacher, to_hidden, to_weight)]  # fmt: skip
    return lambda: [product() for product in chosen]


def plain_loss(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, weight: Tensor) -> Tensor:
    """Full logits and torch's own divergence, in float32 as trainers do it."""
    log_q = F.linear(hidden, head).float().log_softmax(-1)
    log_p = F.linear(teacher, teacher_head).float().log_softmax(-1)
    return (weight * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)).sum()


def plain(inputs: Inputs, loss: Callable[..., Tensor] = plain_loss) -> Step:
    """Forward and backward of `plain_loss`."""
    hidden, head = inputs.leaves()

    def step() -> None:
        hidden.grad = head.grad = None
        loss(hidden, head, inputs.teacher, inputs.teacher_head, inputs.weight).backward()

    return step


def fused(
    inputs: Inputs, *, kind: str = "forward_kl", frozen: bool = False, masked: float = 0.0, memory_mb: int = 1024
) -> Step:
    """Forward and backward of `linear_kl`."""
    hidden, head = inputs.leaves(frozen=frozen)
    weight = inputs.weight.clone()
    weight[torch.arange(len(weight), device=weight.device) % 100 < 100 * masked] = 0

    def step() -> None:
        hidden.grad = head.grad = None
        linear_kl(
            hidden,
            Head(head),
            inputs.teacher,
            Head(inputs.teacher_head),
            token_weight=weight,
            divergence=Divergence(kind),  # type: ignore[arg-type]
            memory_mb=memory_mb,
        ).backward()

    return step


def liger_jsd(inputs: Inputs) -> Step:
    """liger-kernel's fused_linear_jsd, β = 0.5."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD  # type: ignore[import-not-found]

    loss, (hidden, head) = LigerFusedLinearJSD(jsd_beta=0.5), inputs.leaves()

    def step() -> None:
        hidden.grad = head.grad = None
        loss(hidden, head, inputs.teacher, inputs.teacher_head).backward()

    return step


def liger_chunked(inputs: Inputs) -> Step:
    """liger-kernel's chunked distillation loss, JSD alone."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=True)
    hidden, head = inputs.leaves()
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)

    def step() -> None:
        hidden.grad = head.grad = None
        loss(hidden, head, inputs.teacher, inputs.teacher_head, labels).backward()

    return step


def methods(options: argparse.Namespace) -> dict[str, Callable[[Inputs], Step]]:
    """What is compared, by name."""
    budget = options.memory_mb
    found: dict[str, Callable[[Inputs], Step]] = {
        "floor": floor,
        "linear_kl": lambda inputs: fused(inputs, memory_mb=budget),
        "linear_kl, frozen head": lambda inputs: fused(inputs, frozen=True, memory_mb=budget),
        "linear_kl, half masked": lambda inputs: fused(inputs, masked=0.5, memory_mb=budget),
        "linear_kl, jsd": lambda inputs: fused(inputs, kind="jsd", memory_mb=budget),
        "plain": plain,
    }
    if options.compile:
        found["plain, torch.compile"] = lambda inputs: plain(inputs, torch.compile(plain_loss))
    if options.device == "cuda":
        found |= {"liger fused_linear_jsd": liger_jsd, "liger chunked jsd": liger_chunked}
    return {name: found[name] for name in options.methods or found}


def seconds(step: Step) -> float:
    """How long one call takes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_above_inputs(inputs: Inputs, method: Callable[[Inputs], Step]) -> int:
    """Bytes of the second call's peak above what was resident before the first; call it in a fresh process."""
    if inputs.hidden.device.type == "cuda":
        step, before = method(inputs), torch.cuda.memory_allocated()
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    small = Inputs((16, 16, 16, 32), inputs.hidden.dtype, "cpu")
    method(small)()  # libraries that load on their first use
    step, before = method(inputs), _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    step()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure_memory(name: str, shape: tuple[int, ...], dtype: str, options: argparse.Namespace) -> int:
    """`peak_above_inputs` of one method in a process of its own."""
    job = json.dumps([name, shape, dtype])
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, *sys.argv, "--worker", job]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return int(result.stdout)


def bench(shape: tuple[int, int, int, int], dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each method."""
    inputs, steps = Inputs(shape, getattr(torch, dtype), options.device), {}
    for name, method in methods(options).items():
        try:
            steps[name] = method(inputs)
            steps[name]()
        except (ImportError, torch.OutOfMemoryError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            steps.pop(name, None)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step))
    rows = []
    for name, taken in times.items():
        ratios = {
            f"times_{other}": statistics.median(a / b for a, b in zip(taken, times[other], strict=True))
            for other in ("floor", "plain", "linear_kl")
            if other in times and other != name
        }
        row = {
            "model": "random",
            "method": name,
            "options": {
                "tokens": shape[0],
                "student_width": shape[1],
                "teacher_width": shape[2],
                "vocabulary": shape[3],
            },
            "dtype": dtype,
            "seed": 0,
            "elapsed_s": min(taken),
            "median_s": statistics.median(taken),
            "slowest_s": max(taken),
            **ratios,
        }
        if name != "floor" and not options.no_memory:
            row["peak_rss_bytes"] = measure_memory(name, shape, dtype, options)
            row["weight_gradient_bytes"] = inputs.head.numel() * inputs.head.element_size()
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-mb", type=int, default=1024)
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--shapes", type=int, nargs="+", help="only these, by their numbers from 0")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the plain loss too")
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    parser.add_argument("--quick", action="store_true", help="one small shape, two rounds, float32")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, shape, dtype = json.loads(options.worker)
        inputs = Inputs(tuple(shape), getattr(torch, dtype), options.device)
        print(peak_above_inputs(inputs, methods(options)[name]))
        return
    shapes = GPU_SHAPES if options.device == "cuda" else CPU_SHAPES
    if options.quick:
        shapes, options.rounds, options.dtypes = QUICK_SHAPES, 2, ["float32"]
    shapes = [shapes[i] for i in options.shapes] if options.shapes else shapes
    rows = [row for shape in shapes for dtype in options.dtypes for row in bench(shape, dtype, options)]
    command = "python " + " ".join(["tools/bench_linear_kl.py", *sys.argv[1:]])
    environment = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
    }
    print(json.dumps({"command": command, "environment": environment, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
