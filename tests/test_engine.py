import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load, save_file
from transformers import AutoModel, AutoTokenizer

import compresskit
from compresskit import (
    EXPORTERS,
    CompressKitError,
    Exporter,
    ManyErrors,
    Recipe,
    RunFailedError,
    engine,
    load_recipe,
    run,
)
from compresskit import student as student_room
from compresskit.engine import seeded
from compresskit.environment import computing_versions
from compresskit.export import OnnxExport
from compresskit.job import prepare, take_prints
from compresskit.passes import PASSES, Distill, LowRank, PruneWidth, Quantize
from compresskit.recipe import dump_recipe, parse_recipe
from tests.small_passes import ALL, Fail, Halve, Quantized, Shake


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in ALL:
        monkeypatch.setitem(PASSES._classes, cls.model_fields["kind"].default, cls)


@pytest.fixture
def make(tiny_bert_folder: Path, tiny_data: dict[str, object]) -> Any:
    """Recipes over the tiny BERT; nothing is measured unless asked for."""

    def recipe(*passes: Any, **said: Any) -> Recipe:
        given = {"model": str(tiny_bert_folder), "data": tiny_data, "evaluate": "never", "passes": passes}
        return parse_recipe({**given, **said})

    return recipe


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read whole, because tests cut the file afterwards, which a mapped one does not survive."""
    return load((folder / "student" / "model.safetensors").read_bytes())


def assert_equal_students(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def steps(folder: Path) -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in (folder / "steps").iterdir())


def test_a_run_writes_steps_student_and_report(make: Any, tmp_path: Path) -> None:
    report = run(make(Shake(), Halve(), evaluate="each"), tmp_path / "out")
    assert steps(tmp_path / "out") == ["00-original", "01-shake", "02-halve"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert report["schema_version"] == 1
    original, shaken, halved = report["passes"]
    assert [entry["kind"] for entry in report["passes"]] == ["original", "shake", "halve"]
    assert {"kind", "options", "params", "size_bytes", "metrics", "elapsed_s", "versions", "notes"} == set(halved)
    assert shaken["options"] == {"scale": 0.01, "target": "encoder.layer.0.output.dense"}
    assert shaken["notes"] == {"noise": 0.01}
    assert original["params"] - halved["params"] == 32 * (32 + 1 + 32)
    assert original["metrics"]["mean_cosine"] == pytest.approx(1)
    assert shaken["metrics"]["mean_cosine"] < 1


@pytest.mark.parametrize(("when", "measured"), [("each", [1, 1, 1]), ("ends", [1, 0, 1]), ("never", [0, 0, 0])])
def test_evaluate_says_which_entries_have_metrics(make: Any, tmp_path: Path, when: str, measured: list[int]) -> None:
    report = run(make(Shake(), Halve(), evaluate=when), tmp_path / "out")
    assert [bool(entry["metrics"]) for entry in report["passes"]] == measured


def test_the_student_loads_and_answers_as_the_saved_step(make: Any, tmp_path: Path) -> None:
    run(make(Shake(), Halve()), tmp_path / "out")
    model, tokenizer = compresskit.load(tmp_path / "out")
    assert model.get_submodule("encoder.layer.0.intermediate.dense").out_features == 32
    answer = model(**tokenizer("the model keeps every layer", return_tensors="pt"))[0]
    assert torch.isfinite(answer).all()
    assert set(weights(tmp_path / "out")) == set(model.state_dict())
    modes = {path.stat().st_mode for path in (tmp_path / "out" / "student").iterdir() if path.is_file()}
    assert len(modes) == 1, "whoever may read one of them may read all"


def test_a_finished_run_does_nothing_again(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make(Shake())
    first = run(recipe, tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.name != ".lock"}
    monkeypatch.setattr(engine, "load_model", None)
    said: list[str] = []
    assert run(recipe, tmp_path / "out", progress=said.append) == first
    assert said == [f"already done: {tmp_path / 'out'} holds this very result (--fresh makes it again)"]
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


def test_a_damaged_result_is_made_again_from_the_steps(make: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(make(Shake()), out)
    before = weights(out)
    (out / "student" / "model.safetensors").write_bytes(b"cut")
    run(make(Shake()), out)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())


def test_resume_reruns_only_passes_after_the_changed_one(make: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(make(Shake(), Halve(), Shake(scale=0.1)), out)
    said: list[str] = []
    run(make(Shake(), Halve(), Shake(scale=0.2)), out, progress=said.append)
    assert said == [
        f"{out} holds the result of other passes, exports or versions: it will be replaced",
        "text: text: sentences.txt: 8 calibration, 16 training, 12 evaluation sequences",
        "[0/3] original: kept from an earlier run",
        "[1/3] shake: kept from an earlier run",
        "[2/3] halve: kept from an earlier run",
        "[3/3] shake …",
    ]
    run(make(Shake(), Halve(), Shake(scale=0.2)), tmp_path / "other")
    assert_equal_students(out, tmp_path / "other")


@pytest.mark.parametrize("before", ["never", "ends"])
def test_a_kept_step_without_the_figures_that_are_wanted_now_is_measured_and_not_made_again(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    expected = run(make(Shake(), Halve(), evaluate="each"), tmp_path / "whole")
    run(make(Shake(), Halve(), evaluate=before), tmp_path / "out")
    for cls in (Shake, Halve):
        monkeypatch.setattr(cls, "apply", None)
    report = run(make(Shake(), Halve(), evaluate="each"), tmp_path / "out")
    assert _untimed(report["passes"]) == _untimed(expected["passes"])
    assert steps(tmp_path / "out") == ["00-original", "01-shake", "02-halve"]
    assert_equal_students(tmp_path / "out", tmp_path / "whole")


def test_the_same_recipe_gives_the_same_student_whatever_the_global_generator(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    run(make(Shake(), Shake()), tmp_path / "a")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    run(make(Shake(), Shake()), tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal_students(tmp_path / "a", tmp_path / "b")


def test_each_pass_draws_its_own_numbers_from_seed_and_position() -> None:
    drawn = []
    for seed, index in [(0, 1), (0, 2), (1, 1), (0, 1)]:
        with seeded(seed, index) as generator:
            drawn.append((torch.rand(3, generator=generator).tolist(), torch.rand(3).tolist()))
    assert drawn[0] == drawn[3]
    assert len({str(pair) for pair in drawn}) == 3


def test_python_and_yaml_give_the_same_student(make: Any, tmp_path: Path, tiny_data: dict[str, object]) -> None:
    passes = [
        Shake(),
        LowRank(keep=0.5, targets="*attention*"),
        PruneWidth.model_validate({"keep": 0.5}),
        Distill(steps=2, batch_size=4),
        Quantize(bits=8, group_size="channel", act="int8"),
    ]
    recipe = make(*passes)
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    run(tmp_path / "r.yaml", tmp_path / "yaml")
    assert load_recipe(tmp_path / "r.yaml") == recipe
    compresskit.compress(
        recipe.model,
        passes=passes,
        data=tiny_data,
        evaluate="never",
        output=tmp_path / "python",
    )
    assert_equal_students(tmp_path / "yaml", tmp_path / "python")


def test_compress_reports_all_mistakes_of_its_arguments(tiny_bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ManyErrors) as caught:
        compresskit.compress(tiny_bert_folder, passes=[Quantized(), Halve()], seed=-1, task="sing", output=tmp_path)
    assert [str(error.where) for error in caught.value.errors] == [
        "compress: task",
        "compress: seed",
        "compress: passes[1]",
    ]


def test_a_step_that_other_versions_made_is_kept_with_a_warning(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make(Shake()), tmp_path / "out")
    said: list[str] = []
    run(make(Shake(), Halve()), tmp_path / "out", progress=said.append)
    assert not any("warning" in line for line in said)
    now = computing_versions()
    assert now["torch"] == torch.__version__
    monkeypatch.setattr(engine, "computing_versions", lambda: {**now, "torch": "99.0"})
    report = run(make(Shake(), Halve(), Shake()), tmp_path / "out", progress=said.append)
    told = f"torch {now['torch']} then, 99.0 now (--fresh makes it again)"
    assert [line for line in said if "warning" in line] == [
        f"warning: [{index}/3] {kind}: {told}" for index, kind in enumerate(("original", "shake", "halve"))
    ]
    assert [entry["versions"]["torch"] for entry in report["passes"]] == [now["torch"]] * 3 + ["99.0"]
    monkeypatch.setattr(engine, "computing_versions", lambda: now)
    said.clear()
    run(make(Shake(), Halve(), Shake()), tmp_path / "out", progress=said.append)
    assert [line.split(": ", 1)[1] for line in said if "warning" in line] == [
        f"[3/3] shake: torch 99.0 then, {now['torch']} now (--fresh makes it again)"
    ], "a finished run says it too"


def test_a_model_in_memory_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model: Any = torch.nn.Linear(2, 2)
    with pytest.raises(CompressKitError, match=r"model is a Linear; it must be a folder[\s\S]*save_pretrained"):
        compresskit.compress(model, passes=[Shake()], output=tmp_path)


def test_a_teacher_said_twice_is_an_error(tiny_bert_folder: Path, tmp_path: Path) -> None:
    passes = [Distill(), Distill(teacher="mine")]
    with pytest.raises(CompressKitError, match=r"passes\[1\] \(distill\) names a teacher of its own") as caught:
        compresskit.compress(tiny_bert_folder, passes=passes, teacher="other", output=tmp_path)
    assert caught.value.fix
    assert caught.value.exit_code == 2


def test_a_steps_fingerprint_knows_its_teachers_files(make: Any, tiny_bert_folder: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(tiny_bert_folder, tmp_path / "teacher"))
    recipe = make(Shake(), Distill(teacher=str(teacher)), Shake())
    before = take_prints(prepare(recipe)).steps
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-6}))
    after = take_prints(prepare(recipe)).steps
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        (Distill(), "passes is a Distill, not a list"),
        (None, "passes is a NoneType, not a list"),
        ([Distill(), Distill], r"passes\[1\]: the class Distill is no pass"),
        ([{"kind": "distill"}], r"passes\[0\]: a dict is no pass"),
    ],
)
def test_what_is_no_list_of_passes_is_one_clear_message(passes: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(CompressKitError, match=said) as caught:
        compresskit.compress("any", passes=passes, output=tmp_path)
    assert "list of passes" in str(caught.value.fix)


def test_a_teacher_without_a_pass_that_learns_is_an_error(tiny_bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressKitError, match="no pass learns from a teacher"):
        compresskit.compress(tiny_bert_folder, passes=[Shake()], teacher="other", output=tmp_path)


def test_a_bug_in_a_pass_names_it_and_what_is_saved(make: Any, tmp_path: Path) -> None:
    with pytest.raises(RunFailedError) as caught:
        run(make(Shake(), Fail(how="bug")), tmp_path / "out")
    said = str(caught.value)
    assert said.startswith("passes[1] (fail): KeyError: 'no such layer'; saved in ")
    assert "01-shake-" in said
    assert "the same command goes on from the last saved step" in said
    assert caught.value.exit_code == 1
    assert "no such layer" in (tmp_path / "out" / "failure.log").read_text()


def test_a_mistake_found_by_a_pass_stays_the_users(make: Any, tmp_path: Path) -> None:
    with pytest.raises(CompressKitError) as caught:
        run(make(Fail(how="mistake")), tmp_path / "out")
    assert str(caught.value) == "passes[0] (fail): the calibration text is too short\n  fix: use more of it"
    assert caught.value.exit_code == 2


def test_what_fails_while_a_pass_works_is_told_with_the_line_of_the_pass(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(dump_recipe(make(Shake(), Fail(how="mistake"))), encoding="utf-8")
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "kind: fail" in text)
    with pytest.raises(CompressKitError) as caught:
        run(path, tmp_path / "out")
    assert str(caught.value).startswith(f"{path}:{line}: passes[1] (fail): the calibration text is too short")


@pytest.mark.parametrize(
    ("how", "said"),
    [("nan", "is not finite"), ("unrecorded", "encoder.layer.0.output.extra.bias has shape (2,)")],
)
def test_a_pass_that_breaks_the_model_is_stopped_and_not_saved(make: Any, tmp_path: Path, how: str, said: str) -> None:
    with pytest.raises(RunFailedError, match=r"^passes\[0\] \(fail\): ") as caught:
        run(make(Fail(how=how)), tmp_path / "out")  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert steps(tmp_path / "out") == ["00-original"]


def _with_a_nan(source: Path, folder: Path, name: str) -> Path:
    """A copy of a model whose tensor `name` holds one NaN."""
    shutil.copytree(source, folder)
    tensors = load((folder / "model.safetensors").read_bytes())
    tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_nan_that_the_answer_reads_is_the_users_and_named(make: Any, tiny_bert_folder: Path, tmp_path: Path) -> None:
    name = "encoder.layer.1.output.LayerNorm.weight"
    broken = _with_a_nan(tiny_bert_folder, tmp_path / "nan", name)
    with pytest.raises(CompressKitError, match=f"not finite: {re.escape(name)} holds NaN or infinity\n") as caught:
        run(make(Shake(), model=str(broken)), tmp_path / "out")
    assert caught.value.exit_code == 2


def test_a_nan_that_no_answer_reads_is_told_and_kept(make: Any, tiny_bert_folder: Path, tmp_path: Path) -> None:
    broken = _with_a_nan(tiny_bert_folder, tmp_path / "nan", "pooler.dense.bias")
    said: list[str] = []
    run(make(Shake(), model=str(broken)), tmp_path / "out", progress=said.append)
    told = [line for line in said if "NaN" in line]
    assert told == ["warning: pooler.dense.bias: NaN or infinity, which the answer to held-out text does not read"]
    assert weights(tmp_path / "out")["pooler.dense.bias"].isnan().sum() == 1


def _spoil_weight(folder: Path) -> None:
    tensors = load((folder / "model.safetensors").read_bytes())
    tensors["encoder.layer.1.output.dense.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _spoil_config(folder: Path, **said: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | said))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_spoil_weight, "loaded again, has another encoder.layer.1.output.dense.weight"),
        (partial(_spoil_config, intermediate_size=40), "cannot be loaded again"),
        (partial(_spoil_config, num_hidden_layers=3), "cannot be loaded again"),
        (lambda folder: (folder / "config.json").unlink(), "cannot be loaded again"),
    ],
)
def test_a_student_that_does_not_reload_as_itself_is_neither_a_step_nor_a_result(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], said: str
) -> None:
    save = engine.save_student

    def save_spoiled(student: Any, folder: Path) -> None:
        save(student, folder)
        if "02-" in str(folder):
            spoil(folder)

    monkeypatch.setattr(engine, "save_student", save_spoiled)
    with pytest.raises(RunFailedError, match=r"^passes\[1\] \(shake\): the saved student") as caught:
        run(make(Shake(), Shake()), tmp_path / "out")
    assert said in str(caught.value)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out" / "student").exists()
    monkeypatch.setattr(engine, "save_student", save)
    run(make(Shake(), Shake()), tmp_path / "out")
    assert steps(tmp_path / "out") == ["00-original", "01-shake", "02-shake"]


def test_misfits_of_all_passes_are_found_before_anything_is_written(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ManyErrors) as caught:
        run(make(Fail(how="misfit"), Shake(target="encoder.layer.9.x")), tmp_path / "out")
    places = [error.where for error in caught.value.errors]
    assert places == ["passes[0] (fail)", "passes[1] (shake): edits"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("amounts", "places"),
    [
        ({"training": 0}, ["data.training"]),
        ({"training": 1, "evaluation": 1}, ["data.training", "data.evaluation"]),
        ({"calibration": 1}, ["data.calibration"]),
        ({"evaluation": 2}, ["data.evaluation"]),
    ],
)
def test_too_little_text_for_a_pass_or_a_measure_is_found_before_anything_is_written(
    make: Any, tmp_path: Path, tiny_data: dict[str, object], amounts: dict[str, int], places: list[str]
) -> None:
    low_rank = {"kind": "low_rank", "keep": 0.5, "targets": "*intermediate*"}
    recipe = make(low_rank, {"kind": "distill", "steps": 1}, evaluate="ends", data={**tiny_data, **amounts})
    with pytest.raises(ManyErrors) as caught:
        run(recipe, tmp_path / "out")
    assert [error.where for error in caught.value.errors] == places
    assert all(
        re.search(r"^use (training: 2|evaluation: 3|calibration: 2) or more", str(e.fix)) for e in caught.value.errors
    )
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_the_least_text_is_enough(make: Any, tmp_path: Path, tiny_data: dict[str, object]) -> None:
    least = {"training": 2, "evaluation": 3}
    report = run(make({"kind": "distill", "steps": 1}, evaluate="ends", data={**tiny_data, **least}), tmp_path / "out")
    assert [entry["kind"] for entry in report["passes"]] == ["original", "distill"]


def test_a_missing_model_is_the_users_mistake(make: Any, tmp_path: Path) -> None:
    with pytest.raises(CompressKitError, match=r"^model: no folder '\./nowhere'"):
        run(make(Shake(), model="./nowhere"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_runs_folder_is_refused_and_fresh_replaces_it(make: Any, tmp_path: Path) -> None:
    run(make(Shake()), tmp_path / "out")
    with pytest.raises(CompressKitError, match=r"holds another run \(seed 0 there, 1 here\)"):
        run(make(Shake(), seed=1), tmp_path / "out")
    run(make(Shake(), seed=1), tmp_path / "out", fresh=True)
    run(make(Shake(), seed=1), tmp_path / "new")
    assert_equal_students(tmp_path / "out", tmp_path / "new")


def test_fresh_refuses_a_folder_that_is_no_run(make: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CompressKitError, match=r"no run\.json"):
        run(make(Shake()), tmp_path, fresh=True)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_an_altered_step_is_refused_and_the_run_goes_on_without_it(make: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(make(Shake(), Shake()), out)
    before = weights(out)
    broken = next((out / "steps").glob("02-*"))
    (broken / "student" / "model.safetensors").write_bytes(b"cut off")
    shutil.rmtree(out / "student")
    with pytest.raises(CompressKitError, match=r"was altered or cut off: student/model.safetensors has 7 bytes"):
        run(make(Shake(), Shake()), out)
    shutil.rmtree(broken)
    said: list[str] = []
    run(make(Shake(), Shake()), out, progress=said.append)
    assert "[1/2] shake: kept from an earlier run" in said
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())


def test_a_checkpoint_that_lost_weights_on_the_way_is_refused(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that the held-out text does not use, such as rows of rare tokens, count too."""

    original_weights = student_room.student_weights

    def spoil(model: Any, stored: torch.dtype) -> dict[str, torch.Tensor]:
        found = {name: tensor.clone() for name, tensor in original_weights(model, stored).items()}
        found["embeddings.word_embeddings.weight"][-1] += 1
        return found

    monkeypatch.setattr(student_room, "student_weights", spoil)
    with pytest.raises(RunFailedError, match=r"has another embeddings\.word_embeddings\.weight"):
        run(make(Shake()), tmp_path / "out")


