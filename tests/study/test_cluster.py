"""Runs and windows side by side have the bits of one after the other; workers that are killed cost nothing but time."""

import copy
import logging
import os
import signal
import sys
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from fixtures.models import ENCODER_DECODERS, make_model, random_tokens
from fixtures.runs import record_of

from recon import Execution, PruningConfig, Ray, ReconError, ReconstructionConfig, decompose, grid, prune, reconstruct, run_study
from recon.study import cluster as clusters
from recon.study.cluster import hollow, settings, spread, weights
from recon.study.record import read_record


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each, processes of this machine; this process is connected to them."""
    ray, utils = pytest.importorskip("ray"), pytest.importorskip("ray.cluster_utils")
    head = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # beside other work on the machine, workers would get next to nothing
        made = utils.Cluster(initialize_head=True, head_node_args=head)
        made.add_node(num_cpus=1, object_store_memory=head["object_store_memory"])
        ray.init(address=made.address, logging_level=logging.ERROR)
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def one_thread():
    """One thread, as workers have: more could round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_what_a_worker_asks_for_and_what_cannot_be_met(monkeypatch):
    few, many = [{"CPU": 7.0}], [{"CPU": 96.0, "GPU": 8.0}]
    assert Ray().request(few, False) == (1, 0, 7) and Ray(threads=2, workers=2).request(few, False) == (2, 0, 2)
    assert Ray().request(many, False) == (12, 1, 8) and Ray(gpus=0.5).request(many, False) == (6, 0.5, 16)
    assert Ray().request(many, True) == (1, 0, 96)  # on CPUs alone
    # A worker is on one node, whatever the others have.
    assert Ray(threads=4).request(few + few, False) == (4, 0, 2)
    assert Ray().request([{"CPU": 64.0}, {"CPU": 16.0, "GPU": 2.0}, {}], False) == (8, 1, 2)
    with pytest.raises(ReconError, match=r"no room for a worker \(8 CPUs, 0 GPUs\); it has 7 CPUs, 0 GPUs on a node"):
        Ray(threads=8).request(few + few, False)
    with pytest.raises(ReconError, match=r"no room for a worker \(5 CPUs, 1 GPUs\); it has 4 CPUs, 0 GPUs"):
        Ray(threads=5, gpus=1).request([{"CPU": 4.0}], False)
    with pytest.raises(ReconError, match="threads of executor ray is 0; allowed: from 1 up"):
        Ray(threads=0)
    monkeypatch.delenv(clusters.VARIABLE, raising=False)
    assert settings(None) is None and settings("ray") == Ray() and settings(Ray(threads=2)) == Ray(threads=2)
    monkeypatch.setenv(clusters.VARIABLE, "ray")
    assert settings(None) == Ray() and settings("serial") is None


def test_a_study_without_ray_is_refused_before_anything_runs(tiny_spec, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ReconError, match=r"pip install -e '.\[ray\]'"):
        run_study([tiny_spec], tmp_path, progress=False, executor="ray")
    assert not list(tmp_path.glob("*.json"))


def test_when_no_worker_is_left_the_last_loss_is_told(monkeypatch):
    """Ray's own pool drops a worker that cannot start, and then has nothing to wait for."""
    ray = pytest.importorskip("ray")
    fake, pool = Mock(exceptions=ray.exceptions), Mock()
    fake.nodes.return_value = [{"Alive": True, "Resources": {"CPU": 1.0}}]
    pool.has_next.side_effect, pool.get_next_unordered.side_effect = (True, False), ray.exceptions.RayActorError
    monkeypatch.setattr(clusters, "connect", lambda address: fake)
    monkeypatch.setattr("ray.util.ActorPool", lambda workers: pool)
    answers = spread(Ray(), True, len, ["a", "b"])
    assert isinstance(next(answers), ray.exceptions.RayActorError)
    with pytest.raises(ReconError, match="no worker of the Ray cluster is left; the last one was lost by"):
        next(answers)


@pytest.mark.slow
def test_lost_workers_and_failing_tasks_cost_nothing_but_themselves(cluster, tmp_path):
    def work(task):
        """Writes down in files who does what, and may die or break."""
        times = len(list(tmp_path.glob(f"{task} *")))
        (tmp_path / f"{task} {times}").touch()
        if task == "dies always" or (task == "dies once" and not times):
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "breaks":
            raise RuntimeError("a bug")
        return task, torch.get_num_threads()

    tasks = ["a", "dies once", "breaks", "b", "dies always", "c", "d"]
    answers = list(spread(Ray(), True, work, tasks))
    failed = [str(answer) for answer in answers if isinstance(answer, Exception)]
    assert {each for each in answers if isinstance(each, tuple)} == {(task, 1) for task in ("a", "b", "c", "d", "dies once")}
    assert len(failed) == 2 and any("a bug" in each for each in failed)
    times = {task: len(list(tmp_path.glob(f"{task} *"))) for task in tasks}
    assert times == dict.fromkeys(tasks, 1) | {"dies once": 2, "dies always": clusters.ATTEMPTS}


