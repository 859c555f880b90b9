"""The loop over blocks: what a visit is given, what is noted of it, and where it goes on."""

import copy

import pytest
import torch
from fixtures.models import FLOAT32
from torch.testing import assert_close

from recon.methods.blocks import over_blocks
from recon.model.discovery import decompose
from recon.runtime.execution import Execution
from recon.runtime.storage import Storage


class Noting(Storage):
    """A store that some blocks are finished in already, and that notes what else is."""

    def __init__(self, done: int = 0, stream: torch.Tensor | None = None):
        super().__init__()
        self.done, self.start, self.told = done, stream, []

    def finished(self, phase):
        return [f"{phase} {index}" for index in range(self.done)]

    def streams(self, phase):
        return {"stream": self.start}

    def finish(self, phase, found, streams=None, weights=None, shard=None):
        self.told.append((phase, found, streams["stream"], weights))


@pytest.fixture(scope="module")
def dense(tiny):
    """A decoder whose model no test changes; three blocks."""
    return decompose(tiny("llama"))


@pytest.fixture
def fresh(dense):
    return lambda: decompose(copy.deepcopy(dense.model), like=dense)


def executing(store) -> Execution:
    return Execution("cpu", "float32", store, progress=False)


@torch.no_grad()
def what_is_read(models, samples, kind):
    """Matrix name -> statistic, from whole forward passes; block i is read in `models[i]`."""
    found = {}
    for index, model in enumerate(models):
        handles, seen = [], {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and f"layers.{index}." in name:

                def see(module, args, name=name, seen=seen):
                    seen[name] = args[0].flatten(0, 1).double()

                handles.append(module.register_forward_pre_hook(see))
        model(input_ids=samples, use_cache=False)
        for handle in handles:
            handle.remove()
        for name, x in seen.items():
            found[name] = x.T @ x / len(x) if kind == "gram" else x.square().mean(0).sqrt()
    return found


@pytest.mark.parametrize("rerun", [True, False])
@pytest.mark.parametrize("kind", ["norm", "gram"])
def test_visits_are_given_the_statistics_of_what_their_block_reads(dense, fresh, tokens, kind, rerun):
    decoder, samples, given = fresh(), tokens(5, 12), {}

    def visit(window, statistics):
        given.update(statistics)
        for matrix in decoder.matrices(window).values():
            matrix.weight.mul_(0.5)
        return window.name, {}

    assert over_blocks(decoder, FLOAT32, "test", visit, "", samples, kind, rerun) == ["block 0", "block 1", "block 2"]
    changed = [dense.model]  # what block i reads: changed before it, and dense from there on
    for index in range(2):
        changed.append(copy.deepcopy(changed[-1]))
        changed[-1].model.layers[index].load_state_dict(decoder.model.model.layers[index].state_dict())
    expected = what_is_read(changed if rerun else [dense.model] * 3, samples, kind)
    other = what_is_read([dense.model] * 3 if rerun else changed, samples, kind)
    assert given.keys() == expected.keys()
    for name, statistic in given.items():
        assert statistic.dtype == torch.float32
        assert_close(statistic.double(), expected[name], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(given["model.layers.2.mlp.down_proj"].double(), other["model.layers.2.mlp.down_proj"], rtol=1e-2)


def test_each_block_is_finished_with_what_the_next_one_reads(dense, fresh, tokens):
    store, weights = Noting(), [{"some": torch.ones(1)}, {}, {}]
    visited = iter(weights)
    over_blocks(fresh(), executing(store), "test", lambda w, s: (w.name, next(visited)), "", tokens(3, 8), "norm", rerun=True)
    assert [(phase, found) for phase, found, _, _ in store.told] == [("test", f"block {index}") for index in range(3)]
    assert [told for _, _, _, told in store.told] == weights
    hidden = dense.embed(tokens(3, 8))
    for window, (_, _, stream, _) in zip(dense.windows("block")[:-1], store.told, strict=False):
        hidden = dense.forward(window, hidden).detach()
        assert_close(stream, hidden)
    assert store.told[-1][2] is None  # nothing comes after the last block


@pytest.mark.parametrize("done", [1, 3])
def test_finished_blocks_are_not_visited_again(dense, fresh, tokens, done):
    whole = {}
    over_blocks(fresh(), FLOAT32, "test", lambda w, s: (whole.update(s), {}), "", tokens(3, 8), "norm")
    after = dense.forward(dense.windows("block")[0], dense.embed(tokens(3, 8))).detach()
    store, given = Noting(done, after), {}
    found = over_blocks(fresh(), executing(store), "test", lambda w, s: (given.update(s) or w.name, {}), "", tokens(3, 8), "norm")
    assert found == [f"test {index}" for index in range(done)] + [f"block {index}" for index in range(done, 3)]
    assert given.keys() == {name for name in whole if int(name.split(".")[2]) >= done}
    for name, statistic in given.items():
        assert_close(statistic, whole[name])
