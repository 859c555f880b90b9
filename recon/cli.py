"""`recon ...`: the command line, generated from the configs."""

import contextlib
import dataclasses
import logging
import shlex
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import tyro

from recon.errors import ReconError
from recon.paper.bench.spec import BenchSpec
from recon.runtime.device import limit_compiled_shapes
from recon.study.record import RunRecord
from recon.study.spec import RunOptions, RunSpec, options, place


def flags(name: str, doc: str, fields: Mapping[str, dataclasses.Field], without: tuple[str, ...] = (), **changed) -> type:
    """A dataclass with the options `fields` by flat name, as the command line shows them; `doc`: what they are about.

    without: options that cannot be given. changed: by option, what replaces its field's name, type, default or help.
    """
    rows = []
    for option, each in fields.items():
        if option not in without:
            choices = tuple(each.metadata["choices"])
            kind = Literal[choices] if choices else each.type
            shown = {
                "name": option,
                "type": kind,
                "default": each.default,
                "help": each.metadata["help"],
                **changed.get(option, {}),
            }
            argument = tyro.conf.arg(name=shown["name"].replace("_", "-"), help=shown["help"])
            rows.append((option, Annotated[shown["type"], argument], shown["default"]))
    rows.sort(key=lambda row: row[2] is not tyro.MISSING)
    return dataclasses.make_dataclass(name, rows, frozen=True, namespace={"__doc__": doc})


def spec_flags(name: str, without: tuple[str, ...] = (), **changed) -> type:
    """A dataclass of the options of a `RunSpec`, in a group for each of its configs."""
    groups: dict[str, dict] = {}
    for option, each in options().items():
        groups.setdefault(place(option)[0] or "compute", {})[option] = each
    configs = {field.name: field.type for field in dataclasses.fields(RunSpec)}
    made = {
        group: flags(group, configs[group].__doc__.splitlines()[0], found, without, **changed) for group, found in groups.items()
    }
    return dataclasses.make_dataclass(
        name, [(group, kind) for group, kind in made.items() if dataclasses.fields(kind)], frozen=True
    )


def spec_of(given: object) -> RunSpec:
    """The spec of what was given on the command line."""
    return RunSpec.of(**{option: value for group in vars(given).values() for option, value in vars(group).items()})


_CARRIED_OUT = {field.name: field for field in dataclasses.fields(RunOptions)}
Spec = spec_flags("Spec", without=("pruned", "pruned_revision"))
External = spec_flags(
    "External",
    without=tuple(name for name in options() if place(name)[0] == "pruning"),
    model={"name": "dense", "default": tyro.MISSING, "help": "The model before it was pruned: a bundled name, a local folder, a GGUF file, or a Hub id."},
    revision={"name": "dense-revision", "help": "Branch, tag or commit of the dense model, where it is a Hub id."},
    pruned={"default": tyro.MISSING, "type": str, "help": "The same model after something pruned it; its mask is wherever it is zero."},
)  # fmt: skip
Output = flags(
    "Output",
    "How the run is carried out.",
    _CARRIED_OUT,
    without=("progress", "command"),
    executor={"type": Literal["serial", "ray"]},
)
Planned = flags(
    "Planned", "How the run would be carried out.", _CARRIED_OUT, without=("progress", "command", "force", "executor", "save")
)
Group = tyro.conf.arg(name="")  # its options have no prefix


class _Run:
    """What the two commands that run something have in common; each has the fields `spec`, `output`, `record` and `address`."""

    def __call__(self) -> None:
        """Runs the spec, prints what came of it, and writes the record and the model where they are to go."""
        from recon.study.studies import RecordFile, run_or_record_failure
        from recon.study.workers import Ray, check_address

        spec, chosen = spec_of(self.spec), vars(self.output)
        check_address(chosen["executor"], self.address)
        if chosen["executor"] == "ray":
            chosen = chosen | {"executor": Ray(self.address)}
        file = RecordFile(self.record)
        record, error = run_or_record_failure(
            spec, RunOptions(**chosen, command=shlex.join(["recon", *sys.argv[1:]])), callbacks=[file]
        )
        if error:
            if not file.holds(spec):  # a finished record of the very same run is kept
                with contextlib.suppress(ReconError):  # such as a full disk; `error`, raised below, says more
                    file.on_done(record)
            raise error
        _report(spec, record)


@dataclasses.dataclass(frozen=True)
class Run(_Run):
    """Prune and reconstruct one model; print its perplexities."""

    spec: Annotated[Spec, Group]
    output: Annotated[Output, Group]
    record: Path | None = None
    """File for the record (JSON)."""
    address: str | None = None
    """Address of the Ray cluster; default: RAY_ADDRESS, else a cluster is started on this machine."""


@dataclasses.dataclass(frozen=True)
class Reconstruct(_Run):
    """Reconstruct a model that something else pruned, against the dense one; print perplexities."""

    spec: Annotated[External, Group]
    output: Annotated[Output, Group]
    record: Path | None = None
    """File for the record (JSON)."""
    address: str | None = None
    """Address of the Ray cluster; default: RAY_ADDRESS, else a cluster is started on this machine."""


