"""`optimum-cli compress RECIPE`: the command `compresskit run`, where Optimum's own commands are.

Optimum reads every file of this namespace at each start, so nothing heavy is imported here.
"""

import runpy
import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class CompressCommand(BaseOptimumCLICommand):
    """Do what a recipe of compresskit says."""

    COMMAND = CommandInfo(name="compress", help="Compress a model as a recipe says (compresskit).")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """The arguments of `compresskit run`."""
        parser.add_argument("recipe", help="a YAML recipe")
        parser.add_argument("-o", "--output", required=True, metavar="DIR", help="where steps and results are kept")
        parser.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value: --set passes.0.keep=0.8"
        )
        parser.add_argument("--fresh", action="store_true", help="delete what an earlier run left in DIR first")

    def run(self) -> None:
        """Run the recipe, with the messages and exit statuses of `compresskit run`."""
        assert self.args is not None
        settings = [word for setting in self.args.set for word in ("--set", setting)]
        fresh = ["--fresh"] if self.args.fresh else []
        sys.argv = ["compresskit", "run", self.args.recipe, "--output", self.args.output, *settings, *fresh]
        runpy.run_module("compresskit", run_name="__main__")


REGISTER_COMMANDS = [CompressCommand]
