"""Convolutions in factors: exact errors, whitening, bounded components, and the pass on vision and audio models."""

import copy
import itertools

import pytest
import torch
from families import NoTokenizer, random_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    PretrainedConfig,
    ResNetConfig,
    ViTConfig,
    Wav2Vec2Config,
    WhisperConfig,
)

from compresskit.data import Corpus, ModelInputs
from compresskit.engine import prove_reloads
from compresskit.errors import CompressKitError
from compresskit.evaluate import Fidelity, count_parameters, evaluate
from compresskit.export import OnnxExport
from compresskit.layers.factored_conv import FactoredConv
from compresskit.layerwise.output_pca import solve_output_pca, squared_error
from compresskit.layerwise.probe import probe
from compresskit.passes import Distill, PruneFilters, TensorDecomposition
from compresskit.passes.tensor import _conv_factors
from compresskit.passes.tensor_convs import (
    components,
    cp_factors,
    patches,
    tucker_factors,
    tucker_ranks,
    tucker_weight,
)
from compresskit.student import Student, load_student_model, save_student
from compresskit.surgery.edits import replay
from compresskit.surgery.provenance import Provenance
from compresskit.surgery.tensor_edits import MakeCPConv, MakeTuckerConv

CONVS = {
    "plain": lambda: nn.Conv2d(6, 10, 3),
    "strided": lambda: nn.Conv2d(6, 10, (3, 5), stride=(2, 3), padding=(1, 2), dilation=(2, 1)),
    "same": lambda: nn.Conv2d(6, 10, 3, padding="same", bias=False),
    "reflect": lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="reflect"),
    "pointwise": lambda: nn.Conv2d(6, 10, 1, stride=2),
    "one axis": lambda: nn.Conv1d(6, 10, 5, stride=2, padding=2),
}


