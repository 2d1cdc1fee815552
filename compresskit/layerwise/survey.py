"""The survey before ranks are allocated: what every site loses at every rank, measured once and kept on the disk.

Three looks at calibration text, all on the model as it is: a forward and backward pass (`sensitivity`), a walk that
decomposes every site and changes none, and, where losses are to be measured, two trials a site (`trials`). Ranks for
any budget follow from it without another look (`ranks`).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from compresskit.cache import cache_folder
from compresskit.data import Batch, Sequences
from compresskit.data.cache import read_tensors, write_tensors
from compresskit.data.sequences import require_tokens
from compresskit.errors import CompressKitError
from compresskit.layerwise.moments import SiteMoments
from compresskit.layerwise.output_pca import OutputPCA, solve_output_pca
from compresskit.layerwise.ranks import Group, SiteCurve
from compresskit.layerwise.sensitivity import Fisher, collect_fisher
from compresskit.layerwise.trials import Trials, trial_weight
from compresskit.layerwise.walk import Walk
from compresskit.layerwise.weights import layer_bias, row_indices, stacked_weight
from compresskit.progress import track
from compresskit.student import Student
from compresskit.surgery.sites import Site

#: Raised by one whenever the same model and text would give another survey.
VERSION = 5
#: Calibration tokens that each look reads: gradients, moments, trials.
FISHER_TOKENS, WALK_TOKENS, TRIAL_TOKENS = 4096, 4096, 512
#: Tokens whose graph is in memory for a backward pass.
_GRAPH_TOKENS = 256
#: Ranks that are tried, as shares of the full rank.
_TRIED = (0.35, 0.7)


@dataclass(frozen=True)
class Survey:
    """What is known of each site before any is changed.

    Attributes:
        curves: losses by site.
        fisher: the sensitivity of each group's outputs, and of each block's; empty where all errors count alike.
    """

    curves: dict[Group, SiteCurve]
    fisher: dict[Group, Fisher]


def take_survey(
    student: Student, sites: Sequence[Site], *, weighted: bool, measured: bool, bias: bool, seed: int
) -> Survey:
    """The survey of `sites`, read from the cache where the same one was taken before.

    Args:
        student: not changed.
        sites: float linears by input site.
        weighted: measure errors by the Fisher information of the answer, else as shares of the site's output.
        measured: try two ranks of each site on the model.
        bias: whether every layer will have a bias; else only those that have one.
        seed: of the labels that gradients are drawn with.
    """
    options = f"{VERSION} {[site.linears for site in sites]} {weighted} {bias} {seed}"
    name = survey_fingerprint(student, options)
    folder = cache_folder() / "surveys"
    plain, tried = folder / f"{name}.safetensors", folder / f"{name}-tried.safetensors"
    stored = read_tensors(tried)
    if stored is None and not measured:
        stored = read_tensors(plain)
    if stored is None:
        stored = _measure(student, sites, weighted=weighted, measured=measured, bias=bias, seed=seed)
        write_tensors(tried if measured else plain, stored)
    return _read(student, sites, stored, measured=measured)


def site_groups(site: Site) -> list[Group]:
    """The groups that a site's layers may form: all together, and each alone."""
    return [site.linears] if len(site.linears) == 1 else [site.linears, *((name,) for name in site.linears)]


def token_sequences(student: Student) -> Sequences:
    """The calibration text.

    Raises:
        CompressKitError: a model that reads something else, images say.
    """
    text = student.corpus.calibration
    if not isinstance(text, Sequences):
        raise CompressKitError(
            "what the model's answer feels is measured on text, and this model reads none",
            where="data.calibration",
            fix="leave out what measures it: for low_rank say allocation: uniform, metric: output and share: true; for "
            "prune_width allocation: uniform and score: flap; for quantize a number of bits",
        )
    require_tokens(text)
    return text


def survey_fingerprint(student: Student, options: str) -> str:
    """sha256 of the model, the calibration tokens and the options: the name under which a survey is kept."""
    digest = hashlib.sha256(options.encode())
    digest.update(repr(token_sequences(student).rows).encode())
    digest.update(student.fingerprint().encode())
    return digest.hexdigest()


def first_tokens(sequences: Sequences, tokens: int) -> Sequences:
    """The first sequences that hold `tokens` tokens together, or all; at least two."""
    together = accumulate(len(row) for row in sequences.rows)
    enough = next((count for count, total in enumerate(together, 1) if total >= tokens), len(sequences))
    return sequences.limit(max(2, enough))


def trial_batches(student: Student) -> list[Batch]:
    """The calibration text that trials run on."""
    return first_batches(token_sequences(student), TRIAL_TOKENS, together=TRIAL_TOKENS)


