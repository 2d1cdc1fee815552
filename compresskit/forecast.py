"""What a recipe will make of a model, from shapes alone: no weight is read, every misfit of every pass is found.

empty original (meta device) ── plan of pass 0, replay ── plan of pass 1, replay ── …      parameters, bytes, edits
"""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn
from transformers import PreTrainedModel

from compresskit.errors import CompressKitError, ManyErrors
from compresskit.evaluate import checkpoint_bytes, count_parameters, state_dict_bytes
from compresskit.model_folder import BITSANDBYTES_METHOD, STUDENT_METHOD
from compresskit.models import ModelSource, load_empty
from compresskit.passes import Pass
from compresskit.recipe import Recipe
from compresskit.student import needed_for
from compresskit.surgery.bitsandbytes_edits import bitsandbytes_layers
from compresskit.surgery.cuts import PruneFusedHeads, PruneHeads, PruneNeurons
from compresskit.surgery.depth_edits import DropBlocks, EmptyLinears
from compresskit.surgery.edits import Edit, replay
from compresskit.surgery.plugin import stock_config
from compresskit.surgery.provenance import Provenance
from compresskit.surgery.sites import obstacle

FLOAT_BYTES = 4
#: Of many matrices, how many a warning names.
_NAMED = 3


@dataclass(frozen=True)
class Expected:
    """A model after a pass (or the original), as its shapes say.

    Attributes:
        size_bytes: of the file, all weights in the float type that most of the original's have.
        memory_bytes: as a run holds it, weights that are no integers in float32.
        at_most: whether the data may make it smaller.
    """

    kind: str
    params: int
    size_bytes: int
    memory_bytes: int
    at_most: bool = False
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True)
class Forecast:
    """The whole run, foretold.

    Attributes:
        steps: entry 0 is the original, then one per pass.
        memory_bytes: the least that the run holds at once: original, student, and the calibration activations of both
            or the student as it is read back after saving.
        loads_with: what has to be there to load the student, as `student.loads_with` says it of the saved one.
        warnings: matrices that stay as they are although asked for, and orders that can be done and are unwise.
        export_bytes: of each export, in the recipe's order; near them where the data choose ranks or widths, None where
            nothing can be said.
    """

    steps: tuple[Expected, ...]
    memory_bytes: int
    loads_with: str
    warnings: tuple[str, ...]
    export_bytes: tuple[int | None, ...] = ()

    @property
    def is_stock(self) -> bool:
        """Whether the student's checkpoint loads without `import compresskit`."""
        return self.loads_with != needed_for(STUDENT_METHOD)


def foretell(recipe: Recipe, source: ModelSource, task: str) -> Forecast:
    """Plan every pass on an empty model, in order.

    Raises:
        ManyErrors: every pass, and every export, whose options do not fit the model it would meet.
    """
    original, model = load_empty(source, task), load_empty(source, task)
    steps = [_expected("original", model, original)]
    weights = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    activations = _activation_bytes(recipe, model)
    mistakes: list[CompressKitError] = []
    left: list[str] = []
    for index, one in enumerate(recipe.passes):
        try:
            edits, kept = one.plan(model), one.keeps(model)
            _replay_and_run(edits, model, one.kind)
        except CompressKitError as error:
            mistakes += [mistake.at(f"passes[{index}] ({one.kind})") for mistake in error.each]
            continue
        left += [f"passes[{index}] ({one.kind}): matrices left as they are: {_named(kept)}"] if kept else []
        at_most = steps[-1].at_most or one.plans_at_most
        steps.append(_expected(one.kind, model, original, edits, before=steps, at_most=at_most))
    for index, exporter in enumerate(recipe.export if not mistakes else ()):
        try:
            exporter.check(model, task)
        except CompressKitError as error:
            mistakes += [mistake.at(f"export[{index}] ({exporter.kind})") for mistake in error.each]
    if mistakes:
        raise ManyErrors(mistakes)
    edits = _edits(steps)
    plain = not edits or stock_config(original, edits) is not None
    method = BITSANDBYTES_METHOD if bitsandbytes_layers(model) else None
    largest = max(step.memory_bytes for step in steps)
    return Forecast(
        steps=tuple(steps),
        memory_bytes=steps[0].memory_bytes + largest + max(largest, activations),
        loads_with=needed_for(method if plain and all(one.plans_shapes() for one in recipe.passes) else STUDENT_METHOD),
        warnings=(
            *left,
            *_idle(recipe.passes, steps),
            *_overlaps(steps, weights),
            *_late_strength(recipe.passes, steps),
        ),
        export_bytes=tuple(exporter.predict_bytes(model, task) for exporter in recipe.export),
    )


def _edits(steps: Sequence[Expected]) -> list[Edit]:
    return [edit for step in steps for edit in step.edits]


