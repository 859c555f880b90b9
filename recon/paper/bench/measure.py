"""`recon bench`: where the time goes, beside the machine's own speed and a straightforward loop, all in one run."""

import copy
import gc
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from recon.data import models, text
from recon.errors import ReconError
from recon.evaluate import perplexity as evaluation
from recon.experiment.cluster import Ray
from recon.experiment.config import RunSpec
from recon.experiment.environment import environment
from recon.experiment.estimate import gemm_rate
from recon.experiment.run import Session, run, share_recovered
from recon.experiment.study import grid, run_study
from recon.kernels.gradient_descent import Schedule
from recon.kernels.least_squares import Exact
from recon.methods.prune import prune
from recon.methods.reconstruct import reconstruct
from recon.model.decoder import Decoder
from recon.paper.bench import products, reference
from recon.paper.bench.spec import BenchSpec
from recon.runtime import device
from recon.runtime.activations import LIMIT
from recon.runtime.execution import Execution
from recon.runtime.seeds import generator
from recon.runtime.storage import check_writable

# What is tried on the way to the reference loop's perplexity: name -> options of `reconstruct`, share of the samples.
PIECES = Schedule(pieces=4)
FROM_EXACT = {"start": "exact", "exact": Exact(iterations=2)}  # few samples: more iterations would fit their noise
RECIPES: dict[str, tuple[dict, float]] = {
    "single samples": ({}, 1.0),
    "pieces": ({"schedule": PIECES}, 1.0),
    "pieces, half of the samples": ({"schedule": PIECES}, 0.5),
    "pieces, 3/8 of the samples, from exact": ({"schedule": PIECES} | FROM_EXACT, 0.375),
    "pieces, a quarter of the samples, from exact": ({"schedule": PIECES.scaled(2 / 3)} | FROM_EXACT, 0.25),
}
PHASES = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "attention": ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data", "scaled_dot_product"),
    "optimiser": ("adamw", "aten::lerp", "aten::addcdiv", "aten::addcmul", "aten::sqrt"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::index", "aten::fill_", "aten::stack"),
}


def bench(spec: BenchSpec, progress: bool = True, compute: bool = True) -> dict:
    """Measures the sections of `spec`, writing `spec.output` after each; returns everything in that file.

    compute: False measures nothing.

    Raises `ReconError` for bad input, and where the file holds measurements of another spec.
    """
    check_writable(spec.output.parent, "output")
    settings = {k: v for k, v in asdict(spec).items() if k not in ("output", "sections", "redo")}
    results = _read(spec.output, settings)
    missing = [section for section in spec.sections if compute and (spec.redo or section not in results["sections"])]
    task = _Bench(spec, progress) if missing else None
    for section in tqdm(missing, desc="bench", unit="section", disable=not progress):
        began = time.perf_counter()
        found = json.loads(json.dumps(getattr(task, section)()))  # as it will be read
        where = environment(task.device, "auto")
        results["sections"][section] = {"results": found, "seconds": time.perf_counter() - began, "environment": where}
        temporary = spec.output.with_suffix(".part")
        temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")
        os.replace(temporary, spec.output)
    return results


