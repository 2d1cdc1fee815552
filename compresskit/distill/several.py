"""Several teachers as one: what they say is averaged, and where they contradict each other one is trusted or none.

    m = Σ w_i p_i                           the average of their distributions (or of their embeddings)
    score = Σ w_i KL(p_i ‖ m) / H(w)        Jensen–Shannon divergence; 0: they agree, 1: nothing shared
    score ≤ threshold     m
    score > threshold     average: m        route: p_j with the greatest  ln w_j + trust_j        drop: not counted

An item is a token for heads over tokens, a text for heads over texts and for sentence embeddings u_i (unit length),
whose score is (1 − ‖Σ w_i u_i‖²) / (1 − Σ w_i²), at most 1: 0 for one direction, 1 for unrelated ones.

Which of two that disagree is wrong cannot be seen in what they say alone; `trust` says what is believed instead:
    labels     ln p_i(next token), which the text of a language model knows: then the choice is the most probable source
               of the text. It tells a wrong teacher from a right one, sure or not, as far as the right one predicts the
               text; it leans towards what the text says, and so is asked in conflicts alone
    majority   −KL(p_i ‖ m), for embeddings the cosine to the mean: the one that is nearest to all. Needs three teachers
               that are not wrong in the same way; of two equally heavy ones it cannot tell
    entropy    −H(p_i): the surest. It finds a teacher that does not know, never one that is wrong and sure
Where nothing speaks for one of them (the last token of a text has no label: there the majority decides), the heavier
one is taken, of equal ones the first. Source of the idea, not of the rule: arXiv:2602.01064, where more teachers made
students worse until a router chose. Averages of teachers did not beat the best one alone in published comparisons.

Distributions are averaged as they are; a temperature of the loss applies to their average. Logits of all teachers are
made for some tokens at a time; their combination, (tokens × vocabulary) numbers, is kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compresskit.data import Batch
from compresskit.distill.checkpoint import prefixed, under
from compresskit.distill.outputs import Outputs, Projection, Wanted
from compresskit.distill.teachers import Teacher
from compresskit.kernels.buckets import TopK
from compresskit.kernels.divergence import working_dtype

# K teachers, N items, V vocabulary or classes, B texts, L tokens, H width of embeddings

Conflict = Literal["average", "route", "drop"]
Trust = Literal["labels", "majority", "entropy"]
_LOGITS_AT_A_TIME = 2**24  # floats of all teachers together: 64 MiB
_BINS = 1000
_QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Rule:
    """How conflicts are settled: see the module; `threshold` is the score above which there is one, in [0, 1]."""

    conflict: Conflict = "average"
    trust: Trust = "majority"
    threshold: float = 0.2


@dataclass(frozen=True)
class Settled:
    """What several teachers came to.

    Attributes:
        told: log-probabilities (N, V), or embeddings (N, H).
        score: (N,), in [0, 1].
        trusted: (N,), the teacher that was taken; −1 where they were averaged.
    """

    told: Tensor
    score: Tensor
    trusted: Tensor


def settle(log_p: Tensor, weights: Tensor, rule: Rule, *, labels: Tensor | None = None) -> Settled:
    """What K teachers come to about N items.

    Args:
        log_p: ln p_i, (K, N, V).
        weights: (K,) > 0, of sum 1.
        rule: how conflicts are settled.
        labels: (N,), the right class of each item, −1 where it is not known; None where of none.
    """
    log_w = weights.log()[:, None]
    mixed = (log_p + log_w[..., None]).logsumexp(0)
    apart = (log_p.exp() * (log_p - mixed)).masked_fill(log_p == -torch.inf, 0.0)
    departs = apart.sum(-1).clamp_min(0)  # KL(p_i ‖ m), (K, N)
    score = _relative(weights @ departs, torch.special.entr(weights).sum())
    belief = log_w + _belief(log_p, departs, labels, rule.trust)
    return _chosen(mixed, log_p, belief, score, rule)


def settle_embeddings(embeddings: Tensor, weights: Tensor, rule: Rule) -> Settled:
    """What K teachers come to about N texts, from (K, N, H); the majority is trusted."""
    units = nn.functional.normalize(embeddings, dim=-1)
    middle = torch.einsum("k,knh->nh", weights, units)
    score = _relative(1 - middle.square().sum(-1), 1 - weights.square().sum())
    belief = weights.log()[:, None] + nn.functional.cosine_similarity(units, middle, dim=-1)
    mixed = torch.einsum("k,knh->nh", weights, embeddings)
    return _chosen(mixed, embeddings, belief, score, rule)


def _relative(score: Tensor, most: Tensor) -> Tensor:
    return (score / most).clamp(0, 1) if most > 0 else torch.zeros_like(score)


def _belief(log_p: Tensor, departs: Tensor, labels: Tensor | None, trust: Trust) -> Tensor:
    if trust == "entropy":
        return -torch.special.entr(log_p.exp()).sum(-1)
    if trust == "majority" or labels is None:
        return -departs
    right = log_p.gather(-1, labels.clamp_min(0).expand(len(log_p), -1)[..., None])[..., 0]
    return right.where(labels >= 0, -departs)


def _chosen(mixed: Tensor, given: Tensor, belief: Tensor, score: Tensor, rule: Rule) -> Settled:
    trusted = torch.full_like(score, -1, dtype=torch.int64)
    if rule.conflict == "route":
        trusted = belief.argmax(0).where(score > rule.threshold, trusted)
        one = given.gather(0, trusted.clamp_min(0)[None, :, None].expand(1, -1, given.shape[-1]))[0]
        mixed = mixed.where((trusted < 0)[:, None], one)
    return Settled(mixed, score, trusted)


class Tally:
    """Scores of the items of each text of the training part, held out or not, the first time that it is read.

    Items are kept as a histogram of fixed size, texts as the mean score of their items.

    Args:
        teachers: how many there are.
        threshold: score above which they contradict each other.
    """

    def __init__(self, teachers: int, threshold: float) -> None:
        self.threshold, self.texts = threshold, dict[int, float]()
        self.histogram = torch.zeros(_BINS, dtype=torch.int64)
        self.sums = torch.zeros(2, dtype=torch.float64)  # of scores, of conflicts
        self.trusted = torch.zeros(teachers, dtype=torch.int64)

    def add(self, rows: Sequence[int], mask: Tensor, settled: Settled) -> None:
        """Items of a batch, (B · items): those of new texts count where `mask` (B, items) is not 0."""
        read = mask > 0
        means = (settled.score.view(mask.shape) * read).sum(1) / read.sum(1).clamp_min(1)
        fresh = []
        for row, mean in zip(rows, means.tolist(), strict=True):  # a batch may hold a text twice
            fresh.append(row >= 0 and row not in self.texts)
            if fresh[-1]:
                self.texts[row] = mean
        kept = (read & torch.tensor(fresh, device=mask.device)[:, None]).flatten()
        scores, trusted = settled.score[kept].cpu().double(), settled.trusted[kept].cpu()
        self.histogram += torch.bincount((scores * _BINS).long().clamp_max(_BINS - 1), minlength=_BINS)
        self.sums += torch.stack([scores.sum(), (scores > self.threshold).sum().double()])
        self.trusted += torch.bincount(trusted[trusted >= 0], minlength=len(self.trusted))

    def summary(self, names: Sequence[str]) -> dict[str, Any]:
        """For the report: items, mean, the share above the threshold, quantiles (to 1/1000), and who was trusted.

        `texts` is the mean score of each text's items, by the text's number in the training part.
        """
        items = int(self.histogram.sum())
        below = self.histogram.cumsum(0)
        reached = {q: int((below < q * items).sum()) + 1 for q in _QUANTILES}
        return {
            "items": items,
            "mean": float(self.sums[0]) / max(items, 1),
            "threshold": self.threshold,
            "share_above": float(self.sums[1]) / max(items, 1),
            "quantiles": {f"{q:g}": min(place, _BINS) / _BINS if items else 0.0 for q, place in reached.items()},
            "trusted_items": dict(zip(names, self.trusted.tolist(), strict=True)),
            "texts": {str(row): round(mean, 4) for row, mean in sorted(self.texts.items())},
        }

    def state(self) -> dict[str, Tensor]:
        """All of it."""
        rows = torch.tensor(list(self.texts), dtype=torch.int64)
        means = torch.tensor(list(self.texts.values()), dtype=torch.float64)
        return {
            "rows": rows,
            "means": means,
            "histogram": self.histogram,
            "sums": self.sums,
            "trusted": self.trusted,
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from it."""
        self.texts = dict(zip(state["rows"].tolist(), state["means"].tolist(), strict=True))
        self.histogram, self.sums, self.trusted = state["histogram"], state["sums"], state["trusted"]


