"""Where a model comes from: a folder, a hub id, `package:NAME/SUBFOLDER`, or a folder with a GGUF file.

Everything ends as a local folder of safetensors, config and tokenizer, loaded in float32. Pickled weights and models
that bring their own code are refused.
"""

import hashlib
import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.quantization_config import GgufConfig

from compresskit.cache import cache_folder, writing_to_cache
from compresskit.config import did_you_mean
from compresskit.errors import CompressKitError
from compresskit.float_types import FloatTypes, note_float_types, read_float_types
from compresskit.model_folder import (
    BITSANDBYTES_METHOD,
    STUDENT_METHOD,
    find_folder,
    only_gguf,
    quant_method,
    refuse_unsafe,
    shortened,
)
from compresskit.whole import whole_folder

TASKS: dict[str, Any] = {
    "feature-extraction": AutoModel,
    "text-generation": AutoModelForCausalLM,
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "image-classification": AutoModelForImageClassification,
}
AnswerKind = Literal["states", "classes", "labels", "scores"]
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
_WEIGHTS_FIX = "fetch or save it anew: config.json and *.safetensors of one model"
_TOKENIZER_FIX = "put the tokenizer's files beside config.json: tokenizer.save_pretrained(folder)"
_HASHED = ("*.json", "*/config.json", "vocab.txt", "merges.txt", "*.model")


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

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the names and contents of the weights that are used, config and tokenizer files; read once."""
        digest = hashlib.sha256()
        weights = [self.folder / self.gguf_file] if self.gguf_file else self.folder.glob("*.safetensors")
        for path in sorted({*weights, *(p for pattern in _HASHED for p in self.folder.glob(pattern))}):
            digest.update(path.relative_to(self.folder).as_posix().encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def find_model(name: str | Path, *, gguf_file: str | None = None) -> ModelSource:
    """The local folder behind `name`; hub ids are fetched (safetensors and text files only).

    Raises:
        CompressKitError: nothing there, pickled weights only, or a model that needs its own code.
    """
    folder = find_folder(str(name))
    source = ModelSource(str(name), folder, gguf_file or only_gguf(folder))
    refuse_unsafe(folder, source.gguf_file)
    return source


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
        fix = 'add to config.json "pad_token_id": the id of the padding token'
        raise CompressKitError(what, where="model", fix=fix)
    return AutoModelForTextEncoding if task == "feature-extraction" and _is_encoder_alone(config) else TASKS[task]


def _is_encoder_alone(config: PretrainedConfig) -> bool:
    """Whether a checkpoint holds the encoder of a model that has a decoder too (T5's), and no more."""
    known = type(config) in AutoModelForTextEncoding._model_mapping
    return known and any(name.endswith("EncoderModel") for name in config.architectures or ())


@contextmanager
def explained(source: ModelSource, what: str, fix: str) -> Iterator[None]:
    """Say which model could not be read, and what to do, where transformers only says what it stumbled over."""
    try:
        yield
    except _LOADER_ERRORS as error:
        said = shortened(" ".join(str(error).split()))
        raise CompressKitError(
            f"{what} cannot be read ({type(error).__name__}: {said})", where=source.name, fix=fix
        ) from error


_TASK_OF_SUFFIX = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    # Their heads only serve pretraining; who shrinks such an encoder wants its hidden states.
    "ForMaskedLM": "feature-extraction",
    "ForPreTraining": "feature-extraction",
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
    what = f"what the model does is not clear: {said}"
    raise CompressKitError(what, where="task", fix=f"say one of {', '.join(TASKS)}")


def safetensors_source(source: ModelSource) -> ModelSource:
    """`source` itself, or the cached safetensors copy of a GGUF file (converted once, dequantised to float32)."""
    if not source.gguf_file:
        return source
    if importlib.util.find_spec("gguf") is None:
        raise CompressKitError("reading GGUF needs the package gguf", where="model", fix="pip install gguf")
    target = cache_folder() / "converted" / source.fingerprint[:16]
    if not (target / "config.json").is_file():
        said: dict[str, Any] = {"gguf_file": source.gguf_file, "trust_remote_code": False}
        with explained(source, source.gguf_file, "use a GGUF file of an architecture that transformers converts"):
            model = AutoModelForCausalLM.from_pretrained(
                source.folder, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **said
            )
            tokenizer = AutoTokenizer.from_pretrained(source.folder, **said)
        with writing_to_cache(target), whole_folder(target, replace=False) as scratch:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
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
    if quant_method(getattr(config, "quantization_config", None)) in (STUDENT_METHOD, BITSANDBYTES_METHOD):
        raise CompressKitError(
            f"{source.name} is a student that compresskit made, and passes cannot start from its edited layers",
            where="model",
            fix="compress its original, with all passes in one recipe",
        )
    auto = _task_class(task, config)
    options = _pooler_option(source, auto, config)
    types = find_float_types(source, config)
    with explained(source, "config.json", "restore the model's own config.json"), torch.device("meta"):
        model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False, **options).eval()
    note_float_types(model, types)
    return model


