"""Every architecture that must go through: tiny configs, what must be found in them, and why what is frozen is.

`groups` are sizes of the groups that may be cut, by kind, in graph order. `frozen` is the cause of what attention and
FFN MACs cannot be cut; without one hardly any may be frozen. `build` returns a model, or a model and example inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

TEXT = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
# 8 query heads in 4 KV groups; heads * head_dim differs from the hidden width.
GQA = {**TEXT, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
PLAIN_GQA = {k: v for k, v in GQA.items() if k != "head_dim"}
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
SOUND_IN = {
    "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
WAVES = {
    "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
FALCON = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}
MOE = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 24}


@dataclass(frozen=True)
class Entry:
    """One row of the table of models."""

    title: str
    build: Callable[[], Any]
    groups: dict[str, tuple[int, ...]]
    frozen: str = ""


class WrittenOutAttention(nn.Module):
    """`nn.MultiheadAttention` that returns its weights, which torch writes out as baddbmm and softmax."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=True)
        x = self.norm(x + mixed)
        return x + self.down(F.gelu(self.up(x)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention function that a block is given."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class HandGptBlock(nn.Module):
    """A pre-norm block with a fused qkv and an attention function of the caller's."""

    def __init__(self, attention: Callable[..., Tensor]):
        super().__init__()
        self.attention = attention
        self.ln1, self.ln2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = (t.view(b, s, 4, 8).transpose(1, 2) for t in self.qkv(self.ln1(x)).chunk(3, -1))
        x = x + self.out(self.attention(q, k, v).transpose(1, 2).reshape(b, s, d))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class HandGpt(nn.Module):
    """A GPT as people write it."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(99, 32), nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(HandGptBlock(attend) for _ in range(2))
        self.head = nn.Linear(32, 99, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class RoutedMoe(nn.Module):
    """Experts written as a loop over boolean masks; with `guarded`, each behind an `if mask.any()`."""

    def __init__(self, guarded: bool):
        super().__init__()
        self.guarded = guarded
        self.router = nn.Linear(32, 3)
        self.up = nn.ModuleList(nn.Linear(32, 48) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(48, 32) for _ in range(3))
        self.mixer = HandGptBlock(attend)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(x)
        choice = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for i, (up, down) in enumerate(zip(self.up, self.down)):
            mask = choice == i
            if not self.guarded or mask.any():
                out[mask] = down(F.gelu(up(x[mask])))
        return x + out


class LinearAttention(nn.Module):
    """phi(q) (phi(k)^T v), normalised: an attention without a softmax (Katharopoulos et al., arXiv 2006.16236)."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = (p(x).view(b, s, 4, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        mixed = q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(2).unsqueeze(-1) + 1e-6)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, s, d))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Encoder(nn.Module):
    """`torch.nn.TransformerEncoder` with a head."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def with_x(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A module that takes embedded tokens."""
    return model, {"x": torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))}


MHA = {"heads": (4, 4), "neurons": (48, 48)}
LLAMA = {"kv_groups": (4, 4), "queries": (2, 2), "neurons": (48, 48)}

