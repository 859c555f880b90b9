"""`recon shrink`: cuts out heads and neurons that structured pruning has set to zero; the result is an ordinary checkpoint.

A unit can be cut if all columns that read it are zeros: its output then has no effect, whatever its rows hold. Its columns are
cut, and its rows with their biases. Configurations of transformers have one width for all layers, so each layer keeps as many
units as the layer that needs the most; units beyond its own stay zeros. The fields of the configuration that set the width are
found by trying: the model that is built from them must have exactly the shapes that are left.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from recon.data import models
from recon.errors import ReconError
from recon.evaluate.perplexity import last_states
from recon.methods.structured import Units, find_units
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.modules import distance, probe_tokens, tolerance
from recon.model.skeleton import Lazy, skeleton
from recon.model.structure import OTHER
from recon.runtime.device import SAVED
from recon.runtime.execution import Execution
from recon.runtime.storage import new_checkpoint
from recon.study.checkpoint import save

UNITS = {"attention": ("key/value heads", 1), "mlp": ("neurons", 32)}  # name; kept counts are multiples of it, for 4-bit formats
Cuts = dict[str, tuple[int, Tensor]]  # parameter name -> the dimension that is cut, and which of its entries are kept


@torch.no_grad()
def shrink(name: Path | str, folder: Path | str) -> list[str]:
    """Writes the model `name`, without the heads and neurons that are all zeros in it, to a new folder, in its own dtype.

    One block at a time is in memory. Returns a sentence on heads and one on neurons: what was cut, or why nothing was. Raises
    `ReconError` if nothing can be cut (and says why), if the logits would change, and as `find_units` does.
    """
    with new_checkpoint(Path(folder)) as fresh:
        source = models.configuration(name := str(name))
        model, stored, tokenizer = models.skeleton(name)
        decoder = decompose(model, lazy=Lazy(model, stored.read))
        halves, config, cuts, said = find_units(decoder), model.config, {}, []
        for kind in OTHER:
            config, cuts, words = _narrowed(decoder, kind, [half for half in halves if half.window.half == kind], config, cuts)
            said.append(words)
        if not cuts:
            raise ReconError(f"{name!r} would be as large as before: {'; '.join(said)}")

        def read(names: list[str]) -> Iterator[tuple[str, Tensor]]:
            for each, value in stored.read(names):
                dim, kept = cuts.get(each, (0, None))
                yield each, value if kept is None else value.index_select(dim, kept.nonzero()[:, 0])

        small = skeleton(config)
        small.tie_weights()
        small.generation_config = model.generation_config
        shrunk = decompose(small, like=decoder, lazy=Lazy(small, read))
        logits = _logits(decoder)
        if (gap := distance(_logits(shrunk), logits)) > tolerance(logits):
            raise ReconError(f"{name!r} gives other logits (by {gap:.1e}) with fewer units: something else in it depends on them")
        dtype = str(source.dtype or source.get_text_config().dtype).removeprefix("torch.")
        save(shrunk, tokenizer, fresh, dtype if dtype in SAVED else "float32")
        card = Path(model.name_or_path) / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        (fresh / "README.md").write_text(f"{text}\nWhat was pruned as a whole is cut out: {'; '.join(said)}.\n", encoding="utf-8")
    return said


def _narrowed(
    decoder: Decoder, kind: str, halves: list[Units], config: PretrainedConfig, cuts: Cuts
) -> tuple[PretrainedConfig, Cuts, str]:
    """`config` and `cuts` after all cuts that are possible in halves of one kind; in words, these, or why there are none."""
    (units, multiple), count, kept = UNITS[kind], halves[0].count, []
    for half in tqdm(halves, desc=f"read ({units})", unit="layer"):
        with decoder.present([half.reader.parameter]):
            weight = half.reader.weight
            kept.append((weight != 0).view(len(weight), half.count, -1).any(2).any(0))
    numbers = [int(each.sum()) for each in kept]
    if min(numbers) == count:
        return config, cuts, f"no {units} are zeros as a whole, and single zeros take as much room as other weights"
    said = f"layers keep {' '.join(map(str, numbers if len(set(numbers)) > 1 else numbers[:1]))} of {count} {units}"
    least, why = -(-max(numbers) // multiple) * multiple, []
    for width in range(least, count, multiple if kind == "attention" else count):
        # The units that are kept, filled up to `width` with the first of the others.
        padded = [each | (~each & ((~each).cumsum(0) <= width - each.sum())) for each in kept]
        for changes in _settings(config.get_text_config(), kind, halves[0], width):
            found = cuts | _cuts(decoder, halves, padded)
            fitting = _configured(decoder, config, changes, found)
            if not isinstance(fitting, str):
                return fitting, found, f"{said}; the configuration has {', '.join(f'{k} {v}' for k, v in changes.items())}"
            why.append(fitting)
    widest = f"all have to be as wide as the widest, here {least}"
    return config, cuts, f"{said}, and they stay as zeros: {why[0] if why else widest}"


def _cuts(decoder: Decoder, halves: list[Units], kept: list[Tensor]) -> Cuts:
    """What is cut from the parameters of `halves` so that they keep the units `kept`."""
    cuts, matrices = {}, decoder.matrices()
    for half, keep in zip(halves, kept, strict=True):
        columns = keep.repeat_interleave(half.reader.weight.shape[1] // half.count)
        cuts[half.reader.parameter_name] = int(not half.reader.transposed), columns
        for name, owner in half.rows.items():
            cuts[matrices[name].parameter_name] = int(matrices[name].transposed), keep[owner]
            cuts[matrices[name].bias_name] = 0, keep[owner]  # if there is one
    return cuts


def _settings(config: PretrainedConfig, kind: str, half: Units, width: int) -> Iterator[dict[str, int]]:
    """Candidates: fields of a configuration, with values, that may make the halves of one kind `width` units wide."""
    if kind == "attention":
        heads = config.num_attention_heads
        own = {"num_key_value_heads": width} if getattr(config, "num_key_value_heads", None) else {}
        yield {"num_attention_heads": heads * width // half.count} | own | {"head_dim": half.reader.weight.shape[1] // heads}
    else:
        for sought in (half.count, None):  # in a configuration, None stands for a multiple of the hidden size
            yield from ({name: width} for name, value in config.to_dict().items() if value == sought)


def _configured(decoder: Decoder, config: PretrainedConfig, changes: dict[str, int], cuts: Cuts) -> PretrainedConfig | str:
    """`config` with `changes`, if its model has exactly the shapes that `cuts` leave; else, as text, why it has not."""
    config, names = copy.deepcopy(config), ", ".join(f"{name} {value}" for name, value in changes.items())
    try:
        for name, value in changes.items():
            setattr(config.get_text_config(), name, value)
        config = type(config).from_dict(config.to_dict())  # runs the checks of reading a configuration
        made = dict(skeleton(config).named_parameters(remove_duplicate=False))
    except Exception as error:  # a configuration may refuse a value in any way
        return f"{type(config).__name__} cannot have {names} ({' '.join(str(error).split())})"
    for name, parameter in decoder.model.named_parameters(remove_duplicate=False):
        dim, kept = cuts.get(name, (0, None))
        wanted = list(parameter.shape)
        if kept is not None:
            wanted[dim] = int(kept.sum())
        if name not in made or list(made[name].shape) != wanted:
            found = list(made[name].shape) if name in made else "missing"
            return f"{type(config).__name__} has no fields for it; with {names}, {name!r} is {found}, not {wanted}"
    return config


def _logits(decoder: Decoder) -> Tensor:
    """The logits of random tokens, one block in memory at a time."""
    tokens = probe_tokens(decoder.model)
    return decoder.logits(tokens, last_states(decoder, tokens, Execution("cpu", "float32"), "compare"))
