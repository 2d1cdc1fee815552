import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from families import OTHERS, random_model
from safetensors.torch import load_file
from tiny_tokenizer import make_tokenizer
from transformers import (
    AutoModel,
    AutoModelForTextEncoding,
    BertConfig,
    BertModel,
    PretrainedConfig,
    RobertaConfig,
    RobertaForMaskedLM,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

import compresskit
from compresskit import run
from compresskit.errors import CompressKitError
from compresskit.float_types import FloatTypes
from compresskit.models import (
    check_weights,
    find_float_types,
    find_model,
    guess_task,
    load_config,
    load_empty,
    load_model,
    load_tokenizer,
    safetensors_source,
    task_of,
)
from compresskit.recipe import parse_recipe
from compresskit.surgery.depth_edits import find_stack
from compresskit.surgery.edits import get_module
from compresskit.surgery.sites import find_anatomy

_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}


@pytest.fixture
def folder(tiny_bert_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may harm."""
    return Path(shutil.copytree(tiny_bert_folder, tmp_path / "model"))


def refused(name: str | Path, **said: str) -> str:
    with pytest.raises(CompressKitError) as caught:
        find_model(name, **said)
    assert caught.value.exit_code == 2
    assert caught.value.fix
    return str(caught.value)


def test_a_folder_is_found_and_fingerprinted_by_its_contents(folder: Path, tiny_bert_folder: Path) -> None:
    assert find_model(folder).fingerprint == find_model(tiny_bert_folder).fingerprint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-6}))
    assert find_model(folder).fingerprint != find_model(tiny_bert_folder).fingerprint


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "pickled weights (pytorch_model.bin) can run code when loaded" in refused(folder)


def test_a_model_that_wants_its_own_code_is_refused(folder: Path) -> None:
    said = {"model_type": "my-bert", "auto_map": {"AutoModel": "modeling.MyBert"}}
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "modeling.py").write_text("raise SystemExit('this ran')")
    assert "wants trust_remote_code, and code from a model folder is never run" in refused(folder)


def test_own_code_beside_a_known_architecture_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling.MyBert"}}))
    (folder / "modeling.py").write_text("raise SystemExit('this ran')")
    assert type(load_model(find_model(folder), "feature-extraction")).__name__ == "BertModel"


@pytest.fixture
def wants_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An architecture that transformers carries, with code of its own for what it does not carry."""
    said = {
        "model_type": "deberta-v2",
        "auto_map": {"AutoModelForCausalLM": "mod.My", "AutoTokenizer": [None, "mod.MyTokenizer"]},
        "architectures": ["MyForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
    }
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "mod.py").write_text("raise SystemExit('this ran')")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "MyTokenizer", "auto_map": said["auto_map"]})
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the folder's code"))
    return folder


@pytest.mark.parametrize("load", [load_empty, load_model])
def test_own_code_for_a_task_that_the_architecture_lacks_is_never_asked_for(wants_code: Path, load) -> None:
    source = find_model(wants_code)
    assert guess_task(source) == "text-generation"
    with pytest.raises(CompressKitError, match="has code of its own for it, which is never run") as caught:
        load(source, "text-generation")
    assert caught.value.where == "task"
    assert "use feature-extraction" in str(caught.value.fix)


def test_own_code_of_a_tokenizer_is_never_asked_for(wants_code: Path) -> None:
    with pytest.raises(CompressKitError, match="the tokenizer cannot be read") as caught:
        load_tokenizer(find_model(wants_code))
    assert caught.value.fix


def test_a_folder_without_config_or_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors" in refused(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(folder)


def test_a_broken_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON" in refused(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [(b"[1]", "holds a list, not a mapping"), (b"\xff{", "config.json is not JSON"), (b"5", "holds a int")],
)
def test_a_config_that_is_no_mapping_is_refused(folder: Path, text: bytes, said: str) -> None:
    (folder / "config.json").write_bytes(text)
    assert said in refused(folder)


def change_config(folder: Path, **said: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **said}))
    return folder


def test_a_model_type_that_is_no_name_is_refused(folder: Path) -> None:
    assert "model_type ['bert'] is not built into transformers" in refused(change_config(folder, model_type=["bert"]))


