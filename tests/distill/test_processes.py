"""Two processes over gloo, and twice the accumulation, train as one process does with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = """
import sys
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from compresskit.data.sequences import Sequences
from compresskit.distill.losses import LOSSES
from compresskit.distill.options import TrainingOptions
from compresskit.distill.teachers import LiveTeacher
from compresskit.distill.trainer import train

folder, out, batch_size, accumulate, rule = sys.argv[1:]
torch.set_num_threads(1)
teacher = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False).double()
student = AutoModelForCausalLM.from_pretrained(folder).eval().double()
generator = torch.Generator().manual_seed(0)
for value in student.parameters():
    value.data += 0.02 * torch.randn(value.shape, generator=generator)
draw = torch.Generator().manual_seed(1)
rows = [torch.randint(5, 80, (int(torch.randint(4, 17, (), generator=draw)),), generator=draw).tolist()
        for _ in range(120)]
accelerator = Accelerator(cpu=True)
options = TrainingOptions(steps=4, batch_size=int(batch_size), accumulate=int(accumulate), held_out_every=2,
                          token_weight="even" if rule == "blocks" else rule, block_steps=2 if rule == "blocks" else 0)
losses = [LOSSES.parse({"kind": "kl", "alpha": 0.2}), LOSSES.parse({"kind": "hidden"})]
result = train(student, LiveTeacher(teacher), losses, Sequences(rows, 0), options,
               generator=torch.Generator().manual_seed(0), accelerator=accelerator)
if accelerator.is_main_process:
    facts = {"held_out": torch.tensor([result.held_out_loss_before, result.held_out_loss_after]).double()}
    save_file({**{name: value.contiguous() for name, value in student.named_parameters()}, **facts}, out)
print(f"processes: {accelerator.num_processes}", flush=True)
"""


def launch(folder, out, processes, batch_size, accumulate, rule):
    """What the training ends with, in so many processes."""
    root = str(Path(__file__).parents[2])
    script = out.with_suffix(".py")
    script.write_text(WORKER, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment["ACCELERATE_USE_CPU"] = "true"
    command += [str(script), str(folder), str(out), str(batch_size), str(accumulate), rule]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        return done.stderr
    assert f"processes: {processes}" in done.stdout, done.stdout + done.stderr
    return load_file(out)


@pytest.mark.parametrize("rule", ["blocks", "tsld"])
def test_one_process_two_processes_and_twice_the_accumulation_end_with_the_same_weights(
    rule, tiny_llama_folder, tmp_path
):
    """Two steps of blocks alone and two of the whole; four of the whole."""
    whole = launch(tiny_llama_folder, tmp_path / "whole", 1, 16, 1, rule)
    for name, processes in (("accumulated", 1), ("shared", 2)):
        other = launch(tiny_llama_folder, tmp_path / name, processes, 8, 2, rule)
        assert isinstance(other, dict), other
        for key, value in whole.items():
            torch.testing.assert_close(other[key], value, rtol=1e-6, atol=1e-6, msg=f"{name}: {key}")
    assert whole["held_out"][1] < whole["held_out"][0]


def test_batches_that_the_processes_cannot_share_evenly_are_refused(tiny_llama_folder, tmp_path):
    said = launch(tiny_llama_folder, tmp_path / "uneven", 2, 8, 3, "even")
    assert "3 batches of a step cannot be shared by 2 processes" in said
    assert "use a multiple of 2" in said
