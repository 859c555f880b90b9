"""A model without weights, taken apart: shapes are all that plans and predictions need."""

import functools
from typing import NamedTuple

from transformers import PretrainedConfig

from recon.data import models
from recon.errors import ReconError
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.encoder_decoder import EncoderDecoder
from recon.model.skeleton import Lazy, skeleton

NARROWEST = 64  # widths are divided by up to so much to find a model's structure


class Shapes(NamedTuple):
    """A model's configuration, and the model itself on torch's meta device, taken apart."""

    config: PretrainedConfig
    decoder: Decoder


@functools.lru_cache(maxsize=4)
def shapes_of(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Shapes:
    """The model called `model` without weights: of the Hub's files, or those of a folder, the configuration alone is read.

    Raises `ReconError` for what `recon.data.models` refuses, and for a model that cannot be taken apart.
    """
    config = models.configuration(model, revision, trust_remote_code)
    return Shapes(config, decoder_of(config))


def decoder_of(config: PretrainedConfig) -> Decoder:
    """The model of `config` on torch's meta device, taken apart as a much narrower one is.

    Raises `ReconError` for a model that cannot be taken apart.
    """
    model = skeleton(config)
    model.tie_weights()
    structure = _structure(config)
    decoder = decompose(model, like=structure)
    if isinstance(decoder, EncoderDecoder):  # found by running blocks, which with some masks is impossible on the meta device
        decoder.shared = structure.shared
    return decoder


def _structure(config: PretrainedConfig) -> Decoder:
    """A model built as that of `config`, of much smaller widths where that is possible, taken apart."""
    names = set(skeleton(config).state_dict())
    factor = NARROWEST
    while True:
        try:
            model = skeleton(narrowed(config, factor))
            if set(model.state_dict()) == names:
                return decompose(model, lazy=Lazy(model, lambda names: iter(())))
        except Exception:  # whatever a model of strange widths runs into
            if factor == 1:
                raise
        factor //= 2


def narrowed(config: PretrainedConfig, factor: int) -> PretrainedConfig:
    """`config` with the widths of its layers divided by `factor`.

    Raises `ReconError` where they do not divide.
    """
    if factor == 1:
        return config
    config = type(config).from_dict(config.to_dict())
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, int) and _is_width(name):
            if value % factor or value == factor:  # of matrices with one column it cannot be told which way round they lie
                raise ReconError(f"{name} is {value}, which {factor} does not divide into 2 or more")
            setattr(text, name, value // factor)
    return config


def _is_width(name: str) -> bool:
    return name.endswith(("hidden_size", "intermediate_size", "_dim", "_rank", "n_embd", "n_inner", "d_model", "ffn_dim"))
