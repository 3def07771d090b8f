"""Product quantizers with learned codebooks: soft, hard and integer codes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_LENGTH = 1e-6  # that a sub-vector is divided by


class Quantizer(nn.Module):
    """M codebooks of K codewords; the m-th quantizes the m-th slice of d dimensions.

    A descriptor x of D = M * d dimensions is stored as M codeword numbers, `M * log2(K)` bits.
    Everything here computes in float32 (or float64 if given), also under autocast: at
    alpha = 5 a bf16 rounding of the distances would move the assignment visibly.

    Attributes:
        codebooks: (M, K, d), whatever makes them in a subclass. There are no others: what is
            trained with is what items are stored and searched by.
    Raises:
        ValueError: if M, K or d is not positive.
    Source: Jegou et al. 2011.
    """

    codebooks: Tensor

    def __init__(self, M: int, K: int, d: int) -> None:
        super().__init__()
        if min(M, K, d) < 1:
            raise ValueError(f"M, K and d must be positive, got M={M}, K={K}, d={d}")
        self.M, self.K, self.d = M, K, d

    @property
    def code_bits(self) -> float:
        """Bits of one stored image: M * log2(K)."""
        return self.M * math.log2(self.K)

    def _split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, D) -> (N, M, d) in that precision."""
        if x.dim() != 2 or x.shape[1] != self.M * self.d:
            raise ValueError(
                f"descriptors must be (N, {self.M * self.d}) for M={self.M}, d={self.d}; "
                f"got {tuple(x.shape)}"
            )
        return x.to(dtype).reshape(-1, self.M, self.d)

    def _neg_dist(self, x: Tensor) -> Tensor:
        """2 <x_m, c_mk> - ||c_mk||^2, (N, M, K).

        Minus the squared distance up to ||x_m||^2, which is the same for all k and so changes
        neither the softmax nor the argmax. Both sides are moved to the mean codeword first, which
        changes nothing but the rounding: far from the origin the two terms would cancel.
        """
        with torch.autocast(x.device.type, enabled=False):
            codebooks = self.codebooks
            centre = codebooks.detach().mean(dim=1)  # (M, d)
            codebooks = codebooks - centre[:, None]
            dots = torch.einsum("nmd,mkd->nmk", self._split(x, centre.dtype) - centre, codebooks)
            return 2.0 * dots - codebooks.square().sum(-1)

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


class ProductQuantizer(Quantizer):
    """Codebooks that are parameters, assigned to by squared L2.

    With M = 1 and d = D this is a plain vector quantizer (the paper's ablation SPQ-Q).

    Attributes:
        codebooks: parameter (M, K, d), Xavier uniform over the (K, M * d) matrix.
    Raises:
        ValueError: as `Quantizer`.
    Source: SPQ, section 3.2. Departures: none.
    """

    def __init__(self, M: int, K: int, d: int) -> None:
        super().__init__(M, K, d)
        self.codebooks = nn.Parameter(_xavier(K, M * d, (M, K, d)))

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


