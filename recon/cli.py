"""`recon ...`: the command line. Options are the fields of the configs; see `recon.config`."""

import argparse
import logging
import shlex
import sys
import textwrap
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from recon.config import PRESETS, SOURCES, Checked, FromOne
from recon.errors import ReconError
from recon.kernels.criteria import CRITERIA
from recon.runtime import packed
from recon.runtime.device import limit_compiled_shapes
from recon.study.cluster import Ray
from recon.study.spec import RunOptions, RunSpec

Group = tyro.conf.arg(name="")  # its options have no prefix
Named = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help="The folder of a checkpoint.")]
Place = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT", help="New folder.")]


@dataclass(frozen=True)
class Output(RunOptions):
    """How the run is carried out."""

    executor: Literal["serial", "ray"] = "serial"
    """ray reconstructs windows in parallel, on the cores and GPUs of this machine or of a cluster (dense propagation only)."""
    progress: tyro.conf.Suppress[bool] = True
    command: tyro.conf.Suppress[str] = field(default_factory=lambda: shlex.join(["recon", *sys.argv[1:]]))
    record: Path | None = None  # File for the record (JSON). The record of another run is not overwritten.
    address: str | None = None  # Address of the Ray cluster; default: RAY_ADDRESS, else a cluster is started on this machine.


def run(spec: Annotated[RunSpec, Group], output: Annotated[Output, Group]) -> None:
    """Prune and reconstruct one model; print its perplexities."""
    from recon.study.studies import run_to_record

    given = vars(output).copy()
    address, path = given.pop("address"), given.pop("record")
    if given["executor"] == "ray":
        given["executor"] = Ray(address)
    elif address is not None:
        raise ReconError(f"address {address!r} is that of a Ray cluster, but the executor is serial; choose executor ray")
    record, error = run_to_record(spec, path, RunOptions(**given))
    if error:
        raise error
    print(f"dense weights: {record.protocol['dense']}")
    done = " and ".join(["reconstructed"] * bool(record.windows) + ["retrained"] * bool(record.retraining))
    states = {"dense": "dense", "pruned": "pruned"} | ({"reconstructed": done} if done else {})
    for text, found in record.metrics["by_text"].items():
        values = zip(states.values(), (found["dense_perplexity"], found["pruned_perplexity"], found["perplexity"]))
        share = found["share_recovered"] if done else None
        recovered = "" if share is None else f"   share recovered {share:.2f}"
        print(f"{text}: perplexity {', '.join(f'{said} {value:.2f}' for said, value in values)}{recovered}")
    for task in spec.evaluation.tasks:
        found = {said: record.metrics["zero_shot"][state]["tasks"][task]["acc"] for state, said in states.items()}
        print(f"{task}: accuracy {', '.join(f'{said} {value:.3f}' for said, value in found.items())}")
    seconds = ", ".join(f"{phase} {value:.0f} s" for phase, value in record.seconds.items())
    pattern = f" (pattern of the mask: {record.metrics['pattern']})" if spec.model.pruned else ""
    peak = f"peak memory {record.peak_memory_bytes / 2**30:.2f} GiB"
    print(f"sparsity {record.metrics['sparsity']:.4f}{pattern}; {seconds}; {peak}")


def reconstruct(spec: Annotated[RunSpec, Group], output: Annotated[Output, Group]) -> None:
    """Reconstruct a model pruned by other software (--pruned) to match the dense one (--dense or --model); print perplexities."""
    if spec.model.pruned is None:
        raise ReconError("no model to reconstruct is given; name it with --pruned")
    if spec.reconstruction.granularity == spec.retraining.retrain == "none":
        raise ReconError("granularity and retrain are 'none', which changes nothing in the pruned model; set one of them")
    run(spec, output)


def plan(spec: Annotated[RunSpec, Group], output: Annotated[Output, Group], memory: float | None = None) -> None:
    """Say how much memory, time and disk a run with these options would take, and whether it fits here; no weights are read.

    Args:
        memory: Free host memory in GiB, not counting what this process uses already; default: what is free here.
    """
    from recon.study.plan import Plan

    planned = Plan(spec, output, memory_gib=memory)
    print(planned)
    if planned.problem:
        raise ReconError(planned.problem)


def shrink(model: Named, out: Place) -> None:
    """Remove heads and neurons that are pruned as a whole; write the model to a new folder as an ordinary, smaller checkpoint."""
    from recon.study import shrink

    for said in shrink.shrink(model, out):
        print(said)
    _say_size(out)


def pack(folder: Named, out: Place) -> None:
    """Write a checkpoint to a new folder in packed form, one bit per weight and the non-zero values; `recon.load` reads it."""
    packed.pack(folder, out)
    _say_size(out)


