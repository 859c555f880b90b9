"""The sections of the benchmark: each is a function of a `Subject` that returns plain data.

`recon.paper.bench.spec.SECTIONS` lists them.
"""

import copy
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, profiler
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from recon.errors import ReconError
from recon.methods.reconstruct import reconstruct
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.paper.bench import products as matrix_products
from recon.paper.bench import reference
from recon.paper.bench.subject import EQUAL, Subject, pruned
from recon.runtime import device
from recon.runtime.activations import LIMIT
from recon.runtime.execution import Execution
from recon.study import ray_windows
from recon.study.cost import flops, gemm_rate
from recon.study.report import share_recovered
from recon.study.run import run
from recon.study.session import Session
from recon.study.spec import RunOptions, RunSpec
from recon.study.studies import grid, run_study
from recon.study.workers import Ray, connect

FROM_EXACT = {"epochs": 1, "start": "exact", "exact_iterations": 2}  # few samples: more iterations would fit their noise
RECIPES: dict[str, tuple[dict, float]] = {  # options of `ReconstructionConfig`, share of the samples
    "default": ({}, 1.0),
    "fast": ({"preset": "fast"}, 1.0),
    "best": ({"preset": "best"}, 1.0),
    "half of the samples": ({"epochs": 1}, 0.5),
    "fast, half of the samples": ({"epochs": 1, "preset": "fast"}, 0.5),
    "a quarter of the samples, from exact": (FROM_EXACT, 0.25),
    "a quarter of the samples": ({"epochs": 1}, 0.25),
}
EXACT = {"granularity": "matrix", "solver": "exact", "propagation": "dense"}
KINDS = {  # kind of operation -> parts of their names
    "matrix products": ("aten::mm", "aten::addmm"),
    "attention": ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data", "scaled_dot_product"),
    "optimiser": ("adamw", "aten::lerp", "aten::addcdiv", "aten::addcmul", "aten::sqrt"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::index", "aten::fill_", "aten::stack"),
}


def _rates(subject: Subject) -> dict[str, float]:
    """Floating-point operations per second of large squares, by dtype."""
    dtypes = {subject.dtype, torch.float32}
    return {str(t).removeprefix("torch."): gemm_rate(subject.device, t, size=2048, seconds=0.5) for t in dtypes}


def products(subject: Subject) -> dict:
    """How near the loop of `ours` comes to its matrix products alone: each shape, timed by itself as often as it occurs, in seconds."""
    dense = subject.short(min(2, subject.spec.blocks))
    with FlopCounterMode(display=False) as counter, matrix_products.Recorder() as recorder:
        subject.ours(pruned(dense, {}), dense, subject.samples)
    by_operator = counter.get_flop_counts()["Global"]
    flops = {"weights": 0, "attention": by_operator.get(torch.ops.aten.bmm, 0)}
    flops["weights"] = sum(by_operator.get(operator, 0) for operator in (torch.ops.aten.mm, torch.ops.aten.addmm))
    rows = [
        {
            "left": list(product.left[0]), "right": list(product.right[0]),
            "kind": "attention" if len(product.left[0]) == 3 else "weights",
            "layout": "".join("n" if side[1][-1] == 1 else "t" for side in (product.left, product.right)),
            "dtype": str(product.left[2]).removeprefix("torch."),
            "count": count, "seconds_alone": product.seconds(subject.device),
        }
        for product, count in tqdm(recorder.counts.items(), desc="products", disable=not subject.progress)
    ]  # fmt: skip
    ceiling = {kind: sum(row["count"] * row["seconds_alone"] for row in rows if row["kind"] == kind) for kind in flops}
    seconds = [subject.measured(subject.ours, dense, subject.samples)[0]["seconds"] for _ in range(subject.spec.repeats)]
    return {
        "square_flops_per_second": _rates(subject), "blocks": len(dense.blocks), "products": rows, "flops": flops,
        "seconds_at_ceiling": ceiling, "seconds": seconds,
        "achieved_share_of_ceiling": [ceiling["weights"] / each for each in seconds],
    }  # fmt: skip


def phases(subject: Subject) -> dict:
    """Seconds of each phase, ours and the reference's, beside the products that it cannot do without."""
    dense, samples = subject.short(subject.spec.blocks), subject.samples
    stream = subject.execution.embed(dense, samples)
    rates, floors = _rates(subject), _floors(subject, dense)
    masks = {"masks": subject.prune(pruned(dense, {}), dense, samples)}
    work: dict[tuple[str, str], tuple[Callable, dict]] = {  # phase, whose -> work, its options
        ("teacher's pass", "ours"): (subject.forward, {"stream": stream}),
        ("prune, wanda", "reference"): (subject.reference_prune, {}),
        ("prune, wanda", "ours"): (subject.prune, {}),
        ("prune, sparsegpt", "ours"): (subject.prune, {"criterion": "sparsegpt"}),
        ("matrix, exact", "ours"): (subject.reconstruct, masks | EXACT),
        ("reconstruct", "reference"): (subject.reference_reconstruct, masks),
        ("reconstruct", "ours"): (subject.reconstruct, masks | EQUAL),
        ("reconstruct, mixed", "ours"): (subject.reconstruct, masks | EQUAL | {"propagation": "mixed"}),
        ("prune and reconstruct", "reference"): (subject.reference, {}),
        ("prune and reconstruct", "ours"): (subject.ours, EQUAL),
        ("evaluate", "ours"): (subject.evaluate, {}),
    }
    rows = [
        {"phase": phase, "loop": whose, "round": number} | subject.measured(function, dense, samples, **options)[0]
        for number in range(subject.spec.repeats)
        for (phase, whose), (function, options) in work.items()
    ]
    seconds = {phase: sum(count / rates[dtype] for dtype, count in parts.items()) for phase, parts in floors.items()}
    return {
        "blocks": len(dense.blocks), "square_flops_per_second": rates, "floor_flops": floors, "floor_seconds": seconds, "rows": rows
    }  # fmt: skip


def _floors(subject: Subject, dense: Decoder) -> dict[str, dict[str, float]]:
    """The floating-point operations that each phase cannot do without, by dtype: what `recon.study.cost` counts.

    Norms are free: they take the teacher's pass alone. With masks that depend on nothing that reconstruction does, its own pass
    of the teacher serves pruning too. Gram matrices, and what is solved with them, are products in float32.
    """
    dtype = str(subject.dtype).removeprefix("torch.")

    def operations(phase: str, **options) -> float:
        options = {"statistics": "dense", "pattern": subject.spec.pattern, "held_out_samples": 0} | options
        return flops(_run_spec(subject, **options), dense)[phase]

    def with_grams(total: float) -> dict[str, float]:
        return Counter({dtype: teacher}) + Counter({"float32": total - teacher})

    # With reconstruction, `flops` leaves out the pass of the teacher that serves both.
    teacher, steps = operations("prune", granularity="none"), operations("reconstruct", **EQUAL)
    return {
        "teacher's pass": {dtype: teacher},
        "prune, wanda": {dtype: teacher},
        "prune, sparsegpt": with_grams(operations("prune", criterion="sparsegpt", granularity="none")),
        "matrix, exact": with_grams(operations("reconstruct", **EXACT)),
        "reconstruct": {dtype: steps},
        "reconstruct, mixed": {dtype: operations("reconstruct", **EQUAL | {"propagation": "mixed"})},
        "prune and reconstruct": {dtype: steps},
        "evaluate": {dtype: operations("evaluate", granularity="none") / 2},  # which a run does before pruning and after
    }


def profile(subject: Subject) -> dict:
    """Where the loops spend their time, by kind of operation: shares, and the operators that take most."""
    found = {}
    dense = subject.short(2)
    for name, loop in subject.loops.items():
        student = pruned(dense, {})
        cuda = [profiler.ProfilerActivity.CUDA] if subject.device.type == "cuda" else []
        with profiler.profile(activities=[profiler.ProfilerActivity.CPU, *cuda]) as profiled:
            loop(student, dense, subject.samples)
        own = "self_device_time_total" if cuda else "self_cpu_time_total"
        rows = [{"operation": e.key, "seconds": getattr(e, own) / 1e6, "calls": e.count} for e in profiled.key_averages()]
        kinds = dict.fromkeys([*KINDS, "everything else"], 0.0)
        for row in rows:
            parts = (kind for kind, names in KINDS.items() if any(part in row["operation"] for part in names))
            kinds[next(parts, "everything else")] += row["seconds"]
        found[name] = {"kinds": kinds, "operations": sorted(rows, key=lambda row: row["seconds"], reverse=True)[:20]}
    return found


def growth(subject: Subject) -> list[dict]:
    """Seconds and memory of the loops while one of samples, sequence length, depth and width grows."""
    few, length = max(4, subject.spec.samples // 8), subject.spec.sequence_length
    one = subject.short(1)
    cases: list[tuple[str, int, Decoder, Tensor]] = []  # axis, value, dense model, samples
    cases += [("samples", few * share, one, subject.samples[: few * share]) for share in (1, 2, 4)]
    cases += [("sequence length", length // share, one, subject.samples[:few, : length // share]) for share in (4, 2, 1)]
    depths = [blocks for blocks in (1, 2, 4) if blocks <= len(subject.dense.blocks)]
    cases += [("depth", blocks, subject.short(blocks), subject.samples[:few]) for blocks in depths]
    cases += [("width", width, dense, subject.samples[:few]) for width, dense in _widths(subject)]
    rows = []
    for axis, value, dense, samples in tqdm(cases, desc="growth", disable=not subject.progress):
        for name, loop in subject.loops.items():
            row, _ = subject.measured(loop, dense, samples.contiguous())
            rows.append({"axis": axis, "value": value, "loop": name} | row)
    return rows


def _widths(subject: Subject) -> Iterator[tuple[int, Decoder]]:
    """Hidden size and a random model of one block, of the model's kind, at a third, once and twice its width, where it divides."""
    for factor in (1 / 3, 1, 2):
        config = copy.deepcopy(subject.dense.model.config)
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        sizes = {name: getattr(config, name) * factor for name in names if hasattr(config, name)}
        if any(abs(size - round(size)) > 1e-6 or round(size) < 1 for size in sizes.values()):
            continue
        for name, size in sizes.items():
            setattr(config, name, round(size))
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
        yield config.hidden_size, decompose(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())


def quality(subject: Subject) -> list[dict]:
    """Perplexity after so many seconds: the reference, and `RECIPES` of ours."""
    dense = subject.dense
    student = pruned(dense, {})
    subject.prune(student, dense, subject.samples)
    levels = {"dense": subject.perplexity(dense, "dense"), "pruned": subject.perplexity(student, "pruned")}
    rows = [{"loop": name, "perplexity": level} for name, level in levels.items()]
    runs: list[tuple[str, Callable, float, dict]] = [  # name, loop, share of the samples, options
        ("reference", subject.reference, 1.0, {}),
        ("ours, equal steps", subject.ours, 1.0, EQUAL),
    ]
    for name, (options, share) in RECIPES.items():
        runs.append((f"ours, {name}", subject.ours, share, options))
    for name, loop, share, options in runs:
        samples = subject.samples[: round(share * len(subject.samples))]
        row, student = subject.measured(loop, dense, samples, **options)
        value = subject.perplexity(student, name)
        recovered = share_recovered(*levels.values(), value)
        rows.append({"loop": name, "samples": len(samples), "perplexity": value, "share_recovered": recovered} | row)
    return rows


def _run_spec(subject: Subject, **options) -> RunSpec:
    """The benchmark's cell as a run of one epoch, with other options by flat name."""
    spec = subject.spec
    cell = {
        "model": spec.model, "text": spec.text, "evaluation_texts": (spec.text,), "samples": spec.samples,
        "sequence_length": spec.sequence_length, "evaluation_samples": spec.evaluation_samples,
        "evaluation_length": spec.evaluation_length, "device": spec.device, "epochs": 1,
    }  # fmt: skip
    return RunSpec.of(**cell | options)


def sweep(subject: Subject) -> dict:
    """Seconds of runs one by one, and of the same in a study, which shares what they have in common."""
    spec = subject.spec
    base = _run_spec(
        subject, pattern=spec.pattern, samples=max(2, spec.samples // 4), sequence_length=spec.sequence_length // 2,
        evaluation_samples=max(1, spec.evaluation_samples // 10),
    )  # fmt: skip
    criteria = ["magnitude", "wanda"]
    specs = grid(base, criterion=criteria, granularity=["none", "half-block", "block", "quarter"])
    specs += grid(base.replaced(granularity="matrix"), criterion=criteria, solver=["adamw", "exact"])
    specs.sort(key=lambda one: one.pruning.criterion)

    def seconds(session: Session | None) -> list[float]:
        found = []
        for one in specs:
            began = time.perf_counter()
            run(one, RunOptions(progress=False), session=session)
            found.append(time.perf_counter() - began)
        return found

    singly, shared = seconds(None), seconds(Session(activation_bytes=LIMIT))
    runs = [one.flat() for one in specs]
    return {"runs": runs, "seconds_singly": singly, "seconds_in_study": shared, "share": sum(shared) / sum(singly)}


def workers(subject: Subject) -> dict:
    """Seconds of a study without Ray, and on more and more workers of one thread each."""
    base = _run_spec(subject, device="cpu", propagation="dense")  # or windows would depend on one another
    specs = grid(base, criterion=["magnitude", "wanda"], seed=range(subject.spec.repeats))
    crews = [None, *(Ray(threads=1, workers=2**power) for power in range(device.cores().bit_length()))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rate = gemm_rate(torch.device("cpu"), subject.dtype)
        masks = subject.prune(pruned(subject.dense, {}), subject.dense, subject.samples)
        studies, windows = [], []
        for crew in tqdm(crews, desc="workers", disable=not subject.progress):
            count, executor = {"workers": crew.workers if crew else 0}, crew or "serial"
            studies.append(count | _study(specs, executor))
            student = pruned(subject.dense, masks)
            began = time.perf_counter()
            reports = reconstruct(
                student, subject.dense, subject.samples, base.reconstruction, masks=masks,
                execution=Execution("cpu", progress=False, loop=ray_windows.loop(executor)),
            )  # fmt: skip
            seconds = time.perf_counter() - began
            windows.append(count | {"seconds": seconds, "in_windows": [report.seconds for report in reports]})
        connect().shutdown()  # now, and not while the process ends
    finally:
        torch.set_num_threads(threads)
    return {"base": base.flat(), "flops_per_second": rate, "runs": len(specs), "studies": studies, "windows": windows}


def _study(specs: list[RunSpec], executor) -> dict:
    """Seconds of a study; in the order in which its runs ended, when that was, and their own seconds."""
    with tempfile.TemporaryDirectory() as folder:
        start, began = time.time(), time.perf_counter()
        found = run_study(specs, folder, progress=False, executor=executor)
        seconds = time.perf_counter() - began
        if failed := list(found["error"].dropna()):
            raise ReconError(f"{len(failed)} runs failed, the first with: {failed[0]}")
        ends = [(Path(folder) / f"{key}.json").stat().st_mtime - start for key in found["key"]]
    rows = sorted(zip(ends, found["seconds_total"], strict=True))
    return {"seconds": seconds, "ends": [end for end, _ in rows], "own_seconds": [own for _, own in rows]}


def compile(subject: Subject) -> dict:
    """What `torch.compile` of a block costs at first, and gains in each forward and backward pass."""
    plain = subject.short(1)
    compiled = decompose(copy.deepcopy(plain.model), like=plain)
    # The block's children: its own forward is replaced where a window silences half of it.
    for child in compiled.blocks[0].children():
        child.compile()
    hidden = plain.embed(subject.samples[: reference.BATCH_SIZE]).to(subject.device)
    [window] = plain.windows("block")
    execution = Execution(subject.device)

    def step(decoder: Decoder) -> None:
        with execution:
            output = decoder.forward(window, hidden)
        output.float().square().mean().backward()
        decoder.model.zero_grad()

    sides = {"plain": plain, "compiled": compiled}
    for decoder in sides.values():
        decoder.model.to(subject.device)
    step(plain)
    began = time.perf_counter()
    try:
        step(compiled)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        return {"unavailable": f"no compiler that works, such as g++: {str(error).splitlines()[0]}"}
    first = time.perf_counter() - began
    rows = [
        {name: matrix_products.seconds(lambda decoder=decoder: step(decoder), least=0.5) for name, decoder in sides.items()}
        for _ in tqdm(range(subject.spec.repeats + 2), desc="compile", disable=not subject.progress)
    ]
    return {"seconds_to_compile": first - rows[0]["compiled"], "rows": rows}


def large(subject: Subject) -> dict:
    """A few blocks of the shape of an 8-billion-parameter model, on a GPU: seconds and memory."""
    spec = subject.spec
    if subject.device.type != "cuda":
        raise ReconError(f"section large needs a GPU, and the device is {str(subject.device)!r}; leave it out")
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
        num_hidden_layers=spec.large_blocks, max_position_embeddings=8192, rope_theta=500000.0,
    )  # fmt: skip
    dense = decompose(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    draw = torch.Generator().manual_seed(0)  # time and memory do not depend on the values
    samples = torch.randint(config.vocab_size, (spec.large_samples, spec.large_length), generator=draw)
    row, _ = subject.measured(subject.ours, dense, samples)
    return {"blocks": spec.large_blocks, "tokens": samples.numel()} | row
