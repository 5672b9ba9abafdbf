"""Floating-point operations of a forward, with what torch's counter leaves out: fused LSTMs, grouped products, products
in place, and attention on a CPU."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .moe import MoE


def count_flops(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Operations of `forward()`, which calls `model`, without gradients; a multiply-add is two.

    Every `MoE` takes its segment backend meanwhile, which does what the router asked for and no more: the count says
    what the model costs, not how much a batch of this size pads.
    """
    aten = torch.ops.aten
    mapping = {aten.mkldnn_rnn_layer: _mkldnn_rnn, aten._cudnn_rnn: _cudnn_rnn}
    mapping |= {aten.addmm_: _product, aten.baddbmm_: _product, aten._grouped_mm: _grouped}
    mapping[aten._scaled_dot_product_flash_attention_for_cpu] = _attention
    with _exact(model), torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        forward()
    return int(counter.get_total_flops())


@contextmanager
def _exact(model: nn.Module) -> Any:
    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    before = [layer.backend for layer in layers]
    try:
        for layer in layers:
            layer.backend = "segment"
        yield
    finally:
        for layer, backend in zip(layers, before, strict=True):
            layer.backend = backend


def _mkldnn_rnn(
    x: Sequence[int], weight0: Sequence[int], weight1: Sequence[int], *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return _recurrent(x, [weight0, weight1])


def _cudnn_rnn(x: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _recurrent(x, weights)


def _product(_sum: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    return 2 * prod(left) * right[-1]


def _grouped(rows: Sequence[int], matrices: Sequence[int], *_: Any, **__: Any) -> int:
    """Every row meets one of the matrices."""
    return 2 * prod(rows) * matrices[-1]


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Every query meets every key and every value, masked or not, as torch counts it on a GPU."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(x: Sequence[int], weights: Sequence[Sequence[int]]) -> int:
    """Every matrix of the cell meets every row of every time step; x is [time, batch, features] in either order."""
    return 2 * x[0] * x[1] * sum(shape[0] * shape[1] for shape in weights if len(shape) == 2)
