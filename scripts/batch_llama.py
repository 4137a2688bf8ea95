"""Write thousands of answers at a time with a small LLaMA or Qwen2 model, and keep the hidden states on the way.

Self-distillation needs tens of millions of tokens of the base model's own text, with the state behind every token.
A decoding step over 4,096 sequences costs a GPU little more than one over 64, so this is a plain fixed-width loop:
left-padded prompts, one key/value cache, finished sequences dropped from the batch as it empties. Greedy or sampled at
one temperature. It is for models with tied embeddings, like SmolLM2 and Qwen2.5's small ones.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

PREFILL_SCORES = 512 * 128 * 128
"""Attention scores of a head, over all prompts that run through the model together before decoding."""

PREFILL_TOKENS = 65536
"""Their tokens, padding included."""


@dataclass(frozen=True)
class Answers:
    """tokens [B, T], hidden [B, T, H] (the state before each token), lengths [B], the end token included."""

    tokens: Tensor
    hidden: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class _Layer:
    norm_in: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    norm_mlp: Tensor
    gate_up: Tensor
    down: Tensor


class BatchLlama:
    """The model's weights, fused where that saves kernels."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype) -> None:
        config = json.loads((folder / "config.json").read_text())
        weights = {k: v.to(device, dtype) for k, v in load_file(folder / "model.safetensors").items()}
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.eps, self.end = config["rms_norm_eps"], config["eos_token_id"]
        self.ends = torch.tensor(_end_tokens(folder, self.end), device=device)
        self.embedding = weights["model.embed_tokens.weight"]
        self.norm = weights["model.norm.weight"]
        self.device, self.dtype = torch.device(device), dtype
        self.layers = [self._layer(weights, f"model.layers.{i}.") for i in range(config["num_hidden_layers"])]
        steps = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        angles = torch.arange(4096, device=device, dtype=torch.float32).unsqueeze(1) / config["rope_theta"] ** steps
        angles = torch.cat([angles, angles], dim=-1)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self._stream = self._streaming_kernel() if self.device.type == "cuda" else None

    def _streaming_kernel(self) -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor] | None:
        """The fused decoding attention, once it has agreed with the plain one on this GPU; None where it does not."""
        try:
            from decode_attention import decode_attention
        except ImportError as problem:
            warnings.warn(f"decoding without the fused kernel: {problem}", stacklevel=2)
            return None
        query = torch.randn(8, self.heads, 1, self.head_dim, device=self.device, dtype=self.dtype)
        cache = torch.randn(2, 8, self.kv_heads, 80, self.head_dim, device=self.device, dtype=self.dtype)
        fill = torch.arange(8, device=self.device)
        mask = (torch.arange(70, device=self.device) >= fill[:, None]).unsqueeze(1)
        plain = self._attend(query, cache[0, :, :, :70], cache[1, :, :, :70], mask)[:, 0]
        fused = decode_attention(query[:, :, 0], cache[0], cache[1], fill, 70).flatten(1)
        error = float((plain - fused).float().norm() / plain.float().norm())
        if not error < 2e-2:
            warnings.warn(f"decoding without the fused kernel: it is off by {error:.2e}", stacklevel=2)
            return None
        return decode_attention

    @staticmethod
    def _layer(weights: dict[str, Tensor], prefix: str) -> _Layer:
        def take(*names: str, kind: str = "weight") -> Tensor:
            return torch.cat([weights[f"{prefix}{name}.{kind}"] for name in names])

        qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        return _Layer(
            norm_in=take("input_layernorm"),
            qkv=take(*qkv),
            qkv_bias=take(*qkv, kind="bias") if f"{prefix}{qkv[0]}.bias" in weights else None,
            out=take("self_attn.o_proj"),
            norm_mlp=take("post_attention_layernorm"),
            gate_up=take("mlp.gate_proj", "mlp.up_proj"),
            down=take("mlp.down_proj"),
        )

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def _heads(self, x: Tensor, layer: _Layer, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys and values. [B, S, H] -> [B, heads, S, D] each."""
        b, s, _ = x.shape
        mixed = F.linear(self._norm(x, layer.norm_in), layer.qkv, layer.qkv_bias)
        mixed = mixed.view(b, s, -1, self.head_dim).transpose(1, 2)
        turned, value = mixed[:, : -self.kv_heads], mixed[:, -self.kv_heads :]
        half = self.head_dim // 2
        swapped = torch.cat([-turned[..., half:], turned[..., :half]], dim=-1)
        turned = turned * self.cos[position].unsqueeze(1) + swapped * self.sin[position].unsqueeze(1)
        return turned[:, : self.heads], turned[:, self.heads :], value

    def _mlp(self, x: Tensor, layer: _Layer) -> Tensor:
        gate, up = F.linear(self._norm(x, layer.norm_mlp), layer.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, layer.down)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Grouped attention: the queries that share a key/value head stand beside each other as rows."""
        b, _, s, d = query.shape
        grouped = query.reshape(b, self.kv_heads, -1, d)  # [B, KV, group * S, D]
        wide = mask.repeat(1, self.heads // self.kv_heads, 1).unsqueeze(1)  # [B, 1, group * S, T]
        scores = (grouped @ keys.transpose(-1, -2)).float() * d**-0.5
        weights = scores.masked_fill(~wide, float("-inf")).softmax(dim=-1).to(query.dtype)
        return (weights @ values).view(b, self.heads, s, d).transpose(1, 2).reshape(b, s, -1)

    def _forward(
        self,
        tokens: Tensor,
        position: Tensor,
        mask: Tensor,
        caches: list[Tensor],
        at: int,
        row: slice,
        fill: Tensor | None = None,
    ) -> Tensor:
        """Final-norm hidden states; keys and values go to the cache at `at`. [B, S] -> [B, S, H].

        `fill` says that this is a decoding step (S = 1) and how many slots to leave out.
        """
        x = self.embedding[tokens]
        end = at + tokens.shape[1]
        for layer, cache in zip(self.layers, caches, strict=True):
            query, key, value = self._heads(x, layer, position)
            cache[0, row, :, at:end], cache[1, row, :, at:end] = key, value
            if self._stream is not None and fill is not None:
                mixed = self._stream(query[:, :, 0], cache[0], cache[1], fill, end).flatten(1).unsqueeze(1)
            else:
                mixed = self._attend(query, cache[0, row, :, :end], cache[1, row, :, :end], mask)
            x = x + F.linear(mixed, layer.out)
            x = self._mlp(x, layer)
        return self._norm(x, self.norm)

    def _prefill(self, prompts: list[list[int]], caches: list[Tensor], width: int) -> tuple[Tensor, Tensor]:
        """Hidden state of each prompt's last token [B, H], and the number of padding tokens before it [B]."""
        fill = torch.tensor([width - len(p) for p in prompts], device=self.device)
        tokens = torch.tensor([[self.end] * (width - len(p)) + p for p in prompts], device=self.device)
        slots = torch.arange(width, device=self.device)
        last, together = [], max(1, min(PREFILL_SCORES // width**2, PREFILL_TOKENS // width))
        for start in range(0, len(prompts), together):
            row = slice(start, min(start + together, len(prompts)))
            position = (slots - fill[row, None]).clamp(min=0)
            real = slots >= fill[row, None]
            mask = (slots.unsqueeze(0) <= slots.unsqueeze(1)) & real.unsqueeze(1)
            mask = mask | torch.eye(width, dtype=torch.bool, device=self.device)  # padding rows attend to themselves
            last.append(self._forward(tokens[row], position, mask, caches, 0, row)[:, -1])
        return torch.cat(last), fill

    def _choose(self, hidden: Tensor, temperature: float, top_k: int) -> Tensor:
        logits = F.linear(hidden, self.embedding)
        if temperature == 0.0:
            return logits.argmax(dim=-1)
        scaled = logits.float() / temperature
        if top_k:
            scaled = scaled.masked_fill(scaled < scaled.topk(top_k, dim=-1).values[:, -1:], float("-inf"))
        # The largest of p / exponential noise is a draw from p.
        return (scaled.softmax(dim=-1) / torch.empty_like(scaled).exponential_().clamp_(min=1e-20)).argmax(dim=-1)

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], max_tokens: int, temperature: float, top_k: int = 0) -> Answers:
        count, width = len(prompts), max(len(p) for p in prompts)
        shape = (2, count, self.kv_heads, width + max_tokens, self.head_dim)
        caches = [torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in self.layers]
        hidden, fill = self._prefill(prompts, caches, width)
        tokens = torch.full((count, max_tokens), self.end, device=self.device)
        states = torch.zeros(count, max_tokens, hidden.shape[-1], device=self.device, dtype=self.dtype)
        lengths = torch.full((count,), max_tokens, device=self.device)
        active = torch.arange(count, device=self.device)
        alive = torch.ones(count, dtype=torch.bool, device=self.device)
        slots = torch.arange(width + max_tokens, device=self.device)
        for t in range(max_tokens):
            chosen = self._choose(hidden, temperature, top_k)
            tokens[active, t], states[active, t] = chosen, hidden
            ended = torch.isin(chosen, self.ends) & alive
            lengths[active[ended]] = t + 1
            alive = alive & ~ended
            if t % 16 == 15 and int(alive.sum()) < 0.8 * alive.numel():  # the check waits for the GPU: not every step
                keep = alive.nonzero().flatten()
                if keep.numel() == 0:
                    break
                for i, cache in enumerate(caches):
                    caches[i] = cache[:, keep]
                active, fill, chosen, alive = active[keep], fill[keep], chosen[keep], alive[keep]
            if t + 1 == max_tokens:
                break
            at = width + t
            mask = (slots[: at + 1] >= fill[:, None]).unsqueeze(1)
            position = (at - fill).unsqueeze(1)
            hidden = self._forward(chosen.unsqueeze(1), position, mask, caches, at, slice(None), fill)[:, 0]
        return Answers(tokens, states, lengths)


def _end_tokens(folder: Path, end: int) -> list[int]:
    """Tokens that end an answer: those of generation_config.json, which may name several."""
    path = folder / "generation_config.json"
    found = json.loads(path.read_text()).get("eos_token_id", end) if path.exists() else end
    return found if isinstance(found, list) else [found]