class PrototypeQuantizer(Quantizer):
    """Codebooks that are built from class prototypes, for intra-normalised descriptors.

        assign[m, k, c] = softmax_c( alpha * <words[m, k], p[c, m]> )
        codebooks[m, k] = unit( sum_c assign[m, k, c] * p[c, m] )

    where p are the prototypes, intra-normalised, and unit() scales to length 1. The distance in the
    softmax is 1 - <., .>; its 1 is the same for all c and goes away.

    As codewords and sub-vectors of descriptors have length 1, || x_m - c ||^2 = 2 (1 - <x_m, c>):
    the nearest codeword in squared L2 is the one of largest inner product, and squared L2 ranks
    items exactly as GPQ's sum over m of (1 - <x_m, c>) does. (A sub-vector of zeros is equally far
    from all codewords either way.)

    Args:
        M, K, d: codebooks, codewords in each, dimensions of a codeword.
        classes: number of prototypes.
        alpha: sharpness of both soft assignments (`--soft_quantization_scale`), multiplies.
    Attributes:
        words: parameter (M, K, d), Z of the paper.
        prototypes: parameter (classes, M * d), C of the paper. Both Xavier uniform, over the
            matrices (K, M * d) and (classes, M * d).
    Raises:
        ValueError: as `Quantizer`; or if there are no classes, or alpha is not positive.
    Source: GPQ, sections 3.2 and 3.3. Departures: codes and look-up tables take these very
        codebooks; the released code encodes by the intra-normalised words, looks up the words as
        they are, and trains with the prototypes' mixtures (of any length) alone.
    """

    def __init__(self, M: int, K: int, d: int, classes: int, alpha: float = 20.0) -> None:
        super().__init__(M, K, d)
        if classes < 1 or not alpha > 0:
            raise ValueError(f"classes and alpha must be positive, got {classes} and {alpha}")
        self.alpha = alpha
        self.words = nn.Parameter(_xavier(K, M * d, (M, K, d)))
        self.prototypes = nn.Parameter(_xavier(classes, M * d, (classes, M * d)))

    def unit_prototypes(self) -> Tensor:
        """Intra-normalised prototypes (classes, M * d)."""
        return intra_normalize(self.prototypes, self.M)

    @property
    def codebooks(self) -> Tensor:
        """(M, K, d), each codeword of length 1; made anew from words and prototypes, with a
        gradient to both."""
        with torch.autocast(self.words.device.type, enabled=False):
            p = self.unit_prototypes().unflatten(1, (self.M, self.d))  # (classes, M, d)
            sim = torch.einsum("mkd,cmd->mkc", self.words, p)
            mixed = torch.einsum("mkc,cmd->mkd", torch.softmax(self.alpha * sim, dim=-1), p)
            return F.normalize(mixed, dim=-1)

    def assign(self, x: Tensor) -> Tensor:
        """Soft assignment (N, M, K) of intra-normalised x, softmax over k of alpha <x_m, c_mk>."""
        return self._assign(x, self.codebooks)

    def _assign(self, x: Tensor, codebooks: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            sim = torch.einsum("nmd,mkd->nmk", self._split(x, codebooks.dtype), codebooks)
            return torch.softmax(self.alpha * sim, dim=-1)

    def soft(self, x: Tensor) -> Tensor:
        """Soft-quantized descriptors, intra-normalised.

            assign[n, m, k] = softmax_k( -alpha * (1 - <x[n, m], c[m, k]>) )
            z[n, m] = unit( sum_k assign[n, m, k] * c[m, k] )

        Args:
            x: (N, D) intra-normalised descriptors, D = M * d.
        Returns:
            (N, D).
        Raises:
            ValueError: if x is not (N, M * d).
        Source: GPQ, equation 2.
        """
        codebooks = self.codebooks
        assign = self._assign(x, codebooks)
        with torch.autocast(x.device.type, enabled=False):
            z = torch.einsum("nmk,mkd->nmd", assign, codebooks)
            return F.normalize(z, dim=-1).flatten(1)  # (N, M, d) -> (N, D)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, classes={len(self.prototypes)}, alpha={self.alpha:g}"


def intra_normalize(x: Tensor, M: int) -> Tensor:
    """Scale each of the M sub-vectors to unit length.

        y[n, m] = x[n, m] / || x[n, m] ||

    Args:
        x: (N, D), D a multiple of M.
        M: sub-vectors.
    Returns:
        (N, D); a sub-vector of zeros stays, and below a length of 1e-6 (TensorFlow's bound, as in
        the released code) sub-vectors are divided by that, so that gradients end somewhere.
    Raises:
        ValueError: if M is not positive, x is not (N, D), or D is no multiple of M.
    Source: Arandjelovic & Zisserman 2013; GPQ, section 3.2.
    """
    if M < 1 or x.dim() != 2 or x.shape[1] % M:
        raise ValueError(f"x must be (N, D) with D a multiple of M={M}; got {tuple(x.shape)}")
    return F.normalize(x.unflatten(1, (M, -1)), dim=-1, eps=LEAST_LENGTH).flatten(1)


def _xavier(rows: int, columns: int, shape: tuple[int, ...]) -> Tensor:
    """Drawn uniformly within Xavier's bound for a (rows, columns) matrix."""
    bound = math.sqrt(6.0 / (rows + columns))
    return torch.empty(shape).uniform_(-bound, bound)
