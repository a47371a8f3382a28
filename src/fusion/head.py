"""A causal LM with its loss inside: hidden states go straight into `fusion_loss`, no logits are made.

The loss is computed inside the forward pass of the module that owns the head, which is what makes it exact under
FSDP2: there the head's weight is whole, and its gradient is reduced like every other.
"""

import copy
import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from fusion.objective import IGNORED, FusionLoss, fusion_loss, fusion_loss_from_logits
from fusion.topk import TopK


class Head(NamedTuple):
    """logits = softcap·tanh(linear(hidden)·scale / softcap); None: not there."""

    linear: nn.Linear
    scale: float | None
    softcap: float | None


class FusedLM(nn.Module):
    """`lm`, a causal LM of transformers, called with tokens and distributions and answering with the loss."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm
        self.head = head_of(lm)
        if self.head is None:
            warnings.warn(
                f"the head of {type(lm).__name__} is no plain linear map: the loss takes the slower exact path, "
                "through logits of all positions",
                stacklevel=2,
            )

    def forward(self, ids_BT: Tensor, labels_BT: Tensor, fused: TopK | None, **options: Any) -> FusionLoss:
        """`labels_BT` are not shifted: position t learns from label t + 1 and from the distribution at t.

        `options` are those of `fusion_loss`: lambda_clm, temperature, divergence, tail, chunk, tokens, fused_tokens.
        Padding must stand on the right, where a causal model does not see it.
        """
        labels_N = pad(labels_BT[:, 1:], (0, 1), value=IGNORED).flatten()
        flat = None if fused is None else TopK(fused.ids.flatten(0, 1), fused.logprobs.flatten(0, 1))
        if self.head is None:
            logits_NV = self.lm(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)
            return fusion_loss_from_logits(logits_NV, labels_N, flat, **options)
        hidden_ND = self.lm.base_model(input_ids=ids_BT, use_cache=False)[0].flatten(0, 1)
        layer, scale, softcap = self.head
        head = {"bias": layer.bias, "softcap": softcap, "scale": scale}
        return fusion_loss(hidden_ND, layer.weight, labels_N, flat, **head, **options)


def head_of(lm: nn.Module) -> Head | None:
    """The head of a causal LM, found by trying: None if it is not a linear map, scaled and soft-capped at most.

    The model's own forward runs with its body replaced by one that answers with given hidden states and its head by
    a small one, at three magnitudes: tiny (the slope is the scale), huge (the ceiling is the soft-cap), and between
    (is that all?). So no list of model classes or config names is needed, and no weights: a model on the meta device
    or in shards is asked the same way.
    """
    layer, body = lm.get_output_embeddings(), getattr(lm, "base_model", lm)
    names = {id(child): name for name, child in lm._modules.items()}
    if type(layer) is not nn.Linear or not {id(layer), id(body)} <= names.keys():
        return None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        small = nn.Linear(layer.in_features, 64, bias=layer.bias is not None, dtype=torch.float64)
        unit = torch.randn(1, 4, layer.in_features, dtype=torch.float64)
        unit /= linear(unit, small.weight).std()

        def logits(hidden: Tensor) -> Tensor:
            double = _shallow(lm)
            double._modules |= {names[id(layer)]: small, names[id(body)]: _answering(body, hidden)}
            return double(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False).logits.double()

        bias = small.bias if small.bias is not None else 0
        try:
            scale = float(((logits(1e-2 * unit) - logits(-1e-2 * unit)) / linear(2e-2 * unit, small.weight)).median())
            ceiling = float(logits(1e9 * unit).abs().max())
            softcap = ceiling if ceiling < 1e6 else None
            got, wanted = logits(30 / scale * unit), (linear(30 / scale * unit, small.weight) + bias) * scale
        except Exception:  # a forward pass that needs more of its body than hidden states is no plain head
            return None
        wanted = softcap * (wanted / softcap).tanh() if softcap else wanted
        if not torch.allclose(got, wanted, rtol=1e-3, atol=1e-3):
            return None
    return Head(layer, None if abs(scale - 1) < 1e-5 else _rounded(scale), softcap and _rounded(softcap))


def _rounded(value: float) -> float:
    """Seven significant digits: what a config states, without the noise of measuring it in float32."""
    return float(f"{value:.7g}")


def _shallow(module: nn.Module) -> nn.Module:
    """A copy that shares everything but the tables of its attributes and children."""
    twin = copy.copy(module)
    twin.__dict__ = dict(module.__dict__)
    twin._modules = dict(module._modules)
    return twin


def _answering(body: nn.Module, hidden: Tensor) -> nn.Module:
    """`body`, answering with `hidden` whatever it is asked."""
    twin = _shallow(body)
    twin.forward = lambda *_, **__: _Answer(last_hidden_state=hidden)
    return twin


class _Answer(SimpleNamespace):
    """A model output that has every field: the hidden states, else None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, at: Any) -> Any:
        return () if isinstance(at, slice) else self.last_hidden_state if at == 0 else None