class SeveralTeachers(Teacher):
    """Teachers of one vocabulary (and one width of embeddings) that speak as one.

    Args:
        teachers: at least two; they are asked for `predictions` and `sentence` alone.
        weights: > 0, one each; their sum does not matter.
        rule: how conflicts are settled.
        next_tokens: whether the text's next tokens are the labels.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        weights: Sequence[float],
        rule: Rule,
        *,
        next_tokens: bool = False,
    ) -> None:
        self.teachers, self.rule, self.next_tokens = teachers, rule, next_tokens
        self.weights = torch.tensor([weight / sum(weights) for weight in weights])
        self.tally = Tally(len(teachers), rule.threshold)
        self.leaves_out = rule.conflict == "drop"

    @torch.no_grad()
    def __call__(self, batch: Batch, rows: list[int], needs: frozenset[Wanted]) -> Outputs:
        """What they come to about this batch; `counts` says which items are left out."""
        other = needs - {"predictions", "sentence"}
        if other:
            raise ValueError(f"several teachers are not asked for {next(iter(other))}")
        told = [teacher(batch, rows, needs) for teacher in self.teachers]
        mask = batch["attention_mask"]
        counts = torch.ones(mask.shape, device=mask.device) if self.leaves_out else None
        predictions = sentence = None
        if "predictions" in needs:
            settled, shape = self._predictions(batch, told)
            predictions = settled.told.view(*shape, -1)
            per_item = mask if len(shape) == 2 else mask.amax(1, keepdim=True)
            self.tally.add(rows, per_item, settled)
            counts = self._counted(counts, settled, shape)
        if "sentence" in needs:
            embeddings = torch.stack([one.sentence for one in told if one.sentence is not None])
            settled = settle_embeddings(embeddings, self.weights.to(embeddings), self.rule)
            sentence = settled.told
            if "predictions" not in needs:
                self.tally.add(rows, mask.amax(1, keepdim=True), settled)
            counts = self._counted(counts, settled, mask.shape[:1])
        return Outputs(predictions, sentence=sentence, counts=counts)

    def memory(self) -> dict[str, Tensor]:
        """That of each, and the tally."""
        found = prefixed("tally", self.tally.state())
        for i, teacher in enumerate(self.teachers):
            found |= prefixed(str(i), teacher.memory())
        return found

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Go on from it."""
        self.tally.restore(under("tally", memory))
        for i, teacher in enumerate(self.teachers):
            teacher.remember(under(str(i), memory))

    def follow(self, weights: Mapping[str, Tensor]) -> None:
        """Each on its own."""
        for teacher in self.teachers:
            teacher.follow(weights)

    def _counted(self, counts: Tensor | None, settled: Settled, shape: torch.Size) -> Tensor | None:
        if counts is None:
            return None
        agreed = (settled.score <= self.rule.threshold).view(shape)
        return counts * (agreed if agreed.ndim == 2 else agreed[:, None])

    def _predictions(self, batch: Batch, told: Sequence[Outputs]) -> tuple[Settled, torch.Size]:
        """What they come to, item by item, and the shape of the items: (B, L) or (B,)."""
        given = [one.predictions for one in told]
        first = given[0]
        shape = first.hidden.shape[:-1] if isinstance(first, Projection) else _logits(first).shape[:-1]
        labels = _next_tokens(batch).flatten() if self.next_tokens and len(shape) == 2 else None
        parts = []
        for part, logits in _chunks(given, shape.numel()):
            log_p = logits.to(working_dtype(logits.dtype)).log_softmax(-1)
            own = None if labels is None else labels[part]
            parts.append(settle(log_p, self.weights.to(log_p), self.rule, labels=own))
        combined, score, trusted = (
            torch.cat([getattr(one, name) for one in parts]) for name in ("told", "score", "trusted")
        )
        return Settled(combined, score, trusted), shape


