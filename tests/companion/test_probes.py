"""Networks that are no transformers, and probes: what they compute is the same, kept, and not computed twice."""

import pandas as pd
import pytest
import torch
from fixtures.models import FLOAT32, zeros_stay

import recon
from companion import inside, networks, probes

IMAGES = networks.data("CNN")["training"][0][:8]


def reader(kind: str) -> networks.Reader:
    torch.manual_seed(0)
    return networks.KINDS[kind]().eval()


@pytest.mark.parametrize("kind", ["MLP", "CNN", "ViT"])
def test_networks_that_read_images_are_pruned_and_reconstructed_as_models_of_text_are(kind):
    dense, model = reader(kind), reader(kind)
    decoder = recon.decompose(dense)
    hidden = decoder.forward(decoder.windows("model")[0], decoder.embed(IMAGES))
    assert torch.equal(decoder.logits(IMAGES, hidden), dense(IMAGES).logits)
    assert [window.half for window in decoder.windows("half-block")] == ["attention", "mlp"] * 4
    masks = recon.prune(model, IMAGES, recon.PruningConfig(pattern="0.5"), execution=FLOAT32).masks
    config = recon.ReconstructionConfig(granularity="matrix", first_position="full", epochs=8)
    reports = recon.reconstruct(model, dense, IMAGES, config, masks=masks, execution=FLOAT32)
    assert len(reports) == len(decoder.matrices()) and {each.status for each in reports} == {"reconstructed"}
    assert all(each.error_after["calibration"] < each.error_before["calibration"] for each in reports)
    assert zeros_stay(recon.decompose(model), masks)
    with pytest.raises(recon.ReconError, match="not a causal language model"):
        recon.perplexity(model, IMAGES)


def test_scaled_channels_leave_the_function_as_it_is():
    plain, scaled = reader("CNN"), networks.scaled(reader("CNN"), 100.0)
    torch.testing.assert_close(scaled(IMAGES).logits, plain(IMAGES).logits, rtol=1e-4, atol=1e-4)
    ratio = recon.decompose(scaled).embed(IMAGES) / recon.decompose(plain).embed(IMAGES)
    torch.testing.assert_close(ratio[0, 0], torch.tensor([100.0] * 2 + [1.0] * 30))


def test_probes_are_kept_and_rates_are_those_that_are_best_at_other_seeds(tmp_path):
    asked = []

    def measure(seed, reconstruction, pruning, split="evaluation"):
        asked.append((seed, split, reconstruction["learning_rate"]))
        return {"own_dense": [0.0, 0.0], "own_reconstructed": [abs(reconstruction["learning_rate"] - 0.1), 0.0]}

    cells = probes.grid(seed=[0, 1], reconstruction=[{"learning_rate": 1.0}], pruning=[{"pattern": "0.5"}])
    path = tmp_path / "probes" / "made-up.json"
    assert probes.measured(path, measure, cells, compute=False).empty
    tuned = probes.searched(path, measure, cells, [100.0, 10.0, 1.0, 0.1, 0.01])
    assert [cell["reconstruction"]["learning_rate"] for cell in tuned] == [0.1, 0.1]
    assert [rate for seed, _, rate in asked if seed == 100] == [0.1, 1.0, 10.0, 0.01] and len(asked) == 8
    assert {(seed >= 100, split) for seed, split, _ in asked} == {(True, "held_out")}
    runs = probes.measured(path, measure, tuned)
    assert list(runs["seed"]) == [0, 1] and set(runs["perplexity"]) == {1.0} and len(asked) == 10
    assert probes.measured(path, measure, tuned, compute=False).equals(runs) and len(asked) == 10

    def beside(**cell):
        """Another process measures the other cell meanwhile."""
        if cell["seed"] == 2:
            probes.measured(path, beside, [cell | {"seed": 3}])
        return measure(**cell)

    probes.measured(path, beside, [tuned[0] | {"seed": 2}])
    kept = probes.measured(path, measure, [tuned[0] | {"seed": seed} for seed in (0, 2, 3)], compute=False)
    assert list(kept["seed"]) == [0, 2, 3] and len(asked) == 12


