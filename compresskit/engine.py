"""run(): the only loop over passes. Every step is applied, verified, measured and saved before the next begins.

recipe ─► source, text, forecast ─► store ─► [pass: apply, verify, measure, save]… ─► student/, exports, report
"""

import hashlib
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compresskit.data.sequences import PARTS
from compresskit.environment import computing_versions, describe_environment
from compresskit.errors import CompressKitError, RunFailedError
from compresskit.evaluate import Fidelity, checkpoint_bytes, count_parameters, evaluate
from compresskit.export import EXPORTERS
from compresskit.job import Job, Prints, prepare, take_prints
from compresskit.models import ModelSource, load_empty, load_model
from compresskit.progress import working
from compresskit.recipe import Recipe, dump_recipe, reading
from compresskit.report import SCHEMA_VERSION, write_report
from compresskit.store import FAILURE_LOG, Step, Store, opened, refuse_foreign, write_json
from compresskit.student import Student, load_student_model, loads_with, save_student
from compresskit.surgery.edits import replay

LOG = logging.getLogger(__name__)
Progress = Callable[[str], None]


def run(
    recipe: Recipe | str | Path,
    output: str | Path,
    *,
    settings: Sequence[str] = (),
    fresh: bool = False,
    progress: Progress = LOG.info,
) -> dict[str, Any]:
    """Do what the recipe says, going on where an earlier run of it stopped.

    Args:
        recipe: a Recipe, or the path of its YAML.
        output: the folder of the run: new, empty, or holding this run.
        settings: `key=value` on top of a YAML, as `--set` takes them.
        fresh: delete what an earlier run left there first.
        progress: is told, in words, what happens.

    Returns:
        The report: what report.json holds.

    Raises:
        CompressKitError: the user's mistake. RunFailedError: anything else; the steps before it are kept.
    """
    output = Path(output)
    refuse_foreign(output)
    with reading(recipe, settings=settings) as read:
        return _finished(prepare(read), output, fresh=fresh, progress=progress)


def _finished(job: Job, output: Path, *, fresh: bool, progress: Progress) -> dict[str, Any]:
    prints = take_prints(job)
    for warning in job.forecast.warnings:
        progress(f"warning: {warning}")
    with opened(output) as store:
        if fresh:
            store.wipe(list(EXPORTERS))
        store.claim(prints.identity)
        if store.is_finished(prints.result):
            progress(f"already done: {output} holds this very result (--fresh makes it again)")
            report = Step(output).read("report.json")
            warn_of_other_versions(report["passes"], len(report["passes"]), progress)
            return report
        if store.holds_other_result(prints.result):
            progress(f"{output} holds the result of other passes, exports or versions: it will be replaced")
        altered = store.altered(prints.result)
        if altered:
            progress(f"{output / altered} was altered or removed since the run ended: the result is made again")
        amounts = job.corpus.amounts()
        counted = ", ".join(f"{amounts[part]} {part}" for part in PARTS)
        progress(f"text: {amounts['origin']}: {counted} sequences")
        return _Run(job, prints, store, progress).finish()


