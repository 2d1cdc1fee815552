"""Fewer tokens: the same pieces for text in kept tokens, a way to say any other text, and clear refusals."""

import copy
import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vocabulary_text import KINDS, lines, trained

from compresskit.data import Corpus, Sequences
from compresskit.errors import CompressKitError
from compresskit.vocabulary import Translator, choose_tokens, count_tokens, cut_tokenizer, read_content
from compresskit.vocabulary.content import derive


def chosen(tokenizer, text, **options) -> list[int]:
    content = read_content(tokenizer)
    counts = count_tokens(tokenizer(text)["input_ids"], len(tokenizer))
    said = {"limit": len(tokenizer), "round_to": 1, **options}
    return choose_tokens(counts, known=content.tokens, required=content.always_kept(), needs=content.needs, **said)


def words(tokenizer, row) -> list[str]:
    return tokenizer.convert_ids_to_tokens(row)


@pytest.mark.parametrize("keep_text", [5, 20, 80])
@pytest.mark.parametrize("kind", KINDS)
def test_text_in_kept_tokens_is_cut_into_the_same_tokens(kind, keep_text):
    tokenizer = trained(kind)
    kept = chosen(tokenizer, lines(keep_text, seed=1))
    smaller = cut_tokenizer(tokenizer, kept)
    assert len(smaller) == len(kept) < len(tokenizer)
    text = [part for line in lines(2500, seed=2) for part in (line, *line.split())]
    before, after = tokenizer(text)["input_ids"], smaller(text)["input_ids"]
    whole = [i for i, row in enumerate(before) if set(row) <= set(kept)]
    assert len(whole) > 1000
    assert len(whole) < len(text)
    assert all(words(tokenizer, before[i]) == words(smaller, after[i]) for i in whole)


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_is_still_read_and_written(kind):
    tokenizer = trained(kind)
    smaller = cut_tokenizer(tokenizer, chosen(tokenizer, lines(5, seed=1)))
    for line in lines(300, seed=3):
        ours, theirs = smaller(line)["input_ids"], tokenizer(line)["input_ids"]
        assert tokenizer.unk_token_id in theirs or smaller.unk_token_id not in ours
        assert smaller.decode(ours) == tokenizer.decode(theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_were_dropped_are_said_as_the_smaller_tokenizer_says_their_text(kind):
    tokenizer = trained(kind, ends=True)
    kept = chosen(tokenizer, lines(40, seed=1))
    smaller = cut_tokenizer(tokenizer, kept)
    text = lines(400, seed=4)
    rows = tokenizer(text)["input_ids"]
    translator = Translator(tokenizer, smaller, kept)
    said = translator.rows(rows)
    assert 0.3 < translator.kept_share(rows) < 1
    assert translator.growth(rows) > 1
    assert said == smaller(text)["input_ids"]
    assert all(row[0] == smaller.bos_token_id and row[-1] == smaller.eos_token_id for row in said)


def test_rows_that_grow_are_cut_as_texts_are_and_keep_their_end():
    tokenizer = trained("wordpiece", ends=True)
    kept = chosen(tokenizer, lines(3, seed=1))
    smaller = cut_tokenizer(tokenizer, kept)
    rows = [row for row in tokenizer(lines(50, seed=4))["input_ids"] if len(row) == 8]
    part = Sequences(rows, tokenizer.pad_token_id)
    found = Translator(tokenizer, smaller, kept).corpus(Corpus(part, part, Sequences([], 0), "x"))
    assert found.calibration.pad_token_id == smaller.pad_token_id
    assert {len(row) for row in found.calibration.rows} == {8}
    assert all(row[-1] == smaller.eos_token_id for row in found.calibration.rows)
    assert len(found.evaluation) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_tokenizer_is_saved_and_read_again(kind, tmp_path):
    tokenizer = trained(kind, ends=True)
    smaller = cut_tokenizer(tokenizer, chosen(tokenizer, lines(40, seed=1)))
    smaller.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == smaller.get_vocab()
    assert again.all_special_ids == smaller.all_special_ids
    text = lines(50, seed=5)
    assert again(text)["input_ids"] == smaller(text)["input_ids"]
    assert sorted(again.get_vocab().values()) == list(range(len(again)))


def test_every_kept_token_of_bpe_can_be_reached():
    tokenizer = trained("byte_bpe")
    content = read_content(tokenizer)
    smaller = read_content(cut_tokenizer(tokenizer, chosen(tokenizer, lines(40, seed=1))))
    merges = {tuple(pair): rank for rank, pair in enumerate(smaller.model["merges"])}
    longer = [token for token, index in smaller.ids.items() if index not in smaller.added and len(token) > 1]
    assert len(longer) > 50
    assert all(derive(token, merges)[-1] == token for token in longer)
    assert set(map(tuple, smaller.model["merges"])) < set(map(tuple, content.model["merges"]))


def test_a_derivation_follows_the_ranks_and_not_the_shortest_way():
    merges = {("b", "c"): 0, ("a", "b"): 1, ("ab", "c"): 2, ("a", "bc"): 3}
    assert derive("abc", merges) == ["a", "b", "c", "bc", "abc"]
    assert derive("abd", merges) == []
    assert derive("c</w>", {}, suffix="</w>") == ["c</w>"]
    assert derive("ac</w>", {("a", "c</w>"): 0}, suffix="</w>") == ["a", "c</w>", "ac</w>"]


def test_the_least_score_stays_so_that_unknown_characters_cost_the_same():
    tokenizer = trained("unigram")
    before = read_content(tokenizer)
    after = read_content(cut_tokenizer(tokenizer, chosen(tokenizer, lines(3, seed=1))))
    assert min(score for _, score in before.model["vocab"]) == min(score for _, score in after.model["vocab"])
    scores = dict(map(tuple, before.model["vocab"]))
    assert all(scores[piece] == score for piece, score in after.model["vocab"])
    assert after.tokens[after.model["unk_id"]] == "<unk>"


def test_ids_around_a_text_and_in_padding_are_renumbered():
    tokenizer = trained("wordpiece", ends=True)
    backend = tokenizer.backend_tokenizer
    raw = json.loads(backend.to_str())
    vocabulary = raw["model"]["vocab"]
    moved = {piece: (index + 9) % len(vocabulary) for piece, index in vocabulary.items()}  # special ones are not first
    raw["model"]["vocab"] = moved
    raw["added_tokens"] = [one | {"id": moved[one["content"]]} for one in raw["added_tokens"]]
    raw["post_processor"] = {
        "type": "RobertaProcessing",
        "sep": ["</s>", moved["</s>"]],
        "cls": ["<s>", moved["<s>"]],
        "trim_offsets": True,
        "add_prefix_space": False,
    }
    raw["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": moved["<pad>"],
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    said = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)), **said)
    kept = chosen(copy.deepcopy(tokenizer), lines(3, seed=1))  # tokenising makes it forget its padding
    smaller = cut_tokenizer(tokenizer, kept)
    assert json.loads(smaller.backend_tokenizer.to_str())["padding"]["pad_id"] == smaller.pad_token_id
    ids = smaller("ba")["input_ids"]
    assert words(smaller, [ids[0], ids[-1]]) == ["<s>", "</s>"]
    assert smaller.pad_token_id != tokenizer.pad_token_id