def test_a_study_has_the_same_records_on_a_cluster(cluster, one_thread, tiny_spec, tmp_path):
    wanted = grid(tiny_spec, granularity=["none", "9-blocks", "half-block"], seed=[0, 1])
    serial = run_study(wanted, tmp_path / "serial", progress=False)
    run_study(wanted[:1], tmp_path / "ray", progress=False)  # one of the runs is there already
    [first] = (tmp_path / "ray").glob("*.json")
    stamp = first.stat().st_mtime_ns
    spread = run_study(wanted, tmp_path / "ray", progress=False, executor="ray")
    assert first.stat().st_mtime_ns == stamp
    columns = ["key", "granularity", "seed", "status", "error", "perplexity", "held_out_error", "sparsity", "flops_reconstruct"]
    assert spread[columns].equals(serial[columns])
    assert list(spread["status"]) == ["done", "done", "failed", "failed", "done", "done"]
    key = spread["key"].iloc[-1]
    one, other = (read_record(tmp_path / folder / f"{key}.json") for folder in ("serial", "ray"))
    assert [w["losses"] for w in one.windows] == [w["losses"] for w in other.windows]
    assert other.environment["threads"] == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral", "t5", "bart"])
def test_a_decoder_arrives_without_weights_and_runs_on_those_that_it_is_given(family, one_thread):
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    model = make_model(family, **({"tie_word_embeddings": True} if family == "llama" else {}))
    decoder = decompose(model)
    sent = cloudpickle.dumps(hollow(decoder, {}))
    assert not any(p.detach().numpy().tobytes() in sent for p in model.parameters() if p.ndim > 1)
    hidden = decoder.embed(random_tokens(2, 10))
    with torch.no_grad():
        for window in decoder.windows("block" if family in ENCODER_DECODERS else "half-block"):
            one = hollow(decoder, weights(decoder, window))
            with one.loaded(window):
                assert torch.equal(one.forward(window, hidden), decoder.forward(window, hidden))


WAYS = {  # how a model is pruned, and how windows are fitted
    "halves": ({}, {"chunks": 2}), "biases that pruning added": ({"criterion": "flap", "pattern": "0.3"}, {}),
    "blocks from exact": ({}, {"granularity": "2-blocks", "start": "exact", "train": "all"}),
    "adapters": ({}, {"granularity": "block", "adapter": "masklora", "rank": 2}),
}  # fmt: skip


@pytest.mark.parametrize("way", ["halves", *(pytest.param(way, marks=pytest.mark.slow) for way in [*WAYS][1:])])
def test_windows_side_by_side_have_the_bits_of_one_after_the_other(cluster, one_thread, tiny, tokens, way):
    pruning, fitting = WAYS[way]
    config = ReconstructionConfig(**{"granularity": "half-block", "propagation": "dense"} | fitting)
    dense, samples, held_out = tiny("llama", tie_word_embeddings=True), tokens(6, 16), tokens(3, 16, seed=1)
    pruned = copy.deepcopy(dense)
    masks = prune(pruned, samples, PruningConfig(**pruning), execution=Execution(progress=False)).masks
    made, reports = {}, {}
    for executor in ("serial", Ray()):
        made[executor] = copy.deepcopy(pruned)
        how = {"held_out": held_out, "execution": Execution(progress=False, loop=clusters.loop(executor, "dense"))}
        reports[executor] = reconstruct(made[executor], dense, samples, config, masks=masks, **how)
    serial, spread = (made[executor].state_dict() for executor in made)
    assert all(torch.equal(serial[name], spread[name]) for name in serial)
    assert any(not torch.equal(serial[name], pruned.state_dict()[name]) for name in serial)
    one, other = ([replace(report, seconds=0) for report in reports[executor]] for executor in made)
    assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["no", "yes"])
def test_the_windows_of_a_run_are_spread(cluster, one_thread, stream, tiny_spec, tmp_path):
    spec = tiny_spec.replaced(propagation="dense")
    serial = record_of(spec, save=tmp_path / "serial", stream=stream)
    spread = record_of(spec, save=tmp_path / "spread", stream=stream, executor=Ray())
    assert spread.metrics == serial.metrics and len(spread.windows) == len(serial.windows) > 2
    files = [*(tmp_path / "serial").glob("*.safetensors")]
    assert files and all((tmp_path / "spread" / path.name).read_bytes() == path.read_bytes() for path in files)
    assert not list(tmp_path.glob("*.unfinished"))
