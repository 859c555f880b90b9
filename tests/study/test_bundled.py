"""What `recon models` says: measured once, kept in the cache, and nothing is fetched unasked."""

import logging

import pytest
from fixtures.models import FLOAT32

import recon
from recon.config import PROTOCOLS
from recon.data import assets, text
from recon.study import bundled


@pytest.fixture
def made(tiny_folder, tiny_text, tmp_path, monkeypatch) -> set[str]:
    """Names of the stand-ins for bundled models that are in the cache: none of `one` and `two`, which are the same tiny model."""
    names = set()
    monkeypatch.setenv("RECON_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "BUNDLED_MODELS", {name: f"stand-in {name}" for name in ("one", "two")})
    monkeypatch.setattr(assets, "DOWNLOADS", {"one": 1_200_000, "two": 7_000_000})
    monkeypatch.setattr(assets, "made", lambda name: name in names)
    monkeypatch.setattr(assets, "origin", lambda name: f"hash of {name}")
    monkeypatch.setattr(assets, "bundled_model", lambda name: names.add(name) or tiny_folder)
    monkeypatch.setattr(bundled, "TEXTS", (tiny_text,))
    monkeypatch.setattr(bundled, "SAMPLES", 3)
    monkeypatch.setattr(bundled, "LENGTH", 32)
    return names


def test_what_was_not_fetched_is_listed_and_not_fetched(made):
    assert bundled.describe("two", FLOAT32) == "stand-in two\n7 MB to fetch on first use"
    assert len(bundled.unknown(FLOAT32)) == 2 * len(PROTOCOLS) and not made


def test_what_is_here_is_described_before_it_is_measured(made):
    made.add("one")
    kind, size, _, *rows = bundled.describe("one", FLOAT32).splitlines()
    parameters = sum(p.numel() for p in recon.load(assets.bundled_model("one"))[0].parameters())
    assert kind == "stand-in one" and size == f"{parameters:,} parameters, float32; 1 MB, fetched"
    assert [row.split() for row in rows] == [[protocol, "-"] for protocol in PROTOCOLS]


def test_perplexities_are_measured_once_and_are_those_of_the_protocols(made, tiny_text, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, "recon"):
        bundled.measure(FLOAT32)
    assert "measuring 4 perplexities: about" in caplog.text and made == {"one", "two"} and not bundled.unknown(FLOAT32)
    model, tokenizer = recon.load(assets.bundled_model("one"))
    for cell in bundled.cells("one", FLOAT32):
        tokens = recon.sample_tokens(tiny_text, "evaluation", tokenizer, 3, 32, protocol=cell.protocol)
        assert cell.value() == recon.perplexity(model, tokens, execution=FLOAT32).value
        assert f"{cell.value():.2f}" in bundled.describe("one", FLOAT32)
    monkeypatch.setattr(bundled, "perplexity", lambda *a, **k: pytest.fail("measured again"))
    bundled.measure(FLOAT32)


@pytest.mark.parametrize("change", ["model", "text", "sizes"])
def test_a_value_is_not_taken_for_that_of_another(made, change, tiny_text, monkeypatch):
    bundled.measure(FLOAT32)
    if change == "model":
        monkeypatch.setattr(assets, "origin", lambda name: f"another hash of {name}")
    elif change == "text":
        monkeypatch.setattr(text, "fingerprint", lambda name: "another")
    else:
        monkeypatch.setattr(bundled, "SAMPLES", 2)
    assert len(bundled.unknown(FLOAT32)) == 2 * len(PROTOCOLS)


def test_measured_values_outlive_an_interruption(made, monkeypatch):
    measured, whole = [], bundled.perplexity

    def interrupted(*given, **options):
        measured.append(options["description"])
        if len(measured) == 2:
            raise KeyboardInterrupt
        return whole(*given, **options)

    monkeypatch.setattr(bundled, "perplexity", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bundled.measure(FLOAT32)
    assert len(bundled.unknown(FLOAT32)) == 2 * len(PROTOCOLS) - 1


@pytest.mark.slow
def test_the_bundled_models_by_protocol():
    """Gemma needs its <bos> in front of every text window; SmolLM2's tokenizer puts nothing there."""
    execution = recon.Execution("cpu")
    bundled.measure(execution)
    found = {
        (cell.model, cell.text, cell.protocol): cell.value()
        for name in assets.BUNDLED_MODELS
        for cell in bundled.cells(name, execution)
    }
    assert None not in found.values()
    assert found["gemma3-270m", "wikipedia", "samples"] < 26
    for each in bundled.TEXTS:
        assert found["gemma3-270m", each, "joined"] > 1.5 * found["gemma3-270m", each, "samples"]
        assert found["smollm2-135m", each, "joined"] == pytest.approx(found["smollm2-135m", each, "samples"], rel=1e-6)
    for name, size in assets.DOWNLOADS.items():
        assert sum(assets.fetch(part).stat().st_size for part in assets.PARTS[name]) == size
