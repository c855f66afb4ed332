"""`python -m lorakit` is the command `lorakit`."""

from lorakit.cli import main

main()
