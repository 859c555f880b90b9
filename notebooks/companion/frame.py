"""Run records as one tidy frame: a row per run, with its options by flat name, its quality and its costs."""

import json
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd

import recon

# The options of each recipe. "first-skipped" is an earlier default: runs of today's default replace its records step by step.
RECIPES = {name: recon.RunSpec.of(preset=name).flat() for name in ("default", "first-skipped", "paper")}
DEFAULTS = RECIPES["default"]
SEARCH = 100  # seeds from here on belong to searches for learning rates: no verdict and no table uses them
RECIPE_WORDS = {"default": "default", "first-skipped": "first skipped", "paper": "paper's recipe"}
EQUAL = ", equal steps"
MEASURES = ("own", "other", "kl")  # NLL of the first and the second evaluation text, KL to the dense model on the first
STATES = ("dense", "pruned", "reconstructed")
RATES = ["learning_rate", "retrain_learning_rate", "size_power", "matrix_rate"]
MEMORY = "added memory, GiB"
_IN_WINDOWS = {field.name for field in fields(recon.ReconstructionConfig)} - {"granularity"}
# A method is how a run prunes, reconstructs and retrains. The options that tune its training do not belong to it.
_TUNABLE = {*RATES, "batch_size", "accumulation", "warmup", "weight_decay", "chunks"}
TUNING = [name for name in DEFAULTS if name.removeprefix("retrain_") in _TUNABLE]
_APART = """model revision text samples sequence_length held_out_samples pattern statistics prune_samples retrain_samples
    retrain_checkpointing evaluation_texts evaluation_samples evaluation_more_samples evaluation_length evaluation_protocol
    kl_windows tasks task_limit device compute_dtype seed""".split()
VARIED = {"criterion", "granularity", "retrain"}  # options of the method that the grids of notebooks 1 to 3 and 9 vary
METHOD = [name for name in DEFAULTS if name not in (*TUNING, *_APART)]


def fit_options(fit: str) -> dict[str, list]:
    """The axes for `recon.grid` of one way to reconstruct: a granularity, "matrix exact", "<granularity> from exact", or
    "<granularity>, equal steps": samples are not cut into chunks, so all windows make as many steps as those that mix tokens.

    "matrix exact" uses dense propagation in every recipe, because noise in the inputs would shrink the solved weights.
    """
    if fit == "matrix exact":
        return {"granularity": ["matrix"], "solver": ["exact"], "train": ["matrices"], "propagation": ["dense"]}
    name, _, start = fit.removesuffix(EQUAL).partition(" from ")
    return {"granularity": [name], "start": [start or "pruned"]} | ({"chunks": [1]} if fit.endswith(EQUAL) else {})


def fit_name(spec: dict, recipe: str) -> str:
    """The fit that a spec (flat names) uses: the inverse of `fit_options`."""
    if spec["solver"] == "exact" and spec["granularity"] == "matrix":
        return "matrix exact"
    return spec["granularity"] + " from exact" * (spec["start"] == "exact") + EQUAL * (spec["chunks"] < RECIPES[recipe]["chunks"])


def method_name(spec: dict) -> str:
    """How a spec trains: "reconstruction", a retraining method, both, or "pruned"; "dense, ..." for the dense model."""
    parts = ["reconstruction"] if spec["granularity"] != "none" else []
    if spec["retrain"] != "none":
        method = spec["retrain"] + (", distilled" if spec["retrain_objective"] == "distil" else "")
        parts.append(f"then {method}" if parts else method)
    name = ", ".join(parts) or "pruned"
    return name if spec["criterion"] != "none" else f"dense, {name}"


def short(name: str) -> str:
    """The name of a model or text; for an absolute path, its last part."""
    return Path(name).name if Path(name).is_absolute() else name


def setting(options: dict, recipe: str = "default") -> str:
    """The options of the method that differ from those of `recipe`, as text; equal methods give equal text."""
    usual = RECIPES[recipe]
    return ", ".join(f"{name} {options[name]}" for name in METHOD if name in options and options[name] != usual[name])


