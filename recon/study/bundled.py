"""What the bundled models are, and how well each predicts bundled text before anything is pruned: measured once, kept in the cache."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass

from recon.config import PROTOCOLS
from recon.data import assets, models, text
from recon.data.cache import cached, whole
from recon.evaluate.perplexity import perplexity
from recon.runtime.execution import Execution
from recon.runtime.storage import write_json
from recon.study import cost
from recon.study.shapes import shapes_of
from recon.study.spec import RunSpec

log = logging.getLogger("recon")
TEXTS = ("wikipedia", "news")
SAMPLES, LENGTH = 16, 512  # of the text windows; LENGTH in tokens
VERSION = 1  # raise it when the meaning of a measured value changes: values are cached under this number
FILE = "perplexity.json"


@dataclass(frozen=True)
class Cell:
    """A perplexity of a bundled model: on which text, cut how (see `recon.config.PROTOCOLS`), with products in which dtype."""

    model: str
    text: str
    protocol: str
    dtype: str
    samples: int
    length: int

    def name(self) -> str:
        """Of its folder in the cache; differs where model, text or protocol differ."""
        decisive = {**asdict(self), "model": assets.origin(self.model), "text": text.fingerprint(self.text), "version": VERSION}
        return f"perplexity-{hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]}"

    def value(self) -> float | None:
        """The perplexity, if it has been measured; nothing is fetched."""
        folder = whole(self.name()) if assets.made(self.model) and text.is_fetched(self.text) else None
        return folder and json.loads((folder / FILE).read_text(encoding="utf-8"))["perplexity"]

    def seconds(self, execution: Execution) -> float:
        """How long it takes to measure on this machine, about; the model is fetched if need be."""
        spec = RunSpec.of(
            model=self.model, granularity="none", evaluation_texts=(self.text,),
            evaluation_samples=self.samples, evaluation_length=self.length,
        )  # fmt: skip
        twice = cost.flops(spec, shapes_of(self.model).decoder)["evaluate"]  # of the dense model and the pruned one
        return twice / 2 / cost.speed(execution.device, execution.dtype)


def cells(model: str, execution: Execution) -> list[Cell]:
    """The perplexities that are measured of a bundled model, protocol by protocol."""
    dtype = str(execution.dtype).removeprefix("torch.")
    return [Cell(model, each, protocol, dtype, SAMPLES, LENGTH) for protocol in PROTOCOLS for each in TEXTS]


def unknown(execution: Execution) -> list[Cell]:
    """The perplexities of bundled models that are not in the cache."""
    return [cell for name in assets.BUNDLED_MODELS for cell in cells(name, execution) if cell.value() is None]


def measure(execution: Execution) -> None:
    """Fetches what is not here of the bundled models and texts, and measures the perplexities that are not in the cache.

    Says first how long it will take. Whatever is measured when it is interrupted is kept. Raises `ReconError` as `assets.fetch`.
    """
    for name in assets.BUNDLED_MODELS:
        assets.bundled_model(name)
    if missing := unknown(execution):
        seconds = sum(cell.seconds(execution) for cell in missing)
        log.info("measuring %d perplexities: about %s on this machine", len(missing), cost.duration(seconds))
    for name in dict.fromkeys(cell.model for cell in missing):
        model, tokenizer = models.load(name)
        for cell in missing:
            if cell.model == name:
                _measure(cell, model, tokenizer, execution)


def _measure(cell: Cell, model, tokenizer, execution: Execution) -> None:
    tokens = text.sample_tokens(cell.text, "evaluation", tokenizer, cell.samples, cell.length, protocol=cell.protocol)
    about = f"perplexity ({cell.model}, {cell.text}, {cell.protocol})"
    found = perplexity(model, tokens, execution=execution, description=about)
    cached(cell.name(), lambda folder: write_json(folder / FILE, asdict(cell) | {"perplexity": found.value}))


def describe(name: str, execution: Execution) -> str:
    """What a bundled model is, in lines: kind, size, weights, and its perplexities as far as they are known; nothing is fetched."""
    size, lines = f"{assets.DOWNLOADS[name] / 1e6:.0f} MB", [assets.BUNDLED_MODELS[name]]
    if not assets.made(name):
        return "\n".join([*lines, f"{size} to fetch on first use"])
    config, decoder = shapes_of(name)
    parameters = sum(parameter.numel() for parameter in decoder.model.parameters())
    lines.append(f"{parameters:,} parameters, {models.precision(config)}; {size}, fetched")
    known = cells(name, execution)
    title = f"perplexity, {SAMPLES} x {LENGTH} tokens, {known[0].dtype}"
    lines.append(f"{title:40}" + "".join(f"{each:>12}" for each in TEXTS))
    for protocol in PROTOCOLS:
        values = [cell.value() for cell in known if cell.protocol == protocol]
        lines.append(f"  {protocol:38}" + "".join(f"{'-' if value is None else f'{value:.2f}':>12}" for value in values))
    return "\n".join(lines)
