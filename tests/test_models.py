import json
import shutil
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
