"""What `recon bench` measured, as tables: for the command line and for the notebooks."""

import pandas as pd


def tables(results: dict) -> dict[str, pd.DataFrame]:
    """One table per section measured, by title."""
    found = {name: section["results"] for name, section in results["sections"].items()}
    return {title: table(found[name]) for name, (title, table) in TABLES.items() if name in found}


def summary(results: dict) -> str:
    """All tables as text."""
    return "\n\n".join(f"{title}\n{table.round(3).to_string()}" for title, table in tables(results).items())


def products(section: dict) -> pd.DataFrame:
    """Speed at large squares and at the very products of ours, and the share of its time that these alone would take."""
    speeds = {f"large squares, {dtype}": rate / 1e12 for dtype, rate in section["square_flops_per_second"].items()}
    for kind, seconds in section["seconds_at_ceiling"].items():
        if seconds:
            speeds[f"{kind} of ours"] = section["flops"][kind] / seconds / 1e12
    shares, last = (
        pd.Series(section["achieved_share_of_ceiling"]),
        "share of its time that its products alone would take",
    )
    table = pd.DataFrame({"TFLOP/s": speeds | {last: None}, "share": dict.fromkeys(speeds, "")})
    table.loc[last, "share"] = f"{shares.mean():.2f} ± {shares.std():.2f}"
    return table


def phases(section: dict) -> pd.DataFrame:
    """By phase: mean seconds of both ways, their ratio within a round, the floor, multiples of it, and of a teacher's pass; memory.

    The floor: what the phase's products take at the speed of large squares.
    """
    rows = pd.DataFrame(section["rows"])
    seconds = rows.pivot(index=["phase", "round"], columns="loop", values="seconds")
    teacher = seconds["ours"].xs("teacher's pass")
    seconds["reference / ours"] = seconds["reference"] / seconds["ours"]
    seconds["in teacher's passes"] = seconds["ours"].div(teacher, level="round")
    floor = pd.Series(section["floor_seconds"])
    table = seconds.groupby("phase").mean().reindex(floor.index)
    table["reference / ours, ±"] = seconds["reference / ours"].groupby("phase").std()
    table["floor"] = floor
    for whose in ("reference", "ours"):
        table[f"{whose} / floor"] = table[whose] / floor
    table["memory added, GiB"] = rows[rows["loop"] == "ours"].groupby("phase")["added_memory_bytes"].max() / 2**30
    return table.rename(columns={name: f"{name}, s" for name in ("reference", "ours", "floor")})


def profile(section: dict) -> pd.DataFrame:
    """Seconds by kind of operation and loop."""
    return pd.DataFrame({name: part["kinds"] for name, part in section.items()})


def growth(section: list[dict]) -> pd.DataFrame:
    """Seconds by axis, value and loop."""
    return pd.DataFrame(section).pivot_table(index=["axis", "value"], columns="loop", values="seconds", sort=False)


def quality(section: list[dict]) -> pd.DataFrame:
    """A row per run, with its time as a share of the reference's, whether it is at least as good, and the fastest of ours that is."""
    rows = pd.DataFrame(section).set_index("loop")
    reference = rows.loc["reference"]
    rows["share of the reference's time"] = rows["seconds"] / reference["seconds"]
    rows["as good as the reference"] = rows["perplexity"] <= reference["perplexity"]
    good = rows.index.str.startswith("ours") & rows["as good as the reference"]
    rows["first as good"] = good & (rows["seconds"] == rows["seconds"][good].min())
    rows = rows.rename(columns={"share_recovered": "share recovered"}).astype({"samples": "Int64"})
    return rows.drop(columns=["peak_memory_bytes", "added_memory_bytes"], errors="ignore")  # one process after much else


def sweep(section: dict) -> pd.DataFrame:
    """Seconds of each run, done singly and in a study."""
    table = pd.DataFrame(section["runs"])[["criterion", "granularity", "solver"]]
    table["singly, s"], table["in a study, s"] = section["seconds_singly"], section["seconds_in_study"]
    table.loc["all"] = ["", "", "", *table[["singly, s", "in a study, s"]].sum()]
    return table


def workers(section: dict) -> pd.DataFrame:
    """Seconds and speed-up of the study and the windows by workers (0: one after the other, in this process).

    Overhead is what passes from one run's end to the next one's beyond that run's own seconds, where one process does them all. The
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


def compile(section: dict) -> pd.DataFrame:
    """Seconds of a pass, plain and compiled; or why nothing could be compiled."""
    if "unavailable" in section:
        return pd.DataFrame({"unavailable": [section["unavailable"]]})
    rows = pd.DataFrame(section["rows"])
    rows["compiled / plain"] = rows["compiled"] / rows["plain"]
    table = rows.rename(columns={"plain": "plain, s", "compiled": "compiled, s"}).agg(["mean", "std"])
    return table.assign(**{"to compile, s": [section["seconds_to_compile"], None]})


def _in_gib(table: pd.DataFrame) -> pd.DataFrame:
    table["peak memory, GiB"] = table.pop("peak_memory_bytes") / 2**30
    return table.drop(columns="added_memory_bytes", errors="ignore")


TABLES = {  # section -> title, table
    "products": ("Speed of matrix products", products),
    "phases": ("Phases against their floor", phases),
    "profile": ("Time by kind of operation, s", profile),
    "growth": ("Growth, s", growth),
    "quality": ("Perplexity against time", quality),
    "sweep": ("Sweep", sweep),
    "workers": ("Workers", workers),
    "compile": ("torch.compile", compile),
    "large": ("8B-shaped", lambda section: _in_gib(pd.DataFrame([section]))),
}
