"""Filter pruning: channels that depend on each other go together, nothing hangs, students reload."""

import copy
import importlib.util
import time

import pytest
import torch
from deep_models import RESNET, deep
from families import answer, random_model, student_of
from pydantic import ValidationError
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    ConvNextConfig,
    MobileNetV1Config,
    MobileNetV2Config,
    RegNetConfig,
    ResNetConfig,
)

from compresskit import PruneFilters
from compresskit.errors import CompressKitError
from compresskit.layerwise import channels
from compresskit.layerwise.channels import choose_channels
from compresskit.student import load_student_model, needs_plugin, save_student
from compresskit.surgery.channel_edits import ChannelCut, PruneChannels
from compresskit.surgery.edits import EDITS, read_ranges, replay

NETWORKS = {
    "resnet": RESNET,
    "bottleneck": ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 2], num_labels=3),
    "mobilenet_v1": MobileNetV1Config(image_size=32, depth_multiplier=0.25, num_labels=3),
    "mobilenet_v2": MobileNetV2Config(image_size=32, depth_multiplier=0.35, num_labels=3),
}
CRITERIA = ["magnitude", "bn_scale", "lamp", "geometric_median", "taylor", "random"]


def prune(**options: object) -> PruneFilters:
    return PruneFilters.model_validate({"keep": 0.5, "round_to": 4, **options})


def apply(student, one, seed=0):
    return one.apply(student, generator=torch.Generator().manual_seed(seed))


def network(name="resnet"):
    return random_model(AutoModelForImageClassification, NETWORKS[name])


def silence(model, edit):
    """Make the channels that an edit drops give zeros, wherever they are made."""
    with torch.no_grad():
        for cut in edit.cuts:
            layer = model.get_submodule(cut.module)
            if cut.outputs is None:
                continue
            gone = torch.ones(len(layer.weight), dtype=torch.bool)
            gone[read_ranges(cut.outputs)] = False
            layer.weight[gone] = 0
            if layer.bias is not None:
                layer.bias[gone] = 0
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_with_fewer_channels_equals_one_whose_channels_are_silent(name):
    student = student_of(network(name))
    notes = apply(student, prune())
    (edit,) = student.edits
    masked = silence(copy.deepcopy(student.original), edit)
    torch.testing.assert_close(answer(student.model), answer(masked), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(answer(student.model), answer(student.original), atol=1e-3)
    convs = [m for m in student.model.modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.out_channels % 4 == 0 for conv in convs)
    shares = [sum(p.numel() for p in model.parameters()) for model in (student.model, student.original)]
    assert shares[0] < 0.4 * shares[1], "about the square of keep"
    assert set(notes["layers"]) == {cut.module for cut in edit.cuts}


@pytest.mark.parametrize("importance", CRITERIA)
def test_every_criterion_cuts_the_same_number_and_leaves_no_gradient(importance):
    student = student_of(network())
    student.model.requires_grad_(False)
    apply(student, prune(importance=importance))
    assert student.model.classifier[1].in_features == 16
    assert not any(p.requires_grad or p.grad is not None for p in student.model.parameters())


def test_channels_without_weight_go_first():
    original = network()
    block = original.resnet.encoder.stages[0].layers[0].layer
    with torch.no_grad():
        for number in (1, 4, 5, 6, 9, 10, 14, 15):
            block[0].convolution.weight[number] = 0
            block[0].normalization.weight[number] = 0
            block[0].normalization.bias[number] = 0
            block[1].convolution.weight[:, number] = 0
    student = student_of(original)
    apply(student, prune())
    cuts = {cut.module: cut for cut in student.edits[0].cuts}
    name = "resnet.encoder.stages.0.layers.0.layer.0.convolution"
    assert cuts[name].outputs == "0,2-3,7-8,11-13"


def test_random_follows_the_seed():
    edits = []
    for seed in (1, 1, 2):
        student = student_of(network())
        apply(student, prune(importance="random"), seed)
        edits.append(student.edits)
    assert edits[0] == edits[1] != edits[2]


def test_a_student_reloads_bit_for_bit_through_the_plugin_and_can_be_cut_again(tmp_path):
    student = student_of(network())
    apply(student, prune(keep=0.75))
    apply(student, prune(keep=0.5))
    save_student(student, tmp_path)
    assert needs_plugin(tmp_path)
    model, edits = load_student_model(tmp_path, student.task)
    assert edits == student.edits
    assert torch.equal(answer(model), answer(student.model))


def test_replay_on_an_empty_model_gives_the_shapes():
    student = student_of(network("mobilenet_v2"))
    apply(student, prune())
    empty = network("mobilenet_v2").to("meta")
    replay([EDITS.parse(edit.model_dump(mode="json")) for edit in student.edits], empty)
    shapes = {name: tuple(tensor.shape) for name, tensor in student.model.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}


def test_keep_one_changes_nothing_bit_for_bit():
    student = student_of(network())
    apply(student, prune(keep=1.0))
    assert not student.edits
    assert prune(keep=1.0).plan(student.model) == []
    before = student.original.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in student.model.state_dict().items())


