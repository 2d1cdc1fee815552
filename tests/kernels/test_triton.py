"""The Triton kernels: their numbers under the interpreter, bytes they move, and that they compile for GPUs."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'compresskit[gpu]'"
)

NUMBERS = """
import itertools, sys
from typing import get_args
import torch
from compresskit.kernels.divergence import Divergence, Kind
from compresskit.kernels.kl_div import divergence_loss
from compresskit.kernels.linear_kl import Head, linear_kl
torch.set_num_threads(1)
(kind,) = sys.argv[1:]

def value_and_grads(hidden, weight, bias, function):
    leaves = [one.detach().clone().requires_grad_() for one in (hidden, weight, bias)]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]

def as_dtype(dtype, *tensors):
    return [one.to(dtype) for one in tensors]

checked = 0
shapes = [(1, 4, 5, 2), (70, 8, 6, 131), (5, 16, 8, 300)]  # tokens, widths, vocabulary: no multiple of a block
for (T, HS, HT, V), dtype, rich in itertools.product(shapes, (torch.float32, torch.bfloat16), (False, True)):
    torch.manual_seed(T)
    scale = 5.0 if T == 5 else 1.0  # logits of ±80
    tensors = (scale * torch.randn(T, HS), torch.randn(V, HS), torch.randn(V), torch.randn(T, HT), torch.randn(V, HT))
    tensors = as_dtype(dtype, *tensors)
    weight = torch.rand(T)
    divergence = Divergence(kind, 0.3, 2.0 if rich else 1.0, "entropy" if T == 5 else "none")
    labels, label_weight = torch.randint(V, (T,)), torch.rand(T)
    if V > 100:
        tensors[2][20:22] = float("-inf")
        weight[0] = 0
        label_weight[0] = 0
        labels = labels.clamp_min(22)
    def at(dtype, impl):
        hidden, head, bias, teacher, teacher_head = as_dtype(dtype, *tensors)
        def run(hidden, head, bias):
            ours = Head(head, bias, scale=0.5, softcap=30.0) if rich else Head(head, bias)
            theirs = Head(teacher_head, bias.detach())
            if rich:
                theirs = Head(teacher_head, bias.detach(), scale=0.5, softcap=30.0)
            return linear_kl(hidden, ours, teacher, theirs, token_weight=weight, divergence=divergence, impl=impl,
                             **({"labels": labels, "label_weight": label_weight} if rich else {}))
        return value_and_grads(hidden, head, bias, run)
    truth, plain, kernel = at(torch.float64, "reference"), at(dtype, "reference"), at(dtype, "triton")
    sizes = (1.0, tensors[1].abs().max(), tensors[0].abs().max(), 1.0)  # loss; what gradients of logits are times
    for size, exact, torch_way, ours in zip(sizes, truth, plain, kernel, strict=True):
        floor = 1e-5 if dtype == torch.float32 else 2e-2
        floor *= 4 if T == 5 else 1  # float32 holds a logit of 80 to 4e-6, and each of four products rounds it
        # There a logit's gradient is what is left of terms as large as the weight, and a product carries that on.
        left = torch.finfo(torch.float32).eps * weight.max() * float(size) if T == 5 else 0.0
        exact = exact.double()
        error, theirs = ((exact - one.double()).abs().max() for one in (ours, torch_way))
        assert torch.isfinite(ours).all()
        assert error <= theirs + floor * exact.abs().max() + left, (T, dtype, rich, float(error), float(theirs))
    checked += 1

divergence, ones, eye = Divergence(kind), torch.ones(9), torch.eye(300)[:290]
student, teacher = (3 * torch.randn(9, 300) for _ in range(2))
def over_logits(impl, dtype):
    leaf = student.to(dtype, copy=True).requires_grad_()
    loss = divergence_loss(leaf, teacher.to(dtype)[:, :290], token_weight=ones, divergence=divergence, impl=impl)
    return [loss.detach(), *torch.autograd.grad(loss, leaf)]
for exact, ours in zip(over_logits("reference", torch.float64), over_logits("triton", torch.float32), strict=True):
    assert (exact - ours).abs().max() <= 1e-5 * exact.abs().max()
