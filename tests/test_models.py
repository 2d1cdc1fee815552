import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compresskit.errors import CompressKitError
from compresskit.models import find_model, guess_task, load_empty, load_model, load_tokenizer
from compresskit.surgery.edits import get_module


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
    assert find_model(folder).fingerprint() == find_model(tiny_bert_folder).fingerprint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-6}))
    assert find_model(folder).fingerprint() != find_model(tiny_bert_folder).fingerprint()


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
    said = not_read(lambda: load_model(find_model(folder), "feature-extraction"))
    assert f"{folder}: the model cannot be read (SafetensorError" in said


def test_a_config_that_disagrees_with_the_weights_is_named(folder: Path) -> None:
    source = find_model(change_config(folder, intermediate_size=48))
    said = not_read(lambda: load_model(source, "feature-extraction"))
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
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(CompressKitError, match=r"its config\.json names BertForMaskedLM"):
        guess_task(find_model(folder))


def test_a_task_whose_head_has_no_weights_is_refused(tiny_bert_folder: Path) -> None:
    with pytest.raises(CompressKitError, match="has no weights for classifier"):
        load_model(find_model(tiny_bert_folder), "text-classification")


def test_a_tokenizer_can_always_pad(tiny_llama_folder: Path) -> None:
    assert load_tokenizer(find_model(tiny_llama_folder)).pad_token_id is not None
