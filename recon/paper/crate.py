"""ro-crate-metadata.json: what is in this repository, for archives to read (RO-Crate 1.1, https://w3id.org/ro/crate/1.1)."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from recon.paper.gallery import heading, saved
from recon.paper.profiles import ROOT
from recon.study.record import RunRecord

FORMATS = {
    "png": "image/png", "csv": "text/csv", "json": "application/json", "md": "text/markdown", "tex": "application/x-tex",
}  # fmt: skip
PAGES = {"claims.md": "Verdicts on the paper's claims"}


def to_crate(
    records: Sequence[RunRecord], record_folder: Path | str, figure_folder: Path | str, pages: Sequence[str], root: Path | str
) -> str:
    """The metadata as JSON: the dataset with licence and citation, its records, `pages` in `figure_folder` that are made from them, and
    every figure there with its data and provenance. Files are named relative to `root`; CITATION.cff says who and what to cite."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper, licence = citation["preferred-citation"], f"https://spdx.org/licenses/{citation['license']}"
    people = [{"@id": f"#{'-'.join(names).lower()}", "@type": "Person", "name": " ".join(names)} for names in _names(paper)]
    authors = [
        {"@id": f"#{name['name'].replace(' ', '-')}", "@type": "Organization", "name": name["name"]}
        for name in citation["authors"]
    ]
    article = {
        "@id": f"https://doi.org/{paper['doi']}", "@type": "ScholarlyArticle", "name": paper["title"], "url": paper["url"],
        "datePublished": str(paper["year"]), "author": _references(people),
    }  # fmt: skip
    folder = _place(record_folder, root) + "/"
    runs = {
        "@id": folder, "@type": "Dataset", "name": "Run records",
        "description": f"A JSON file for each of {len(records)} runs: options, hashes of what was read, evaluation protocol, times and results.",
        "version": ", ".join(sorted({str(record.environment.get("git_commit")) for record in records})),
    }  # fmt: skip
    files = [entity for figure in saved(figure_folder) for entity in _figure(figure, _place(figure_folder, root), folder)]
    made = [
        {
            "@id": f"{_place(figure_folder, root)}/{name}", "@type": "File", "name": PAGES.get(name, f"Table: {Path(name).stem}"),
            "encodingFormat": FORMATS[name.rpartition(".")[2]], "isBasedOn": {"@id": folder},
        }
        for name in pages
    ]  # fmt: skip
    parts = [runs, *made, *files]
    dataset = {
        "@id": "./", "@type": "Dataset", "name": citation["title"], "description": citation["abstract"], "version": str(citation["version"]),
        "datePublished": str(citation["date-released"]), "license": {"@id": licence}, "author": _references(authors),
        "citation": {"@id": article["@id"]}, "hasPart": _references(parts),
    }  # fmt: skip
    about = {
        "@id": "ro-crate-metadata.json", "@type": "CreativeWork", "conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"}, "about": {"@id": "./"},
    }  # fmt: skip
    named = {"@id": licence, "@type": "CreativeWork", "name": citation["license"]}
    graph = [about, dataset, named, article, *authors, *people, *parts]
    context = "https://w3id.org/ro/crate/1.1/context"
    return json.dumps({"@context": context, "@graph": graph}, indent=1, ensure_ascii=False) + "\n"


def _names(paper: dict) -> list[tuple[str, str]]:
    return [(author["given-names"], author["family-names"]) for author in paper["authors"]]


def _references(entities: Sequence[dict]) -> list[dict]:
    return [{"@id": entity["@id"]} for entity in entities]


def _place(path: Path | str, root: Path | str) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def _figure(figure: dict, folder: str, records: str) -> list[dict]:
    """A figure's files: the picture is based on its data, and that on run records, which the provenance names."""
    name = f"{folder}/{figure['name']}"
    data = {"@id": f"{name}.csv", "name": f"Data of {figure['name']}", "isBasedOn": {"@id": records}}
    origin = {"@id": f"{name}.json", "name": f"Provenance of {figure['name']}", "about": {"@id": f"{name}.png"}}
    picture = {
        "@id": f"{name}.png", "name": heading(figure), "description": figure["caption"],
        "isBasedOn": [{"@id": data["@id"]}, {"@id": origin["@id"]}],
    }  # fmt: skip
    return [
        {"@type": "File", "encodingFormat": FORMATS[entity["@id"].rpartition(".")[2]], **entity}
        for entity in (picture, data, origin)
    ]
