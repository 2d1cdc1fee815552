"""The quantizer plug-in: `import compresskit` teaches transformers to rebuild a student from its config.json.

    config.json   quantization_config: {quant_method: compresskit, edits: […]}
    AutoModel.from_pretrained(folder)   builds the original on the meta device, replays the edits, loads the weights

A smaller vocabulary is always said by the config itself, so the edits that cut it are not replayed.

Students whose shapes a stock config can say carry no quantization_config and need no plug-in (`stock_config`).
"""

import copy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compresskit.layers.bitsandbytes_linear import Bnb4Linear, Bnb8Linear
from compresskit.layers.corrected_linear import CorrectedLinear
from compresskit.layers.empty_linear import EmptyLinear
from compresskit.layers.int8_linear import Int8Linear
from compresskit.layers.low_rank import LowRankLinear
from compresskit.layers.low_rank_embedding import LowRankEmbedding
from compresskit.layers.pivoted_linear import PivotedLinear
from compresskit.layers.quant_embedding import QuantEmbedding
from compresskit.layers.quant_linear import QuantLinear
from compresskit.layers.tensor_train import TensorTrainEmbedding, TensorTrainHead
from compresskit.model_folder import EDITS_RECORD, STUDENT_METHOD
from compresskit.surgery import channel_edits, correction_edits, tensor_edits  # noqa: F401 # register their edits
from compresskit.surgery.bitsandbytes_edits import HoldBitsAndBytes
from compresskit.surgery.cuts import PruneHeads, PruneNeurons
from compresskit.surgery.depth_edits import DropBlocks, cut_config
from compresskit.surgery.edits import EDITS, Edit, read_ranges, replay
from compresskit.surgery.provenance import Provenance
from compresskit.surgery.sites import CANNOT_RUN, find_blocks, obstacle
from compresskit.surgery.vocabulary_edits import PruneVocabulary, say_vocabulary

METHOD = STUDENT_METHOD
EDITS_SCHEMA = 1


def parse_edits(raw: list[Any]) -> list[Edit]:
    """Edits from their JSON form; unknown kinds and keys are errors."""
    return [EDITS.parse(item) for item in raw]


def dump_edits(edits: list[Edit]) -> list[dict[str, Any]]:
    """The JSON form of edits."""
    return [edit.model_dump(mode="json") for edit in edits]


_INSERTED_TABLES = (QuantEmbedding, LowRankEmbedding, TensorTrainEmbedding)
_INSERTED_LINEARS = (
    CorrectedLinear,
    EmptyLinear,
    LowRankLinear,
    PivotedLinear,
    QuantLinear,
    Int8Linear,
    Bnb4Linear,
    Bnb8Linear,
)
_INSERTED = (*_INSERTED_LINEARS, TensorTrainHead, *_INSERTED_TABLES)


def _stand_in(module: nn.Module) -> list[str]:
    """Give an inserted layer the attributes that a float layer has, while transformers loads; which it lacked.

    Its `_init_weights` runs over loaded models too, and some architectures' reach from a block into its children
    (ModernBERT: `module.Wqkv.weight`). Marking the layer as initialised does not prevent that, and marking the block
    would leave its buffers unset. The stand-ins take no memory and, as plain attributes, no place among parameters.
    """
    if isinstance(module, _INSERTED_TABLES):
        shape = (module.num_embeddings, module.embedding_dim)
    else:
        shape = (int(module.out_features), int(module.in_features))  # pyright: ignore[reportArgumentType]
    weight = torch.empty(shape, device="meta")
    weight._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
    attributes: dict[str, Tensor | None] = {"weight": weight, "bias": None}
    lacking = [name for name in attributes if not hasattr(module, name)]
    for name in lacking:
        setattr(module, name, attributes[name])
    return lacking


@register_quantization_config(METHOD)
class EditsConfig(QuantizationConfigMixin):
    """The `quantization_config` of a student: its edits."""

    def __init__(self, edits: list[Any], schema: int = EDITS_SCHEMA, quant_method: str = METHOD) -> None:
        if schema > EDITS_SCHEMA:
            raise ValueError(f"edits of schema {schema} need a newer compresskit (this one reads up to {EDITS_SCHEMA})")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.schema = schema
        self.edits = edits


