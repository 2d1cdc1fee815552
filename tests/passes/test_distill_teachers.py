import copy
import json

import pytest
import torch
from families import student_of, tiny
from pydantic import ValidationError
from test_distill import TEXTS
from test_distill import student_of as student_on
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
)

from compresskit import compress
from compresskit.errors import CompressKitError
from compresskit.passes.base import PASSES
from compresskit.passes.distill import Distill
from compresskit.passes.distill_teachers import load_teacher
from compresskit.student import save_student

FAST = {"steps": 12, "batch_size": 8, "held_out_every": 4, "learning_rate": 1e-3}
LABELS = [{"kind": "kl", "alpha": 0.5}]


@pytest.fixture
def bert_student(tiny_bert_folder):
    original = AutoModel.from_pretrained(tiny_bert_folder).eval().requires_grad_(False)
    return student_on(original, AutoTokenizer.from_pretrained(tiny_bert_folder), "feature-extraction", TEXTS, damage=5)


@pytest.fixture
def llama_student(tiny_llama_folder):
    original = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval().requires_grad_(False)
    return student_on(original, AutoTokenizer.from_pretrained(tiny_llama_folder), "text-generation", TEXTS, damage=5)


def learn(student, seed=0, **options):
    """The notes of one distill pass, planned and applied."""
    step = PASSES.parse({"kind": "distill", **FAST, **options})
    step.plan(student.model)
    step.check_text(student.original_tokenizer, student.original_corpus)
    return step.apply(student, generator=torch.Generator().manual_seed(seed))


def saved_teacher(student, folder, model):
    model.save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)
    return str(folder)


def disagreement(model, other, student):
    batch = next(student.corpus.evaluation.batches(8))
    with torch.no_grad():
        p, q = (one(**batch).logits.log_softmax(-1)[batch["attention_mask"] > 0] for one in (model, other))
    return float((q.exp() * (q - p)).sum(-1).mean())


@pytest.mark.parametrize("cut", [{"kind": "low_rank", "keep": 0.6}, {"kind": "prune_width", "keep": {"ffn": 0.5}}])
def test_an_earlier_checkpoint_of_the_student_can_be_its_teacher(llama_student, tmp_path, cut):
    """Factors that only edits can say, and widths that the config says."""
    PASSES.parse(cut).apply(llama_student, generator=torch.Generator().manual_seed(0))
    save_student(llama_student, tmp_path / "earlier")
    earlier = copy.deepcopy(llama_student.model)
    for value in llama_student.model.model.layers.parameters():
        value.data += 0.3 * value.std() * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    before = disagreement(llama_student.model, earlier, llama_student)
    notes = learn(llama_student, teacher=str(tmp_path / "earlier"), losses=[{"kind": "kl"}, {"kind": "hidden"}])
    assert notes["held_out_loss_after"] < notes["held_out_loss_before"]
    assert disagreement(llama_student.model, earlier, llama_student) < before


def test_a_checkpoint_with_fewer_tokens_reads_what_the_student_reads(tmp_path):
    student = student_of(tiny("llama"))
    PASSES.parse({"kind": "prune_vocab", "keep": 0.8}).apply(student, generator=torch.Generator())
    (tmp_path / "earlier").mkdir()
    save_student(student, tmp_path / "earlier")
    if not (tmp_path / "earlier" / "tokenizer.json").exists():
        student.tokenizer.save_pretrained(tmp_path / "earlier")
    loaded = load_teacher(str(tmp_path / "earlier"), student)
    assert loaded.reads_student
    assert loaded.vocabulary is None
    for value in student.model.model.layers.parameters():
        value.data += 0.3 * value.std() * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    notes = learn(student, teacher=str(tmp_path / "earlier"))
    assert notes["held_out_loss_after"] < notes["held_out_loss_before"]


def test_the_students_own_average_teaches_beside_labels(llama_student):
    plain = copy.deepcopy(llama_student)
    notes = learn(llama_student, teacher="average", decay=0.9, losses=LABELS)
    assert notes["held_out_loss_after"] < notes["held_out_loss_before"]
    learn(plain, losses=[{"kind": "kl", "alpha": 1.0}])
    ours, theirs = llama_student.model.state_dict(), plain.model.state_dict()
    assert not all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_average_that_has_nothing_to_teach_is_refused(llama_student, bert_student):
    for student in (llama_student, bert_student):
        with pytest.raises(CompressKitError, match="agrees with it: little or nothing is learnt"):
            learn(student, teacher="average")
    with pytest.raises(CompressKitError, match="nothing is learnt"):  # without dropout, by which steps are judged
        learn(bert_student, teacher="average", dropout=True, steps=2)
    notes = learn(llama_student, teachers=[{"model": "original"}, {"model": "average", "weight": 0.5}])
    assert notes["held_out_loss_after"] < notes["held_out_loss_before"]
    assert notes["disagreement"]["items"] > 0


