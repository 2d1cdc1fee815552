"""What a user asks of `quantize`, by name of matrix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field

from compresskit.config import Config
from compresskit.errors import CompressKitError, first_of

GroupSize = int | Literal["channel"]
Misfit = Literal["error", "keep", "pad"]


class Override(Config):
    """What matrices of some names get instead of what the others get."""

    bits: Literal[3, 4, 8, "float"] | None = Field(default=None, description="float: the matrix stays as it is")
    group_size: GroupSize | None = Field(
        default=None, examples=[32], description="columns that share a scale; channel: a whole row"
    )
    act: Literal["none"] | None = Field(
        default=None, description="none: linears multiply float activations where the others round theirs"
    )


@dataclass(frozen=True)
class Wanted:
    """What a user asks for.

    Attributes:
        bits, group_size, symmetric: of linears in the blocks; a group size of 0 is the row, symmetric None the usual.
        targets: glob over linears.
        tables: bits of tables; None leaves them float.
        overrides: by glob over linears and tables; of several that match a name the last counts.
        act, smooth: of linears in the blocks, as in `QuantizeLinears`.
        on_misfit: what becomes of columns that no group divides.
        chosen: bits of linears in the blocks, by name, where an allocation has chosen them.
    """

    bits: int
    group_size: int
    symmetric: bool | None
    targets: str
    tables: int | None
    overrides: Mapping[str, Override]
    act: Literal["none", "int8", "int8_static"]
    smooth: bool
    on_misfit: Misfit
    chosen: Mapping[str, int] = field(default_factory=dict)

    def override(self, name: str) -> Override:
        """What is said of one name; empty where nothing is."""
        return self.overrides.get(self.glob_of(name), Override())

    def glob_of(self, name: str) -> str:
        """The glob of the override that counts for one name; empty where none does."""
        return next((glob for glob in reversed(list(self.overrides)) if fnmatchcase(name, glob)), "")


def require_products(inside: Sequence[str], wanted: Wanted) -> None:
    """Refuse overrides of grids that integer products do not have, and such of `act` that nothing reads.

    Args:
        inside: the linears in the blocks that get integers.
        wanted: what is asked for.

    Raises:
        CompressKitError: it lists all of them.
    """
    wrong: dict[tuple[str, str], list[str]] = {}
    for name in inside:
        glob, said = wanted.glob_of(name), wanted.override(name)
        bits = said.bits or wanted.chosen.get(name, wanted.bits)
        if wanted.act == "none" or said.act == "none":
            continue
        if bits == 3:
            wrong.setdefault((glob, "of 3 bits"), []).append(name)
        elif bits == 8 and isinstance(said.group_size, int) and name not in wanted.chosen:
            wrong.setdefault((glob, f"of 8 bits in groups of {said.group_size}"), []).append(name)
    if wrong:
        parts = [f"{glob!r} gives {first_of(names)} weights {grid}" for (glob, grid), names in wrong.items()]
        what = f"{'; '.join(parts)}; act: {wanted.act} multiplies 8 bits with one scale a row, or 4 bits"
        fix = "say act: none in such an override to leave these activations in float, or change its bits or group_size"
        raise CompressKitError(what, where="overrides", fix=fix)
    read = {wanted.glob_of(name) for name in inside}
    idle = [glob for glob, said in wanted.overrides.items() if said.act and glob not in read]
    if idle:
        what = f"act: none of {', '.join(map(repr, idle))} is read by no linear in the blocks that gets integers"
        raise CompressKitError(what, where="overrides", fix="leave act out there: all else multiplies in float anyway")
