"""What tells one model in memory from another."""

import hashlib
import json

import torch
from transformers import PreTrainedConfig, PreTrainedModel


def model_fingerprint(model: PreTrainedModel, config: PreTrainedConfig | None = None) -> str:
    """sha256 over a model's weights and a config, by default its own."""
    said = (config or model.config).to_dict()
    told = {key: value for key, value in said.items() if key != "_name_or_path"}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(
            value.detach().cpu().contiguous().view(torch.uint8).numpy() if value.ndim else str(value).encode()
        )
    return digest.hexdigest()