def recipe_of(spec: dict) -> str:
    """The recipe nearest to a spec (flat names): fewest differing options that affect its run; on a tie, fewest of any kind."""
    apart = {*RATES, *["first_position"] * (spec["granularity"] == "none")}  # without windows, the two defaults are the same
    said = [name for name in (*METHOD, *TUNING, "statistics") if name not in apart]
    off = {recipe: [_idle(name, spec) for name in said if spec[name] != usual[name]] for recipe, usual in RECIPES.items()}
    return min(RECIPES, key=lambda recipe: (off[recipe].count(False), len(off[recipe])))


def named(specs: Mapping[Hashable, recon.RunSpec]) -> dict[str, Hashable]:
    """The name of each spec by the keys of its runs: a run has another key in each compute precision."""
    each = {name: [spec.replaced(compute_dtype=kind) for kind in ("auto", "bfloat16", "float32")] for name, spec in specs.items()}
    return {spec.key(): name for name, own in each.items() for spec in own}


def load(folder: Path | str, specs: Iterable[recon.RunSpec] | None = None) -> pd.DataFrame:
    """The finished runs of a folder of records; with `specs`, only theirs, in that order, in any compute precision.

    Columns: every option (if it changes nothing in its run, with its recipe's value; if the record lacks it, with the default),
    every metric that is a number, and

    - key, recipe (of `RECIPES`), fit, method, setting, precision; tuning and rates, each with its detour (the distance
      from the recipe's: the sum of |log ratio| over its options);
    - unit (seed and precision; runs of equal unit are paired), trained (samples of the last training);
    - protocol and windows: runs can be compared if they agree in both;
    - <measure>_<state>: arrays (windows,) in nats per token, for `MEASURES` and `STATES`; NaN if the record has none;
      "perplexity, <text>" and "dense perplexity, <text>";
    - drift, drift_pruned (blocks,); losses, an array for each window; error_before and error_after (windows,);
    - flops, seconds (of reconstruction and retraining), flops_with_pruning, seconds_total, and MEMORY (in GiB): the
      measured peak of reconstruction or retraining above what was in use before it. Masks (a byte per weight) are not
      counted: they exist before it or, if pruning is in the same pass, are subtracted.
    """
    folder = Path(folder)
    if specs is None:
        paths = sorted(folder.glob("*.json"))
    else:
        paths = [folder / f"{key}.json" for key in named(dict(enumerate(specs)))]
    return table(json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file())


def table(records: Iterable[dict]) -> pd.DataFrame:
    """The same frame from records given as dicts."""
    runs = pd.DataFrame([_row(record) for record in records if record["status"] == "done"])
    if len(runs):  # "equal steps" is named only where the recipe also has the fit with more steps
        known, plain = runs.groupby("recipe")["fit"].agg(set), runs["fit"].str.removesuffix(EQUAL)
        runs["fit"] = runs["fit"].where([fit in known[recipe] for fit, recipe in zip(plain, runs["recipe"])], plain)
    return runs


