"""Several processes as one: ranks, gathering with gradients, batch norm over the global batch."""

import inspect
import os
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
        """Model for training: synchronised batch norm and averaged gradients if there are ranks."""
        if self.world_size == 1:
            return model
        on_gpu = next(model.parameters()).device.type == "cuda"
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if on_gpu else _globalise(model)
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
        local = torch.stack(torch.var_mean(values, dim=(0, 2, 3), correction=0))  # (2, C)
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
        dx = dx.addcmul_(values, slope[:, None, None]).add_(shift[:, None, None])
        return dx.to(ctx.dtype), dweight, dbias, None


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all ranks, on any device.

    torch's SyncBatchNorm does the same faster, but on GPUs only. Every rank must bring the same
    number of images. State and evaluation are those of BatchNorm2d.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        out, mean, var = _GlobalNorm.apply(x, self.weight, self.bias, self.eps)
        n = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / max(1, n - 1)), self.momentum)
        return out


def _globalise(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm2d below `module` by a GlobalBatchNorm2d with its very tensors."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and not isinstance(child, GlobalBatchNorm2d):
            synced = GlobalBatchNorm2d(child.num_features, child.eps, child.momentum)
            synced.weight, synced.bias = child.weight, child.bias
            synced.running_mean, synced.running_var = child.running_mean, child.running_var
            synced.num_batches_tracked = child.num_batches_tracked
            setattr(module, name, synced)
        else:
            _globalise(child)
    return module
