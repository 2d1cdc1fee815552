"""Errors a user can act on: where it went wrong, what is wrong, how to fix it."""

from collections.abc import Sequence


class CompressKitError(Exception):
    """One mistake, printed as `where: what` and, on the next line, `fix: …`.

    Args:
        what: the fact, with the value that was checked.
        where: recipe position (`passes[1].group_size`), module name or file.
        fix: the literal thing to type or change.
    """

    #: Exit status of the command: 2 is the user's to mend, 1 is not.
    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  fix: {self.fix}" if self.fix else head

    @property
    def each(self) -> "tuple[CompressKitError, ...]":
        """The mistakes alone: this one, or those that are reported together."""
        return (self,)

    def at(self, where: str) -> "CompressKitError":
        """Return the same error, of the same class, placed inside `where` (outer places come first)."""
        self.where = f"{where}: {self.where}" if self.where else where
        return self


class ManyErrors(CompressKitError):
    """Several mistakes of one recipe, reported together."""

    def __init__(self, errors: Sequence[CompressKitError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(str(error) for error in errors))

    @property
    def each(self) -> tuple[CompressKitError, ...]:
        """The mistakes alone."""
        return self.errors


class RunFailedError(CompressKitError):
    """The run stopped for a reason that is not in the recipe: a bug, no disk space, a failed parity check."""

    exit_code = 1


def first_of(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
