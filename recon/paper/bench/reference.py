"""The straightforward way to reconstruct half-blocks, kept as the yardstick that `recon bench` measures against.

It does what published pruning code does: the dense outputs sample by sample, a data loader over samples, masks as
`torch.nn.utils.prune` parametrisations that multiply in every forward pass, autocast, and torch's default AdamW.
Nothing else uses it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from recon.model.decoder import Decoder
from recon.model.modules import requiring_gradients
from recon.runtime.device import pick_compute_dtype

BATCH_SIZE = 2


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

    dtype = pick_compute_dtype("auto", dense.device)
    autocast = torch.autocast(dense.device.type, dtype, enabled=dtype != torch.float32)
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
            prune.custom_from_mask(matrix.module, "weight", matrix.oriented(masks[name]))
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
            prune.remove(matrix.module, "weight")
        inputs = outputs