def _report(spec: RunSpec, record: RunRecord) -> None:
    """Prints what came of a run."""
    print(f"dense weights: {record.protocol['dense']}")
    for text, values in record.metrics["by_text"].items():
        share = values["share_recovered"]
        recovered = "" if share is None else f"   share recovered {share:.2f}"
        print(
            f"{text}: perplexity dense {values['dense_perplexity']:.2f}, pruned {values['pruned_perplexity']:.2f}, "
            f"reconstructed {values['perplexity']:.2f}{recovered}"
        )
    seconds = ", ".join(f"{phase} {value:.0f} s" for phase, value in record.seconds.items())
    found = f" (pattern of the mask: {record.metrics['pattern']})" if spec.model.pruned else ""
    print(f"sparsity {record.metrics['sparsity']:.4f}{found}; {seconds}; peak memory {record.peak_memory_bytes / 2**30:.2f} GiB")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Say what a run would take (memory, disk, time), and whether it fits here; no weights are read."""

    spec: Annotated[Spec, Group]
    output: Annotated[Planned, Group]
    save: bool = False
    """Whether the model would be saved."""
    memory: float | None = None
    """GiB of host memory that the run may take; default: what is free here."""
    device_memory: float | None = None
    """GiB of memory of a GPU that the run may take; plans for such a GPU, whether one is here or not."""
    disk: float | None = None
    """GiB that the run may write to the disk; default: what is free here."""

    def __call__(self) -> None:
        from recon.study.plan import advice, plan

        room = {"memory": self.memory, "device_memory": self.device_memory, "disk": self.disk}
        planned = plan(spec_of(self.spec), self.save, **vars(self.output), **room)
        print(planned)
        if planned.problem:
            raise ReconError(f"this run {planned.problem}; {advice(planned) or 'nothing smaller is known that would fit'}")


@dataclasses.dataclass(frozen=True)
class Models:
    """List the bundled models: what each is, its size, what its weights are, its perplexity before anything is pruned."""

    measure: bool = False
    """Fetch all of them, and measure the perplexities that are not known yet (-); they are kept in the cache."""

    def __call__(self) -> None:
        from recon.config import PROTOCOLS
        from recon.data.assets import BUNDLED_MODELS
        from recon.runtime.execution import Execution
        from recon.study import bundled

        execution = Execution()
        if self.measure:
            bundled.measure(execution)
        for name in BUNDLED_MODELS:
            print(f"{name}\n{textwrap.indent(bundled.describe(name, execution), '    ')}\n")
        for name, meaning in PROTOCOLS.items():
            print(f"{name}: {meaning}")
        if bundled.unknown(execution):
            print(
                "not measured yet (-), or not fetched: `recon models --measure` fetches every bundled model and measures it once"
            )
        print("\nOr any causal LM: a local folder, a GGUF file, or a Hub id (organisation/name) with --revision.")


@dataclasses.dataclass(frozen=True)
class Unfinished:
    """List streamed runs that were begun without --save and not finished; the same command goes on with them."""

    delete: tuple[str, ...] = ()
    """Keys of runs to delete, or all."""

    def __call__(self) -> None:
        from recon.study.cost import duration
        from recon.study.unfinished import discard, unfinished

        runs = unfinished()
        keys = [run.key for run in runs if not run.in_use] if self.delete == ("all",) else self.delete
        for key in keys:
            discard(key)
            print(f"{key}: deleted")
        for run in runs:
            if run.key not in keys:
                state = "at work" if run.in_use else f"{duration(run.age)} ago"
                print(f"{run.key}  {run.size / 2**30:8.2f} GiB  {state:10}  {run.options or 'its journal is damaged'}")
        if not runs:
            print("there are none")


@dataclasses.dataclass(frozen=True)
class Criteria:
    """List the pruning criteria."""

    def __call__(self) -> None:
        from recon.kernels.criteria import CRITERIA

        for name, criterion in CRITERIA.items():
            print(f"{name:10} {criterion.description} (compares within a {criterion.scope}; {criterion.source})")


@dataclasses.dataclass(frozen=True)
class Assets:
    """Fetch bundled models and texts into the cache, once. Whatever is not fetched here is fetched on first use."""

    models: tuple[str, ...] = ("smollm2-135m",)
    """Bundled models (see `recon models`), or all; the default is what the quick profile needs."""

    def __call__(self) -> None:
        from recon.data import assets, text

        models = tuple(assets.BUNDLED_MODELS) if self.models == ("all",) else self.models
        if unknown := [name for name in models if name not in assets.BUNDLED_MODELS]:
            raise ReconError(f"unknown bundled model {unknown[0]!r}; allowed: all, or some of {', '.join(assets.BUNDLED_MODELS)}")
        for name in models:
            print(f"{name}: {assets.bundled_model(name)}")
        for name in ("wikipedia", "news"):
            count = sum(len(text.documents(name, split)) for split in text.SPLITS)
            print(f"{name}: {count} documents")


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure time and memory, beside a straightforward loop and the machine's own ceiling."""

    spec: Annotated[BenchSpec, Group]

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
    commands = (Run, Reconstruct, Plan, Unfinished, Models, Criteria, Assets, Bench)
    try:
        tyro.extras.subcommand_cli_from_dict(
            {command.__name__.lower(): command for command in commands},
            prog="recon", description="Prune a causal language model and reconstruct it.", args=arguments,
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