def _read(path: Path, settings: dict) -> dict:
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    if not path.exists():
        return {"key": key, "settings": settings, "sections": {}}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        found = results["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ReconError(f"output {str(path)!r} is not a file of measurements ({error}); name another") from error
    if found != settings:
        other = next(name for name in settings if found.get(name) != settings[name])
        raise ReconError(
            f"output {str(path)!r} holds measurements with {other} {found.get(other)!r}, not {settings[other]!r}; name another"
        )
    return results


class _Bench:
    """Loads once, and measures one section at a time; each returns plain data."""

    def __init__(self, spec: BenchSpec, progress: bool):
        self.spec, self.progress = spec, progress
        self.device = device.pick_device(spec.device)
        self.dtype = device.pick_compute_dtype("auto", self.device)
        model, self.tokenizer = models.load(spec.model)
        self.dense = Decoder(model)
        evaluation.check_length(self.dense, max(spec.sequence_length, spec.evaluation_length))
        seed = generator(0, "calibration").initial_seed() % 2**32
        self.samples = text.sample_tokens(spec.text, "calibration", self.tokenizer, spec.samples, spec.sequence_length, seed)
        self._masks: dict[str, Tensor] | None = None

    # --- what is compared -------------------------------------------------------------------------------------

    @property
    def masks(self) -> dict[str, Tensor]:
        """Wanda's masks of the whole model, made once."""
        if self._masks is None:
            self._masks = prune(
                copy.deepcopy(self.dense.model),
                self.samples,
                "wanda",
                self.spec.pattern,
                device=self.device,
                progress=self.progress,
            ).masks
        return self._masks

    def pruned(self, dense: Decoder, masks: dict[str, Tensor]) -> Decoder:
        student = Decoder(copy.deepcopy(dense.model), like=dense)
        with torch.no_grad():
            for name, matrix in student.matrices().items():
                matrix.weight.mul_(masks[name])
        return student

    def reference(self, student: Decoder, dense: Decoder, samples: Tensor, masks: dict, **options) -> None:
        for decoder in (student, dense):
            decoder.model.to(self.device)
        reference.reconstruct(student, dense, samples, masks, progress=self.progress, **options)
        for decoder in (student, dense):
            decoder.model.to("cpu")

    def ours(self, student: Decoder, dense: Decoder, samples: Tensor, masks: dict, **options) -> None:
        options = {"schedule": Schedule(batch_size=reference.BATCH_SIZE)} | options
        reconstruct(student, dense, samples, masks, device=self.device, progress=self.progress, **options)

    def measured(self, loop: Callable, dense: Decoder, samples: Tensor, masks: dict, **options) -> tuple[dict, Decoder]:
        """Seconds of one loop on a fresh pruned student, the memory that it took beyond what was there, and the student."""
        student = self.pruned(dense, masks)
        gc.collect()
        device.release_memory()
        products.synchronize(self.device)
        with device.PeakMemory(self.device) as peak:
            began = time.perf_counter()
            loop(student, dense, samples, masks, **options)
            products.synchronize(self.device)
            seconds = time.perf_counter() - began
        return {"seconds": seconds, "peak_memory_bytes": peak.bytes, "added_memory_bytes": peak.bytes - peak.before}, student

    def short(self, blocks: int | None = None) -> tuple[Decoder, dict[str, Tensor]]:
        """The first blocks of the model, and their masks (of magnitude: only time is measured on them)."""
        dense = shortened(self.dense, min(blocks or self.spec.blocks, len(self.dense.blocks)))
        return dense, prune(copy.deepcopy(dense.model), None, "magnitude", self.spec.pattern, progress=False).masks

    def perplexity(self, decoder: Decoder, description: str) -> float:
        spec = self.spec
        tokens = text.sample_tokens(spec.text, "evaluation", self.tokenizer, spec.evaluation_samples, spec.evaluation_length)
        execution, what = Execution(self.device), f"perplexity ({description})"
        return evaluation.perplexity(decoder, tokens, execution=execution, description=what, progress=self.progress).value

    # --- sections ---------------------------------------------------------------------------------------------

    def products(self) -> dict:
        """The machine's speed at large squares, and at the products of reconstruction, forward and backward."""
        rates = {
            str(dtype).removeprefix("torch."): gemm_rate(self.device, dtype, size=2048, seconds=0.5)
            for dtype in {self.dtype, torch.float32}
        }
        dense, masks = self.short(min(2, self.spec.blocks))
        with products.Recorder() as recorder:
            self.ours(self.pruned(dense, masks), dense, self.samples, masks)
        rows = []
        for product, count in tqdm(recorder.counts.items(), desc="products", disable=not self.progress):
            alone = product.seconds(self.device)
            rows.append(
                {
                    "left": list(product.left[0]), "right": list(product.right[0]),
                    "kind": "attention" if len(product.left[0]) == 3 else "weights",
                    "layout": "".join("n" if side[1][-1] == 1 else "t" for side in (product.left, product.right)),
                    "dtype": str(product.left[2]).removeprefix("torch."),
                    "count": count, "flops": product.flops, "seconds_alone": alone,
                }
            )  # fmt: skip
        loops = [self.measured(self.ours, dense, self.samples, masks)[0]["seconds"] for _ in range(self.spec.repeats)]
        at_ceiling = {
            kind: sum(row["count"] * row["seconds_alone"] for row in rows if row["kind"] == kind)
            for kind in ("weights", "attention")
        }
        flops = {
            kind: sum(row["count"] * row["flops"] for row in rows if row["kind"] == kind) for kind in ("weights", "attention")
        }
        return {
            "square_flops_per_second": rates, "blocks": len(dense.blocks), "products": rows, "flops": flops,
            "seconds_at_ceiling": at_ceiling, "seconds": loops,
            "achieved_share_of_ceiling": [at_ceiling["weights"] / seconds for seconds in loops],
        }  # fmt: skip

    def loops(self) -> dict:
        """Reference loop and ours at equal steps, in turn on the shortened model."""
        dense, masks = self.short()
        rows = []
        for number in range(self.spec.repeats):
            for name, loop in (("reference", self.reference), ("ours", self.ours)):
                rows.append({"loop": name, "round": number} | self.measured(loop, dense, self.samples, masks)[0])
        return {"blocks": len(dense.blocks), "rows": rows}

    def profile(self) -> dict:
        """Time by operation, of both loops on the shortened model."""
        found = {}
        for name, loop in (("reference", self.reference), ("ours", self.ours)):
            dense, masks = self.short(2)
            student = self.pruned(dense, masks)
            cuda = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            with profile(activities=[ProfilerActivity.CPU, *cuda]) as profiler:
                loop(student, dense, self.samples, masks)
            own = "self_device_time_total" if cuda else "self_cpu_time_total"
            seconds = {event.key: getattr(event, own) / 1e6 for event in profiler.key_averages()}
            calls = {event.key: event.count for event in profiler.key_averages()}
            top = sorted(seconds, key=seconds.__getitem__, reverse=True)[:20]
            phases = dict.fromkeys([*PHASES, "everything else"], 0.0)
            for key, value in seconds.items():
                phases[next((phase for phase, parts in PHASES.items() if any(p in key for p in parts)), "everything else")] += (
                    value
                )
            rows = [{"operation": key, "seconds": seconds[key], "calls": calls[key]} for key in top]
            found[name] = {"phases": phases, "operations": rows}
        return found

    def growth(self) -> list[dict]:
        """How both loops grow with samples, sequence length, width and depth: one block (but for depth), few samples."""
        few = max(4, self.spec.samples // 8)
        dense, masks = self.short(1)
        cases: list[tuple[str, float, Decoder, dict, Tensor]] = []
        for share in (1, 2, 4):
            cases.append(("samples", few * share, dense, masks, self._cut(few * share, self.spec.sequence_length)))
        for share in (4, 2, 1):
            length = self.spec.sequence_length // share
            cases.append(("sequence length", length, dense, masks, self._cut(few, length)))
        for blocks in (1, 2, 4):
            if blocks <= len(self.dense.blocks):
                cases.append(("depth", blocks, *self.short(blocks), self._cut(few, self.spec.sequence_length)))
        for width, wide, wide_masks in self._widths():
            cases.append(("width", width, wide, wide_masks, self._cut(few, self.spec.sequence_length)))
        rows = []
        for axis, value, decoder, its_masks, samples in tqdm(cases, desc="growth", disable=not self.progress):
            for name, loop in (("reference", self.reference), ("ours", self.ours)):
                rows.append({"axis": axis, "value": value, "loop": name} | self.measured(loop, decoder, samples, its_masks)[0])
        return rows

    def _cut(self, samples: int, length: int) -> Tensor:
        return self.samples[:samples, :length].contiguous()

    def _widths(self):
        """One random block of the model's kind at other widths, where its configuration says how wide it is."""
        for factor in (1 / 3, 1, 2):
            config = copy.deepcopy(self.dense.model.config)
            names = [
                n
                for n in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
                if hasattr(config, n)
            ]
            sizes = {name: getattr(config, name) * factor for name in names}
            if any(abs(size - round(size)) > 1e-6 or round(size) < 1 for size in sizes.values()):
                continue
            for name, size in sizes.items():
                setattr(config, name, round(size))
            config.num_hidden_layers = 1
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:1]
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            decoder = Decoder(model)
            masks = prune(copy.deepcopy(model), None, "magnitude", self.spec.pattern, progress=False).masks
            yield round(sizes["hidden_size"]), decoder, masks

    def prune(self) -> list[dict]:
        """Seconds and peak memory of pruning alone, and of the exact matrix solution."""
        rows = []
        for criterion in ("magnitude", "wanda", "sparsegpt"):
            student = copy.deepcopy(self.dense.model)
            with device.PeakMemory(self.device) as peak:
                began = time.perf_counter()
                found = prune(student, self.samples, criterion, self.spec.pattern, device=self.device, progress=self.progress)
                seconds = time.perf_counter() - began
            rows.append({"work": f"prune, {criterion}", "seconds": seconds, "peak_memory_bytes": peak.bytes})
            if criterion == "wanda":
                self._masks = found.masks
        exact, _ = self.measured(self.ours, self.dense, self.samples, self.masks, granularity="matrix", solver="exact")
        rows.append({"work": "matrix, exact"} | exact)
        return rows

    def quality(self) -> list[dict]:
        """Perplexity against time on the whole model: the reference loop, ours at equal steps, and ours with less."""
        dense_perplexity = self.perplexity(self.dense, "dense")
        pruned_perplexity = self.perplexity(self.pruned(self.dense, self.masks), "pruned")
        rows = [{"loop": "dense", "perplexity": dense_perplexity}, {"loop": "pruned", "perplexity": pruned_perplexity}]
        runs: list[tuple[str, Callable, int, dict]] = [
            ("reference", self.reference, len(self.samples), {}),
            ("reference, single samples", self.reference, len(self.samples), {"batch_size": 1}),
            ("ours, equal steps", self.ours, len(self.samples), {}),
        ]
        for name, (options, share) in RECIPES.items():
            runs.append((f"ours, {name}", self.ours, round(share * len(self.samples)), {"schedule": Schedule()} | options))
        for name, loop, count, options in runs:
            row, student = self.measured(loop, self.dense, self.samples[:count], self.masks, **options)
            value = self.perplexity(student, name)
            share = share_recovered(dense_perplexity, pruned_perplexity, value)
            rows.append({"loop": name, "samples": count, "perplexity": value, "share_recovered": share} | row)
        return rows

    def sweep(self) -> dict:
        """Runs of 2 criteria x 6 granularities in one study, against the sum of the same runs done singly; a smaller cell."""
        base = RunSpec(
            model=self.spec.model, text=self.spec.text, evaluation_texts=(self.spec.text,), pattern=self.spec.pattern,
            samples=max(2, self.spec.samples // 4), sequence_length=self.spec.sequence_length // 2,
            evaluation_samples=max(1, self.spec.evaluation_samples // 10), evaluation_length=self.spec.evaluation_length,
            device=self.spec.device,
        )  # fmt: skip
        granularities = [*grid(base, criterion=["magnitude", "wanda"], granularity=["none", "half-block", "block", "quarter"])]
        specs = granularities + grid(
            replace(base, granularity="matrix"), criterion=["magnitude", "wanda"], solver=["adamw", "exact"]
        )
        specs.sort(key=lambda one: one.criterion)
        singly = []
        for one in specs:
            began = time.perf_counter()
            run(one, progress=False)
            singly.append(time.perf_counter() - began)
        session, shared, began = Session(activation_bytes=LIMIT), [], time.perf_counter()
        for one in specs:
            start = time.perf_counter()
            run(one, session, progress=False)
            shared.append(time.perf_counter() - start)
        return {"runs": [asdict(one) for one in specs], "seconds_singly": singly, "seconds_in_study": shared,
                "share": (time.perf_counter() - began) / sum(singly)}  # fmt: skip

    def workers(self) -> dict:
        """A study and the windows of one of its runs: serial on one thread, and by 1, 2, 4, ... Ray workers of one thread each."""
        base = RunSpec(
            model=self.spec.model, text=self.spec.text, evaluation_texts=(self.spec.text,), pattern=self.spec.pattern,
            samples=self.spec.samples, sequence_length=self.spec.sequence_length, evaluation_samples=self.spec.evaluation_samples,
            evaluation_length=self.spec.evaluation_length, device="cpu",
        )  # fmt: skip
        specs = grid(base, criterion=["magnitude", "wanda"], seed=range(self.spec.repeats))
        crews = [None, *(Ray(threads=1, workers=2**power) for power in range(device.cores().bit_length()))]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            products_alone = gemm_rate(torch.device("cpu"), self.dtype)
            studies, windows = [], []
            for crew in tqdm(crews, desc="workers", disable=not self.progress):
                count = crew.workers if crew else 0
                studies.append({"workers": count} | self._study(specs, crew))
                student = self.pruned(self.dense, self.masks)
                began = time.perf_counter()
                reports = reconstruct(
                    student, self.dense, self.samples, self.masks, granularity=base.granularity, device="cpu",
                    executor=crew or "serial", progress=False,
                )  # fmt: skip
                seconds = time.perf_counter() - began
                windows.append({"workers": count, "seconds": seconds, "in_windows": [report.seconds for report in reports]})
        finally:
            torch.set_num_threads(threads)
        return {
            "base": asdict(base),
            "flops_per_second": products_alone,
            "runs": len(specs),
            "studies": studies,
            "windows": windows,
        }

    def _study(self, specs: list[RunSpec], executor: Ray | None) -> dict:
        """Seconds of a study; of each of its runs in the order of their ends, its own seconds, and when it was over."""
        with tempfile.TemporaryDirectory() as folder:
            start, began = time.time(), time.perf_counter()
            found = run_study(specs, folder, progress=False, executor=executor or "serial")
            seconds = time.perf_counter() - began
            if failed := list(found["error"].dropna()):
                raise ReconError(f"{len(failed)} runs failed, the first with: {failed[0]}")
            ends = [(Path(folder) / f"{key}.json").stat().st_mtime - start for key in found["key"]]
        rows = sorted(zip(ends, found["seconds_total"], strict=True))
        return {"seconds": seconds, "ends": [end for end, _ in rows], "own_seconds": [own for _, own in rows]}

    def compile(self) -> dict:
        """One block's forward and backward pass, plain and with its children compiled, in turn; on a batch of the loops'."""
        plain, _ = self.short(1)
        compiled = Decoder(copy.deepcopy(plain.model), like=plain)
        # The children, whose forward never changes; the block's own is what windows silence halves of.
        for child in compiled.blocks[0].children():
            child.compile()
        hidden = plain.embed(self.samples[: reference.BATCH_SIZE]).to(self.device)
        [window] = plain.windows("block")
        execution = Execution(self.device)

        def step(decoder: Decoder) -> None:
            with execution:
                output = decoder.forward(window, hidden)
            output.float().square().mean().backward()
            decoder.model.zero_grad()

        for decoder in (plain, compiled):
            decoder.model.to(self.device)
        step(plain)
        began = time.perf_counter()
        try:
            step(compiled)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            return {"unavailable": f"no compiler that works, such as g++: {str(error).splitlines()[0]}"}
        products.synchronize(self.device)
        first = time.perf_counter() - began
        sides = {"plain": plain, "compiled": compiled}
        rows = [
            {name: products.timed(lambda decoder=decoder: step(decoder), self.device, 0.5, 1) for name, decoder in sides.items()}
            for _ in tqdm(range(self.spec.repeats + 2), desc="compile", disable=not self.progress)
        ]
        return {"seconds_to_compile": first - rows[0]["compiled"], "rows": rows}

    def large(self) -> dict:
        """Half-blocks of a random model of the shape of Llama-3-8B: time and memory do not depend on the values."""
        spec = self.spec
        if self.device.type != "cuda":
            raise ReconError(f"section large needs a GPU, and the device is {str(self.device)!r}; leave it out")
        config = LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
            num_hidden_layers=spec.large_blocks, max_position_embeddings=8192, rope_theta=500000.0,
        )  # fmt: skip
        dense = Decoder(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
        draw = torch.Generator().manual_seed(0)
        samples = torch.randint(config.vocab_size, (spec.large_samples, spec.large_length), generator=draw)
        masks = {name: torch.rand(m.weight.shape, generator=draw) > 0.5 for name, m in dense.matrices().items()}
        row, _ = self.measured(self.ours, dense, samples, masks)
        return {"blocks": spec.large_blocks, "tokens": samples.numel()} | row


def shortened(decoder: Decoder, blocks: int) -> Decoder:
    """A copy of the model with its first `blocks` blocks only."""
    whole = decoder.model.get_submodule(decoder.path)
    decoder.model.set_submodule(decoder.path, nn.ModuleList(list(whole)[:blocks]))
    try:
        model = copy.deepcopy(decoder.model)
    finally:
        decoder.model.set_submodule(decoder.path, whole)
    model.config.num_hidden_layers = blocks
    return Decoder(model)
