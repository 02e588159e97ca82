"""What ranks of tests import anyway: loaded once, in the process that they are forked from."""

from __future__ import annotations

import peft  # noqa: F401 - with it torch and transformers
import transformers.models.llama.modeling_llama  # noqa: F401

import grasp_dist.projection
import grasp_dist.training.loop
import grasp_dist.training.model  # noqa: F401
