"""How true a student is to the original on held-out text.

Everything is measured against the original's own outputs: labels are not needed. Sums are kept in float64, and the
original compared with itself gives exactly the best value of every figure.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.data import Batch, Examples, ModelInputs, Sequences
from compresskit.errors import CompressKitError
from compresskit.models import answer_kind
from compresskit.progress import track
from compresskit.sentence import MEAN_POOLED, SentenceEmbedding
from compresskit.student import HeldOut

# N texts, T tokens, V vocabulary or classes, D width

NEIGHBOURS = 10
#: Embeddings whose similarities can be ranked.
LEAST_COMPARED = 3
_LEAST_FOR_NEIGHBOURS = 3 * NEIGHBOURS  # among a few more than ten, any ten overlap
_LOGITS_AT_A_TIME = 2**25  # floats in one batch of logits: 128 MiB
_FLOAT64_LOGITS_AT_A_TIME = 2**22  # 32 MiB


def row_cosines(a: Tensor, b: Tensor) -> Tensor:
    """cos(a_i, b_i), (N,): exactly 1 where the rows are equal. Two zero rows are equal; one alone gives 0."""
    # √(s · s) = s in IEEE arithmetic, but √s · √s is not: the product stands under one root.
    scale = ((a * a).sum(-1) * (b * b).sum(-1)).sqrt()
    cosines = (a * b).sum(-1) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    return torch.where((a == b).all(-1), torch.ones_like(cosines), cosines)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's ρ with average ranks for ties, in [−1, 1]; without any variance 1 if the ranks agree, else 0."""
    ranks_a, ranks_b = rankdata(a), rankdata(b)
    ranks_a, ranks_b = ranks_a - ranks_a.mean(), ranks_b - ranks_b.mean()
    scale = math.sqrt(float((ranks_a**2).sum()) * float((ranks_b**2).sum()))
    if scale == 0:
        return float(np.array_equal(ranks_a, ranks_b))
    return float((ranks_a * ranks_b).sum()) / scale


def compare_embeddings(original: Tensor, student: Tensor) -> dict[str, float]:
    """How alike two sets of embeddings of the same texts are; all figures are 1 for equal sets.

    Args:
        original, student: (N, D) float64 with N ≥ 3. Widths may differ from 384 but must agree.

    Returns:
        `mean_cosine` of a text's two embeddings; `spearman` of all N (N − 1) / 2 pairwise cosine similarities; and
        from 30 texts on `top10_overlap`, the share of each text's ten nearest others that stay among the ten nearest.

    Cost: O(N² D) time and O(N²) memory.
    """
    if original.shape != student.shape or len(original) < LEAST_COMPARED:
        raise ValueError(f"cannot compare embeddings {tuple(original.shape)} with {tuple(student.shape)}")
    similar_o, similar_s = _similarities(original), _similarities(student)
    above = torch.triu_indices(len(original), len(original), offset=1)
    pairs_o, pairs_s = similar_o[above[0], above[1]], similar_s[above[0], above[1]]
    figures = {"mean_cosine": float(row_cosines(original, student).mean())}
    if len(original) >= _LEAST_FOR_NEIGHBOURS:
        figures[f"top{NEIGHBOURS}_overlap"] = _neighbour_overlap(similar_o, similar_s)
    return figures | {"spearman": rank_correlation(pairs_o.numpy(), pairs_s.numpy())}


