"""Which weights of a model Muon updates, and the matrices that each of them holds."""

from typing import NamedTuple

from torch import Tensor, nn

from lrnn.model.modeling_lrnn import LrnnBlock


class Matrices(NamedTuple):
    """The matrices of a weight: a grid of blocks.

    Attributes:
        rows: rows of the blocks from top to bottom.
        columns: columns of the blocks from left to right.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def split(self, weight: Tensor) -> list[Tensor]:
        """Return views of the matrices of a weight [sum of rows, sum of columns]."""
        return [block for strip in weight.split(self.rows) for block in strip.split(self.columns, 1)]


def matrices_of(model: nn.Module, per_head: bool) -> dict[Tensor, Matrices]:
    """Return the weights that Muon updates: linear layers inside of blocks, except those that make gates.

    Embeddings, head, norms, convolutions, decays, biases, and the parameters of mixers that belong to no linear layer
    are left to AdamW.

    Args:
        model: the model, not yet partitioned.
        per_head: whether the rows of each head of a projection, and its columns of `o_proj`, are a matrix of their own.
    """
    found: dict[Tensor, Matrices] = {}
    for block in model.modules():
        if isinstance(block, LrnnBlock):
            for name, module in block.attn.named_modules():
                if isinstance(module, nn.Linear) and name.partition(".")[0] not in block.attn.gates:
                    found[module.weight] = _of_projection(block, name, module.weight, per_head)
            for module in block.mlp.modules():
                if isinstance(module, nn.Linear):
                    found[module.weight] = Matrices((module.out_features,), (module.in_features,))
    return found


def _of_projection(block: LrnnBlock, name: str, weight: Tensor, per_head: bool) -> Matrices:
    """Return the matrices of a linear layer of the mixer."""
    rows, columns = weight.shape
    width = block.attn.head_widths().get(name) if per_head else None
    if width is None:
        return Matrices(tuple(block.attn.merged_rows().get(name, [rows])), (columns,))
    if name == "o_proj":
        return Matrices((rows,), (width,) * (columns // width))
    return Matrices((width,) * (rows // width), (columns,))
