"""The tokens that a run reads."""

import torch
from tokenizers import processors
from transformers import AutoTokenizer

import recon
from recon.study.texts import Texts


def test_all_that_a_run_reads_begins_as_the_tokenizer_begins_a_text(tiny_folder, tiny_text):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    spec = recon.RunSpec.of(text=tiny_text, samples=4, sequence_length=16, held_out_samples=3, evaluation_texts=(tiny_text,))
    spec = spec.replaced(evaluation_samples=5, evaluation_length=32, retrain="full", retrain_samples=6)
    own, joined = (Texts.draw(spec.replaced(evaluation_protocol=protocol), tokenizer) for protocol in ("samples", "joined"))
    for tokens in (own.calibration, own.held_out, *own.evaluation.values()):
        assert torch.equal(tokens == bos, torch.arange(tokens.shape[1]).expand_as(tokens) == 0)
    assert (joined.evaluation[tiny_text] == bos).sum() == 1
    # The protocol is one of evaluation alone.
    assert torch.equal(own.calibration, joined.calibration) and torch.equal(own.held_out, joined.held_out)
    assert own.hashes() != joined.hashes()
