"""Product quantizer with learned codebooks: soft, hard and integer codes."""

import math

import torch
from torch import Tensor, nn


class ProductQuantizer(nn.Module):
    """M codebooks of K codewords; the m-th quantizes the m-th slice of d dimensions.

    A descriptor x of D = M * d dimensions is stored as M codeword numbers, `M * log2(K)` bits.
    Everything here computes in float32 (or float64 if given), also under autocast: at
    alpha = 5 a bf16 rounding of the distances would move the assignment visibly.

    With M = 1 and d = D this is a plain vector quantizer (the paper's ablation SPQ-Q).

    Attributes:
        codebooks: parameter (M, K, d), Xavier uniform over the (K, M * d) matrix.
    Raises:
        ValueError: if M, K or d is not positive.
    Source: SPQ, section 3.2; Jegou et al. 2011. Departures: none.
    """

    def __init__(self, M: int, K: int, d: int) -> None:
        super().__init__()
        if min(M, K, d) < 1:
            raise ValueError(f"M, K and d must be positive, got M={M}, K={K}, d={d}")
        self.M, self.K, self.d = M, K, d
        self.codebooks = nn.Parameter(torch.empty(M, K, d))
        bound = math.sqrt(6.0 / (K + M * d))  # Xavier's bound for a (K, M * d) matrix
        nn.init.uniform_(self.codebooks, -bound, bound)

    @property
    def code_bits(self) -> float:
        """Bits of one stored image: M * log2(K)."""
        return self.M * math.log2(self.K)

    def _split(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, M, d) in the codebooks' precision."""
        if x.dim() != 2 or x.shape[1] != self.M * self.d:
            raise ValueError(
                f"descriptors must be (N, {self.M * self.d}) for M={self.M}, d={self.d}; "
                f"got {tuple(x.shape)}"
            )
        return x.to(self.codebooks.dtype).reshape(-1, self.M, self.d)

    def _neg_dist(self, x: Tensor) -> Tensor:
        """2 <x_m, c_mk> - ||c_mk||^2, (N, M, K).

        Minus the squared distance up to ||x_m||^2, which is the same for all k and so changes
        neither the softmax nor the argmax. Both sides are moved to the mean codeword first, which
        changes nothing but the rounding: far from the origin the two terms would cancel.
        """
        with torch.autocast(x.device.type, enabled=False):
            centre = self.codebooks.detach().mean(dim=1)  # (M, d)
            codebooks = self.codebooks - centre[:, None]
            dots = torch.einsum("nmd,mkd->nmk", self._split(x) - centre, codebooks)
            return 2.0 * dots - codebooks.square().sum(-1)

    def _mix(self, assign: Tensor) -> Tensor:
        """Codewords weighted by an assignment (N, M, K) -> (N, D)."""
        with torch.autocast(assign.device.type, enabled=False):
            z = torch.einsum("nmk,mkd->nmd", assign, self.codebooks)
        return z.flatten(1)  # (N, M, d) -> (N, D)

    def assign(self, x: Tensor, alpha: float) -> Tensor:
        """Soft assignment (N, M, K): softmax over k of -alpha * ||x_m - c_mk||^2."""
        return torch.softmax(alpha * self._neg_dist(x), dim=-1)

    def soft(self, x: Tensor, alpha: float) -> Tensor:
        """Soft-quantized descriptors.

            assign[n, m, k] = softmax_k( -alpha * || x[n, m] - c[m, k] ||^2 )
            z[n, m] = sum_k assign[n, m, k] * c[m, k]

        Args:
            x: (N, D) descriptors, D = M * d.
            alpha: sharpness, multiplies. The paper's tau_q is 1 / alpha (its printed value 5 is
                alpha); towards infinity z becomes the nearest codeword.
        Returns:
            (N, D) soft-quantized descriptors.
        Raises:
            ValueError: if x is not (N, M * d).
        Source: SPQ, equations 2 and 3.
        """
        return self._mix(self.assign(x, alpha))

    def hard(self, x: Tensor, alpha: float) -> Tensor:
        """Hard-quantized descriptors with a straight-through gradient (ablation SPQ-H).

        The value is the nearest codeword of each subspace, `decode(encode(x))`; the gradient is
        that of `soft(x, alpha)`, so codebooks and descriptors both learn.
        """
        soft = self.soft(x, alpha)
        nearest = self._words(self.encode(x))  # not decode: its checks wait for a GPU
        return soft + (nearest - soft).detach()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes (N, M), int64 in [0, K): the nearest codeword in squared L2; ties to the lowest."""
        return self._neg_dist(x).argmax(dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (N, M) -> the codewords they name, (N, D).

        Raises:
            ValueError: if codes are not integers (N, M) in [0, K).
        """
        if codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be integers; got {codes.dtype}")
        if codes.dim() != 2 or codes.shape[1] != self.M:
            raise ValueError(f"codes must be (N, {self.M}); got {tuple(codes.shape)}")
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < self.K):
            raise ValueError(f"codes must lie in [0, {self.K})")
        return self._words(codes)

    def _words(self, codes: Tensor) -> Tensor:
        subspace = torch.arange(self.M, device=codes.device)
        return self.codebooks[subspace, codes.long()].flatten(1)  # (N, M, d) -> (N, D)

    def extra_repr(self) -> str:
        return f"M={self.M}, K={self.K}, d={self.d}, code_bits={self.code_bits:g}"
