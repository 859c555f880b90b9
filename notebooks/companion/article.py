"""A short paper on what the records say, written by `companion.judge`; `python -m companion.article` makes a PDF of it.

Its text is `article.md.j2` beside this file, which contains no results: `article` fills in what is in braces there.
"""

import re
from functools import cache, partial
from pathlib import Path

import jinja2
import nbformat
import pandas as pd
import yaml

import recon
from companion.frame import DEFAULTS
from companion.publish import ROOT, drawn, image, notebooks, published

TEMPLATE = Path(__file__).with_name("article.md.j2")


def render(template: Path, **values) -> str:
    """The text of a Jinja template, filled in with `values`. Raises `jinja2.UndefinedError` if one is missing."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)


def article(verdicts: pd.DataFrame, runs: pd.DataFrame, figures: Path, counts: str, short: str, profile: str = "laptop") -> str:
    """The article as Markdown, to be saved in the folder `figures`: its links are relative to it.

    verdicts: from `companion.judge.worded`.
    counts: how many claims are decided, in words. short: what holds, by topic. profile: that of `runs`.
    """
    parts = {"figure": partial(figure, figures), "told": partial(told, figures), "answers": partial(answers, verdicts)}
    parts["remark"] = lambda claim: verdicts.loc[verdicts["claim"] == claim, "remark"].iloc[0]
    how = recon.RunSpec.of(**settings(profile)["1-granularity"]["common"])
    length = how.evaluation.evaluation_length
    measured = " and ".join(f"{count} x {length} tokens of {text}" for text, count in how.evaluation.windows.items())
    about = {"models": models(runs), "profile": profile, "how": how, "measured": measured, "short": short, "counts": counts}
    return render(TEMPLATE, **parts, **about, anchors=settings("laptop")["8-frontier"]["anchors"])


def models(runs: pd.DataFrame) -> str:
    """The models of `runs`, and what their dense weights were made of."""
    found = runs.groupby("model")["dense"].first() if len(runs) else pd.Series(dtype=str)
    return " and ".join(f"{model} ({dense})" for model, dense in found.items()) or "those that there will be records of"


def told(figures: Path, stem: str) -> str:
    """For each section of a notebook with a figure: hypothesis, experiment, figures, what was learnt, what is not shown."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
    text, parts = "\n\n".join(cell.source for cell in notebook.cells), []
    for section in re.split("^## ", text, flags=re.MULTILINE)[1:]:
        before, after = (
            re.findall(rf"^\*\*(?:{words})\b.*$", section, re.MULTILINE)
            for words in ("Hypothesis|Experiment", "Learnt|It does not show")
        )
        shown = [figure(figures, name) for name in published(section)]
        parts += [f"### {section.splitlines()[0]}", *before, *shown, *after] if shown else []
    return "\n\n".join(parts)


def figure(figures: Path, name: str) -> str:
    """A figure as Markdown, with its caption and links to data and records; or, if not drawn yet, the command to draw it."""
    if not (figures / f"{name}.json").exists():
        [stem] = [path.stem for path in notebooks() if name in drawn(path)]
        return f"*{name.replace('-', ' ').capitalize()}: not drawn yet; `./run_all.sh laptop {stem}` draws it.*"
    about, picture = image(figures, name)
    caption = re.sub(r"([*_\[\]<])", r"\\\1", about["caption"])
    told = f"*{name.replace('-', ' ').capitalize()}.* {caption} [Data]({name}.csv), [records]({name}.json)."
    return f"{picture}\n\n{told}"


def answers(verdicts: pd.DataFrame, *claims: str) -> str:
    """For each claim, its verdicts at the main pattern (trends: at every pattern) by model and recipe; links to its section."""
    lines = []
    for claim in claims:
        mine = verdicts[verdicts["claim"] == claim]
        judged = mine[((mine["pattern"] == DEFAULTS["pattern"]) | (mine["test"] == "trend")) & (mine["seeds"] > 0)]
        said = []
        for _, row in judged.iterrows():
            effect = f": {row['effect_words']}" * bool(row["effect_words"])
            place = row["model"] + f" at {row['pattern']}" * (row["test"] == "trend")
            said.append(f"{row['verdict']} on {place} ({row['recipe_words']}{effect})")
        place = re.sub(r"[^\w -]", "", mine["heading"].iloc[0])
        link = f"claims.md#{place.lower().replace(' ', '-')}"
        lines.append(f"- [{mine['statement'].iloc[0]}]({link}): {'; '.join(said) or 'no records yet'}.")
    return "\n".join(lines)


@cache
def settings(profile: str) -> dict:
    """What a profile sets, by notebook."""
    return yaml.safe_load((ROOT / "notebooks" / "profiles" / f"{profile}.yaml").read_text(encoding="utf-8"))


def main() -> None:
    """Writes build/article.pdf from the committed article."""
    import pypandoc  # this and typst are in the extra "article"
    import typst

    source = ROOT / "figures" / "article.typ"  # temporary; beside the figures that it includes
    pypandoc.convert_file(source.with_suffix(".md"), "typst", format="gfm", outputfile=str(source), extra_args=["--standalone"])
    try:
        typst.compile(str(source), output=str(ROOT / "build" / "article.pdf"))
    finally:
        source.unlink()
    print("build/article.pdf")


if __name__ == "__main__":
    main()
