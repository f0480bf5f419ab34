"""Tiny models with RMS norms and rotary embeddings, and how many of each a model of some layers has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers as hf
from torch import nn

from checks import randomise

TINY = {"vocab_size": 99, "use_cache": False}
WIDTH = 16


def llama(layers: int = 2, width: int = WIDTH, kv_heads: int = 2, **options: Any) -> nn.Module:
    """4 query heads."""
    return decoder(hf.LlamaConfig, hf.LlamaForCausalLM, layers, width, kv_heads, **options)


def decoder(config: Any, model: Any, layers: int = 2, width: int = WIDTH, kv_heads: int = 2, **options: Any) -> nn.Module:
    """A decoder of Hugging Face's common fields, 4 query heads."""
    sizes = {
        "hidden_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": kv_heads,
        "head_dim": width, "intermediate_size": 96, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    return randomise(model(config(**{**sizes, **TINY, **options})))


def gptj() -> nn.Module:
    """Interleaved pairs in [B, S, H, D], half of every head turned."""
    config = hf.GPTJConfig(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64, **TINY)
    return randomise(hf.GPTJForCausalLM(config))


def neox() -> nn.Module:
    """A quarter of every head turned."""
    config = hf.GPTNeoXConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, rotary_pct=0.25,
        max_position_embeddings=64, **TINY,
    )  # fmt: skip
    return randomise(hf.GPTNeoXForCausalLM(config))


def t5() -> nn.Module:
    """An encoder without biases, means or rotary embeddings."""
    config = hf.T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, **TINY)
    return randomise(hf.T5EncoderModel(config))


# Of two layers: the model, its norms, its rotary embeddings, and whether their pairs are neighbours.
MODELS: Mapping[str, tuple[Callable[[], nn.Module], int, int, bool]] = {
    "llama": (llama, 5, 4, False),
    "mistral": (lambda: decoder(hf.MistralConfig, hf.MistralForCausalLM), 5, 4, False),
    "qwen3": (lambda: decoder(hf.Qwen3Config, hf.Qwen3ForCausalLM), 9, 4, False),
    "gemma2": (lambda: decoder(hf.Gemma2Config, hf.Gemma2ForCausalLM), 9, 4, False),
    "phi3": (lambda: decoder(hf.Phi3Config, hf.Phi3ForCausalLM), 5, 4, False),
    "olmo2": (lambda: decoder(hf.Olmo2Config, hf.Olmo2ForCausalLM), 9, 4, False),
    "glm": (lambda: decoder(hf.GlmConfig, hf.GlmForCausalLM), 5, 4, True),
    "gpt_oss": (
        lambda: decoder(hf.GptOssConfig, hf.GptOssForCausalLM, num_local_experts=2, num_experts_per_tok=1), 5, 4, False,
    ),
    "cohere": (lambda: decoder(hf.CohereConfig, hf.CohereForCausalLM), 0, 4, True),
    "gptj": (gptj, 0, 4, True),
    "neox": (neox, 0, 4, False),
    "t5": (t5, 5, 0, False),
}  # fmt: skip
