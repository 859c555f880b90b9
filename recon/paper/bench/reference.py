"""The straightforward way to prune by Wanda and to reconstruct half-blocks: the yardstick that `recon bench` measures against.

It does what published pruning code does: all samples, one by one, through each block to add up the norms of what every matrix
reads, and again through the pruned block; then the dense outputs sample by sample, a data loader over samples, masks as
`torch.nn.utils.prune` parametrisations that multiply in every forward pass, autocast, and torch's default AdamW.
Nothing else uses it.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import prune as parametrisation
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from recon.kernels.patterns import Pattern, keep_mask
from recon.model.decoder import Decoder
from recon.model.modules import requiring_gradients
from recon.runtime.device import pick_compute_dtype

BATCH_SIZE = 2


def prune(student: Decoder, samples: Tensor, pattern: str, progress: bool = True) -> dict[str, Tensor]:
    """Prunes the dense `student` in place by Wanda, with statistics from the model pruned so far; returns masks by matrix name.

    samples: tokens (samples, length); masks: True = kept, (out, in).
    """
    masks, totals = {}, {}

    def add(name: str, module: torch.nn.Module, args: tuple) -> None:
        x = args[0].flatten(0, -2).float()
        totals[name] = totals.get(name, 0) + x.norm(dim=0) ** 2

    with torch.no_grad(), _autocast(student):
        hidden = [student.embed(sample[None]) for sample in samples]
        for window in tqdm(student.windows("block"), desc="reference pruning", unit="block", disable=not progress):
            matrices = student.matrices(window)
            handles = [matrix.module.register_forward_pre_hook(partial(add, name)) for name, matrix in matrices.items()]
            for x in hidden:
                student.forward(window, x)
            for handle in handles:
                handle.remove()
            for name, matrix in matrices.items():
                masks[name] = keep_mask(matrix.weight.abs() * totals.pop(name).sqrt(), Pattern.parse(pattern), "row")
                matrix.weight.mul_(masks[name])
            hidden = [student.forward(window, x) for x in hidden]
    return masks


def reconstruct(
    student: Decoder,
    dense: Decoder,
    samples: Tensor,
    masks: dict[str, Tensor],
    learning_rate: float = 3e-3,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Reconstructs the pruned `student` (parameters in float32) in place: dense propagation, half-blocks, one epoch.

    samples: tokens (samples, length); masks: True = kept, by matrix name, (out, in).
    """
    from transformers import (
        get_linear_schedule_with_warmup,
    )  # slow to import, and the command line reads the benchmark's sections

    autocast = _autocast(dense)
    with torch.no_grad(), autocast:
        inputs = torch.cat([dense.embed(sample[None]) for sample in samples])
    for window in tqdm(dense.windows("half-block"), desc="reference loop", unit="window", disable=not progress):
        outputs = torch.empty_like(inputs)
        with torch.no_grad(), autocast:
            for index in range(len(inputs)):
                outputs[index] = dense.forward(window, inputs[index : index + 1])[0]
        matrices = student.matrices(window)
        parameters = list(student.parameters(window).values())
        for name, matrix in matrices.items():
            parametrisation.custom_from_mask(matrix.module, "weight", matrix.oriented(masks[name]))
        loader = DataLoader(
            TensorDataset(inputs, outputs), batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed)
        )
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        scheduler = get_linear_schedule_with_warmup(optimizer, round(0.1 * len(loader)), len(loader))
        with requiring_gradients(student.model.parameters(), False), requiring_gradients(parameters):
            for x, y in loader:
                with autocast:
                    loss = F.mse_loss(student.forward(window, x), y)
                loss.backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        for matrix in matrices.values():
            parametrisation.remove(matrix.module, "weight")
        inputs = outputs


def _autocast(decoder: Decoder) -> torch.autocast:
    dtype = pick_compute_dtype("auto", decoder.device)
    return torch.autocast(decoder.device.type, dtype, enabled=dtype != torch.float32)
