"""Two processes over gloo, sharded or not, and twice the accumulation, train as one does with the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig
from safetensors.torch import load_file
from torch import nn

from compresskit.distill import trainer
from compresskit.distill.sharded import Sharded, processes_of
from compresskit.errors import CompressKitError

WORKER = """
import json
import sys
import torch
from accelerate import Accelerator
from pathlib import Path
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModel, AutoModelForCausalLM
from compresskit.data.sequences import Sequences
from compresskit.distill.learner import Learner
from compresskit.distill.losses import LOSSES
from compresskit.distill.options import TrainingOptions
from compresskit.distill.processes import Processes
from compresskit.distill.sharded import Sharded
from compresskit.distill.teachers import AverageTeacher, LiveTeacher
from compresskit.distill.trainer import train
from compresskit.errors import RunFailedError
from compresskit.layers.low_rank import LowRankLinear

out, batch_size, accumulate, cases = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
torch.set_num_threads(1)
draw = torch.Generator().manual_seed(1)
rows = [torch.randint(5, 80, (int(torch.randint(4, 17, (), generator=draw)),), generator=draw).tolist()
        for _ in range(120)]
held, accelerator = {"steps": torch.tensor([0]), "norms": torch.zeros(0)}, None
keep, step = Learner.keep_if_best, Learner.step


class Killed(BaseException):
    pass


def noted(shorten):
    def note(processes, learned, norm):
        held["norms"] = torch.cat([held["norms"], torch.tensor([shorten(processes, learned, norm)]).double()])
        return held["norms"][-1].item()
    return note


def spy(learner, at, loss):
    keep(learner, at, loss)
    one = [getattr(value, "_local_tensor", value) for value in learner.best.values()]
    held["best"] = torch.tensor([sum(value.numel() for value in one)])
    moments = [state["exp_avg"] for state in learner.optimizer.state.values()]
    held["moments"] = torch.tensor([sum(getattr(value, "_local_tensor", value).numel() for value in moments)])
    held["units"] = torch.tensor([sum(hasattr(module, "reshard") for module in learner.student.modules())])


def count(learner, number, batches):
    held["steps"] += 1
    return step(learner, number, batches)


def die(learner, number, batches):
    if number == 3:
        raise Killed
    return step(learner, number, batches)


def models(folder, low_rank, narrow):
    auto = AutoModel if "bert" in folder else AutoModelForCausalLM
    teacher = auto.from_pretrained(folder).eval().requires_grad_(False).double()
    student = auto.from_pretrained(folder).eval().double()
    if narrow:
        torch.manual_seed(0)
        config = type(teacher.config).from_dict(teacher.config.to_dict() | {"hidden_size": 16})
        student = type(teacher)(config).eval().double()
    if low_rank:
        torch.manual_seed(0)
        for block in student.model.layers:
            block.mlp.down_proj = LowRankLinear(64, 32, 7, bias=False).double()
    generator = torch.Generator().manual_seed(0)
    for value in student.parameters():
        value.data += 0.02 * torch.randn(value.shape, generator=generator)
    return teacher, student


def run(folder, losses, low_rank=False, narrow=False, average=False, killed=None, **options):
    global accelerator
    teacher, student = models(folder, low_rank, narrow)
    accelerator = accelerator or Accelerator(cpu=True)
    torch.set_default_dtype(torch.float64 if narrow else torch.float32)  # of the bridge
    told = AverageTeacher(student, decay=0.5) if average else LiveTeacher(teacher)
    before = [type(module) for module in student.modules()], {id(value) for value in student.parameters()}
    start = {name: value.clone() for name, value in student.state_dict().items()}
    options = {"steps": 4, "held_out_every": 2} | options
    options = TrainingOptions(batch_size=batch_size, accumulate=accumulate, **options)

    def begin():
        return train(student, told, [LOSSES.parse(loss) for loss in losses], Sequences(rows, 0), options,
                     generator=torch.Generator().manual_seed(0), accelerator=accelerator, teacher_shape=teacher,
                     checkpoint=killed and Path(killed))

    if killed:
        Learner.step = die
        try:
            begin()
        except Killed:
            pass
        Learner.step = count
        if accelerator.num_processes > 1 and held["units"]:
            assert all(torch.equal(start[name], value) for name, value in student.state_dict().items())
        for name, value in student.state_dict().items():
            value.copy_(start[name])
    held["steps"], held["norms"] = torch.tensor([0]), torch.zeros(0)
    try:
        result = begin()
        facts = [result.held_out_loss_before, result.held_out_loss_after, result.trained_params]
    except RunFailedError as error:
        facts = [float(str(error).split("the weights of step ")[1].split()[0])]
    assert before == ([type(module) for module in student.modules()], {id(value) for value in student.parameters()})
    assert not any(isinstance(value, DTensor) or value.requires_grad or value.is_meta for value in student.parameters())
    assert not any(module.training for module in student.modules())
    student(input_ids=torch.tensor([[5, 6]]))
    return {**dict(student.named_parameters()), "facts": torch.tensor(facts).double()} | held


