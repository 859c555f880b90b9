"""Size, loading time and speed of a model that is dense, masked, compressed, packed, shrunk: `python -m companion.files --help`.

Models are saved in bfloat16, and loaded and run in float32 on the CPU (2:4: float16, GPU). Sizes include the embedding. A round
runs all models in turn, so that a machine that is busy at times slows all of them; results are medians over rounds.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

import recon
from companion import tables
from companion.publish import ROOT

RUNS = {  # name -> options; results depend neither on which weights are pruned nor on their values, see `compressed`
    "dense": {"criterion": "none"},
    "50 %": {"pattern": "0.5"},
    "70 %": {"pattern": "0.7"},
    "units": {"criterion": "wanda-sp", "pattern": "0.25"},
}
MADE = {"50 % packed": ("50 %", "pack"), "70 % packed": ("70 %", "pack"), "units shrunk": ("units", "shrink")}  # source, function
ROWS = {  # name -> what it is, and where it helps
    "dense": ("dense, 16 bits a weight", ""),
    "dense zstd": ("the same after a fit, compressed by zstd", "disk, transfer: even without zeros"),
    "50 %": ("50 % single zeros, as saved", "nowhere: zeros are stored and multiplied like other weights"),
    "50 % zstd": ("the same after a fit, compressed by zstd", "disk, transfer; to be undone before it can be read"),
    "50 % packed": ("the same, `recon pack`", "disk, transfer"),
    "70 % packed": ("70 % single zeros, `recon pack`", "disk, transfer"),
    "units": ("25 % in heads and neurons, as saved", "nowhere"),
    "units shrunk": ("the same, `recon shrink`", "everywhere: disk, transfer, memory, speed"),
    "2:4": ("2:4 in torch's semi-structured kernels, a long prompt in float16", "GPUs with such kernels"),
    "4 bits": ("the dense model in about 4 bits (GGUF)", "disk, transfer, memory; speed where there are kernels"),
}


def measure(work: Path, model: str, quantised: Path | None, rounds: int, tokens: int, **options) -> dict:
    """Makes the checkpoints that are not yet in the folder `work`, and measures all of them.

    quantised: the GGUF file that the dense model was dequantised from. rounds: of loading (at most 3) and of generating.
    tokens: number to generate. options: of all runs, by name.
    """
    rows, unseen = {name: {} for name in ROWS}, {"held_out_samples": 0, "evaluation_samples": 1, "kl_windows": 0}
    for name, changes in RUNS.items():
        spec = recon.RunSpec.of(model=model, granularity="none", device="cpu", **unseen, **options, **changes)
        record = recon.run(spec, recon.RunOptions(save=work / name, save_dtype="bfloat16")).record
    for name, (source, make) in MADE.items():
        if not (work / name).exists():
            getattr(recon, make)(str(work / source), work / name)
    folders = [name for name in (*RUNS, *MADE) if name in ROWS]
    for name in folders:
        rows[name]["bytes"] = sum(file.stat().st_size for file in (work / name).glob("*.safetensors"))
    if quantised:
        rows["4 bits"]["bytes"] = quantised.stat().st_size
    loads = {name: lambda name=name: recon.load(str(work / name)) for name in folders}
    for name, seconds in in_turn(loads, min(rounds, 3)).items():
        rows[name]["load_seconds"] = statistics.median(seconds)
    found = {name: recon.load(str(work / name))[0] for name in ("dense", "50 %", "units", "units shrunk")}
    for name in ("dense", "50 %"):
        rows[f"{name} zstd"]["bytes"] = compressed(found[name])
    prompt = torch.arange(100, 132)[None]
    masked, shrunk = (found[name](input_ids=prompt).logits.detach() for name in ("units", "units shrunk"))
    rows["units shrunk"]["logit_difference"] = ((shrunk - masked).norm() / masked.norm()).item()
    taken = in_turn({name: lambda each=each: generate(each, prompt, tokens) for name, each in found.items()}, rounds)
    for name, seconds in taken.items():
        rows[name]["tokens_per_second"] = tokens / statistics.median(seconds)
        rows[name]["speed"] = statistics.median(dense / own for dense, own in zip(taken["dense"], seconds))
    if torch.cuda.is_available():
        rows["2:4"]["speed"] = semi_structured(found["dense"], rounds)
    settings = {"model": model, "rounds": rounds, "tokens": tokens, **options}
    return {"settings": settings, "environment": record.environment, "rows": rows}


@torch.no_grad()
def compressed(model: nn.Module) -> int:
    """Bytes of the weights in bfloat16, compressed by zstd. Each weight is first changed by about 1 %, as by reconstruction:
    bundled models come from 4 bits, so their weights have few distinct values and would compress better than others."""
    import pyarrow  # slow to import

    draw = torch.Generator().manual_seed(0)
    changed = (weight * (1 + 0.01 * torch.randn(weight.shape, generator=draw)) for weight in model.parameters())
    stored = b"".join(weight.bfloat16().view(torch.int16).numpy().tobytes() for weight in changed)
    return len(pyarrow.compress(stored, "zstd", asbytes=True))


def in_turn(calls: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each of `rounds` rounds, after a warm-up round that does not count."""
    taken = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - began)
    return {name: seconds[1:] for name, seconds in taken.items()}


