"""`recon bench`: seconds of each phase, beside the least that its products take, and beside a straightforward loop.

The straightforward loop does what published pruning code does: all samples, one by one, through each block to add up the norms of
what every matrix reads, and again through the pruned block; then the dense outputs sample by sample, a data loader over samples,
masks as `torch.nn.utils.prune` parametrisations that multiply in every forward pass, autocast, and torch's default AdamW.
"""

import copy
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as parametrisation
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from recon.data import models
from recon.data.text import sample_tokens
from recon.evaluate.perplexity import perplexity
from recon.kernels.patterns import Pattern, keep_mask
from recon.methods.prune import prune
from recon.methods.reconstruct import reconstruct
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.modules import requiring_gradients
from recon.runtime.device import pick_compute_dtype, pick_device
from recon.runtime.execution import Execution
from recon.runtime.storage import check_writable, write_json
from recon.study.plan import flops, gemm_rate
from recon.study.record import environment
from recon.study.spec import RunSpec

BATCH_SIZE, PATTERN, RATE = 2, "0.5", 3e-3
PHASES = {  # phase -> what `recon.study.plan.flops` calls it, and its options beside those of the straightforward loop
    "prune, wanda": ("prune", {"granularity": "none"}),
    "prune, sparsegpt": ("prune", {"granularity": "none", "criterion": "sparsegpt"}),
    "reconstruct": ("reconstruct", {}),
    "reconstruct, mixed": ("reconstruct", {"propagation": "mixed"}),
    "prune and reconstruct": ("reconstruct", {}),
    "evaluate": ("evaluate", {"granularity": "none"}),
}
REFERENCE = ("prune, wanda", "reconstruct", "prune and reconstruct")  # what the straightforward loop does, too


