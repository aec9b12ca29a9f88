"""What callers say about the tokens of a forward pass: padding, documents, outputs. Copied into exported folders.

Callers of transformers pass many keywords. The model does what they ask for, or refuses; it ignores only those whose
value asks for nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import document_ids

UNSUPPORTED = ("output_attentions", "output_router_logits", "head_mask")
# Sizes of buffers of other implementations; they follow from the boundaries of documents.
UNUSED = ("max_length_q", "max_length_k")


@dataclass
class Layout:
    """How the tokens of a forward pass belong together.

    Attributes:
        mask: bool [B, T], False at padding, which comes after the tokens of its row; None without padding.
        cu_seqlens: int32 [N + 1], boundaries of documents in the flattened B * T tokens; None if each row is one.
        document: int64 [B, T], the document of each token; None if each row is one.
        order: int64 [B, T], the column that each token came from; None if no token has moved.
    """

    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    document: Tensor | None = None
    order: Tensor | None = None

    def move(self, x: Tensor) -> Tensor:
        """Return x [B, T, D] with the padding of each row behind its tokens."""
        return x if self.order is None else x.gather(1, self.order[..., None].expand_as(x))

    def move_back(self, x: Tensor) -> Tensor:
        """Return x [B, T, D] with every token in the column that it came from."""
        return x if self.order is None else torch.empty_like(x).scatter(1, self.order[..., None].expand_as(x), x)


def read_layout(
    shape: tuple[int, int],
    seen_tokens: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    boundaries: dict[str, Tensor],
) -> Layout:
    """Return the layout of B x T tokens that follow `seen_tokens` others.

    Padding moves behind the tokens of its row, so that a row gives what its tokens alone would give, wherever the
    padding is.

    Args:
        shape: B and T.
        seen_tokens: number of tokens per row in the cache.
        attention_mask: [B, T] or [B, seen_tokens + T], 1 at tokens and 0 at padding, or None.
        position_ids: int64 [B or 1, T]. A document starts where a number is not the one before plus 1.
        seq_idx: int [B or 1, T], the document of each token.
        boundaries: boundaries of documents in the flattened tokens, int [N + 1], by the name of the argument.

    Raises:
        ValueError: an argument has a wrong shape or value, or two of them contradict each other.
    """
    mask = _read_mask(attention_mask, shape, seen_tokens)
    for name, cu_seqlens in boundaries.items():
        _check_boundaries(name, cu_seqlens, shape)
    if list(boundaries) == ["cu_seqlens"] and mask is None and position_ids is None and seq_idx is None:
        return Layout(cu_seqlens=cu_seqlens, document=document_ids(cu_seqlens, *shape))
    begins = _read_documents(shape, mask, position_ids, seq_idx, boundaries)
    order = None
    if mask is not None and (tracing(mask) or bool((mask[:, 1:] & ~mask[:, :-1]).any())):
        order = mask.logical_not().to(torch.uint8).argsort(stable=True, dim=1)
        mask = mask.gather(1, order)
    if begins is None:
        return Layout(mask, order=order)
    begins[:, 0] = True  # every row starts a document
    document = begins.flatten().cumsum(0).view(shape)
    document = document if order is None else document.gather(1, order)
    cu_seqlens = _boundaries_of(document)
    return Layout(mask, cu_seqlens, document_ids(cu_seqlens, *shape), order)


def tracing(x: Tensor) -> bool:
    """Return whether values of x cannot be read now, because a graph is being compiled or captured."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _read_mask(attention_mask: Tensor | None, shape: tuple[int, int], seen_tokens: int) -> Tensor | None:
    """Return a bool mask [B, T] of these tokens, None if there is no padding."""
    if attention_mask is None:
        return None
    B, T = shape
    is_tensor = isinstance(attention_mask, Tensor)
    if not is_tensor or not (_has_shape(attention_mask, B, T) or _has_shape(attention_mask, B, seen_tokens + T)):
        found = list(attention_mask.shape) if is_tensor else type(attention_mask).__qualname__
        raise ValueError(f"attention_mask must have shape {[B, seen_tokens + T]}, as the tokens; got {found}")
    mask = attention_mask[:, -T:]
    real = mask != 0
    if tracing(mask):
        return real
    if mask.dtype != torch.bool and not bool((mask == real).all()):
        wrong = mask[mask != real][0].item()
        raise ValueError(f"attention_mask must be 1 at tokens and 0 at padding; got the value {wrong}")
    return None if bool(real.all()) else real


