"""Efficient probing: queries attend to the tokens of a frozen encoder (arXiv 2506.10178).

Written anew after the paper and its reference implementation, billpsomas/efficient-probing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUERY_STD = 0.02  # reference, poolings/ep.py


class AttentivePool(nn.Module):
    """Tokens (B, L, D) to (B, D): query j's attention pools the j-th of `queries` equal slices of the channels.

    Queries attend to the tokens themselves, scaled by D^-0.5; there is no key projection. With `projection` the
    channels are those of a value projection without bias, as in the reference, else the tokens' own. Values are
    projected after they are pooled, which is the same function at the share queries / D of the cost.
    """

    def __init__(self, width: int, queries: int, projection: bool):
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, width) * QUERY_STD)
        self.value = nn.Linear(width, width, bias=False) if projection else None

    def forward(self, tokens: Tensor) -> Tensor:
        queries = len(self.query)
        query = self.query.expand(tokens.shape[0], 1, -1, -1)  # len() would fix the batch of an exported graph
        pooled = F.scaled_dot_product_attention(query, tokens[:, None], tokens[:, None])[:, 0]  # (B, Q, D)
        if self.value is None:
            return pooled.unflatten(2, (queries, -1)).diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1)
        return torch.einsum("bqd,qkd->bqk", pooled, self.value.weight.unflatten(0, (queries, -1))).flatten(1)
