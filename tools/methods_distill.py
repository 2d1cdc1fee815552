"""What `bench_distill.py` compares: losses and ways to train, for equal steps and tokens.

A method is a row of `distill` passes, each with its share of the steps. `none` is the student before, `default` is
what `distill` does by itself: in decoders forward KL with a little cross-entropy, and the head rests, in encoders
`hidden-cosine`; `kl-alone` is the first without labels. In the controls everything learns: `cross-entropy` learns the
text and never asks the original, `kl` is plain forward KL; `kl-slow`, `hidden-slow` (`hidden-mse`) and
`hidden-cosine-half` train at lower rates.
`sampled` replaces half of the training windows by text that the original wrote (it continues their first tokens),
`cached` keeps what the original says on the disk (making it is in the seconds, not in tokens/s), `fading` lets the
hidden loss beside kl end at 0, `hidden-then-kl` gives the first third of the steps to hidden states, `blocks-first`
to blocks that learn alone, before the default.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compresskit.data import Sequences
from compresskit.passes.distill import Distill
from compresskit.passes.distill_options import LABELS

#: Below the default rate, of decoders and of encoders.
SLOW, SLOW_ENCODER = {"learning_rate": 1e-4}, {"learning_rate": 3e-5}
#: Tokens of a window that the original continues.
_PROMPT = 16
_KL = {"kind": "kl"}
_DEFAULT = {"kind": "kl", "alpha": LABELS}


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        passes: share of the steps, and options of `distill`; shares sum to 1.
        sampled: whether half of the training windows are written by the original.
        blocks: share of each pass's steps in which blocks learn alone.
    """

    passes: tuple[tuple[float, dict[str, Any]], ...]
    sampled: bool = False
    blocks: float = 0.0

    def distills(self, steps: int, shared: dict[str, Any]) -> list[Distill]:
        """The passes for so many optimiser steps, with `shared` options where the method says none."""
        counts = [round(share * steps) for share, _ in self.passes[:-1]]
        counts += [steps - sum(counts)] if self.passes else []
        looks = {"held_out": 16, "checkpoint_minutes": None}
        return [
            Distill.model_validate(
                {
                    **looks,
                    "held_out_every": max(1, count // 5),
                    "block_steps": int(self.blocks * count),
                    **shared,
                    **said,
                    "steps": count,
                }
            )
            for count, (_, said) in zip(counts, self.passes, strict=True)
        ]


def _with(*losses: dict[str, Any], **options: Any) -> Method:
    return Method(((1.0, {"losses": list(losses), **options}),))


def _hidden(measure: str, **options: Any) -> dict[str, Any]:
    return {"kind": "hidden", "measure": measure, **options}


_BOTH: dict[str, Method] = {
    "none": Method(()),
    "default": Method(((1.0, {}),)),
    "blocks-first": Method(((1.0, {}),), blocks=1 / 3),
    **{f"hidden-{measure}": _with(_hidden(measure)) for measure in ("mse", "cosine", "normalised")},
    "relation": _with({"kind": "relation"}),
    "attention": _with({"kind": "attention"}),
    "embedding": _with({"kind": "embedding"}),
    "contrastive": _with({"kind": "contrastive"}),
}
DECODER: dict[str, Method] = _BOTH | {
    "cross-entropy": _with({"kind": "kl", "alpha": 1.0}, freeze=()),
    "kl": _with(_KL, freeze=()),
    "kl-slow": _with(_KL, freeze=(), **SLOW),
    "kl-alone": _with(_KL),
    **{
        f"kl-{kind}": _with({"kind": "kl", "divergence": kind})
        for kind in ("reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation")
    },
    "kl-tau-2": _with({"kind": "kl", "temperature": 2.0}),
    "kl-tenth-labels": _with({"kind": "kl", "alpha": 0.1}),
    "kl-half-labels": _with({"kind": "kl", "alpha": 0.5}),
    "kl-tsld": _with(_KL, token_weight="tsld"),
    "kl-entropy": _with(_KL, token_weight="entropy"),
    **{f"kl+hidden-{measure}": _with(_KL, _hidden(measure)) for measure in ("mse", "cosine", "normalised")},
    "default+hidden-cosine": _with(_DEFAULT, _hidden("cosine")),
    "default+relation": _with(_DEFAULT, {"kind": "relation"}),
    "kl+hidden-fading": _with(_KL, _hidden("mse", weight_end=0.0)),
    "kl+relation": _with(_KL, {"kind": "relation"}),
    "kl+attention": _with(_KL, {"kind": "attention"}),
    "hidden-then-kl": Method(((1 / 3, {"losses": [_hidden("mse")]}), (2 / 3, {"losses": [_KL]}))),
    "kl-cached": _with(_KL, cache={}),
    "kl-cached-top-64": _with(_KL, cache={"keep": "top_k"}),
    "kl-sampled": Method(((1.0, {"losses": [_KL]}),), sampled=True),
}
ENCODER: dict[str, Method] = _BOTH | {
    "embedding-mse": _with({"kind": "embedding", "cosine": 0.0, "similarity": 0.0, "mse": 1.0}),
    "embedding-cosine": _with({"kind": "embedding", "similarity": 0.0}),
    "hidden+embedding": _with(_hidden("mse"), {"kind": "embedding"}),
    "hidden+relation": _with(_hidden("mse"), {"kind": "relation"}),
    "contrastive+embedding": _with({"kind": "contrastive"}, {"kind": "embedding"}),
    "hidden-slow": _with(_hidden("mse"), **SLOW_ENCODER),
    "hidden-cosine-half": _with(_hidden("cosine"), learning_rate=5e-5),
    "hidden-cosine+attention": _with(_hidden("cosine"), {"kind": "attention"}),
    "hidden-cosine+relation": _with(_hidden("cosine"), {"kind": "relation"}),
}
QUICK = ("none", "cross-entropy", "default", "hidden-then-kl", "hidden+embedding")


def methods_of(task: str) -> dict[str, Method]:
    """The methods for models of a task."""
    return DECODER if task == "text-generation" else ENCODER


def gap_closed(before: float, after: float, original: float) -> float:
    """The share of the gap in log-perplexity to the original that recovery closed: 1 is all of it, 0 none.

    More than 1 is possible: perplexity rewards learning the text, which the original never did.
    """
    gap = math.log(before) - math.log(original)
    return (math.log(before) - math.log(after)) / gap if gap else 0.0


@torch.no_grad()
def sampled_text(original: PreTrainedModel, training: Sequences, *, seed: int, batch_size: int = 32) -> Sequences:
    """`training` with every second window continued by the original, at temperature 1, from its first 16 tokens.

    Cost: one generated token for each that is replaced.
    """
    rows = list(training.rows)
    chosen = [i for i in range(0, len(rows), 2) if len(rows[i]) > _PROMPT]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for first in range(0, len(chosen), batch_size):
            part = chosen[first : first + batch_size]
            length = min(len(rows[i]) for i in part)
            prompts = torch.tensor([rows[i][:_PROMPT] for i in part])
            written = original.generate(  # type: ignore[operator]
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                max_new_tokens=length - _PROMPT,
                min_new_tokens=length - _PROMPT,
                pad_token_id=training.pad_token_id,
            )
            for i, row in zip(part, written.tolist(), strict=True):
                rows[i] = row
    return Sequences(rows, training.pad_token_id)