def _expected(
    kind: str,
    model: PreTrainedModel,
    original: PreTrainedModel,
    edits: Sequence[Edit] = (),
    *,
    before: Sequence[Expected] = (),
    at_most: bool = False,
) -> Expected:
    size_bytes = checkpoint_bytes(model, original, [*_edits(before), *edits])
    return Expected(kind, count_parameters(model), size_bytes, state_dict_bytes(model), at_most, tuple(edits))


def _replay_and_run(edits: Sequence[Edit], model: PreTrainedModel, kind: str) -> None:
    """Make the edits, and see whether the model still runs where they change widths that other parts may rely on.

    Raises:
        CompressKitError: it ran before them and does not after them.
    """
    sorts = {"heads": PruneHeads | PruneFusedHeads, "neurons": PruneNeurons, "blocks": DropBlocks}
    cuts = {width: [edit for edit in edits if isinstance(edit, sort)] for width, sort in sorts.items()}
    cuts = {width: found for width, found in cuts.items() if found}
    # Some models cannot run without values (they ask a tensor for a number): of these nothing can be said.
    before = copy.deepcopy(model) if cuts and obstacle(model) is None else None
    replay(list(edits), model)
    found = obstacle(model) if before is not None else None
    if before is None or found is None:
        return
    alone = next((width for width, some in cuts.items() if not _runs_after(before, some)), None)
    widths = sorted(cuts) if alone is None else [alone]
    names = [{"heads": "heads", "neurons": "ffn"}[width] for width in widths if width != "blocks"]
    part = f"a part of {type(model).__name__}"
    raise CompressKitError(
        f"{part} depends on the number of {' or '.join(widths)} that {kind} changes ({found})",
        fix=f"leave {' or '.join(names)} out of keep" if names else f"leave {kind} out",
    )


def _runs_after(model: PreTrainedModel, edits: list[Edit]) -> bool:
    changed = copy.deepcopy(model)
    replay(edits, changed)
    return obstacle(changed) is None


def _activation_bytes(recipe: Recipe, model: PreTrainedModel) -> int:
    """Two streams (original and student) of the calibration sequences."""
    if model.main_input_name != "input_ids":
        return 0  # convolutions are fitted example by example
    width: int = model.config.get_text_config().hidden_size
    return 2 * recipe.data.calibration * recipe.data.max_length * width * FLOAT_BYTES


def _named(names: Sequence[str]) -> str:
    """How many matrices, and the first of them."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{len(names)} ({', '.join(names[:_NAMED])}{more})"


def _idle(passes: Sequence[Pass], steps: Sequence[Expected]) -> list[str]:
    """Passes that should change shapes and, with these options, change nothing."""
    return [
        f"passes[{index}] ({one.kind}) changes nothing with these options"
        for index, (one, step) in enumerate(zip(passes, steps[1:], strict=True))
        if one.adds and not step.edits
    ]


def _touched(steps: Sequence[Expected], weights: set[str]) -> list[set[str]]:
    """The original's matrices that the edits of each step name; those that are taken away whole do not count."""
    provenance, found = Provenance(), []
    for step in steps:
        here: set[str] = set()
        for edit in step.edits:
            said = () if isinstance(edit, EmptyLinears) else edit.model_dump().values()
            names = (name for value in said for name in (value if isinstance(value, tuple | list) else (value,)))
            here |= {provenance.original_name(name) for name in names if isinstance(name, str)} & weights
            provenance.add(edit)
        found.append(here)
    return found


def _overlaps(steps: Sequence[Expected], weights: set[str]) -> list[str]:
    """Matrices that are both factorised and pruned."""
    touched = _touched(steps, weights)
    found: list[str] = []
    for index, step in enumerate(steps):
        for before in range(1, index):
            kinds = {step.kind, steps[before].kind}
            both = touched[index] & touched[before]
            if both and "low_rank" in kinds and any(kind.startswith("prune") for kind in kinds):
                found.append(
                    f"passes[{index - 1}] ({step.kind}) meets {len(both)} matrices that passes[{before - 1}] "
                    f"({steps[before].kind}) has reduced already, such as {min(both)}: expect to lose more than either "
                    f"loses alone at the same size; narrow `targets` so that each matrix is reduced once"
                )
    return found


def _late_strength(passes: Sequence[Pass], steps: Sequence[Expected]) -> list[str]:
    """A pass that cuts deeper than an earlier one of its kind: what the earlier one fitted is cut away again."""
    kept = [after.size_bytes / before.size_bytes for before, after in pairwise(steps)]
    repeated = {kind for kind, times in Counter(one.kind for one in passes).items() if times > 1}
    found: list[str] = []
    for index, one in enumerate(passes):
        milder = [
            before
            for before in range(index)
            if one.kind in repeated and passes[before].kind == one.kind and kept[index] < kept[before] < 1
        ]
        if milder:
            found.append(
                f"passes[{index}] ({one.kind}) is stronger than passes[{milder[0]}] before it (keeps {kept[index]:.0%} "
                f"of the bytes against {kept[milder[0]]:.0%}): it cuts away what was just fitted; put it first, or ask "
                f"for both cuts in one pass"
            )
    return found