same = linear_kl(student, eye, student, eye, token_weight=ones, divergence=divergence, impl="triton")
assert same.abs() < 1e-5
print("checked", checked)
"""

PRECISION = """
from typing import get_args
import torch
from compresskit.kernels.divergence import Divergence, Kind
from compresskit.kernels.kl_div import divergence_loss
from compresskit.kernels.linear_kl import linear_kl
torch.set_num_threads(1)

def value_and_grad(student, teacher, dtype, impl, divergence):
    leaf, weight = student.to(dtype, copy=True).requires_grad_(), torch.ones(len(student), dtype=dtype)
    loss = divergence_loss(leaf, teacher.to(dtype), token_weight=weight, divergence=divergence, impl=impl)
    return loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double()

torch.manual_seed(1)
teacher = 4 * torch.randn(8, 3000)
student = teacher + 1e-3 * torch.randn(8, 3000) + 50  # an offset rounds nothing away
for kind in get_args(Kind):
    truth, ours = (
        value_and_grad(student, teacher, dtype, impl, Divergence(kind, 0.3))
        for dtype, impl in ((torch.float64, "reference"), (torch.float32, "triton"))
    )
    assert abs(ours[0] - truth[0]) <= 0.12 * truth[0], kind
    if kind != "total_variation":
        assert (ours[1] - truth[1]).norm() <= 5e-4 * truth[1].norm(), kind
for temperature in (0.3, 0.5, 0.88):
    for kind in get_args(Kind):
        divergence, far = Divergence(kind, 0.3, temperature, "entropy"), teacher[:, :1100] + 0.3 * torch.randn(8, 1100)
        exact, plain, ours = (
            value_and_grad(student[:, :1100], far, dtype, impl, divergence)
            for dtype, impl in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "triton"))
        )
        for truth, torch_way, one in zip(exact, plain, ours, strict=True):
            allowed = (truth - torch_way).abs().max() + 1e-5 * truth.abs().max()
            assert (truth - one).abs().max() <= allowed, (kind, temperature)
empty = divergence_loss(student, teacher, token_weight=torch.zeros(8), impl="triton")
assert empty == 0
teacher, hidden = torch.randn(3, 20), torch.randn(3, 20).requires_grad_()
teacher[1] = float("nan")
for kind in get_args(Kind):
    found = []
    for impl in ("reference", "triton"):
        loss = linear_kl(hidden, torch.eye(20), teacher, torch.eye(20), token_weight=torch.tensor([1.0, 0, 1]),
                         labels=torch.arange(3), label_weight=torch.ones(3), impl=impl,
                         divergence=Divergence(kind, 0.3, weight_rule="entropy"))
        found.append((loss.detach(), torch.autograd.grad(loss, hidden)[0]))
    torch.testing.assert_close(*found)
print("precise")
"""

BYTES = """
import sys
import numpy, torch, triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder
from compresskit.kernels.divergence import Divergence
from compresskit.kernels.linear_kl import linear_kl
T, V, H = 128, 2048, 8
moved = {"kernels": 0, "products": 0}
load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

def counting_load(self, pointers, mask, *rest):
    moved["kernels"] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
    return load(self, pointers, mask, *rest)

def counting_store(self, pointers, value, mask, *rest):
    moved["kernels"] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
    return store(self, pointers, value, mask, *rest)

InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counting_load, counting_store

class Products(TorchDispatchMode):
    # every operation of torch on something of a slab's size counts what it reads and writes
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        out = (kwargs or {}).get("out")
        if function.is_view or "empty" in str(function) or "set_" in str(function):
            return result
        for one in {id(t): t for t in (*args, out, result) if torch.is_tensor(t)}.values():
            if one.numel() >= T * V and one.dtype != torch.uint8:  # the interpreter copies storages as bytes
                moved["products"] += one.numel() * one.element_size()
        return result

hidden, head, teacher, teacher_head = (torch.randn(n, H).bfloat16() for n in (T, V, T, V))
hidden.requires_grad_(), head.requires_grad_()
from compresskit.kernels.linear_kl import op
with Products():
    op._linear_kl._init_fn(hidden.detach(), head.detach(), None, teacher, teacher_head, None, None, torch.ones(T), None,
                           None, [0, 0], [1.0, 0.0, 1.0, 0.0], sys.argv[1], "none", [0.5, 1.0], V, "triton", 64,
                           [True, True, False])
