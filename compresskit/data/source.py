"""Where text comes from: options, and how each kind of source is opened and read."""

import glob
import hashlib
import logging
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import datasets
from datasets.exceptions import DatasetGenerationError
from pydantic import BeforeValidator, Field, model_validator

from compresskit.cache import cache_folder
from compresskit.config import Config, did_you_mean
from compresskit.data.cache import cached_json
from compresskit.data.python_docs import read_documents, read_sources
from compresskit.errors import CompressKitError

#: Errors of the datasets library (and of pandas and pyarrow under it) that a bad file or name raises.
READ_ERRORS = (DatasetGenerationError, ValueError, OSError, RuntimeError)
_TABLES = ("json", "csv", "parquet", "hub")
_STRING_TYPES = ("string", "large_string", "string_view", "null")


def _as_tuple(path: Any) -> Any:
    return (path,) if isinstance(path, str | Path) else path


class DataSource(Config):
    """Where text (or images) comes from and how much of it is used.

    Texts are put in an order that depends on their hash and the seed alone; evaluation takes its share first, then
    calibration, then training. Evaluation and calibration take at most a fifth of the text each; training takes
    what is left, up to what it asks for. Blank and empty cells are no text; equal texts count once.
    """

    source: Literal["python-docs", "json", "csv", "parquet", "text", "imagefolder", "hub"] = "python-docs"
    #: a file, a glob or a list of them (json covers jsonl), for `imagefolder` a folder; for `hub` the data set's id,
    #: such as 'owner/name'
    path: Annotated[tuple[str, ...], BeforeValidator(_as_tuple, json_schema_input_type=str | tuple[str, ...])] = ()
    #: for `hub`: the configuration, as `datasets.load_dataset(path, name)` has it
    name: str | None = None
    #: for `hub`: the part to read, slices such as 'train[:20000]' too
    split: str | None = None
    #: the column that holds the text, or the images; `text` files and `python-docs` have none but "text"
    column: str = "text"
    #: a second column: what stands before the text (a question, say); models read both, `distill` counts the text alone
    prompt: str | None = None
    #: tokens in a sequence; texts are cut, or for language models packed, to it
    max_length: int = Field(default=128, ge=4)
    #: sequences in each part
    calibration: int = Field(default=128, ge=1)
    training: int = Field(default=4096, ge=0)
    evaluation: int = Field(default=200, ge=1)

    @model_validator(mode="after")
    def _options_fit_source(self) -> "DataSource":
        if self.source == "python-docs" and self.path:
            raise ValueError(
                "source 'python-docs' takes no path; say 'source: text' (or json, csv, parquet) to read one"
            )
        if self.source != "python-docs" and not self.path:
            raise ValueError(f"source {self.source!r} needs 'path'")
        if self.source == "hub" and len(self.path) != 1:
            raise ValueError("source 'hub' takes one path: the data set's id")
        if self.source != "hub" and (self.name or self.split):
            raise ValueError(f"'name' and 'split' are for source 'hub', not for {self.source!r}")
        if self.prompt is not None and self.source not in _TABLES:
            raise ValueError(f"'prompt' names a column, and source {self.source!r} has none to name")
        return self


class Prompted(NamedTuple):
    """A text and what stands before it; both as they are in their columns, one right after the other."""

    prompt: str
    text: str


Text = str | Prompted


@dataclass(frozen=True)
class Opened:
    """A source that was found but not yet read.

    Attributes:
        digest: sha256 of the content, wherever it lies.
        origin: the source in words.
        read: the texts in order; given True, whole documents for packing instead of single texts. With a column of
            prompts they are pairs.
    """

    digest: str
    origin: str
    read: Callable[[bool], Sequence[Text]]


def open_source(source: DataSource) -> Opened:
    """Find what `source` names and take its digest, without reading local files as tables.

    Raises:
        CompressKitError: a missing file, an unknown hub name, no network, a column that is not there or no text.
    """
    if source.source == "imagefolder":
        what = "the task reads text, and 'imagefolder' has none"
        raise CompressKitError(what, where="data.source", fix="use json, csv, parquet, text, hub or python-docs")
    if source.source == "python-docs":
        return _open_python_docs()
    if source.source == "hub":
        return _open_hub(source)
    return _open_files(source)


def _open_python_docs() -> Opened:
    contents, digest = read_sources()

    def read(documents: bool) -> list[str]:
        path = cache_folder() / "texts" / f"python-docs-{digest[:16]}.json"
        found: list[list[str]] = cached_json(path, lambda: read_documents(contents))
        return [" ".join(document) for document in found] if documents else [s for document in found for s in document]

    return Opened(digest, f"python-docs of {platform.python_implementation()} {platform.python_version()}", read)


def _open_hub(source: DataSource) -> Opened:
    place, split = source.path[0], source.split or "train"
    try:
        with watched():
            table = datasets.load_dataset(place, source.name, split=split)
    except READ_ERRORS as error:
        raise CompressKitError(
            f"no data set {place!r} (name {source.name}, split {split}): {first_line(error)}",
            where="data.path",
            fix="check the id, its name and split and the network, or use local files: 'source: json' with a path",
        ) from error
    texts = _texts(table, source, place)
    content = (text.encode() if isinstance(text, str) else "\0".join(text).encode() for text in texts)
    return Opened(_digest(content), f"{place} ({split})", lambda _: texts)