def not_read(load: Callable[[], object]) -> str:
    with pytest.raises(CompressKitError) as caught:
        load()
    assert caught.value.exit_code == 2
    assert caught.value.where
    assert caught.value.fix
    return str(caught.value)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"hidden_size": "abc"}, "'hidden_size' expected int, got str"),
        ({"hidden_size": None}, "'hidden_size' expected int, got NoneType"),
        ({"id2label": 5}, "config.json cannot be read (AttributeError"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ({"hidden_act": "nope"}, "KeyError"),
        ({"pad_token_id": 9999}, "AssertionError"),
    ],
)
def test_a_config_that_describes_no_model_is_named(folder: Path, said: dict[str, object], expected: str) -> None:
    source = find_model(change_config(folder, **said))
    for load in (load_empty, load_model):
        assert expected in not_read(lambda load=load: load(source, "feature-extraction"))


@pytest.mark.parametrize("architectures", ["BertModel", 5, [5], None])
def test_architectures_that_name_nothing_leave_the_task_open(folder: Path, architectures: object) -> None:
    assert "say one of" in not_read(lambda: guess_task(find_model(change_config(folder, architectures=architectures))))


@pytest.mark.parametrize("keep", [0, 4, 0.5, 0.99])
def test_truncated_weights_are_named(folder: Path, keep: float) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: int(keep * len(weights)) if keep < 1 else int(keep)])
    for read in (load_model, check_weights, load_empty):
        said = not_read(lambda read=read: read(find_model(folder), "feature-extraction"))
        assert f"{folder}: the model cannot be read (SafetensorError" in said


def test_a_config_that_disagrees_with_the_weights_is_named(folder: Path) -> None:
    source = find_model(change_config(folder, intermediate_size=48))
    assert not_read(lambda: check_weights(source, "feature-extraction")) == not_read(
        lambda: load_model(source, "feature-extraction")
    )
    said = not_read(lambda: check_weights(source, "feature-extraction"))
    assert "encoder.layer.0.intermediate.dense.bias is stored as (64,), and config.json says (48,)" in said


def test_a_classifier_that_pads_needs_a_padding_token(tiny_llama_folder: Path, folder: Path) -> None:
    shutil.copytree(tiny_llama_folder, folder, dirs_exist_ok=True)
    source = find_model(change_config(folder, pad_token_id=None))
    for load in (load_empty, load_model):
        assert "config.json has none" in not_read(lambda load=load: load(source, "text-classification"))
    assert load_empty(source, "text-generation")


@pytest.mark.parametrize("family", ["tiny_bert_folder", "tiny_llama_folder"])
def test_a_folder_without_tokenizer_files_is_refused(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(family), tmp_path / "copy"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer.save_pretrained(folder)" in not_read(lambda: load_tokenizer(find_model(folder)))


@pytest.mark.parametrize(("name", "text"), [("tokenizer.json", "{"), ("tokenizer_config.json", "[]")])
def test_damaged_tokenizer_files_are_named(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert "the tokenizer cannot be read" in not_read(lambda: load_tokenizer(find_model(folder)))


@pytest.mark.parametrize(
    "said",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {}},
        {"text_config": {"compression_config": {"quant_method": "compressed-tensors"}}},
    ],
)
def test_a_model_that_others_quantised_is_refused(folder: Path, said: dict[str, object]) -> None:
    assert "its weights are quantised already" in refused(change_config(folder, **said))


def test_no_quantisation_may_be_said(folder: Path) -> None:
    assert load_empty(find_model(change_config(folder, quantization_config=None)), "feature-extraction")


@pytest.mark.parametrize(
    "said", [{"schema": 99, "edits": []}, {}, {"edits": 5}, {"edits": [{"kind": "nope"}]}, {"edits": [], "more": 1}]
)
def test_edits_that_cannot_be_read_are_named(folder: Path, said: dict[str, object]) -> None:
    source = find_model(change_config(folder, quantization_config={"quant_method": "compresskit", **said}))
    assert "the model cannot be read" in not_read(lambda: load_model(source, "feature-extraction"))