def unpack(folder: Named, out: Place) -> None:
    """Write a packed checkpoint to a new folder as the ordinary checkpoint that it was made from, identical bit for bit."""
    packed.unpack(folder, out)
    _say_size(out)


def _say_size(folder: Path) -> None:
    print(f"{folder}: {sum(file.stat().st_size for file in folder.glob('*.safetensors')) / 1e6:.1f} MB of weights")


def models() -> None:
    """List the bundled models: what each is, its size, and whether it is fetched."""
    from recon.data import assets

    for name, model in assets.BUNDLED_MODELS.items():
        state = "fetched" if assets.made(name) else "to fetch on first use"
        print(f"{name}\n    {model['description']}\n    {model['bytes'] / 1e6:.0f} MB, {state}\n")
    print("Or any causal LM: a local folder, a GGUF file, or a Hub id (organisation/name) with --revision.")


def criteria() -> None:
    """List the pruning criteria."""
    for name, criterion in CRITERIA.items():
        print(f"{name:10} {criterion.description} (compares within a {criterion.scope}; {criterion.source})")


def presets() -> None:
    """List the recipes: the options that each sets, and its source."""
    for name, values in PRESETS.items():
        said = ", ".join(f"{option} {value}" for option, value in values.items())
        print(textwrap.fill(f"{name}: {said or 'nothing'} ({SOURCES[name]})", 120, subsequent_indent="    "))


def assets(models: tuple[str, ...] = ("smollm2-135m",)) -> None:
    """Fetch bundled models and texts into the cache, once. Whatever is not fetched here is fetched on first use.

    Args:
        models: Bundled models (see `recon models`), or all; the default is what the quick profile needs.
    """
    from recon.data import assets, text

    models = tuple(assets.BUNDLED_MODELS) if models == ("all",) else models
    if unknown := [name for name in models if name not in assets.BUNDLED_MODELS]:
        raise ReconError(f"unknown bundled model {unknown[0]!r}; allowed: all, or some of {', '.join(assets.BUNDLED_MODELS)}")
    for name in models:
        print(f"{name}: {assets.bundled_model(name)}")
    for name in ("wikipedia", "news"):
        print(f"{name}: {sum(len(text.documents(name, split)) for split in text.SPLITS)} documents")


@dataclass(frozen=True)
class Bench(Checked):
    """Time each phase on a shortened model, beside a straightforward loop and the least time that its FLOPs can take."""

    output: Path = Path("build/bench.json")  # File for the results (JSON).
    model: str = "smollm2-135m"  # A bundled name, a local folder, or a Hub id.
    text: str = "wikipedia"  # Calibration and evaluation text.
    samples: FromOne = 32  # Calibration samples.
    sequence_length: FromOne = 256  # Tokens per sample.
    blocks: FromOne = 4  # Blocks of the shortened model.
    repeats: FromOne = 3  # Rounds of timing, all phases in turn.
    device: str = "auto"  # auto, cpu, cuda, ...


def bench(options: Annotated[Bench, Group]) -> None:
    """Time each phase on a shortened model, beside a straightforward loop and the least time that its FLOPs can take."""
    from recon.study import bench

    logging.getLogger("recon").setLevel(logging.WARNING)  # hides the line on what each run will take
    print(bench.table(bench.bench(**vars(options))).round(3).to_string())
    print(f"\nresults: {options.output}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Bad input prints a message and exits with status 2; Ctrl-C exits with 130."""
    limit_compiled_shapes()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("recon").setLevel(logging.INFO)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] in (["reconstruct"], ["plan"]):  # these also accept --dense for --model
        names = {"--dense": "--model", "--dense-revision": "--revision"}
        arguments = ["".join((names.get(flag, flag), *rest)) for flag, *rest in (word.partition("=") for word in arguments)]
    known = run, reconstruct, plan, shrink, pack, unpack, models, criteria, presets, assets, bench
    commands = {each.__name__: each for each in known}
    command = next(iter(arguments), "")
    try:
        if command in ("run", "reconstruct", "plan"):  # the preset first: given options override it
            first = argparse.ArgumentParser(f"recon {command}", "%(prog)s [options]", add_help=False, allow_abbrev=False)
            first.add_argument("--preset", default="default")
            first.add_argument("--pruned")
            given, arguments = first.parse_known_args(arguments)
            commands[command] = partial(commands[command], spec=RunSpec.of(**vars(given)))
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="recon", description="Prune a causal language model and reconstruct it.", args=arguments,
            config=(tyro.conf.OmitArgPrefixes,),
        )  # fmt: skip
    except ReconError as error:
        print(f"recon: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader has closed the pipe, such as `| head`
        sys.stdout = None
    except KeyboardInterrupt:
        print("recon: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
