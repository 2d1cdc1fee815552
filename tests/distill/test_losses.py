import copy

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from compresskit.distill.losses import KL, LOSSES, Embedding, Hidden
from compresskit.distill.losses.embedding import cosine_distance, similarity_kl
from compresskit.distill.losses.hidden import even_layer, relative_error
from compresskit.distill.losses.kl import logits_of, next_token_cross_entropy
from compresskit.distill.outputs import StepWeights, has_head, observe, step_weights
from compresskit.errors import CompressKitError
from compresskit.sentence import MEAN_POOLED


def batch_of(lengths, vocabulary=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    ids = torch.randint(5, vocabulary, mask.shape, generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask}


def every_loss():
    kinds = sorted(LOSSES)
    assert kinds == ["embedding", "hidden", "kl"]
    return kinds


def small_config(**options):
    return BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        **options,
    )


@pytest.mark.parametrize("kind", every_loss())
def test_a_student_equal_to_its_teacher_has_no_loss(kind, tiny_llama):
    loss, batch = LOSSES[kind](), batch_of([7, 4])
    (weights,) = step_weights([batch["attention_mask"]])
    outputs = observe(tiny_llama, batch, loss.needs)
    assert loss(outputs, outputs, batch, weights).abs() < 1e-6


@pytest.mark.parametrize("kind", every_loss())
def test_padding_changes_neither_loss_nor_gradient(kind, tiny_llama, damaged):
    loss, short = LOSSES[kind](), batch_of([6, 6])
    longer = {name: torch.nn.functional.pad(values, (0, 5)) for name, values in short.items()}
    results = []
    for batch in (short, longer):
        student = damaged(tiny_llama).requires_grad_(True)
        (weights,) = step_weights([batch["attention_mask"]])
        with torch.no_grad():
            target = observe(tiny_llama, batch, loss.needs)
        value = loss(observe(student, batch, loss.needs), target, batch, weights)
        value.backward()
        assert value > 0
        results.append((value.detach(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}))
    assert len(results[0][1]) > 10
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", every_loss())
def test_zero_weights_give_zero_with_a_zero_gradient(kind, tiny_llama, damaged):
    loss, batch = LOSSES[kind](), batch_of([7, 4])
    nothing = StepWeights(*(torch.zeros(shape) for shape in ((2, 7), (2,), (2, 6))))
    student = damaged(tiny_llama).requires_grad_(True)
    value = loss(observe(student, batch, loss.needs), observe(tiny_llama, batch, loss.needs), batch, nothing)
    value.backward()
    assert value == 0
    assert all(torch.count_nonzero(p.grad) == 0 for p in student.parameters() if p.grad is not None)


def test_step_weights_sum_to_one_over_all_batches_of_the_step():
    masks = [batch_of(lengths)["attention_mask"] for lengths in ([5, 2, 3], [9])]
    weights = step_weights(masks)
    for name in ("token", "row", "next_token"):
        assert sum(getattr(part, name).double().sum() for part in weights) == pytest.approx(1, abs=1e-6)
    assert torch.equal(weights[0].token > 0, masks[0] > 0)
    assert torch.count_nonzero(weights[0].next_token) == 4 + 1 + 2


def test_pooling_is_the_mean_over_real_tokens():
    hidden = torch.randn(2, 4, 3, dtype=torch.float64)
    pooled = MEAN_POOLED.pool(hidden, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]))
    torch.testing.assert_close(pooled[0], hidden[0, :2].mean(0))
    torch.testing.assert_close(pooled[1], hidden[1].mean(0))


def test_similarity_kl_is_the_divergence_of_softmaxes_over_the_other_rows():
    student, teacher = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for i in range(5):
        others = [j for j in range(5) if j != i]
        p, q = (
            torch.tensor([float(torch.cosine_similarity(x[i], x[j], dim=0)) / 0.1 for j in others]).double().softmax(0)
            for x in (teacher, student)
        )
        expected += 0.2 * float((p * (p / q).log()).sum())
    ours = similarity_kl(student, teacher, row_weight=torch.full((5,), 0.2).double(), temperature=0.1)
    assert float(ours) == pytest.approx(expected, rel=1e-6)


def test_similarity_kl_ignores_rotation_and_width():
    rows = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(12, 8, dtype=torch.float64)).Q
    weight = torch.full((5,), 0.2, dtype=torch.float64)
    assert similarity_kl(rows @ rotation.T, rows, row_weight=weight, temperature=0.1).abs() < 1e-12


def test_similarity_of_one_sentence_is_nothing():
    row = torch.randn(1, 4, requires_grad=True)
    similarity_kl(row, torch.randn(1, 4), row_weight=torch.ones(1), temperature=0.1).backward()
    assert torch.count_nonzero(row.grad) == 0


def test_similarity_gradient_is_the_derivative_of_the_value():
    student, teacher = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.full((4,), 0.25, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda rows: similarity_kl(rows, teacher, row_weight=weight, temperature=0.3), student.requires_grad_()
    )