def dense_conv(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CONVS[name]().double().requires_grad_(False)


def correlated_inputs(conv: nn.Module, count: int = 8) -> torch.Tensor:
    """Images whose channels and neighbouring places go together."""
    draw = torch.Generator().manual_seed(1)
    axes = len(conv.kernel_size)
    x = torch.randn(count, 6, *[13] * axes, generator=draw, dtype=torch.float64)
    mix = torch.randn(6, 6, generator=draw, dtype=torch.float64) * torch.logspace(0, -2, 6, dtype=torch.float64)
    x = torch.einsum("ij,nj...->ni...", mix, x)
    return x + x.roll(1, -1)


@pytest.fixture(params=CONVS)
def problem(request):
    conv = dense_conv(request.param)
    x = correlated_inputs(conv)
    rows = patches(conv, x)
    return conv, x, conv.weight.detach().flatten(1), rows.T @ rows / len(rows)


def test_patches_times_weight_are_the_convolution(problem):
    conv, x, weight, _ = problem
    y = F.linear(patches(conv, x), weight, conv.bias)
    torch.testing.assert_close(y, conv(x).flatten(2).transpose(1, 2).flatten(0, 1))


class _Holder(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv


def in_factors(conv: nn.Module, edit, factors: list[torch.Tensor]) -> nn.Module:
    """The chain that the edit puts in place of `conv`, with these weights and the layer's own bias."""
    model = _Holder(copy.deepcopy(conv))
    replay([edit], model)
    with torch.no_grad():
        for own, values in zip(model.conv.factors, factors, strict=True):
            own.weight.copy_(values.reshape(own.weight.shape))
        if conv.bias is not None:
            model.conv.bias.copy_(conv.bias)
    return model.conv.requires_grad_(False)


def tucker(conv, weight, moment, in_rank, out_rank):
    found = tucker_factors(weight, in_rank, out_rank, moment=moment, kernel=conv.kernel_size)
    edit = MakeTuckerConv(target="conv", bias=False, in_rank=in_rank, out_rank=out_rank)
    kept = [one for one, whole in zip(found, (in_rank == 6, False, out_rank == 10), strict=True) if not whole]
    return in_factors(conv, edit, kept), tucker_weight(*found)


@pytest.mark.parametrize("ranks", [(6, 10), (6, 4), (3, 10), (3, 4), (1, 1)])
def test_tucker_error_is_predicted_exactly_and_none_at_full_rank(problem, ranks):
    conv, x, weight, moment = problem
    layer, found = tucker(conv, weight, moment, *ranks)
    places = len(patches(conv, x))
    measured = float((layer(x) - conv(x)).square().sum()) / places
    assert measured == pytest.approx(squared_error(weight, found, moment), rel=1e-6, abs=1e-12)
    if ranks == (6, 10):
        torch.testing.assert_close(layer(x), conv(x))
    else:
        assert 0 < measured < float((moment @ weight.T @ weight).trace())


def test_tucker_on_the_output_mode_alone_is_output_pca(problem):
    conv, _, weight, moment = problem
    _, found = tucker(conv, weight, moment, 6, 3)
    assert squared_error(weight, found, moment) == pytest.approx(
        float(solve_output_pca(weight, moment=moment).tail[3]), rel=1e-9
    )


@pytest.mark.parametrize("name", ["plain", "one axis"])
def test_whitened_tucker_loses_less_than_plain_tucker_on_correlated_inputs(name):
    conv = dense_conv(name)
    x = correlated_inputs(conv)
    rows, weight = patches(conv, x), conv.weight.detach().flatten(1)
    moment = rows.T @ rows / len(rows)
    moments = (moment, torch.eye(len(moment), dtype=torch.float64))
    lost = [float((tucker(conv, weight, given, 3, 6)[0](x) - conv(x)).square().sum()) for given in moments]
    assert lost[0] < 0.5 * lost[1]


def test_channels_that_are_always_zero_do_no_harm():
    conv = dense_conv("plain")
    x = correlated_inputs(conv)
    x[:, 2:] = 0
    rows, weight = patches(conv, x), conv.weight.detach().flatten(1)
    layer, _ = tucker(conv, weight, rows.T @ rows / len(rows), 2, 10)
    torch.testing.assert_close(layer(x), conv(x), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("rank", [2, 8])
def test_cp_error_is_predicted_exactly(problem, rank):
    conv, x, weight, moment = problem
    edit = MakeCPConv(target="conv", bias=False, rank=rank)
    factors, found = _conv_factors(edit, conv, weight, moment)
    layer = in_factors(conv, edit, factors)
    measured = float((layer(x) - conv(x)).square().sum()) / len(patches(conv, x))
    assert measured == pytest.approx(squared_error(weight, found, moment), rel=1e-6)
    assert measured < squared_error(weight, 0 * weight, moment)


def test_cp_components_stay_bounded_where_no_best_answer_exists():
    """a⊗a⊗b + a⊗b⊗a + b⊗a⊗a has rank 3, and rank 2 comes as near as one likes with ever larger components."""
    a, b = torch.eye(2, dtype=torch.float64)
    tensor = sum(torch.einsum("i,j,k->ijk", *each) for each in ((a, a, b), (a, b, a), (b, a, a)))
    weight, moment = tensor.flatten(1), torch.eye(4, dtype=torch.float64)
    power = float(weight.square().sum())
    energies = []
    for ridge in (1e-2, 1e-6):
        A, taps, B = cp_factors(weight, 2, moment=moment, kernel=(2,), ridge=ridge)
        torch.testing.assert_close(components(A, taps).square().sum(1), torch.ones(2, dtype=torch.float64))
        energies.append(float(B.square().sum()))
        assert energies[-1] <= power / ridge
        assert squared_error(weight, B @ components(A, taps), moment) < 0.01 * power
    assert energies[0] < energies[1], "the bound is what holds them"


def test_ranks_share_the_budget_and_few_input_channels_stay_whole():
    for keep in (0.2, 0.5, 0.8):
        r1, r2 = tucker_ranks(keep, 256, 128, 9)
        assert 128 * r1 + 9 * r1 * r2 + 256 * r2 <= keep * 256 * 128 * 9
        assert abs(r1 / 128 - r2 / 256) < 0.02
    assert tucker_ranks(0.5, 768, 3, 256)[0] == 3
    assert tucker_ranks(0.5, 64, 64, 1)[0] == 64
    assert tucker_ranks(0.5, 256, 128, 9, multiple=8)[0] % 8 == 0


@pytest.mark.parametrize("multiple", [1, 3, 8, 16, 64, 128])
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.8, 0.95, 0.99])
def test_ranks_are_within_the_channels_and_the_budget_for_every_shape(keep, multiple):
    fitting = 0
    for outputs, inputs in itertools.product((1, 5, 16, 64, 96, 256, 768), repeat=2):
        for taps in (1, 3, 9, 25, 49):
            r1, r2 = tucker_ranks(keep, outputs, inputs, taps, multiple=multiple)
            assert 1 <= r1 <= inputs
            assert 0 <= r2 <= outputs
            if r2:
                fitting += 1
                ends = (inputs * r1 if r1 < inputs else 0) + (outputs * r2 if r2 < outputs else 0)
                assert r1 * r2 * taps + ends <= keep * outputs * inputs * taps
    assert fitting > 50


@pytest.mark.parametrize(
    ("outputs", "inputs", "side", "keep", "multiple"), [(64, 256, 3, 0.8, 128), (96, 96, 7, 0.95, 64)]
)
def test_a_coarse_multiple_that_leaves_the_output_mode_whole_still_gives_factors(outputs, inputs, side, keep, multiple):
    student = student_of("resnet")
    student.model.wide = nn.Conv2d(inputs, outputs, side)
    (edit,) = TensorDecomposition(keep=keep, round_to=multiple, targets="wide").plan(student.model)
    assert edit.out_rank == outputs
    assert edit.in_rank < inputs
    with torch.no_grad():
        _, found = _conv_factors(
            edit, student.model.wide, student.model.wide.weight.flatten(1), torch.eye(inputs * side**2)
        )
    assert found.shape == (outputs, inputs * side**2)
    replay([edit], student.model)
    assert (
        sum(p.numel() for p in student.model.wide.factors.parameters()) <= keep * outputs * inputs * side**2 + outputs
    )


_CONFIGS: dict[str, PretrainedConfig] = {
    "resnet": ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck", num_labels=5
    ),
    "vit": ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=5,
    ),
    "whisper": WhisperConfig(
        vocab_size=96,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=20,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    "wav2vec2": Wav2Vec2Config(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=[24, 24],
        conv_kernel=[10, 3],
        conv_stride=[5, 2],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        do_stable_layer_norm=False,
    ),
}
_TARGETS = {"wav2vec2": "feature_extractor*", "resnet": "*", "vit": "*", "whisper": "encoder.conv2"}