Learner.keep_if_best, Learner.step = spy, count
for way in (Processes, Sharded):
    way.shorten_gradients = noted(way.shorten_gradients)
ends = {}
for name, case in cases.items():
    ends |= {f"{name}|{key}": value.detach().clone() for key, value in run(**case).items()}
accelerator = accelerator or Accelerator(cpu=True)
save_file(ends, f"{out}-{accelerator.process_index}")
print(f"processes: {accelerator.num_processes}", flush=True)
"""

KL = [{"kind": "kl", "alpha": 0.2}, {"kind": "hidden"}]
SHARDED = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_cpu_ram_efficient_loading", "false"]


def launch(out, processes, batch_size, accumulate, cases, flags=None):
    """What each process ends with; `flags` for `accelerate launch`."""
    root = str(Path(__file__).parents[2])
    script = out.with_suffix(".py")
    script.write_text(WORKER, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable]
    if processes > 1:
        environment["ACCELERATE_USE_CPU"] = "true"
        if flags is None:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        else:
            command += ["-m", "accelerate.commands.launch", "--main_process_port=0", "--num_machines=1"]
            command += [f"--num_processes={processes}", "--mixed_precision=no", "--dynamo_backend=no", *flags]
    command += [str(script), str(out), str(batch_size), str(accumulate), json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"processes: {processes}") == processes, done.stdout + done.stderr
    return [load_file(f"{out}-{index}") for index in range(processes)]


def same(ours, theirs):
    """Whether what two processes end with is the same, but for the order of sums and what each holds meanwhile."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key.split("|")[1] not in ("best", "moments", "units"):
            torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-6, msg=key)


@pytest.fixture
def cases(tiny_llama_folder, tiny_bert_folder):
    """Trainings whose ends are compared."""
    llama, bert = str(tiny_llama_folder), str(tiny_bert_folder)
    tied = {"freeze": [], "recompute": True, "clip_norm": 0.01, "weight_decay": 0.1}
    return {
        "blocks": {"folder": llama, "losses": KL, "block_steps": 2},
        "tsld": {"folder": llama, "losses": KL, "token_weight": "tsld"},
        "tied": {"folder": llama, "losses": KL, **tied},
        "labels": {"folder": llama, "losses": [{"kind": "kl", "alpha": 1.0}], "freeze": []},
        "relation": {"folder": llama, "losses": [{"kind": "relation"}], "recompute": True},
        "attention": {"folder": bert, "losses": [{"kind": "attention"}]},
        "modules": {"folder": llama, "losses": [{"kind": "hidden", "modules": "*q_proj"}]},
        "sentences": {"folder": bert, "losses": [{"kind": "embedding", "similarity": 0}]},
        "turns": {"folder": llama, "losses": KL, "low_rank": True, "turns": 1},
        "bridge": {"folder": bert, "losses": [{"kind": "hidden"}], "narrow": True},
        "average": {"folder": llama, "losses": KL, "average": True},
        "diverging": {"folder": llama, "losses": KL, "learning_rate": 1e200, "warmup": 0.0},
    }


def test_one_process_two_processes_and_twice_the_accumulation_end_with_the_same_weights(cases, tmp_path):
    """Four batches a step, and three of held-out text, which two processes cannot share evenly."""
    some = {name: cases[name] for name in ("blocks", "tsld", "diverging")}
    first = [{"kind": "hidden", "layers": [1]}]
    some["unread"] = {"folder": cases["bridge"]["folder"], "losses": first, "weight_decay": 0.1}
    (whole,) = launch(tmp_path / "whole", 1, 16, 1, some)
    for processes in (1, 2):
        for end in launch(tmp_path / str(processes), processes, 4, 4, some):
            same(end, whole)
    assert whole["tsld|facts"][1] < whole["tsld|facts"][0]


