import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from changed_students import FAST, make_student
from tokenizers import Tokenizer
from transformers.exporters.metadata import ExportMetadata
from transformers.exporters.runners.runner_onnx import OnnxModelRunner

from compresskit import cli
from compresskit.errors import CompressKitError
from compresskit.evaluate import Fidelity
from compresskit.export import OnnxExport
from compresskit.export.folder import MANIFEST_FILE, MODEL_FILE, read_exported, write_manifest
from compresskit.export.generate import _pieces, end_tokens, generate
from compresskit.export.runtime import open_session
from compresskit.export.scored import exported_figures
from compresskit.student import Student


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Path]:
    student = make_student("text-generation")
    folder = tmp_path_factory.mktemp("decoder") / "onnx"
    OnnxExport(**FAST, logits="last").write(student, folder)  # type: ignore[arg-type]
    return student, folder


@pytest.fixture
def copied(exported: tuple[Student, Path], tmp_path: Path) -> Path:
    shutil.copytree(exported[1], tmp_path / "onnx")
    return tmp_path / "onnx"


def _sign(folder: Path, **changes: Any) -> None:
    """Make the manifest say that the folder was exported as it is now."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    (folder / MANIFEST_FILE).unlink()
    facts = {key: value for key, value in manifest.items() if key not in ("files", "versions", "format")}
    write_manifest(folder, facts | changes)


def test_the_command_writes_what_the_students_generate_says(
    exported: tuple[Student, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student, folder = exported
    monkeypatch.setattr(
        sys,
        "argv",
        ["compresskit", "generate", str(folder), "a small model", "--max-new-tokens", "9", "--threads", "1"],
    )
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    ids = student.tokenizer("a small model", return_tensors="pt")["input_ids"]
    said = student.model.generate(ids, max_new_tokens=9, do_sample=False)  # type: ignore[operator]
    expected = student.tokenizer.decode(said[0], skip_special_tokens=True)
    assert expected.startswith("a small model ")
    assert capsys.readouterr().out == f"{expected}\n"


def test_transformers_own_runner_generates_the_students_tokens(exported: tuple[Student, Path]) -> None:
    """It takes the graph by the names of its inputs; what it asks for beyond is how the outputs are nested."""
    student, folder = exported
    session = open_session(folder / MODEL_FILE, threads=1)
    keys = [value for value in session.get_inputs() if value.name.endswith(".key")]
    pair = {"key": 0, "value": 0}
    _, nesting = pytree.tree_flatten({"logits": 0, "present": {str(layer): pair for layer in range(len(keys))}})
    metadata = ExportMetadata(export_dtype="float32", out_spec=pytree.treespec_dumps(nesting))
    runner = OnnxModelRunner(metadata, session)
    ids = student.tokenizer("a small model", return_tensors="pt")["input_ids"]
    said = ids
    past = {
        str(layer): {name: torch.zeros(1, value.shape[1], 0, value.shape[3]) for name in pair}
        for layer, value in enumerate(keys)
    }
    for new in range(9):
        start, total = (0 if new == 0 else said.shape[1] - 1), said.shape[1]
        answer = runner(
            input_ids=said[:, start:],
            attention_mask=torch.ones_like(said),
            position_ids=torch.arange(start, total)[None],
            past_key_values=past,
        )
        said, past = torch.cat([said, answer["logits"][:, -1].argmax(-1)[:, None]], dim=1), answer["present"]
    expected = student.model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)  # type: ignore[operator]
    assert said.tolist() == expected.tolist()


class _Bytes:
    """Each token is a byte of UTF-8."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_text_comes_in_whole_letters_and_stops_at_an_end_token() -> None:
    tokens = iter([*"aß€".encode(), 0, *b"never"])
    assert list(_pieces(tokens, _Bytes(), [*b"so "], {0}, 99)) == ["a", "ß", "€", ""]  # type: ignore[arg-type]
    cut = iter("aß".encode())
    assert list(_pieces(cut, _Bytes(), [], {0}, 2)) == ["a", "\N{REPLACEMENT CHARACTER}"]  # type: ignore[arg-type]


def test_end_tokens_are_read_from_both_configs(tmp_path: Path) -> None:
    assert end_tokens(tmp_path) == set()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert end_tokens(tmp_path) == {2, 3, 4}


def _call(folder: Path, prompt: str = "a model") -> None:
    generate(folder, prompt, max_new_tokens=1, threads=1)


def test_an_empty_prompt_is_refused(copied: Path) -> None:
    bare = json.loads((copied / "tokenizer.json").read_text()) | {"post_processor": None}
    (copied / "tokenizer.json").write_text(json.dumps(bare))
    with pytest.raises(CompressKitError, match=r"tokenizer\.json has \d+ bytes instead"):
        _call(copied)
    _sign(copied)
    with pytest.raises(CompressKitError, match="the prompt is empty"):
        _call(copied, "")


def test_a_tokenizer_of_another_model_is_refused(copied: Path) -> None:
    other = Tokenizer.from_file(str(copied / "tokenizer.json"))
    other.add_tokens([f"extra{index}" for index in range(9)])
    other.save(str(copied / "tokenizer.json"))
    _sign(copied)
    with pytest.raises(CompressKitError, match=r"the tokenizer has token \d+, and the model knows \d+") as error:
        _call(copied)
    assert "put the tokenizer back" in str(error.value)


def test_another_task_and_another_folder_are_refused(copied: Path, tmp_path: Path) -> None:
    _sign(copied, task="feature-extraction")
    with pytest.raises(CompressKitError, match="is made for feature-extraction"):
        _call(copied)
    with pytest.raises(CompressKitError, match="this is no exported folder"):
        _call(tmp_path)


def test_a_file_with_the_last_logits_alone_is_not_scored(exported: tuple[Student, Path]) -> None:
    student, folder = exported
    fidelity = Fidelity(student.original, student.corpus.evaluation, task="text-generation")
    with pytest.raises(CompressKitError, match="gives logits of the last token alone") as error:
        exported_figures(folder, read_exported(folder), fidelity, None, threads=1)
    assert "logits: all" in str(error.value)
