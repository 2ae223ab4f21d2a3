"""``python -m tiue_cli``."""

from __future__ import annotations

import sys

from tiue_cli.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