def _row(record: dict) -> dict:
    spec, metrics = {name: record["spec"].get(name, default) for name, default in DEFAULTS.items()}, record["metrics"]
    spec = {name: tuple(x) if isinstance(x, list) else x for name, x in spec.items()}
    recipe = recipe_of(spec)
    spec = {name: RECIPES[recipe][name] if _idle(name, spec) else x for name, x in spec.items()}
    environment, protocol, windows = record["environment"], record["protocol"], record["windows"]
    row = {"key": record["key"], **spec, "model": short(spec["model"]) + (f"@{spec['revision']}" if spec["revision"] else "")}
    row |= {name: value for name, value in metrics.items() if not isinstance(value, dict | list)}
    row |= {"recipe": recipe, "fit": fit_name(spec, recipe), "method": method_name(spec), "setting": setting(spec, recipe)}
    for name, options in {"tuning": [name for name in TUNING if name not in RATES], "rates": RATES}.items():
        row[name] = ", ".join(f"{option} {spec[option]}" for option in options)
        # Distance from the recipe. 0 counts as 1e-12: a warm-up of 0 is further from the default than any positive one.
        far = [np.log(max(spec[option], 1e-12) / max(RECIPES[recipe][option], 1e-12)) for option in options]
        row[f"{name}_detour"] = np.abs(far).sum()
    row["precision"] = environment.get("compute_dtype", "")
    row["unit"] = f"{spec['seed']:03d} {row['precision']}"
    row["trained"] = (spec["retrain_samples"] if spec["retrain"] != "none" else 0) or spec["samples"]
    pruned_on = spec["prune_samples"] or spec["samples"]
    texts = spec["evaluation_texts"]
    row["pruned_on"], row["evaluated"] = pruned_on, short(texts[0])
    said = [spec[name] for name in "sequence_length text statistics evaluation_samples evaluation_length kl_windows".split()]
    row["protocol"] = repr((*said, pruned_on, texts[0], spec["evaluation_protocol"]))
    for text in texts:
        of_text = metrics["by_text"][text]
        row |= {f"perplexity, {text}": of_text["perplexity"], f"dense perplexity, {text}": of_text["dense_perplexity"]}
    nats = {name: metrics["by_text"][text]["nll_per_window"] for name, text in zip(MEASURES[:2], texts)}
    kl = metrics["by_text"][texts[0]].get("kl_per_window")
    nats |= {"kl": {"dense": [0.0] * len(kl["pruned"])} | kl} if kl and kl["pruned"] else {}
    for measure in MEASURES:
        row |= {f"{measure}_{state}": np.array(nats[measure][state]) if measure in nats else np.nan for state in STATES}
    row["windows"] = f"{protocol.get('token_hashes', {}).get(f'evaluation {texts[0]}', '')} {len(row['own_dense'])}"
    held_out = metrics.get("held_out_perplexity")
    undone = [report["status"].startswith("rolled back") for report in (*windows, record.get("retraining")) if report]
    lost = undone and all(undone)  # counts as infinitely bad, like a run that diverged: no search chooses its rate
    row["held_out_perplexity"] = np.nan if held_out is None else np.inf if lost or np.isnan(held_out) else held_out
    row |= {name: np.array(metrics.get(name, [])) for name in ("drift", "drift_pruned")}
    row["losses"] = [np.array(window["losses"]) for window in windows]
    row |= {name: np.array([next(iter(window[name].values())) for window in windows]) for name in ("error_before", "error_after")}
    row |= {name: sum(record[name].get(phase) or 0 for phase in ("reconstruct", "retrain")) for name in ("flops", "seconds")}
    row["flops_with_pruning"] = row["flops"] + (record["flops"].get("prune") or 0)
    added = {**record.get("added_memory_bytes_by_phase", {})}
    if "reconstruct" in added and "prune" not in added and "pruned" not in record.get("shared", ()):
        added["reconstruct"] -= sum(window["parameters"] for window in windows)
    row[MEMORY] = max((added[phase] for phase in ("reconstruct", "retrain") if phase in added), default=np.nan) / 2**30
    return row | {
        "seconds_total": record["seconds"].get("total", 0), "device": environment.get("device"),
        "dense": protocol.get("dense", ""), "notes": protocol,
    }  # fmt: skip


def _idle(name: str, spec: dict) -> bool:
    """Whether the option `name` changes nothing in a run of `spec`."""
    return (
        (name in _IN_WINDOWS and spec["granularity"] == "none")
        or name == ("size_power" if spec["granularity"] in ("matrix", "half-block") else "chunks")  # larger windows: no chunks
        or (name == "matrix_rate" and spec["granularity"] != "matrix")
        or (name.startswith("retrain_") and spec["retrain"] == "none")
        or (name.startswith("exact_") and "exact" not in (spec["solver"], spec["start"]))
        or (name.startswith("sparsegpt_") and spec["criterion"] != "sparsegpt")
    )


