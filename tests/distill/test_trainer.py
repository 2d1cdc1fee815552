import copy
import math
from dataclasses import asdict

import pytest
import torch
from families import tiny_student
from torch import nn

from compresskit.data.sequences import Sequences
from compresskit.distill.batching import by_length, collate, split_held_out, training_steps
from compresskit.distill.learner import Learner
from compresskit.distill.losses import Embedding
from compresskit.distill.losses.embedding import relative_error
from compresskit.distill.options import default_learning_rate, learning_rate_at
from compresskit.distill.outputs import observe
from compresskit.distill.parameters import choose_parameters
from compresskit.distill.teachers import LiveTeacher
from compresskit.distill.token_counts import answers_alone
from compresskit.errors import CompressKitError, RunFailedError
from compresskit.layers.low_rank import LowRankLinear
from compresskit.passes.tensor import TensorDecomposition

HIDDEN = [{"kind": "hidden"}]


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_rate_rises_then_falls_to_nothing():
    for schedule in ("cosine", "linear"):
        rates = [learning_rate_at(i, steps=100, warmup=0.1, schedule=schedule) for i in range(100)]
        assert all(0 < rate <= 1 for rate in rates)
        assert rates[:11] == sorted(rates[:11])
        assert rates[10] == 1
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert rates[-1] < 0.02
    assert learning_rate_at(0, steps=1, warmup=0, schedule="cosine") == 1


def test_batches_hold_similar_lengths_and_every_sequence_once_a_round(sequences):
    steps = training_steps(
        sequences, range(120), batch_size=5, accumulate=2, max_length=None, generator=torch.Generator().manual_seed(0)
    )
    # 48 steps of 10 sequences are three pools of 16 steps, and four rounds of the 120 sequences
    batches = [numbered for _ in range(48) for numbered in next(steps)]
    assert all(len(numbered.rows) == 5 for numbered in batches)
    assert torch.bincount(torch.tensor([numbered.rows for numbered in batches]).flatten()).tolist() == [4] * 120
    real = sum(int(numbered.batch["attention_mask"].sum()) for numbered in batches)
    computed = sum(numbered.batch["attention_mask"].numel() for numbered in batches)
    assert real / computed > 0.95


def test_batches_are_cut_to_max_length(sequences):
    numbered = collate(sequences, [0, 1, 2], max_length=4)
    assert numbered.batch["input_ids"].shape == (3, 4)
    assert numbered.batch["input_ids"][1].tolist() == sequences.rows[1][:4]


def test_held_out_sequences_are_not_trained_on():
    rows, held_out = split_held_out(100, 128, generator=torch.Generator().manual_seed(0))
    assert len(held_out) == 10
    assert sorted(rows + held_out) == list(range(100))


def test_by_length_holds_each_row_once(sequences):
    batches = by_length(sequences, range(0, 120, 2), 7, max_length=None)
    assert sorted(row for numbered in batches for row in numbered.rows) == list(range(0, 120, 2))


@pytest.mark.parametrize("dropout", [False, True])
def test_two_runs_from_one_seed_end_with_the_same_bits(tiny_bert, damaged, run_training, dropout):
    ends, results = [], []
    for draws in (1, 5):  # what happened to the global generator before does not matter
        torch.rand(draws)
        student = damaged(tiny_bert)
        results.append(asdict(run_training(student, tiny_bert, [{"kind": "embedding"}], dropout=dropout)))
        ends.append(weights_of(student))
    assert same(*ends)
    for result in results:
        del result["tokens_per_s"]
    assert results[0] == results[1]


def test_training_leaves_the_global_generator_alone(tiny_bert, damaged, run_training):
    state = torch.get_rng_state()
    run_training(damaged(tiny_bert), tiny_bert, HIDDEN, dropout=True)
    assert torch.equal(state, torch.get_rng_state())


def test_another_seed_ends_elsewhere(tiny_bert, damaged, run_training):
    ends = []
    for seed in (0, 1):
        student = damaged(tiny_bert)
        run_training(student, tiny_bert, HIDDEN, seed=seed)
        ends.append(weights_of(student))
    assert not same(*ends)


