import copy
import math
from typing import get_args

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from compresskit.distill.lineage import even_layer
from compresskit.distill.losses import KL, LOSSES, AttentionMaps, Embedding, Hidden, Relation
from compresskit.distill.losses.contrastive import info_nce
from compresskit.distill.losses.embedding import cosine_distance, relative_error, similarity_kl
from compresskit.distill.losses.hidden import normalised_error
from compresskit.distill.losses.kl import logits_of, next_token_cross_entropy
from compresskit.distill.losses.relation import relation_kl
from compresskit.distill.outputs import Outputs, Projection, StepWeights, has_head, observe, step_weights
from compresskit.distill.token_counts import count_tokens
from compresskit.errors import CompressKitError
from compresskit.kernels.divergence import MIXED, Kind
from compresskit.kernels.linear_kl import Head
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
    assert kinds == ["attention", "contrastive", "embedding", "hidden", "kl", "relation"]
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


@pytest.mark.parametrize("kind", sorted(set(every_loss()) - {"contrastive"}))
def test_a_student_equal_to_its_teacher_has_no_loss(kind, tiny_llama):
    loss, batch = LOSSES[kind](), batch_of([7, 4])
    (weights,) = step_weights([batch["attention_mask"]])
    outputs = observe(tiny_llama, batch, loss.wants(tiny_llama))
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
            target = observe(tiny_llama, batch, loss.wants(tiny_llama))
        value = loss(observe(student, batch, loss.wants(student)), target, batch, weights)
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
    value = loss(
        observe(student, batch, loss.wants(student)), observe(tiny_llama, batch, loss.wants(tiny_llama)), batch, nothing
    )
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


@pytest.mark.parametrize("loss", [Embedding(mse=1.0, cosine=0), Embedding()])
def test_embeddings_of_different_widths_are_refused_with_the_loss_that_suits(loss, tiny_bert):
    narrow = BertModel(small_config())
    with pytest.raises(CompressKitError, match=r"16.*32") as caught:
        loss.check(narrow, tiny_bert)
    assert "cosine: 0" in str(caught.value)
    Embedding(cosine=0).check(narrow, tiny_bert)


def test_layers_that_there_are_not_are_refused(tiny_bert):
    Hidden(layers=(0, 2)).check(tiny_bert, copy.deepcopy(tiny_bert))
    with pytest.raises(CompressKitError, match="3 is no layer"):
        Hidden(layers=(3,)).check(tiny_bert, tiny_bert)


def test_rows_without_a_token_count_for_nothing():
    masks = [torch.tensor([[1, 1, 1], [0, 0, 0]]), torch.tensor([[1, 0, 0]])]
    weights = step_weights(masks)
    assert weights[0].row.tolist() == [0.5, 0.0]
    assert weights[1].row.tolist() == [0.5]


@pytest.mark.parametrize("kind", every_loss())
def test_a_batch_that_is_all_masked_has_no_loss_and_no_gradient(kind, tiny_llama, damaged):
    loss, batch = LOSSES[kind](), batch_of([7, 4])
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    (weights,) = step_weights([batch["attention_mask"]])
    student = damaged(tiny_llama).requires_grad_(True)
    wants = loss.wants(student)
    value = loss(observe(student, batch, wants), observe(tiny_llama, batch, wants), batch, weights)
    value.backward()
    assert value == 0
    assert all(torch.count_nonzero(p.grad) == 0 for p in student.parameters() if p.grad is not None)


def expected_divergence(kind, p, q):
    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    jsd = 0.3 * p + 0.7 * q
    return {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": 0.3 * kl(p, jsd) + 0.7 * kl(q, jsd),
        "skew_forward_kl": kl(p, 0.3 * p + 0.7 * q),
        "skew_reverse_kl": kl(q, 0.3 * q + 0.7 * p),
        "total_variation": 0.5 * (p - q).abs().sum(-1),
    }[kind]


@pytest.mark.parametrize("kind", get_args(Kind))
def test_each_divergence_is_its_formula_times_the_squared_temperature(kind, tiny_llama, damaged):
    batch, student = batch_of([7, 4]), damaged(tiny_llama, size=0.2)
    (weights,) = step_weights([batch["attention_mask"]])
    ours, theirs = (observe(model, batch, KL.needs) for model in (student, tiny_llama))
    q, p = ((logits_of(one.predictions).double() / 2).softmax(-1) for one in (ours, theirs))
    expected = 4 * (weights.token * expected_divergence(kind, p, q)).sum()
    loss = KL(divergence=kind, temperature=2, mix=0.3 if kind in MIXED else None)
    assert float(loss(ours, theirs, batch, weights)) == pytest.approx(float(expected), rel=1e-4)