def _inputs(name: str, count: int, seed: int) -> ModelInputs:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=draw)
    if name == "wav2vec2":
        return ModelInputs({"input_values": torch.randn(count, 400, generator=draw)})
    if name == "whisper":
        features = torch.randn(count, 16, 40, generator=draw)
        return ModelInputs({"input_features": features, "decoder_input_ids": torch.ones(count, 3, dtype=torch.long)})
    images = torch.randn(count, 3, 32, 32, generator=draw)
    return ModelInputs({"pixel_values": images + images.roll(1, 3) + images.roll(2, 2)}, labels)


def student_of(name: str) -> Student:
    auto = AutoModelForImageClassification if name in ("resnet", "vit") else AutoModel
    original = random_model(auto, _CONFIGS[name], scale=0.05)
    corpus = Corpus(_inputs(name, 8, 1), _inputs(name, 4, 2), _inputs(name, 6, 3), "random")
    task = "image-classification" if name in ("resnet", "vit") else "feature-extraction"
    return Student(copy.deepcopy(original), original, NoTokenizer(), task, corpus)


@torch.no_grad()
def answer_to_images(model: nn.Module, inputs: ModelInputs) -> torch.Tensor:
    return model(**next(inputs.batches(6)))[0]


@pytest.mark.parametrize("convs", ["tucker", "cp"])
@pytest.mark.parametrize("name", _CONFIGS)
def test_convolutions_of_every_kind_of_model_are_factorised_and_reload_bit_for_bit(name, convs, tmp_path):
    student = student_of(name)
    one = TensorDecomposition(keep=0.6, convs=convs, targets=_TARGETS[name], on_misfit="keep")
    planned = one.plan(student.model)
    notes = one.apply(student, generator=torch.Generator())
    assert student.edits == planned
    assert len(notes["layers"]) == len(planned) > 0
    assert all(0 <= layer["relative_error"] < 1 for layer in notes["layers"].values())
    assert count_parameters(student.model) < count_parameters(student.original)
    truth = answer_to_images(student.original, student.corpus.evaluation)
    moved = (answer_to_images(student.model, student.corpus.evaluation) - truth).norm() / truth.norm()
    assert 0 < moved < 0.8
    save_student(student, tmp_path)
    model, edits = load_student_model(tmp_path, student.task)
    assert edits == student.edits
    loaded = answer_to_images(model, student.corpus.evaluation)
    assert torch.equal(loaded, answer_to_images(student.model, student.corpus.evaluation))
    if student.task == "image-classification":
        prove_reloads(student, tmp_path)


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_more_weights_lose_less(anchor):
    lost = []
    for keep in (0.3, 0.9):
        student = student_of("resnet")
        TensorDecomposition(keep=keep, anchor=anchor, on_misfit="keep").apply(student, generator=torch.Generator())
        truth = answer_to_images(student.original, student.corpus.evaluation)
        lost.append(float((answer_to_images(student.model, student.corpus.evaluation) - truth).norm()))
    assert 0 < lost[1] < lost[0]


def test_the_notes_have_output_pca_of_equal_size_beside_tucker():
    student = student_of("resnet")
    notes = TensorDecomposition(keep=0.5, on_misfit="keep").apply(student, generator=torch.Generator())
    for layer in notes["layers"].values():
        assert 0 < layer["output_pca"] < 1
        assert "plain_low_rank" not in layer


