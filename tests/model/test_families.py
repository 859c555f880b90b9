"""Every family in transformers: decomposed, pruned and reconstructed, or refused with the reason.

`PYTHONPATH=tests python tests/model/test_families.py --write` writes what works into guides/families.md.
"""

import contextlib
import functools
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from fixtures.families import FAMILIES, UNTRIED, small_model
from fixtures.models import FLOAT32, composed, copied, random_tokens, zeros_stay

from recon import Decoder, PruningConfig, ReconError, ReconstructionConfig, decompose, prune, reconstruct
from recon.model.modules import distance
from recon.model.skeleton import Lazy, skeleton

GUIDE = Path(__file__).parents[2] / "guides" / "families.md"
MARKERS = ("<!-- families -->", "<!-- /families -->")


@functools.cache
def decomposed(family: str) -> Decoder | str:
    """The family's decoder, whose model nothing changes, or the reason why there is none."""
    try:
        return decompose(small_model(family))
    except ReconError as error:
        return str(error)


def fitting(decoder: Decoder) -> list[str]:
    """The granularities that the model can be reconstructed at."""
    found = []
    for granularity in ("matrix", "half-block", "block"):
        with contextlib.suppress(ReconError):
            found += [granularity] * bool(decoder.windows(granularity))
    return found


def described(family: str) -> tuple[str, ...]:
    """What the guide says of a family: yes or no for each granularity, and the layout of its halves; or why it is refused."""
    decoder = decomposed(family)
    if isinstance(decoder, str):
        return (decoder,)
    fit, experts = fitting(decoder), any(matrix.routed for matrix in decoder.matrices().values())
    layouts = sorted({halves.layout for halves in decoder.halves if not isinstance(halves, str)})
    half = " and ".join(layouts) if "half-block" in fit else "no"
    return ("yes" if "matrix" in fit else "no", half, "yes", "yes" if experts else "no")


def table() -> str:
    """The guide's table: families by what works for them."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for family in FAMILIES:
        groups.setdefault(described(family), []).append(family)
    works = sorted((what, names) for what, names in groups.items() if len(what) > 1)
    refused = sorted((name, reason) for (reason, *rest), names in groups.items() if not rest for name in names)
    lines = [
        f"{len({name.partition(' (')[0] for _, names in works for name in names})} families of transformers in "
        f"{sum(len(names) for _, names in works)} variants, each as a tiny random model; k-blocks, quarter and "
        "model work wherever block does.",
        "\n| matrix | half-block: halves are | block | matrices stacked, as experts' are | families |\n|---|---|---|---|---|",
        *(f"| {' | '.join(what)} | {', '.join(names)} |" for what, names in reversed(works)),
        "\nRefused, with what the message says:\n\n| family | reason |\n|---|---|",
        *(f"| {name} | {reason.replace('|', ' ')} |" for name, reason in refused),
        f"\nNot tried, for want of a small model of text alone: {', '.join(UNTRIED)}.",
    ]
    return "\n".join(lines)


def in_guide() -> str:
    return GUIDE.read_text(encoding="utf-8").split(MARKERS[0])[1].split(MARKERS[1])[0].strip()


def working(experts: bool = False) -> list[str]:
    """The families that work, or those with experts, by the guide's table, whose rows of five cells end with their names."""
    rows = [line.strip("| ").split(" | ") for line in in_guide().splitlines() if line.startswith("| ")]
    told = [row for row in rows[1:] if len(row) == 5 and (not experts or row[3] == "yes")]
    return sorted(name for row in told for name in row[-1].split(", "))


def test_the_guide_says_what_works():
    assert in_guide() == table(), "run: PYTHONPATH=tests python tests/model/test_families.py --write"


@pytest.mark.parametrize("family", working())
@torch.no_grad()
def test_windows_give_the_model_back(family):
    """On other tokens, and more of them, than its structure was found with."""
    decoder, tokens = decomposed(family), random_tokens(3, 11, seed=1)
    expected = decoder.run(tokens).logits
    for granularity in {"half-block", "block"}.intersection(fitting(decoder)):
        assert distance(composed(decoder, tokens, granularity), expected) < 1e-4


@pytest.mark.parametrize("family", working(experts=True))
def test_routers_stay_dense_and_experts_are_found_without_weights(family):
    decoder = decomposed(family)
    counts = {matrix.experts for matrix in decoder.matrices().values() if matrix.expert is not None} or {4}
    for name, matrix in decoder.matrices().items():
        assert not (re.search("router|classifier|gate$", name) and len(matrix.weight) in counts), name
    made, stored = skeleton(decoder.model.config), dict(decoder.model.named_parameters(remove_duplicate=False))
    made.tie_weights()
    lazy = Lazy(made, lambda names: ((name, stored[name].detach().clone()) for name in names))
    assert decompose(made, lazy=lazy).matrices().keys() == decoder.matrices().keys()


@pytest.mark.slow
@pytest.mark.parametrize("family", working())
def test_pruned_and_reconstructed(family):
    decoder, tokens = decomposed(family), random_tokens(8, 16, seed=2)
    pruned = copied(decoder)
    masks = prune(pruned, tokens, PruningConfig(criterion="wanda", pattern="0.5"), execution=FLOAT32).masks
    holders = {matrix.parameter_name for matrix in decoder.matrices().values()}
    for name, parameter in pruned.model.named_parameters():
        assert name in holders or torch.equal(parameter, decoder.model.get_parameter(name))
    for name, matrix in pruned.matrices().items():
        dense = decoder.matrices()[name].weight
        assert ((~masks[name]).sum(1) == round(0.5 * dense.shape[1])).all()
        assert torch.equal(matrix.weight, dense * masks[name])
    for granularity in fitting(decoder):
        student, config = copied(pruned), ReconstructionConfig(granularity=granularity, learning_rate=0.001, epochs=1, chunks=1)
        reports = reconstruct(student, decoder, tokens, config, masks=masks, held_out=tokens[:2], execution=FLOAT32)
        for report in reports:
            before, after = report.error_before["held_out"], report.error_after["held_out"]
            assert after < before if report.status == "reconstructed" else report.status == "rolled back: error grew"
        assert any(report.status == "reconstructed" for report in reports)
        assert zeros_stay(student, masks)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    warnings.simplefilter("ignore")
    text = GUIDE.read_text(encoding="utf-8")
    before, rest = text.split(MARKERS[0])
    GUIDE.write_text(f"{before}{MARKERS[0]}\n{table()}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}", encoding="utf-8")
