"""Random-weight causal LMs of real architectures, small enough to build in milliseconds."""

import torch
from torch import nn

__all__ = ["ARCHITECTURES", "WRITERS", "tiny_model"]

_COMMON = {"vocab_size": 64, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_LLAMA = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ARCHITECTURES = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 8},
    "gemma": _LLAMA | {"head_dim": 8},
    "gemma2": _LLAMA | {"head_dim": 8},
    "mistral": _LLAMA,
    "phi3": _LLAMA,
    "gpt2": {"n_embd": 24, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "gpt_neox": {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "max_position_embeddings": 64},
    "opt": {
        "hidden_size": 24,
        "word_embed_proj_dim": 24,
        "ffn_dim": 40,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "falcon": {
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "ffn_hidden_size": 40,
    },
}
"""Settings by transformers' model type."""

_LLAMA_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
WRITERS = dict.fromkeys(("llama", "qwen2", "qwen3", "gemma", "gemma2", "mistral", "phi3"), _LLAMA_WRITERS) | {
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
}
"""The modules of a layer that write to its residual stream."""


def tiny_model(architecture: str, *, seed: int = 0, **settings: object) -> nn.Module:
    """A causal LM in fp32 and eval mode with weights large enough that every part matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {key: value for key, value in _COMMON.items() if architecture != "gpt2" or key != "num_hidden_layers"}
    config = AutoConfig.for_model(architecture, **(common | ARCHITECTURES[architecture] | settings))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model