def generate(model: nn.Module, prompt: torch.Tensor, tokens: int) -> None:
    """Generates `tokens` tokens by greedy decoding."""
    ends = {"min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **ends)


@torch.no_grad()
def semi_structured(model: nn.Module, rounds: int, device: str = "cuda") -> float:
    """Speed relative to dense, reading 8 x 512 tokens in float16, when the first two of every four weights are zero (2:4)."""
    tokens = torch.arange(512) % model.config.vocab_size
    model, prompt = model.to(device, torch.float16), tokens.expand(8, -1).to(device)

    def seconds() -> float:  # item() waits for the GPU
        taken = in_turn({"": lambda: model(input_ids=prompt, use_cache=False).logits.sum().item()}, rounds)
        return statistics.median(taken[""])

    dense = seconds()
    for matrix in recon.decompose(model).matrices().values():
        matrix.weight.unflatten(1, (-1, 4))[..., :2] = 0.0
        matrix.module.weight = torch.nn.Parameter(torch.sparse.to_sparse_semi_structured(matrix.weight), requires_grad=False)
    return dense / seconds()


def table(found: dict) -> str:
    """What `measure` returns as a Markdown table, with a sentence on how it was measured."""
    rows, dense, where, how = [], found["rows"]["dense"], found["environment"], found["settings"]
    for name, (what, helps) in ROWS.items():
        row = found["rows"][name]
        size = f"{row['bytes'] / 1e6:.0f} MB ({row['bytes'] / dense['bytes']:.0%})" if "bytes" in row else ""
        speed = f"x {row['speed']:.2f}" if "speed" in row else "not measured: no GPU here" if name == "2:4" else ""
        speed = f"{row['tokens_per_second']:.1f} tokens/s ({speed})" if "tokens_per_second" in row else speed
        load = f"{row['load_seconds']:.1f} s" if "load_seconds" in row else ""
        rows.append((what, size, load, speed, helps))
    shrunk, four = found["rows"]["units shrunk"], found["rows"]["4 bits"]
    said = (
        f"{how['model']}, embedding included; "
        f"{where['device']}, threads: {where['threads']}, float32, {how['tokens']} tokens generated, medians of {how['rounds']} "
        f"rounds in turn. The shrunk model's logits are the masked one's within {shrunk['logit_difference']:.0e}, relative."
    )
    others = [row["bytes"] for name, row in found["rows"].items() if "bytes" in row and name != "4 bits"]
    if four and four["bytes"] < min(others):
        said += (
            " The file in 4 bits is the smallest, and the dense model, which is made of it, is exactly as good; pruned ones are "
            "not. Where size is what counts, quantise first."
        )
    header = "weights", "size", "time to load", "generation", "smaller, faster: where"
    return "\n".join([*tables.markdown(header, rows), "", said])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and writes the results."""
    parser = argparse.ArgumentParser(prog="python -m companion.files", description=__doc__.partition(":")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "laptop" / "bench" / "files.json")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "files", help="folder for the checkpoints")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantised", type=Path, help="the GGUF file that the model is dequantised from")
    for name, value in {"rounds": 11, "tokens": 16, "samples": 2, "sequence_length": 64}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    given = vars(parser.parse_args(arguments))
    output = given.pop("output")
    found = measure(**given)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    sys.exit(main())
