"""Several processes as one: ranks, gathering with gradients, batch norm over the global batch."""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_signals: dist.ProcessGroup | None = None  # gloo beside NCCL: words that no GPU has to wait for


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; (0, 1, 0) without torchrun."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """The one process that prints, logs and writes files."""
        return self.rank == 0

    @staticmethod
    def from_environment() -> "Ranks":
        """As torchrun's environment variables say."""
        env = os.environ
        return Ranks(
            int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0))
        )

    def connect(self, device: torch.device, timeout: timedelta | None = None) -> None:
        """Join the process group: NCCL between GPUs, gloo between CPUs.

        Args:
            device: of the tensors that are exchanged.
            timeout: how long a process waits for the others (default: torch's).
        """
        if self.world_size > 1 and not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timeout)
            global _signals
            _signals = dist.new_group(backend="gloo", timeout=timeout)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Model for training: synchronised batch norm and averaged gradients if there are ranks.

        The norms of a part whose parameters are all frozen stay as they are.
        """
        if self.world_size == 1:
            return model
        on_gpu = next(model.parameters()).device.type == "cuda"
        _replace_norms(model, _synchronised if on_gpu else _globalised)
        # the statistics are equal on all ranks already: no need to broadcast them each forward
        known = inspect.signature(DistributedDataParallel).parameters
        new = "forward_sync_buffers"  # the name in newer releases of torch
        flag = new if new in known else "broadcast_buffers"
        return DistributedDataParallel(model, **{flag: False})

    def gather(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Each (B, ...) -> (world_size * B, ...), in order of rank, with gradients.

        Every rank then computes the same global loss; the gradients that come back are summed
        over the ranks and DistributedDataParallel's mean makes them those of one process.
        """
        if self.world_size == 1:
            return tensors
        return tuple(_Gather.apply(t) for t in tensors)

    def max(self, value: int) -> int:
        """The largest value of all ranks, between their CPUs: no GPU is waited for."""
        if self.world_size == 1:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=_signals)
        return int(shared)

    def collect(self, value: object) -> list:
        """The values of all ranks, in order of rank."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.world_size > 1:
            dist.barrier()

    @staticmethod
    def disconnect() -> None:
        """Leave the process group."""
        global _signals
        if dist.is_initialized():
            dist.destroy_process_group()
            _signals = None


class _Gather(torch.autograd.Function):
    """All ranks' rows; backward: the sum of all ranks' gradients of this rank's rows."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # noqa: ANN001
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # noqa: ANN001
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


class _GlobalNorm(torch.autograd.Function):
    """Batch norm of this rank's images by the statistics of all ranks', and those statistics.

    Forward and backward are torch's own kernels for given statistics; what the statistics
    themselves contribute to the gradient is added in one pass.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float):  # noqa: ANN001
        values = x if x.dtype == torch.float64 else x.float()
        dims = [0, *range(2, x.dim())]  # all but the channels
        local = torch.stack(torch.var_mean(values, dim=dims, correction=0))  # (2, C)
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local)
        var, mean = torch.stack(parts).unbind(1)  # (ranks, C) each
        mean, means = mean.mean(dim=0), mean
        var = (var + (means - mean).square()).mean(dim=0)
        out = F.batch_norm(values, mean, var, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(values, weight, mean, var)
        ctx.eps, ctx.dtype = eps, x.dtype
        ctx.mark_non_differentiable(mean, var)
        return out.to(x.dtype), mean, var

    @staticmethod
    def backward(ctx, grad: Tensor, *_):  # noqa: ANN001
        values, weight, mean, var = ctx.saved_tensors
        grad = grad.to(values.dtype)
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, values, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([dweight, dbias])  # over images and pixels, of all ranks
        dist.all_reduce(sums)
        n = values.numel() // values.shape[1] * dist.get_world_size()
        # dx of batch norm: scale * (grad - mean(grad) - x^ mean(grad x^)), x^ = (x - mean) / sd
        scale = weight * torch.rsqrt(var + ctx.eps)
        slope = -scale * torch.rsqrt(var + ctx.eps) * sums[0] / n
        shift = -scale * sums[1] / n - slope * mean
        channels = (-1, *[1] * (values.dim() - 2))  # (C, 1, 1) for images
        dx = dx.addcmul_(values, slope.view(channels)).add_(shift.view(channels))
        return dx.to(ctx.dtype), dweight, dbias, None


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the images of all ranks, on any device.

    torch's SyncBatchNorm does the same faster, but on GPUs only. Every rank must bring the same
    number of images. State and evaluation are those of BatchNorm1d and BatchNorm2d, whichever it
    stands for. With timm's BatchNormAct2d come `drop` and `act`, which follow the norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = self._normed(x) if self.training else super().forward(x)
        return self.act(self.drop(x)) if hasattr(self, "act") else x

    def _normed(self, x: Tensor) -> Tensor:
        out, mean, var = _GlobalNorm.apply(x, self.weight, self.bias, self.eps)
        n = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / max(1, n - 1)), self.momentum)
        return out

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"images or rows are expected, (N, C, ...), not {tuple(x.shape)}")


def _globalised(norm: nn.Module) -> GlobalBatchNorm:
    """A GlobalBatchNorm with the very tensors of a batch norm."""
    synced = GlobalBatchNorm(norm.num_features, norm.eps, norm.momentum)
    synced.weight, synced.bias = norm.weight, norm.bias
    synced.running_mean, synced.running_var = norm.running_mean, norm.running_var
    synced.num_batches_tracked = norm.num_batches_tracked
    for name, child in norm.named_children():  # timm's drop and act
        synced.add_module(name, child)
    return synced.train(norm.training)


def _synchronised(norm: nn.Module) -> nn.Module:
    """torch's SyncBatchNorm in place of a batch norm, or timm's with drop and activation."""
    if not hasattr(norm, "act"):
        return nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(norm).train(norm.training)  # which older timm forgets


def _replace_norms(module: nn.Module, replace: Callable[[nn.Module], nn.Module]) -> None:
    """Another batch norm for each one below `module` that learns."""
    for name, child in module.named_children():
        learns = [p.requires_grad for p in child.parameters()]
        if learns and not any(learns):
            continue  # frozen
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, replace(child))
        else:
            _replace_norms(child, replace)
