import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers, on_main_process

from compresskit.distill.losses import LOSSES
from compresskit.distill.options import TrainingOptions
from compresskit.distill.teachers import LiveTeacher
from compresskit.distill.tracking import require_tracker, tracked
from compresskit.distill.trainer import train
from compresskit.errors import CompressKitError
from compresskit.passes.distill import Distill


class Noted(GeneralTracker):
    """A tracker that keeps what it is told."""

    name, requires_logging_directory = "noted", False

    @on_main_process
    def __init__(self):
        super().__init__()
        self.told = []

    @property
    def tracker(self):
        return self.told

    @on_main_process
    def store_init_configuration(self, values):
        return

    @on_main_process
    def log(self, values, step):
        self.told.append((step, values))


def test_each_step_tells_the_tracker_every_loss_and_the_speed(tiny_llama, damaged, sequences):
    noted = Noted()
    accelerator = Accelerator(cpu=True, log_with=[noted])
    accelerator.init_trackers("distill")
    train(
        damaged(tiny_llama),
        LiveTeacher(tiny_llama),
        [LOSSES.parse({"kind": "kl"}), LOSSES.parse({"kind": "hidden"})],
        sequences,
        TrainingOptions(steps=5, block_steps=2, batch_size=8),
        generator=torch.Generator().manual_seed(0),
        accelerator=accelerator,
    )
    assert [step for step, _ in noted.told] == [1, 2, 3, 4, 5]
    assert [sorted(values) for _, values in noted.told[:2]] == [["blocks", "tokens_per_s"]] * 2
    assert [sorted(values) for _, values in noted.told[2:]] == [["hidden", "kl", "tokens_per_s"]] * 3
    assert all(value > 0 for _, values in noted.told for value in values.values())


def test_a_tracker_that_is_not_known_or_not_installed_is_refused_before_any_weight_is_read(tiny_llama, monkeypatch):
    with pytest.raises(CompressKitError, match="did you mean 'tensorboard'"):
        Distill(tracker="tensorbord").plan(tiny_llama)
    monkeypatch.setattr("compresskit.distill.tracking.get_available_trackers", list)
    with pytest.raises(CompressKitError, match="the package of tracker 'comet_ml' cannot be imported") as caught:
        Distill(tracker="comet_ml").plan(tiny_llama)
    assert "pip install comet-ml" in str(caught.value)


@pytest.mark.skipif("tensorboard" not in map(str, get_available_trackers()), reason="tensorboard is not installed")
def test_tensorboard_finds_its_file(tmp_path):
    require_tracker("tensorboard")
    with tracked("tensorboard", str(tmp_path)) as accelerator:
        accelerator.log({"kl": 1.0}, step=1)
    assert list(tmp_path.rglob("events.out.tfevents.*"))
