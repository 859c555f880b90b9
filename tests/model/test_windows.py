import pytest

from recon.errors import ReconError
from recon.model.windows import Window, canonical, partition


@pytest.mark.parametrize(
    "given, name",
    [
        ("1/2", "half-block"),
        ("1", "block"),
        ("1-block", "block"),
        ("1-blocks", "block"),
        ("2", "2-blocks"),
        ("2-blocks", "2-blocks"),
        ("16", "16-blocks"),
        ("none", "none"),
        ("matrix", "matrix"),
        ("half-block", "half-block"),
        ("block", "block"),
        ("quarter", "quarter"),
        ("model", "model"),
    ],
)
def test_canonical_names(given, name):
    assert canonical(given) == name
    assert canonical(name) == name


@pytest.mark.parametrize("given", ["", "0", "0-blocks", "-1", "1/3", "2-block", "02", "Block", "half", "1.5", "block "])
def test_unknown_granularity_is_refused_with_what_is_allowed(given):
    with pytest.raises(ReconError, match=r"granularity is .*matrix, half-block, block, <k>-blocks .*quarter, model") as error:
        canonical(given)
    assert repr(given) in str(error.value)


@pytest.mark.parametrize(
    "granularity, blocks, sizes",
    [
        ("block", 3, [1, 1, 1]),
        ("1", 2, [1, 1]),
        ("2-blocks", 4, [2, 2]),
        ("2", 5, [2, 2, 1]),
        ("3-blocks", 3, [3]),
        ("4", 6, [4, 2]),
        ("model", 7, [7]),
        ("model", 1, [1]),
        ("quarter", 8, [2, 2, 2, 2]),
        ("quarter", 4, [1, 1, 1, 1]),
        ("quarter", 1, [1]),
        ("quarter", 2, [1, 1]),
    ],
)
def test_partition_sizes(granularity, blocks, sizes):
    assert [len(run) for run in partition(granularity, blocks)] == sizes


@pytest.mark.parametrize("granularity", ["block", "2-blocks", "quarter", "model"])
@pytest.mark.parametrize("blocks", [2, 3, 4, 6, 7, 30])
def test_partition_covers_every_block_once_in_order(granularity, blocks):
    assert [index for run in partition(granularity, blocks) for index in run] == list(range(blocks))


@pytest.mark.parametrize("blocks", range(4, 81))
def test_quarters_are_as_even_as_can_be(blocks):
    sizes = [len(run) for run in partition("quarter", blocks)]
    assert len(sizes) == 4
    assert max(sizes) - min(sizes) <= 1


def test_windows_beyond_the_model_are_refused():
    with pytest.raises(ReconError, match="granularity 5-blocks asks for windows of 5 blocks, but the model has 4"):
        partition("5-blocks", 4)


@pytest.mark.parametrize("granularity", ["none", "matrix", "half-block", "1/2"])
def test_partition_refuses_what_is_not_made_of_blocks(granularity):
    with pytest.raises(ReconError, match="not made of whole blocks"):
        partition(granularity, 4)


def test_names_and_chaining():
    attention = Window(range(2, 3), half="attention", ends_block=False)
    parallel = Window(range(2, 3), half="mlp", parallel=True)
    group = Window(range(1), matrices=("b.0.q", "b.0.k"))
    assert (Window(range(2, 3)).name, Window(range(4, 8)).name, attention.name) == (
        "block 2",
        "block 4-7",
        "block 2 attention",
    )
    assert group.name == "b.0.q+b.0.k"
    assert [w.chained for w in (Window(range(1)), attention, parallel, group)] == [True, True, False, False]
