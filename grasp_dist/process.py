"""What each process of the command line does first: quiet libraries, and a garbage collector that lets it start."""

from __future__ import annotations

import gc
import logging
import os
import warnings

__all__ = ["set_up_process"]


def set_up_process() -> None:
    """Call before transformers is imported. What the user has set in the environment stays.

    Of other libraries' lines only those are printed on which a user can act. Importing torch, transformers and peft
    makes a million objects that stay: with Python's own thresholds, looking through them time and again takes a quarter
    of a short task, and stops ranks at different moments of a step.
    """
    gc.set_threshold(50_000, 20, 50)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # what it logs as an error it raises as well
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("grasp_dist").setLevel(logging.ERROR)