def test_cosine_distance_is_free_of_scale_and_relative_error_is_not():
    rows = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(cosine_distance(3 * rows, rows), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(relative_error(3 * rows, rows), torch.full((3,), 4.0, dtype=torch.float64))


def test_layers_are_mapped_evenly():
    assert [even_layer(k, 6, 6) for k in range(7)] == [0, 1, 2, 3, 4, 5, 6]
    assert [even_layer(k, 3, 6) for k in range(4)] == [0, 2, 4, 6]
    assert [even_layer(k, 4, 6) for k in range(5)] == [0, 2, 3, 5, 6]


def test_hidden_averages_over_the_layers_it_is_given(tiny_bert, damaged):
    batch, student = batch_of([6, 3]), damaged(tiny_bert)
    (weights,) = step_weights([batch["attention_mask"]])
    outputs = [observe(model, batch, frozenset({"hidden"})) for model in (student, tiny_bert)]
    first, second, both = (Hidden(layers=layers)(*outputs, batch, weights) for layers in ((1,), (2,), (1, 2)))
    torch.testing.assert_close(both, (first + second) / 2)
    torch.testing.assert_close(Hidden()(*outputs, batch, weights), both)
    assert first != second


def test_labels_of_a_language_model_are_its_next_tokens(tiny_llama):
    batch = batch_of([7, 4])
    (weights,) = step_weights([batch["attention_mask"]])
    logits = logits_of(observe(tiny_llama, batch, KL.needs).predictions)
    ours = next_token_cross_entropy(logits, batch["input_ids"], weights.next_token)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    torch.testing.assert_close(ours, tiny_llama(**batch, labels=labels).loss)


def test_alpha_mixes_divergence_and_labels(tiny_llama, damaged):
    batch, student = batch_of([7, 4]), damaged(tiny_llama)
    (weights,) = step_weights([batch["attention_mask"]])
    outputs = [observe(model, batch, KL.needs) for model in (student, tiny_llama)]
    labels = next_token_cross_entropy(logits_of(outputs[0].predictions), batch["input_ids"], weights.next_token)
    expected = 0.75 * KL()(*outputs, batch, weights) + 0.25 * labels
    torch.testing.assert_close(KL(alpha=0.25)(*outputs, batch, weights), expected)


def test_kl_of_a_classifier_counts_sequences_not_tokens():
    student, teacher = (BertForSequenceClassification(small_config(num_labels=3)).eval() for _ in range(2))
    batch = batch_of([9, 2])
    (weights,) = step_weights([batch["attention_mask"]])
    with torch.no_grad():
        ours, theirs = (observe(model, batch, KL.needs) for model in (student, teacher))
        expected = torch.nn.functional.kl_div(
            ours.predictions.log_softmax(-1), theirs.predictions.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        torch.testing.assert_close(KL()(ours, theirs, batch, weights), expected)


def test_a_head_is_what_a_model_has_beside_its_base(tiny_bert, tiny_llama):
    assert not has_head(tiny_bert)
    assert has_head(tiny_llama)


def test_sentences_of_a_model_with_a_head_are_those_of_its_base(tiny_llama):
    batch, needs = batch_of([7, 4]), frozenset({"sentence"})
    alone = observe(tiny_llama, batch, needs)
    assert alone.predictions is None
    beside = observe(tiny_llama, batch, frozenset({"sentence", "predictions"}))
    assert beside.predictions is not None
    torch.testing.assert_close(alone.sentence, beside.sentence)


def test_kl_on_a_model_without_a_head_names_the_loss_that_suits(tiny_bert):
    with pytest.raises(CompressKitError, match="has no head") as caught:
        KL().check(tiny_bert, tiny_bert)
    assert "kind: embedding" in str(caught.value)


def test_kl_refuses_a_head_that_regresses():
    model = BertForSequenceClassification(small_config(num_labels=1))
    with pytest.raises(CompressKitError, match="single number"):
        KL().check(model, model)


def test_alpha_needs_a_language_model():
    model = BertForSequenceClassification(small_config(num_labels=3))
    KL().check(model, model)
    with pytest.raises(CompressKitError, match=r"alpha 0\.5 mixes in labels"):
        KL(alpha=0.5).check(model, model)


@pytest.mark.parametrize("loss", [Hidden(), Embedding()])
def test_different_widths_are_refused_with_the_loss_that_suits(loss, tiny_bert):
    narrow = BertModel(small_config())
    with pytest.raises(CompressKitError, match=r"16.*32") as caught:
        loss.check(narrow, tiny_bert)
    assert "cosine: 0" in str(caught.value)
    Embedding(cosine=0).check(narrow, tiny_bert)


def test_layers_that_there_are_not_are_refused(tiny_bert):
    Hidden(layers=(0, 2)).check(tiny_bert, copy.deepcopy(tiny_bert))
    with pytest.raises(CompressKitError, match="3 is no layer"):
        Hidden(layers=(3,)).check(tiny_bert, tiny_bert)
