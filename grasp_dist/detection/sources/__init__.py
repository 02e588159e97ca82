"""Checkpoints of any training as named tensors that are read one at a time: `open_source`.

source.py        what a checkpoint is here, and how its names become those of the base model
own.py           step folders of this package
distributed.py   torch.distributed.checkpoint, pickled and safetensors
zero.py          DeepSpeed ZeRO, and its universal checkpoints
models.py        model directories (safetensors)
"""

from grasp_dist.detection.sources.models import model_skeleton, open_model
from grasp_dist.detection.sources.opening import open_source
from grasp_dist.detection.sources.source import TensorSource, base_names

__all__ = ["TensorSource", "base_names", "model_skeleton", "open_model", "open_source"]
