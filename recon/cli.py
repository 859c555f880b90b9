"""`recon ...`: the command line, generated from the configs."""

import contextlib
import logging
import shlex
import sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from recon.errors import ReconError
from recon.experiment.config import RunSpec, options, place
from recon.experiment.record import RunRecord
from recon.options import described
from recon.paper.bench.spec import BenchSpec
from recon.runtime.device import limit_compiled_shapes


def flat(name: str, doc: str, without: tuple[str, ...] = (), **changed: tuple) -> type:
    """A dataclass with the options of a `RunSpec` by flat name, as the command line shows them.

    without: options that cannot be given. changed: by option, its name on the command line, default and help, where they are others.
    """
    rows = []
    for option, each in options().items():
        if option not in without:
            shown, default, help = changed.get(option, (option, each.default, described(each)))
            argument = tyro.conf.arg(name=shown.replace("_", "-"), help=help)
            rows.append((option, Annotated[each.type, argument], default))
    rows.sort(key=lambda row: row[2] is not tyro.MISSING)
    return make_dataclass(name, rows, frozen=True, namespace={"__doc__": doc})


Spec = flat("Spec", "What is run.", without=("pruned", "pruned_revision"))
External = flat(
    "External",
    "What is run where the mask is read from a pruned model.",
    without=tuple(name for name, each in options().items() if place(name)[0] == "pruning"),
    model=(
        "dense",
        tyro.MISSING,
        "The model before it was pruned: a bundled name (see `recon models`), a local folder, or a Hub id.",
    ),
    revision=("dense-revision", None, "Branch, tag or commit of the dense model, where it is a Hub id."),
    pruned=(
        "pruned",
        tyro.MISSING,
        "The same model after something pruned it: a local folder, or a Hub id. Its mask is wherever it is zero.",
    ),
)


@dataclass(frozen=True)
class Output:
    """How a run is carried out, which changes no number."""

    record: Path | None = None
    """File for the record (JSON)."""
    save: Path | None = None
    """New folder for the reconstructed model as a Hugging Face checkpoint."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What it is saved in: float32, as it was measured, or rounded after that, in half the room."""
    stream: Literal["auto", "yes", "no"] = "auto"
    """Leave the model on disk and work on one window at a time; a killed run goes on when called again. auto: if it would not fit."""
    force: bool = False
    """Run even what the plan says cannot fit here (see `recon plan`)."""
    executor: Literal["serial", "ray"] = "serial"
    """ray: windows are reconstructed side by side, on the cores and GPUs of this machine or of a cluster (dense propagation only)."""
    address: str | None = None
    """Of the Ray cluster; default: RAY_ADDRESS, else one that is started on this machine."""


@dataclass(frozen=True)
class Run:
    """Prune and reconstruct one model; print its perplexities."""

    spec: Annotated[Spec, tyro.conf.arg(name="")]
    output: Annotated[Output, tyro.conf.arg(name="")]

    def __call__(self) -> None:
        _run(RunSpec.of(**vars(self.spec)), self.output)


@dataclass(frozen=True)
class Reconstruct:
    """Reconstruct a model that something else pruned, against the dense one; print perplexities."""

    spec: Annotated[External, tyro.conf.arg(name="")]
    output: Annotated[Output, tyro.conf.arg(name="")]

    def __call__(self) -> None:
        _run(RunSpec.of(**vars(self.spec)), self.output)


def _run(spec: RunSpec, output: Output) -> None:
    """Runs `spec`, prints what came of it, and writes the record and the model where they are to go."""
    from recon.experiment.cluster import Ray
    from recon.experiment.study import run_or_record_failure, write_record
    from recon.runtime.storage import check_writable

    file = output.record
    if output.address is not None and output.executor != "ray":
        raise ReconError(
            f"address {output.address!r} is that of a Ray cluster, but the executor is {output.executor}; choose executor ray"
        )
    if file:
        if file.is_dir():
            raise ReconError(f"record {str(file)!r} is a folder; name a file")
        check_writable(file.parent, "record")

    def note(record: RunRecord) -> None:
        if file:
            write_record(record, file)

    record, error = run_or_record_failure(
        spec, force=output.force, save=output.save, command=shlex.join(["recon", *sys.argv[1:]]), stream=output.stream, on_done=note,
        executor=Ray(output.address) if output.executor == "ray" else output.executor, save_dtype=output.save_dtype,
    )  # fmt: skip
    if error:
        if not _known(spec, file):  # what is known of the very same run is not lost to a failure
            with contextlib.suppress(ReconError):  # the failure itself says more than that it cannot be noted, as on a full disk
                note(record)
        raise error
    _report(spec, record)


def _known(spec: RunSpec, file: Path | None) -> RunRecord | None:
    """The record of a finished run of `spec` in `file`, if there is one."""
    from recon.experiment.record import read_record

    if file is None or not file.exists():
        return None
    with contextlib.suppress(ReconError):  # damaged, or no record
        record = read_record(file)
        return record if record.status == "done" and record.key == spec.key() else None
    return None