def test_heads_of_several_teachers_that_are_padded_differently_are_cut_to_what_they_share(llama_student, tmp_path):
    wide = saved_teacher(llama_student, tmp_path / "wide", padded(llama_student.original, 256))
    notes = learn(llama_student, teachers=[{"model": "original"}, {"model": wide}])
    assert notes["disagreement"]["mean"] < 1e-6, "the same teacher twice"
    assert notes["held_out_loss_after"] < notes["held_out_loss_before"]


def test_blocks_do_not_learn_from_a_teacher_that_calls_its_blocks_otherwise(bert_student, tmp_path):
    config = DistilBertConfig(
        vocab_size=bert_student.original.config.vocab_size, dim=32, hidden_dim=64, n_layers=2, n_heads=4
    )
    name = saved_teacher(bert_student, tmp_path / "other", AutoModel.from_config(config))
    with pytest.raises(CompressKitError, match=r"no blocks called 'encoder\.layer'") as caught:
        learn(bert_student, teacher=name, block_steps=2)
    assert caught.value.where == "block_steps"


def test_what_only_tells_of_a_training_decides_nothing():
    plain, told = Distill(steps=3), Distill(steps=3, checkpoint_minutes=None, tracker="tensorboard")
    assert plain.deciding_options() == told.deciding_options()
    assert plain.deciding_options() != Distill(steps=4).deciding_options()
    with pytest.raises(ValidationError, match="tracker_folder has no effect"):
        Distill(tracker_folder="elsewhere")


def test_of_several_teachers_the_report_says_how_they_disagreed_and_who_was_trusted(llama_student, tmp_path):
    other = copy.deepcopy(llama_student.original)
    for value in other.model.layers.parameters():
        value.data += value.std() * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    name = saved_teacher(llama_student, tmp_path / "other", other)
    teachers = [{"model": "original", "weight": 2.0}, {"model": name}]
    notes = learn(llama_student, teachers=teachers, conflict="route", conflict_above=0.001)
    told = notes["disagreement"]
    tokens = sum(len(row) for row in llama_student.corpus.training.rows)
    assert 0 < told["items"] <= tokens
    assert 0 < told["mean"] < 1
    assert told["threshold"] == 0.001
    assert sum(told["trusted_items"].values()) == round(told["share_above"] * told["items"])
    assert list(told["trusted_items"]) == ["original", name]
    assert list(told["quantiles"]) == ["0.5", "0.9", "0.99"]
    json.dumps(notes)


def test_embeddings_of_three_teachers_are_settled_by_the_majority(bert_student, tmp_path):
    names = []
    for index in (1, 2):
        other = copy.deepcopy(bert_student.original)
        for value in other.encoder.parameters():
            value.data += 0.1 * value.std().nan_to_num() * torch.randn(value.shape)
        names.append(saved_teacher(bert_student, tmp_path / str(index), other))
    teachers = [{"model": "original"}, *({"model": name} for name in names)]
    losses = [{"kind": "embedding"}]
    notes = learn(bert_student, teachers=teachers, conflict="route", losses=losses, steps=30)
    assert notes["held_out_loss_after"] < notes["held_out_loss_before"]
    assert notes["disagreement"]["items"] == len(bert_student.corpus.training)
    with pytest.raises(CompressKitError, match="none is in the majority, and nothing else tells whose embedding"):
        learn(bert_student, teachers=teachers[:2], conflict="route", losses=losses)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"conflict": "route"}, "conflict has no effect without teachers"),
        ({"decay": 0.5}, "decay has no effect without a teacher `average`"),
        ({"teachers": [{"model": "original"}]}, "at least 2 items"),
        ({"teachers": [{"model": "original"}, {"model": "m"}], "teacher": "m"}, "teacher and teachers are both said"),
        ({"teachers": [{"model": "original"}, {"model": "m"}], "cache": {}}, "cache keeps what one teacher says"),
        ({"teachers": [{"model": "original"}, {"model": "m"}], "trust": "entropy"}, "trust has no effect without"),
        ({"teacher": "average", "cache": {}}, "cache needs a teacher that stays as it is"),
        ({"teacher": "average", "block_steps": 2}, "block_steps needs a teacher that stays as it is"),
    ],
)
def test_options_of_teachers_that_nothing_would_read_are_refused(options, said):
    with pytest.raises(ValidationError, match=said):
        PASSES.parse({"kind": "distill", **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"losses": [{"kind": "hidden"}]}, "teachers: loss hidden reads inner layers"),
        ({"block_steps": 2}, "teachers: block_steps reads inner layers"),
        ({"conflict": "route", "trust": "majority"}, "conflict: of two teachers"),
    ],
)
def test_what_several_teachers_cannot_agree_on_is_refused_before_any_weight_is_read(options, said, llama_student):
    teachers = [{"model": "original"}, {"model": "average"}]
    if "block_steps" in options:
        teachers[1] = {"model": "original"}
    with pytest.raises(CompressKitError, match=said):
        PASSES.parse({"kind": "distill", "teachers": teachers, **options}).plan(llama_student.model)


