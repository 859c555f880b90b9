"""`recon ...`: the command line, generated from the dataclasses."""

import logging
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from recon.bench.spec import BenchSpec
from recon.errors import ReconError
from recon.spec import RunSpec


@dataclass(frozen=True)
class Run:
    """Prune and repair one model; print its perplexities."""

    spec: Annotated[RunSpec, tyro.conf.arg(name="")]
    record: Path | None = None
    """File for the record (JSON)."""
    save: Path | None = None
    """New folder for the repaired model as a Hugging Face checkpoint."""

    def __call__(self) -> None:
        from recon.checkpoint import check_writable
        from recon.study import run_or_record_failure, write_record

        if self.record:
            if self.record.is_dir():
                raise ReconError(f"record {str(self.record)!r} is a folder; name a file")
            check_writable(self.record.parent, "record")
        command = shlex.join(["recon", *sys.argv[1:]])
        record, error = run_or_record_failure(self.spec, save=self.save, command=command)
        if self.record:
            write_record(record, self.record)
        if error:
            raise error
        for text, values in record.metrics["by_text"].items():
            share = values["share_recovered"]
            recovered = "" if share is None else f"   share recovered {share:.2f}"
            print(
                f"{text}: perplexity dense {values['dense_perplexity']:.2f}, pruned {values['pruned_perplexity']:.2f}, "
                f"repaired {values['perplexity']:.2f}{recovered}"
            )
        seconds = ", ".join(f"{phase} {value:.0f} s" for phase, value in record.seconds.items())
        print(f"sparsity {record.metrics['sparsity']:.4f}; {seconds}; peak memory {record.peak_memory_bytes / 2**30:.2f} GiB")


@dataclass(frozen=True)
class Models:
    """List the bundled models."""

    def __call__(self) -> None:
        from recon.assets import BUNDLED_MODELS

        for name, description in BUNDLED_MODELS.items():
            print(f"{name:16} {description}")
        print("\nOr any causal LM: a local folder, or a Hub id (organisation/name) with --revision.")


@dataclass(frozen=True)
class Criteria:
    """List the pruning criteria."""

    def __call__(self) -> None:
        from recon.criteria import CRITERIA

        for name, criterion in CRITERIA.items():
            print(f"{name:10} {criterion.description} (compares within a {criterion.scope}; {criterion.source})")


@dataclass(frozen=True)
class Assets:
    """Fetch bundled models and texts into the cache, once. What is not fetched here is fetched when it is first used."""

    models: tuple[str, ...] = ("smollm2-135m",)
    """Bundled models (see `recon models`), or all; the default is what the quick profile needs."""

    def __call__(self) -> None:
        from recon import assets, text

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
        from recon.bench.measure import bench
        from recon.bench.report import summary

        print(summary(bench(self.spec)))
        print(f"\nresults: {self.spec.output}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point; bad input ends with its message and exit status 2, Ctrl-C with 130."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("recon").setLevel(logging.INFO)
    commands = {"run": Run, "models": Models, "criteria": Criteria, "assets": Assets, "bench": Bench}
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="recon", description="Prune a causal LM and repair it.", args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        )()  # fmt: skip
    except ReconError as error:
        print(f"recon: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("recon: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
