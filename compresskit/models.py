"""Where a model comes from: a folder, a hub id, `package:NAME/SUBFOLDER`, or a folder with a GGUF file.

Everything ends as a local folder of safetensors, config and tokenizer, loaded in float32. Pickled weights and models
that bring their own code are refused.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.quantization_config import GgufConfig

from compresskit.config import did_you_mean
from compresskit.errors import CompressKitError

TASKS: dict[str, Any] = {
    "feature-extraction": AutoModel,
    "text-generation": AutoModelForCausalLM,
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "image-classification": AutoModelForImageClassification,
}
#: What transformers raises over files that are damaged, contradict themselves or want code of their own.
_LOADER_ERRORS = (
    SafetensorError,
    StrictDataclassError,
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    ImportError,
    RuntimeError,
)
_MAX_SAID = 300
#: `quant_method` of a student that only our plug-in can rebuild
STUDENT_METHOD = "compresskit"
_TOKENIZER_FIX = "put the tokenizer's files beside config.json: tokenizer.save_pretrained(folder)"
_HASHED = ("*.safetensors", "*.json", "vocab.txt", "merges.txt", "*.model", "*.gguf")


@dataclass(frozen=True)
class ModelSource:
    """A model on this disk.

    Attributes:
        name: what the user wrote.
        folder: where its files lie.
        gguf_file: the file inside `folder` that holds the weights, where they are not safetensors.
    """

    name: str
    folder: Path
    gguf_file: str | None = None

    def fingerprint(self) -> str:
        """sha256 over the names and contents of weights, config and tokenizer files."""
        digest = hashlib.sha256()
        for path in sorted({p for pattern in _HASHED for p in self.folder.glob(pattern)}):
            digest.update(path.name.encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def cache_folder() -> Path:
    """Where converted models and tokenised texts are kept: `$COMPRESSKIT_CACHE`, else `~/.cache/compresskit`."""
    return Path(os.environ.get("COMPRESSKIT_CACHE") or Path.home() / ".cache" / "compresskit")


def find_model(name: str | Path, *, gguf_file: str | None = None) -> ModelSource:
    """The local folder behind `name`; hub ids are fetched (safetensors and text files only).

    Raises:
        CompressKitError: nothing there, pickled weights only, or a model that needs its own code.
    """
    text = str(name)
    if text.startswith("package:"):
        folder = _package_folder(text.removeprefix("package:"))
    elif Path(text).expanduser().is_dir():
        folder = Path(text).expanduser().resolve()
    else:
        folder = _hub_folder(text)
    source = ModelSource(text, folder, gguf_file or _only_gguf(folder))
    _refuse_unsafe(source)
    return source


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
        parent = Path(text).expanduser().parent
        near = did_you_mean(Path(text).name, (p.name for p in parent.iterdir())) if parent.is_dir() else None
        raise CompressKitError(
            f"no folder {text!r}", where="model", fix=f"did you mean '{parent / near}'?" if near else fix
        )
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "tokenizer*"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        what = f"{text!r} is no folder here, and the hub did not give it ({type(error).__name__})"
        raise CompressKitError(what, where="model", fix=fix) from error


def _only_gguf(folder: Path) -> str | None:
    files = sorted(folder.glob("*.gguf"))
    return files[0].name if len(files) == 1 and not (folder / "config.json").is_file() else None


def _refuse_unsafe(source: ModelSource) -> None:
    folder = source.folder
    if source.gguf_file:
        path = (folder / source.gguf_file).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise CompressKitError(f"{source.gguf_file!r} leaves {folder}", where="gguf_file", fix="name a file in it")
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


def _quant_method(said: Any) -> str | None:
    """The method of a `quantization_config`, in its JSON form or transformers'; None where there is none."""
    if said is None:
        return None
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    return str(getattr(method, "value", method))


def _refuse_quantized(config: dict[str, Any], folder: Path) -> None:
    """Refuse weights that are integers already, our own students' apart."""
    for said in [one for one in (config, config.get("text_config")) if isinstance(one, dict)]:
        for key in ("quantization_config", "compression_config"):
            method = _quant_method(said.get(key))
            if method not in (None, STUDENT_METHOD):
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


def _task_class(task: str, config: PretrainedConfig) -> Any:
    """The auto class of a task, where transformers itself carries the model's architecture for it.

    Asked before any auto class is: for an architecture that lacks the task they reach for the folder's own code.
    """
    if task not in TASKS:
        near = did_you_mean(task, TASKS)
        raise CompressKitError(f"unknown task {task!r}", where="task", fix=f"use {near or ', '.join(TASKS)}")
    able = [name for name, auto in TASKS.items() if type(config) in auto._model_mapping]
    if task not in able:
        what = f"transformers has no {config.model_type} model for {task!r}"
        if getattr(config, "auto_map", None):
            what += "; the folder has code of its own for it, which is never run"
        raise CompressKitError(what, where="task", fix=f"use {', '.join(able) or 'another model'}")
    if task == "text-classification" and config.get_text_config().pad_token_id is None:
        what = f"{task} finds the last word of a padded text by pad_token_id, and config.json has none"
        raise CompressKitError(
            what, where="model", fix='add to config.json "pad_token_id": the id of the padding token'
        )
    return TASKS[task]