def bench(
    output: Path | str, model: str, text: str, samples: int, sequence_length: int, blocks: int, repeats: int, device: str = "auto"
) -> dict:
    """Times every phase in turn, `repeats` times, on the first `blocks` blocks of `model`; writes the results to `output`.

    Returns settings, environment, `floor_seconds` by phase, and `rows`: phase, loop ("ours", "reference"), round, seconds. The floor
    is what the products and attention of a phase take at the speed of large squares. Raises `ReconError` for bad input.
    """
    settings = {name: value for name, value in locals().items() if name != "output"}
    check_writable(Path(output).parent, "output")
    dense, tokens = subject(model, text, samples, sequence_length, blocks, device)
    rate, rows = gemm_rate(dense.device, pick_compute_dtype("auto", dense.device), size=2048), []
    cell = RunSpec.of(
        text=text, evaluation_texts=(text,), samples=samples, evaluation_samples=samples, sequence_length=sequence_length,
        evaluation_length=sequence_length, held_out_samples=0, pattern=PATTERN, epochs=1, batch_size=BATCH_SIZE, propagation="dense",
        chunks=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # whose configuration is that of the shortened model
        dense.model.config.save_pretrained(folder)
        specs = {phase: cell.replaced(model=folder, **options) for phase, (_, options) in PHASES.items()}
        floors = {phase: flops(spec)[PHASES[phase][0]] / rate for phase, spec in specs.items()}
    floors["evaluate"] /= 2  # a run evaluates twice
    execution = Execution(dense.device, progress=False)
    masks = prune(copied(dense, {}), tokens, cell.pruning, execution=execution).masks

    def ours(phase: str, student: Decoder) -> None:
        spec = specs[phase]
        if phase == "evaluate":
            perplexity(student, tokens, execution=execution)
        elif spec.reconstruction.granularity == "none":
            prune(student, tokens, spec.pruning, execution=execution)
        else:
            pruned = {"pruning": spec.pruning} if phase.startswith("prune") else {"masks": masks}
            reconstruct(student, dense, tokens, spec.reconstruction, execution=execution, **pruned)

    def reference(phase: str, student: Decoder) -> None:
        kept = reference_prune(student, tokens) if phase.startswith("prune") else masks
        if phase.endswith("reconstruct"):
            reference_reconstruct(student, dense, tokens, kept)

    for number in tqdm(range(repeats), desc="bench", unit="round"):
        for phase in PHASES:
            for loop in (reference, ours) if phase in REFERENCE else (ours,):
                student = copied(dense, {} if phase.startswith("prune") else masks)
                began = time.perf_counter()
                loop(phase, student)
                if dense.device.type == "cuda":
                    torch.cuda.synchronize()
                rows.append({"phase": phase, "loop": loop.__name__, "round": number, "seconds": time.perf_counter() - began})
    results = {"settings": settings, "environment": environment(dense.device, "auto"), "floor_seconds": floors, "rows": rows}
    write_json(Path(output), results)
    return results


def table(results: dict) -> pd.DataFrame:
    """By phase: mean seconds of both loops, their ratio within a round, the floor, and how many times it each takes."""
    rounds = pd.DataFrame(results["rows"]).pivot(index=["phase", "round"], columns="loop", values="seconds")
    rounds["reference / ours"] = rounds["reference"] / rounds["ours"]
    found = rounds.groupby("phase").mean().reindex(results["floor_seconds"])
    found["floor"] = pd.Series(results["floor_seconds"])
    for loop in ("reference", "ours"):
        found[f"{loop} / floor"] = found[loop] / found["floor"]
    return found.rename(columns={name: f"{name}, s" for name in ("reference", "ours", "floor")})


def subject(model: str, text: str, samples: int, length: int, blocks: int, device: str = "auto") -> tuple[Decoder, Tensor]:
    """The first `blocks` blocks of a model, and calibration tokens (samples, length), on the device."""
    whole, tokenizer = models.load(model)
    decoder = decompose(whole)
    del whole.get_submodule(decoder.structure.stacks[-1])[blocks:]
    place, config = pick_device(device), whole.config
    config.num_hidden_layers = min(blocks, len(decoder.blocks))
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    return decompose(whole.to(place)), sample_tokens(text, "calibration", tokenizer, samples, length, seed=0).to(place)


def copied(dense: Decoder, masks: Mapping[str, Tensor]) -> Decoder:
    """A copy of `dense`, with what `masks` do not keep set to zero."""
    student = decompose(copy.deepcopy(dense.model), like=dense)
    with torch.no_grad():
        for name, mask in masks.items():
            student.matrices()[name].weight.mul_(mask)
    return student


def reference_prune(student: Decoder, samples: Tensor) -> dict[str, Tensor]:
    """Prunes `student` in place by Wanda, with statistics from the model pruned so far; returns masks, True = kept, (out, in)."""
    masks, totals = {}, {}

    def add(name: str, module: nn.Module, args: tuple) -> None:
        totals[name] = totals.get(name, 0) + args[0].flatten(0, -2).float().norm(dim=0) ** 2

    with torch.no_grad(), _autocast(student):
        hidden = [student.embed(sample[None]) for sample in samples]
        for window in student.windows("block"):
            matrices = student.matrices(window)
            handles = [matrix.module.register_forward_pre_hook(partial(add, name)) for name, matrix in matrices.items()]
            for x in hidden:
                student.forward(window, x)
            for handle in handles:
                handle.remove()
            for name, matrix in matrices.items():
                masks[name] = keep_mask(matrix.weight.abs() * totals.pop(name).sqrt(), Pattern.parse(PATTERN), "row")
                matrix.weight.mul_(masks[name])
            hidden = [student.forward(window, x) for x in hidden]
    return masks


def reference_reconstruct(student: Decoder, dense: Decoder, samples: Tensor, masks: dict[str, Tensor], seed: int = 0) -> None:
    """Reconstructs the pruned `student` (parameters in float32) in place: dense propagation, half-blocks, one epoch."""
    from transformers import get_linear_schedule_with_warmup  # slow to import

    with torch.no_grad(), _autocast(dense):
        inputs = torch.cat([dense.embed(sample[None]) for sample in samples])
    for window in dense.windows("half-block"):
        outputs = torch.empty_like(inputs)
        with torch.no_grad(), _autocast(dense):
            for index, x in enumerate(inputs):
                outputs[index] = dense.forward(window, x[None])[0]
        matrices, parameters = student.matrices(window), list(student.parameters(window).values())
        for name, matrix in matrices.items():
            parametrisation.custom_from_mask(matrix.module, "weight", matrix.oriented(masks[name]))
        order = torch.Generator().manual_seed(seed)
        loader = DataLoader(TensorDataset(inputs, outputs), BATCH_SIZE, shuffle=True, generator=order)
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        scheduler = get_linear_schedule_with_warmup(optimizer, round(0.1 * len(loader)), len(loader))
        with requiring_gradients(student.model.parameters(), False), requiring_gradients(parameters):
            for x, y in loader:
                with _autocast(dense):
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