COUNTS = torch.tensor([0, 0, 5, 3, 3, 1, 0, 9])


def alone(index: int) -> set[int]:
    return {index}


def test_frequent_tokens_come_first_and_the_number_is_a_multiple():
    said = {"known": range(8), "required": {0}, "needs": alone}
    assert choose_tokens(COUNTS, limit=8, round_to=1, **said) == [0, 2, 3, 4, 5, 7]
    assert choose_tokens(COUNTS, limit=8, round_to=4, **said) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert choose_tokens(COUNTS, limit=4, round_to=4, **said) == [0, 2, 3, 7]
    assert choose_tokens(COUNTS, limit=8, round_to=1, min_count=3, **said) == [0, 2, 3, 4, 7]
    assert choose_tokens(COUNTS, limit=8, round_to=5, min_count=9, **said) == [0, 2, 3, 4, 7], "unused ones by count"


def test_a_token_stays_only_with_what_it_needs():
    def needs(index: int) -> set[int]:
        return {7, 6, 1} if index == 7 else {index}

    said = {"known": range(8), "required": {0}, "needs": needs, "round_to": 1}
    assert choose_tokens(COUNTS, limit=4, **said) == [0, 1, 6, 7]
    assert choose_tokens(COUNTS, limit=3, **said) == [0, 2, 3], "no room for all three"


def test_ids_that_stand_for_nothing_never_stay():
    assert choose_tokens(COUNTS, known=range(6), required={0}, needs=alone, limit=8) == [0, 1, 2, 3, 4, 5]


def test_a_text_that_uses_nothing_and_a_limit_below_what_is_required_are_refused():
    said = {"known": range(8), "needs": alone}
    with pytest.raises(CompressKitError, match="the text uses no token 10 times or more") as caught:
        choose_tokens(COUNTS, required={0}, limit=8, min_count=10, **said)
    assert caught.value.fix == "give more text, or lower min_count"
    with pytest.raises(CompressKitError, match="the text uses no token\n"):
        choose_tokens(COUNTS * 0, required={0}, limit=8, **said)
    with pytest.raises(CompressKitError, match="2 tokens are fewer than the 3") as caught:
        choose_tokens(COUNTS, required={0, 1, 2}, limit=2, round_to=1, **said)
    assert caught.value.fix == "use keep: 0.5 or more"


class Slow(PreTrainedTokenizerFast):
    """A tokenizer without a tokenizer.json."""

    backend_tokenizer = None  # type: ignore[assignment]


def test_tokenizers_that_cannot_be_cut_are_refused():
    with pytest.raises(CompressKitError, match=r"Slow has no tokenizer\.json") as caught:
        read_content(Slow.__new__(Slow))
    assert "save a fast one" in str(caught.value.fix)
    level = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(CompressKitError, match="kind 'WordLevel' cannot be pruned"):
        read_content(PreTrainedTokenizerFast(tokenizer_object=level))
    bare = json.loads(trained("byte_bpe").backend_tokenizer.to_str())
    with pytest.raises(CompressKitError, match="without a decoder"):
        read_content(
            PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps({**bare, "decoder": None})))
        )
    bare["model"]["continuing_subword_prefix"] = "@@"
    bare["model"]["merges"] = []
    with pytest.raises(CompressKitError, match="continue by '@@'"):
        read_content(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(bare))))