def test_a_model_in_bfloat16_counts_with_the_bytes_that_it_has(
    make: Any, tmp_path: Path, tiny_bert_folder: Path
) -> None:
    AutoModel.from_pretrained(tiny_bert_folder).bfloat16().save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny_bert_folder).save_pretrained(tmp_path / "half")
    report = run(make(Shake(), model=str(tmp_path / "half")), tmp_path / "out")
    sizes = [entry["size_bytes"] for entry in report["passes"]]
    assert sizes[0] == (tmp_path / "half" / "model.safetensors").stat().st_size
    assert sizes[1] == (tmp_path / "out" / "student" / "model.safetensors").stat().st_size == sizes[0]


def test_a_result_that_another_recipe_left_is_named_before_it_goes(make: Any, tmp_path: Path) -> None:
    run(make(Shake()), tmp_path / "out")
    said: list[str] = []
    run(make(Halve()), tmp_path / "out", progress=said.append)
    assert f"{tmp_path / 'out'} holds the result of other passes, exports or versions: it will be replaced" in said


def test_an_altered_result_is_made_again_and_said(make: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(make(Shake()), out)
    before = weights(out)
    (out / "student" / "model.safetensors").write_bytes(b"cut off")
    said: list[str] = []
    run(make(Shake()), out, progress=said.append)
    changed = out / "student" / "model.safetensors"
    assert f"{changed} was altered or removed since the run ended: the result is made again" in said
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())