def test_noise_begins_as_it_is_put_in_and_gradients_agree_where_inputs_do(tiny_folder):
    row = inside.probed(0, 0.1, model=tiny_folder, samples=2, length=16, seed=0)
    for errors in row["error"].values():
        torch.testing.assert_close(torch.tensor(errors[0]).mean(), torch.tensor(0.1), rtol=0.1, atol=0)
    for name in inside.LOSSES:  # the first block reads the same under every propagation
        own = [row["cosine"].get(f"{feed}, {name}", 1.0) for feed in ("mixed", "dense", "sparse")]
        assert max(own) - min(own) < 1e-5 and max(own) < 1 + 1e-9


def test_effective_rank_is_that_of_singular_values():
    decoder = recon.decompose(dense := reader("ViT"))
    with torch.no_grad():
        read = dense.blocks[0].norms[0](decoder.embed(IMAGES))[:, 1:].flatten(0, 1)
    shares = torch.linalg.svdvals(read).square()
    shares /= shares.sum()
    found = inside.effective_ranks(decoder, IMAGES)
    assert found["width"][:2] == (32, 32) and found["matrix"][0] == "blocks.0.mix.qkv"
    assert found["rank"][0] == pytest.approx(torch.exp(-(shares * shares.log()).sum()).item(), rel=1e-3)


def test_dynamic_sparsity_keeps_the_inputs_of_each_token_that_weigh_most():
    thin, x = networks.thinned(reader("ViT"), 0.25), torch.randn(2, 3, 32)
    matrix = thin.blocks[1].mlp.up
    most = (x.abs() * matrix.weight.norm(dim=0)).argsort(-1, descending=True)[..., :24]
    kept = torch.zeros_like(x).scatter(-1, most, x.gather(-1, most))
    torch.testing.assert_close(matrix(x), torch.nn.functional.linear(kept, matrix.weight, matrix.bias))


def test_what_is_in_no_part_stays_dense(monkeypatch):
    monkeypatch.setattr(networks, "trained", lambda *_: reader("ViT"))
    cell = {"kind": "ViT", "seed": 0, "steps": 0, "pruning": {"pattern": "0.8"}, "reconstruction": {"granularity": "block"}}
    none, last = (networks.fitted(**cell, samples=8, part=part) for part in ("head", "blocks.3"))
    assert none["own_dense"] == none["own_pruned"] == none["own_reconstructed"] == last["own_dense"]
    assert len({*last["calibration"].values()}) == 3


def test_a_decoder_is_asked_for_the_second_half():
    model, tokens = reader("T5"), torch.randint(512, (3, 12))
    found = networks.told(model, tokens, torch.zeros(3))
    measured = recon.perplexity(model, tokens, execution=FLOAT32)
    assert measured.tokens == 3 * 5 and found.tolist() == pytest.approx(measured.per_window, rel=1e-5)


def test_texts_to_move_between_are_mixed_and_written_by_the_model(tiny_folder):
    which = {"model": tiny_folder, "samples": 6, "windows": 8, "length": 16, "seed": 0}
    _, read, evaluation, own = inside.domains(**which)
    assert set(read) == set(inside.DOMAINS) and set(own) == {*inside.TEXTS, "its own"}
    assert all(torch.equal(read["mix"][i], read[text][i]) for i, text in enumerate(inside.TEXTS * 2))
    assert torch.equal(read["its own"][:, 0], read["wikipedia"][:, 0]) and read["its own"].shape == (6, 16)
    row = inside.moved("news", "mix", 1, **which)
    assert row["dense"] == own and row["pruned"] != row["reconstructed"] and len(row["pruned"]["code"]) == 8
    assert not torch.equal(evaluation["its own"][:6], read["its own"])


def test_costs_of_moving_are_against_the_text_that_is_evaluated():
    texts = ("news", "code", "mix")
    rows = [(prune, fit, text, seed) for prune in texts for fit in texts for text in texts[:2] for seed in (0, 1)]
    runs = pd.DataFrame(rows, columns=["prune", "fit", "evaluated", "seed"])
    away = {name: (runs[name] != runs["evaluated"]) * runs[name].map({"mix": 0.5}).fillna(1.0) for name in ("prune", "fit")}
    costs = inside.costs_of_moving(runs.assign(lost=2.0 * away["prune"] + away["fit"] + runs["seed"]))
    found = {kind: [own.tolist() for own in each.values()] for kind, each in costs.items()}
    assert found == {"a foreign text": [[2, 2], [1, 1], [3, 3]], "a mix": [[1, 1], [0.5, 0.5], [1.5, 1.5]]}
