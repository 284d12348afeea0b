# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""`python -m hsenet.cli` is the command `hsenet`; which commands there are is in `hsenet_command.py`."""

import sys

from hsenet_command import main


__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