def test_accumulating_two_batches_is_one_of_twice_the_size(tiny_bert, damaged, run_training):
    ends = []
    for batch_size, accumulate in ((16, 1), (8, 2)):
        student = damaged(tiny_bert).double()
        run_training(
            student, copy.deepcopy(tiny_bert).double(), HIDDEN, batch_size=batch_size, accumulate=accumulate, steps=4
        )
        ends.append(weights_of(student))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-6, atol=1e-6)
    assert not same(ends[0], weights_of(damaged(tiny_bert).double()))


def test_the_student_ends_in_eval_mode_without_gradients_and_the_teacher_untouched(tiny_bert, damaged, run_training):
    student, teacher_before = damaged(tiny_bert), weights_of(tiny_bert)
    run_training(student, tiny_bert, HIDDEN, dropout=True)
    assert not any(module.training for module in student.modules())
    assert not any(value.requires_grad or value.grad is not None for value in student.parameters())
    assert same(weights_of(tiny_bert), teacher_before)


def test_a_few_steps_lower_the_held_out_loss(tiny_llama, damaged, run_training):
    options = {"steps": 30, "learning_rate": 1e-3, "freeze": ()}
    result = run_training(damaged(tiny_llama), tiny_llama, [{"kind": "kl"}], **options)
    assert result.held_out_loss_after < 0.7 * result.held_out_loss_before
    assert result.best_step > 0


def test_weights_that_only_got_worse_are_not_kept(tiny_bert, damaged, run_training):
    student = damaged(tiny_bert, size=1e-4)
    before = weights_of(student)
    result = run_training(student, tiny_bert, HIDDEN, learning_rate=0.5)
    assert result.best_step == 0
    assert result.held_out_loss_after == result.held_out_loss_before
    assert same(weights_of(student), before)


def test_parts_are_reported_alone_and_the_total_is_weighted(tiny_bert, damaged, run_training):
    losses = [{"kind": "embedding", "weight": 2.0}, {"kind": "hidden"}, {"kind": "hidden", "measure": "cosine"}]
    result = run_training(damaged(tiny_bert), tiny_bert, losses)
    parts = result.parts_before
    assert list(parts) == ["embedding", "hidden[1]", "hidden[2]"]
    total = 2 * parts["embedding"] + parts["hidden[1]"] + parts["hidden[2]"]
    assert result.held_out_loss_before == pytest.approx(total)


def test_only_chosen_parameters_move(tiny_bert, damaged, run_training):
    student = damaged(tiny_bert)
    before = weights_of(student)
    result = run_training(student, tiny_bert, HIDDEN, train=("encoder.*",), freeze=("*.bias",), learning_rate=1e-3)
    moved = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("encoder.") and not name.endswith(".bias") for name in moved)
    assert result.trained_params == sum(before[name].numel() for name in moved)


def test_a_head_over_the_vocabulary_rests_with_its_table_unless_something_is_said(tiny_llama, tiny_bert):
    every, table = dict(tiny_llama.named_parameters()), "model.embed_tokens.weight"
    assert tiny_llama.get_output_embeddings().weight is every[table]
    assert choose_parameters(tiny_llama, ("*",), None).keys() == every.keys() - {table}
    assert choose_parameters(tiny_llama, ("*",), ()).keys() == every.keys()
    assert choose_parameters(tiny_llama, ("*embed*",), None).keys() == {table}
    assert choose_parameters(tiny_bert, ("*",), None).keys() == dict(tiny_bert.named_parameters()).keys()


def test_a_head_in_factors_learns():
    student = tiny_student("llama")
    factors = {"keep": 0.5, "embeddings": "low_rank", "round_to": 2}
    TensorDecomposition.model_validate(factors).apply(student, generator=torch.Generator())
    chosen = choose_parameters(student.model, ("*",), None)
    assert chosen.keys() == dict(student.model.named_parameters()).keys()


def test_the_rate_of_language_models_falls_with_the_width(tiny_llama, tiny_bert, damaged, run_training):
    assert default_learning_rate(576, writes_text=True) == pytest.approx(3.5e-4, rel=0.01)
    assert default_learning_rate(4096, writes_text=True) == pytest.approx(4.9e-5, rel=0.01)
    result = run_training(damaged(tiny_llama), tiny_llama, [{"kind": "kl"}], steps=2)
    assert result.learning_rate == 5e-4, "narrow models get no more"
    assert run_training(damaged(tiny_bert), tiny_bert, HIDDEN, steps=2).learning_rate == 1e-4


