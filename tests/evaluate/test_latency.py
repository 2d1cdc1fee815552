"""Latency: strictly alternating calls, percentiles in milliseconds."""

import gc
import time

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from compresskit.evaluate import measure_latency, model_latency
from compresskit.evaluate.latency import random_batch


def test_callables_are_called_in_turn_warmup_and_all():
    calls: list[str] = []
    names = ("a", "b", "c")
    found = measure_latency({name: lambda name=name: calls.append(name) for name in names}, rounds=4, warmup=2)
    assert "".join(calls) == "abc" * 6
    assert list(found) == list(names)
    assert all(0 <= own["p50_ms"] <= own["p95_ms"] for own in found.values())


def test_figures_are_milliseconds_of_wall_time():
    found = measure_latency({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, rounds=5, warmup=0)
    assert 20 <= found["slow"]["p50_ms"] < 200
    assert found["fast"]["p50_ms"] < 5


def test_warmup_is_not_timed():
    pauses = iter([0.2, 0.0, 0.0, 0.0])
    found = measure_latency({"one": lambda: time.sleep(next(pauses))}, rounds=3, warmup=1)
    assert found["one"]["p95_ms"] < 150


def test_a_failing_call_leaves_garbage_collection_on():
    with pytest.raises(ZeroDivisionError):
        measure_latency({"bad": lambda: 1 / 0})
    assert gc.isenabled()


def test_no_rounds_or_nothing_to_time_is_a_programming_error():
    with pytest.raises(ValueError):
        measure_latency({"one": lambda: None}, rounds=0)
    with pytest.raises(ValueError):
        measure_latency({})


def test_the_timed_input_is_ordinary_tokens_and_always_the_same(tiny_bert_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert_folder)
    batch = random_batch(tokenizer, 3, 40)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 40)
    assert not set(batch["input_ids"].flatten().tolist()) & set(tokenizer.all_special_ids)
    assert torch.equal(batch["input_ids"], random_batch(tokenizer, 3, 40)["input_ids"])


def test_a_model_is_timed_without_gradients_and_keeps_its_mode(tiny_bert_folder):
    model = AutoModel.from_pretrained(tiny_bert_folder).train()
    seen = []
    model.register_forward_hook(lambda module, _args, _out: seen.append((module.training, torch.is_grad_enabled())))
    found = model_latency(model, AutoTokenizer.from_pretrained(tiny_bert_folder), length=16, rounds=4, warmup=1)
    assert seen == [(False, False)] * 5
    assert 0 < found["p50_ms"] <= found["p95_ms"]
    assert model.training