def test_labels_are_trusted_in_language_models_alone():
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, num_labels=3)
    model = BertForSequenceClassification(config)
    two = {"kind": "distill", "teachers": [{"model": "original"}, {"model": "original"}], "conflict": "route"}
    with pytest.raises(CompressKitError, match="trust: only a language model's text holds labels"):
        PASSES.parse({**two, "trust": "labels"}).plan(model)
    assert PASSES.parse(two).rule(model).trust == "entropy"
    assert PASSES.parse({**two, "teachers": [{"model": "original"}] * 3}).rule(model).trust == "majority"


def test_compress_refuses_a_teacher_beside_teachers(tiny_llama_folder, tmp_path):
    one = Distill(teachers=[{"model": "original"}, {"model": "average"}])
    with pytest.raises(CompressKitError, match="names a teacher of its own"):
        compress(str(tiny_llama_folder), passes=[one], teacher=str(tiny_llama_folder), output=tmp_path / "out")
    with pytest.raises(CompressKitError, match=r"teacher: .*cache needs a teacher that stays as it is"):
        compress(str(tiny_llama_folder), passes=[Distill(cache={})], teacher="average", output=tmp_path / "out")


def padded(model, tokens):
    """A copy with rows for tokens that no tokenizer gives, which it would say at every turn."""
    wide = copy.deepcopy(model)
    before = model.config.vocab_size
    wide.resize_token_embeddings(tokens, mean_resizing=False)
    wide.get_input_embeddings().weight.data[before:] = 100 * model.get_input_embeddings().weight.data[7]
    return wide.requires_grad_(False)


@pytest.mark.parametrize("cache", [None, {}, {"keep": "top_k", "k": 64}])
def test_a_head_that_was_padded_further_teaches_the_shared_tokens_alone(cache, llama_student, tmp_path):
    wide = padded(llama_student.original, 256)
    plain = saved_teacher(llama_student, tmp_path / "plain", llama_student.original)
    name = saved_teacher(llama_student, tmp_path / "wide", wide)
    students = [copy.deepcopy(llama_student) for _ in range(2)]
    notes = [learn(one, teacher=which, cache=cache) for one, which in zip(students, (plain, name), strict=True)]
    for key in ("held_out_loss_before", "held_out_loss_after"):
        assert notes[0][key] == pytest.approx(notes[1][key], rel=1e-4)
    for ours, theirs in zip(*(one.model.parameters() for one in students), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_student_whose_head_is_wider_learns_the_shared_tokens_alone(llama_student, tmp_path):
    name = saved_teacher(llama_student, tmp_path / "narrow", llama_student.original)
    shared = llama_student.original.config.vocab_size
    llama_student.original, llama_student.model = (
        padded(one, 256) for one in (llama_student.original, llama_student.model)
    )
    unused = llama_student.model.get_input_embeddings().weight[shared:].clone()
    notes = learn(llama_student, teacher=name)
    assert notes["held_out_loss_after"] < notes["held_out_loss_before"]
    assert torch.equal(unused, llama_student.model.get_input_embeddings().weight[shared:])


def test_a_teacher_that_knows_more_tokens_is_cut_to_the_students(llama_student, tmp_path):
    larger = copy.deepcopy(llama_student.tokenizer)
    larger.add_tokens(["<extra_0>", "<extra_1>"])
    padded(llama_student.original, len(larger)).save_pretrained(tmp_path / "more")
    larger.save_pretrained(tmp_path / "more")
    loaded = load_teacher(str(tmp_path / "more"), llama_student)
    assert loaded.vocabulary == len(llama_student.tokenizer)
    notes = learn(llama_student, teacher=str(tmp_path / "more"))
    assert notes["held_out_loss_after"] < notes["held_out_loss_before"]


def test_another_tokenizer_is_refused_before_any_weight_is_read_with_the_reason(llama_student, tmp_path, monkeypatch):
    name = saved_teacher(llama_student, tmp_path / "other", llama_student.original)
    file = tmp_path / "other" / "tokenizer.json"
    said = json.loads(file.read_text())
    words = sorted(said["model"]["vocab"], key=said["model"]["vocab"].get)
    said["model"]["vocab"][words[-1]], said["model"]["vocab"][words[-2]] = len(words) - 2, len(words) - 1
    file.write_text(json.dumps(said))
    monkeypatch.setattr("compresskit.passes.distill_teachers.load_model", None)
    step = Distill(teacher=name)
    assert step.plan(llama_student.model) == []
    with pytest.raises(CompressKitError, match=r"another here: .* \(2 of \d+ tokens differ\)") as caught:
        step.check_text(llama_student.tokenizer, llama_student.corpus)
    assert "use a teacher of the same tokenizer" in str(caught.value)
    del said["model"]["vocab"][words[-1]]
    said["model"]["vocab"][words[-2]] = len(words) - 2
    file.write_text(json.dumps(said))
    with pytest.raises(CompressKitError, match=f"'{words[-1]}' is not known there"):
        step.check_text(llama_student.tokenizer, llama_student.corpus)


def test_heads_over_other_classes_are_not_cut_but_refused():
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    three, four = (BertForTokenClassification(BertConfig(**shape, num_labels=n)) for n in (3, 4))
    with pytest.raises(CompressKitError, match="tells 3 classes apart, the teacher 4"):
        Distill().checked_losses(three, four)
