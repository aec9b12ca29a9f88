"""The keys and values that attention keeps in the cache of generation. Copied into exported folders.

The state of a layer is a tuple of three tensors:

    keys, values [B, G, S, D]: of the tokens read, in S slots; zeros where nothing was written,
    length int64 [B]: number of tokens read by each sequence. Padding does not count.

The token at position p of its sequence has slot p. With a window of W tokens it has slot p mod W, so that W slots hold
the last W tokens, however long the text is. A single token is written in place, so that the tensors keep their
addresses as long as there are slots.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import group_queries, ungroup

State = tuple[Tensor, Tensor, Tensor]

GROWTH = 256  # slots that a full cache gets beyond those it needs, so that not every token copies it
LARGEST_MASK = 2**26  # pairs of a query and a key whose mask exists at a time


def first_state(k: Tensor, v: Tensor, mask: Tensor | None, window: int | None, document: Tensor | None = None) -> State:
    """Return the state after the first tokens of the sequences.

    Args:
        k, v: [B, T, G, D], rotated keys, and values.
        mask: bool [B, T] or None, False at padding, which comes after the tokens of its row.
        window: tokens that a token sees, or None.
        document: int64 [B, T], the document of each token, of which the last of each row is kept; None if every row is
            one.
    """
    B, T, G, D = k.shape
    count = _count(mask, k)
    if document is None and (window is None or window >= T):
        return k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous(), count
    empty = k.new_zeros(B, G, T if window is None else min(window, T), D)
    return _write((empty, empty, torch.zeros_like(count)), k, v, count, window, document)


def with_slots(state: State, tokens: int, window: int | None) -> State:
    """Return the state with slots for that many tokens per row, those of its tokens included, and no others."""
    keys, values, length = state
    more = (tokens if window is None else min(tokens, window)) - keys.shape[2]
    keys, values = (F.pad(x, (0, 0, 0, more)) for x in (keys, values))
    return keys, values, length


def with_room(state: State, tokens: int, window: int | None) -> State:
    """Return the state with slots for at least that many tokens per row. One that must grow gets `GROWTH` more."""
    room = slots_for(state, window)
    return state if room is None or room >= tokens else with_slots(state, tokens + GROWTH, window)


def slots_for(state: State, window: int | None) -> int | None:
    """Return the number of tokens per row that the state has slots for; None if it is any number."""
    slots = state[0].shape[2]
    return None if slots == window else slots


def attend_and_write(
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    window: int | None,
    document: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Return the attention of further tokens to those of the cache and to each other, and the state after them.

    Args:
        state: that ahead of the tokens, with a slot for each of them.
        q: [B, T, H, D], rotated.
        k, v: [B, T, G, D], rotated keys, and values.
        mask: bool [B, T] or None, False at padding, which comes after the tokens of its row.
        window: tokens that a token sees, or None.
        document: int64 [B, T], the document of each token, of which the first of each row continues that of the state;
            None if every row is one.

    Returns:
        [B, T, H, D] and the state.
    """
    dtype = q.dtype
    q, k, v = (x.to(state[0].dtype) for x in (q, k, v))
    if q.shape[1] == 1:
        state, length = _write_one(state, k, v, mask, window), state[2]
        o = _attend_one(state, q, length)
    else:
        o = _attend_many(state, q, k, v, window, document)
        state = _write(state, k, v, _count(mask, k), window, document)
    return o.to(dtype), state


def _write_one(state: State, k: Tensor, v: Tensor, mask: Tensor | None, window: int | None) -> State:
    """Return the state after one token per row: k, v [B, 1, G, D]. A row whose token is padding stays as it is."""
    keys, values, length = state
    slot = length if window is None else length % window
    index = slot[:, None, None, None].expand(-1, keys.shape[1], 1, keys.shape[3])
    written = []
    for kept, new in ((keys, k), (values, v)):
        new = new.transpose(1, 2)
        if mask is not None:
            new = torch.where(mask[:, :, None, None], new, kept.gather(2, index))
        followed = torch.is_grad_enabled() or kept.requires_grad  # a backward pass needs the tensor as it was
        written.append(kept.scatter(2, index, new) if followed else kept.scatter_(2, index, new))
    return written[0], written[1], length + (1 if mask is None else mask[:, 0].long())


