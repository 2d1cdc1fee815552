"""Two processes over gloo, each with half of the tokens, end with the gradient that one process has for all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from compresskit.kernels.linear_kl import Head, linear_kl

rank, how, rendezvous = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)

class Student(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 40)

    def forward(self, x, teacher, weight):
        hidden = self.body(x)
        return linear_kl(hidden, Head(self.head.weight, self.head.bias), teacher_logits=teacher, token_weight=weight)

torch.manual_seed(1)
x, teacher, weight = torch.randn(10, 6), torch.randn(10, 40), torch.full((10,), 0.1)
alone = Student()
alone(x, teacher, weight).backward()
student = Student()
if how == "ddp":
    wrapped = DistributedDataParallel(student)
else:
    wrapped = fully_shard(student, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
mine = slice(5 * rank, 5 * rank + 5)
wrapped(x[mine], teacher[mine], 2 * weight[mine]).backward()  # both average over processes
for expected, ours in zip(alone.parameters(), student.parameters(), strict=True):
    grad = ours.grad if how == "ddp" else ours.grad.full_tensor()
    torch.testing.assert_close(grad, expected.grad, rtol=1e-5, atol=1e-7)
print("agrees")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_gradients_of_two_processes_are_those_of_one(how, tmp_path):
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", root)}
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(rank), how, str(tmp_path / "rendezvous")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=180) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for out, errors in said:
        assert "agrees" in out, errors