class _Run:
    """One run under way: the student, and what the report will say."""

    def __init__(self, job: Job, prints: Prints, store: Store, progress: Progress) -> None:
        self.job, self.prints, self.store, self.progress = job, prints, store, progress
        self.records: list[dict[str, Any]] = []
        self.kinds = ["original", *(one.kind for one in job.recipe.passes)]
        self._fidelity: Fidelity | None = None

    def finish(self) -> dict[str, Any]:
        """Every step that is missing, then the result."""
        steps = self._stored()
        self._require_space(len(steps))
        with working("reading the original"):
            self.original = load_model(self.job.source, self.job.task).requires_grad_(False)
        for index in range(len(steps)):
            if self._measures(index) and not self.records[index]["metrics"]:
                steps[index] = self._measure_kept(index, steps[index])
        self.student = self._student_after(steps[-1] if steps else None)
        for index in range(len(steps), len(self.kinds)):
            self._do(index)
        return self._write_result()

    def _stored(self) -> list[Step]:
        """The longest run of steps from the first that are on the disk, some perhaps without figures."""
        found: list[Step] = []
        for index, kind in enumerate(self.kinds):
            step = self.store.find(index, kind, self.prints.steps[index])
            if step is None:
                break
            self.progress(f"[{index}/{len(self.kinds) - 1}] {kind}: kept from an earlier run")
            self.records.append(step.read("record.json"))
            found.append(step)
        warn_of_other_versions(self.records, len(self.kinds), self.progress)
        return found

    def _measures(self, index: int) -> bool:
        ends = index in (0, len(self.kinds) - 1)
        return self.job.recipe.evaluate == "each" or (self.job.recipe.evaluate == "ends" and ends)

    def _require_space(self, done: int) -> None:
        """Steps to come, the student's own folder, and for each export the student and the float baseline."""
        steps = self.job.forecast.steps
        sizes = [step.size_bytes for step in steps]
        exports = len(self.job.recipe.export) * (steps[0].memory_bytes + 2 * steps[-1].memory_bytes)
        self.store.need(sum(sizes[max(done, 1) :]) + sizes[-1] + exports)

    def _measure_kept(self, index: int, step: Step) -> Step:
        """The same step with the figures that an earlier run did not want; its pass is not done again."""
        self.progress(f"[{index}/{len(self.kinds) - 1}] {self.kinds[index]}: measuring …")
        with self._named(f"passes[{index - 1}] ({self.kinds[index]})" if index else "original"):
            student = self._read_student(step) if index else self._untouched(self.original)
            record = self.records[index] = self.records[index] | {"metrics": self._figures(student)}

            def write(folder: Path) -> None:
                write_json(folder / "record.json", record)
                if index:
                    shutil.copytree(step.student, folder / "student")

            return self.store.save(index, self.kinds[index], self.prints.steps[index], write)

    def _student_after(self, step: Step | None) -> Student:
        if step is None or len(self.records) == 1:
            return self._untouched(load_model(self.job.source, self.job.task))
        return self._read_student(step)

    def _untouched(self, model: PreTrainedModel) -> Student:
        """A student that is as the original still, but for its weights."""
        job = self.job
        return Student(model, self.original, job.tokenizer, job.task, job.corpus, sentence=job.sentence)

    def _read_student(self, step: Step) -> Student:
        model, edits = load_student_model(step.student, self.job.task)
        return self._untouched(model).with_edits(edits)

    def _do(self, index: int) -> None:
        """Apply, verify, measure and save pass `index` - 1; index 0 is the original."""
        kind = self.kinds[index]
        one = self.job.recipe.passes[index - 1] if index else None
        where = f"passes[{index - 1}] ({kind})" if one else kind
        self.progress(f"[{index}/{len(self.kinds) - 1}] {kind} …")
        with self._named(where):
            notes: dict[str, Any] = {}
            begun = time.perf_counter()
            if one:
                with seeded(self.job.recipe.seed, index) as generator:
                    notes = one.apply(self.student, generator=generator)
                kept = self.student.round_to_stored()
                notes |= {"kept_float32": kept} if kept else {}
            elapsed_s = time.perf_counter() - begun
            self.student.model.eval()
            verify(self.student, self.job.source, is_original=one is None)
            if one is None and (broken := _not_finite(self.student.model)):
                names = ", ".join(broken)
                self.progress(f"warning: {names}: NaN or infinity, which the answer to held-out text does not read")
            record = {
                "kind": kind,
                "options": one.model_dump(mode="json", serialize_as_any=True, exclude={"kind"}) if one else {},
                "params": count_parameters(self.student.model),
                "size_bytes": checkpoint_bytes(self.student.model, self.original, self.student.edits),
                "metrics": self._figures(self.student) if self._measures(index) else {},
                "elapsed_s": round(elapsed_s, 3),
                "versions": computing_versions(),
                "notes": notes,
            }
            self.store.save(index, kind, self.prints.steps[index], lambda folder: self._write_step(folder, record))
        self.records.append(record)

    def _write_step(self, folder: Path, record: dict[str, Any]) -> None:
        write_json(folder / "record.json", record)
        if record["kind"] != "original":
            self._save_proven(folder / "student")

    def _save_proven(self, folder: Path) -> None:
        """Write the student, and read it again as a user will; nothing gets its final name before that."""
        save_student(self.student, folder)
        try:
            prove_reloads(self.student, folder)
        except RunFailedError:
            raise
        except Exception as error:
            log = self._log_failure()
            what = f"the saved student cannot be loaded again ({type(error).__name__}: {error}); {self.store.kept()}"
            fix = f"leave this pass out, or report the bug together with the recipe and {log}"
            raise RunFailedError(what, fix=fix) from error

    def _figures(self, student: Student) -> dict[str, int | float]:
        if self._fidelity is None:
            self._fidelity = Fidelity(
                self.original, self.job.corpus.evaluation, task=self.job.task, sentence=self.job.sentence
            )
        figures = evaluate(student.model, self._fidelity, student.tokenizer, held_out=student.held_out)
        return {name: figure for name, figure in figures.items() if name not in ("params", "size_bytes")}

    def _write_result(self) -> dict[str, Any]:
        recipe, store = self.job.recipe, self.store
        exports: list[dict[str, Any]] = []
        with self._named("student"), store.explaining_full_disk():
            store.withdraw(list(EXPORTERS))
            store.replace(store.folder / "student", self._save_proven)
        for index, exporter in enumerate(recipe.export):
            self.progress(f"export {exporter.kind} …")
            with self._named(f"export[{index}] ({exporter.kind})"), store.explaining_full_disk():
                entry = {"kind": exporter.kind, **exporter.write(self.student, store.folder / exporter.kind)}
            foretold = self.job.forecast.export_bytes[index]
            exports.append(entry if foretold is None else entry | {"predicted_bytes": foretold})
        report = {
            "schema_version": SCHEMA_VERSION,
            "model": recipe.model,
            "task": self.job.task,
            "seed": recipe.seed,
            "recipe": dump_recipe(recipe),
            "data": self.job.corpus.amounts(),
            "loads_with": loads_with(store.folder / "student"),
            "warnings": list(self.job.forecast.warnings),
            "passes": self.records,
            "export": exports,
            "environment": describe_environment(),
        }
        with self._named("report"), store.explaining_full_disk():
            write_report(report, store.folder)
        folders = [exporter.kind for exporter in recipe.export]
        (store.folder / FAILURE_LOG).unlink(missing_ok=True)
        store.finish(self.prints.result, ["student", *folders, "report.json", "report.html"])
        return report

    @contextmanager
    def _named(self, where: str) -> Iterator[None]:
        """Say in every error which pass it was, and what is kept; the traceback of a foreign one goes to a file."""
        try:
            yield
        except CompressKitError as error:
            error.at(where)
            raise
        except Exception as error:
            log = self._log_failure()
            what = f"{type(error).__name__}: {error}; {self.store.kept()}"
            fix = f"the traceback is in {log}; the same command goes on from the last saved step"
            raise RunFailedError(what, where=where, fix=fix) from error

    def _log_failure(self) -> Path:
        """Write the traceback of the error that is being handled to a file of the run."""
        log = self.store.folder / FAILURE_LOG
        log.write_text(traceback.format_exc(), encoding="utf-8")
        return log


