"""A decoder's file run token by token in ONNX Runtime, with numpy alone."""

from collections.abc import Iterable, Iterator

import numpy as np
import onnxruntime as ort

PAST, PRESENT = "past_key_values", "present"


def positions(mask: np.ndarray, new: int) -> np.ndarray:
    """Places of the last `new` tokens of (batch, total), counting real tokens from 0; int64, (batch, new)."""
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, mask.shape[1] - new :]


def keeps_past(inputs: Iterable[str]) -> bool:
    """Whether a file with inputs of these names takes the keys and values of earlier tokens."""
    return any(name.startswith(PAST) for name in inputs)


class Steps:
    """One generation: what was read so far is kept between calls.

    Args:
        session: of a file with `past_key_values.N.key` and `.value` among its inputs.
        texts: rows of every step.
    """

    def __init__(self, session: ort.InferenceSession, texts: int = 1) -> None:
        self._session = session
        self._names = [value.name for value in session.get_outputs()]
        self._inputs = {value.name: value.shape for value in session.get_inputs()}
        self._past = {
            name: np.zeros((texts, shape[1], 0, shape[3]), np.float32)
            for name, shape in self._inputs.items()
            if name.startswith(PAST)
        }

    def read(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Logits after the last of some new tokens, (texts, vocabulary).

        Args:
            ids: int64, (texts, new).
            mask: int64, (texts, all tokens so far with the new ones); 0 at padding.
        """
        feed = self._past | {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in self._inputs:
            feed["position_ids"] = positions(mask, ids.shape[1])
        found = dict(zip(self._names, self._session.run(self._names, feed), strict=True))
        self._past = {name: np.asarray(found[name.replace(PAST, PRESENT, 1)]) for name in self._past}
        return np.asarray(found["logits"])[:, -1]


def greedy_tokens(session: ort.InferenceSession, prompt: list[int]) -> Iterator[int]:
    """The likeliest token after a prompt, then the one after that, without end."""
    steps, total = Steps(session), len(prompt)
    ids = np.array([prompt], np.int64)
    while True:
        token = int(steps.read(ids, np.ones((1, total), np.int64))[0].argmax())
        yield token
        ids, total = np.array([[token]], np.int64), total + 1
