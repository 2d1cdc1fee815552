"""Text from an exported decoder, as it comes, from what the folder holds: its tokenizer and ONNX Runtime do it all."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import onnxruntime as ort
from tokenizers import Tokenizer

from compresskit.errors import CompressKitError
from compresskit.export.folder import MODEL_FILE, load_exported_tokenizer, read_exported
from compresskit.export.runtime import open_session, session_sizes
from compresskit.export.steps import greedy_tokens, keeps_past

# What a tokenizer shows for bytes that do not make a letter yet.
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def end_tokens(folder: Path) -> set[int]:
    """The tokens after which nothing comes, as generation_config.json or config.json say."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        said = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        found |= {one for one in (said if isinstance(said, list) else [said]) if isinstance(one, int)}
    return found


def _open(folder: Path, threads: int) -> tuple[ort.InferenceSession, Tokenizer]:
    """Session and tokenizer of an exported decoder that fit each other."""
    manifest = read_exported(folder)
    if manifest.get("task") != "text-generation":
        raise CompressKitError(
            f"is made for {manifest.get('task')}", where=str(folder), fix="generate needs a text-generation export"
        )
    tokenizer = load_exported_tokenizer(folder)
    session = open_session(folder / MODEL_FILE, threads=threads)
    if not keeps_past(value.name for value in session.get_inputs()):
        fix = "export it with 'cache: true'"
        raise CompressKitError("takes no past_key_values", where=str(folder / MODEL_FILE), fix=fix)
    texts = session_sizes(session).batch
    if texts not in (None, 1):
        fix = "export it with 'batch: 1', or leave batch out"
        raise CompressKitError(f"takes {texts} texts at a time; generate writes one", where=str(folder), fix=fix)
    known = session.get_outputs()[0].shape[-1]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if isinstance(known, int) and largest >= known:
        raise CompressKitError(
            f"the tokenizer has token {largest}, and the model knows {known}: they are not of one model",
            where=str(folder),
            fix="put the tokenizer back that was exported with the model",
        )
    return session, tokenizer


def generate(folder: Path, prompt: str, *, max_new_tokens: int, threads: int) -> Iterator[str]:
    """What a model writes after a prompt, greedily, in pieces that join to the whole.

    Args:
        folder: an export with a past, whose files are checked first.
        prompt: not empty.
        max_new_tokens: ≥ 1; fewer come where the model ends the text.
        threads: of ONNX Runtime.

    Raises:
        CompressKitError: a folder that is no such export or was changed, or a tokenizer of another model.
    """
    session, tokenizer = _open(folder, threads)
    ids: list[int] = tokenizer.encode(prompt).ids
    if not ids:
        raise CompressKitError("the prompt is empty", where="PROMPT", fix="give a word to begin with")
    return _pieces(greedy_tokens(session, ids), tokenizer, ids, end_tokens(folder), max_new_tokens)


def _pieces(tokens: Iterator[int], tokenizer: Tokenizer, prompt: list[int], ends: set[int], most: int) -> Iterator[str]:
    """What each token adds to the text, as soon as it is whole: a letter may take several."""
    taken, shown = list(prompt), tokenizer.decode(prompt)
    for token in islice(tokens, most):
        if token in ends:
            break
        taken.append(token)
        text = tokenizer.decode(taken)
        if text.startswith(shown) and not text.endswith(_UNFINISHED):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(taken)[len(shown) :]
