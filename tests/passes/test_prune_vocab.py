"""prune_vocab: stock checkpoints, the chain after it, resuming, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import student_of, tiny, tiny_student
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from vocabulary_text import lines, trained

import compresskit
from compresskit import (
    KL,
    CompressKitError,
    Distill,
    Embedding,
    ManyErrors,
    OnnxExport,
    PruneVocab,
    Quantize,
    load_recipe,
    run,
)
from compresskit.data import DataSource
from compresskit.evaluate import Fidelity
from compresskit.job import prepare, take_prints
from compresskit.models import find_model, load_model, load_tokenizer
from compresskit.passes import LowRank, PruneWidth
from compresskit.recipe import parse_recipe
from compresskit.student import save_student

SIZES = {"max_length": 24, "calibration": 24, "training": 60, "evaluation": 32}


def write_lines(path: Path, text: list[str]) -> str:
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny BERT with WordPiece and a tiny Llama with BPE on bytes, its table padded beyond the tokenizer."""
    root = tmp_path_factory.mktemp("vocabularies")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    word, byte = trained("wordpiece", ends=True), trained("byte_bpe")
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bert = BertModel(BertConfig(vocab_size=len(word), max_position_embeddings=64, pad_token_id=0, **shape))
        llama = LlamaForCausalLM(
            LlamaConfig(vocab_size=720, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, **ids, **shape)
        )
        for model in (bert, llama):
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
    for name, model, tokenizer in (("bert", bert, word), ("llama", llama, byte)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {"bert": root / "bert", "llama": root / "llama"}


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Text for a recipe, and a corpus of fewer words."""
    root = tmp_path_factory.mktemp("texts")
    return {
        "all": write_lines(root / "all.txt", lines(400, seed=6)),
        "few": write_lines(root / "few.txt", lines(15, seed=1)),
    }


def few(texts: dict[str, str]) -> DataSource:
    return DataSource(source="text", path=(texts["few"],))


def recipe_of(folder: Path, texts: dict[str, str], *passes: object, **said: object):
    data = {"source": "text", "path": texts["all"], **SIZES}
    return parse_recipe({"model": str(folder), "data": data, "passes": passes, **said})


LOADS = """
import sys, json, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
folder, text, auto = sys.argv[1:]
model, info = (AutoModelForCausalLM if auto == "lm" else AutoModel).from_pretrained(folder, output_loading_info=True)
assert not info["missing_keys"] | info["unexpected_keys"], info
tokenizer = AutoTokenizer.from_pretrained(folder)
words = tokenizer(text, return_tensors="pt")
with torch.no_grad():
    answer = model.eval()(input_ids=words["input_ids"])[0]
assert "compresskit" not in sys.modules
print(json.dumps({"tokens": tokenizer.convert_ids_to_tokens(words["input_ids"][0]), "answer": answer[0].tolist()}))
"""


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_student_loads_with_transformers_alone_and_answers_as_the_original(family, folders, texts, tmp_path):
    report = run(recipe_of(folders[family], texts, PruneVocab(corpus=few(texts)), evaluate="never"), tmp_path / "out")
    assert report["loads_with"] == "transformers"
    notes = report["passes"][-1]["notes"]
    model, tokenizer = compresskit.load(tmp_path / "out")
    assert len(tokenizer) == notes["tokens"] == model.config.vocab_size == model.get_input_embeddings().num_embeddings
    assert notes["tokens"] % 8 == 0
    assert notes["tokens"] < 0.9 * notes["tokens_before"]
    assert 0 < notes["kept_of_held_out_text"] < 1 < notes["held_out_growth"]
    text = lines(15, seed=1)[3]
    command = [sys.executable, "-c", LOADS, str(tmp_path / "out" / "student"), text, "lm" if family == "llama" else ""]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    whole_tokenizer = AutoTokenizer.from_pretrained(folders[family])
    whole = load_model(find_model(folders[family]), "text-generation" if family == "llama" else "feature-extraction")
    words = whole_tokenizer(text, return_tensors="pt")
    assert said["tokens"] == whole_tokenizer.convert_ids_to_tokens(words["input_ids"][0])
    with torch.no_grad():
        expected = whole(input_ids=words["input_ids"])[0][0]
    if family == "llama":
        names = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
        expected = expected[:, whole_tokenizer.convert_tokens_to_ids(names)]
    torch.testing.assert_close(torch.tensor(said["answer"]), expected, rtol=0, atol=1e-5)
    for key in ("pad_token", "eos_token", "bos_token", "unk_token"):
        assert getattr(tokenizer, key) == getattr(whole_tokenizer, key)
    assert model.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_whole_chain_goes_on_after_it(family, folders, texts, tmp_path):
    recipe = recipe_of(
        folders[family],
        texts,
        PruneVocab(corpus=few(texts)),
        LowRank(rank=16, on_misfit="keep"),
        PruneWidth.model_validate({"keep": {"ffn": 0.5}, "anchor": 0.5}),
        Distill(steps=3, batch_size=8, held_out=4, losses=(KL(alpha=0.1),) if family == "llama" else None),
        Quantize(bits=8, group_size=16, on_misfit="keep"),
        export=[OnnxExport(rounds=3, texts=16)],
    )
    report = run(recipe, tmp_path / "out")
    original, cut, *_, last = report["passes"]
    assert last["size_bytes"] < cut["size_bytes"] < original["size_bytes"]
    assert report["export"][0]["parity"]["relative_error"] < 1e-3
    figures = compresskit.measure(tmp_path / "out")
    measured = {name: figures["student"][name] for name in last["metrics"] if not name.endswith("_ms")}
    assert measured == {name: value for name, value in last["metrics"].items() if not name.endswith("_ms")}
    if family == "llama":
        assert cut["metrics"]["kl_to_original"] < 1e-9, "over kept tokens it is the original still"
        assert cut["metrics"]["perplexity"] != original["metrics"]["perplexity"]
    else:
        assert 0 < cut["metrics"]["mean_cosine"] < 1, "it reads other tokens than the original"
        assert report["export"][0]["stock_int8"]["fidelity"]["mean_cosine"] > 0.9, "it reads the original's"
    config = json.loads((tmp_path / "out" / "onnx" / "config.json").read_text())
    assert config["vocab_size"] == report["passes"][1]["notes"]["tokens"]
    assert json.loads((tmp_path / "out" / "student" / "config.json").read_text())["vocab_size"] == config["vocab_size"]


def test_a_corpus_that_uses_every_token_costs_nothing(folders, texts, tmp_path):
    everything = DataSource(source="text", path=(write_lines(tmp_path / "t.txt", lines(400, seed=6)),))
    step = PruneVocab(corpus=everything)
    report = run(recipe_of(folders["bert"], texts, step), tmp_path / "out")
    original, cut = (entry["metrics"] for entry in report["passes"])
    assert report["passes"][1]["notes"]["kept_of_held_out_text"] == 1
    assert report["passes"][1]["size_bytes"] < report["passes"][0]["size_bytes"]
    figures = ("mean_cosine", "spearman", "top10_overlap")
    assert {name: cut[name] for name in figures} == pytest.approx({name: original[name] for name in figures}, abs=1e-9)


def test_a_resumed_run_ends_as_a_whole_one_and_kept_steps_can_be_measured(folders, texts, tmp_path):
    passes = (PruneVocab(corpus=few(texts)), Distill(steps=2, batch_size=8, held_out=4))
    run(recipe_of(folders["bert"], texts, passes[0], evaluate="never"), tmp_path / "parts")
    said: list[str] = []
    parts = run(recipe_of(folders["bert"], texts, *passes), tmp_path / "parts", progress=said.append)
    assert "[1/2] prune_vocab: measuring …" in said
    whole = run(recipe_of(folders["bert"], texts, *passes), tmp_path / "whole")
    for ours, theirs in zip(parts["passes"], whole["passes"], strict=True):
        figures = [{k: v for k, v in one["metrics"].items() if not k.endswith("_ms")} for one in (ours, theirs)]
        assert figures[0] == figures[1]
    read = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("parts", "whole")]
    assert read[0] == read[1]


def test_two_cuts_in_a_row_compose(folders, texts, tmp_path):
    first, second = PruneVocab(corpus=few(texts), round_to=1), PruneVocab(keep=0.9, round_to=1)
    report = run(recipe_of(folders["bert"], texts, first, second), tmp_path / "out")
    before, after = (entry["notes"]["tokens"] for entry in report["passes"][1:])
    assert after == int(0.9 * before)
    figures = compresskit.measure(tmp_path / "out")
    assert figures["student"]["mean_cosine"] == report["passes"][-1]["metrics"]["mean_cosine"]


def test_a_teacher_of_the_same_tokenizer_is_cut_too(folders, texts, tmp_path):
    learn = Distill(steps=2, batch_size=8, held_out=4, teacher=str(folders["llama"]), losses=(KL(),))
    report = run(recipe_of(folders["llama"], texts, PruneVocab(corpus=few(texts)), learn, evaluate="never"), tmp_path)
    assert report["passes"][-1]["notes"]["held_out_loss_before"] < 1e-6, "the teacher is the original"


def test_what_the_corpus_holds_is_a_part_of_the_fingerprint(folders, texts, tmp_path):
    path = tmp_path / "c.txt"
    write_lines(path, lines(15, seed=1))
    recipe = recipe_of(folders["bert"], texts, PruneVocab(corpus=DataSource(source="text", path=(str(path),))))
    before = take_prints(prepare(recipe)).steps
    write_lines(path, lines(15, seed=2))
    after = take_prints(prepare(recipe)).steps
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_mistakes_are_found_before_a_weight_is_read(folders, texts, tmp_path, tiny_bert_folder):
    with pytest.raises(ManyErrors, match="no file") as caught:
        prepare(recipe_of(folders["bert"], texts, PruneVocab(corpus=DataSource(source="text", path=("nope.txt",)))))
    assert "passes[0] (prune_vocab)" in str(caught.value)
    with pytest.raises(
        ManyErrors, match="prune_vocab cannot run after passes\\[0\\] made the model quantized"
    ) as caught:
        recipe_of(folders["bert"], texts, Quantize(bits=8, group_size=16), PruneVocab())
    assert "move prune_vocab before passes[0]" in str(caught.value)
    plain = trained("wordpiece", ends=True)
    raw = json.loads(plain.backend_tokenizer.to_str())
    raw["model"] = {"type": "WordLevel", "vocab": raw["model"]["vocab"], "unk_token": "<unk>"}
    folder = tmp_path / "level"
    BertModel.from_pretrained(folders["bert"]).save_pretrained(folder)
    plain.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ManyErrors, match="kind 'WordLevel' cannot be pruned"):
        prepare(recipe_of(folder, texts, PruneVocab()))


def test_text_with_prompts_is_refused_as_a_recipes_and_counted_whole_as_a_corpus(folders, texts, tmp_path):
    pairs = [{"question": f"{line} ", "answer": line[::-1]} for line in lines(60, seed=3)]
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    asked = {"source": "json", "path": str(file), "column": "answer", "prompt": "question"}
    sizes = {"max_length": 32, "calibration": 8, "training": 16, "evaluation": 12}
    with pytest.raises(ManyErrors, match=r"data\.prompt: text with prompts cannot be said in fewer tokens"):
        prepare(recipe_of(folders["bert"], texts, PruneVocab(), data={**asked, **sizes}))
    for column, prompt in (("answer", "question"), ("both", None)):
        for pair in pairs:
            pair["both"] = pair["question"] + pair["answer"]
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        corpus = DataSource(source="json", path=(str(file),), column=column, prompt=prompt)
        run(recipe_of(folders["bert"], texts, PruneVocab(corpus=corpus)), tmp_path / column)
    kept = [load_tokenizer(find_model(tmp_path / column / "student")).get_vocab() for column in ("answer", "both")]
    assert kept[0] == kept[1]


def test_a_share_that_is_too_small_and_a_text_that_uses_nothing_are_refused(folders, texts, tmp_path):
    with pytest.raises(CompressKitError, match="tokens are fewer than the") as caught:
        run(recipe_of(folders["bert"], texts, PruneVocab(keep=0.02), evaluate="never"), tmp_path / "a")
    needed = float(str(caught.value.fix).split()[2])
    report = run(recipe_of(folders["bert"], texts, PruneVocab(keep=needed), evaluate="never"), tmp_path / "a")
    assert report["passes"][-1]["notes"]["tokens"] <= needed * report["passes"][-1]["notes"]["tokens_before"]
    with pytest.raises(CompressKitError, match="uses no token 100000 times or more"):
        run(recipe_of(folders["bert"], texts, PruneVocab(min_count=100000), evaluate="never"), tmp_path / "b")


def test_what_leaves_no_token_and_an_empty_corpus_are_refused_before_a_weight_is_read(folders, texts, tmp_path):
    with pytest.raises(CompressKitError, match=r"0\.5 of 96 tokens, in multiples of 128, leaves none") as caught:
        PruneVocab(keep=0.5, round_to=128).plan(tiny_student("bert").model)
    assert caught.value.fix
    (tmp_path / "empty.txt").touch()
    for name, said in (("empty.txt", "empty"), ("nope.txt", r"corpus\.path: no file")):
        corpus = DataSource(source="text", path=(str(tmp_path / name),))
        with pytest.raises(CompressKitError, match=rf"passes\[0\] \(prune_vocab\)[\s\S]*{said}"):
            prepare(recipe_of(folders["bert"], texts, PruneVocab(corpus=corpus)))


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused():
    student = tiny_student("bert")
    student.tokenizer.add_tokens(["<extra>"])  # type: ignore[union-attr]
    with pytest.raises(CompressKitError, match="'<extra>' is token 96, and the model has rows for 96"):
        PruneVocab().apply(student, generator=torch.Generator())


def test_positions_counted_from_the_padding_token_stay(tmp_path):
    """RoBERTa's positions begin after the id of its padding token, here 9; of the ids before it the text uses none."""
    student = student_of(tiny("roberta", pad_token_id=9))
    for part in (student.corpus.calibration, student.corpus.training, student.corpus.evaluation):
        part.rows[:] = [[max(10, token) for token in row] for row in part.rows]
    PruneVocab(keep=0.5).apply(student, generator=torch.Generator())
    assert student.model.config.pad_token_id == 9
    assert student.whole.kept[:10] == tuple(range(10))  # type: ignore[union-attr]
    save_student(student, tmp_path)
    fidelity = Fidelity(student.original, student.original_corpus.evaluation, task=student.task)
    assert fidelity.measure(student.model, student.held_out)["mean_cosine"] < 1
    kept = student.whole.kept  # type: ignore[union-attr]
    ids = torch.tensor([[kept[i] for i in range(35, 45)]])
    with torch.no_grad():
        ours, theirs = student.model(torch.arange(35, 45)[None])[0], student.original(ids)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_words_of_a_chat_template_stay(folders):
    """They are in no text, and in every prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    spoken = "zebra quartz"
    tokenizer.chat_template = "{% for m in messages %}" + spoken + " {{ m['content'] }}{% endfor %}"
    before = tokenizer(spoken, add_special_tokens=False).tokens()
    student = student_of(load_model(find_model(folders["llama"]), "text-generation"))
    student.tokenizer = tokenizer
    PruneVocab(keep=0.9).apply(student, generator=torch.Generator())
    assert student.tokenizer(spoken, add_special_tokens=False).tokens() == before
    assert any(len(token) > 1 for token in before)


def test_what_stays_of_a_dated_template_is_the_same_every_day(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    kept = []
    for template in ("{{ messages[0]['role'] }}", "{{ strftime_now('zebra quartz') }}{{ messages[0]['role'] }}"):
        tokenizer.chat_template = template
        student = student_of(load_model(find_model(folders["llama"]), "text-generation"))
        student.tokenizer = tokenizer
        PruneVocab(keep=0.9).apply(student, generator=torch.Generator())
        kept.append(student.whole.kept)  # type: ignore[union-attr]
    assert kept[0] == kept[1]


def test_a_recipe_says_it_in_yaml(folders, texts, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"model: {folders['bert']}\ndata: {{source: text, path: {texts['all']}, max_length: 24}}\npasses:\n"
        f"  - {{kind: prune_vocab, corpus: {{source: text, path: {texts['few']}}}, keep: 0.5, min_count: 2}}\n"
    )
    job = prepare(load_recipe(path))
    assert job.forecast.is_stock
    before, after = (step.params for step in job.forecast.steps)
    assert before - after >= 250 * 32


def test_embeddings_are_taught_by_the_original_reading_its_own_tokens(folders, texts, tmp_path):
    learn = Distill(steps=30, batch_size=8, held_out=6, learning_rate=3e-4, losses=(Embedding(similarity=0),))
    report = run(recipe_of(folders["bert"], texts, PruneVocab(corpus=few(texts)), learn), tmp_path)
    _, cut, taught = report["passes"]
    assert taught["notes"]["held_out_loss_before"] > 1e-3, "dropped words are read in pieces"
    assert taught["notes"]["held_out_loss_after"] < taught["notes"]["held_out_loss_before"]
    assert taught["metrics"]["mean_cosine"] > cut["metrics"]["mean_cosine"]