def test_a_mix_where_nothing_is_mixed_is_refused():
    with pytest.raises(ValueError, match="mix is not read by forward_kl"):
        KL(mix=0.3)
    assert KL(divergence="jsd")._divergence().mix == 0.5
    assert KL(divergence="skew_forward_kl")._divergence().mix == 0.1


def test_labels_alone_ask_nothing_of_the_teacher(tiny_llama, damaged):
    batch, student, loss = batch_of([7, 4]), damaged(tiny_llama), KL(alpha=1.0)
    (weights,) = step_weights([batch["attention_mask"]])
    assert loss.asks(student) == frozenset()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    ours = loss(observe(student, batch, loss.wants(student)), Outputs(), batch, weights)
    torch.testing.assert_close(ours, student(**batch, labels=labels).loss)


def test_labels_alone_make_no_logits_and_give_their_gradients(tiny_llama, damaged, monkeypatch):
    batch, student = batch_of([7, 4]), damaged(tiny_llama).requires_grad_(True)
    (weights,) = step_weights([batch["attention_mask"]])
    leaves = [student.get_output_embeddings().weight, student.model.layers[0].mlp.down_proj.weight]
    plain = next_token_cross_entropy(student(**batch).logits, batch["input_ids"], weights.next_token)
    expected = torch.autograd.grad(plain, leaves)
    loss, ours = KL(alpha=1.0), observe(student, batch, KL.needs)
    assert isinstance(ours.predictions, Projection)
    monkeypatch.setattr(Head, "logits_of_reduced", None)
    grads = torch.autograd.grad(loss(ours, Outputs(), batch, weights), leaves)
    torch.testing.assert_close(grads, expected)


def test_a_teacher_of_other_classes_is_refused():
    three, four = (BertForSequenceClassification(small_config(num_labels=count)) for count in (3, 4))
    with pytest.raises(CompressKitError, match="3 classes apart, the teacher 4"):
        KL().check(three, four)


def test_a_weight_moves_along_a_line_and_may_not_be_nothing():
    loss = Hidden(weight=1.0, weight_end=0.2)
    assert [loss.weight_at(step, 5) for step in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert Hidden(weight=0.5).weight_at(3, 5) == 0.5
    with pytest.raises(ValueError, match="0 from beginning to end"):
        Hidden(weight=0)


def test_normalised_error_is_free_of_scale_and_shift_and_at_most_four():
    rows = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(normalised_error(3 * rows + 5, rows), torch.zeros(3).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised_error(-rows, rows), torch.full((3,), 4.0).double(), rtol=1e-4, atol=0)


def test_modules_are_matched_instead_of_hidden_states(tiny_bert, damaged):
    batch, student = batch_of([6, 3]), damaged(tiny_bert)
    (weights,) = step_weights([batch["attention_mask"]])
    loss = Hidden(modules="*attention.self.query")
    wants = loss.wants(student)
    assert sorted(one.module for one in wants) == [f"encoder.layer.{k}.attention.self.query" for k in (0, 1)]
    ours, theirs = (observe(model, batch, wants) for model in (student, tiny_bert))
    errors = [(weights.token * relative_error(ours.inner[one], theirs.inner[one])).sum() for one in wants]
    torch.testing.assert_close(loss(ours, theirs, batch, weights), torch.stack(errors).mean())
    with pytest.raises(CompressKitError, match="matches no module"):
        Hidden(modules="*quary").check(student, tiny_bert)
    with pytest.raises(CompressKitError, match="two hidden losses"):
        Hidden(modules="*query", layers=(1,)).check(student, tiny_bert)


def test_a_wider_teacher_is_reached_through_projections_of_the_chosen_layers(tiny_bert):
    narrow, batch = BertModel(small_config()).eval(), batch_of([6, 3])
    (weights,) = step_weights([batch["attention_mask"]])
    loss = Hidden(layers=(0, 2))
    bridge = loss.bridge(narrow, tiny_bert)
    assert loss.bridge(tiny_bert, tiny_bert) is None
    assert [tuple(value.shape) for value in bridge.parameters()] == [(32, 16)] * 2
    ours, theirs = (observe(model, batch, loss.needs) for model in (narrow, tiny_bert))
    loss(bridge(ours), theirs, batch, weights).backward()
    assert all(value.grad.abs().sum() > 0 for value in bridge.parameters())
    torch.testing.assert_close(bridge(ours).hidden[2].norm(dim=-1), ours.hidden[2].norm(dim=-1))


def test_info_nce_is_the_cross_entropy_of_knowing_ones_own_teacher():
    student, teacher = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = torch.cosine_similarity(student[:, None], teacher[None], dim=-1) / 0.1
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(5))
    weight = torch.full((5,), 0.2, dtype=torch.float64)
    torch.testing.assert_close(info_nce(student, teacher, row_weight=weight, temperature=0.1), expected)


