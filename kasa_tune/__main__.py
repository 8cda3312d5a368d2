"""Lets `python -m kasa_tune` run the command `kasa-tune`."""

import sys

from kasa_tune.cli import main

if __name__ == "__main__":
    sys.exit(main())
