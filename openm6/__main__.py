"""`python -m openm6` is `openm6`."""

from openm6.cli import main

if __name__ == "__main__":
    main()
