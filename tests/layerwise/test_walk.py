"""The walk: what it collects equals what the two models really compute, padding left out."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from families import FAMILIES, tiny_student

from compresskit.errors import CompressKitError
from compresskit.layerwise.walk import Walk
from compresskit.passes.prune_width import PruneWidth
from compresskit.surgery.sites import find_anatomy


def collect(student, anchor, sites=None):
    seen = {}
    chosen = sites or find_anatomy(student.model).sites
    Walk(student, anchor=anchor, batch_tokens=64).run(
        chosen, lambda site, moments: seen.update({site: moments}), label="t"
    )
    return seen


def run_hooked(model, names, sequences):
    """Inputs and outputs of modules for all real tokens, straight from full forwards: {name: (x, y)}."""
    found: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {name: ([], []) for name in names}

    def keep(name, mask, _module, args, output):
        found[name][0].append(args[0][mask])
        found[name][1].append(output[mask])

    for batch in sequences.batches(5):
        mask = batch["attention_mask"].bool()
        handles = [model.get_submodule(name).register_forward_hook(partial(keep, name, mask)) for name in names]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
    return {name: tuple(torch.cat(part).double() for part in parts) for name, parts in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_unanchored_moments_are_those_of_the_student(family):
    student = tiny_student(family)
    seen = collect(student, 0.0)
    direct = run_hooked(student.model, [site.linears[0] for site in seen], student.corpus.calibration)
    tokens = sum(len(row) for row in student.corpus.calibration.rows)
    for site, moments in seen.items():
        x, y = direct[site.linears[0]]
        assert moments.all.count == len(x) == tokens
        torch.testing.assert_close(moments.all.xx, x.T @ x, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(moments.all.tx[: y.shape[1]], y.T @ x, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(moments.all.peak, x.abs().amax(0), rtol=1e-4, atol=1e-5)
        for found, shown in zip(moments.span, (x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)), strict=True):
            torch.testing.assert_close(found, shown, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [2, 3])
def test_of_few_sequences_one_is_held_out(count):
    student = _with_calibration(tiny_student("bert"), count)
    moments = next(iter(collect(student, 1.0).values()))
    assert moments.held_out.count == len(student.corpus.calibration.by_length().rows[-1])
    assert moments.fit.count == sum(map(len, student.corpus.calibration.rows)) - moments.held_out.count


def test_one_calibration_example_is_refused():
    student = _with_calibration(tiny_student("bert"), 1)
    with pytest.raises(CompressKitError, match="one calibration example"):
        collect(student, 1.0)


def _with_calibration(student, count):
    student.corpus = replace(student.corpus, calibration=student.corpus.calibration.limit(count))
    return student


def test_a_quarter_of_the_sequences_is_held_out():
    student = tiny_student("bert")
    moments = next(iter(collect(student, 0.0).values()))
    held = sum(len(row) for row in student.corpus.calibration.by_length().rows[3::4])
    assert moments.held_out.count == held
    assert moments.fit.count == sum(map(len, student.corpus.calibration.rows)) - held


@pytest.mark.parametrize("family", FAMILIES)
def test_target_inside_a_branch_lies_between_the_two_models(family):
    student = tiny_student(family)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(1.05)
    site = next(s for s in find_anatomy(student.model).sites if not s.writes_stream and s.block == 1)
    name = site.linears[0]
    (_, now), (_, was) = (
        run_hooked(model, [name], student.corpus.calibration)[name] for model in (student.model, student.original)
    )
    moments = collect(student, 0.25, [site])[site].all
    torch.testing.assert_close(moments.t[: now.shape[1]], (0.75 * now + 0.25 * was).sum(0), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_target_of_a_stream_writer_adds_what_the_stream_has_lost(family):
    student = tiny_student(family)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(1.05)
    anatomy = find_anatomy(student.model)
    output = anatomy.attentions[0].output
    # The sum goes into the norm after the attention: that norm's input is the stream (BERT adds before, Llama too).
    norm = (
        "encoder.layer.0.attention.output.LayerNorm" if family == "bert" else "model.layers.0.post_attention_layernorm"
    )
    now, was = (
        run_hooked(model, [output, norm], student.corpus.calibration) for model in (student.model, student.original)
    )
    site = next(s for s in anatomy.sites if s.linears == (output,))
    moments = collect(student, 0.5, [site])[site].all
    expected = now[output][1] + 0.5 * (was[norm][0] - now[norm][0])
    torch.testing.assert_close(moments.t, expected.sum(0), rtol=1e-3, atol=1e-2)


def test_a_writer_whose_output_is_normalised_before_the_addition_is_not_anchored():
    student = tiny_student("gemma3")
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(1.05)
    writers = [site for site in find_anatomy(student.model).sites if site.writes_stream]
    assert writers
    anchored, free = (collect(student, anchor, writers) for anchor in (1.0, 0.0))
    for site in writers:
        torch.testing.assert_close(anchored[site].all.tx, free[site].all.tx)


def test_original_outputs_are_cut_to_what_the_student_kept():
    student = tiny_student("llama")
    PruneWidth(keep=0.5).apply(student, generator=torch.Generator())  # type: ignore[arg-type]
    site = next(s for s in find_anatomy(student.model).sites if "gate_proj" in s.linears[0])
    moments = collect(student, 1.0, [site])[site].all
    kept = student.model.get_submodule(site.linears[0]).out_features
    assert kept == 32
    name = site.linears[0]
    _, was = run_hooked(student.original, [name], student.corpus.calibration)[name]
    from_edit = next(e for e in student.edits if name in e.inputs)  # type: ignore[attr-defined]
    rows = [int(i) for run in from_edit.keep.split(",") for i in _expand(run)]  # type: ignore[attr-defined]
    torch.testing.assert_close(moments.t[:kept], was[:, rows].sum(0), rtol=1e-3, atol=1e-2)


def _expand(run: str) -> range:
    first, _, last = run.partition("-")
    return range(int(first), int(last or first) + 1)


def test_solving_a_site_is_seen_by_the_sites_after_it():
    student = tiny_student("bert")
    before = collect(student, 0.0)

    def zero(site, moments):
        seen[site] = moments
        with torch.no_grad():
            for name in site.linears:
                student.model.get_submodule(name).weight.zero_()

    seen = {}
    Walk(student, anchor=0.0).run(find_anatomy(student.model).sites, zero, label="t")
    first, second = list(before)[:2]
    assert torch.allclose(seen[first].all.xx, before[first].all.xx)
    assert not torch.allclose(seen[second].all.xx, before[second].all.xx)
