"""What tests of generation share: small decoders of every make with every number re-randomised, and torch's own loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from checks import randomise
from tilecut import PruneConfig, compile_pruned

VOCAB, POSITIONS = 97, 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
CONFIGS: Mapping[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    ),
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=9),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=16, sliding_window=9),
}


# Of one encoder and one decoder.
PAIR: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 3,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
PAIRS: Mapping[str, Any] = {
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**PAIR, num_mel_bins=16, max_source_positions=40, max_target_positions=100)
    ),
    "mbart": lambda: transformers.MBartForConditionalGeneration(
        transformers.MBartConfig(**PAIR, max_position_embeddings=POSITIONS)
    ),
}


def pair(name: str) -> Any:
    """An encoder-decoder of `PAIRS`, in eval mode."""
    # Of the first seeds the one whose texts hold most tokens.
    return talkative(PAIRS[name]().eval(), 3 if name == "t5" else 0)


def decoder(name: str, seed: int = 0) -> Any:
    """A model of `CONFIGS`, in eval mode."""
    return talkative(transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()), seed)


def talkative(model: nn.Module, seed: int = 0) -> Any:
    """Every number re-randomised, so that greedy texts do not end in one token for ever: attention outweighs the last token."""
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(".q.weight"):
                # T5 has no scale but the one in these weights.
                parameter.copy_(noise * 0.1)
            elif parameter.ndim > 1:
                parameter.copy_(noise * (1.0 if "relative_attention_bias" in name else 0.4))
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.05)
            elif "gemma" not in type(model).__name__.lower():
                parameter.copy_(1 + noise * 0.2)
    return model


def uneven_llama(output: Path) -> Any:
    """An artifact with a cache of `decoder("llama")`, pruned so that its layers have one KV group and two."""
    ids = torch.randint(0, VOCAB, (8, 12), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]
    kept = {
        "model.layers.0.self_attn:kv_groups": 1,
        "model.layers.1.self_attn:kv_groups": 2,
        "model.layers.1.self_attn:queries": 1,
    }
    config = PruneConfig(sparsity=0.4, at={"sequence": 16}, min_units=kept, max_units=kept, cache="")
    return compile_pruned(
        decoder("llama"), "edge", None, batches, config, output, generate=True, measure=False
    )


def calm(model: Any) -> Any:
    """The model with small numbers in its layers: those of 64 random channels are no match for 4 bits.

    The residual stream carries most of the text then.
    """
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.parameters():
                parameter *= 0.2 if parameter.ndim > 1 else 1
    return model


def greedy(run: Any, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """The most likely tokens, one row at a time, the whole text computed anew for every token.

    Args:
        run: ids [1, S] -> logits [1, S, V].
    """
    found = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(steps):
            with torch.no_grad():
                ids.append(int(run(torch.tensor([ids]))[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


class Written(nn.Module):
    """A decoder written by hand, of one or two layers; the options say how positions come in and what stands between."""

    def __init__(self, positions: str = "learned", between: str = "nothing", causal: bool = True, cut: bool = False):
        super().__init__()
        self.positions, self.between, self.causal, self.cut = positions, between, causal, cut
        self.words, self.places = nn.Embedding(VOCAB, 32), nn.Embedding(POSITIONS, 32)
        self.first, self.second = nn.Linear(32, 96), nn.Linear(32, 96)
        self.mixer, self.head = nn.Conv1d(32, 32, 3, padding=1), nn.Linear(32, VOCAB)
        angles = torch.arange(POSITIONS)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
        self.register_buffer("cos", torch.cat((angles.cos(), angles.cos()), -1))
        self.register_buffer("sin", torch.cat((angles.sin(), angles.sin()), -1))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        length = ids.shape[1]
        x = self.words(ids)
        if self.positions == "learned":
            x = x + self.places(torch.arange(length))
        elif self.positions == "slice":
            x = x + self.places.weight[None, :length]
        elif self.positions == "counted":
            assert mask is not None
            x = x + self.places((mask.cumsum(1) - 1) * mask)
        elif self.positions == "stretched":
            x = x + self.places(torch.arange(length)) * (1.0 / length)
        x = x + self.attend(self.first, x, mask)
        if self.between == "convolution":
            x = x + self.mixer(x.transpose(1, 2)).transpose(1, 2)
        elif self.between == "mean":
            x = x + x.mean(1, keepdim=True)
        elif self.between == "shift":
            x = x + torch.roll(x, 1, 1)
        elif self.between == "running sum":
            x = x + x.cumsum(1)
        elif self.between == "best tokens":
            best = x.sum(-1).topk(1, 1).indices
            x = x + x.gather(1, best[..., None].expand(-1, -1, 32))
        elif self.between == "best rows":
            # Each row takes what comes behind it when rows are sorted by what they hold.
            rows = x.flatten(0, 1)
            score = torch.cat((rows[:, :1], rows[:, 1:2]), 1)
            order = score.topk(1, -1).values.flatten().argsort()
            x = x + rows[order].unflatten(0, x.shape[:2])
        elif self.between == "pairs":
            x = x + (x @ x.transpose(1, 2)) @ x * 0.01
        if not self.cut:
            x = x + self.attend(self.second, x, mask)
        return self.head(torch.tanh(x))

    def attend(self, layer: nn.Linear, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in layer(x).chunk(3, -1))
        if self.positions == "rotary":
            cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]  # type: ignore[index]
            q, k = (t * cos + torch.cat((-t[..., 4:], t[..., :4]), -1) * sin for t in (q, k))
        scores = q @ k.transpose(-1, -2) * 8**-0.5
        at = torch.arange(x.shape[1])
        behind = at[:, None] - at
        if self.positions == "bias":
            scores = scores + 0.1 * (behind * at * 1.0).sin()
        elif self.positions == "relative":
            # A number for every distance, those of 12 and further alike, and for every head.
            scores = scores + self.places.weight[behind.clamp(0, 12), :4].permute(2, 0, 1)
        elif self.positions == "alibi":
            # Counted from the start of the text.
            scores = scores + torch.tensor([0.5, 0.25, 0.1, 0.05])[:, None, None] * at
        elif self.positions == "ever":
            scores = scores - 0.1 * (behind.abs() + 1.0).log()
        if self.causal:
            scores = scores + torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def written(positions: str = "learned", **options: Any) -> tuple[Written, dict[str, Tensor]]:
    """A hand-written decoder and its example inputs."""
    model = randomise(Written(positions, **options))
    ids = torch.randint(0, VOCAB, (2, 9))
    return model, {"ids": ids, "mask": torch.ones_like(ids)} if positions == "counted" else {"ids": ids}
