"""What is measured of checkpoints: every row has what its table shows, and the README's table is the record's."""

import json

import torch

from companion import files, judge


def test_all_is_measured_and_the_readme_shows_it(tiny_folder, tiny_text, tmp_path, monkeypatch):
    monkeypatch.setitem(files.RUNS, "units", {"criterion": "wanda-sp", "pattern": "0.5"})
    given = {"text": tiny_text, "evaluation_texts": (tiny_text,), "evaluation_length": 32, "samples": 2, "sequence_length": 16}
    (tmp_path / "four.gguf").write_bytes(b"4" * 1000)
    found = files.measure(tmp_path / "work", tiny_folder, tmp_path / "four.gguf", rounds=1, tokens=2, **given)
    rows, made = found["rows"], {*files.RUNS, *files.MADE} & files.ROWS.keys()
    assert rows.keys() == files.ROWS.keys()
    sizes = {name: sum(file.stat().st_size for file in (tmp_path / "work" / name).glob("*.safetensors")) for name in made}
    assert all(rows[name]["bytes"] == sizes[name] and rows[name]["load_seconds"] > 0 for name in made)
    assert sizes["70 % packed"] < sizes["50 % packed"] < sizes["50 %"] == sizes["dense"] > sizes["units shrunk"]
    assert rows["dense"]["speed"] == 1 and rows["units shrunk"]["logit_difference"] < 1e-4
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "files.json").write_text(json.dumps(found))
    for name in ("README.md", "ARTIFACT.md"):
        marks = "".join(f"before\n<!-- {name} -->\nold\n<!-- /{name} -->\nafter\n" for name in ("answers", "claims", "files"))
        (tmp_path / name).write_text(marks)
    text = judge.pages(tmp_path, tmp_path / "figures" / "claims.md", tmp_path / "README.md")[0][tmp_path / "README.md"]
    assert "before\n<!-- files -->\n| weights | size |" in text and "\n<!-- /files -->\nafter" in text and "old" not in text
    assert f"| dense, 16 bits a weight | {sizes['dense'] / 1e6:.0f} MB (100%) |" in text and "quantise first" in text
    assert "not measured: no GPU here" in text


def test_two_of_four_in_semi_structured_kernels(tiny, monkeypatch):
    made = []
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: made.append(weight) or weight)
    model = tiny("llama", max_position_embeddings=512)
    assert files.semi_structured(model, 1, "cpu") > 0
    assert len(made) == 3 * 7 and all((weight.unflatten(1, (-1, 4)) == 0).sum(-1).ge(2).all() for weight in made)
