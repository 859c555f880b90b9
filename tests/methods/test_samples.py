"""Calibration samples: the forms that are taken, and what is refused by name; which of them serve for what."""

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from recon.methods.samples import ERROR_SAMPLES, as_tokens, with_held_out

ROWS = torch.arange(3, 23).view(5, 4)


def as_dataset(form: str | None):
    return datasets.Dataset.from_dict({"input_ids": ROWS.tolist(), "attention_mask": torch.ones(5, 4).tolist()}).with_format(form)


FORMS = {
    "tensor": lambda: ROWS,
    "list of lists": lambda: ROWS.tolist(),
    "list of tensors": lambda: list(ROWS),
    "tuple of batches": lambda: (ROWS[:2], ROWS[2:]),
    "generator": lambda: (row for row in ROWS),
    "mappings": lambda: [{"input_ids": row.tolist(), "labels": None} for row in ROWS],
    "mappings of batches": lambda: [{"input_ids": ROWS[:3]}, {"input_ids": ROWS[3:]}],
    "DataLoader": lambda: DataLoader(ROWS, batch_size=2),
    "DataLoader of mappings": lambda: DataLoader([{"input_ids": row} for row in ROWS], batch_size=2),
    "Dataset": lambda: as_dataset(None),
    "Dataset of tensors": lambda: as_dataset("torch"),
}


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_all_forms_give_the_same_tokens_in_order(make):
    found = as_tokens(make())
    assert torch.equal(found, ROWS) and found.dtype == torch.int64


def test_held_out_samples_come_last_and_no_more_than_are_measured():
    held_out = ROWS + 50
    tokens, count = with_held_out(ROWS.tolist(), held_out)
    assert torch.equal(tokens, torch.cat([ROWS, held_out[:ERROR_SAMPLES]])) and count == 5
    tokens, count = with_held_out(ROWS[:1], None)
    assert torch.equal(tokens, ROWS[:1]) and count == 1