def _similarities(embeddings: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(embeddings, dim=-1)
    return unit @ unit.T


def _neighbour_overlap(a: Tensor, b: Tensor) -> float:
    itself = torch.eye(len(a), dtype=torch.bool)
    near_a = a.masked_fill(itself, -math.inf).topk(NEIGHBOURS).indices
    near_b = b.masked_fill(itself, -math.inf).topk(NEIGHBOURS).indices
    shared = (near_a[:, :, None] == near_b[:, None, :]).sum()
    return float(shared) / (len(a) * NEIGHBOURS)


def compare_scores(original: Tensor, student: Tensor) -> dict[str, float]:
    """How alike two models' scores (N, outputs) of the same texts are: heads that regress or rank.

    Returns:
        `relative_error`, ‖student − original‖ / ‖original − its mean‖; and from three texts on `spearman`, the mean
        over outputs of the rank correlation.
    """
    spread = (original - original.mean(0)).norm()
    lost = (student - original).norm()
    figures = {"relative_error": float(lost / spread) if spread > 0 else (0.0 if lost == 0 else math.inf)}
    if len(original) >= LEAST_COMPARED:
        pairs = zip(original.T.numpy(), student.T.numpy(), strict=True)
        figures["spearman"] = float(np.mean([rank_correlation(a, b) for a, b in pairs]))
    return figures


def compare_labels(original: Tensor, student: Tensor) -> dict[str, float]:
    """How alike two models' logits (N, labels) are where each label is a yes or no of its own.

    Returns:
        `kl_to_original`, the sum over labels of the divergence of yes and no, in nats a text; `label_flips`, the share
        of answers that are another.
    """
    kl = torch.zeros((), dtype=torch.float64)
    for sign in (1, -1):
        log_p, log_q = F.logsigmoid(sign * original.double()), F.logsigmoid(sign * student.double())
        kl += (log_p.exp() * (log_p - log_q)).sum()
    flips = ((original > 0) != (student > 0)).double().mean()
    return {"kl_to_original": float(kl) / len(original), "label_flips": float(flips)}


class LogitComparison:
    """Running sums over positions where two models give logits for the same thing."""

    def __init__(self) -> None:
        self.positions = 0
        self.kl = self.cosine = self.nll = self.nll_original = 0.0
        self.flips = self.right = 0

    def add(self, original: Tensor, student: Tensor, targets: Tensor | None = None) -> None:
        """Take in logits (T, V) of both models and, for language models, the tokens (T,) that came next."""
        if original.shape != student.shape:
            raise ValueError(f"the original gives logits {tuple(original.shape)}, the student {tuple(student.shape)}")
        step = max(1, _FLOAT64_LOGITS_AT_A_TIME // original.shape[-1])
        for first in range(0, len(original), step):
            here = slice(first, first + step)
            self._add_chunk(original[here].double(), student[here].double(), None if targets is None else targets[here])

    def _add_chunk(self, original: Tensor, student: Tensor, targets: Tensor | None) -> None:
        log_p, log_q = original.log_softmax(-1), student.log_softmax(-1)
        self.positions += len(original)
        self.kl += float((log_p.exp() * (log_p - log_q)).sum())
        self.flips += int((original.argmax(-1) != student.argmax(-1)).sum())
        if targets is None:
            self.cosine += float(row_cosines(original, student).sum())
        else:
            self.nll += float(-log_q.gather(-1, targets[:, None]).sum())
            self.nll_original += float(-log_p.gather(-1, targets[:, None]).sum())

    def add_labels(self, student: Tensor, labels: Tensor) -> None:
        """Count the right answers among logits (N, V) whose classes (N,) are known."""
        self.right += int((student.argmax(-1) == labels).sum())

    def divergence(self) -> dict[str, float]:
        """`kl_to_original`, the mean KL(original ‖ student) in nats, and `top1_flips`, the share of other answers."""
        return {"kl_to_original": self.kl / self.positions, "top1_flips": self.flips / self.positions}


@dataclass(frozen=True)
class _Sides:
    """What is compared: a model, and the same examples in the ids that it and the student read."""

    original: PreTrainedModel
    given: Examples
    student_given: Examples

    def batches(self, size: int) -> Iterator[tuple[Batch, Batch]]:
        """The same examples for the original and for the student."""
        total = -(-len(self.given) // size)
        if self.given is self.student_given:
            yield from ((batch, batch) for batch in track(self.given.batches(size), _LABEL, total=total))
            return
        pairs = zip(self.given.batches(size), self.student_given.batches(size), strict=True)
        yield from track(pairs, _LABEL, total=total)


_LABEL = "measuring fidelity"


class Fidelity:
    """The original's outputs on held-out text, and how far a model is from them.

    For `feature-extraction`: `mean_cosine`, `top10_overlap` and `spearman` of mean-pooled sentence embeddings; the
    original's are computed once. For `text-generation`: `perplexity` of the text, `kl_to_original` (nats a token) and
    `top1_flips`. For classification: `kl_to_original`, `top1_flips` and `mean_cosine` of the logits, and `accuracy`
    where the examples have labels; with several labels at once `kl_to_original` and `label_flips` of each label's yes
    or no; for scores (one output, rerankers) `relative_error` and `spearman`. The original's logits are computed again
    beside each student's, so that no (all tokens, vocabulary) matrix is ever kept.

    A student with fewer tokens reads the same texts in its own (`HeldOut`). What is said of whole texts is compared
    with the original's own reading; what is said token by token with the original on the student's tokens, its
    distribution over those. Perplexity is for each of the original's tokens, however many the student has for them.

    Args:
        original: the untouched model.
        sequences: held-out text, never used to calibrate or train.
        task: a key of `compresskit.models.TASKS`.
        sentence: how a feature extractor's embeddings are pooled.
        batch_size: sequences at a time; less where a vocabulary is so large that logits would pass 128 MiB.
    """

    def __init__(
        self,
        original: PreTrainedModel,
        sequences: Examples,
        *,
        task: str,
        sentence: SentenceEmbedding = MEAN_POOLED,
        batch_size: int = 16,
    ) -> None:
        measures: dict[str, Callable[[PreTrainedModel, HeldOut | None], dict[str, float]]] = {
            "feature-extraction": self._embedding_fidelity,
            "text-generation": self._language_fidelity,
            "text-classification": self._label_fidelity,
            "token-classification": self._label_fidelity,
            "image-classification": self._label_fidelity,
        }
        if task not in measures:
            raise ValueError(f"no fidelity is known for task {task!r}")
        self.original, self.sequences, self.task, self.batch_size = original, sequences, task, batch_size
        self.sentence, self._measure = sentence, measures[task]
        self._labels = sequences.labels if isinstance(sequences, ModelInputs) else None
        if task == "feature-extraction" and len(sequences) < LEAST_COMPARED:
            what = f"{len(sequences)} sequences to measure with; embeddings need {LEAST_COMPARED} or more"
            raise CompressKitError(what, where="data.evaluation", fix="give more text")
        self._embeddings = self._embed(original, sequences) if task == "feature-extraction" else None

    def measure(self, model: PreTrainedModel, held_out: HeldOut | None = None) -> dict[str, float]:
        """The figures of `model`; it is run in eval mode and left in the mode it was in.

        Args:
            model: any of the same task.
            held_out: the texts as it reads them, where that is not how the original does.
        """
        return self._measure(model, held_out)

    def _sides(self, held_out: HeldOut | None) -> _Sides:
        if held_out is None:
            return _Sides(self.original, self.sequences, self.sequences)
        if self.task in ("text-generation", "token-classification"):
            return _Sides(held_out.reference, held_out.sequences, held_out.sequences)
        return _Sides(self.original, self.sequences, held_out.sequences)

    def _embed(self, model: PreTrainedModel, given: Examples) -> Tensor:
        total = -(-len(given) // self.batch_size)
        with evaluating(model):
            batches = track(given.batches(self.batch_size), _LABEL, total=total)
            return torch.cat([self._embed_batch(model, batch) for batch in batches])

    def _embed_batch(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        batch = on_device(batch, model)
        hidden = model(**batch).last_hidden_state.to(torch.float64)
        return self.sentence.pool(hidden, batch["attention_mask"]).cpu()

    def _embedding_fidelity(self, model: PreTrainedModel, held_out: HeldOut | None) -> dict[str, float]:
        assert self._embeddings is not None
        theirs, ours = self._embeddings, self._embed(model, self._sides(held_out).student_given)
        if theirs.shape[1] != ours.shape[1]:
            what = f"its embeddings have {theirs.shape[1]} numbers, and those that are compared {ours.shape[1]}"
            raise CompressKitError(what, where="original", fix="name the model that the student was made from")
        return compare_embeddings(theirs, ours)

    def _language_fidelity(self, model: PreTrainedModel, held_out: HeldOut | None) -> dict[str, float]:
        sums = self._compare_logits(model, self._sides(held_out), next_token=True)
        nll = sums.nll / sums.positions * (held_out.growth if held_out else 1.0)
        perplexity = float(torch.tensor(nll, dtype=torch.float64).exp())  # inf, not an error
        return {"perplexity": perplexity, **sums.divergence()}

    def _label_fidelity(self, model: PreTrainedModel, held_out: HeldOut | None) -> dict[str, float]:
        kind, sides = answer_kind(self.original), self._sides(held_out)
        if kind == "scores":
            return compare_scores(*self._all_logits(model, sides))
        if kind == "labels":
            return compare_labels(*self._all_logits(model, sides))
        return self._class_fidelity(model, sides)

    def _all_logits(self, model: PreTrainedModel, sides: _Sides) -> tuple[Tensor, Tensor]:
        """(N, classes) float64 of the original and of `model`; of token heads, a row a real token."""
        rows: tuple[list[Tensor], list[Tensor]] = ([], [])
        with evaluating(sides.original), evaluating(model):
            for batches in sides.batches(self.batch_size):
                for one, batch, kept in zip((sides.original, model), batches, rows, strict=True):
                    logits = one(**on_device(batch, one)).logits.cpu().double()
                    kept.append(logits[batch["attention_mask"].bool()] if logits.dim() == 3 else logits)
        original, student = (torch.cat(kept) for kept in rows)
        return original, student

    def _class_fidelity(self, model: PreTrainedModel, sides: _Sides) -> dict[str, float]:
        sums = self._compare_logits(model, sides, next_token=False)
        accuracy = {} if self._labels is None else {"accuracy": sums.right / sums.positions}
        return {**sums.divergence(), "mean_cosine": sums.cosine / sums.positions, **accuracy}

    def _compare_logits(self, model: PreTrainedModel, sides: _Sides, *, next_token: bool) -> LogitComparison:
        sums = LogitComparison()
        longest = max(map(len, sides.given.rows)) if isinstance(sides.given, Sequences) else 1
        config = self.original.config
        classes = config.get_text_config().vocab_size if next_token else config.num_labels or 1
        size = max(1, min(self.batch_size, _LOGITS_AT_A_TIME // (longest * classes)))
        with evaluating(sides.original), evaluating(model):
            for batches in sides.batches(size):
                both = zip((sides.original, model), batches, strict=True)
                pair = [one(**on_device(batch, one)).logits.cpu() for one, batch in both]
                self._add_batch(sums, batches[0], *pair, next_token=next_token)
        if not sums.positions:
            raise ValueError("no sequence has a second token to predict")
        return sums

    def _add_batch(
        self, sums: LogitComparison, batch: Batch, original: Tensor, student: Tensor, *, next_token: bool
    ) -> None:
        if "attention_mask" not in batch:
            if self._labels is not None:
                sums.add_labels(student, self._labels[sums.positions : sums.positions + len(student)])
            sums.add(original, student)
            return
        mask = batch["attention_mask"].bool()
        if next_token:
            counted = mask[:, 1:] & mask[:, :-1]
            targets = batch["input_ids"][:, 1:][counted]
            sums.add(original[:, :-1][counted], student[:, :-1][counted], targets)
        elif original.dim() == 3:
            sums.add(original[mask], student[mask])
        else:
            sums.add(original, student)


def on_device(batch: Batch, model: PreTrainedModel) -> Batch:
    """The batch where the model is."""
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode and no gradients inside; the model's own mode again afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