ZOO: dict[str, Entry] = {
    "bert": Entry(
        "BERT",
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)),
        {"heads": (4, 4), "neurons": (48, 48, 32)},
    ),
    "bert_eager": Entry(
        "BERT (eager attention)", lambda: hf.BertModel(hf.BertConfig(**TEXT, attn_implementation="eager")), MHA
    ),
    "roberta": Entry(
        "RoBERTa",
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT)),
        {"heads": (4, 4), "neurons": (48, 48, 32)},
    ),
    "distilbert": Entry(
        "DistilBERT",
        lambda: hf.DistilBertModel(hf.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48)),
        MHA,
    ),
    "electra": Entry("ELECTRA", lambda: hf.ElectraModel(hf.ElectraConfig(**TEXT, embedding_size=16)), MHA),
    "albert": Entry(
        "ALBERT",
        lambda: hf.AlbertModel(hf.AlbertConfig(**TEXT, embedding_size=16)),
        {"heads": (4,), "neurons": (48,)},
    ),
    "deberta_v2": Entry(
        "DeBERTa-v2",
        lambda: hf.DebertaV2Model(
            hf.DebertaV2Config(**TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8)
        ),
        # The first are the columns of the relative embeddings, which only projections of their own read.
        {"heads": (4, 4), "neurons": (32, 48, 48)},
    ),
    "mpnet": Entry("MPNet", lambda: hf.MPNetModel(hf.MPNetConfig(**TEXT)), {"heads": (4,), "neurons": (48, 48)}),
    "modernbert": Entry("ModernBERT", lambda: hf.ModernBertModel(hf.ModernBertConfig(**TEXT, local_attention=8)), MHA),
    "gpt2": Entry(
        "GPT-2",
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        {"heads": (4, 4), "neurons": (128, 128)},
    ),
    "gpt_neox": Entry("GPT-NeoX", lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT)), MHA),
    "gptj": Entry(
        "GPT-J",
        lambda: hf.GPTJForCausalLM(
            hf.GPTJConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
        ),
        {"heads": (4, 4), "neurons": (128, 128)},
    ),
    "opt": Entry(
        "OPT",
        lambda: hf.OPTForCausalLM(hf.OPTConfig(**TEXT, ffn_dim=48, word_embed_proj_dim=32)),
        MHA,
    ),
    "bloom": Entry(
        "BLOOM",
        lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)),
        {"heads": (4, 4), "neurons": (128, 128)},
    ),
    "falcon_mqa": Entry(
        "Falcon (MQA)",
        lambda: hf.FalconForCausalLM(hf.FalconConfig(**FALCON, multi_query=True)),
        {"heads": (4, 4), "neurons": (128, 128)},
    ),
    "falcon_gqa": Entry(
        "Falcon (GQA)",
        lambda: hf.FalconForCausalLM(hf.FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True)),
        {"kv_groups": (2, 2), "queries": (2, 2), "neurons": (128, 128)},
    ),
    "mpt": Entry(
        "MPT",
        lambda: hf.MptForCausalLM(hf.MptConfig(vocab_size=99, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)),
        {"heads": (4, 4), "neurons": (128, 128)},
    ),
    "llama_mha": Entry(
        "LLaMA (MHA)",
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**GQA, "num_key_value_heads": 8})),
        {"heads": (8, 8), "neurons": (48, 48)},
    ),
    "llama_gqa": Entry("LLaMA (GQA)", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GQA)), LLAMA),
    "llama_mqa": Entry(
        "LLaMA (MQA)",
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**GQA, "num_key_value_heads": 1})),
        {"heads": (8, 8), "neurons": (48, 48)},
    ),
    "llama_tied": Entry(
        "LLaMA (tied embeddings)", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GQA, tie_word_embeddings=True)), LLAMA
    ),
    "mistral": Entry("Mistral", lambda: hf.MistralForCausalLM(hf.MistralConfig(**GQA, sliding_window=4)), LLAMA),
    "qwen2": Entry("Qwen2", lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GQA)), LLAMA),
    "qwen3": Entry("Qwen3", lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GQA)), LLAMA),
    "phi2": Entry("Phi-2", lambda: hf.PhiForCausalLM(hf.PhiConfig(**TEXT)), MHA),
    "phi3": Entry("Phi-3", lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**PLAIN_GQA)), LLAMA),
    "gemma2": Entry("Gemma-2", lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GQA, sliding_window=4)), LLAMA),
    "olmo2": Entry(
        "OLMo-2",
        lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**PLAIN_GQA)),
        {"neurons": (48, 48)},
        frozen="its norm of q and k runs over all heads together: removing a head would change the others",
    ),
    "stablelm": Entry(
        "StableLM", lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**TEXT, num_key_value_heads=4)), MHA
    ),
    "mixtral": Entry(
        "Mixtral",
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GQA, num_local_experts=4)),
        {**LLAMA, "experts": (4, 4)},
    ),
    "qwen2_moe": Entry(
        "Qwen2-MoE",
        lambda: hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**GQA, **MOE, shared_expert_intermediate_size=40)),
        {**LLAMA, "neurons": (40, 24, 40, 24), "experts": (4, 4)},
    ),
    "t5": Entry(
        "T5",
        lambda: hf.T5Model(hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)),
        # The relative bias of the first layer is every layer's, in the encoder and in the decoder.
        {"heads": (4, 4, 4, 4), "neurons": (48,) * 4},
    ),
    "bart": Entry(
        "BART",
        lambda: hf.BartModel(hf.BartConfig(**SEQ2SEQ, max_position_embeddings=64)),
        {"heads": (4,) * 6, "neurons": (48,) * 4},
    ),
    "marian": Entry(
        "Marian",
        lambda: hf.MarianModel(hf.MarianConfig(**SEQ2SEQ, max_position_embeddings=64, pad_token_id=0)),
        {"heads": (4,) * 6, "neurons": (48,) * 4},
    ),
    "whisper": Entry(
        "Whisper",
        lambda: hf.WhisperModel(hf.WhisperConfig(**SEQ2SEQ, **SOUND_IN)),
        # The first are the channels between the two convolutions.
        {"heads": (4,) * 6, "neurons": (32, 48, 48, 48, 48)},
    ),
    "vit": Entry("ViT", lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)), MHA),
    "deit": Entry("DeiT", lambda: hf.DeiTModel(hf.DeiTConfig(**VISION)), {"heads": (4, 4), "neurons": (48, 48)}),
    "dinov2": Entry(
        "DINOv2",
        lambda: hf.Dinov2Model(hf.Dinov2Config(**{**VISION, "mlp_ratio": 2})),
        {"heads": (4, 4), "neurons": (64, 64)},
    ),
    "swin": Entry(
        "Swin",
        lambda: hf.SwinModel(
            hf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
        ),
        {"heads": (2, 2, 4, 4), "neurons": (64, 64, 128, 128)},
    ),
    "clip": Entry(
        "CLIP (both towers)",
        lambda: hf.CLIPModel(
            hf.CLIPConfig(
                text_config={**TEXT, "eos_token_id": 98, "bos_token_id": 97}, vision_config=VISION, projection_dim=16
            )
        ),
        {"heads": (4,) * 4, "neurons": (48,) * 4},
    ),
    "wav2vec2": Entry(
        "Wav2Vec2",
        lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**TEXT, **WAVES)),
        {"heads": (4, 4), "neurons": (16, 48, 48)},
    ),
    "nn_encoder": Entry("nn.TransformerEncoder", lambda: with_x(Encoder()), MHA),
    "nn_mha": Entry(
        "nn.MultiheadAttention (written out)",
        lambda: with_x(WrittenOutAttention()),
        {"heads": (4,), "neurons": (48,)},
    ),
    "hand_gpt": Entry(
        "a hand-written GPT",
        lambda: (HandGpt(), {"ids": torch.randint(0, 99, (2, 7), generator=torch.Generator().manual_seed(0))}),
        MHA,
    ),
    "routed_moe": Entry(
        "experts in a loop over masks",
        lambda: with_x(RoutedMoe(guarded=False)),
        {"heads": (4,), "neurons": (48, 48, 48, 48)},
    ),
    "linear_attention": Entry("linear attention", lambda: with_x(LinearAttention()), {"heads": (4,), "neurons": (48,)}),
}
