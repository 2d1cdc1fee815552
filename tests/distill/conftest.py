import copy
import random

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from compresskit.data.sequences import Sequences
from compresskit.distill.losses import LOSSES
from compresskit.distill.options import TrainingOptions
from compresskit.distill.teachers import LiveTeacher
from compresskit.distill.trainer import train


@pytest.fixture
def sequences():
    """120 sequences of 4 to 16 token ids that the tiny models know."""
    draw = random.Random(0)
    return Sequences([[draw.randint(5, 80) for _ in range(draw.randint(4, 16))] for _ in range(120)], 0)


@pytest.fixture
def tiny_bert(tiny_bert_folder):
    return AutoModel.from_pretrained(tiny_bert_folder).eval().requires_grad_(False)


@pytest.fixture
def tiny_llama(tiny_llama_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval().requires_grad_(False)


@pytest.fixture
def damaged():
    """A function: a copy of a model with noise on its matrices."""

    def damage(model, size=0.02):
        copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
        for value in copied.parameters():
            if value.ndim == 2:
                value.data += size * torch.randn(value.shape, generator=generator)
        return copied

    return damage


@pytest.fixture
def run_training(sequences):
    """A function: train `student` towards `teacher`, a model or a Teacher."""

    def run(student, teacher, losses, seed=0, text=sequences, elsewhere=None, checkpoint=None, **options):
        options = TrainingOptions(**{"steps": 6, "batch_size": 8, "held_out_every": 2, **options})
        return train(
            student,
            LiveTeacher(teacher) if isinstance(teacher, PreTrainedModel) else teacher,
            [LOSSES.parse(loss) for loss in losses],
            text,
            options,
            generator=torch.Generator().manual_seed(seed),
            accelerator=Accelerator(cpu=True),
            teacher_shape=teacher if isinstance(teacher, PreTrainedModel) else None,
            elsewhere=elsewhere,
            checkpoint=checkpoint,
        )

    return run