def _next_tokens(batch: Batch) -> Tensor:
    """The token that follows each, (B, L); −1 where none does."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    following = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -1)
    return nn.functional.pad(following, (0, 1), value=-1)


def _logits(given: Tensor | Projection | TopK | None) -> Tensor:
    if not isinstance(given, Tensor):
        raise ValueError(f"several teachers give logits, not {type(given).__name__}")
    return given


def _chunks(given: Sequence[Tensor | Projection | TopK | None], items: int) -> Iterator[tuple[slice, Tensor]]:
    """All teachers' logits (K, n, V) of a few items at a time, and which items."""
    first = given[0]
    width = first.head.weight.shape[0] if isinstance(first, Projection) else _logits(first).shape[-1]
    size = max(1, _LOGITS_AT_A_TIME // (width * len(given)))
    for start in range(0, items, size):
        part = slice(start, start + size)
        logits = [_some(one, part) for one in given]
        shared = min(one.shape[-1] for one in logits)  # heads may be padded further than others
        yield part, torch.stack([one[..., :shared] for one in logits])


def _some(given: Tensor | Projection | TopK | None, part: slice) -> Tensor:
    if isinstance(given, Projection):
        return given.head.logits_of_reduced(given.head.reduced(given.hidden.flatten(0, 1)[part]))
    return _logits(given).flatten(0, -2)[part]
