"""The folder behind a model's name, and whether what lies there may be loaded.

Pickled weights and models that bring their own code are refused.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compresskit.config import did_you_mean
from compresskit.errors import CompressKitError

#: `quant_method` of a student that only our plug-in can rebuild
STUDENT_METHOD = "compresskit"
#: that of a student which bitsandbytes' own layers hold; the record of edits tells it from other people's
BITSANDBYTES_METHOD = "bitsandbytes"
EDITS_RECORD = "compresskit_edits"
_MAX_SAID = 300


def find_folder(name: str) -> Path:
    """The local folder of a folder's path, `package:NAME/SUBFOLDER` or a hub id (fetched: safetensors and text only).

    Raises:
        CompressKitError: nothing there.
    """
    if name.startswith("package:"):
        return _package_folder(name.removeprefix("package:"))
    path = os.path.expanduser(name)
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        return Path(path).resolve()
    return _hub_folder(name)


def _package_folder(text: str) -> Path:
    package, _, subfolder = text.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CompressKitError(
            f"no installed Python package {package!r}", where="model", fix=f"pip install {package.replace('_', '-')}"
        )
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    folder = (root / subfolder).resolve()
    if not folder.is_relative_to(root):
        raise CompressKitError(
            f"'package:{text}' leaves the package's folder", where="model", fix="name a folder inside the package"
        )
    if not folder.is_dir():
        inside = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("__"))
        raise CompressKitError(
            f"package {package!r} has no folder {subfolder!r}", where="model", fix=f"it has: {', '.join(inside)}"
        )
    return folder


def _hub_folder(text: str) -> Path:
    fix = "give an existing folder, 'package:NAME/SUBFOLDER', or a hub id such as 'owner/name'"
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        parent = Path(os.path.expanduser(text)).parent
        near = did_you_mean(Path(text).name, (p.name for p in parent.iterdir())) if os.path.isdir(parent) else None
        raise CompressKitError(
            f"no folder {shortened(text)!r}", where="model", fix=f"did you mean '{parent / near}'?" if near else fix
        )
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "tokenizer*"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        what = f"{shortened(text)!r} is no folder here, and the hub did not give it ({type(error).__name__})"
        raise CompressKitError(what, where="model", fix=fix) from error


def shortened(text: str) -> str:
    """Others' words, cut where they would fill the screen."""
    return text if len(text) <= _MAX_SAID else text[:_MAX_SAID] + "…"


def only_gguf(folder: Path) -> str | None:
    """The one GGUF file of a folder that has no config.json."""
    files = sorted(folder.glob("*.gguf"))
    return files[0].name if len(files) == 1 and not (folder / "config.json").is_file() else None


def refuse_unsafe(folder: Path, gguf_file: str | None) -> None:
    """Refuse a folder without a model, or with one that may not or cannot be loaded.

    Raises:
        CompressKitError: no such GGUF file or one outside, no config.json or safetensors, pickled weights only, an
            architecture that needs its own code, or weights that are integers already.
    """
    if gguf_file:
        path = (folder / gguf_file).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise CompressKitError(f"{gguf_file!r} leaves {folder}", where="gguf_file", fix="name a file in it")
        if not path.is_file():
            files = ", ".join(p.name for p in folder.glob("*.gguf")) or "none"
            raise CompressKitError(f"no file {path}", where="gguf_file", fix=f"GGUF files there: {files}")
        return
    if not (folder / "config.json").is_file():
        raise CompressKitError(f"{folder} has no config.json", where="model", fix="name the folder that holds it")
    if not any(folder.glob("*.safetensors")):
        pickled = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for p in folder.glob(pattern)]
        what = f"pickled weights ({pickled[0]}) can run code when loaded" if pickled else "no *.safetensors"
        raise CompressKitError(
            f"{folder}: {what}", where="model", fix="save the model with safetensors: model.save_pretrained(folder)"
        )
    config = _config_json(folder)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        what = f"model_type {kind!r} is not built into transformers"
        if config.get("auto_map"):
            what += "; the folder wants trust_remote_code, and code from a model folder is never run"
        raise CompressKitError(what, where=str(folder), fix="use an architecture that transformers carries")
    _refuse_quantized(config, folder)


def quant_method(said: Any) -> str | None:
    """The method of a `quantization_config`, in its JSON form or transformers'; None where there is none."""
    if said is None:
        return None
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    return str(getattr(method, "value", method))


def _refuse_quantized(config: dict[str, Any], folder: Path) -> None:
    """Refuse weights that are integers already, our own students' apart."""
    for said in [one for one in (config, config.get("text_config")) if isinstance(one, dict)]:
        for key in ("quantization_config", "compression_config"):
            method = quant_method(said.get(key))
            own = method == BITSANDBYTES_METHOD and EDITS_RECORD in config
            if method not in (None, STUDENT_METHOD) and not own:
                what = f"its weights are quantised already ({key} of method {method!r})"
                raise CompressKitError(what, where=str(folder), fix="use the float model that it was made from")


def _config_json(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not text
        raise CompressKitError(f"config.json is not JSON: {error}", where=str(folder), fix="restore it") from error
    if not isinstance(config, dict):
        what = f"config.json holds a {type(config).__name__}, not a mapping"
        raise CompressKitError(what, where=str(folder), fix="restore it")
    return config
