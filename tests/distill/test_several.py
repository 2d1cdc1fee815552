import copy
import random

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from compresskit.data.sequences import Sequences
from compresskit.distill import several
from compresskit.distill.batching import by_length, collate
from compresskit.distill.learner import Learner
from compresskit.distill.losses import KL, logits_of
from compresskit.distill.outputs import Outputs, observe, step_weights
from compresskit.distill.several import Rule, SeveralTeachers, Tally, settle, settle_embeddings
from compresskit.distill.teachers import AverageTeacher, LiveTeacher, Teacher

EVEN = torch.tensor([0.5, 0.5])
THREE = torch.ones(3) / 3
PREDICTIONS = frozenset({"predictions"})


def log_probs(*rows):
    """(K, 1, V) of K teachers about one item."""
    return torch.tensor(rows, dtype=torch.float64).log()[:, None]


def test_the_score_is_the_jensen_shannon_divergence_from_0_to_1():
    draw = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 7, 11, generator=draw, dtype=torch.float64).softmax(-1)
    middle = (p + q) / 2
    expected = ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2 / torch.tensor(2.0).log()
    found = settle(torch.stack([p, q]).log(), EVEN.double(), Rule())
    torch.testing.assert_close(found.score, expected)
    torch.testing.assert_close(found.told.exp(), middle)
    assert settle(torch.stack([p, p]).log(), EVEN.double(), Rule()).score.abs().max() < 1e-12
    apart = settle(log_probs([1, 0, 0], [0, 0.5, 0.5]), torch.tensor([0.9, 0.1]).double(), Rule())
    assert apart.score.item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("trust", "weights", "rows", "label", "trusted"),
    [
        ("labels", EVEN, ([0.8, 0.1, 0.1], [0.05, 0.05, 0.9]), 0, 0),
        ("labels", EVEN, ([0.8, 0.1, 0.1], [0.05, 0.05, 0.9]), 2, 1),
        # of an unknown label the one nearer to all decides, of two equal ones the first
        ("labels", THREE, ([0.05, 0.05, 0.9], [0.8, 0.1, 0.1], [0.8, 0.1, 0.1]), -1, 1),
        ("labels", EVEN, ([0.8, 0.1, 0.1], [0.1, 0.1, 0.8]), -1, 0),
        # a label that is as likely to both says nothing: the heavier
        ("labels", torch.tensor([0.3, 0.7]), ([0.8, 0.1, 0.1], [0.1, 0.1, 0.8]), 1, 1),
        ("majority", THREE, ([0.05, 0.05, 0.9], [0.8, 0.1, 0.1], [0.7, 0.2, 0.1]), 2, 2),
        ("entropy", EVEN, ([0.4, 0.3, 0.3], [0.02, 0.02, 0.96]), 0, 1),
    ],
)
def test_whom_a_conflict_is_decided_for(trust, weights, rows, label, trusted):
    log_p = log_probs(*rows)
    rule = Rule("route", trust, 0.1)
    found = settle(log_p, weights.double(), rule, labels=torch.tensor([label]))
    assert found.score.item() > 0.1
    assert found.trusted.item() == trusted
    torch.testing.assert_close(found.told, log_p[trusted])
    calm = settle(log_p, weights.double(), Rule("route", trust, 0.99), labels=torch.tensor([label]))
    assert calm.trusted.item() == -1, "no conflict, no choice"
    torch.testing.assert_close(calm.told.exp()[0], torch.einsum("k,knv->nv", weights.double(), log_p.exp())[0])


def test_of_three_embeddings_the_two_that_agree_are_trusted():
    draw = torch.Generator().manual_seed(0)
    right, wrong = torch.randn(2, 5, 16, generator=draw)
    told = torch.stack([wrong, right, right * 1.1])
    found = settle_embeddings(told, THREE, Rule("route", threshold=0.2))
    assert set(found.trusted.tolist()) <= {1, 2}
    assert (found.score > 0.2).all()
    same = settle_embeddings(torch.stack([right, right * 2]), EVEN, Rule())
    assert same.score.abs().max() < 1e-6
    torch.testing.assert_close(same.told, 1.5 * right)
    assert settle_embeddings(torch.stack([right, -right]), EVEN, Rule()).score.min() == 1


