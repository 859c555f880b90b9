"""A ladder of sizes: Llama-shaped models of one tokenizer and one text, trained here, and what changes along it.

All files lie in `FOLDER`, relative to the checkout: a run's key depends on its model's path, which must be equal everywhere.
"""

import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from pandas.io.formats.style import Styler
from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from companion import compare, frame
from companion.figures import panels, span
from companion.publish import colours_of, whole
from companion.publish import publish as published

FOLDER = Path("build/ladder")
ARCHIVES = {  # what pip downloads -> its SHA-256; code and documentation, both under the BSD licence
    ("django==5.2.8", "--no-binary=:all:"): "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f",
    ("sympy==1.14.0", "--only-binary=:all:"): "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
}
KINDS, SHORTEST, LONGEST = {".py", ".txt"}, 2_000, 200_000  # suffixes of the files that are read; their size in bytes
HELD_OUT = 16 / 256  # share of the files that no model is trained on
VOCABULARY, LEARNT = 2048, 400  # tokens, and the number of files that the tokenizer is learnt from
LENGTH, BATCH = 128, 16  # tokens of a sample, with its `<s>`; samples per step
RATE, WARMUP = 6e-3, 0.05  # AdamW's peak at 64 channels, scaled by sqrt(64 / channels); share of the steps
SAVED = 60  # seconds between two saves of a training's state


# --- text and tokenizer ---------------------------------------------------------------------------------------------------


