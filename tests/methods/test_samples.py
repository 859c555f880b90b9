"""Calibration samples: the forms that are taken, and what is refused by name; which of them serve for what."""

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from recon.errors import ReconError
from recon.methods.samples import ERROR_SAMPLES, Split, split_samples
from recon.methods.samples import as_tokens

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


def test_a_tensor_is_not_copied():
    assert as_tokens(ROWS) is ROWS


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([], "no calibration samples"),
        (DataLoader([]), "no calibration samples"),
        (torch.empty(0, 4, dtype=torch.long), r"\(0, 4\)"),
        (torch.empty(4, 0, dtype=torch.long), r"\(4, 0\)"),
        (ROWS[0], r"\(4,\).*\(samples, length\)"),
        (ROWS[None], r"\(1, 5, 4\).*\(samples, length\)"),
        (ROWS.float(), "torch.float32.*tokens"),
        ([[0.5, 1.5]], "torch.float32.*tokens"),
        (ROWS > 3, "torch.bool.*tokens"),
        ([ROWS[0], ROWS[1, :3], ROWS[2, :2]], "3 lengths, from 2 to 4 tokens"),
        ([ROWS[None]], r"sample.* \(1, 5, 4\)"),
        ([{"ids": ROWS[0]}], "has ids; .*'input_ids'"),
        (["some text"], "'some text'.*input_ids"),
        ([None], "None.*input_ids"),
        (7, "are 7;"),
        ("text", "are 'text';"),
        ({"input_ids": ROWS}, "are {'input_ids'.*iterable"),
        ([[[1, 2], [3]]], r"\[1, 2\].*input_ids"),
    ],
)
def test_what_is_no_tokens_is_refused_by_name(samples, words):
    with pytest.raises(ReconError, match=words):
        as_tokens(samples)


# ---- calibration and held-out samples


def test_held_out_samples_come_last_and_no_more_than_are_measured():
    held_out = ROWS + 50
    tokens, split = split_samples(ROWS.tolist(), held_out)
    assert torch.equal(tokens, torch.cat([ROWS, held_out[:ERROR_SAMPLES]])) and split == Split(5, ERROR_SAMPLES, 4)
    assert split.measured == slice(5, 7) and split.measured_on == "held_out"
    tokens, split = split_samples(ROWS[:1], None)
    assert torch.equal(tokens, ROWS[:1]) and split == Split(1, 0, 4)
    assert split.measured == slice(0, 1) and split.measured_on == "calibration"


def test_held_out_samples_of_another_length_are_refused():
    with pytest.raises(ReconError, match="held-out samples of 3 tokens.*4"):
        split_samples(ROWS, ROWS[:, :3])
