"""The text that comes with Python: enough of it, clean, the same each time."""

import re

import pytest

from compresskit.data.python_docs import comments, cut_sentences, docstrings, read_documents, read_sources, topics


@pytest.fixture(scope="module")
def documents() -> list[list[str]]:
    sources, _ = read_sources()
    return read_documents(sources)


def test_the_library_gives_twenty_thousand_different_sentences(documents):
    sentences = [sentence.casefold() for document in documents for sentence in document]
    assert len(sentences) >= 20_000
    assert len(set(sentences)) == len(sentences)


def test_sentences_are_prose_of_20_to_400_characters(documents):
    sentences = [sentence for document in documents for sentence in document]
    assert all(20 <= len(sentence) <= 400 for sentence in sentences)
    assert not [sentence for sentence in sentences if re.search(r">>>|::=|\n|\{", sentence)]


def test_two_readings_give_the_same_digest():
    assert read_sources()[1] == read_sources()[1]


def test_the_digest_names_the_python_version(monkeypatch):
    before = read_sources()[1]
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    assert read_sources()[1] != before


def test_sentences_end_at_full_stops_but_not_at_abbreviations():
    text = "Return the first line, e.g. The header of a file. It may be empty, too.\n\nRaise an error otherwise."
    assert cut_sentences(text) == [
        "Return the first line, e.g. The header of a file.",
        "It may be empty, too.",
        "Raise an error otherwise.",
    ]


def test_code_headings_grammar_and_tables_are_left_out():
    text = (
        "Assignment\n**********\n\n   target ::= identifier\n\n>>> print(x)\n\n| a table | of words here |\n\n"
        "* Bullets are kept as sentences.\n* So is the *second* ``one`` of them."
    )
    assert cut_sentences(text) == ["Bullets are kept as sentences.", "So is the second one of them."]


def test_docstrings_come_in_the_order_of_the_file_and_broken_files_have_none():
    source = b'"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\n'
    source += b"if 1:\n    def g():\n        'Four.'\n"
    assert docstrings(source) == ["One.", "Two.", "Three.", "Four."]
    assert docstrings(b"def broken(:") == []


def test_comment_blocks_lose_their_hashes():
    assert comments(b"# one line\n# and another\nx = 1  # not this\n") == ["one line\nand another\n"]


def test_topics_are_read_without_importing():
    assert topics(b"topics = {'b': 'second', 'a': 'first'}\n") == ["first", "second"]
