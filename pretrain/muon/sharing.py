"""Share the weights of a slice among the ranks, and exchange the pieces of those that ZeRO cuts.

One rank, the worker, computes a weight. The ranks that hold pieces of it send them to the worker, and get back the same
pieces of what it computes. A weight that lies on one rank is never sent: under ZeRO-1 and 2 these are all except those
at the ends of slices, under ZeRO-3 there are none.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from lrnn.pretrain.muon.matrices import Matrices
from lrnn.pretrain.zero_layout import Piece

Span = tuple[int, int, int]  # start in the flattened weight, numel, offset in the slice of its rank


@dataclass
class Weight:
    """A weight of a slice.

    Attributes:
        matrices: the matrices that it holds.
        spans: of each rank that holds a piece, which.
        worker: the rank that computes it.
    """

    matrices: Matrices
    spans: dict[int, Span] = field(default_factory=dict)
    worker: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.matrices.rows), sum(self.matrices.columns)

    @property
    def is_cut(self) -> bool:
        """Whether it lies on several ranks."""
        return len(self.spans) > 1


def shared_weights(pieces_of_ranks: list[list[tuple[int, int, int, int]]], matrices: list[Matrices]) -> list[Weight]:
    """Return the weights of a slice with their workers, the same on all ranks.

    The worker is the rank that holds more than half of a weight or, if there is none, the one with the least work among
    those that hold some of it.

    Args:
        pieces_of_ranks: of each rank, (number of the weight, start, numel, offset) of its pieces.
        matrices: what the weights hold, by their numbers.
    """
    weights: dict[int, Weight] = {}
    for rank, pieces in enumerate(pieces_of_ranks):
        for number, *span in pieces:
            start, numel, offset = span
            weights.setdefault(number, Weight(matrices[number])).spans[rank] = (start, numel, offset)
    work = [0] * len(pieces_of_ranks)
    for _, weight in sorted(weights.items()):
        rows, columns = weight.shape
        held = {rank: numel for rank, (_, numel, _) in weight.spans.items()}
        most = max(held, key=lambda rank: held[rank])
        weight.worker = most if 2 * held[most] > rows * columns else min(held, key=lambda rank: work[rank])
        work[weight.worker] += rows * columns * min(rows, columns)
    return [weight for _, weight in sorted(weights.items())]


class Sharing:
    """The weights of one slice, as this rank sees them. All ranks make one of each slice, in the same order.

    Args:
        pieces: the pieces that this rank's slice consists of.
        matrices: the weights of the model that Muon updates. Their order numbers them.

    Attributes:
        whole: the weights that lie on this rank alone, each with its offset.
        cut: the weights that lie on several ranks and that this rank computes.
    """

    def __init__(self, pieces: list[Piece], matrices: dict[Tensor, Matrices]):
        rank, ranks = dist.get_rank(), dist.get_world_size()
        numbers = {id(parameter): number for number, parameter in enumerate(matrices)}
        of_ranks: list = [[] for _ in range(ranks)]
        mine = [(numbers[id(piece.parameter)], *piece[1:]) for piece in pieces]
        dist.all_gather_object(of_ranks, mine)
        weights = shared_weights(of_ranks, list(matrices.values()))
        self.whole = [(w, w.spans[rank][2]) for w in weights if w.spans.keys() == {rank}]
        cut = [[w for w in weights if w.is_cut and w.worker == worker] for worker in range(ranks)]
        self._exchanges = any(cut)
        self.cut = cut[rank]
        # This rank's pieces, by the worker that they go to; and the pieces that come here, by the rank that holds them,
        # each with the place of its weight among `cut`.
        self._held = [[w.spans[rank] for w in cut[worker] if rank in w.spans] for worker in range(ranks)]
        self._worked = [
            [(place, *w.spans[holder]) for place, w in enumerate(self.cut) if holder in w.spans]
            for holder in range(ranks)
        ]

    def collect(self, flat: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Return each of `cut` [rows, columns] in `dtype`, put together from the slices of all ranks.

        Args:
            flat: this rank's slice.
            dtype: what the numbers are rounded to before they are sent.
        """
        if not self._exchanges:
            return []
        sent = [[flat.narrow(0, offset, numel) for _, numel, offset in pieces] for pieces in self._held]
        sizes = [[numel for _, _, numel, _ in pieces] for pieces in self._worked]
        received = _exchange(sent, sizes, flat.new_empty(0, dtype=dtype))
        wholes = [flat.new_empty(weight.shape, dtype=dtype) for weight in self.cut]
        for pieces, values in zip(self._worked, received, strict=True):
            for (place, start, numel, _), x in zip(pieces, values, strict=True):
                wholes[place].view(-1).narrow(0, start, numel).copy_(x)
        return wholes

    def hand_back(self, wholes: list[Tensor], flat: Tensor) -> None:
        """Add weights that were computed to the slices of all ranks.

        Args:
            wholes: [rows, columns] of each of `cut`, contiguous, in the dtype of `flat`.
            flat: this rank's slice, which is changed.
        """
        if not self._exchanges:
            return
        sent = [
            [wholes[place].view(-1).narrow(0, start, numel) for place, start, numel, _ in pieces]
            for pieces in self._worked
        ]
        received = _exchange(sent, [[numel for _, numel, _ in pieces] for pieces in self._held], flat.new_empty(0))
        for pieces, values in zip(self._held, received, strict=True):
            for (_, numel, offset), x in zip(pieces, values, strict=True):
                flat.narrow(0, offset, numel).add_(x)


def _exchange(sent: list[list[Tensor]], sizes: list[list[int]], like: Tensor) -> list[list[Tensor]]:
    """Send flat tensors to each rank, and return those that each rank sends to this one, in the dtype of `like`.

    Args:
        sent: the tensors for each rank.
        sizes: the numbers of elements of those that each rank sends.
        like: any tensor with the device and the dtype.
    """
    out = torch.cat([like, *(x.to(like.dtype) for tensors in sent for x in tensors)])
    into = like.new_empty(sum(map(sum, sizes)))
    out_sizes = [sum(x.numel() for x in tensors) for tensors in sent]
    dist.all_to_all_single(into, out, [sum(row) for row in sizes], out_sizes)
    parts = iter(into.split([size for row in sizes for size in row]))
    return [[next(parts) for _ in row] for row in sizes]
