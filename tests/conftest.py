"""Tiny random models on disk and text that their tokenizer knows: mechanics tested in seconds, without a network."""

import os
import random
from pathlib import Path

# Both are read when their libraries are imported: no test reaches the network, and cores are shared.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch
from tiny_tokenizer import WORDS, make_tokenizer
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, so that no core waits for them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a test reaches the user's cache."""
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT: 2 layers, width 32, 4 heads of 8, FFN 64; safetensors, config and tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama: 2 layers, width 32, 4 query heads of 8 over 2 key/value heads, FFN 64, head tied to the table."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 400 different sentences of 5 to 25 known words, one a line."""
    draw = random.Random(0)
    lines = {" ".join(draw.choices(WORDS, k=draw.randint(5, 25))) for _ in range(420)}
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text("\n".join(sorted(lines)[:400]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tiny_data(tiny_text_file: Path) -> dict[str, object]:
    """A recipe's `data` for the tiny models: enough for every part, small enough for seconds."""
    sizes = {"max_length": 32, "calibration": 8, "training": 16, "evaluation": 12}
    return {"source": "text", "path": str(tiny_text_file), **sizes}
