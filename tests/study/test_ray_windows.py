"""Decoders and tensors arrive as they were sent; windows side by side have the bits of one after the other."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from fixtures.cluster import one_thread
from fixtures.models import ENCODER_DECODERS, make_model, random_tokens
from fixtures.runs import record_of

import recon
from recon.config import PruningConfig, ReconstructionConfig
from recon.errors import ReconError
from recon.model.discovery import decompose
from recon.model.skeleton import is_placeholder
from recon.runtime.execution import Execution
from recon.study import ray_windows
from recon.study.ray_windows import Packed, packed, with_weights, without_weights
from recon.study.workers import Ray


@pytest.mark.parametrize(
    "tensor", [torch.randn(3, 5).T, torch.randn(4, 1).bfloat16(), torch.tensor(7), torch.ones(2, 0), torch.eye(2) > 0]
)
def test_tensors_arrive_as_they_were(tensor):
    found = pickle.loads(pickle.dumps(Packed.of(tensor))).tensor()
    assert torch.equal(found, tensor) and found.dtype == tensor.dtype


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral", "t5", "bart"])
def test_a_decoder_arrives_without_weights_and_runs_on_those_that_it_is_given(family):
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    tied = {"tie_word_embeddings": True} if family == "llama" else {}
    model = make_model(family, **tied)
    decoder, before = decompose(model), {name: p.clone() for name, p in model.named_parameters()}
    sent = cloudpickle.dumps(without_weights(decoder))
    assert not any(p.detach().numpy().tobytes() in sent for p in model.parameters() if p.ndim > 1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    given = {}
    one = with_weights(cloudpickle.loads(sent), given)
    hidden = decoder.embed(random_tokens(2, 10))
    with torch.no_grad():
        for window in decoder.windows("block" if family in ENCODER_DECODERS else "half-block"):
            given.clear()
            given.update(packed(decoder, window))
            with one.loaded(window):
                assert torch.equal(one.forward(window, hidden), decoder.forward(window, hidden))
            assert all(is_placeholder(p) for p in one.model.parameters())
            with pytest.raises(KeyError), one.loaded(decoder.windows("model")[0]):
                pass


WAYS = {  # the family of models, how it is pruned, and how windows are fitted
    "halves": ("llama", {}, {"chunks": 2}),
    "matrices exactly": ("llama", {}, {"granularity": "matrix", "solver": "exact"}),
    "biases that pruning added": ("llama", {"criterion": "flap", "pattern": "0.3"}, {}),
    "blocks from exact": ("llama", {}, {"granularity": "2-blocks", "start": "exact", "train": "all"}),
    "experts": ("mixtral", {}, {}),
    "adapters": ("llama", {}, {"granularity": "block", "adapter": "masklora", "rank": 2}),
}


@pytest.mark.parametrize("way", ["halves", *(pytest.param(way, marks=pytest.mark.slow) for way in [*WAYS][1:])])
def test_windows_side_by_side_have_the_bits_of_one_after_the_other(cluster, tiny, tokens, way):
    family, pruning, fitting = WAYS[way]
    config = ReconstructionConfig(**{"granularity": "half-block", "propagation": "dense"} | fitting)
    dense, samples, held_out = tiny(family, tie_word_embeddings=True), tokens(6, 16), tokens(3, 16, seed=1)
    pruned = copy.deepcopy(dense)
    config_of_pruning = PruningConfig(**{"criterion": "wanda", "pattern": "0.5"} | pruning)
    masks = recon.prune(pruned, samples, config_of_pruning, execution=Execution(progress=False)).masks
    made, reports = {}, {}
    with one_thread():
        for executor in ("serial", Ray()):
            made[executor] = copy.deepcopy(pruned)
            execution = Execution(progress=False, loop=ray_windows.loop(executor))
            reports[executor] = recon.reconstruct(
                made[executor], dense, samples, config, masks=masks, held_out=held_out, execution=execution
            )
    serial, spread = (made[executor].state_dict() for executor in made)
    assert all(torch.equal(serial[name], spread[name]) for name in serial)
    assert any(not torch.equal(serial[name], pruned.state_dict()[name]) for name in serial)
    one, other = ([replace(report, seconds=0) for report in reports[executor]] for executor in made)
    assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["no", "yes"])
def test_the_windows_of_a_run_are_spread(cluster, stream, tiny_folder, tiny_text, tmp_path):
    spec = recon.RunSpec.of(
        model=tiny_folder, text=tiny_text, samples=4, epochs=1, sequence_length=32, held_out_samples=2, evaluation_texts=(tiny_text,),
        evaluation_samples=2, evaluation_length=32, propagation="dense",
    )  # fmt: skip
    with one_thread():
        serial = record_of(spec, save=tmp_path / "serial", stream=stream)
        spread = record_of(spec, save=tmp_path / "spread", stream=stream, executor=Ray())
    assert spread.metrics == serial.metrics and len(spread.windows) == len(serial.windows) > 2
    for path in (tmp_path / "serial").glob("*.safetensors"):
        assert (tmp_path / "spread" / path.name).read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("propagation", ["sparse", "mixed"])
def test_windows_that_depend_on_one_another_are_not_spread(propagation, tmp_path):
    with pytest.raises(ReconError, match=f"side by side under {propagation} propagation.*choose propagation dense"):
        record_of(recon.RunSpec.of(propagation=propagation), save=tmp_path / "saved", executor="ray")
    assert not list(tmp_path.iterdir())