def test_a_missing_folder_names_the_nearest(folder: Path) -> None:
    assert f"did you mean '{folder}'?" in refused(folder.parent / "modle")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("package:no_such_package/model", "no installed Python package 'no_such_package'"),
        ("package:../etc", "no installed Python package"),
        ("package:yaml/../json", "leaves the package's folder"),
        ("package:yaml/weights", "package 'yaml' has no folder 'weights'"),
    ],
)
def test_a_package_path_stays_inside_its_package(name: str, said: str) -> None:
    assert said in refused(name)


def test_a_gguf_file_stays_inside_its_folder(folder: Path) -> None:
    (folder.parent / "outside.gguf").write_bytes(b"GGUF")
    assert "'../outside.gguf' leaves" in refused(folder, gguf_file="../outside.gguf")
    assert "no file" in refused(folder, gguf_file="absent.gguf")


@pytest.mark.parametrize("name", ["__class__", "encoder.__dict__", "../x", "", "encoder..layer", "encoder.nothing"])
def test_an_edit_cannot_name_anything_but_a_module(tiny_bert_folder: Path, name: str) -> None:
    with pytest.raises(CompressKitError):
        get_module(load_empty(find_model(tiny_bert_folder), "feature-extraction"), name)


def test_an_empty_model_holds_no_weight(tiny_llama_folder: Path) -> None:
    model = load_empty(find_model(tiny_llama_folder), "text-generation")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_the_task_is_read_from_the_config(tiny_bert_folder: Path, tiny_llama_folder: Path, folder: Path) -> None:
    assert guess_task(find_model(tiny_bert_folder)) == "feature-extraction"
    assert guess_task(find_model(tiny_llama_folder)) == "text-generation"
    change_config(folder, architectures=["BertForMultipleChoice"])
    with pytest.raises(CompressKitError, match=r"its config\.json names BertForMultipleChoice"):
        guess_task(find_model(folder))


@pytest.mark.parametrize(("config", "kind"), [(OTHERS["t5"], T5EncoderModel), (UMT5Config(**_T5), UMT5EncoderModel)])
def test_the_encoder_of_an_encoder_decoder_is_a_feature_extractor_of_its_own(
    config: PretrainedConfig, kind: type, tmp_path: Path
) -> None:
    model = random_model(AutoModelForTextEncoding, config)
    model.save_pretrained(tmp_path)
    source = find_model(tmp_path)
    assert guess_task(source) == "feature-extraction"
    read, empty = load_model(source, "feature-extraction"), load_empty(source, "feature-extraction")
    assert type(read) is type(empty) is kind
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), model.parameters(), strict=True))
    assert len(find_anatomy(empty).feed_forwards) == 2
    assert find_stack(empty) == "encoder.block"
    assert task_of(read) == "feature-extraction"


@pytest.mark.parametrize("read", [load_model, check_weights])
def test_a_task_whose_head_has_no_weights_is_refused(tiny_bert_folder: Path, read: Any) -> None:
    with pytest.raises(CompressKitError, match="has no weights for classifier"):
        read(find_model(tiny_bert_folder), "text-classification")