def test_a_pattern_that_matches_nothing_offers_a_near_one(tiny_bert):
    with pytest.raises(CompressKitError, match="matches no parameter") as caught:
        choose_parameters(tiny_bert, ("*",), ("embeddings.word_embeddings.wight",))
    assert "did you mean 'embeddings.word_embeddings.weight'?" in str(caught.value)


def test_freezing_everything_is_refused(tiny_bert):
    with pytest.raises(CompressKitError, match="every parameter is frozen"):
        choose_parameters(tiny_bert, ("*",), ("*",))


def test_a_model_of_integers_alone_is_refused_with_the_order_that_works():
    model = nn.Module()
    model.register_buffer("codes", torch.zeros(4, dtype=torch.int8))
    with pytest.raises(CompressKitError, match="no float weight left") as caught:
        choose_parameters(model, ("*",), ())
    assert "move distill before quantize" in str(caught.value)


def with_shared_factors(model):
    """Queries and keys as two factors of which they share the thin one, values with a pivoted one."""
    for block in model.model.layers:
        attention = block.self_attn
        with torch.random.fork_rng():
            torch.manual_seed(0)
            attention.q_proj = LowRankLinear(32, 32, 8, bias=False)
            attention.k_proj = LowRankLinear(32, 16, 8, bias=True, shares=attention.q_proj)
            attention.v_proj = LowRankLinear(32, 16, 8, bias=False, pivot=True)
    return model


def test_factors_learn_in_turns_and_everything_else_always(tiny_llama, damaged, run_training, monkeypatch):
    student, moved, real = with_shared_factors(damaged(tiny_llama)), [], Learner.step

    def step(self, number, batches):
        before = weights_of(self.student)
        parts = real(self, number, batches)
        moved.append({name for name, value in weights_of(self.student).items() if not torch.equal(before[name], value)})
        return parts

    monkeypatch.setattr(Learner, "step", step)
    run_training(student, tiny_llama, [{"kind": "kl"}], steps=7, turns=2, freeze=())
    names = {name for name, _ in student.named_parameters()}
    wide = {name for name in names if name.endswith(".expand.weight")}
    thin = {name for name in names if ".reduce." in name}
    assert (len(wide), len(thin)) == (6, 4)
    assert moved == [names - thin] * 2 + [names - wide] * 2 + [names - thin] * 2 + [names - wide]


def test_turns_without_both_factors_are_refused(tiny_llama, run_training):
    with pytest.raises(CompressKitError, match="turns: the model has no low-rank layer"):
        run_training(tiny_llama, tiny_llama, [{"kind": "kl"}], turns=2)
    student = with_shared_factors(copy.deepcopy(tiny_llama))
    with pytest.raises(CompressKitError, match="turns: no A of a low-rank layer learns"):
        run_training(student, tiny_llama, [{"kind": "kl"}], turns=2, freeze=("*.reduce.*",))


class _FailingTeacher(LiveTeacher):
    """Gives NaN from its call number `bad_call` on."""

    def __init__(self, model, bad_call):
        super().__init__(model)
        self.calls, self.bad_call = 0, bad_call

    def __call__(self, batch, rows, needs):
        outputs = super().__call__(batch, rows, needs)
        self.calls += 1
        if self.calls >= self.bad_call:
            outputs.hidden[-1].fill_(math.nan)
        return outputs


def test_a_loss_that_is_no_number_stops_with_its_step_and_keeps_the_last_good_weights(
    tiny_bert, damaged, run_training, monkeypatch
):
    # The 12 held-out sequences are two batches: calls 1 and 2 measure step 0, then 2 steps, 2 measures, 2 steps, 2
    # measures, and call 11 is step 5. A rate that hardly moves the weights makes every measured step the best so far.
    after, step = {}, Learner.step

    def noted(self, number, batches):
        parts = step(self, number, batches)
        after[number + 1] = weights_of(self.student)
        return parts

    monkeypatch.setattr(Learner, "step", noted)
    student = damaged(tiny_bert)
    watched = _FailingTeacher(tiny_bert, 11)
    with pytest.raises(RunFailedError, match=r"step 5 of 6: the loss is .*nan.*weights of step 4 are kept"):
        run_training(student, watched, HIDDEN, steps=6, learning_rate=1e-4)
    assert watched.calls == 11
    assert sorted(after) == [1, 2, 3, 4]
    assert same(weights_of(student), after[4])
    assert not same(after[4], after[3])
    assert not any(value.requires_grad for value in student.parameters())


