"""The configuration of a training: the one source of what ``pvae train`` can do.

A field of `Config` is an option of the command line, an entry of ``config.json`` and of a file
that ``--config`` reads, with its help, its choices, its default and its check. What has a name or
a number elsewhere is found there and needs no field: parts of each kind (`pvae.shelf`), the numbers
that recipes take, the strengths of corruptions, the weights of penalties.

Pydantic checks the values, of files and of the command line alike, since its fields hold type,
default and help in one place; Typer makes the command line from them (`pvae.cli.training`).
"""

from pvae.config.config import Config, options
from pvae.config.option import Option, flag

__all__ = ["Config", "Option", "flag", "options"]