print("bytes per logit", (moved["kernels"] + moved["products"]) / (T * V), moved)
"""

COMPILE = """
import subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from compresskit.kernels import slab_triton as ours
capability, cubin = sys.argv[1:]
cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
floats = dict.fromkeys("inverse_tau s_scale s_softcap t_scale t_softcap mix tie".split(), "fp32")
ints = dict.fromkeys("vocabulary tokens span parts s_stride_v t_stride_v s_stride_c t_stride_c".split(), "i32")
outs = dict.fromkeys(("out", "token"), "*fp32")

def compile(kernel, logits, **flags):
    slabs = dict.fromkeys("student teacher student_bias teacher_bias".split(), "*" + logits)
    given = {**slabs, **outs, "labels": "*i64", **floats, **ints}
    layout = flags.pop("layout")  # the stride that is 1: of tokens in the slabs of linear_kl, of entries in kl_div's
    strides = {"s_stride_" + layout: 1, "t_stride_" + layout: 1}
    constants = {"BLOCK_V": ours.BLOCK_V, "BLOCK_C": ours.BLOCK_C, **strides, **flags}
    signature = {name: "constexpr" if name in constants else given[name] for name in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    attrs = {(i,): aligned for i, name in enumerate(kernel.arg_names)
             if (name in ("s_stride_v", "t_stride_v", "tokens") and name not in strides)
             or signature[name].startswith("*")}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    made = triton.compile(source, target=GPUTarget("cuda", int(capability), 32), options={"num_warps": ours.NUM_WARPS})
    assert f".target sm_{capability}" in made.asm["ptx"]
    Path(cubin).write_bytes(made.asm["cubin"])
    usage = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    line = next(line for line in usage.stdout.splitlines() if "REG:" in line)
    found = dict(item.split(":")[:2] for item in line.split() if ":" in item)
    assert int(found["STACK"]) == int(found["LOCAL"]) == 0, (kernel.__name__, flags, line)
    return int(found["REG"])

plain = dict(S_BIAS=False, S_CAPPED=False, T_BIAS=False, T_CAPPED=False, AT_ONE=False)
rich = dict.fromkeys(plain, True)
registers = []
for logits, layout in (("bf16", "c"), ("fp32", "c"), ("bf16", "v"), ("fp32", "v")):
    given = {"logits": logits, "layout": layout}
    registers.append(compile(ours.statistics_kernel, **given, **plain, REVERSE=False, ENTROPY=False))
    registers.append(compile(ours.statistics_kernel, **given, **rich, REVERSE=True, ENTROPY=True))
    for kind in range(6):
        flags = plain if layout == "v" else rich  # kl_div has no readout and no labels
        registers.append(compile(ours.terms_kernel, **given, **flags, KIND=kind, WRITES=True))
    registers.append(compile(ours.terms_kernel, **given, **plain, KIND=2, WRITES=False))
print("compiled", len(registers), "registers at most", max(registers))
"""


def run(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "kind", ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"]
)
def test_the_kernels_are_as_near_to_float64_as_plain_torch(kind):
    assert "checked 12" in run(NUMBERS, kind, TRITON_INTERPRET="1")


def test_the_kernels_lose_nothing_near_the_teacher_under_offsets_or_below_temperature_one():
    assert "precise" in run(PRECISION, TRITON_INTERPRET="1")


@pytest.mark.parametrize(
    ("kind", "most"), [("forward_kl", 18), ("reverse_kl", 18), ("jsd", 22), ("total_variation", 22)]
)
def test_bytes_moved_for_each_logit(kind, most):
    """In bfloat16, kernels and products; the sums of each token and part add little at this vocabulary."""
    said = run(BYTES, kind, TRITON_INTERPRET="1")
    counted = float(said.split()[3])
    assert most - 0.1 < counted < most + 0.1, said


@pytest.mark.parametrize("capability", ["80", "90"])
def test_the_kernels_compile_ahead_of_time_without_spilling(capability, tmp_path):
    said = run(COMPILE, capability, str(tmp_path / "kernel.cubin"), TRITON_CACHE_DIR=str(tmp_path))
    assert "compiled 36" in said
