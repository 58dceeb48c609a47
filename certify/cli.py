"""The command line."""

from __future__ import annotations

import click

from certify.commands.attacking import attack
from certify.commands.bounding import bound
from certify.commands.comparison import compare
from certify.commands.evaluation import evaluate
from certify.commands.training import recipes, train
from certify.commands.verification import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="certify-lipschitz", prog_name="certify")
def main() -> None:
    """Train image classifiers with provable L2 robustness, and prove it."""


for command in (train, recipes, evaluate, attack, verify, bound, compare):
    main.add_command(command)

if __name__ == "__main__":
    main()
