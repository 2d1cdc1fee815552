"""Sentences that every Python installation carries: the reference's topics, the library's docstrings and comments.

The source files of the standard library are parsed, never imported. Text differs from one Python version to the next,
so whoever caches something made from it must keep `read_sources`' digest beside it.
"""

import ast
import hashlib
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from compresskit.errors import CompressKitError

#: Raised by one whenever the same source files would give other sentences.
VERSION = 1
SHORTEST, LONGEST = 20, 400  # characters in a sentence
_TOPICS = "pydoc_data/topics.py"
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "__pycache__",
    "encodings",
}
_BULLET = re.compile(r"^(?:[*\-+o•]|\d{1,2}[.)]|\([a-z0-9]\))\s+")
_RULE = re.compile(r"^([^\w\s])\1{2,}$")
_CODE = re.compile(
    r">>>|::=|::|\.\.\s|[{}\\|~^]|\$\s|==|\b\w+\s=\s|->|@\w|:\w+:`|__\w+__\s*=|^\s*(?:def|class|import|from)\s\w+.*[:)]$"
)
_END = re.compile(r"""(?<=[.!?])["')\]]?\s+(?=["'(\[“‘*]?[A-Z])""")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|cf|vs|Mr|Dr|St|No|Fig|Sec|approx)|\b[A-Z])\.$")
_MARKUP = re.compile(r"``?|\*\*(?=\S)|(?<=\S)\*\*|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)")
_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#.*\n)+", re.MULTILINE)
_HASHES = re.compile(r"^[ \t]*#+ ?", re.MULTILINE)
_WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*")


def cut_sentences(text: str) -> list[str]:
    """The sentences of English prose in `text`, in order; headings, tables, grammar and code are left out.

    A sentence starts with a letter or a quote, has 20 to 400 characters and at least three words, and nine of ten of
    its characters are letters, spaces or plain punctuation. It ends with a full stop, but for the summary lines of
    docstrings, which often go without: five words and a capital do for those.
    """
    sentences = []
    for paragraph in _paragraphs(text):
        start = 0
        for end in [*(match.end() for match in _END.finditer(paragraph)), len(paragraph)]:
            piece = paragraph[start:end].strip()
            if _ABBREVIATION.search(piece) and end < len(paragraph):
                continue
            start = end
            if _is_prose(piece):
                sentences.append(piece)
    return sentences


def _paragraphs(text: str) -> Iterator[str]:
    """Blocks of lines joined to one line each; a blank line or a bullet starts a new one."""
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        bare = line.strip()
        bullet = _BULLET.match(bare)
        if bullet or not bare or _RULE.match(bare):
            if block:
                yield _MARKUP.sub("", " ".join(block))
            block = []
            bare = bare[bullet.end() :] if bullet else ""
        if bare:
            block.append(re.sub(r"\s+", " ", bare))


def _is_prose(sentence: str) -> bool:
    if not SHORTEST <= len(sentence) <= LONGEST or _CODE.search(sentence):
        return False
    if not (sentence[0].isalpha() or sentence[0] in "\"'“‘("):
        return False
    words = len(_WORD.findall(sentence))
    stopped = sentence[-1] in ".!?" or sentence[-2:] in ('."', ".'", ".)")
    if words < 3 or not (stopped or (words >= 5 and sentence[0].isupper() and sentence[-1].isalnum())):
        return False
    plain = sum(character.isalpha() or character in " ,.;:'’\"-()" for character in sentence)
    return plain >= 0.9 * len(sentence)


def docstrings(source: bytes) -> list[str]:
    """Every docstring of a Python source file, in the order of the file; of a file that does not parse, none."""
    try:
        waiting: list[ast.stmt | ast.Module] = [ast.parse(source)]
    except (SyntaxError, ValueError):
        return []  # a few library files are kept broken or in odd encodings on purpose
    texts = []
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            texts.append(ast.get_docstring(node))
        inner = [s for name in ("body", "handlers", "orelse", "finalbody") for s in getattr(node, name, [])]
        waiting.extend(reversed(inner))
    return [text for text in texts if text]


def comments(source: bytes) -> list[str]:
    """Blocks of whole-line comments of a Python source file, in the order of the file, without their hashes."""
    blocks = _COMMENT_BLOCK.findall(source.decode("utf-8", errors="replace"))
    return [_HASHES.sub("", block) for block in blocks]


def topics(source: bytes) -> list[str]:
    """The texts of `pydoc_data/topics.py`, sorted by topic."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            entries = ast.literal_eval(node.value)
            return [entries[name] for name in sorted(entries)]
    return []


def read_sources() -> tuple[dict[str, bytes], str]:
    """The standard library's source files by relative path, sorted, and a digest of Python's version and of them all.

    Raises:
        CompressKitError: an installation without its sources (a zipped or frozen one).
    """
    root = Path(sysconfig.get_path("stdlib"))
    sources = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    }
    if _TOPICS not in sources:
        raise CompressKitError(
            f"this Python has no source files of its library in {root}",
            where="data.source",
            fix="use a Python that ships them, or 'source: text' with a file of your own",
        )
    digest = hashlib.sha256(f"{platform.python_implementation()} {platform.python_version()} {VERSION}".encode())
    for name, content in sources.items():
        digest.update(f"\0{name}\0{len(content)}\0".encode() + content)
    return sources, digest.hexdigest()


def read_documents(sources: dict[str, bytes]) -> list[list[str]]:
    """One document a topic and one a source file; a document is a list of sentences, and no sentence comes twice."""
    seen: set[str] = set()
    documents = []
    for name, content in sources.items():
        own = [*docstrings(content), *comments(content)]
        for texts in [[text] for text in topics(content)] if name == _TOPICS else [own]:
            found = {sentence.casefold(): sentence for text in texts for sentence in cut_sentences(text)}
            fresh = [sentence for key, sentence in found.items() if key not in seen]
            seen.update(found)
            if fresh:
                documents.append(fresh)
    return documents
