"""The encoder as one would write it by hand for two or more ranks, after Megatron-LM.

Shoeybi et al. 2019, section 3. Query, key and value are one linear layer, cut by heads, and the
MLP's first one is cut by columns: their input goes through `f`, whose backward sums its gradient.
What follows is cut by rows: `g` sums its output. That makes two all-reduces forward and two
backward a block, each of one activation, and is what tensor parallelism costs at least.

The head is whole on every rank ("whole"), or cut by classes ("columns"): then the
loss, too, is computed on shards, for an all-reduce of one activation in backward and three
of a number for each token.

"Overlapped" is the same with what Megatron-LM does besides: the all-reduce of a column layer's
input gradient goes on while its weight gradient is computed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from encoder import ADAM_EPSILON, NORM_EPSILON, Size
from torch import nn


class _F(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()  # a linear layer made it, and nobody else has it
        dist.all_reduce(gradient)
        return gradient


class _G(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class _ShardedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of logits of which each rank has some classes."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        most = logits.amax(-1)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        shifted = logits - most[:, None]
        y = y - dist.get_rank() * logits.shape[1]
        mine = (y >= 0) & (y < logits.shape[1])
        y = y.clamp(0, logits.shape[1] - 1)
        right = shifted.gather(1, y[:, None])[:, 0] * mine
        dist.all_reduce(right)
        exponentials = shifted.exp_()
        total = exponentials.sum(-1)
        dist.all_reduce(total)
        ctx.save_for_backward(exponentials.div_(total[:, None]), y, mine)
        return (total.log() - right).mean()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        probabilities, y, mine = ctx.saved_tensors
        logits = probabilities.clone()
        logits[torch.arange(len(y)), y] -= mine.to(logits.dtype)
        return logits.mul_(gradient / len(y)), None


class Columns(nn.Linear):
    """This rank's columns of a linear layer; its output is a shard."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(_F.apply(x), self.weight, self.bias)


class _Overlapped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        given = (gradient @ weight).contiguous()
        work = dist.all_reduce(given, async_op=True)
        flat = gradient.flatten(0, -2)
        learnt = flat.T @ x.flatten(0, -2), flat.sum(0)
        work.wait()
        return given, *learnt


class OverlappedColumns(Columns):
    """This rank's columns, whose backward computes while it communicates."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Overlapped.apply(x, self.weight, self.bias)


class Rows(nn.Linear):
    """This rank's rows of a linear layer, whose input is a shard."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _G.apply(F.linear(x, self.weight)) + self.bias


class Block(nn.Module):
    """Attention and MLP, of this rank's heads and hidden units."""

    def __init__(self, size: Size, ranks: int, columns: type[Columns]):
        super().__init__()
        self.per_head = size.per_head
        self.attention_norm = nn.LayerNorm(size.width, NORM_EPSILON)
        self.qkv = columns(size.width, 3 * size.width // ranks)
        self.out = Rows(size.width // ranks, size.width)
        self.mlp_norm = nn.LayerNorm(size.width, NORM_EPSILON)
        self.up = columns(size.width, size.hidden // ranks)
        self.down = Rows(size.hidden // ranks, size.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(rows, tokens, -1, 3, self.per_head)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(attended.reshape(rows, tokens, -1))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Encoder(nn.Module):
    """All of it; `forward` gives the loss."""

    def __init__(self, size: Size, columns: type[Columns]):
        super().__init__()
        ranks = dist.get_world_size()
        self.blocks = nn.Sequential(*(Block(size, ranks, columns) for _ in range(size.blocks)))
        self.norm = nn.LayerNorm(size.width, NORM_EPSILON)
        classes = size.shapes["head/bias"][0]
        self.cut = size.head_layout == "columns"
        if self.cut:
            self.head: nn.Linear = columns(size.width, classes // ranks)
        else:
            self.head = nn.Linear(size.width, classes)
        load(self, size, ranks, dist.get_rank())

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.norm(self.blocks(x))).flatten(0, 1)
        if self.cut:
            return _ShardedCrossEntropy.apply(logits, y.flatten())
        return F.cross_entropy(logits, y.flatten())


@torch.no_grad()
def load(model: nn.Module, size: Size, ranks: int = 1, rank: int = 0) -> None:
    """Copies rank's shards of the weights into a model whose parts are named as those of Encoder.

    Rows of `qkv.weight` are ordered by head, then query, key and value.
    """
    w = {name: torch.from_numpy(value) for name, value in size.weights()}

    def mine(value: torch.Tensor, dim: int) -> torch.Tensor:
        return value.chunk(ranks, dim)[rank]

    def dense(layer: Any, name: str, cut: int | None) -> None:
        kernel, bias = w[f"{name}/kernel"], w[f"{name}/bias"]
        layer.weight.copy_((kernel if cut is None else mine(kernel, cut)).T)
        layer.bias.copy_(mine(bias, 0) if cut == 1 else bias)

    def norm(layer: Any, name: str) -> None:
        layer.weight.copy_(w[f"{name}/gamma"])
        layer.bias.copy_(w[f"{name}/beta"])

    for i, block in enumerate(model.blocks):
        norm(block.attention_norm, f"attention_norm_{i}")
        path, parts = f"attention_{i}", ("query", "key", "value")
        kernel = torch.stack([w[f"{path}/{part}/kernel"] for part in parts], 2)
        bias = torch.stack([w[f"{path}/{part}/bias"] for part in parts], 1)
        block.qkv.weight.copy_(mine(kernel, 1).reshape(size.width, -1).T)
        block.qkv.bias.copy_(mine(bias, 0).reshape(-1))
        out = mine(w[f"{path}/attention_output/kernel"], 0)
        block.out.weight.copy_(out.reshape(-1, size.width).T)
        block.out.bias.copy_(w[f"{path}/attention_output/bias"])
        norm(block.mlp_norm, f"mlp_norm_{i}")
        dense(block.up, f"up_{i}", 1)
        dense(block.down, f"down_{i}", 0)
    norm(model.norm, "norm")
    dense(model.head, "head", 1 if size.head_layout == "columns" else None)


class Training:
    """Steps of Adam on one batch.

    Args:
        model: gives the loss of a batch.
        groups: its parameters, in lists that `foreach` may put together.
        size: of the batch.
    """

    def __init__(self, model: nn.Module, groups: list[list[Any]], size: Size):
        self.model = model
        self.optimizer = torch.optim.Adam(
            [{"params": group} for group in groups if group], eps=ADAM_EPSILON, foreach=True
        )
        x, y = size.batch()
        self.batch = torch.from_numpy(x), torch.from_numpy(y).long()

    def step(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.model(*self.batch)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def loss(self) -> float:
        """Of one more step."""
        return float(self.step())

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def hand_written(size: Size, overlapped: bool = False) -> Training:
    model = Encoder(size, OverlappedColumns if overlapped else Columns)
    return Training(model, [list(model.parameters())], size)
