"""CLIP's text encoder for inference on a GPU: the last hidden state of ``CLIPTextModel``, in half the launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel

from tiue_cli.model.fast.layers import NotFusable, plain_layer
from tiue_cli.model.fast.ops import Ops


class FastTextEncoder:
    """Token numbers (B, L) → text states (B, L, D). Weights are read when it is made. Raises NotFusable."""

    def __init__(self, encoder: CLIPTextModel, ops: Ops) -> None:
        # Newer releases of transformers have the layers in the model itself.
        model: Any = getattr(encoder, "text_model", encoder)
        if getattr(encoder.config, "use_attention_mask", False):
            raise NotFusable("the text encoder wants a padding mask", hint="run it plainly")
        self._ops = ops
        self._tokens = plain_layer(model.embeddings.token_embedding, nn.Embedding).weight.detach()
        self._places = plain_layer(model.embeddings.position_embedding, nn.Embedding).weight.detach()
        self._layers = [_Layer(layer, encoder.config.hidden_act, ops) for layer in model.encoder.layers]
        self._norm = _norm(model.final_layer_norm)

    def __call__(self, ids: Tensor) -> Tensor:
        """See the class."""
        tokens = F.embedding(ids, self._tokens) + self._places[: ids.shape[1]]
        addend = None
        for layer in self._layers:
            tokens, addend = layer(tokens, addend)
        weight, bias, eps = self._norm
        return self._ops.add_layer_norm(tokens, addend, weight, bias, eps=eps)[1]


class _Layer:
    """One layer; what it adds last is handed on, for the next norm to add."""

    def __init__(self, layer: Any, activation: str, ops: Ops) -> None:
        activations: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": ops.quick_gelu, "gelu": F.gelu}
        if activation not in activations:
            raise NotFusable(f"the text encoder's activation is {activation}", hint="run it plainly")
        self._ops, self._activation = ops, activations[activation]
        attention = layer.self_attn
        self._heads = attention.num_heads
        joined = [plain_layer(each, nn.Linear) for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self._qkv = tuple(torch.cat([getattr(each, name).detach() for each in joined]) for name in ("weight", "bias"))
        self._out, self._wide, self._narrow = (
            (plain_layer(each, nn.Linear).weight.detach(), each.bias.detach())
            for each in (attention.out_proj, layer.mlp.fc1, layer.mlp.fc2)
        )
        self._norms = _norm(layer.layer_norm1), _norm(layer.layer_norm2)

    def __call__(self, tokens: Tensor, addend: Tensor | None) -> tuple[Tensor, Tensor]:
        tokens, normed = self._add_norm(tokens, addend, 0)
        parts = F.linear(normed, *self._qkv).chunk(3, dim=-1)
        query, key, value = (each.unflatten(-1, (self._heads, -1)).transpose(1, 2) for each in parts)
        answers = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        tokens, normed = self._add_norm(tokens, F.linear(answers.transpose(1, 2).flatten(2), *self._out), 1)
        return tokens, F.linear(self._activation(F.linear(normed, *self._wide)), *self._narrow)

    def _add_norm(self, tokens: Tensor, addend: Tensor | None, which: int) -> tuple[Tensor, Tensor]:
        weight, bias, eps = self._norms[which]
        return self._ops.add_layer_norm(tokens, addend, weight, bias, eps=eps)


def _norm(layer: Any) -> tuple[Tensor, Tensor, float]:
    layer = plain_layer(layer, nn.LayerNorm)
    return layer.weight.detach(), layer.bias.detach(), layer.eps
