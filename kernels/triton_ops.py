"""The ops as Triton kernels, under the names of `kernels.reference`. Imported only where they are to run."""

from kernels.float8_rows import float8_rows
from kernels.geglu import geglu
from kernels.group_norm_silu import group_norm_silu
from kernels.guidance_step import guidance_step
from kernels.inject import inject
from kernels.layer_norm import add_layer_norm
from kernels.sobel_z0_loss import noise_and_z0_loss, sobel_z0_loss

__all__ = [
    "add_layer_norm",
    "float8_rows",
    "geglu",
    "group_norm_silu",
    "guidance_step",
    "inject",
    "noise_and_z0_loss",
    "sobel_z0_loss",
]