def test_what_does_not_end_is_ended_and_said(monkeypatch):
    monkeypatch.setattr(channels, "_find_cuts", lambda *arguments: time.sleep(60))
    begun = time.monotonic()
    with pytest.raises(CompressKitError, match=r"no end within 0\.5 seconds"):
        apply(student_of(network()), prune(limit_s=0.5))
    assert time.monotonic() - begun < 30


def test_grouped_queries_never_hang():
    """The pass refuses them; torch-pruning itself, asked directly, gives up or is ended."""
    llama = deep("llama")
    with pytest.raises(CompressKitError, match="reads 'input_ids', no images"):
        prune().plan(llama)
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long)}
    options = {"keep": 0.5, "importance": "magnitude", "round_to": 4, "fixed": (), "seed": 0, "limit_s": 5.0}
    begun = time.monotonic()
    with pytest.raises(CompressKitError, match="no end within 5 seconds"):
        choose_channels(llama, batch, **options)
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("error", [RuntimeError("an odd shape\nand more"), KeyError("odd")])
def test_what_torch_pruning_cannot_follow_is_said(monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(channels, "_find_cuts", fail)
    with pytest.raises(CompressKitError, match=r"cannot follow this network: .*odd") as caught:
        apply(student_of(network()), prune())
    assert "and more" not in caught.value.what


def test_a_child_that_dies_is_told(monkeypatch):
    monkeypatch.setattr(channels, "_find_cuts", lambda *arguments: 1 / 0 if arguments else None)
    with pytest.raises(CompressKitError, match="division"):
        apply(student_of(network()), prune())

    def leave(*arguments):
        raise SystemExit(3)

    monkeypatch.setattr(channels, "_find_cuts", leave)
    with pytest.raises(CompressKitError, match="ended with status"):
        apply(student_of(network()), prune())


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompressKitError, match="needs the package torch-pruning") as caught:
        prune().plan(network())
    assert "compresskit[filters]" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: deep("vit"), "is an attention"),
        (lambda: deep("bert"), "no images"),
        (lambda: random_model(AutoModel, RESNET), "without a head"),
    ],
    ids=["vit", "bert", "no head"],
)
def test_what_torch_pruning_may_not_see_is_refused(model, match):
    with pytest.raises(CompressKitError, match=match) as caught:
        prune().plan(model())
    assert caught.value.fix


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 2], num_stages=2, image_size=32), "a parameter outside"),
        (RegNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], groups_width=16, layer_type="x"),
         "a convolution in 2 groups"),
    ],
    ids=["convnext", "regnet"],
)  # fmt: skip
def test_channels_that_cannot_be_cut_are_named(config, match):
    with pytest.raises(CompressKitError, match=match):
        prune().plan(random_model(AutoModelForImageClassification, config))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": 0.1}, r"0\.1 of the 32 channels of .*, in multiples of 4, leaves none"),
        ({"keep": 0.99, "round_to": 1, "importance": "bn_scale"}, "cuts no channel"),
    ],
)
def test_cuts_that_leave_nothing_or_cut_nothing_are_refused(options, match):
    model = network()
    if "importance" in options:  # a network without what the criterion looks at
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                model.set_submodule(name, nn.Identity())
    with pytest.raises(CompressKitError, match=match) as caught:
        apply(student_of(model), prune(**options))
    assert caught.value.fix


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 1.2}, {"importance": "l0"}, {"limit_s": 0}, {"round_to": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValidationError):
        prune(**options)


@pytest.mark.parametrize(
    ("cut", "match"),
    [
        (ChannelCut(module="resnet.embedder.embedder.convolution", outputs="0-16"), "at most 16"),
        (ChannelCut(module="resnet.embedder.embedder.convolution", inputs="3"), "at most 3"),
        (ChannelCut(module="resnet.embedder.embedder.normalization", inputs="0"), "no inputs of their own"),
        (ChannelCut(module="resnet.embedder.pooler", outputs="0"), "no convolution, linear layer or norm"),
    ],
)
def test_an_edit_that_does_not_fit_is_refused(cut, match):
    with pytest.raises(CompressKitError, match=match):
        PruneChannels(cuts=(cut,)).apply(network())


def test_ranges_that_are_none_are_refused():
    with pytest.raises(ValidationError, match="ascending ranges"):
        ChannelCut(module="a", outputs="3-1")
