"""Tiny models that route tokens to experts, or look words up: four architectures and more of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

from zoo import GQA, MOE, PLAIN_GQA, SEQ2SEQ, TEXT

# DeepSeek-V3 chooses one of two groups of four experts, then two of those.
DEEPSEEK = {
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "first_k_dense_replace": 0, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip

EXPERTS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GQA, num_local_experts=4)),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**GQA, **MOE, shared_expert_intermediate_size=40)),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**PLAIN_GQA, num_experts=6, num_experts_per_tok=2)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**GQA, **MOE, norm_topk_prob=True)),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**TEXT, **DEEPSEEK)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **GQA,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
}
WORDS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GQA)),
    "llama_tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GQA, tie_word_embeddings=True)),
    "bert_mlm": lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ, max_position_embeddings=64)),
}
