"""`recon bench`: times each phase of a run, beside a straightforward loop and the least time that its FLOPs can take.

The straightforward loop works as published pruning code does. To prune, each sample runs through a block to add up the norms of
its matrices' inputs, and again through the pruned block. To reconstruct: dense outputs sample by sample, a data loader over
samples, `torch.nn.utils.prune` masks that multiply in every forward pass, autocast, and torch's default AdamW.
"""

import copy
import tempfile
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import prune as parametrisation
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from recon.data import models
from recon.errors import ReconError
from recon.evaluate.perplexity import perplexity
from recon.kernels.patterns import Pattern, keep_mask
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.runtime.device import pick_compute_dtype, pick_device
from recon.runtime.execution import Execution
from recon.runtime.storage import check_writable, write_json
from recon.study.measure import Texts
from recon.study.plan import gemm_rate
from recon.study.record import environment
from recon.study.run import Session, run
from recon.study.spec import RunOptions, RunSpec

RATE = 3e-3
REFERENCE = dict(pattern="0.5", epochs=1, batch_size=2, propagation="dense", chunks=1)  # options of the straightforward loop
RUNS = [  # options of our run, beside `REFERENCE`; measured phase -> phases of the record to add up
    ({"granularity": "none"}, {"prune, wanda": ["prune"]}),
    ({"granularity": "none", "criterion": "sparsegpt"}, {"prune, sparsegpt": ["prune"]}),
    ({}, {"reconstruct": ["reconstruct"], "prune and reconstruct": ["prune", "reconstruct"]}),
    ({"propagation": "mixed"}, {"reconstruct, mixed": ["reconstruct"]}),
]