def current(runs: pd.DataFrame) -> pd.DataFrame:
    """`runs` with one default recipe per model and pattern: today's, if any run reconstructs with it, or else the earlier one."""
    place, fitted = runs["model"] + " " + runs["pattern"], runs["granularity"] != "none"
    new, old = (place.isin(place[fitted & (runs["recipe"] == name)]) for name in ("default", "first-skipped"))
    recipe = runs["recipe"].mask(~new & old & (runs["recipe"] == "default"), "first-skipped")
    return runs.assign(recipe=recipe)[(recipe != "first-skipped") | ~new].copy()


def seeds(runs: pd.DataFrame, by: str) -> str:
    """The seeds of each value of the column `by`: "seeds 0, 1, 2 (lora, norms: seed 0)"; five or more values are only counted."""
    groups: dict[str, list[str]] = {}
    for name, own in runs.groupby(by, sort=False)["seed"]:
        groups.setdefault(", ".join(map(str, sorted(set(own)))), []).append(str(name))
    most = max(groups, key=lambda words: (len(groups[words]) * len(words), len(words)))
    few = {words: ", ".join(names) if len(names) < 5 else f"{len(names)} others" for words, names in groups.items()}
    said = {words: f"seed{'s' * (',' in words)} {words}" for words in groups}
    others = [f"{names}: {said[words]}" for words, names in few.items() if words != most]
    return said[most] + (f" ({'; '.join(others)})" if others else "")


def protocol(runs: pd.DataFrame) -> str:
    """How runs were made and measured, in sentences: each protocol with its models and patterns, and the dense weights."""
    said = {}
    for (_, recipe), group in runs.groupby(["protocol", "recipe"], sort=False):
        cells = ", ".join(dict.fromkeys(group["model"] + " " + group["pattern"]))
        told = runs["recipe"].nunique() < 2 or "," in group["model"].iloc[0]  # tables put it into the model's name
        cells += f" ({RECIPE_WORDS[recipe]})" * (not told)
        said.setdefault(protocol_words(group), []).append(cells)
    words = [f"{', '.join(cells)}: {text}" if len(said) > 1 else text for text, cells in said.items()]
    dense = {model.partition(",")[0]: said for model, said in zip(runs["model"], runs["dense"]) if said}  # without the recipe
    words += [f"Dense weights: {'; '.join(f'{model} {said}' for model, said in dense.items())}"] if dense else []
    return ". ".join(words) + "."


def protocol_words(runs: pd.DataFrame) -> str:
    """What runs of one protocol were calibrated and evaluated on, and the options that all of them share, in words."""
    fitted = runs[runs["granularity"] != "none"]
    first, counts = runs.iloc[0], sorted({*fitted["samples"], *runs["trained"]})
    names = {"propagation": "{} propagation", "loss": "{} loss", "first_position": "first positions {}"}
    alike = [said.format(values[0]) for name, said in names.items() if len(values := fitted[name].unique()) == 1]
    cut = f" ({first['evaluation_protocol']})" * (first["evaluation_protocol"] != DEFAULTS["evaluation_protocol"])
    samples = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return ", ".join([
        f"{samples} x {first['sequence_length']} tokens of {short(first['text'])}",
        *["whole samples"] * (set(fitted["chunks"]) == {1}), *alike,
        f"pruned on {first['pruned_on']} ({first['statistics']} statistics)",
        f"perplexity on {first['evaluation_samples']} x {first['evaluation_length']} tokens of {first['evaluated']}{cut}",
        *[f"KL on the first {min(first['kl_windows'], first['evaluation_samples'])} of these"] * bool(first["kl_windows"]),
        *[f"{' or '.join(sorted(set(runs['precision'])))} products"] * (set(runs["precision"]) != {""}),
    ])  # fmt: skip
