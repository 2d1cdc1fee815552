"""Which implementation of the slab's loss runs."""

from collections.abc import Callable

from torch import Tensor

from compresskit.kernels.slab import slab_loss_


def choose_slab_loss(impl: str) -> Callable[..., Tensor]:
    """`slab_loss_`, or its Triton form for `impl="triton"`."""
    if impl != "triton":
        return slab_loss_
    from compresskit.kernels.slab_triton import triton_slab_loss_

    return triton_slab_loss_
