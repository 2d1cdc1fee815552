import copy
import errno
import os

import pytest
import torch

from compresskit.data.sequences import Sequences
from compresskit.distill.batching import collate
from compresskit.distill.cached import CachedTeacher, CacheIdentity, write_cache
from compresskit.distill.losses import KL, logits_of
from compresskit.distill.outputs import Outputs, observe, step_weights
from compresskit.distill.teachers import LiveTeacher
from compresskit.errors import CompressKitError, RunFailedError
from compresskit.kernels.linear_kl import TopK

CPU = torch.device("cpu")


def identity(keep="hidden", k=8, needs=("predictions", "sentence"), **other):
    facts = {"teacher": "t", "text": "x", "max_length": None, "temperatures": (1.0, 2.0), **other}
    return CacheIdentity(keep=keep, k=k, needs=needs, **facts)


@pytest.fixture
def cached(tiny_llama, sequences, tmp_path):
    """A function: the tiny Llama's cache, made and opened."""

    def make(keep="hidden", k=8, temperature=1.0):
        folder, what = tmp_path / f"{keep}{k}", identity(keep, k)
        if not folder.exists():
            write_cache(folder, what, LiveTeacher(tiny_llama), sequences, batch_size=8, device=CPU)
        return CachedTeacher(folder, what, sequences, device=CPU, temperature=temperature)

    return make


def kl_of(teacher, student, sequences, **options):
    numbered = collate(sequences, [3, 40, 7, 99])
    (weights,) = step_weights([numbered.batch["attention_mask"]])
    told = teacher(numbered.batch, numbered.rows, KL.needs)
    return float(KL(**options)(observe(student, numbered.batch, KL.needs), told, numbered.batch, weights))


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"divergence": "jsd"}, {"alpha": 0.5}])
def test_hidden_states_on_the_disk_give_the_loss_of_the_live_teacher(options, cached, tiny_llama, damaged, sequences):
    student = damaged(tiny_llama, size=0.1)
    live = kl_of(LiveTeacher(tiny_llama), student, sequences, **options)
    assert kl_of(cached(), student, sequences, **options) == pytest.approx(live, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_is_at_most_the_exact_divergence_and_nears_it_as_k_grows(
    temperature, cached, tiny_llama, damaged, sequences
):
    student = damaged(tiny_llama, size=0.1)
    exact = kl_of(LiveTeacher(tiny_llama), student, sequences, temperature=temperature)
    found = [kl_of(cached("top_k", k, temperature), student, sequences, temperature=temperature) for k in (4, 64, 160)]
    assert 0 < found[0] < found[1] < found[2] < exact
    numbered = collate(sequences, [3, 40, 7, 99])
    logits = logits_of(observe(tiny_llama, numbered.batch, KL.needs).predictions)
    told = Outputs(predictions=TopK.of(logits.flatten(0, 1), 160, temperature=temperature))
    precise = kl_of(lambda *_: told, student, sequences, temperature=temperature)
    assert found[2] == pytest.approx(precise, rel=2e-3), "but for float16"


def test_a_student_trained_from_the_disk_is_the_one_trained_beside_the_teacher(
    cached, tiny_llama, damaged, run_training
):
    teacher, losses, ends = cached(), [{"kind": "kl"}, {"kind": "embedding"}], []
    for one in (LiveTeacher(tiny_llama), teacher):
        student = damaged(tiny_llama)
        result = run_training(student, one, losses, steps=10, learning_rate=1e-3)
        ends.append((result.held_out_loss_before, result.held_out_loss_after))
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)
    assert ends[1][1] < ends[1][0]


def test_bytes_a_token_are_those_of_the_formula(cached, sequences):
    tokens = sum(map(len, sequences.rows))
    sentences = 4 * 32 * len(sequences) / tokens
    assert cached().facts["bytes_per_token"] == pytest.approx(4 * 32 + sentences)
    assert cached("top_k", 8).facts["bytes_per_token"] == pytest.approx(6 * 8 + 4 * 2 + sentences)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"teacher": "u"}, r"another teacher \(t there, u here\)"),
        ({"text": "y"}, "another text and tokenizer"),
        ({"max_length": 8}, "another max_length"),
        ({"keep": "top_k"}, "another keep"),
    ],
)
def test_a_cache_of_something_else_is_refused(other, said, cached, sequences, tmp_path):
    cached()
    with pytest.raises(CompressKitError, match=said):
        CachedTeacher(tmp_path / "hidden8", identity(**other), sequences, device=CPU)


def test_a_cache_that_is_absent_or_damaged_is_named_with_the_way_out(cached, sequences, tmp_path):
    with pytest.raises(CompressKitError, match="no teacher is cached"):
        CachedTeacher(tmp_path / "nowhere", identity(), sequences, device=CPU)
    cached()
    (tmp_path / "hidden8" / "hidden.npy").write_bytes(b"cut")
    with pytest.raises(CompressKitError, match="cannot be read") as caught:
        CachedTeacher(tmp_path / "hidden8", identity(), sequences, device=CPU)
    assert "delete" in str(caught.value)
    cached("top_k")
    with pytest.raises(CompressKitError, match="another length"):
        CachedTeacher(tmp_path / "top_k8", identity("top_k"), Sequences(sequences.rows[:50], 0), device=CPU)


def test_a_full_disk_leaves_no_half_a_cache(tiny_llama, sequences, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(RunFailedError, match="No space left on device"):
        write_cache(tmp_path / "c", identity(), LiveTeacher(tiny_llama), sequences, batch_size=8, device=CPU)
    assert not list(tmp_path.iterdir())


def test_other_text_is_asked_of_the_live_teacher_or_refused(cached, tiny_llama, sequences):
    teacher, numbered = cached(), collate(sequences, [1, 2])
    with pytest.raises(CompressKitError, match="holds the training text alone"):
        teacher(numbered.batch, [-1, -2], KL.needs)
    teacher.live = LiveTeacher(copy.deepcopy(tiny_llama))
    assert teacher(numbered.batch, [-1, -2], KL.needs).predictions is not None


def test_as_many_entries_as_the_vocabulary_has_are_refused(cached):
    with pytest.raises(CompressKitError, match=r"cache.k: 197 entries of a vocabulary of 197"):
        cached("top_k", 197)
