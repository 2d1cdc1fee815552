"""What a model answers, how far another answer is from it, and which way the answer moves with its layers' outputs.

The answer is the distribution of a head's logits over classes, a yes or no for each of several labels, or else scores
or the last hidden states, seen as means of Gaussians of one variance; the distance is the KL divergence, in nats.
"""

# N answers (real tokens or sequences), V vocabulary, classes or width

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from compresskit.data import Batch
from compresskit.models import AnswerKind


def read_answer(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The answers (N, V) at real tokens, or (N, V) for a batch of N where the head answers for whole sequences."""
    output = model(**batch)[0]
    return output[batch["attention_mask"].bool()] if output.dim() == 3 else output


def divergence(reference: Tensor, answer: Tensor, *, kind: AnswerKind) -> float:
    """The mean over answers of KL(reference ‖ answer), both (N, V).

    Hidden states and scores have the variance of the reference's elements: V ‖a − b‖² / 2 ‖b‖², with the norms over
    all answers. Labels are independent: the sum of their divergences.
    """
    if kind == "classes":
        log_p, log_q = reference.log_softmax(-1), answer.log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum(-1).double().mean())
    if kind == "labels":
        yes = reference.sigmoid() * (F.logsigmoid(reference) - F.logsigmoid(answer))
        no = (-reference).sigmoid() * (F.logsigmoid(-reference) - F.logsigmoid(-answer))
        return float((yes + no).sum(-1).double().mean())
    gap = float((reference - answer).double().square().sum(-1).mean())
    return gap / (2 * _variance(reference))


def sampled_gradient(answer: Tensor, generator: torch.Generator, *, kind: AnswerKind) -> Tensor:
    """∂ log p(label) / ∂ answer, (N, V), for labels drawn from the answers themselves: E[g gᵀ] is their information.

    A label of a hidden state is the state with noise of its variance added.
    """
    if kind in ("states", "scores"):
        return torch.randn(answer.shape, generator=generator, dtype=answer.dtype) / _variance(answer) ** 0.5
    if kind == "labels":
        p = answer.sigmoid()
        return (torch.rand(p.shape, generator=generator, dtype=p.dtype) < p).to(p.dtype) - p
    p = answer.softmax(-1)
    drawn = torch.rand(len(p), 1, generator=generator, dtype=p.dtype)
    labels = torch.searchsorted(p.cumsum(-1), drawn).clamp_max(p.shape[-1] - 1)
    return p.neg_().scatter_add_(-1, labels, torch.ones_like(drawn))


def _variance(answer: Tensor) -> float:
    """The mean square of an answer's elements."""
    return max(float(answer.double().square().mean()), torch.finfo(torch.float32).tiny)