def load_shapes(source: ModelSource, task: str) -> PreTrainedModel:
    """As `load_empty`, also of a student whose shapes only its edits say: for comparing others with it.

    Raises:
        CompressKitError: as `load_model`.
    """
    if quant_method(getattr(load_config(source), "quantization_config", None)) == STUDENT_METHOD:
        return _read_model(source, task, device="meta")
    return load_empty(source, task)


def find_float_types(source: ModelSource, config: PretrainedConfig | None = None) -> FloatTypes:
    """In which float types a model is stored and loads; a GGUF file counts as float32, which it is converted to.

    Args:
        config: the model's, where it has been read.

    Raises:
        CompressKitError: a config, or weights whose header, cannot be read.
    """
    config = config or load_config(source)
    with explained(source, "the model", _WEIGHTS_FIX):
        return read_float_types(safetensors_source(source).folder, config)


def _pooler_option(source: ModelSource, auto: Any, config: PretrainedConfig) -> dict[str, bool]:
    """What leaves out a pooler without weights: encoders saved with another head have none, and no task reads it.

    Raises:
        CompressKitError: weights whose header cannot be read.
    """
    cls = auto._model_mapping[type(config)]
    if (
        auto is not AutoModel
        or not inspect.isclass(cls)
        or "add_pooling_layer" not in inspect.signature(cls).parameters
    ):
        return {}
    names: set[str] = set()
    with explained(source, "the model", _WEIGHTS_FIX):
        for path in safetensors_source(source).folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as stored:
                names |= set(stored.keys())
    return {} if any("pooler" in name.split(".") for name in names) else {"add_pooling_layer": False}


def load_model(source: ModelSource, task: str) -> PreTrainedModel:
    """The model in float32 on the CPU, in eval mode; an encoder whose files hold no pooler has none.

    Raises:
        CompressKitError: a task that the architecture lacks, files that are damaged or disagree, or weights that lack
            what the task needs (a head that would be random).
    """
    return _read_model(source, task, device="cpu")


def check_weights(source: ModelSource, task: str) -> None:
    """Refuse what `load_model` would refuse, from the headers of the weights alone.

    Raises:
        CompressKitError: as `load_model`.
    """
    _read_model(source, task, device="meta")


def _read_model(source: ModelSource, task: str, *, device: str) -> PreTrainedModel:
    config = load_config(source)
    auto = _task_class(task, config)
    options = _pooler_option(source, auto, config)
    folder, types = safetensors_source(source).folder, find_float_types(source, config)
    # bitsandbytes' loader would take a GPU where there is one.
    named = device != "cpu" or quant_method(getattr(config, "quantization_config", None)) == BITSANDBYTES_METHOD
    with explained(source, "the model", _WEIGHTS_FIX):
        model, info = auto.from_pretrained(
            folder,
            dtype=torch.float32,
            device_map=device if named else None,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            trust_remote_code=False,
            **options,
        )
    _refuse_misfits(source, task, info)
    # Weights from a file lie mapped at odd addresses, where library kernels may add up in another order; those beside
    # bitsandbytes' layers come in the type of the file, whatever was asked for.
    for tensor in [*model.parameters(), *model.buffers()]:
        half = tensor.dtype in (torch.bfloat16, torch.float16)
        tensor.data = tensor.data.float() if half else tensor.data.clone()
    note_float_types(model, types)
    return model.eval()


def _refuse_misfits(source: ModelSource, task: str, info: dict[str, Any]) -> None:
    """Refuse weights of other shapes than the config's, or that are not there, as transformers found them."""
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


def task_of(model: PreTrainedModel) -> str:
    """The task that a model's class is for: a key of `TASKS`."""
    autos = (*TASKS.items(), ("feature-extraction", AutoModelForTextEncoding))
    for task, auto in autos:
        mapping: Any = auto._model_mapping
        if type(model.config) in mapping and isinstance(model, mapping[type(model.config)]):
            return task
    raise CompressKitError(f"no task is known for {type(model).__name__}", fix=f"use one of: {', '.join(TASKS)}")


def answer_kind(model: nn.Module) -> AnswerKind:
    """What a model answers: hidden states (no head), classes or tokens, yes or no for each label, or scores."""
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return "states"
    if "SequenceClassification" not in type(model).__name__:
        return "classes"
    problem = getattr(model.config, "problem_type", None)
    if problem == "multi_label_classification":
        return "labels"
    return "scores" if problem == "regression" or (model.config.num_labels or 0) <= 1 else "classes"


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
