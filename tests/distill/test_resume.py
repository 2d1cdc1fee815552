import copy
import errno

import pytest
import torch

from compresskit.data.sequences import Sequences
from compresskit.distill import checkpoint
from compresskit.distill.checkpoint import load_state
from compresskit.distill.learner import Learner
from compresskit.errors import CompressKitError
from compresskit.layers.low_rank import LowRankLinear

LOSSES = [{"kind": "embedding"}, {"kind": "hidden", "weight_end": 0.2}]


class Killed(BaseException):
    """What a signal would do."""


def kill_at(monkeypatch, number):
    """The training dies when it begins step `number`."""
    real = Learner.step

    def step(self, at, batches):
        if at == number:
            raise Killed
        return real(self, at, batches)

    monkeypatch.setattr(Learner, "step", step)


def low_rank(model):
    """`model` with the first FFN matrix of each block as two random factors."""
    for block in model.encoder.layer:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            block.intermediate.dense = LowRankLinear(32, 64, 8, bias=True)
    return model


def end(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_killed_and_resumed_ends_with_the_bits_of_a_run_that_was_not(
    tiny_bert, damaged, run_training, tmp_path, monkeypatch
):
    options = {"steps": 8, "dropout": True, "checkpoint_minutes": 0.0}
    student = damaged(tiny_bert)
    whole = run_training(student, tiny_bert, LOSSES, **options)
    expected = end(student)
    with monkeypatch.context() as patch:
        kill_at(patch, 5)  # the last look, and so the last state, is after step 4
        with pytest.raises(Killed):
            run_training(damaged(tiny_bert), tiny_bert, LOSSES, checkpoint=tmp_path / "state", **options)
    seen = []
    real = Learner.step
    monkeypatch.setattr(Learner, "step", lambda self, at, batches: seen.append(at) or real(self, at, batches))
    student = damaged(tiny_bert)
    resumed = run_training(student, tiny_bert, LOSSES, checkpoint=tmp_path / "state", **options)
    assert seen == [4, 5, 6, 7]
    assert all(torch.equal(expected[name], value) for name, value in student.state_dict().items())
    assert resumed.parts_after == whole.parts_after
    assert (resumed.best_step, resumed.tokens) == (whole.best_step, whole.tokens)
    assert resumed.held_out_loss_before == whole.held_out_loss_before


@pytest.mark.parametrize("killed", [3, 5, 7])
def test_training_in_stages_and_turns_goes_on_with_the_same_bits(
    killed, tiny_bert, damaged, run_training, tmp_path, monkeypatch
):
    """Killed among the steps of blocks, at the border and after it; a look, and so a state, is after every step."""
    options = {"steps": 9, "block_steps": 5, "turns": 2, "held_out_every": 1, "checkpoint_minutes": 0.0}
    start = low_rank(damaged(tiny_bert))
    student = copy.deepcopy(start)
    whole = run_training(student, tiny_bert, LOSSES, **options)
    expected = end(student)
    with monkeypatch.context() as patch:
        kill_at(patch, killed)
        with pytest.raises(Killed):
            run_training(copy.deepcopy(start), tiny_bert, LOSSES, checkpoint=tmp_path / "state", **options)
    student = copy.deepcopy(start)
    resumed = run_training(student, tiny_bert, LOSSES, checkpoint=tmp_path / "state", **options)
    assert all(torch.equal(expected[name], value) for name, value in student.state_dict().items())
    assert resumed.blocks_after == whole.blocks_after < whole.blocks_before


def test_what_was_learnt_to_reach_a_wider_teacher_goes_on_too(tiny_bert, run_training, tmp_path, monkeypatch):
    config = tiny_bert.config.to_dict() | {"hidden_size": 16}
    narrow = type(tiny_bert)(type(tiny_bert.config).from_dict(config)).eval()
    start = end(narrow)
    options = {"steps": 6, "checkpoint_minutes": 0.0, "learning_rate": 1e-3}
    run_training(narrow, tiny_bert, [{"kind": "hidden"}], **options)
    expected = end(narrow)
    narrow.load_state_dict(start)
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            run_training(narrow, tiny_bert, [{"kind": "hidden"}], checkpoint=tmp_path / "state", **options)
    narrow.load_state_dict(start)
    run_training(narrow, tiny_bert, [{"kind": "hidden"}], checkpoint=tmp_path / "state", **options)
    assert all(torch.equal(expected[name], value) for name, value in narrow.state_dict().items())
    assert not all(torch.equal(start[name], value) for name, value in expected.items())


def test_a_full_disk_costs_the_checkpoint_and_not_the_training(
    tiny_bert, damaged, run_training, tmp_path, monkeypatch, caplog
):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    student = damaged(tiny_bert)
    result = run_training(student, tiny_bert, LOSSES, checkpoint=tmp_path / "state", checkpoint_minutes=0.0)
    assert result.best_step == 6
    assert "no checkpoint after step 2" in caplog.text
    assert "No space left on device" in caplog.text
    assert not (tmp_path / "state").exists()


def test_a_damaged_state_is_named_with_the_way_out(tiny_bert, damaged, run_training, tmp_path):
    folder = tmp_path / "state"
    run_training(damaged(tiny_bert), tiny_bert, LOSSES, checkpoint=folder, checkpoint_minutes=0.0)
    (folder / "state.safetensors").write_bytes(b"cut")
    with pytest.raises(CompressKitError, match="cannot be read") as caught:
        run_training(damaged(tiny_bert), tiny_bert, LOSSES, checkpoint=folder)
    assert f"delete {folder}" in str(caught.value)
    assert load_state(tmp_path / "nothing") is None


def test_nothing_is_written_before_its_time(tiny_bert, damaged, run_training, tmp_path):
    for minutes in (None, 15.0):
        run_training(damaged(tiny_bert), tiny_bert, LOSSES, checkpoint=tmp_path / "state", checkpoint_minutes=minutes)
        assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("family", ["tiny_bert", "tiny_llama"])
def test_blocks_that_are_run_again_give_the_same_bits(family, damaged, run_training, request):
    teacher, ends = request.getfixturevalue(family), []
    losses = [{"kind": "hidden"}, {"kind": "relation"}, {"kind": "attention"}]
    for recompute in (False, True):
        student = damaged(teacher)
        run_training(student, teacher, losses, recompute=recompute, dropout=True)
        ends.append(end(student))
        assert not any("forward" in vars(module) for module in student.modules())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_recomputing_keeps_fewer_tensors_for_the_backward_pass(tiny_llama, damaged, run_training):
    kept = []
    for recompute in (False, True):
        count = [0]

        def pack(tensor, count=count):
            count[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run_training(damaged(tiny_llama), tiny_llama, [{"kind": "kl"}], recompute=recompute, steps=1)
        kept.append(count[0])
    assert kept[1] < kept[0]


@pytest.mark.parametrize(
    "losses", [[{"kind": "kl"}, {"kind": "hidden"}], [{"kind": "relation"}, {"kind": "embedding"}]]
)
def test_bfloat16_products_lower_the_loss_and_leave_float32_weights(tiny_llama, damaged, run_training, losses):
    student = damaged(tiny_llama)
    result = run_training(student, tiny_llama, losses, precision="bfloat16", steps=20, learning_rate=1e-3)
    plain = run_training(damaged(tiny_llama), tiny_llama, losses, steps=20, learning_rate=1e-3)
    assert {value.dtype for value in student.parameters()} == {torch.float32}
    assert result.held_out_loss_after < 0.8 * result.held_out_loss_before
    assert result.held_out_loss_before == pytest.approx(plain.held_out_loss_before, rel=0.05)
    assert result.held_out_loss_before != plain.held_out_loss_before


@pytest.mark.parametrize("rule", ["tsld", "entropy"])
def test_tokens_weighed_by_the_teacher_train_as_one_batch_or_two(rule, tiny_llama, damaged, run_training):
    ends = []
    for batch_size, accumulate in ((16, 1), (8, 2)):
        student = damaged(tiny_llama).double()
        options = {"token_weight": rule, "batch_size": batch_size, "accumulate": accumulate}
        run_training(student, copy.deepcopy(tiny_llama).double(), [{"kind": "hidden"}], **options)
        ends.append(end(student))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-6, atol=1e-6)


def test_a_student_that_leaves_the_teacher_on_other_text_is_warned_of(tiny_llama, damaged, run_training, caplog):
    """One word over and over: learning it by heart costs everything else."""
    one_word = Sequences([[7] * 12 for _ in range(40)], 0)
    other = Sequences([[7, 9], [7, 30], [7, 41]], 0)
    result = run_training(
        damaged(tiny_llama, size=1e-3),
        tiny_llama,
        [{"kind": "kl", "alpha": 1.0}],
        text=one_word,
        elsewhere=other,
        steps=20,
        learning_rate=1e-2,
        freeze=(),
    )
    assert result.held_out_loss_after < result.held_out_loss_before
    assert result.elsewhere_after > result.elsewhere_before
    assert "on the other one it lost" in caplog.text


def test_a_student_that_gains_everywhere_is_not_warned_of(tiny_llama, damaged, run_training, sequences, caplog):
    result = run_training(
        damaged(tiny_llama), tiny_llama, [{"kind": "kl"}], elsewhere=sequences, steps=20, learning_rate=1e-3
    )
    assert result.elsewhere_after < result.elsewhere_before
    assert "it lost" not in caplog.text


def test_weights_that_move_count_at_the_end_what_they_end_with(tiny_bert, damaged, run_training):
    losses = [{"kind": "embedding", "weight": 2.0, "weight_end": 0.0}, {"kind": "hidden", "weight_end": 0.5}]
    result = run_training(damaged(tiny_bert), tiny_bert, losses)
    assert result.held_out_loss_before == pytest.approx(0.5 * result.parts_before["hidden"])
    with pytest.raises(CompressKitError, match="every loss counts 0 at the end"):
        run_training(damaged(tiny_bert), tiny_bert, losses[:1])
