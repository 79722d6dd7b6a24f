"""The encoder in plain torch, made tensor-parallel by torch's `parallelize_module`.

Query, key and value are one linear layer here, too, its rows ordered so that a shard of
them is that of some heads. (As three layers they would sum their input's gradient three times.)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from encoder import NORM_EPSILON, Size
from megatron import Training, load
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)


class Block(nn.Module):
    """Attention and MLP; the number of heads is that of what `qkv` gives."""

    def __init__(self, size: Size):
        super().__init__()
        self.per_head = size.per_head
        self.attention_norm = nn.LayerNorm(size.width, NORM_EPSILON)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.mlp_norm = nn.LayerNorm(size.width, NORM_EPSILON)
        self.up = nn.Linear(size.width, size.hidden)
        self.down = nn.Linear(size.hidden, size.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(rows, tokens, -1, 3, self.per_head)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(attended.reshape(rows, tokens, -1))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Encoder(nn.Module):
    """All of it, of one process; `forward` gives the loss."""

    def __init__(self, size: Size):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.blocks)))
        self.norm = nn.LayerNorm(size.width, NORM_EPSILON)
        self.head = nn.Linear(size.width, size.shapes["head/bias"][0])
        load(self, size)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.norm(self.blocks(x))).flatten(0, 1), y.flatten())


def parallelized(size: Size) -> Training:
    model = Encoder(size)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {}
    for i in range(size.blocks):
        plan |= {f"blocks.{i}.{name}": ColwiseParallel() for name in ("qkv", "up")}
        plan |= {f"blocks.{i}.{name}": RowwiseParallel() for name in ("out", "down")}
    if size.head_layout == "columns":
        plan["head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, plan)
    # `foreach` takes no mixture of the two.
    parameters = list(model.parameters())
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    plain = [p for p in parameters if not isinstance(p, DTensor)]
    return Training(model, [sharded, plain], size)