def _attend_one(state: State, q: Tensor, length: Tensor) -> Tensor:
    """Return the attention of q [B, 1, H, D], the token behind `length` others, to the slots that are written."""
    keys, values, _ = state
    slot = torch.arange(keys.shape[2], device=q.device)
    sees = (slot <= length[:, None])[:, None, None]
    return ungroup(F.scaled_dot_product_attention(group_queries(q, keys.shape[1]), keys, values, attn_mask=sees), 1)


def _attend_many(state: State, q: Tensor, k: Tensor, v: Tensor, window: int | None, document: Tensor | None) -> Tensor:
    """Return the attention of q [B, T, H, D] to the cache and to k, v [B, T, G, D], in blocks of queries."""
    keys, values, length = state
    B, T, H, _ = q.shape
    G, S = keys.shape[1:3]
    keys, values = torch.cat([keys, k.transpose(1, 2)], 2), torch.cat([values, v.transpose(1, 2)], 2)
    new = length[:, None] + torch.arange(T, device=q.device)
    position = torch.cat([_positions(S, length, window), new], 1)  # of each key, -1 in empty slots
    of_keys = None if document is None else torch.cat([document[:, :1].expand(-1, S), document], 1)
    size = max(LARGEST_MASK // (B * H // G * (S + T)), 1)
    outputs = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        # If the first query is past the window, none sees the cache.
        seen = slice(0 if window is None or start < window else S + start - window + 1, S + stop)
        behind = new[:, start:stop, None] - position[:, None, seen]
        sees = (position[:, None, seen] >= 0) & (behind >= 0)
        if window is not None:
            sees = sees & (behind < window)
        if document is not None and of_keys is not None:
            sees = sees & (document[:, start:stop, None] == of_keys[:, None, seen])
        o = F.scaled_dot_product_attention(
            group_queries(q[:, start:stop], G),
            keys[:, :, seen],
            values[:, :, seen],
            attn_mask=sees.repeat(1, H // G, 1)[:, None],
        )
        outputs.append(ungroup(o, stop - start))
    return torch.cat(outputs, 1)


def _write(state: State, k: Tensor, v: Tensor, count: Tensor, window: int | None, document: Tensor | None) -> State:
    """Return the state after k, v [B, T, G, D], of which each row has `count` [B] tokens and padding behind them.

    If the last document of a row begins within it, the state holds nothing from before.
    """
    keys, values, length = state
    left_out = torch.zeros_like(length) if document is None else (document != document[:, -1:]).sum(1)
    length = torch.where(left_out > 0, 0, length)
    end = length + count - left_out
    source = _positions(keys.shape[2], end, window) - length[:, None]  # the token that each slot holds, if it is new
    index = (source.clamp(min=0) + left_out[:, None])[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
    is_new = (source >= 0)[:, None, :, None]
    keys, values = (
        torch.where(is_new, new.transpose(1, 2).gather(2, index), kept) for new, kept in ((k, keys), (v, values))
    )
    return keys, values, end


def _count(mask: Tensor | None, k: Tensor) -> Tensor:
    """Return the number of tokens in each row of k [B, T, G, D], int64 [B]."""
    return k.new_full((k.shape[0],), k.shape[1], dtype=torch.int64) if mask is None else mask.sum(1)


def _positions(slots: int, length: Tensor, window: int | None) -> Tensor:
    """Return the position of the token in each slot, int64 [B, S], after `length` [B] tokens; -1 in empty slots."""
    slot = torch.arange(slots, device=length.device)
    last = length[:, None] - 1
    position = slot.expand(len(length), -1) if window is None else last - (last - slot) % window
    return torch.where((position >= 0) & (position <= last), position, -1)