def peak_rss_bytes() -> int:
    """The most memory that this process held since its peak was reset."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_the_headers_of_weights_are_checked_without_reading_them(tiny_bert_folder: Path, tmp_path: Path) -> None:
    """A gigabyte of zeros that take no place on the disk; read, and made float32, they would be resident memory."""
    config = BertConfig.from_pretrained(tiny_bert_folder, vocab_size=2**24)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in BertModel(config).named_parameters()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    written = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(8 + len(written) + end)
    source = find_model(tmp_path)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = peak_rss_bytes()
    check_weights(source, "feature-extraction")
    assert peak_rss_bytes() - before < end / 4


@pytest.fixture
def roberta_folder(tmp_path: Path) -> Path:
    """A random RoBERTa with the head that it is pretrained with, and so without a pooler."""
    tokenizer = make_tokenizer()
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,  # they are counted from the padding token's id on
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    return tmp_path / "roberta"


def test_an_encoder_saved_without_a_pooler_is_read_without_one(roberta_folder: Path, tiny_bert_folder: Path) -> None:
    source = find_model(roberta_folder)
    task = guess_task(source)
    assert task == "feature-extraction"
    check_weights(source, task)
    model, empty = load_model(source, task), load_empty(source, task)
    assert model.state_dict().keys() == empty.state_dict().keys()
    assert not any("pooler" in name for name in model.state_dict())
    assert any("pooler" in name for name in load_empty(find_model(tiny_bert_folder), task).state_dict())


def test_a_run_on_an_encoder_without_a_pooler_ships_none(
    roberta_folder: Path, tiny_data: dict[str, object], tmp_path: Path
) -> None:
    said = {"model": str(roberta_folder), "data": tiny_data, "passes": [{"kind": "low_rank", "keep": 0.5}]}
    run(parse_recipe(said), tmp_path / "out")
    student, _ = compresskit.load(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "student" / "model.safetensors")
    assert stored.keys() == student.state_dict().keys()
    assert not any("pooler" in name for name in stored)
    tokens = {"input_ids": torch.arange(5, 15)[None], "attention_mask": torch.ones(1, 10, dtype=torch.int64)}
    # What a user's own AutoModel adds is no part of the hidden states.
    own = AutoModel.from_pretrained(tmp_path / "out" / "student").eval()
    with torch.no_grad():
        assert torch.equal(own(**tokens).last_hidden_state, student(**tokens).last_hidden_state)


@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForPreTraining"])
def test_what_is_only_pretrained_is_a_feature_extractor(folder: Path, head: str) -> None:
    assert guess_task(find_model(change_config(folder, architectures=[head]))) == "feature-extraction"


def write_gguf(path: Path, seed: int) -> None:
    """A random Llama of one layer as a GGUF file, with a tokenizer of single characters."""
    draw = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    words = ["<unk>", "<s>", "</s>", *"abcdefghijkl", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3, *[1] * 13])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (16, 16), "output_norm": (16,), "output": (16, 16)}
    block = {"attn_norm": (16,), "ffn_norm": (16,), "ffn_gate": (32, 16), "ffn_up": (32, 16), "ffn_down": (16, 32)}
    block |= {f"attn_{role}": (16, 16) for role in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_each_gguf_file_of_a_folder_is_a_model_of_its_own(tmp_path: Path) -> None:
    for seed, name in enumerate(("a.gguf", "b.gguf")):
        write_gguf(tmp_path / name, seed)
    a, b = (find_model(tmp_path, gguf_file=name) for name in ("a.gguf", "b.gguf"))
    assert a.fingerprint != b.fingerprint
    assert safetensors_source(a).folder != safetensors_source(b).folder
    tables = [load_model(one, "text-generation").get_input_embeddings().weight for one in (a, b)]
    assert not torch.equal(*tables)
    assert find_float_types(a) == FloatTypes(torch.float32, torch.float32)


def test_only_the_chosen_weights_are_part_of_a_fingerprint(folder: Path) -> None:
    (folder / "a.gguf").write_bytes(b"GGUF a")
    (folder / "b.gguf").write_bytes(b"GGUF a")
    stored, a, b = (find_model(folder, gguf_file=name).fingerprint for name in (None, "a.gguf", "b.gguf"))
    assert len({stored, a, b}) == 3
    (folder / "b.gguf").write_bytes(b"GGUF b")
    assert find_model(folder).fingerprint == stored
    assert find_model(folder, gguf_file="a.gguf").fingerprint == a
    assert find_model(folder, gguf_file="b.gguf").fingerprint != b
    (folder / "model.safetensors").write_bytes(b"other")
    assert find_model(folder, gguf_file="a.gguf").fingerprint == a


def test_a_models_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "a.gguf", 0)
    source = find_model(tmp_path)
    assert load_empty(source, "text-generation")
    monkeypatch.setattr("hashlib.file_digest", None)
    assert load_config(source)
    assert load_tokenizer(source)
    assert load_model(source, "text-generation")


def test_a_name_that_is_too_long_for_a_file_is_one_message() -> None:
    assert "no folder '/mmm" in refused("/" + "m" * 5000)
    assert "is no folder here, and the hub did not give it" in refused("m" * 5000)
    assert len(refused("m" * 5000)) < 800


def test_a_tokenizer_can_always_pad(tiny_llama_folder: Path) -> None:
    assert load_tokenizer(find_model(tiny_llama_folder)).pad_token_id is not None