def test_two_processes_that_share_the_student_end_as_one_that_holds_it_all(cases, tmp_path):
    """Under `accelerate launch`; one training is killed among the steps of blocks, when what stands outside rests."""
    (whole,) = launch(tmp_path / "whole", 1, 16, 1, cases)
    long = cases["blocks"] | {"steps": 6, "block_steps": 4, "held_out_every": 1, "checkpoint_minutes": 0.0}
    resumed = {"long": long, "resumed": long | {"killed": str(tmp_path / "state")}}
    ends = launch(tmp_path / "sharded", 2, 4, 4, cases | resumed, SHARDED)
    for end in ends:
        same({key: value for key, value in end.items() if key.split("|")[0] in cases}, whole)
        assert (end["long|steps"], end["resumed|steps"]) == (6, 3)
        names = [key.removeprefix("long|") for key in end if key.startswith("long|")]
        for name in set(names) - {"steps", "norms"}:
            assert torch.equal(end[f"long|{name}"], end[f"resumed|{name}"]), name
    for name in ("tied", "relation", "bridge"):
        trained = ends[0][f"{name}|facts"][2]
        assert sum(end[f"{name}|best"] for end in ends) == trained
        assert all(end[f"{name}|best"] < 0.6 * trained for end in ends)
        assert sum(end[f"{name}|moments"] for end in ends) == trained + (2 * 16 * 32 if name == "bridge" else 0)
        assert all(end[f"{name}|units"] == 2 for end in ends)  # the blocks; the root is around the student


def test_batches_that_the_processes_cannot_share_evenly_are_refused(tiny_llama, damaged, run_training, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(CompressKitError, match="3 batches of a step cannot be shared by 2 processes") as caught:
        run_training(damaged(tiny_llama), tiny_llama, [{"kind": "kl"}], accumulate=3)
    assert "use a multiple of 2" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said", "fix"),
    [
        ({"fsdp_version": 1}, "FSDP of version 1", "use --fsdp_version 2"),
        ({"cpu_offload": True}, "FSDP with weights on the host", "leave fsdp_offload_params out"),
        ({"activation_checkpointing": True}, "FSDP with checkpoints of its own", "recompute: true"),
        ({"mixed_precision_policy": "bf16"}, "FSDP with mixed precision", "precision: bfloat16"),
        ({"ignored_modules": "lm_head"}, "FSDP with ignored modules", "leave fsdp_ignored_modules out"),
        ({"cpu_ram_efficient_loading": True}, "in the first process alone", "--fsdp_cpu_ram_efficient_loading false"),
    ],
)
@pytest.mark.filterwarnings("ignore:sync_module_states")
def test_settings_of_fsdp_that_are_not_followed_are_refused(settings, said, fix, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2} | settings)
    with pytest.raises(CompressKitError, match=said) as caught:
        processes_of(asked(plugin))
    assert fix in str(caught.value)


def asked(plugin, dimensions=None):
    """What accelerate is on GPUs where FSDP is asked for."""
    return cast(
        Accelerator,
        SimpleNamespace(
            distributed_type=DistributedType.FSDP,
            state=SimpleNamespace(fsdp_plugin=plugin),
            mixed_precision="no",
            parallelism_config=dimensions,
        ),
    )


def test_processes_in_more_dimensions_are_refused():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    with pytest.raises(CompressKitError, match="beside other dimensions"):
        processes_of(asked(plugin, ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)))


@pytest.fixture
def one_shard(monkeypatch, tmp_path):
    """Training is sharded over one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "processes_of", Sharded)
        yield patch.undo
    dist.destroy_process_group()


def test_weights_that_cannot_be_sharded_are_refused_where_they_learn(one_shard, tiny_llama, damaged, run_training):
    student = damaged(tiny_llama)
    student.temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(CompressKitError, match="temperature is a single number") as caught:
        run_training(student, tiny_llama, [{"kind": "kl"}])
    assert "freeze 'temperature'" in str(caught.value)
    run_training(student, tiny_llama, [{"kind": "kl"}], freeze=("temperature",))
    student.model.norm.double()
    with pytest.raises(CompressKitError, match=r"of several types \(float32, float64\)"):
        run_training(student, tiny_llama, [{"kind": "kl"}], freeze=("temperature",))


def test_blocks_that_share_weights_are_sharded_with_the_rest(one_shard, tiny_llama, damaged, run_training):
    ends = []
    for sharded in (True, False):
        student = damaged(tiny_llama)
        first, second = student.model.layers
        second.mlp.up_proj.weight = first.mlp.up_proj.weight
        if not sharded:
            one_shard()
        run_training(student, tiny_llama, [{"kind": "kl"}], freeze=())
        assert second.mlp.up_proj.weight is first.mlp.up_proj.weight
        ends.append(dict(student.named_parameters()))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_what_a_student_counts_while_it_learns_is_brought_back(one_shard, tiny_llama, damaged, run_training):
    student = damaged(tiny_llama)
    student.model.register_buffer("runs", torch.tensor(0.0))
    student.model.register_forward_pre_hook(lambda module, _: module.runs.add_(1) and None)
    run_training(student, tiny_llama, [{"kind": "kl"}])
    assert student.model.runs > 0
