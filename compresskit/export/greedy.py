"""Does the file pick the tokens that the student's own `generate` picks, step by step with its cache?

Two prompts of different lengths, padded on the left, as `generate` wants them. The file reads the tokens that the
student picked, so that one difference does not make all later ones.
"""

from typing import Any, cast

import numpy as np
import onnxruntime as ort
import torch
from transformers import GenerationConfig, PreTrainedModel

from compresskit.data import token_positions
from compresskit.errors import RunFailedError
from compresskit.export.parity import Difference
from compresskit.export.steps import Steps
from compresskit.progress import working

#: Tokens that are compared.
TOKENS = 64
_PROMPTS = (12, 7)


def prompts_of(rows: list[list[int]], texts: int | None = None) -> list[list[int]]:
    """The beginnings of the first texts, of different lengths: two, or as many as a file takes."""
    count = texts or min(len(_PROMPTS), len(rows))
    return [rows[index % len(rows)][: _PROMPTS[index % len(_PROMPTS)]] for index in range(count)]


def check_greedy(session: ort.InferenceSession, model: PreTrainedModel, prompts: list[list[int]]) -> dict[str, Any]:
    """What the report says about generation; judges nothing.

    Args:
        session: of the file.
        model: the student in torch.
        prompts: one or more, of one token or more.

    Returns:
        `tokens` compared (64 a prompt, or what the model can place), how many are `equal`, the largest share of the
        step's largest logit by which the student prefers its own token to the file's (`regret`, 0 where all are
        equal), and the `relative_error` of all logits.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    count = min(TOKENS, (token_positions(model) or longest + TOKENS) - longest)
    config = GenerationConfig(
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with working("generating with the student"):
        said: Any = cast(Any, model).generate(input_ids=ids, attention_mask=mask, generation_config=config)
    tokens = said.sequences.numpy()[:, longest:]
    steps, new = Steps(session, len(prompts)), ids.numpy()
    difference, equal, regret, seen = Difference(), 0, 0.0, mask.numpy()
    for index, logits in enumerate(said.logits):
        truth, got = logits.numpy(), steps.read(new, seen)
        difference.add(got, truth)
        picked = got.argmax(1)
        equal += int((picked == truth.argmax(1)).sum())
        lost = truth.max(1) - np.take_along_axis(truth, picked[:, None], 1)[:, 0]
        regret = max(regret, float((lost / np.abs(truth).max(1)).max()))
        new = tokens[:, index : index + 1]
        seen = np.concatenate([seen, np.ones_like(new)], axis=1)
    return {
        "tokens": count * len(prompts),
        "equal": equal,
        "regret": regret,
        "relative_error": difference.relative,
    }


def judge_greedy(found: dict[str, Any], *, bound: float, where: str) -> None:
    """Accept what `check_greedy` found of a student that rounds no activations, or refuse the file.

    Tokens that the student finds equally likely, to within the bound, may be exchanged.

    Raises:
        RunFailedError: another token, or logits past the bound.
    """
    if found["relative_error"] <= bound and found["regret"] <= bound:
        return
    raise RunFailedError(
        f"token by token, ONNX Runtime picks {found['equal']} of {found['tokens']} tokens as the student does; their "
        f"logits differ by {found['relative_error']:.3g} (relative); the bound is {bound:g}",
        where=where,
        fix="try 'fuse: false', or 'cache: false'; max_relative_error moves the bound",
    )
