"""The folder that is shipped, told to people and programs: README.md with lines that run, manifest.json with proof.

manifest.json   inputs, outputs, operators, opset, integer layers, parity, versions; size and sha256 of each file
README.md       how to run it with onnxruntime, tokenizers and numpy alone
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from tokenizers import Tokenizer
from torch import nn

from compresskit.environment import exporting_versions
from compresskit.errors import CompressKitError
from compresskit.export.files import count_operators
from compresskit.export.sizes import FREE, Sizes
from compresskit.export.steps import keeps_past
from compresskit.whole import difference, list_files, write_whole

MODEL_FILE, MANIFEST_FILE, README_FILE, TOKENIZER_FILE = "model.onnx", "manifest.json", "README.md", "tokenizer.json"
#: Raised by one whenever a reader of the last form could misread a manifest.
FORMAT = 1

_ANEW = "export it again, or fetch the whole folder again"


def integer_layers(model: nn.Module) -> dict[str, int]:
    """Bits of the codes of each layer that holds integers, by its name."""
    return {
        name: int(getattr(module, "bits", 8))
        for name, module in model.named_modules()
        if dict(module.named_buffers(recurse=False)).get("codes") is not None
    }


def _signature(values: Sequence[ir.Value]) -> dict[str, dict[str, Any]]:
    return {
        str(value.name): {
            "dtype": value.dtype.name.lower() if value.dtype is not None else None,
            "shape": [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ()],
        }
        for value in values
    }


def describe_graph(graph: ir.Model) -> dict[str, Any]:
    """What the manifest says about the graph itself."""
    return {
        "inputs": _signature(graph.graph.inputs),
        "outputs": _signature(graph.graph.outputs),
        "operators": count_operators(graph),
        "opset": dict(graph.opset_imports),
    }


def is_exported(folder: Path) -> bool:
    """Whether an exporter wrote this folder."""
    return (folder / MANIFEST_FILE).is_file()


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `manifest.json` about all files that are there.

    Args:
        folder: whole but for the manifest.
        facts: JSON data: the task, what `describe_graph` says, integer layers, parity.
    """
    manifest = {"format": FORMAT, **facts, "versions": exporting_versions(), "files": list_files(folder)}
    write_whole(folder / MANIFEST_FILE, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())


