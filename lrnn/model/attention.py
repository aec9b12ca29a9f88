"""Causal softmax attention, without a mask of all pairs of tokens. Copied into exported folders.

On CUDA in 16 bits a window and packed documents run in FlashAttention of PyTorch (`varlen_attn`). Elsewhere documents
are computed one by one, and a window in blocks of queries, with `scaled_dot_product_attention`.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import longest_document

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # PyTorch before 2.10
    varlen_attn = None

VARLEN_OPTIONS = () if varlen_attn is None else tuple(inspect.signature(varlen_attn).parameters)
LEAST_BLOCK = 128  # queries that are computed at a time if the window is shorter
FLASH_CAPABILITY = (8, 0)  # that of the first GPUs on which PyTorch has FlashAttention
FLASH_HEAD_DIM = 256  # its largest head size; it takes multiples of 8


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return softmax attention of each token to itself and those before it.

    Key head i serves the query heads i H/G to (i + 1) H/G - 1.

    Args:
        q: [B, T, H, D].
        k, v: [B, T, G, D], with H a multiple of G.
        window: number of tokens that a token sees, itself included; None for all.
        cu_seqlens: int32 [N + 1], boundaries of documents in the flattened B * T tokens, with one at the start of every
            row. No token sees another document. None if every row is one document.

    Returns:
        [B, T, H, D].
    """
    window = None if window is None or window >= q.shape[1] else window
    if cu_seqlens is None and window is None:
        return _causal(q, k, v)
    if _has_flash(q) and "window_size" in VARLEN_OPTIONS:
        return _varlen(q, k, v, window, cu_seqlens)
    if cu_seqlens is not None:
        return _by_document(q, k, v, window, cu_seqlens)
    assert window is not None
    return _windowed(q, k, v, window)


def group_queries(q: Tensor, kv_heads: int) -> Tensor:
    """Return queries [B, T, H, D] as [B, G, (H/G) T, D], so that each key head has the queries that it serves."""
    return q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def ungroup(o: Tensor, tokens: int) -> Tensor:
    """Return outputs [B, G, (H/G) T, D] as [B, T, H, D]: the inverse of `group_queries`."""
    return o.unflatten(2, (-1, tokens)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _has_flash(q: Tensor) -> bool:
    """Return whether PyTorch has FlashAttention for these queries."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= FLASH_HEAD_DIM
    able = torch.cuda.get_device_capability(q.device) >= FLASH_CAPABILITY
    return fits and able and torch.backends.cuda.is_flash_attention_available()


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return `attend` without a window and documents."""
    grouped = k.shape[2] < q.shape[2]
    if grouped and not _has_flash(q):  # of the kernels without a matrix of scores, FlashAttention alone takes groups
        k, v = (_repeat(x, q.shape[2]) for x in (k, v))
        grouped = False
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def _repeat(x: Tensor, heads: int) -> Tensor:
    """Return keys or values [B, T, G, D] as [B, T, H, D], each head H/G times."""
    return x.repeat_interleave(heads // x.shape[2], 2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None) -> Tensor:
    """Return `attend` by FlashAttention."""
    B, T, H, _ = q.shape
    longest = T if cu_seqlens is None else longest_document(cu_seqlens, T)  # a smaller bound launches fewer blocks
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)
    options = {}
    if k.shape[2] < H:
        if "enable_gqa" in VARLEN_OPTIONS:
            options["enable_gqa"] = True
        else:
            k, v = (_repeat(x, H) for x in (k, v))
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    cu_seqlens = cu_seqlens.int()
    sizes = (-1 if window is None else window - 1, 0)  # tokens before and behind, the token itself not counted
    o = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=sizes, **options)
    return o.unflatten(0, (B, T))


def _by_document(q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor) -> Tensor:
    """Return `attend` of one document after the other. Their lengths are read, which waits for a GPU."""
    lengths = [length for length in cu_seqlens.diff().tolist() if length]
    documents = zip(*(x.flatten(0, 1).split(lengths) for x in (q, k, v)), strict=True)
    outputs = [attend(q[None], k[None], v[None], window)[0] for q, k, v in documents]
    return torch.cat(outputs).view_as(q)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Return `attend` with a window, in blocks of queries."""
    T, G = q.shape[1], k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    size = max(window, LEAST_BLOCK)
    position = torch.arange(T, device=q.device)
    outputs = []
    for start in range(0, T, size):
        queries = slice(start, min(start + size, T))
        keys = slice(max(start - window + 1, 0), queries.stop)
        behind = position[queries, None] - position[keys]
        sees = ((behind >= 0) & (behind < window)).repeat(q.shape[2] // G, 1)
        o = F.scaled_dot_product_attention(
            group_queries(q[:, queries], G), k[:, :, keys], v[:, :, keys], attn_mask=sees
        )
        outputs.append(ungroup(o, queries.stop - start))
    return torch.cat(outputs, 1)