def warn_of_other_versions(records: Sequence[Mapping[str, Any]], steps: int, progress: Progress) -> None:
    """Say which kept steps other versions of the libraries made; none is made again for it."""
    now = computing_versions()
    for index, record in enumerate(records):
        then = record.get("versions", {})
        told = ", ".join(
            f"{name} {then[name]} then, {now.get(name)} now" for name in then if then[name] != now.get(name)
        )
        if told:
            progress(f"warning: [{index}/{steps - 1}] {record['kind']}: {told} (--fresh makes it again)")


@contextmanager
def seeded(seed: int, index: int) -> Iterator[torch.Generator]:
    """A generator that depends on (seed, index) alone; torch's own one is set to it inside and given back after."""
    word = int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big") >> 1
    with torch.random.fork_rng():
        torch.manual_seed(word)
        yield torch.Generator().manual_seed(word)


@torch.no_grad()
def verify(student: Student, source: ModelSource, *, is_original: bool = False) -> None:
    """Refuse a student that gives no finite answer, or whose edits do not lead to its shapes.

    Raises:
        RunFailedError: the pass that made it has a bug. CompressKitError: the original is broken itself.
    """
    fix = "leave this pass out, or report the bug together with the recipe"
    if not torch.isfinite(_answer(student.model, student)).all():
        broken = _not_finite(student.model)
        what = "the model's answer to held-out text is not finite"
        what += f": {', '.join(broken)} {'hold' if len(broken) > 1 else 'holds'} NaN or infinity" if broken else ""
        if is_original:
            raise CompressKitError(what, fix="the model is broken before any pass: use one with intact weights")
        raise RunFailedError(what, fix=fix)
    empty = load_empty(source, student.task)
    replay(student.edits, empty)
    expected = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    present = {name: tuple(tensor.shape) for name, tensor in student.model.state_dict().items()}
    differing = sorted(name for name in expected.keys() | present.keys() if expected.get(name) != present.get(name))
    if differing:
        name = differing[0]
        what = f"{name} has shape {present.get(name)}, and its recorded edits lead to {expected.get(name)}"
        raise RunFailedError(what, fix=fix)


@torch.no_grad()
def prove_reloads(student: Student, folder: Path) -> None:
    """Refuse a checkpoint that does not answer, bit for bit, as the student in memory. Holds one more model meanwhile.

    Raises:
        RunFailedError: it answers differently. Whatever loading it raises, else.
    """
    reloaded, edits = load_student_model(folder, student.task)
    fix = "leave this pass out, or report the bug together with the recipe"
    if edits != student.edits:
        raise RunFailedError(f"the saved student has {len(edits)} edits, the student {len(student.edits)}", fix=fix)
    ours, theirs = student.model.state_dict(), reloaded.state_dict()
    differing = sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not _is_same(ours[name], theirs[name])
    )
    if differing:
        raise RunFailedError(f"the saved student, loaded again, has another {differing[0]}", fix=fix)
    expected, found = _answer(student.model, student), _answer(reloaded, student)
    if expected.shape != found.shape:
        what = f"the saved student gives outputs {tuple(found.shape)}, the student {tuple(expected.shape)}"
        raise RunFailedError(what, fix=fix)
    if not _is_same(expected, found):
        apart = float((expected - found).norm() / expected.norm())
        raise RunFailedError(f"the saved student, loaded again, differs from the student by {apart:.3g}", fix=fix)


def _not_finite(model: PreTrainedModel) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same values in the same type; NaN, in weights that no answer reads, is itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _answer(model: PreTrainedModel, student: Student) -> torch.Tensor:
    """The first output for two held-out texts, without what stands at padding."""
    batch = next(iter(student.corpus.evaluation.batches(2)))
    answer = model(**batch)[0]
    return answer[batch["attention_mask"].bool()] if answer.ndim == 3 else answer
