"""``python -m pvae``: the command line."""

from pvae.cli import main

main()