def read_exported(folder: Path) -> dict[str, Any]:
    """The manifest of an exported folder, every file of which is what was written.

    Raises:
        CompressKitError: no export there, or one that was changed since.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        form, files = manifest["format"], manifest["files"]
    except FileNotFoundError as error:
        fix = "name the onnx folder of a run's output; older exports have to be made again"
        raise CompressKitError(f"no {MANIFEST_FILE}: this is no exported folder", where=str(folder), fix=fix) from error
    except (KeyError, TypeError) as error:
        raise CompressKitError("is not what an export writes", where=str(path), fix=_ANEW) from error
    except (OSError, ValueError) as error:
        raise CompressKitError(f"cannot be read: {error!r}", where=str(path), fix=_ANEW) from error
    if form != FORMAT:
        raise CompressKitError(
            f"is of format {form}; this compresskit reads {FORMAT}", where=str(path), fix="export the student again"
        )
    wrong = difference(folder, files, besides=MANIFEST_FILE)
    if wrong:
        raise CompressKitError(wrong, where=str(folder), fix=_ANEW)
    return manifest


def load_exported_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, without transformers.

    Raises:
        CompressKitError: none there.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        fix = "it needs a fast tokenizer: save one beside the original's config.json and export again"
        raise CompressKitError(f"no {TOKENIZER_FILE}", where=str(folder), fix=fix)
    return Tokenizer.from_file(str(path))


_IMPORTS = """\
import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
session = ort.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
"""
_BATCH = """\
tokenizer.enable_padding(pad_id={pad_id}, pad_token={pad_token!r}{to_length})
tokenizer.enable_truncation({length})
texts = tokenizer.encode_batch(["A small model.", "A model that is small and fast."])
given = {{"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}}
"""
_FEED = """\
feed = {i.name: np.array([getattr(t, given[i.name]) for t in texts]) for i in session.get_inputs()}
"""
_FEEDS = """\
groups = [(texts[i : i + {0}] * {0})[:{0}] for i in range(0, len(texts), {0})]  # the last one filled up
names = [i.name for i in session.get_inputs()]
feeds = [{{name: np.array([getattr(t, given[name]) for t in group]) for name in names}} for group in groups]
"""
_EMBEDDING = """\
embeddings = {sentence_embedding}
print(embeddings @ embeddings.T)
"""
_STATES = """\
hidden, mask = {last_hidden_state}, np.array([t.attention_mask for t in texts])[:, :, None]
embeddings = (hidden * mask).sum(1) / mask.sum(1)
print(embeddings @ embeddings.T)
"""
_LABELS = """\
logits = {logits}
names = json.load(open("config.json"))["id2label"]
print([names[str(i)] for i in logits.argmax(-1).flat])
"""
_CACHED = """\
ids, read = tokenizer.encode("A small model").ids, 0
shapes = {{i.name: i.shape for i in session.get_inputs()}}
past = {{n: np.zeros(({texts}, s[1], 0, s[3]), np.float32) for n, s in shapes.items() if n.startswith("past")}}
names = [output.name for output in session.get_outputs()]
for _ in range(20):
    feed = {{"input_ids": [ids[read:]], "attention_mask": [[1] * len(ids)], "position_ids": [range(read, len(ids))]}}
    feed = {{n: np.array({values}, np.int64) for n, v in feed.items() if n in shapes}} | past
    out = dict(zip(names, session.run(names, feed)))
    past, read = {{n: out[n.replace("past_key_values", "present")] for n in past}}, len(ids)
    ids.append(int(out["logits"][0, -1].argmax()))
print(tokenizer.decode(ids))
"""
_WHOLE = """\
ids = tokenizer.encode("A small model").ids
for _ in range({rounds}):
    {left}feed = {{"input_ids": np.array([{ids}]{times}), "attention_mask": np.array([{mask}]{times})}}
    ids.append(int(session.run(["logits"], feed)[0][0, len(ids) - 1].argmax()))
print(tokenizer.decode(ids))
"""


def example(task: str, inputs: list[str], outputs: list[str], padding: Mapping[str, Any], sizes: Sizes = FREE) -> str:
    """Python that runs a file which reads texts, in its folder, with onnxruntime, tokenizers and numpy.

    Args:
        task: a key of `compresskit.models.TASKS`.
        inputs, outputs: names in the graph.
        padding: `pad_id`, `pad_token`, and `length`, the longest text.
        sizes: what the file takes at once.
    """
    if task == "text-generation":
        return _IMPORTS + (_cached_example(sizes) if keeps_past(inputs) else _whole_example(sizes))
    batch = _BATCH.format(**padding, to_length="" if sizes.length is None else f", length={sizes.length}")
    batch += _FEED if sizes.batch is None else _FEEDS.format(sizes.batch)
    form = 'session.run(["{}"], feed)[0]'
    if sizes.batch is not None:
        form = f"np.concatenate([{form} for feed in feeds])[: len(texts)]"
    answers = {name: form.format(name) for name in outputs}
    if task != "feature-extraction":
        return "import json\n\n" + _IMPORTS + batch + _LABELS.format(**answers)
    return _IMPORTS + batch + (_EMBEDDING if "sentence_embedding" in outputs else _STATES).format(**answers)


def _cached_example(sizes: Sizes) -> str:
    texts = sizes.batch or 1
    return _CACHED.format(texts=texts, values="v" if texts == 1 else f"list(v) * {texts}")


def _whole_example(sizes: Sizes) -> str:
    times = "" if sizes.batch in (None, 1) else f" * {sizes.batch}"
    if sizes.length is None:
        return _WHOLE.format(rounds=20, left="", ids="ids", mask="[1] * len(ids)", times=times)
    rounds, left = f"min(20, {sizes.length} - len(ids))", f"left = {sizes.length} - len(ids)\n    "
    ids, mask = "ids + [0] * left", "[1] * len(ids) + [0] * left"
    return _WHOLE.format(rounds=rounds, left=left, ids=ids, mask=mask, times=times)


def write_readme(folder: Path, task: str, code: str | None) -> None:
    """Write `README.md`; `code` where a text can be read with the tokenizer that is there."""
    text = f"# A student of compresskit, for ONNX Runtime\n\nTask: {task}. `manifest.json` says inputs, outputs, proof "
    text += "and the sha256 of every file.\n"
    if code is not None and (folder / TOKENIZER_FILE).is_file():
        text += f"\nIn this folder, with `pip install onnxruntime tokenizers numpy`:\n\n```python\n{code}```\n"
    (folder / README_FILE).write_text(text, encoding="utf-8")