def _open_files(source: DataSource) -> Opened:
    files = [file for path in source.path for file in expand(path)]
    _refuse_empty(files)
    origin = f"{source.source}: {', '.join(file.name for file in files[:3])}{' …' if len(files) > 3 else ''}"

    def read(documents: bool) -> Sequence[Text]:
        texts = _read_table(source, files)
        return join_lines([*map(str, texts)]) if documents and source.source == "text" else texts

    return Opened(_digest(file.read_bytes() for file in files), origin, read)


@contextmanager
def called(key: str) -> Iterator[None]:
    """Mistakes in a source are said of the recipe's `data`; inside, of another key that holds one."""
    try:
        yield
    except CompressKitError as error:
        if error.where and error.where.startswith("data."):
            error.where = key + error.where.removeprefix("data")
        raise


def expand(path: str) -> list[Path]:
    """The files behind one path or glob, sorted by name."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        raise CompressKitError(f"{path!r} is a folder", where="data.path", fix=f"name its files: '{place}/*'")
    found = sorted(Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file())
    if not found:
        near = did_you_mean(place.name, (p.name for p in place.parent.iterdir())) if place.parent.is_dir() else None
        hint = f"did you mean '{place.parent / near}'?" if near else "give an existing file or a glob that matches one"
        raise CompressKitError(f"no file {path!r}", where="data.path", fix=hint)
    return found


def _read_table(source: DataSource, files: list[Path]) -> Sequence[Text]:
    # The library's own cache would hold a second copy and knows files by their time stamp; ours goes by content.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        try:
            with watched():
                table = datasets.load_dataset(
                    source.source, data_files=[str(file) for file in files], split="train", cache_dir=scratch
                )
        except READ_ERRORS as error:
            cause = error.__cause__ or error
            raise CompressKitError(
                f"cannot read this as {source.source}: {first_line(cause)}",
                where=", ".join(str(file) for file in files[:3]),
                fix="mend the file, or say the 'source' that it is: json (also jsonl), csv, parquet or text",
            ) from error
        return _texts(table, source, ", ".join(source.path))


def _refuse_empty(files: list[Path]) -> None:
    empty = [str(file) for file in files if not file.stat().st_size]
    if empty:
        raise CompressKitError("is empty", where=", ".join(empty[:3]), fix="give a file with text")


def _texts(table: datasets.Dataset, source: DataSource, place: str) -> Sequence[Text]:
    """The texts of one column, stripped, without blank ones; with a column of prompts both as they are."""
    cells = [cell or "" for cell in _column(table, source.column, place, "column")]
    if source.prompt is None:
        found: Sequence[Text] = [text for cell in cells if (text := cell.strip())]
    else:
        prompts = _column(table, source.prompt, place, "prompt")
        found = [Prompted(prompt or "", cell) for prompt, cell in zip(prompts, cells, strict=True) if cell.strip()]
    if not found:
        raise CompressKitError(
            f"{place} has {len(table)} rows and no text in column {source.column!r}",
            where="data",
            fix="give a file with text",
        )
    return found


def _column(table: datasets.Dataset, column: str, place: str, option: str) -> list[str | None]:
    """The cells of one column of strings, which the option `option` names."""
    if column not in table.column_names:
        near = did_you_mean(column, table.column_names)
        listed = ", ".join(repr(name) for name in table.column_names)
        raise CompressKitError(
            f"no column {column!r} in {place}; it has {listed or 'none'}",
            where=f"data.{option}",
            fix=f"did you mean '{option}: {near}'?" if near else f"name one of them with '{option}'",
        )
    cells = list(table[column])
    kind = getattr(table.features[column], "dtype", type(table.features[column]).__name__)
    known = [cell for cell in cells if cell is not None]
    if known and kind not in _STRING_TYPES:
        raise CompressKitError(
            f"column {column!r} of {place} holds {kind}, not text (first cell: {str(known[0])[:40]!r})",
            where=f"data.{option}",
            fix=f"name a column of strings with '{option}'",
        )
    return cells


def join_lines(lines: list[str]) -> list[str]:
    """Neighbouring lines of a file joined to documents, so that packed windows keep the flow of the text.

    About 64 documents a file, but of 2 000 to 20 000 characters each: small texts still split into parts.
    """
    size = min(max(sum(map(len, lines)) // 64, 2_000), 20_000)
    documents: list[list[str]] = [[]]
    length = 0
    for line in lines:
        if length >= size:
            documents.append([])
            length = 0
        documents[-1].append(line)
        length += len(line)
    return ["\n".join(document) for document in documents]


def _digest(contents: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """The error's kind and the first line of what it says."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0][:200]}"


@contextmanager
def watched() -> Iterator[None]:
    """The library's bars shown on a terminal only; its log held back, because its errors are told as ours."""
    verbosity = datasets.logging.get_verbosity()
    bars_were_off = datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars_were_off:
            datasets.enable_progress_bars()
