"""Prune the widths of a model with torch-pruning alone: the rival that `bench_layerwise.py --pass prune_width` shows.

    python tools/prune_with_torch_pruning.py MODEL TASK OUTPUT --ffn 0.73 --heads 0.75

Dependency groups and the L2 group magnitude of torch-pruning (arXiv:2301.12900), the same share in every block, no
repair. Writes the whole pruned module with torch.save. Run it as a process of its own, under a time limit: on
grouped-query attention torch-pruning does not end.
"""

import argparse
from typing import Any

import torch
import torch_pruning  # pyright: ignore[reportMissingImports] # optional
from torch import Tensor, nn

from compresskit.models import find_model, load_model
from compresskit.surgery.sites import find_anatomy


def prune(model: Any, *, ffn: float, heads: float) -> None:
    """Keep these shares of every block's neurons and heads, in place."""
    anatomy = find_anatomy(model)
    ratios: dict[nn.Module | tuple[nn.Module], float] = {}
    for part in anatomy.feed_forwards if ffn < 1 else ():
        ratios |= {model.get_submodule(name): 1 - ffn for name in part.inputs}
    counts: dict[nn.Module, int] = {}
    for part in anatomy.attentions if heads < 1 else ():
        counts |= {model.get_submodule(name): part.heads for name in (part.query, part.key, part.value)}
    ratios |= dict.fromkeys(counts, 1 - heads)  # heads are looked at only where the layer has a ratio too
    inputs: Any = {name: torch.ones(1, 8, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    pruner = torch_pruning.pruner.BasePruner(
        model,
        inputs,
        torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.0,
        pruning_ratio_dict=ratios,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding) and m not in ratios],
        num_heads=counts,
        prune_num_heads=heads < 1,
        prune_head_dims=False,
        head_pruning_ratio=1 - heads,
        root_module_types=[nn.Linear],
        output_transform=_first_sum,
    )
    pruner.step()
    for part in anatomy.attentions:
        _count_heads(model.get_submodule(part.module), model.get_submodule(part.query), part.head_dim)


def _first_sum(output: Any) -> Tensor:
    return output[0].sum()


def _count_heads(attention: Any, query: Any, head_dim: int) -> None:
    """torch-pruning changes layers and leaves the numbers beside them to its user."""
    attention.num_attention_heads, attention.all_head_size = query.out_features // head_dim, query.out_features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("task")
    parser.add_argument("output")
    parser.add_argument("--ffn", type=float, default=1.0)
    parser.add_argument("--heads", type=float, default=1.0)
    options = parser.parse_args()
    model = load_model(find_model(options.model), options.task)
    prune(model, ffn=options.ffn, heads=options.heads)
    torch.save(model, options.output)


if __name__ == "__main__":
    main()
