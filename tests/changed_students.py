"""Tiny students, changed by hand as passes would change them, for tests of the export."""

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from families import task_of, tiny
from tiny_tokenizer import make_tokenizer
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from compresskit.data import Corpus, Sequences
from compresskit.layers.grid import quantize_weight
from compresskit.layers.low_rank import LowRankLinear
from compresskit.passes.quantize import Quantize
from compresskit.student import Student
from compresskit.surgery.edits import MakeLowRank, QuantizeEmbedding, QuantizeLinears, get_module

#: Options of an export that proves much and takes little.
FAST = {"baselines": False, "rounds": 3, "threads": 1, "texts": 24, "accuracy_level": 0}


def random_corpus(vocabulary: int, longest: int = 24) -> Corpus:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, longest, (24,), generator=draw).tolist()
    rows = [torch.randint(5, vocabulary, (n,), generator=draw).tolist() for n in lengths]
    return Corpus(Sequences([[1]], 0), Sequences([[2]], 0), Sequences(rows, 0), "test")


def make_student(task: str, blocks: int = 1) -> Student:
    tokenizer = make_tokenizer()
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": blocks, "num_attention_heads": 4}
    shape |= {"intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
    models = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            if task == "feature-extraction":
                model = BertModel(BertConfig(**shape)).eval()
            else:
                model = LlamaForCausalLM(
                    LlamaConfig(**shape, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
                ).eval()
            for name, value in model.named_parameters():
                if value.ndim == 2 and "embed" not in name:
                    value.data.normal_(0, 0.3)
        models.append(model)
    return Student(models[0], models[1], tokenizer, task, random_corpus(len(tokenizer)))


def quantised_student(family: str, **options: Any) -> Student:
    """A quantised tiny model whose vocabulary is the tokenizer's."""
    tokenizer = make_tokenizer()
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 90, (n,), generator=draw).tolist() for n in (4, 9, 13, 6, 20, 11, 7, 16)]
    texts = Sequences(rows, 0)
    original = tiny(family, vocab_size=len(tokenizer))
    corpus = Corpus(texts, texts, texts, "test")
    student = Student(copy.deepcopy(original), original, tokenizer, task_of(family), corpus)
    Quantize(**{"anchor": 0, "embeddings": None, **options}).apply(student, generator=torch.Generator())
    return student


def linears(student: Student) -> list[str]:
    names = [name for name, module in student.model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in names if name not in ("lm_head", "pooler.dense")]


def factorise(student: Student, layers: list[tuple[str, ...]], rank: int) -> None:
    """Share one factor among each group, from the SVD of their stacked weights."""
    for names in layers:
        stacked = torch.cat([get_module(student.model, name).weight.data for name in names])  # type: ignore[arg-type]
        biases = [get_module(student.model, name).bias for name in names]
        left, values, right = torch.linalg.svd(stacked, full_matrices=False)
        student.edit(MakeLowRank(targets=names, rank=rank, bias=False))
        row = 0
        for name, bias in zip(names, biases, strict=True):
            layer = get_module(student.model, name)
            assert isinstance(layer, LowRankLinear)
            layer.expand.weight.data = (left[:, :rank] * values[:rank])[row : row + layer.out_features].clone()
            row += layer.out_features
            if bias is not None:
                layer.expand.bias.data.copy_(bias.data)  # type: ignore[arg-type]
        get_module(student.model, names[0]).reduce.weight.data = right[:rank].clone()  # type: ignore[union-attr]


def quantize_linears(student: Student, names: list[str], **options) -> None:
    old = {name: get_module(student.model, name) for name in names}
    edit = QuantizeLinears(targets=tuple(names), **options)
    student.edit(edit)
    for name, linear in old.items():
        new = get_module(student.model, name)
        values = quantize_weight(
            linear.weight,
            bits=options["bits"],
            group_size=options["group_size"],
            symmetric=options.get("symmetric"),
            clip_points=1,  # type: ignore[arg-type]
            whole=edit.whole,
        )
        new.set_codes(values)  # type: ignore[operator]
        if options.get("act") == "int8_static":
            new.set_input_range(torch.tensor(-4.0), torch.tensor(4.0))  # type: ignore[operator]
        if linear.bias is not None:
            new.bias.data.copy_(linear.bias.data)  # type: ignore[arg-type, union-attr]


def quantize_table(student: Student, name: str, *, bits: int, head: str | None = None) -> None:
    weight = get_module(student.model, name).weight.data  # type: ignore[union-attr]
    student.edit(QuantizeEmbedding(target=name, head=head, bits=bits, group_size=0))  # type: ignore[arg-type]
    get_module(student.model, name).set_codes(  # type: ignore[operator]
        quantize_weight(weight, bits=bits, group_size=0, clip_points=1)  # type: ignore[arg-type]
    )


_WITHOUT_TORCH = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "compresskit"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Absent())
exec(compile(sys.argv[1], "README.md", "exec"), {})
"""


def run_readme(folder: Path) -> str:
    """What the Python in an exported folder's README prints, in a process where torch cannot be imported."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    command = [sys.executable, "-c", _WITHOUT_TORCH, code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
