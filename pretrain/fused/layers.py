"""Put fused layers into a model, and renew their copies of the weights."""

import torch
from torch import Tensor, nn

from lrnn.model.cache import LrnnCacheLayer
from lrnn.model.modeling_lrnn import LrnnBlock, LrnnForCausalLM
from lrnn.pretrain.fused.deltanet import FusedDeltaNet
from lrnn.pretrain.fused.loss import FusedLoss
from lrnn.pretrain.fused.mlp import FusedMlp
from lrnn.pretrain.fused.product import Product


class FusedBlock:
    """Compute what a block does, in its place.

    A mixer that has no fused form is called as it is. So are the mixers of blocks that norm outputs, since the fused
    form of a mixer begins with its norm.
    """

    def __init__(self, block: LrnnBlock, dtype: torch.dtype, recompute_mlp: bool, float8: bool):
        self.norm, self.mixer, self.norms_outputs, self.dtype = block.attn_norm, block.attn, block.norms_outputs, dtype
        fits = FusedDeltaNet.fits(block.attn) and not block.norms_outputs
        self.fused_mixer = FusedDeltaNet(block.attn_norm, block.attn, dtype, float8) if fits else None
        self.mlp = FusedMlp(block.mlp_norm, block.mlp, dtype, recompute_mlp, float8, block.norms_outputs)
        self.products: list[Product] = [*(self.fused_mixer.products if self.fused_mixer else []), *self.mlp.products]

    def __call__(
        self, x: Tensor, cache: LrnnCacheLayer | None, cu_seqlens: Tensor | None, document: Tensor | None
    ) -> Tensor:
        x = x.to(self.dtype)
        if self.fused_mixer is not None:
            x = self.fused_mixer(x, cache, cu_seqlens, document)
        elif self.norms_outputs:
            x = x + self.norm(self.mixer(x, cache, None, cu_seqlens, document))
        else:
            x = x + self.mixer(self.norm(x), cache, None, cu_seqlens, document)
        return self.mlp(x)


def fuse(
    model: LrnnForCausalLM,
    dtype: torch.dtype,
    *,
    recompute_mlp: bool = False,
    partitioned: bool = False,
    float8: bool = False,
    z_loss: float = 0.0,
) -> None:
    """Make a model compute with fused layers when it neither pads nor has a cache of generation.

    Names and values of parameters stay as they are. Hooks on modules inside of blocks are not called.

    Args:
        model: its blocks get fused layers, and its loss.
        dtype: what products compute in; the model must be called under autocast to it, unless it is float32.
        recompute_mlp: whether MLPs keep their input alone for the backward pass.
        partitioned: whether ZeRO-3 will partition the weights. Then there are no copies of them in `dtype`, and the
            loss is not fused, because the head is gathered only while it is called.
        float8: whether the products of fused mixers and MLPs are in float8.
        z_loss: coefficient of the z-loss, if the loss is fused.

    Raises:
        UserError: the model has a size that products in float8 do not take.
    """
    products: list[Product] = []
    for block in model.model.layers:
        assert isinstance(block, LrnnBlock)
        fused = FusedBlock(block, dtype, recompute_mlp, float8)
        block.fused = fused
        products += fused.products
    if partitioned:
        return
    loss = FusedLoss(model.lm_head, dtype, z_loss)
    model.fused_loss = loss
    model.fused_products = [*products, *loss.products]


@torch.no_grad()
def refresh(model: nn.Module) -> None:
    """Renew the copies of the weights. Call it before a model runs with weights that may have changed."""
    for product in getattr(model, "fused_products", ()):
        product.refresh()