def test_a_sentence_that_the_teacher_embeds_as_another_is_no_negative_of_it():
    student, teacher = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    teacher[2] = teacher[0]
    weight = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert info_nce(student, teacher, row_weight=weight, temperature=0.1) == 0  # weight 0 is no negative either
    both = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    assert info_nce(student, teacher, row_weight=both, temperature=0.1).abs() < 1e-12


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_relations_do_not_see_a_rotation_of_each_head_and_compare_any_width(heads):
    generator = torch.Generator().manual_seed(0)
    rows, mask = torch.randn(2, 5, 8, dtype=torch.float64, generator=generator), torch.ones(2, 5)
    token = torch.full((2, 5), 0.1, dtype=torch.float64)
    size = 8 // heads
    rotation = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
    rotated = (rows.unflatten(-1, (heads, size)) @ rotation).flatten(-2)
    assert relation_kl(rotated, rows, mask, token=token, heads=heads).abs() < 1e-12
    wider = torch.randn(2, 5, 24, dtype=torch.float64, generator=generator)
    assert relation_kl(rows, wider, mask, token=token, heads=heads) > 0


def test_relation_kl_is_the_divergence_of_softmaxes_of_scaled_products():
    student, teacher = torch.randn(2, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    token = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    expected = 0.0
    for head in (slice(0, 2), slice(2, 4)):
        p, q = ((x[0, :2, head] @ x[0, :2, head].T / 2**0.5).softmax(-1) for x in (teacher, student))
        expected += 0.5 * 0.5 * float((p * (p / q).log()).sum())
    ours = relation_kl(student, teacher, torch.tensor([[1, 1, 0]]), token=token, heads=2)
    assert float(ours) == pytest.approx(expected, rel=1e-6)


def test_relation_heads_that_do_not_divide_and_layers_without_attention_are_refused(tiny_bert):
    batch = batch_of([6, 3])
    (weights,) = step_weights([batch["attention_mask"]])
    loss = Relation(heads=3)
    outputs = observe(tiny_bert, batch, loss.wants(tiny_bert))
    with pytest.raises(CompressKitError, match="3 heads do not divide both"):
        loss(outputs, outputs, batch, weights)
    with pytest.raises(CompressKitError, match=r"no attention in block 3 \(there are some in: 1, 2\)"):
        Relation(layer=3).check(tiny_bert, tiny_bert)
    with pytest.raises(CompressKitError, match="no attention in block 9"):
        AttentionMaps(layers=(1, 9)).check(tiny_bert, tiny_bert)


def test_attention_maps_are_those_that_the_model_computes_with(tiny_llama):
    batch = batch_of([6, 6])
    (maps,) = AttentionMaps(layers=(2,)).wants(tiny_llama)
    with torch.no_grad():
        seen = observe(tiny_llama, batch, frozenset({maps})).inner[maps]
    assert seen.shape == (2, 4, 6, 6)
    torch.testing.assert_close(seen.sum(-1), torch.ones(2, 4, 6))
    assert torch.equal(seen.triu(1), torch.zeros_like(seen))
    assert tiny_llama.config._attn_implementation == "sdpa"


def test_tsld_counts_surprise_and_entropy_doubt(tiny_llama):
    batch = batch_of([7, 4])
    predictions = observe(tiny_llama, batch, KL.needs).predictions
    log_p = logits_of(predictions).log_softmax(-1)
    surprise = -log_p[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    tsld = count_tokens("tsld", predictions, batch)
    torch.testing.assert_close(tsld[0, :6], (surprise[0] / 10).exp())
    assert tsld[0, 6] == tsld[1, 3] == 1
    doubt = torch.special.entr(log_p.exp()).sum(-1) / math.log(log_p.shape[-1])
    torch.testing.assert_close(count_tokens("entropy", predictions, batch), doubt)
    (weights,) = step_weights([batch["attention_mask"]], [tsld])
    torch.testing.assert_close(weights.token[1, :3] / weights.token[0, 0], tsld[1, :3] / tsld[0, 0])
    assert float(weights.token.sum()) == pytest.approx(1)
    assert float(weights.next_token.sum()) == pytest.approx(1)


def test_relation_heads_that_no_width_can_be_cut_into_are_refused_before_any_weight_is_read(tiny_bert):
    width = tiny_bert.config.hidden_size
    Relation(heads=2).check(tiny_bert, tiny_bert)
    with pytest.raises(CompressKitError, match=f"relation.heads: 7 heads do not divide the {width} query channels"):
        Relation(heads=7).check(tiny_bert, tiny_bert)
