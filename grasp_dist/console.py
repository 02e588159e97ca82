"""What the command line's processes print: our own lines, and other libraries' only where a user can act on them."""

from __future__ import annotations

import logging
import os
import warnings

__all__ = ["quiet_libraries"]


def quiet_libraries() -> None:
    """Call before transformers is imported. What the user has set in the environment stays."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # what it logs as an error it raises as well
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("grasp_dist").setLevel(logging.ERROR)