def _report(spec: RunSpec, record: RunRecord) -> None:
    """Prints what came of a run."""
    for text, values in record.metrics["by_text"].items():
        share = values["share_recovered"]
        recovered = "" if share is None else f"   share recovered {share:.2f}"
        print(
            f"{text}: perplexity dense {values['dense_perplexity']:.2f}, pruned {values['pruned_perplexity']:.2f}, "
            f"repaired {values['perplexity']:.2f}{recovered}"
        )
    seconds = ", ".join(f"{phase} {value:.0f} s" for phase, value in record.seconds.items())
    found = f" (given: {record.metrics['pattern']})" if spec.model.pruned else ""
    print(f"sparsity {record.metrics['sparsity']:.4f}{found}; {seconds}; peak memory {record.peak_memory_bytes / 2**30:.2f} GiB")


@dataclass(frozen=True)
class Plan:
    """Say what a run would take (memory, disk, time), and whether it fits here; no weights are read."""

    spec: Annotated[Spec, tyro.conf.arg(name="")]
    save: bool = False
    """Whether the repaired model would be saved."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """As for `recon run`."""
    stream: Literal["auto", "yes", "no"] = "auto"
    """As for `recon run`."""
    memory: float | None = None
    """GiB of host memory that the run may take; default: what is free here."""
    device_memory: float | None = None
    """GiB of memory of a GPU that the run may take; plans for such a GPU, whether one is here or not."""
    disk: float | None = None
    """GiB that the run may write to the disk; default: what is free here."""

    def __call__(self) -> None:
        from recon.experiment.plan import advice, plan

        planned = plan(
            RunSpec.of(**vars(self.spec)),
            self.save,
            stream=self.stream,
            save_dtype=self.save_dtype,
            memory=self.memory,
            device_memory=self.device_memory,
            disk=self.disk,
        )
        print(planned)
        if planned.problem:
            raise ReconError(f"this run {planned.problem}; {advice(planned) or 'nothing smaller is known that would fit'}")


@dataclass(frozen=True)
class Models:
    """List the bundled models."""

    def __call__(self) -> None:
        from recon.data.assets import BUNDLED_MODELS

        for name, description in BUNDLED_MODELS.items():
            print(f"{name:16} {description}")
        print("\nOr any causal LM: a local folder, a GGUF file, or a Hub id (organisation/name) with --revision.")


@dataclass(frozen=True)
class Unfinished:
    """List streamed runs that were begun without --save and not finished; the same command goes on with them."""

    delete: tuple[str, ...] = ()
    """Keys of runs whose work so far is to be deleted, or all."""

    def __call__(self) -> None:
        from recon.experiment.cost import duration
        from recon.experiment.unfinished import discard, unfinished

        runs = unfinished()
        if self.delete == ("all",):
            keys = [run.key for run in runs if not run.in_use]
        else:
            keys = self.delete
        for key in keys:
            discard(key)
            print(f"{key}: deleted")
        for run in runs:
            if run.key not in keys:
                state = "at work" if run.in_use else f"{duration(run.age)} ago"
                print(f"{run.key}  {run.size / 2**30:8.2f} GiB  {state:10}  {run.options or 'its journal is damaged'}")
        if not runs:
            print("there are none")


@dataclass(frozen=True)
class Criteria:
    """List the pruning criteria."""

    def __call__(self) -> None:
        from recon.kernels.criteria import CRITERIA

        for name, criterion in CRITERIA.items():
            print(f"{name:10} {criterion.description} (compares within a {criterion.scope}; {criterion.source})")


@dataclass(frozen=True)
class Assets:
    """Fetch bundled models and texts into the cache, once. What is not fetched here is fetched when it is first used."""

    models: tuple[str, ...] = ("smollm2-135m",)
    """Bundled models (see `recon models`), or all; the default is what the quick profile needs."""

    def __call__(self) -> None:
        from recon.data import assets, text

        models = tuple(assets.BUNDLED_MODELS) if self.models == ("all",) else self.models
        for name in models:
            if name not in assets.BUNDLED_MODELS:
                raise ReconError(f"unknown bundled model {name!r}; choose all or some of {', '.join(assets.BUNDLED_MODELS)}")
        for name in models:
            print(f"{name}: {assets.bundled_model(name)}")
        for name in ("wikipedia", "news"):
            count = sum(len(text.documents(name, split)) for split in text.SPLITS)
            print(f"{name}: {count} documents")


@dataclass(frozen=True)
class Bench:
    """Measure time and memory, beside a straightforward loop and the machine's own ceiling."""

    spec: Annotated[BenchSpec, tyro.conf.arg(name="")]

    def __call__(self) -> None:
        from recon.paper.bench.measure import bench
        from recon.paper.bench.report import summary

        print(summary(bench(self.spec)))
        print(f"\nresults: {self.spec.output}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point; bad input ends with its message and exit status 2, Ctrl-C with 130."""
    limit_compiled_shapes()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("recon").setLevel(logging.INFO)
    commands = {
        "run": Run, "reconstruct": Reconstruct, "plan": Plan, "unfinished": Unfinished, "models": Models, "criteria": Criteria,
        "assets": Assets, "bench": Bench,
    }  # fmt: skip
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="recon", description="Prune a causal LM and reconstruct it.", args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )()  # fmt: skip
    except ReconError as error:
        print(f"recon: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("recon: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
