"""The Triton kernel: its numbers under the interpreter, and that it compiles for GPUs that are not here."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'compresskit[gpu]'"
)

NUMBERS = """
import torch
from compresskit.kernels.kl_div import kl_div
torch.set_num_threads(1)

def value_and_grad(student, teacher, weight, **options):
    leaf = student.detach().clone().requires_grad_()
    loss = kl_div(leaf, teacher, token_weight=weight, **options)
    loss.backward()
    return loss.detach(), leaf.grad

checked = 0
for tokens, vocabulary, teacher_vocabulary, temperature in [(1, 2, 2, 1.0), (5, 33, 33, 2.0), (7, 5000, 4999, 1.0)]:
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(tokens)
        student = (3 * torch.randn(tokens, vocabulary)).to(dtype)
        teacher = (3 * torch.randn(tokens, teacher_vocabulary)).to(dtype)
        weight = torch.rand(tokens)
        if vocabulary > 30:
            student[:, 20:22] = teacher[:, 20:22] = float("-inf")
            weight[0] = 0
            student[0], teacher[0] = float("nan"), float("nan")
        doubles = student.double(), teacher.double(), weight.double()
        truth = value_and_grad(*doubles, temperature=temperature, impl="reference")
        plain = value_and_grad(student, teacher, weight, temperature=temperature, impl="reference")
        ours = value_and_grad(student, teacher, weight, temperature=temperature, impl="triton")
        for exact, torch_way, kernel in zip(truth, plain, ours):
            # one unit in the last place of the result: the interpreter's cast to bfloat16 does not round to nearest
            slack = max(8 * torch.finfo(torch.float32).eps, torch.finfo(kernel.dtype).eps) * exact.abs().max()
            assert (exact - kernel).abs().max() <= (exact - torch_way).abs().max() + slack
        nothing = value_and_grad(student, teacher, torch.zeros_like(weight), impl="triton")
        assert nothing[0] == 0 and torch.count_nonzero(nothing[1]) == 0
        same = value_and_grad(student[1:], student[1:], weight[1:], impl="triton")
        assert same[0] == 0 and torch.count_nonzero(same[1]) == 0
        with torch.no_grad():
            value = kl_div(student, teacher, token_weight=weight, temperature=temperature, impl="triton")
        assert torch.equal(value, ours[0])
        checked += 1
print("checked", checked)
"""

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from compresskit.kernels.kl_div.triton import kl_rows
for logits in ("fp32", "bf16"):
    for wants_grad in (True, False):
        at = "*" + logits
        pointers = dict(student=at, teacher=at, weight="*fp32", rows="*i64", loss="*fp32", grad=at)
        numbers = dict(student_stride="i32", teacher_stride="i32", grad_stride="i32", width="i32",
                       inverse_temperature="fp32", temperature="fp32")
        constants = {"WANTS_GRAD": wants_grad, "BLOCK": 4096}
        signature = {**pointers, **numbers, **{name: "constexpr" for name in constants}}
        compiled = triton.compile(ASTSource(kl_rows, signature, constexprs=constants),
                                  target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 8})
        assert len(compiled.asm["cubin"]) > 0 and f".target sm_{sys.argv[1]}" in compiled.asm["ptx"]
print("compiled")
"""


def run(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_kernel_is_as_near_to_float64_as_plain_torch():
    done = run(NUMBERS, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert "checked 6" in done.stdout


@pytest.mark.parametrize("capability", ["80", "90"])
def test_the_kernel_compiles_ahead_of_time(capability, tmp_path):
    done = run(COMPILE, capability, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "compiled" in done.stdout
