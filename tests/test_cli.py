import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from compresskit import CompressKitError, cli, load_recipe, run
from compresskit.passes import PASSES

ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe(tiny_bert_folder: Path, tiny_data: dict[str, object], tmp_path: Path) -> Path:
    """One real pass over the tiny BERT, in a file."""
    passes = [{"kind": "prune_width", "keep": {"ffn": 0.5}}]
    said = {"model": str(tiny_bert_folder), "data": tiny_data, "evaluate": "never", "passes": passes}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(said), encoding="utf-8")
    return path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command in this process: (status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compresskit", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


def test_third_parties_warn_nobody(caplog: pytest.LogCaptureFixture) -> None:
    cli._quiet_libraries()
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions", "transformers.modeling_utils"):
        logging.getLogger(name).warning("inputs will be cast")
    assert caplog.records == []


def test_run_prints_the_table_and_a_second_run_is_done_at_once(call: Any, recipe: Path, tmp_path: Path) -> None:
    status, out, err = call("run", recipe, "--output", tmp_path / "out")
    assert status == 0, err
    assert "prune_width" in out
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file()
    status, again, err = call("run", recipe, "--output", tmp_path / "out")
    assert (status, again) == (0, out)
    assert "already done" in err
    status, told, _ = call("report", tmp_path / "out")
    assert status == 0
    assert "prune_width" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "{recipe}", "--output", "{tmp}/out", "--set", "passes.0.kep=1"], "did you mean 'keep'?"),
        (["run", "{tmp}/none.yaml", "--output", "{tmp}/out"], "no recipe"),
        (["run", "{recipe}", "--output", "{tmp}"], "it is not the output of a run"),
        (["run", "{recipe}", "--output", "{tmp}/out", "--set", "model=./nowhere"], "no folder './nowhere'"),
        (["run", "{recipe}"], "Missing option '--output'"),
        (["check", "{recipe}", "--set", "passes.0.keep=2"], "--set passes.0.keep=2"),
        (["check", "{recipe}", "--set", "data.path={tmp}/none.txt"], "none.txt"),
        (["eval", "{tmp}"], "no student in"),
        (["eval", "{tmp}", "--data", "{sorce: text}"], "did you mean 'source'?"),
        (["report", "{tmp}"], "no {tmp}/report.json"),
        (["passes", "prune_widht"], "did you mean 'prune_width'?"),
        (["modules", "./nowhere"], "no folder './nowhere'"),
        (["rnu"], "No such command 'rnu'"),
    ],
)
def test_the_users_mistakes_end_with_2_and_a_message_without_traceback(
    call: Any, recipe: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    def fill(text: str) -> str:
        return text.replace("{recipe}", str(recipe)).replace("{tmp}", str(tmp_path))

    status, out, err = call(*(fill(argument) for argument in arguments))
    assert status == 2
    assert fill(said) in err
    assert "fix: " in err
    assert "Traceback" not in err
    assert out == ""


def test_check_foretells_what_the_run_measures(call: Any, recipe: Path, tmp_path: Path) -> None:
    status, out, err = call("check", recipe)
    assert status == 0, err
    foretold = [line.split()[1:3] for line in out.splitlines() if line.startswith(("original", "prune_width"))]
    assert not (tmp_path / "out").exists()
    call("run", recipe, "--output", tmp_path / "out")
    report = yaml.safe_load((tmp_path / "out" / "report.json").read_text())
    measured = [[f"{entry['params']:,}", f"{entry['size_bytes']:,}"] for entry in report["passes"]]
    assert foretold == measured
    assert "the student loads with transformers alone" in out
    assert "memory: at least" in out


def test_check_foretells_the_bytes_of_an_export_and_refuses_a_length_without_places(call: Any, recipe: Path) -> None:
    status, out, _ = call("check", recipe, "--set", "export=[{kind: onnx}]")
    assert status == 0
    assert re.search(r"^export onnx: about \d+,\d{3} bytes$", out, flags=re.MULTILINE)
    status, _, err = call("check", recipe, "--set", "export=[{kind: onnx, length: 65}]")
    assert status == 2
    assert "export[0] (onnx): length: 65 is more than the model's 64 positions" in err


def test_mistakes_that_only_the_model_shows_are_told_with_their_lines(call: Any, recipe: Path, tmp_path: Path) -> None:
    written = recipe.read_text() + "export:\n  - kind: onnx\n    length: 65\n"
    recipe.write_text(written)
    line = written.splitlines().index("    length: 65") + 1
    for command in (["check", recipe], ["run", recipe, "--output", tmp_path / "out"]):
        status, _, err = call(*command)
        assert status == 2
        assert err.startswith(f"{recipe}:{line}: export[0] (onnx): length: 65 is more than the model's 64 positions")
    setting = "passes.0={kind: low_rank, keep: 0.5, targets: nowhere}"
    status, _, err = call("check", recipe, "--set", setting, "--set", "export=[]")
    assert status == 2
    assert err.startswith(f"--set {setting}: passes[0] (low_rank): targets: 'nowhere' matches no module")
    teacher = "passes.0={kind: distill, teacher: ./nowhere}"
    status, _, err = call("check", recipe, "--set", teacher, "--set", "export=[]")
    assert status == 2
    assert err.startswith(f"--set {teacher}: passes[0] (distill): teacher: no folder './nowhere'")


def test_settings_change_a_yaml_and_no_recipe(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressKitError, match=r"passes\[0\] \(prune_width\)"):
        run(recipe, tmp_path / "out", settings=["passes.0.keep=0.0001"])
    with pytest.raises(CompressKitError, match="settings change a YAML"):
        run(load_recipe(recipe), tmp_path / "out", settings=["seed=1"])


def test_check_says_when_the_plug_in_is_needed(call: Any, recipe: Path) -> None:
    status, out, _ = call("check", recipe, "--set", "passes.0={kind: low_rank, keep: 0.5}")
    assert status == 0
    assert "the student loads with transformers after `import compresskit`" in out


def test_unwise_orders_are_warned_about_and_done(call: Any, recipe: Path) -> None:
    passes = "[{kind: low_rank, keep: 0.5}, {kind: prune_width, keep: 0.75}, {kind: prune_width, keep: 0.5}]"
    status, _, err = call("check", recipe, "--set", f"passes={passes}")
    assert status == 0
    assert "warning: passes[1] (prune_width) meets 4 matrices that passes[0] (low_rank) has reduced already" in err
    assert "warning: passes[2] (prune_width) is stronger than passes[1] before it" in err


def test_passes_lists_every_registered_pass(call: Any) -> None:
    status, out, _ = call("passes")
    assert status == 0
    assert {line.split()[0] for line in out.splitlines()[1:]} == set(PASSES)


@pytest.mark.parametrize("kind", sorted(PASSES))
def test_every_option_of_every_pass_is_listed_with_its_meaning(call: Any, kind: str) -> None:
    status, out, _ = call("passes", kind)
    assert status == 0
    listed = {line.split()[0]: line for line in out.splitlines() if line}
    assert set(PASSES[kind].model_fields) - {"kind"} <= set(listed)


def test_modules_shows_names_shapes_and_parts(call: Any, tiny_llama_folder: Path) -> None:
    status, out, _ = call("modules", tiny_llama_folder)
    assert status == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "model.layers.1.self_attn.k_proj 16 × 32 block 1 attention key, 2 heads of 8" in lines
    assert "model.layers.0.mlp.gate_proj 64 × 32 block 0 FFN input, 64 neurons" in lines
    assert any(line.startswith("model.embed_tokens") and line.endswith("outside the blocks") for line in lines)


@pytest.fixture
def unclear_folder(tiny_bert_folder: Path, tmp_path: Path) -> Path:
    """The tiny BERT, its config naming a class whose task is not clear."""
    folder = Path(shutil.copytree(tiny_bert_folder, tmp_path / "choice"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMultipleChoice"]}))
    return folder


def test_a_task_that_is_not_clear_can_be_said(
    call: Any, unclear_folder: Path, tiny_bert_folder: Path, tiny_text_file: Path
) -> None:
    text = f"{{source: text, path: {tiny_text_file}, evaluation: 8, max_length: 32}}"
    for arguments in (
        ["modules", unclear_folder],
        ["eval", tiny_bert_folder, "--original", unclear_folder, "--data", text],
    ):
        status, _, err = call(*arguments)
        assert status == 2
        assert "what the model does is not clear" in err
        assert "say one of feature-extraction" in err
        status, out, err = call(*arguments, "--task", "feature-extraction")
        assert status == 0, err
        assert "block 0 FFN output, 64 neurons" in out or "mean_cosine" in out
    assert "unknown task 'sing'" in call("modules", unclear_folder, "--task", "sing")[2]


@pytest.mark.parametrize("text", [b"[]", b"{}", b"\xff", b"{"])
def test_a_report_that_is_none_is_one_message(call: Any, tmp_path: Path, text: bytes) -> None:
    (tmp_path / "report.json").write_bytes(text)
    status, out, err = call("report", tmp_path)
    assert (status, out) == (2, "")
    assert err.startswith(f"{tmp_path / 'report.json'}: ")
    assert "fix: run the recipe again" in err


def test_check_finds_weights_that_are_cut_off(call: Any, recipe: Path, tiny_bert_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bert_folder, tmp_path / "cut"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-4])
    status, _, err = call("check", recipe, "--set", f"model={folder}")
    assert status == 2
    assert "the model cannot be read (SafetensorError" in err


def test_what_nobody_foresaw_is_one_message_and_a_traceback_when_asked_for(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise KeyError("lost")

    monkeypatch.setattr(cli, "list_passes", fail)
    status, out, err = call("passes")
    assert (status, out) == (1, "")
    assert err.splitlines()[0] == "compresskit: KeyError: 'lost'"
    assert "COMPRESSKIT_DEBUG=1 shows the traceback" in err
    monkeypatch.setenv("COMPRESSKIT_DEBUG", "1")
    with pytest.raises(KeyError, match="lost"):
        cli.main()


def test_an_interrupted_command_ends_with_130(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "list_passes", interrupt)
    status, _, err = call("passes")
    assert status == 130
    assert "Traceback" not in err


def test_an_interrupted_run_says_how_to_go_on(recipe: Path, tmp_path: Path) -> None:
    script = (
        "import signal, sys, time\nfrom compresskit import cli, engine\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which tests in the background inherit ignored
        "def slow(*_, **__):\n    print('working', flush=True)\n    time.sleep(60)\n"
        "engine.load_model = slow\ncli.main()\n"
    )
    command = [sys.executable, "-c", script, "run", str(recipe), "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("interrupted; finished steps are kept in")
    assert "Traceback" not in err