@register_quantizer(METHOD)
class EditsQuantizer(HfQuantizer):
    """Replays edits on the empty model before transformers loads the weights."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        edits = parse_edits(self.quantization_config.edits)  # pyright: ignore[reportAttributeAccessIssue]
        replay((edit for edit in edits if not isinstance(edit, PruneVocabulary)), model)
        inserted = [module for module in model.modules() if isinstance(module, _INSERTED)]
        self._stand_ins = [(module, name) for module in inserted for name in _stand_in(module)]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for module, name in self._stand_ins:
            delattr(module, name)
        self._stand_ins = []
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Saved by compresskit only."""
        return False

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Float layers of a student train as any others."""
        return True


_UNIFORM_WIDTH = ("intermediate_size", "ffn_dim", "hidden_dim", "n_inner", "d_ff")


def stock_config(original: PreTrainedModel, edits: list[Edit]) -> PretrainedConfig | None:
    """A stock config that says the student's shapes, or None where only the plug-in can.

    Fewer blocks are said where they are what a model of that depth would have there, FFN width where every block has
    the same, fewer heads of the same size where the architecture reads `head_dim`; fewer tokens always. A model is
    built from it, without memory, and its shapes are compared with the student's: architectures differ in what of a
    config they read.
    Layers in bitsandbytes' formats do not change it: `stock_quantization` says them beside.

    Args:
        original: may be on the meta device.
        edits: what was done to it.
    """
    if not all(
        isinstance(edit, PruneNeurons | PruneHeads | DropBlocks | PruneVocabulary | HoldBitsAndBytes) for edit in edits
    ):
        return None
    drops = [edit for edit in edits if isinstance(edit, DropBlocks)]
    config: PretrainedConfig | None = cut_config(original, drops) if drops else original.config
    if config is None:
        return None
    widths = _uniform_widths(config, find_blocks(original), edits)
    if widths is None:
        return None
    said = _with_vocabulary(config, edits).to_dict() | widths
    return type(config).from_dict(said) if not widths or _builds_student(original, edits, said) else None


def _builds_student(original: PreTrainedModel, edits: list[Edit], said: dict[str, Any]) -> bool:
    """Whether a model built from a config that says `said` has the student's parameters, and runs where it can."""
    with torch.device("meta"):
        student = type(original)._from_config(copy.deepcopy(original.config))
    replay((edit for edit in edits if not isinstance(edit, HoldBitsAndBytes)), student)
    try:
        with torch.device("meta"):
            built = type(original)._from_config(type(original.config).from_dict(said))
    except (StrictDataclassError, *CANNOT_RUN):
        return False
    return _shapes(built) == _shapes(student) and (obstacle(student) is not None or obstacle(built) is None)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.named_parameters(remove_duplicate=False)}


def _uniform_widths(config: PretrainedConfig, blocks: tuple[str, ...], edits: list[Edit]) -> dict[str, int] | None:
    """What a config may say of the widths that edits of the original's `blocks` left; None where they are not even."""
    neurons: dict[str, int] = {}
    heads: dict[str, tuple[int, int, int]] = {}
    provenance = Provenance()
    for edit in edits:
        if isinstance(edit, PruneNeurons):
            neurons[provenance.original_name(edit.output)] = len(read_ranges(edit.keep))
        elif isinstance(edit, PruneHeads):
            counts = len(read_ranges(edit.keep)), len(read_ranges(edit.keep_kv))
            heads[provenance.original_name(edit.module)] = (*counts, edit.head_dim)
        provenance.add(edit)
    left = sum(map(provenance.is_left, blocks))
    of_neurons = [count for name, count in neurons.items() if provenance.is_left(name)]
    of_heads = [counts for name, counts in heads.items() if provenance.is_left(name)]
    changed: dict[str, int] = {}
    if of_neurons:
        key = next((name for name in _UNIFORM_WIDTH if name in config.to_dict()), None)
        if key is None or len(of_neurons) != left or len(set(of_neurons)) != 1:
            return None
        changed[key] = of_neurons[0]
    if of_heads:
        if len(of_heads) != left or len(set(of_heads)) != 1:
            return None
        names = ("num_attention_heads", "num_key_value_heads", "head_dim")
        changed |= zip(names, of_heads[0], strict=True)
    return changed


def _with_vocabulary(config: PretrainedConfig, edits: list[Edit]) -> PretrainedConfig:
    """A copy of the config that says the tokens which the edits leave."""
    said = copy.deepcopy(config)
    for edit in edits:
        if isinstance(edit, PruneVocabulary):
            say_vocabulary(said, edit.kept())
    return said


def config_with_edits(original: PreTrainedModel, edits: list[Edit]) -> PretrainedConfig:
    """A copy of the original's config that makes `from_pretrained` rebuild the student.

    Where a stock config can say its shapes, that one, with the edits as a record under `compresskit_edits`; else the
    original's with the edits as `quantization_config`, for the plug-in.
    """
    stock = stock_config(original, edits)
    if stock is not None:
        setattr(stock, EDITS_RECORD, dump_edits(edits))
        return stock
    said = _with_vocabulary(original.config, edits)
    said.quantization_config = {"quant_method": METHOD, "schema": EDITS_SCHEMA, "edits": dump_edits(edits)}
    return said


def edits_of(config: PretrainedConfig) -> list[Edit]:
    """The edits recorded in a student's config; none for any other model's."""
    raw: Any = getattr(config, "quantization_config", None)
    said = raw.to_dict() if isinstance(raw, QuantizationConfigMixin) else raw
    if isinstance(said, dict) and said.get("quant_method") == METHOD:
        return parse_edits(said["edits"])
    return parse_edits(getattr(config, EDITS_RECORD, []))