@contextmanager
def explained(source: ModelSource, what: str, fix: str) -> Iterator[None]:
    """Say which model could not be read, and what to do, where transformers only says what it stumbled over."""
    try:
        yield
    except _LOADER_ERRORS as error:
        said = " ".join(str(error).split())
        said = said if len(said) <= _MAX_SAID else said[:_MAX_SAID] + "…"
        raise CompressKitError(
            f"{what} cannot be read ({type(error).__name__}: {said})", where=source.name, fix=fix
        ) from error


_TASK_OF_SUFFIX = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "Model": "feature-extraction",
}


def guess_task(source: ModelSource) -> str:
    """The task of the class that the model's config.json names under `architectures`.

    Raises:
        CompressKitError: it names none, or one of a task that is not known here.
    """
    said: Any = load_config(source).architectures
    names = [name for name in said if isinstance(name, str)] if isinstance(said, list) else []
    for suffix, task in _TASK_OF_SUFFIX.items():
        if names and names[0].endswith(suffix):
            return task
    said = f"its config.json names {names[0]}" if names else "its config.json names no architecture"
    raise CompressKitError(
        f"what the model does is not clear: {said}", where="task", fix=f"say one of {', '.join(TASKS)}"
    )


def safetensors_source(source: ModelSource) -> ModelSource:
    """`source` itself, or the cached safetensors copy of a GGUF file (converted once, dequantised to float32)."""
    if not source.gguf_file:
        return source
    if importlib.util.find_spec("gguf") is None:
        raise CompressKitError("reading GGUF needs the package gguf", where="model", fix="pip install gguf")
    target = cache_folder() / "converted" / source.fingerprint()[:16]
    if not (target / "config.json").is_file():
        said: dict[str, Any] = {"gguf_file": source.gguf_file, "trust_remote_code": False}
        with explained(source, source.gguf_file, "use a GGUF file of an architecture that transformers converts"):
            model = AutoModelForCausalLM.from_pretrained(
                source.folder, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **said
            )
            tokenizer = AutoTokenizer.from_pretrained(source.folder, **said)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent))
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(target)
        except OSError:  # another process was first
            shutil.rmtree(scratch)
    return ModelSource(source.name, target)


def load_config(source: ModelSource) -> PretrainedConfig:
    """The configuration of a model, without reading a weight (GGUF: after its one conversion).

    Raises:
        CompressKitError: one that transformers cannot read.
    """
    folder = safetensors_source(source).folder
    with explained(source, "config.json", "restore the model's own config.json"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_empty(source: ModelSource, task: str) -> PreTrainedModel:
    """The architecture on the meta device, for planning passes on it: shapes only.

    Raises:
        CompressKitError: a task that the architecture lacks, a config that describes no model, or a student whose
            shapes only its edits say (passes cannot go on from those).
    """
    config = load_config(source)
    if _quant_method(getattr(config, "quantization_config", None)) == STUDENT_METHOD:
        raise CompressKitError(
            f"{source.name} is a student that compresskit made, and passes cannot start from its edited layers",
            where="model",
            fix="compress its original, with all passes in one recipe",
        )
    auto = _task_class(task, config)
    with explained(source, "config.json", "restore the model's own config.json"), torch.device("meta"):
        return auto.from_config(config, trust_remote_code=False).eval()


def load_model(source: ModelSource, task: str) -> PreTrainedModel:
    """The model in float32 on the CPU, in eval mode.

    Raises:
        CompressKitError: a task that the architecture lacks, files that are damaged or disagree, or weights that lack
            what the task needs (a head that would be random).
    """
    auto = _task_class(task, load_config(source))
    folder = safetensors_source(source).folder
    with explained(source, "the model", "fetch or save it anew: config.json and *.safetensors of one model"):
        model, info = auto.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            trust_remote_code=False,
        )
    if info["mismatched_keys"]:
        name, stored, wanted = min(info["mismatched_keys"])
        raise CompressKitError(
            f"{source.name}: {name} is stored as {tuple(stored)}, and config.json says {tuple(wanted)}",
            where="model",
            fix="use the config.json that was saved with these weights",
        )
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise CompressKitError(
            f"{source.name} has no weights for {names}", where="model", fix=f"task {task!r} may be the wrong one"
        )
    return model.eval()


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer; one without a padding token pads with its end-of-text token.

    Raises:
        CompressKitError: tokenizer files that are absent, damaged or want code of their own.
    """
    folder = safetensors_source(source).folder
    with explained(source, "the tokenizer", _TOKENIZER_FIX):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        known = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if not known:
        # Without its files transformers makes one that knows nothing, for some architectures.
        raise CompressKitError(f"{source.name} has no tokenizer files", where="model", fix=_TOKENIZER_FIX)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            what = f"the tokenizer of {source.name} has neither a padding nor an end-of-text token"
            raise CompressKitError(what, where="model", fix="add a pad_token to its tokenizer_config.json")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
