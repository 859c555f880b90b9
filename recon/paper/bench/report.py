"""What `recon bench` measured, as tables: for the command line and for the notebook."""

import pandas as pd


def tables(results: dict) -> dict[str, pd.DataFrame]:
    """One table per section measured, by title."""
    found = {name: section["results"] for name, section in results["sections"].items()}
    made: dict[str, pd.DataFrame] = {}
    if "products" in found:
        made["Speed of matrix products"] = _products(found["products"])
    if "loops" in found:
        made["Equal steps"] = loops(found["loops"])
    if "profile" in found:
        made["Time by kind of operation, s"] = pd.DataFrame({name: part["phases"] for name, part in found["profile"].items()})
    if "growth" in found:
        rows = pd.DataFrame(found["growth"])
        made["Growth, s"] = rows.pivot_table(index=["axis", "value"], columns="loop", values="seconds", sort=False)
    if "prune" in found:
        made["Pruning alone, and the exact solution"] = _in_gib(pd.DataFrame(found["prune"]).set_index("work"))
    if "quality" in found:
        made["Perplexity against time"] = quality(found["quality"])
    if "sweep" in found:
        made["Sweep"] = _sweep(found["sweep"])
    if "workers" in found:
        made["Workers"] = workers(found["workers"])
    if "compile" in found:
        made["torch.compile"] = _compile(found["compile"])
    if "large" in found:
        made["8B-shaped"] = _in_gib(pd.DataFrame([found["large"]]))
    return made


def summary(results: dict) -> str:
    """All tables as text."""
    return "\n\n".join(f"{title}\n{table.round(3).to_string()}" for title, table in tables(results).items())


def loops(section: dict) -> pd.DataFrame:
    """Mean, spread and ratio of seconds and of memory beyond the models over the rounds; each ratio is taken within a round."""
    rows = pd.DataFrame(section["rows"])
    seconds = rows.pivot(index="round", columns="loop", values="seconds")
    memory = rows.pivot(index="round", columns="loop", values="added_memory_bytes") / 2**30
    for table in (seconds, memory):
        table["ratio"] = table["reference"] / table["ours"]
    columns = ["reference", "ours", "ratio"]
    parts = {"seconds": seconds, "memory added, GiB": memory}
    return pd.DataFrame({(what, how): getattr(t[columns], how)() for what, t in parts.items() for how in ("mean", "std")}).T


def quality(section: list[dict]) -> pd.DataFrame:
    """A row per loop, with its time as a share of the reference loop's, and whether it is at least as good."""
    rows = pd.DataFrame(section).set_index("loop")
    reference = rows.loc["reference"]
    rows["share of the reference's time"] = rows["seconds"] / reference["seconds"]
    rows["as good as the reference"] = rows["perplexity"] <= reference["perplexity"]
    rows = rows.rename(columns={"share_recovered": "share recovered"}).astype({"samples": "Int64"})
    return rows.drop(columns=["peak_memory_bytes", "added_memory_bytes"], errors="ignore")  # one process after much else


def workers(section: dict) -> pd.DataFrame:
    """Seconds and speed-up of the study and the windows by workers (0: one after the other, in the process that asks).

    Overhead is what passes from one run's end to the next one's beyond that run's own seconds, where one process does them all: the
    first run is left out, as it waits for the process to start.
    """
    table = pd.DataFrame({what: {row["workers"]: row["seconds"] for row in section[what]} for what in ("studies", "windows")})
    table.index.name, table.columns = "workers", ["study, s", "windows, s"]
    for what in ("study", "windows"):
        table[f"{what}, times as fast"] = table.at[0, f"{what}, s"] / table[f"{what}, s"]
    for row in section["studies"]:
        if row["workers"] < 2:
            between = pd.Series(row["ends"]).diff().iloc[1:] - row["own_seconds"][1:]
            table.loc[row["workers"], ["overhead per run, s", "most, s"]] = between.mean(), between.max()
    return table


def _products(section: dict) -> pd.DataFrame:
    squares = {f"large squares, {dtype}": rate / 1e12 for dtype, rate in section["square_flops_per_second"].items()}
    own = {
        f"{kind} of reconstruction": section["flops"][kind] / section["seconds_at_ceiling"][kind] / 1e12
        for kind in section["flops"]
        if section["seconds_at_ceiling"][kind]
    }
    shares = pd.Series(section["achieved_share_of_ceiling"])
    table = pd.DataFrame({"TFLOP/s": squares | own})
    table.loc["share of reconstruction's time that its products alone would take", "TFLOP/s"] = None
    table["share"] = ""
    table.loc[table.index[-1], "share"] = f"{shares.mean():.2f} ± {shares.std():.2f}"
    return table


def _sweep(section: dict) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "criterion": [run["criterion"] for run in section["runs"]],
            "granularity": [run["granularity"] for run in section["runs"]],
            "solver": [run["solver"] for run in section["runs"]],
            "singly, s": section["seconds_singly"],
            "in a study, s": section["seconds_in_study"],
        }
    )
    table.loc["all"] = ["", "", "", sum(section["seconds_singly"]), sum(section["seconds_in_study"])]
    return table


def _compile(section: dict) -> pd.DataFrame:
    if "unavailable" in section:
        return pd.DataFrame({"unavailable": [section["unavailable"]]})
    rows = pd.DataFrame(section["rows"])
    rows["compiled / plain"] = rows["compiled"] / rows["plain"]
    table = rows.rename(columns={"plain": "plain, s", "compiled": "compiled, s"}).agg(["mean", "std"])
    return table.assign(**{"to compile, s": [section["seconds_to_compile"], None]})


def _in_gib(table: pd.DataFrame) -> pd.DataFrame:
    table = table.copy()
    table["peak memory, GiB"] = table.pop("peak_memory_bytes") / 2**30
    return table.drop(columns="added_memory_bytes", errors="ignore")