def text(folder: Path = FOLDER) -> Path:
    """The folder with the tokenizer, training.jsonl and held-out.jsonl (a row "text" per file, sorted by hash), made if missing.

    A held-out file is cut to 2,000 characters, from its middle on, so that samples come from many files.
    """
    place = folder / "text"
    if not place.is_dir():
        with whole(place) as fresh:
            files = dict(sorted((hashlib.sha256(each.encode()).hexdigest(), each) for each in _files()))
            held = {name for name in files if int(name[-2:], 16) < 256 * HELD_OUT}
            fresh.mkdir()
            training = [each for name, each in files.items() if name not in held]
            middles = [files[name][len(files[name]) // 2 :][:SHORTEST] for name in sorted(held)]
            for name, rows in (("training", training), ("held-out", middles)):
                lines = [json.dumps({"text": each}) + "\n" for each in rows]
                (fresh / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            _tokenizer(training[:LEARNT]).save_pretrained(fresh)
    return place


def _files() -> Iterator[str]:
    """Source and documentation files of the archives that pip downloads. Raises `ValueError` if a hash is not the pinned one."""
    for (requirement, kind), sha256 in ARCHIVES.items():
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", requirement, kind, "--no-deps", "--dest", scratch, "--quiet"]
            subprocess.run([*command, "--disable-pip-version-check", "--no-input"], check=True)
            [archive] = Path(scratch).iterdir()
            if (got := hashlib.sha256(archive.read_bytes()).hexdigest()) != sha256:
                raise ValueError(f"{archive.name} has sha256 {got}, not {sha256}")
            shutil.unpack_archive(archive, f"{scratch}/files", "zip" if archive.suffix == ".whl" else "gztar")
            for path in Path(scratch, "files").rglob("*"):
                if path.suffix in KINDS and SHORTEST <= path.stat().st_size <= LONGEST:
                    yield path.read_text(encoding="utf-8", errors="replace")


def _tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from `documents`, with `<s>` in front of every text."""
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(documents, VOCABULARY, min_frequency=0, show_progress=False, special_tokens=["<s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(core.to_str()), bos_token="<s>")


@lru_cache(maxsize=2)
def samples(count: int, folder: Path = FOLDER) -> torch.Tensor:
    """The first `count` samples of the training text, (count, LENGTH): each is `<s>` and then text. Samples do not overlap."""
    core, tokens = Tokenizer.from_file(str(text(folder) / "tokenizer.json")), []
    with (text(folder) / "training.jsonl").open(encoding="utf-8") as rows:
        for row in rows:
            tokens += core.encode(json.loads(row)["text"] + "\n\n", add_special_tokens=False).ids
            if len(tokens) >= count * (LENGTH - 1):
                cut = torch.tensor(tokens[: count * (LENGTH - 1)]).view(count, LENGTH - 1)
                return torch.cat([torch.zeros(count, 1, dtype=cut.dtype), cut], 1)
    raise ValueError(f"the text has {len(tokens)} tokens, fewer than {count} samples")


# --- models ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """A model: blocks, channels (32 per head), training steps, and the seed of its weights and of the order of its samples."""

    blocks: int
    channels: int
    steps: int
    seed: int = 0

    @property
    def config(self) -> LlamaConfig:
        inner, heads = 8 * round(self.channels / 3), self.channels // 32
        shape = {"hidden_size": self.channels, "intermediate_size": inner, "num_hidden_layers": self.blocks}
        shape |= {"num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": LENGTH}
        return LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, bos_token_id=0, eos_token_id=None, **shape)

    @property
    def parameters(self) -> int:
        """Number of parameters in all blocks, without the embedding."""
        return self.blocks * (4 * self.channels**2 + 3 * self.channels * self.config.intermediate_size + 2 * self.channels)

    @property
    def tokens(self) -> int:
        return self.steps * BATCH * LENGTH

    @property
    def name(self) -> str:
        """States all fields, for `compare.parameters` and `compare.family`: ladder rungs with equal steps are one family."""
        kind, size = "ladder" if self.channels == 32 * self.blocks else "shape", f"{self.parameters / 1e6:.3f}m"
        return f"{kind}-{self.steps}-{size}-{self.blocks}x{self.channels}-s{self.seed}"


def train(rung: Rung, folder: Path = FOLDER) -> Path:
    """The folder of a rung's Hugging Face checkpoint, trained if missing; a stopped training continues from its last save."""
    place, state = folder / rung.name, folder / f"{rung.name}.state"
    if place.is_dir():
        return place
    read = samples(rung.steps * BATCH, folder)
    torch.manual_seed(rung.seed)
    model, order, losses = LlamaForCausalLM(rung.config), torch.randperm(len(read)), []
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    if state.exists():
        found = torch.load(state, weights_only=True)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        losses = found["losses"]
    noted = time.monotonic()
    for step in range(len(losses), rung.steps):
        batch = read[order[step * BATCH : (step + 1) * BATCH]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate(rung, step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if time.monotonic() - noted > SAVED:
            with whole(state) as part:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}, part)
            noted = time.monotonic()
    with whole(place) as fresh:
        model.save_pretrained(fresh)
        PreTrainedTokenizerFast.from_pretrained(text(folder)).save_pretrained(fresh)
        (fresh / "losses.csv").write_text("\n".join(["loss", *map(str, losses)]))
    state.unlink(missing_ok=True)
    return place


def rate(rung: Rung, step: int) -> float:
    """The learning rate of a step: linear warm-up, then cosine decay to 0."""
    done, warmup = (step + 1) / rung.steps, WARMUP
    return RATE * math.sqrt(64 / rung.channels) * (done / warmup if done < warmup else math.cos(math.pi / 2 * done) ** 2)


def options(rung: Rung) -> dict:
    """The options of runs on a rung: its model, trained if need be, and the held-out text."""
    held_out = str(text() / "held-out.jsonl")
    return {"model": str(train(rung)), "text": held_out, "evaluation_texts": (held_out,)}


# --- what changes along the ladder ----------------------------------------------------------------------------------------


def compute(model: str) -> float:
    """The compute of a rung's training, from its name: parameters of its blocks times tokens read."""
    return compare.parameters(model) * int(model.split("-")[1]) * BATCH * LENGTH


def over_size(
    sides: Mapping[tuple[str, str], tuple[pd.DataFrame, pd.DataFrame]], words: str, size=compare.parameters, **options
) -> tuple[Figure, pd.DataFrame, str, str, pd.DataFrame]:
    """For each (panel, line), plots over model size how much better the runs of the first side are than those of the second.

    words: name of the effect, for the axis. size: function from a model's name to its size. options: for `compare.pair`.
    Returns the figure; its data (a row for each model and seed); what its marks mean; its finding, a sentence; and the slope of
    each line by `compare.sloped`, with a 95 % interval.
    """
    points, slopes = [], []
    for (panel, line), pair in sides.items():
        evidence, about = {}, {"panel": panel, "line": line}
        for model in dict.fromkeys(pair[0]["model"]):
            mine, theirs = (side[side["model"] == model].drop_duplicates("unit").set_index("unit") for side in pair)
            if found := compare.pair(mine, theirs, **options):
                evidence[model] = found
                values = found.statistic(np.concatenate([part.mean(2) for part in found.parts]))
                units = zip(compare.common(mine, theirs), values)
                points += [about | {"model": model, "size": size(model), "seed": seed, "value": value} for seed, value in units]
        if slope := compare.sloped(evidence, size=size):
            effect, _, low, high = (math.nan,) * 4 if slope.lacks else slope.estimate(0.95)
            why = "has too few sizes" if slope.lacks else "cannot be told" if math.isnan(low) else "shows no clear trend"
            clear = low * high > 0 and min(abs(low), abs(high)) > slope.error(0.95)  # else another bootstrap may decide otherwise
            trend = why if not clear else "rises" if low > 0 else "falls"
            slopes.append(about | {"slope": effect, "low": low, "high": high, "seeds": slope.seeds, "trend": trend})
    data, slopes = pd.DataFrame(points), pd.DataFrame(slopes)
    plain, names = size == compare.parameters, list(dict.fromkeys(data["panel"]))
    families = data["model"].map(compare.family if plain else lambda model: "")
    joined = families == families.mode()[0]  # models of other families are drawn as stars
    figure, axes = panels(len(names), 3.8, 3.2, columns=2, sharey="row")
    known = set(data.loc[joined, "line"])  # the other lines have stars only
    colours, shapes, levels = colours_of(data["line"]), dict(zip(data["line"].unique(), "os^Dvh")), defaultdict(list)
    for (panel, line, ours), own in data.groupby(["panel", "line", joined], sort=False):
        ax, name = axes[names.index(panel)], line if ours or line not in known else None
        means = own.groupby(["size", "model"])["value"].mean().groupby("size").mean()
        levels[line] += [means] * ours
        ax.plot(own["size"], own["value"], ".", color=colours[line], alpha=0.3, markersize=4)
        shown = {"color": colours[line], "markersize": 5, "linewidth": 1, "clip_on": False, "label": name}
        shown |= {"markerfacecolor": "white"} if line.endswith(" pruned") else {}
        ax.plot(means.index, means, f"{shapes[line]}-" if ours else "*", **shown)
    for ax, name in zip(axes, names):
        ax.axhline(0, color="0.4", linewidth=1)
        ax.set(title=name, ylabel=words if ax in axes[::2] else "", xlim=(data["size"].min() / 2, 2 * data["size"].max()))
        if "share" not in options:  # nats differ by orders of magnitude, and some are about 0
            ax.set_yscale("symlog", linthresh=0.1)
            ax.set_ylim(top=1.5 * data["value"].max())
            ax.yaxis.set_major_formatter("{x:g}")
        size_axis(ax, "parameters" if plain else "parameters x tokens")
    labels = {label: mark for ax in axes for mark, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=3, fontsize=8)
    words, said = " ".join(words.split()), []
    for line, own in slopes.groupby("line", sort=False):
        trends = []
        for trend, alike in own.groupby("trend", sort=False):
            by = f" by {span(alike['slope'].abs())}" * (trend in ("rises", "falls"))
            trends.append(f"{trend}{by}" + f" ({len(alike)} of {len(own)})" * (len(alike) < len(own)))
        said.append(f"{line} {span(pd.concat(levels[line]))}, {', '.join(trends)}")
    words = f"{words[:1].upper()}{words[1:]}, and its trend per tenfold {size.__name__}"
    marks = "Small marks: seeds. Large ones: means over models of one size. " + "Linear up to 0.1. " * ("share" not in options)
    if others := ", ".join(data.loc[~joined, "model"].unique()):
        marks += f"Stars: other families ({others}), not in the title, of their own protocols, with the embedding in their size. "
    return figure, data, marks, f"{words}: {'; '.join(said)}.", slopes


def publish(sides: Mapping, name: str, folder: Path, runs: pd.DataFrame, keys: Iterable[str], words: str, **options) -> Styler:
    """Publishes the figure of `over_size`; returns a table of its slopes. Its caption states the protocol of the ladder's `runs`
    with these `keys`."""
    figure, data, marks, finding, slopes = over_size(sides, words, **options)
    used = runs[runs["key"].isin(keys)].assign(model="all models")
    published(figure, name, folder, data, marks + frame.protocol(used), keys, finding)
    return slopes.style.hide(axis="index").format(precision=2)


def size_axis(ax: Axes, words: str = "parameters") -> None:
    """Makes the x axis a logarithmic axis of sizes, labelled like 100k and 2M."""
    ax.set(xscale="log", xlabel=words)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if np.ptp(np.log10(ax.get_xlim())) < 2 else (1,)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(NullFormatter())