def test_a_teacher_that_is_wrong_from_the_start_leaves_the_student_as_it_was(tiny_bert, damaged, run_training):
    student = damaged(tiny_bert)
    with pytest.raises(RunFailedError, match="before any step"):
        run_training(student, _FailingTeacher(tiny_bert, 1), HIDDEN)
    assert same(weights_of(student), weights_of(damaged(tiny_bert)))


def test_a_teacher_remembers_sentences_and_runs_only_new_ones(tiny_bert, sequences):
    teacher, needs = LiveTeacher(tiny_bert), Embedding.needs
    seen = []
    hook = tiny_bert.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    first = collate(sequences, [3, 1, 2])
    again = collate(sequences, [2, 7, 3])
    early = teacher(first.batch, first.rows, needs).sentence
    late = teacher(again.batch, again.rows, needs).sentence
    hook.remove()
    assert seen == [3, 1]
    assert torch.equal(late[0], early[2])
    assert torch.equal(late[2], early[0])
    fresh = LiveTeacher(tiny_bert)(again.batch, again.rows, needs).sentence
    torch.testing.assert_close(late, fresh)


def test_a_single_sequence_is_refused(tiny_bert, damaged, run_training):
    with pytest.raises(CompressKitError, match="1 training sequences are too few"):
        run_training(damaged(tiny_bert), tiny_bert, HIDDEN, text=Sequences([[5, 6, 7]], 0))


def test_a_step_larger_than_the_text_repeats_it(sequences):
    few = Sequences(sequences.rows[:2], 0)
    steps = training_steps(few, [1], batch_size=4, accumulate=1, max_length=None, generator=torch.Generator())
    assert next(steps)[0].rows == [1, 1, 1, 1]


def test_tokens_of_a_prompt_count_nothing_and_where_the_answer_begins_counts():
    prompt = torch.tensor([[True, True, False, True, False], [False, False, True, True, True]])
    assert answers_alone(prompt, next_tokens=False).tolist() == (~prompt).float().tolist()
    assert answers_alone(prompt, next_tokens=True).tolist() == [[0, 1, 0, 1, 1], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_bert"])
def test_the_loss_of_text_with_prompts_is_that_of_the_answers(family, damaged, run_training, sequences, request):
    teacher = request.getfixturevalue(family)
    draw = torch.Generator().manual_seed(2)
    prompts = [(torch.rand(len(row), generator=draw) < 0.4).tolist() for row in sequences.rows]
    text = Sequences(sequences.rows, 0, prompts)
    student = damaged(teacher, size=0.2)
    before = copy.deepcopy(student)
    result = run_training(student, teacher, HIDDEN, text=text, steps=4, learning_rate=1e-3)
    _, held_out = split_held_out(120, 128, generator=torch.Generator().manual_seed(0))
    total, count = 0.0, 0
    for row in held_out:
        ids, asks = torch.tensor([text.rows[row]]), torch.tensor([prompts[row]])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ours, theirs = (observe(model, batch, frozenset({"hidden"})).hidden[1:] for model in (before, teacher))
        counts = answers_alone(asks, next_tokens=family == "tiny_llama")
        total += sum(float((counts * relative_error(a, b)).sum()) for a, b in zip(ours, theirs, strict=True)) / 2
        count += float(counts.sum())
    assert result.held_out_loss_before == pytest.approx(total / count, rel=1e-5)
    assert result.held_out_loss_after < result.held_out_loss_before


def test_text_that_is_all_prompt_teaches_nothing_and_breaks_nothing(tiny_llama, damaged, run_training, sequences):
    text = Sequences(sequences.rows, 0, [[True] * len(row) for row in sequences.rows])
    student = damaged(tiny_llama)
    before = weights_of(student)
    result = run_training(student, tiny_llama, [{"kind": "kl", "alpha": 0.5}, {"kind": "embedding"}], text=text)
    assert result.held_out_loss_before == result.held_out_loss_after == 0
    assert same(before, weights_of(student))
