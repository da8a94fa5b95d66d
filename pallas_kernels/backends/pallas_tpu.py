"""Our own attention kernels on TPUs."""

import dataclasses
from typing import override

import jax

from pallas_kernels.biases import Bias
from pallas_kernels.fused import fused_gradients, inputs_of
from pallas_kernels.requests import Backend, Request
from pallas_kernels.tpu.attention import TpuKernels


@dataclasses.dataclass(frozen=True)
class PallasTpuBackend(Backend):
    """Forward and backward over key intervals and block lists, skipping what the mask hides.

    On a CPU the kernels are interpreted: slow, and right.
    """

    kernels: TpuKernels = TpuKernels()

    name = "pallas_tpu"

    @override
    def refuses(self, request: Request) -> list[str]:
        return self.kernels.refuses(request)

    @override
    def run(self, q: jax.Array, k: jax.Array, v: jax.Array, request: Request) -> tuple[jax.Array, jax.Array]:
        return self.kernels.attend(q, k, v, inputs_of(request))

    @override
    def gradients(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        request: Request,
        lse: jax.Array,
        delta: jax.Array,
        gradient: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, Bias | None]:
        if self.kernels.in_parts(q, k, v, inputs_of(request)):
            return super().gradients(q, k, v, request, lse, delta, gradient)
        return fused_gradients(self.kernels, q, k, v, request, lse, delta, gradient)
