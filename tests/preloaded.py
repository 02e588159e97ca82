"""What processes of tests import anyway: loaded once, in the one that they are forked from."""

from __future__ import annotations

import gc

from grasp_dist.process import set_up_process

set_up_process()

import datasets  # noqa: E402, F401
import peft  # noqa: E402, F401 - with it torch and transformers
import transformers.models.llama.modeling_llama  # noqa: E402, F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

import grasp_dist.preflight  # noqa: E402
import grasp_dist.projection  # noqa: E402
import grasp_dist.stages  # noqa: E402
import grasp_dist.tasks  # noqa: E402
import grasp_dist.training.loop  # noqa: E402, F401

get_checkpoint_conversion_mapping("llama")  # compiles a thousand regular expressions, for all models
gc.collect()
gc.freeze()  # what is here stays: children need not look through it