def bench(
    output: Path | str, model: str, text: str, samples: int, sequence_length: int, blocks: int, repeats: int, device: str = "auto"
) -> dict:
    """Times every phase in turn, `repeats` times, on the first `blocks` blocks of `model`; writes the results to `output`.

    Returns settings, environment, `floor_seconds` by phase (its FLOPs at the speed of a large square matrix product), and `rows`:
    phase, loop ("ours", "reference"), round, seconds. Raises `ReconError` for bad input.
    """
    settings, rows, floors = {name: value for name, value in locals().items() if name != "output"}, [], {}
    check_writable(Path(output).parent, "output")
    spec = RunSpec.of(
        **REFERENCE, model=model, text=text, samples=samples, sequence_length=sequence_length, device=device, held_out_samples=0,
        evaluation_texts=(text,), evaluation_samples=1, evaluation_length=sequence_length, kl_windows=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        dense, tokenizer, tokens = subject(spec, blocks, folder)
        spec, rate = spec.replaced(model=folder), gemm_rate(dense.device, pick_compute_dtype("auto", dense.device), size=2048)
        for number in tqdm(range(repeats), desc="bench", unit="round"):
            student = decompose(copy.deepcopy(dense.model), like=dense)
            found = {("reference", phase): seconds for phase, seconds in reference(student, dense, tokens).items()}
            for options, measured in RUNS:
                session, kept = Session(), decompose(copy.deepcopy(dense.model).cpu(), like=dense)
                session.keep("model", spec.loaded_by, lambda kept=kept: (kept, tokenizer))
                record = run(spec.replaced(**options), RunOptions(progress=False, force=True), session=session).record
                for phase, parts in measured.items():
                    found["ours", phase] = sum(record.seconds[part] for part in parts)
                    floors[phase] = sum(record.flops[part] for part in parts) / rate
            began = _now()
            perplexity(dense, tokens, execution=Execution(dense.device, progress=False))
            found["ours", "evaluate"] = _now() - began
            floors["evaluate"] = samples * record.flops["evaluate"] / 3 / rate  # recorded: one window, three models
            rows += [{"phase": phase, "loop": loop, "round": number, "seconds": t} for (loop, phase), t in found.items()]
    results = {"settings": settings, "environment": environment(dense.device, "auto"), "floor_seconds": floors, "rows": rows}
    write_json(Path(output), results)
    return results


def table(results: dict) -> pd.DataFrame:
    """By phase: mean seconds of both loops and of the floor, and their ratios."""
    means = pd.DataFrame(results["rows"]).groupby(["phase", "loop"])["seconds"].mean().unstack()
    means = means.reindex(results["floor_seconds"]).assign(floor=pd.Series(results["floor_seconds"]))
    ratios = {f"{a} / {b}": means[a] / means[b] for a, b in (("reference", "ours"), ("reference", "floor"), ("ours", "floor"))}
    return means.add_suffix(", s").assign(**ratios)


def subject(spec: RunSpec, blocks: int, folder: Path | str) -> tuple[Decoder, object, Tensor]:
    """The first `blocks` blocks of the model of `spec` (also saved in `folder`), its tokenizer, and its calibration tokens."""
    whole, tokenizer = models.load(spec.model.model)
    decoder, config, device = decompose(whole), whole.config, pick_device(spec.compute.device)
    if decoder.reading or any(matrix.expert is not None for matrix in decoder.matrices().values()):
        raise ReconError(f"model {spec.model.model!r} has experts or an encoder; the plain loop beside ours knows neither")
    del whole.get_submodule(decoder.structure.stacks[-1])[blocks:]
    config.num_hidden_layers = min(blocks, len(decoder.blocks))
    if vars(config).get("layer_types"):
        config.layer_types = config.layer_types[:blocks]
    with models.quiet():
        whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return decompose(whole.to(device)), tokenizer, Texts.draw(spec.resolved(), tokenizer).calibration.to(device)


def reference(student: Decoder, dense: Decoder, samples: Tensor) -> dict[str, float]:
    """The straightforward loop; changes `student`, a copy of `dense`. samples: (samples, length). Returns seconds by phase."""
    from transformers import get_linear_schedule_with_warmup  # slow to import

    dtype, batch_size = pick_compute_dtype("auto", dense.device), REFERENCE["batch_size"]
    autocast = partial(torch.autocast, dense.device.type, dtype, enabled=dtype != torch.float32)
    began, masks, totals = _now(), {}, {}

    def add(group: tuple[str, ...], x: Tensor) -> None:
        totals[group] = totals.get(group, 0) + x.flatten(0, -2).float().norm(dim=0) ** 2

    with torch.no_grad(), autocast():
        hidden = [dense.embed(sample[None]) for sample in samples]
        inputs = torch.cat(hidden)
        for window in student.windows("block"):
            totals, matrices = {}, student.matrices(window)
            with student.watching(window, add):
                for x in hidden:
                    student.forward(window, x)
            for name, norms in ((name, total.sqrt()) for group, total in totals.items() for name in group):
                masks[name] = keep_mask(matrices[name].weight.abs() * norms, Pattern.parse(REFERENCE["pattern"]), "row")
                matrices[name].weight.mul_(masks[name])
            hidden = [student.forward(window, x) for x in hidden]
    pruned = _now()
    for window in dense.windows("half-block"):
        with torch.no_grad(), autocast():
            outputs = torch.cat([dense.forward(window, x[None]) for x in inputs])
        matrices, parameters = student.matrices(window).values(), student.parameters(window).values()
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        for matrix in matrices:
            parametrisation.custom_from_mask(matrix.module, "weight", matrix.oriented(masks[matrix.name]))
        data, order = TensorDataset(inputs, outputs), torch.Generator().manual_seed(0)
        loader = DataLoader(data, batch_size, shuffle=True, generator=order)
        scheduler = get_linear_schedule_with_warmup(optimizer, round(0.1 * len(loader)), len(loader))
        for x, y in loader:
            with autocast():
                loss = F.mse_loss(student.forward(window, x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        for matrix in matrices:
            parametrisation.remove(matrix.module, "weight")
        inputs = outputs
    done = _now()
    return {"prune, wanda": pruned - began, "reconstruct": done - pruned, "prune and reconstruct": done - began}


def _now() -> float:
    """A clock in seconds; if there is a GPU, it is read after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
