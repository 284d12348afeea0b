# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""What `train/experiment.py` measures and how it decides: the paper's ablations on phantoms, over several seeds."""