@pytest.mark.parametrize("anchor", [0.5, 1.0])
def test_it_follows_prune_filters(anchor, tmp_path):
    pytest.importorskip("torch_pruning")
    student = student_of("resnet")
    PruneFilters(keep=0.5, round_to=2).apply(student, generator=torch.Generator().manual_seed(0))
    name = "resnet.embedder.embedder.convolution"
    batch = next(student.corpus.calibration.batches(2))
    given, before = (probe(model, name, batch)[1] for model in (student.model, student.original))
    assert given.shape[1] < before.shape[1]
    kept = Provenance(student.edits).left_of(name, before, dim=1)
    assert torch.equal(kept, given), "it reads the images, of which nothing was cut"
    notes = TensorDecomposition(keep=0.6, anchor=anchor, on_misfit="keep").apply(student, generator=torch.Generator())
    assert len(notes["layers"]) > 3
    assert all(0 <= layer["relative_error"] < 1 for layer in notes["layers"].values())
    save_student(student, tmp_path)
    prove_reloads(student, tmp_path)


def test_without_bias_none_is_added():
    student = student_of("resnet")
    TensorDecomposition(keep=0.6, bias=False, on_misfit="keep").apply(student, generator=torch.Generator())
    layers = [module for module in student.model.modules() if isinstance(module, FactoredConv)]
    assert layers
    assert all(layer.bias is None for layer in layers)


def test_figures_of_an_image_classifier_are_perfect_for_the_original_and_say_accuracy():
    student = student_of("vit")
    fidelity = Fidelity(student.original, student.corpus.evaluation, task=student.task)
    figures = evaluate(student.original, fidelity, student.tokenizer, rounds=1)
    assert figures["kl_to_original"] == figures["top1_flips"] == 0
    assert figures["mean_cosine"] == 1
    answers = answer_to_images(student.original, student.corpus.evaluation).argmax(-1)
    assert figures["accuracy"] == float((answers == student.corpus.evaluation.labels).double().mean())
    assert figures["p50_ms"] > 0
    TensorDecomposition(keep=0.3).apply(student, generator=torch.Generator())
    assert fidelity.measure(student.model)["kl_to_original"] > 0


@pytest.mark.parametrize(("name", "convs"), [("resnet", "tucker"), ("vit", "cp")])
def test_the_onnx_file_agrees_and_holds_convolutions(name, convs, tmp_path):
    student = student_of(name)
    student.tokenizer.model_input_names = ["pixel_values"]
    TensorDecomposition(keep=0.6, convs=convs, on_misfit="keep").apply(student, generator=torch.Generator())
    entry = OnnxExport(rounds=3, threads=1, texts=8).write(student, tmp_path / "onnx")
    assert entry["parity"]["relative_error"] < 1e-4
    assert entry["operators"]["Conv"] > 1
    assert set(entry["latency_ms"]) == {"p50", "p95", "1x3x32x32", "8x3x32x32"}
    weights = 4 * count_parameters(student.model)
    assert weights < entry["size_bytes"] < weights + 30_000
    assert entry["stock_int8"]["size_bytes"] > 0


def test_groups_and_other_kinds_of_convolutions_are_named_or_kept():
    student = student_of("wav2vec2")
    with pytest.raises(CompressKitError, match=r"pos_conv_embed.conv .* has 4 groups") as caught:
        TensorDecomposition(keep=0.6).plan(student.model)
    assert "on_misfit: keep" in str(caught.value)
    _, kept = TensorDecomposition(keep=0.6, on_misfit="keep")._planned(student.model)
    assert "encoder.pos_conv_embed.conv" in kept


def test_a_second_time_is_a_misfit():
    student = student_of("vit")
    TensorDecomposition(keep=0.6).apply(student, generator=torch.Generator())
    with pytest.raises(CompressKitError, match="projection is factorised already"):
        TensorDecomposition(keep=0.6).plan(student.model)


def test_one_example_is_too_few():
    student = student_of("vit")
    student.corpus = Corpus(_inputs("vit", 1, 0), _inputs("vit", 1, 0), _inputs("vit", 3, 0), "one")
    with pytest.raises(CompressKitError, match="one calibration example is too few"):
        TensorDecomposition(keep=0.6).apply(student, generator=torch.Generator())


def test_a_convolution_that_does_not_run_is_named():
    student = student_of("vit")
    student.model.unused = nn.Conv2d(32, 32, 3)
    student.original.unused = nn.Conv2d(32, 32, 3)
    with pytest.raises(CompressKitError, match="unused does not run on this data"):
        TensorDecomposition(keep=0.6, targets="unused").apply(student, generator=torch.Generator())


def test_models_without_tables_or_convolutions_and_training_on_images_are_refused():
    with pytest.raises(CompressKitError, match="neither a token table nor a convolution"):
        TensorDecomposition(keep=0.6, convs=None).plan(student_of("vit").model)
    with pytest.raises(CompressKitError, match="training needs token sequences"):
        Distill(steps=1).plan(student_of("vit").model)