def first_batches(sequences: Sequences, tokens: int, *, together: int) -> list[Batch]:
    """The first sequences that hold about `tokens` tokens, in batches of about `together`."""
    chosen = first_tokens(sequences, tokens)
    return list(chosen.batches(max(1, together // max(1, *(len(row) for row in chosen.rows)))))


def _measure(
    student: Student, sites: Sequence[Site], *, weighted: bool, measured: bool, bias: bool, seed: int
) -> dict[str, Tensor]:
    model = student.model
    groups = [group for site in sites for group in site_groups(site)]
    fisher: dict[Group, Fisher] = {}
    if weighted:
        fisher = measure_fisher(student, groups, seed=seed)
    trials = Trials(model, trial_batches(student)) if measured else None
    stored: dict[str, Tensor] = {}

    def look(site: Site, moments: SiteMoments) -> None:
        layers = [model.get_submodule(name) for name in site.linears]
        weight, _ = stacked_weight(layers)
        centred = bias or all(layer_bias(layer) is not None for layer in layers)
        mean = moments.all.mean(centred=centred)
        for group, rows in zip(site_groups(site), [slice(None), *row_indices(layers)], strict=False):
            part = weight[rows]
            metric = fisher[group].metric(part) if weighted else None
            pca = solve_output_pca(part, moment=mean.C, metric=metric)
            stored[_key("tail", group)] = pca.tail
            if trials and group == site.linears:
                stored[_key("trials", group)] = _try_ranks(trials, site.block, layers, pca, mean.mu)

    observe_first_tokens(student, sites, look, label="surveying ranks")
    return stored | store_fisher(fisher)


def measure_fisher(student: Student, groups: Sequence[Group], *, seed: int) -> dict[Group, Fisher]:
    """The Fisher information of the groups' outputs, and of each block's, on the first calibration text."""
    text = token_sequences(student)
    batches = track(first_batches(text, FISHER_TOKENS, together=_GRAPH_TOKENS), "measuring sensitivities")
    return collect_fisher(student.model, batches, groups, torch.Generator().manual_seed(seed))


def observe_first_tokens(
    student: Student, sites: Sequence[Site], look: Callable[[Site, SiteMoments], None], *, label: str
) -> None:
    """Show `look` the moments of the inputs of each site, on the first calibration text."""
    text = first_tokens(token_sequences(student), WALK_TOKENS)
    part = replace(student, corpus=replace(student.corpus, calibration=text))
    Walk(part, anchor=0).observe(sites, look, label=label)


def _try_ranks(trials: Trials, block: int, layers: Sequence[nn.Module], pca: OutputPCA, mu: Tensor) -> Tensor:
    """(predicted error, measured loss) of each rank tried, (ranks, 2) float64; the layers stay exact at the input μ."""
    weight, bias = stacked_weight(layers)
    at_mean = weight.double() @ mu if bias is None else weight.double() @ mu + bias.double()
    found = []
    for share in _TRIED:
        rank = max(1, round(share * len(pca.right)))
        B, A = pca.factors(rank)
        with trial_weight(layers, B @ A, at_mean - B @ (A @ mu)):
            found.append((float(pca.tail[rank]), trials.divergence(block)))
    return torch.tensor(found, dtype=torch.float64)


def _key(what: str, group: Group) -> str:
    return f"{what} {' '.join(group)}"


def store_fisher(fisher: dict[Group, Fisher]) -> dict[str, Tensor]:
    """Named tensors for the cache, that `read_fisher` reads."""
    stored: dict[str, Tensor] = {}
    for group, one in fisher.items():
        stored[_key("fisher", group)] = one.matrix
        stored[_key("sums", group)] = torch.tensor([one.power, one.count, one.outputs], dtype=torch.float64)
    return stored


def read_fisher(stored: dict[str, Tensor]) -> dict[Group, Fisher]:
    """The sensitivities among cached tensors."""
    fisher: dict[Group, Fisher] = {}
    for key in stored:
        what, *group = key.split(" ")
        if what == "fisher":
            power, count, outputs = stored[_key("sums", tuple(group))].tolist()
            fisher[tuple(group)] = Fisher(stored[key], power, int(count), int(outputs))
    return fisher


def _read(student: Student, sites: Sequence[Site], stored: dict[str, Tensor], *, measured: bool) -> Survey:
    curves: dict[Group, SiteCurve] = {}
    fisher = read_fisher(stored)
    for site in sites:
        groups = site_groups(site)
        tails = [stored[_key("tail", group)] for group in groups]
        # Without sensitivities a site's errors compare with other sites' as shares of what it gives.
        scale = 1.0 if fisher else max(float(tails[0][0]), torch.finfo(torch.float64).tiny)
        layers = [student.model.get_submodule(name) for name in site.linears]
        trials = stored[_key("trials", site.linears)] if measured else None
        curves[site.linears] = SiteCurve(
            site.linears,
            tuple(int(layer.out_features) for layer in layers),  # type: ignore[arg-type]
            int(layers[0].in_features),  # type: ignore[arg-type]
            tuple((tails[0] / scale).tolist()),
            tuple(tuple((tail / scale).tolist()) for tail in tails[1:]),
            () if trials is None else tuple((error / scale, loss) for error, loss in trials.tolist()),
        )
    return Survey(curves, fisher)
