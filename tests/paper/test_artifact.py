"""ARTIFACT.md and the metadata for archives: what they say follows from records, figures and CITATION.cff."""

import json
from pathlib import Path

import pytest
import yaml
from fixtures.made_up import seeds

from recon.paper import artifact, claims, crate

ROOT = Path(__file__).resolve().parents[2]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
PAPER = CITATION["preferred-citation"]


def rows(records) -> list[list[str]]:
    page = artifact.to_artifact(claims.judge(records), records)
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ") and "---" not in line][1:]


def test_each_claim_has_a_notebook_what_to_expect_and_its_time():
    records = seeds(0.4) + seeds(0.2, granularity="matrix") + seeds(0.4, model="other-1b", pattern="2:4")
    for record in records:
        record.seconds = {"total": 600.0}
    verdict = next(found for found in claims.judge(records) if found.claim == "3")
    [row] = [row for row in rows(records) if row[0] == verdict.statement]
    assert row[1:3] == ["smollm2-135m, 0.5", "1-granularity"] and row[5] == "✓ holds"
    assert row[3].startswith(f"{verdict.effect:+.3f} nats") and row[4] == f"[{verdict.low:+.3f}, {verdict.high:+.3f}]"
    assert row[6] == artifact.duration(600 * len(verdict.records))
    assert {row[1] for row in rows(records)} == {"smollm2-135m, 0.5", "other-1b, 2:4"}


def test_every_group_of_claims_has_a_notebook():
    assert set(artifact.NOTEBOOKS) == set(claims.GROUPS)
    assert all((ROOT / "notebooks" / f"{name}.ipynb").is_file() for name in artifact.NOTEBOOKS.values())


def test_the_time_of_the_tier_is_that_of_the_records():
    records = seeds(0.4)
    for record in records:
        record.seconds, record.environment["git_commit"] = {"total": 1200.0}, "b" * 40
    page = artifact.to_artifact(claims.judge(records), records)
    assert f"The 3 committed runs took {artifact.duration(3600)} in all" in page and "commit `bbbbbbbbbb`" in page
    assert "There are no records yet" in artifact.to_artifact(claims.judge([]), [])


@pytest.fixture
def graph(tmp_path):
    folder = tmp_path / "figures"
    folder.mkdir()
    (folder / "line.png").write_bytes(b"")
    said = {"name": "line", "finding": "It falls.", "caption": "Mean.", "records": ["a"], "git_commit": "c"}
    (folder / "line.json").write_text(json.dumps(said))
    made = json.loads(
        crate.to_crate(seeds(0.4), tmp_path / "results" / "laptop", folder, ["claims.md", "tables/a.tex"], tmp_path)
    )
    assert made["@context"] == "https://w3id.org/ro/crate/1.1/context"
    return {entity["@id"]: entity for entity in made["@graph"]}


def references(value) -> set[str]:
    """Every entity that a value points at."""
    if isinstance(value, dict):
        return {value["@id"]} if set(value) == {"@id"} else set().union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_the_crate_names_what_is_there(graph):
    about = graph["ro-crate-metadata.json"]
    assert about["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.1"} and about["about"] == {"@id": "./"}
    root = graph["./"]
    assert root["@type"] == "Dataset" and root["name"] == CITATION["title"]
    assert root["datePublished"] == str(CITATION["date-released"]) and root["license"]["@id"].endswith(CITATION["license"])
    files = {f"figures/{name}" for name in ("claims.md", "tables/a.tex", "line.png", "line.csv", "line.json")}
    assert references(root["hasPart"]) == {"results/laptop/"} | files
    assert graph["figures/line.png"]["name"] == "It falls." and graph["figures/line.png"]["encodingFormat"] == "image/png"
    assert references(graph["figures/line.png"]["isBasedOn"]) == {"figures/line.csv", "figures/line.json"}
    assert "3 runs" in graph["results/laptop/"]["description"]
    paper = graph[root["citation"]["@id"]]
    assert [graph[person["@id"]]["name"] for person in paper["author"]] == [
        f"{author['given-names']} {author['family-names']}" for author in PAPER["authors"]
    ]
    pointed = set().union(*(references({"value": list(entity.values())}) for entity in graph.values()))
    assert pointed - set(graph) == {"https://w3id.org/ro/crate/1.1"}


def test_the_committed_crate_names_files_that_are_there():
    made = json.loads((ROOT / "ro-crate-metadata.json").read_text(encoding="utf-8"))
    files = [entity["@id"] for entity in made["@graph"] if entity["@type"] in ("File", "Dataset")]
    assert len(files) > 10 and [name for name in files if not (ROOT / name).exists()] == []


def test_zenodo_says_what_the_citation_says():
    zenodo = json.loads((ROOT / ".zenodo.json").read_text(encoding="utf-8"))
    assert zenodo["title"] == CITATION["title"] and zenodo["description"] == CITATION["abstract"]
    assert zenodo["version"] == str(CITATION["version"]) and zenodo["license"].lower() == CITATION["license"].lower()
    assert zenodo["publication_date"] == str(CITATION["date-released"])
    assert [creator["name"] for creator in zenodo["creators"]] == [author["name"] for author in CITATION["authors"]]
    [related] = zenodo["related_identifiers"]
    assert related == {
        "identifier": PAPER["doi"],
        "relation": "isSupplementTo",
        "scheme": "doi",
        "resource_type": "publication-article",
    }
    assert zenodo["upload_type"] == CITATION["type"]
