import pytest
from fixtures.models import FAMILIES, make_model

from recon.model.discovery import decompose
from recon.study.shapes import shapes_of


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "gpt2", "phi", "bloom"])
def test_a_model_is_taken_apart_by_its_configuration_as_with_its_weights(family, config_folder):
    model = make_model(family)
    real, shapes = decompose(model), shapes_of(config_folder(model.config.to_dict())).decoder
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in shapes.model.named_parameters()}
    assert all(p.device.type == "meta" for p in shapes.model.parameters())
    assert shapes.groups == real.groups
    for granularity in ("half-block" if family in FAMILIES else "matrix", "block"):
        assert shapes.windows(granularity) == real.windows(granularity)
        for window in real.windows(granularity):
            assert shapes.parameters(window).keys() == real.parameters(window).keys()
            assert shapes.matrices(window).keys() == real.matrices(window).keys()
