"""How long studies, and the windows of one model, take on so many workers: what is measured on few, carried on to many."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import AutoConfig

from recon.methods.problem import ERROR_SAMPLES
from recon.model.decoder import Decoder
from recon.study import cost
from recon.study.shapes import decoder_of
from recon.study.spec import RunSpec


@dataclass(frozen=True)
class Prediction:
    """Seconds in all; `parts`: the seconds below which each thing alone does not let them fall."""

    seconds: float
    parts: dict[str, float]

    @property
    def bottleneck(self) -> str:
        """The part that takes longest: what more of it, or less of it to do, would help most."""
        return max(self.parts, key=self.parts.get)


def study(seconds: Sequence[float], workers: int, start: float = 0.0) -> Prediction:
    """Runs that take so many `seconds` each, handed out in their order to `workers`, each of which first needs `start` seconds."""
    free = [start] * workers
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    parts = {"runs": sum(seconds) / workers, "longest run": max(seconds, default=0.0), "start of workers": start}
    return Prediction(max(free) if seconds else 0.0, parts)


@dataclass(frozen=True)
class Windows:
    """The windows of one model under dense propagation, alike, and what each takes.

    Args:
        count: how many.
        dense_seconds: of the dense model's pass over one, in the process that hands them out.
        reconstruct_seconds: in the worker that reconstructs it.
        sent, returned: bytes to the worker (weights dense and pruned, masks, activations) and back (reconstructed weights).
    """

    count: int
    dense_seconds: float
    reconstruct_seconds: float
    sent: int
    returned: int


def windows(one: Windows, workers: int, bandwidth: float, start: float = 0.0) -> Prediction:
    """Windows reconstructed side by side, as `recon.reconstruct` has Ray do it.

    One process runs the dense model up to each window in turn and sends the window off, to the worker that is free first; all
    that is sent leaves that process's node one after another, and all that is returned comes in likewise.

    bandwidth: bytes per second of that node, in each direction.
    start: seconds before workers take anything.
    """
    sending, returning = one.sent / bandwidth, one.returned / bandwidth
    free = [start] * workers
    ready = sent = back = 0.0
    for _ in range(one.count):
        ready += one.dense_seconds
        sent = max(sent, ready) + sending
        done = max(sent, free[0]) + one.reconstruct_seconds
        heapq.heapreplace(free, done)
        back = max(back, done) + returning
    used = min(workers, one.count)
    parts = {
        # The last round of windows keeps only some of the workers busy.
        "reconstruction": -(-one.count // used) * one.reconstruct_seconds,
        "dense pass": one.count * one.dense_seconds,
        "network": one.count * max(sending, returning),
        "start of workers": start,
    }
    if workers >= one.count:
        parts["no more windows"] = parts.pop("reconstruction")  # each worker has one: more workers find nothing to do
    return Prediction(back, parts)


def windows_of(spec: RunSpec, decoder: Decoder, rate: float) -> Windows:
    """The windows of a run of `spec`, from the shapes of its model; `rate`: floating-point operations per second.

    Weights and activations are counted in float32, masks in bytes, as they are sent.
    """
    parts = decoder.windows(spec.reconstruction.granularity)
    parameters = sum(sum(p.numel() for p in decoder.parameters(window).values()) for window in parts) / len(parts)
    masks = sum(matrix.weight.numel() for matrix in decoder.matrices().values()) / len(parts)
    samples = spec.calibration.samples + min(spec.calibration.held_out_samples, ERROR_SAMPLES)
    stream = samples * spec.calibration.sequence_length * decoder.model.config.get_text_config().hidden_size
    dense = cost.forward_flops(decoder, spec.calibration.sequence_length) * samples * spec.calibration.sequence_length
    reconstruct = cost.flops(spec, decoder)["reconstruct"]
    return Windows(
        len(parts),
        dense / rate / len(parts),
        reconstruct / rate / len(parts),
        int(4 * (2 * parameters + stream) + masks),
        int(4 * parameters),
    )


def shape(kind: str, blocks: int, **sizes: int) -> Decoder:
    """A model of `kind` ("llama", "qwen2", ...) without weights, of so many blocks and these sizes, named as in its configuration."""
    return decoder_of(AutoConfig.for_model(kind, num_hidden_layers=blocks, **sizes))
