"""The library's front door: compress a model, load a student, measure one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskit.data import Corpus, DataSource, prepare_examples
from compresskit.engine import LOG, Progress, run
from compresskit.errors import CompressKitError, ManyErrors
from compresskit.evaluate import Fidelity, timed_length
from compresskit.evaluate import evaluate as evaluate_model
from compresskit.export import Exporter
from compresskit.export.folder import is_exported, load_exported_tokenizer, read_exported
from compresskit.export.runtime import default_threads
from compresskit.export.scored import exported_figures, fixed_length
from compresskit.models import find_model, guess_task, load_config, load_model
from compresskit.passes import Pass
from compresskit.processors import Processor, load_processor
from compresskit.recipe import parse_recipe
from compresskit.recipe_mistakes import explain
from compresskit.recipe_text import parse_yaml
from compresskit.report import SCHEMA_VERSION
from compresskit.sentence import read_sentence_embedding
from compresskit.store import RUN_FILE, Store
from compresskit.student import HeldOut, Student, load_student_model
from compresskit.surgery.plugin import edits_of


def compress(
    model: str | Path,
    passes: Sequence[Pass],
    *,
    output: str | Path,
    data: DataSource | Mapping[str, Any] | None = None,
    task: str | None = None,
    teacher: str | None = None,
    seed: int = 0,
    evaluate: Literal["each", "ends", "never"] = "each",
    export: Sequence[Exporter] = (),
    gguf_file: str | None = None,
    fresh: bool = False,
    progress: Progress = LOG.info,
) -> dict[str, Any]:
    """Build the recipe that these arguments say and run it: the same student, bit for bit, as its YAML gives.

    Args:
        model: a folder, a hub id, `package:NAME/SUBFOLDER`, or a folder with a GGUF file.
        passes: what to do, in this order.
        output: the folder of the run; `compresskit.load(output)` reads the student.
        data: the text; without it what `DataSource()` says.
        task: without it, what the model's config.json says.
        teacher: another model to learn from, for the passes that have an option `teacher`; without it the original.
        seed: pass i draws all its randomness from (seed, i).
        evaluate: when to measure the student against the original.
        export: what to write besides the checkpoint.
        gguf_file: the file in `model` that holds the weights, where they are not safetensors.
        fresh: delete what an earlier run left in `output` first.
        progress: is told, in words, what happens.

    Returns:
        The report: what report.json holds.

    Raises:
        CompressKitError: all mistakes of the arguments at once. RunFailedError: anything else.
    """
    if not isinstance(model, str | Path):
        what = f"model is a {type(model).__name__}; it must be a folder, a hub id or package:NAME/SUBFOLDER"
        fix = "save it first, model.save_pretrained(folder) and tokenizer.save_pretrained(folder), and give the folder"
        raise CompressKitError(what, where="model", fix=fix)
    said = {
        "model": str(model),
        "gguf_file": gguf_file,
        "task": task,
        "data": data,
        "seed": seed,
        "evaluate": evaluate,
        "passes": _taught_by(_checked(passes), teacher),
        "export": tuple(export),
    }
    recipe = parse_recipe({key: value for key, value in said.items() if value is not None}, name="compress")
    return run(recipe, output, fresh=fresh, progress=progress)


def _checked(passes: Any) -> Sequence[Pass]:
    """Refuse what is no list of passes.

    Raises:
        CompressKitError: one pass alone, a class, a dict.
    """
    fix = "give a list of passes, such as [PruneWidth(keep=0.8)]"
    if not isinstance(passes, list | tuple):
        raise CompressKitError(f"passes is a {type(passes).__name__}, not a list", where="passes", fix=fix)
    for index, one in enumerate(passes):
        if not isinstance(one, Pass):
            what = f"the class {one.__name__}" if isinstance(one, type) else f"a {type(one).__name__}"
            raise CompressKitError(f"{what} is no pass", where=f"passes[{index}]", fix=fix)
    return passes


def _taught_by(passes: Sequence[Pass], teacher: str | None) -> tuple[Pass, ...]:
    """The passes, those that learn with this teacher."""
    if teacher is None:
        return tuple(passes)
    if not any(one.learns for one in passes):
        raise CompressKitError(
            "no pass learns from a teacher", where="teacher", fix="leave it out, or add a distill pass"
        )
    said = [one.model_dump(include={"teacher", "teachers"}, exclude_none=True) for one in passes]
    named = [index for index, one in enumerate(passes) if one.learns and said[index]]
    if named:
        what = f"passes[{named[0]}] ({passes[named[0]].kind}) names a teacher of its own"
        raise CompressKitError(what, where="teacher", fix="say it once: here, or in each pass that learns")
    try:
        return tuple(_told(one, teacher) if one.learns else one for one in passes)
    except ValidationError as error:
        raise CompressKitError(error.errors()[0]["msg"], where="teacher") from error


def _told(one: Pass, teacher: str) -> Pass:
    """The pass with that teacher, checked as if it had been said at once."""
    said = {name: getattr(one, name) for name in one.model_fields_set}
    return type(one).model_validate({**said, "teacher": teacher})


def load(folder: str | Path) -> tuple[PreTrainedModel, Any]:
    """The student in a run's output folder (or its `student` folder), and its tokenizer or image processor, for use.

    Raises:
        CompressKitError: no student there.
    """
    student = _student_folder(Path(folder))
    source = find_model(student)
    task = guess_task(source)
    model, _ = load_student_model(student, task)
    return model, load_processor(source, task)


def _student_folder(folder: Path) -> Path:
    student = folder / "student" if (folder / "student").is_dir() else folder
    if (folder / RUN_FILE).is_file() and student == folder:
        raise CompressKitError(
            f"the run in {folder} has no student yet", fix="finish it: give its `compresskit run` command again"
        )
    if not (student / "config.json").is_file():
        raise CompressKitError(f"no student in {folder}", fix="name the --output folder of a run, or its student/")
    return student


def measure(
    folder: str | Path, *, data: DataSource | None = None, original: str | None = None, task: str | None = None
) -> dict[str, dict[str, int | float]]:
    """Figures of a student and of its original on held-out text: `{"original": {…}, "student": {…}}`.

    Of an exported folder, the figures are those of its file, under the folder's name (`"onnx"`); where it takes texts
    of one length, both read texts that are cut to it.

    Args:
        folder: the output of a run, or its `student` folder, or one that it exported.
        data: other text than the run's.
        original: the model to compare with, for a student that lies outside its run's folder.
        task: what both do; without it what the run says, else the original's config.json.

    Raises:
        CompressKitError: no student there, nothing says what it was made from, or a task that they lack.
    """
    exported = read_exported(Path(folder)) if is_exported(Path(folder)) else None
    student = Path(folder).resolve() if exported else _student_folder(Path(folder))
    beside = student.parent
    facts = Store(beside).read_run() if (beside / RUN_FILE).is_file() else {}
    if original is None and not facts:
        raise CompressKitError(f"nothing beside {student} says what it was made from", fix="add --original MODEL")
    made_from, gguf_file = (original, None) if original else (facts["model"], facts.get("gguf_file"))
    source = find_model(str(made_from), gguf_file=gguf_file)
    task = str(task or facts.get("task") or guess_task(source))
    text = data or DataSource.model_validate(facts.get("data", {}))
    if exported and (length := fixed_length(exported)):
        text = text.model_copy(update={"max_length": min(text.max_length, length)})
    processor = load_processor(source, task)
    if original is None and facts.get("source") not in (None, source.fingerprint):
        raise CompressKitError(
            f"{made_from} is not the model that {student} was made from: its files have changed since",
            where="model",
            fix="name the right one with --original MODEL",
        )
    teacher = load_model(source, task).requires_grad_(False)
    corpus = prepare_examples(text, processor, teacher.config, task=task, seed=facts.get("seed", 0))
    fidelity = Fidelity(teacher, corpus.evaluation, task=task, sentence=read_sentence_embedding(source.folder))
    if exported:
        held_out = _reading(student, teacher, processor, task, corpus)
        length = timed_length(teacher)  # as the original is timed
        own = exported_figures(student, exported, fidelity, held_out, threads=default_threads(), length=length)
        name = student.name
    else:
        model, edits = load_student_model(student, task)
        made = Student(model, teacher, processor, task, corpus).with_edits(edits)
        name, own = "student", evaluate_model(model, fidelity, made.tokenizer, held_out=made.held_out)
        own["size_bytes"] = sum(path.stat().st_size for path in student.glob("*.safetensors"))
    return {"original": evaluate_model(teacher, fidelity, processor), name: own}


def _reading(
    exported: Path, teacher: PreTrainedModel, processor: Processor, task: str, corpus: Corpus
) -> HeldOut | None:
    """How an exported student reads the held-out text, where that is not how its original does.

    The checkpoint beside it says which tokens are left.

    Raises:
        CompressKitError: tokens were dropped, and nothing says which.
    """
    beside = exported.parent / "student"
    if (beside / "config.json").is_file():
        edits = edits_of(load_config(find_model(beside)))
        return Student(teacher, teacher, processor, task, corpus).with_edits(edits).held_out
    if isinstance(processor, PreTrainedTokenizerBase):
        left = load_exported_tokenizer(exported).get_vocab_size()
        if left != len(processor):
            raise CompressKitError(
                f"reads {left} tokens and its original {len(processor)}, and no student beside it says which",
                where=str(exported),
                fix="measure it inside its run's output folder",
            )
    return None


def read_data_option(text: str | None) -> DataSource | None:
    """The data source that a mapping on the command line says; None for None.

    Raises:
        ManyErrors: all its mistakes.
    """
    if text is None:
        return None
    parsed = parse_yaml(text, "--data")
    if parsed.mistakes:
        raise ManyErrors(parsed.mistakes)
    try:
        return DataSource.model_validate(parsed.value)
    except ValidationError as error:
        raise ManyErrors(explain(error, DataSource, parsed.value, parsed.where)) from error


def read_report(folder: str | Path) -> dict[str, Any]:
    """What report.json in a run's output folder says.

    Raises:
        CompressKitError: no report there, or one that cannot be read.
    """
    path = Path(folder) / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        fix = "a run writes it when it is finished: give its `compresskit run` command again"
        raise CompressKitError(f"no {path}", fix=fix) from error
    except (OSError, ValueError) as error:  # not JSON, or not text
        raise CompressKitError(f"cannot be read: {error}", where=str(path), fix="run the recipe again") from error
    if not isinstance(report, dict) or report.get("schema_version") != SCHEMA_VERSION:
        what = f"is no report of schema {SCHEMA_VERSION}, which this compresskit reads"
        raise CompressKitError(what, where=str(path), fix="run the recipe again")
    return report