def test_a_disk_that_fills_during_the_export_keeps_every_step(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(OnnxExport, "write", full)
        with pytest.raises(RunFailedError, match=r"^export\[0\] \(onnx\): no space left on the disk"):
            run(make(Shake(), export=[{"kind": "onnx"}]), tmp_path / "out")
    assert steps(tmp_path / "out") == ["00-original", "01-shake"]
    assert not (tmp_path / "out" / "onnx").exists()


def test_the_traceback_of_a_failure_goes_once_the_run_succeeds(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine, "save_student", None)
        with pytest.raises(RunFailedError, match=r"failure\.log"):
            run(make(Shake()), tmp_path / "out")
    assert (tmp_path / "out" / "failure.log").is_file()
    run(make(Shake()), tmp_path / "out")
    assert not (tmp_path / "out" / "failure.log").exists()


def test_a_full_disk_keeps_the_finished_steps(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = engine.save_student

    def fill(student: Any, folder: Path) -> None:
        save(student, folder)
        if "02-" in str(folder):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(engine, "save_student", fill)
    with pytest.raises(RunFailedError, match=r"^passes\[1\] \(shake\): no space left on the disk") as caught:
        run(make(Shake(), Shake()), tmp_path / "out")
    assert "01-shake-" in str(caught.value)
    assert steps(tmp_path / "out") == ["00-original", "01-shake"]
    monkeypatch.setattr(engine, "save_student", save)
    run(make(Shake(), Shake()), tmp_path / "out")
    run(make(Shake(), Shake()), tmp_path / "whole")
    assert_equal_students(tmp_path / "out", tmp_path / "whole")


def test_too_small_a_disk_is_refused_before_the_first_pass(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(RunFailedError, match="the run will write about"):
        run(make(Shake()), tmp_path / "out")


def test_a_killed_run_ends_bit_for_bit_where_an_uninterrupted_one_ends(make: Any, tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    recipe = make(Shake(), Fail(how="kill", unless=str(allowed)), Shake(), Halve())
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    script = (
        "import sys\nfrom compresskit import run\nfrom compresskit.passes import PASSES\n"
        "from tests.small_passes import ALL\n"
        "for cls in ALL: PASSES.add(cls)\n"
        "run(sys.argv[1], sys.argv[2])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "r.yaml"), str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr.decode()
    assert steps(tmp_path / "killed") == ["00-original", "01-shake"]
    allowed.touch()
    resumed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert resumed.returncode == 0, resumed.stderr.decode()
    run(recipe, tmp_path / "whole")
    assert_equal_students(tmp_path / "killed", tmp_path / "whole")


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


_TIMES = ("elapsed_s", "tokens_per_s", "p50_ms", "p95_ms", "latency_ms", "speed")


def _untimed(value: Any) -> Any:
    """A report without what the clock says."""
    if isinstance(value, dict):
        return {key: _untimed(inner) for key, inner in value.items() if key not in _TIMES}
    return [_untimed(inner) for inner in value] if isinstance(value, list) else value


def assert_equal_results(a: Path, b: Path) -> None:
    """Every file of student/ and onnx/ byte for byte, and the reports but for their times."""
    for name in ("student", "onnx"):
        left, right = _files(a / name), _files(b / name)
        assert left.keys() == right.keys()
        assert [file for file in left if left[file] != right[file]] == []
    left, right = (json.loads((folder / "report.json").read_text()) for folder in (a, b))
    assert _untimed(left) == _untimed(right)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_chain_of_real_passes_resumes_bit_for_bit_after_every_step(
    family: str, make: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    chain = [
        {"kind": "low_rank", "keep": 0.7, "targets": "*att*"},
        {"kind": "prune_width", "keep": {"ffn": 0.5, "heads": 0.5}},
        {"kind": "distill", "steps": 2, "losses": [{"kind": "embedding" if family == "bert" else "kl"}]},
        {"kind": "quantize", "bits": 8, "group_size": 16, "on_misfit": "keep"},
    ]
    recipe = make(*chain, model=str(request.getfixturevalue(f"tiny_{family}_folder")))
    whole = tmp_path / "whole"
    run(recipe, whole)
    model, _ = compresskit.load(whole)
    assert set(weights(whole)) <= set(model.state_dict())
    for last in range(len(chain)):
        part = _cut_after(whole, last, tmp_path / f"from{last}")
        run(recipe, part)
        assert_equal_results(part, whole)


def _cut_after(whole: Path, last: int, part: Path) -> Path:
    """A copy of a finished run as a kill after step `last` would have left it."""
    shutil.copytree(whole, part)
    for step in (part / "steps").iterdir():
        if int(step.name[:2]) > last:
            shutil.rmtree(step)
    for name in ("student", "onnx"):
        shutil.rmtree(part / name, ignore_errors=True)
    for name in ("report.json", "report.html"):
        (part / name).unlink()
    said = json.loads((part / "run.json").read_text())
    del said["finished"]
    (part / "run.json").write_text(json.dumps(said))
    return part


def test_a_resumed_run_exports_and_reports_as_an_uninterrupted_one(
    make: Any, tmp_path: Path, tiny_data: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = [{"kind": "prune_width", "keep": {"ffn": 0.5}}, Shake()]
    export = [{"kind": "onnx", "baselines": False, "rounds": 3, "threads": 1}]
    recipe = make(*passes, evaluate="each", export=export, data={**tiny_data, "evaluation": 24})
    whole = tmp_path / "whole"
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "cache"))  # the first run tokenises, the others need not
    run(recipe, whole)
    assert json.loads((whole / "onnx" / "config.json").read_text())["intermediate_size"] == 32
    for last in (1, 2):
        part = _cut_after(whole, last, tmp_path / f"from{last}")
        run(recipe, part)
        assert_equal_results(part, whole)


class _Copy(Exporter):
    """Write nothing but a note, or fail."""

    kind: Literal["copy"] = "copy"  # pyright: ignore[reportIncompatibleVariableOverride]
    fails: bool = False

    def write(self, student: Any, folder: Path) -> dict[str, Any]:
        if self.fails:
            raise RunFailedError("parity", where=str(folder))
        folder.mkdir()
        (folder / "note").write_text("x")
        return {"files": ["note"], "size_bytes": 1, "latency_ms": {"p50": 1.0, "p95": 1.0}}


def test_results_of_two_runs_never_mix(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPORTERS._classes, "copy", _Copy)
    out, first = tmp_path / "out", make(Shake(), export=[_Copy()])
    run(first, out)
    assert (out / "copy" / "note").is_file()
    with pytest.raises(RunFailedError, match="parity"):
        run(make(Shake(), Halve(), export=[_Copy(fails=True)]), out)
    assert not {"copy", "report.json", "report.html"} & {path.name for path in out.iterdir()}
    said: list[str] = []
    run(first, out, progress=said.append)
    assert said == [
        "text: text: sentences.txt: 8 calibration, 16 training, 12 evaluation sequences",
        "[0/1] original: kept from an earlier run",
        "[1/1] shake: kept from an earlier run",
        "export copy …",
    ]
    run(make(Shake()), out)
    assert (out / "report.json").is_file()
    assert not (out / "copy").exists()


def test_measure_compares_a_finished_student_with_its_original(make: Any, tmp_path: Path) -> None:
    report = run(make(Shake(scale=0.1), evaluate="ends"), tmp_path / "out")
    figures = compresskit.measure(tmp_path / "out")
    assert figures["student"]["spearman"] == report["passes"][-1]["metrics"]["spearman"]
    assert figures["original"]["params"] == report["passes"][0]["params"]
    run_file = tmp_path / "out" / "run.json"
    facts = json.loads(run_file.read_text())
    run_file.write_text(json.dumps({**facts, "source": "of other weights"}))
    with pytest.raises(CompressKitError, match="its files have changed since"):
        compresskit.measure(tmp_path / "out")
    run_file.write_text(json.dumps(facts))
    shutil.move(tmp_path / "out" / "student", tmp_path / "elsewhere")
    with pytest.raises(CompressKitError, match="add --original MODEL"):
        compresskit.measure(tmp_path / "elsewhere")
