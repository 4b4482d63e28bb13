"""`python -m openm6` is `openm6`."""

from openm6.cli import main

main()