def test_a_tally_counts_each_text_once_and_goes_on_where_it_was():
    tally, scores = Tally(2, 0.2), torch.tensor([[0.1, 0.5, 0.9], [0.0, 1.0, 0.3]])
    trusted = torch.tensor([[-1, 0, 1], [-1, 1, 0]])
    settled = several.Settled(scores.flatten()[:, None], scores.flatten(), trusted.flatten())
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    tally.add([7, 8], mask, settled)
    tally.add([7, -3], mask, settled)
    tally.add([9, 9], torch.tensor([[0, 0, 0], [1, 1, 1]]), settled)
    again = Tally(2, 0.2)
    again.restore(tally.state())
    again.add([8, 7], mask, settled)
    summary = again.summary(("a", "b"))
    assert summary["items"] == 5
    assert summary["mean"] == pytest.approx((0.1 + 0.5 + 0.9 + 0.0 + 1.0) / 5)
    assert summary["share_above"] == pytest.approx(3 / 5)
    assert summary["quantiles"]["0.5"] == pytest.approx(0.5, abs=2e-3)
    assert summary["quantiles"]["0.99"] == pytest.approx(1.0)
    assert summary["trusted_items"] == {"a": 1, "b": 2}
    assert summary["texts"] == {"7": 0.5, "8": 0.5, "9": 0.0}


def test_logits_in_parts_are_those_of_one_piece(tiny_llama, damaged, sequences, monkeypatch):
    teachers = [LiveTeacher(tiny_llama), LiveTeacher(damaged(tiny_llama, size=0.3))]
    numbered, ends = collate(sequences, [3, 40, 7]), []
    for size in (2**24, 2 * 200 * 5):
        monkeypatch.setattr(several, "_LOGITS_AT_A_TIME", size)
        teacher = SeveralTeachers(teachers, [1.0, 3.0], Rule("route", "labels", 0.01), next_tokens=True)
        ends.append(teacher(numbered.batch, numbered.rows, PREDICTIONS).predictions)
    torch.testing.assert_close(*ends)
    each = [logits_of(observe(t.model, numbered.batch, PREDICTIONS).predictions).softmax(-1) for t in teachers]
    mixed = SeveralTeachers(teachers, [1.0, 3.0], Rule())(numbered.batch, numbered.rows, PREDICTIONS)
    torch.testing.assert_close(mixed.predictions.exp(), 0.25 * each[0] + 0.75 * each[1])


class Contradicting(Teacher):
    """Says of 30 % of the tokens what the other one says of another token, as sure as that one."""

    def __init__(self, right):
        self.right = right

    def __call__(self, batch, rows, needs):
        logits = logits_of(self.right(batch, rows, needs).predictions).clone()
        for i, row in enumerate(rows):
            wrong = torch.rand(logits.shape[1], generator=torch.Generator().manual_seed(abs(row))) < 0.3
            logits[i, wrong] = logits[i, wrong].roll(37, -1)
        return Outputs(predictions=logits)


@pytest.fixture(scope="module")
def chain():
    """Sequences in which most tokens follow from the one before."""
    draw = random.Random(1)
    follows = {token: draw.randint(5, 80) for token in range(5, 81)}
    rows = []
    for _ in range(400):
        row = [draw.randint(5, 80)]
        while len(row) < 16:
            row.append(follows[row[-1]] if draw.random() < 0.8 else draw.randint(5, 80))
        rows.append(row)
    return Sequences(rows[:320], 0), Sequences(rows[320:], 0)


def divergence(student, teacher, text):
    """Mean KL of the student from the teacher, per token."""
    batches = [numbered.batch for numbered in by_length(text, range(len(text)), 40, max_length=None)]
    total = 0.0
    with torch.no_grad():
        for batch, weights in zip(batches, step_weights([b["attention_mask"] for b in batches]), strict=True):
            told = [observe(model, batch, PREDICTIONS) for model in (student, teacher)]
            total += float(KL()(*told, batch, weights))
    return total


def test_a_contradictory_teacher_hurts_the_average_and_hardly_the_others(tiny_llama, damaged, run_training, chain):
    text, apart = chain
    right = copy.deepcopy(tiny_llama)
    labels = [{"kind": "kl", "alpha": 1.0}]
    learn = {"learning_rate": 1e-2, "batch_size": 16, "freeze": ()}
    run_training(right, tiny_llama, labels, text=text, steps=150, held_out_every=50, **learn)
    student = damaged(right, size=0.1)
    live, ends, shares = LiveTeacher(right), {}, {}
    for conflict in ("alone", "average", "route", "drop"):
        teacher = live
        if conflict != "alone":
            teachers = [live, Contradicting(live)]
            teacher = SeveralTeachers(teachers, [1.0, 1.0], Rule(conflict, "labels"), next_tokens=True)
        one = copy.deepcopy(student)
        options = {**learn, "steps": 60, "learning_rate": 3e-3, "held_out_every": 20}
        run_training(one, teacher, [{"kind": "kl"}], text=text, **options)
        ends[conflict] = divergence(one, right, apart)
        if conflict != "alone":
            shares[conflict] = teacher.tally.summary(("right", "wrong"))
    assert ends["average"] > 2 * ends["alone"]
    assert ends["route"] < 1.2 * ends["alone"]
    assert ends["drop"] < 1.2 * ends["alone"]
    assert 0.2 < shares["average"]["share_above"] < 0.35
    assert shares["route"]["trusted_items"]["right"] > 5 * shares["route"]["trusted_items"]["wrong"]