def _check_boundaries(name: str, cu_seqlens: Tensor, shape: tuple[int, int]) -> None:
    """Raise ValueError unless boundaries rise from 0 to the number of tokens, and every row starts a document.

    On a GPU `cu_seqlens`, the argument of lrnn's own training, is not checked, because the check waits for the GPU.
    """
    if tracing(cu_seqlens) or (cu_seqlens.is_cuda and name == "cu_seqlens"):
        return
    B, T = shape
    ends = cu_seqlens.ndim == 1 and len(cu_seqlens) > 1 and cu_seqlens[0] == 0 and cu_seqlens[-1] == B * T
    if not ends or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"{name} must rise from 0 to {B * T}, the number of tokens; got {cu_seqlens.tolist()}")
    rows = torch.arange(0, B * T, T, device=cu_seqlens.device)
    if not bool(torch.isin(rows, cu_seqlens).all()):
        raise ValueError(f"{name} must hold the start of every row of {T} tokens; got {cu_seqlens.tolist()}")


def _read_documents(
    shape: tuple[int, int],
    mask: Tensor | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    boundaries: dict[str, Tensor],
) -> Tensor | None:
    """Return where a document begins within a row: bool [B, T], or None if every row is one document."""
    ids = {name: document_ids(cu_seqlens, *shape) for name, cu_seqlens in boundaries.items()}
    if seq_idx is not None:
        ids["seq_idx"] = _grid("seq_idx", seq_idx, shape)
    begins: Tensor | None = None
    first = ""
    for name, x in ids.items():
        before, exists = _token_before(x, mask)
        found = exists & (x != before)
        if begins is not None and not torch.equal(found, begins):
            raise ValueError(f"{name} and {first} name different boundaries of documents")
        begins, first = found, name
    if position_ids is not None and shape[1] > 1:
        x = _grid("position_ids", position_ids, shape)
        before, exists = _token_before(x, mask)
        # A number that counts padding, too, continues the column before.
        restarts = exists & (x != before + 1) & (x != F.pad(x, (1, 0))[:, :-1] + 1)
        if begins is not None and bool((restarts & ~begins).any()):
            raise ValueError(f"position_ids start a document where {first} has no boundary")
        begins = restarts if begins is None else begins
    return begins if begins is not None and bool(begins.any()) else None


def _has_shape(x: Tensor, rows: int, columns: int) -> bool:
    # Lists are not compared, because `torch.compile` takes a symbolic size in a list for another number.
    return x.ndim == 2 and x.shape[0] == rows and x.shape[1] == columns


def _grid(name: str, x: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return x [B or 1, T] as [B, T]."""
    if not (_has_shape(x, *shape) or _has_shape(x, 1, shape[1])):
        raise ValueError(f"{name} must have shape {list(shape)}, as the tokens; got {list(x.shape)}")
    return x.expand(shape)


def _token_before(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x [B, T] at the last token before each, and where both are tokens, bool [B, T]."""
    column = torch.arange(x.shape[1], device=x.device).expand_as(x)
    last = column if mask is None else torch.where(mask, column, -1).cummax(1).values
    last = F.pad(last, (1, 0), value=-1)[:, :-1]
    exists = last >= 0 if mask is None else (last >= 0) & mask
    return x.gather(1, last.clamp(min=0)), exists


def _boundaries_of(document: Tensor) -> Tensor:
    """Return the boundaries of the documents [B, T] in the flattened tokens, int32 [N + 1]."""
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    return F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=document.numel()).int()


def refuse_keywords(keywords: dict[str, Any], model: str) -> None:
    """Raise an error for keywords that the model cannot obey.

    Raises:
        TypeError: a keyword is unknown.
        ValueError: a keyword asks for something that the model does not have.
    """
    given = {name: x for name, x in keywords.items() if x is not None and name not in UNUSED}
    for name in UNSUPPORTED:
        if given.pop(name, False) is not False:
            raise ValueError(f"{model} does not support {name}; leave it out")
    if given.pop("is_causal", True) is not True:
        raise ValueError(f"{model} reads every token after those before it; leave out is_causal")
    if "token_type_ids" in given and bool(given.pop("token_type_ids").any()):
        raise ValueError(f"{model} has no token types; leave out token_type_ids")
    if given:
        raise TypeError(f"{model}.forward() got an unexpected keyword argument {min(given)!r}")


def check_cache_position(position: Tensor | None, seen_tokens: int, tokens: int) -> None:
    """Raise ValueError unless the tokens are said to follow those of the cache, as transformers 4 does."""
    if position is None or tracing(position):
        return
    if position.tolist() != list(range(seen_tokens, seen_tokens + tokens)):
        raise ValueError(
            f"cache_position must count on from the {seen_tokens} tokens of the cache; got {position.tolist()}"
        )


def selected_states(option: bool | int | list[int] | None, default: Any, count: int) -> set[int]:
    """Return which of `count` hidden states `output_hidden_states` asks for: all, none, or those with given numbers.

    Numbers below 0 count from the end, and numbers out of range select nothing, as in transformers from 5.23 on.
    (Earlier versions count layers in a list and take a number for True.)
    """
    option = default if option is None else option
    if option is True or not option:
        return set(range(count)) if option else set()
    numbers = [option] if isinstance(option, int) else list(option)
    return {i % count for i in numbers if -count <= i < count}