def test_a_head_over_texts_is_settled_text_by_text(sequences):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    models = []
    for seed in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            models.append(BertForSequenceClassification(BertConfig(**shape, num_labels=4)).eval())
        models[-1].classifier.weight.data *= 50
    numbered = collate(sequences, [3, 40, 7, 8])
    logits = torch.stack([observe(model, numbered.batch, PREDICTIONS).predictions for model in models]).detach()
    threshold = float(settle(logits.log_softmax(-1), THREE, Rule()).score.sort().values[1:3].mean())
    for conflict in ("route", "drop"):
        rule = Rule(conflict, "majority", threshold)
        teacher = SeveralTeachers([LiveTeacher(model) for model in models], [1.0] * 3, rule)
        told = teacher(numbered.batch, numbered.rows, PREDICTIONS)
        expected = settle(logits.log_softmax(-1), THREE, rule)
        torch.testing.assert_close(told.predictions, expected.told)
        assert told.predictions.shape == (4, 4)
        contradict = expected.score > threshold
        assert contradict.sum() == 2
        if conflict == "drop":
            assert told.counts.amax(1).tolist() == told.counts.amin(1).tolist() == (~contradict).float().tolist()
            (weights,) = step_weights([numbered.batch["attention_mask"]], [told.counts])
            assert (weights.row > 0).tolist() == (~contradict).tolist()
        else:
            assert told.counts is None
        assert teacher.tally.summary(("a", "b", "c"))["items"] == 4


def test_an_average_is_the_formula_and_forgets_what_it_said(tiny_bert, damaged, sequences):
    student = damaged(tiny_bert)
    teacher = AverageTeacher(tiny_bert, decay=0.75)
    numbered = collate(sequences, [3, 1])
    before = teacher(numbered.batch, numbered.rows, frozenset({"sentence"})).sentence
    weights = dict(student.named_parameters())
    for _ in range(2):
        teacher.follow({name: value for name, value in weights.items() if "encoder" in name})
    own = dict(tiny_bert.named_parameters())
    for name, value in teacher.model.named_parameters():
        expected = 0.5625 * own[name] + 0.4375 * weights[name] if "encoder" in name else own[name]
        torch.testing.assert_close(value, expected)
    assert not torch.equal(before, teacher(numbered.batch, numbered.rows, frozenset({"sentence"})).sentence)
    fresh = AverageTeacher(tiny_bert, decay=0.75)
    fresh.remember({name: value.clone() for name, value in teacher.memory().items()})
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(fresh.model.parameters(), teacher.model.parameters(), strict=True)
    )


def test_several_teachers_and_an_average_go_on_with_the_same_bits(
    tiny_llama, damaged, run_training, tmp_path, monkeypatch
):
    def teach(student):
        teachers = [LiveTeacher(tiny_llama), AverageTeacher(student, decay=0.5), LiveTeacher(damaged(tiny_llama, 0.2))]
        return SeveralTeachers(teachers, [1.0, 1.0, 0.5], Rule("route", "majority", 0.0))

    losses, options = (
        [{"kind": "kl"}, {"kind": "embedding"}],
        {"steps": 8, "checkpoint_minutes": 0.0, "learning_rate": 1e-3},
    )
    start = damaged(tiny_llama)
    ends, summaries, real = [], [], Learner.step
    for killed in (False, True):
        student = copy.deepcopy(start)
        if killed:

            def step(self, number, batches):
                if number == 5:
                    raise KeyboardInterrupt
                return real(self, number, batches)

            with monkeypatch.context() as patch:
                patch.setattr(Learner, "step", step)
                with pytest.raises(KeyboardInterrupt):
                    run_training(student, teach(student), losses, checkpoint=tmp_path / "state", **options)
            student = copy.deepcopy(start)
        teacher = teach(student)
        run_training(student, teacher, losses, checkpoint=tmp_path / "state" if killed else None, **options)
        ends.append(student.state_dict())
        summaries.append(teacher.tally.summary(("original", "average", "other")))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert summaries[0] == summaries[1]
    assert not torch.equal(ends[0]["model.norm.weight"], start.state_dict()["model.norm.weight"])


def test_where_every_item_is_dropped_nothing_is_learnt_and_nothing_breaks(tiny_llama, damaged, run_training):
    teachers = [LiveTeacher(tiny_llama), LiveTeacher(damaged(tiny_llama, 0.5))]
    student = damaged(tiny_llama)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    result = run_training(student, SeveralTeachers(teachers, [1.0, 1.0], Rule("drop", threshold=0.0)), [{"kind": "kl"}])
    assert result.held_out_loss_after == 0
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
