"""Zero-shot tasks: log-likelihoods against the plain model, metrics against lm-eval's own, documents as described, no network."""

import hashlib
import importlib.util
import json
import random
import socket
import statistics
from collections import Counter
from unittest.mock import Mock

import pytest
import torch
from fixtures.models import FLOAT32, dressed

from recon import Execution, ReconError, decompose
from recon.data import models, text
from recon.evaluate import zero_shot
from recon.evaluate.tasks import documents
from recon.model.skeleton import Lazy

pytest.importorskip("lm_eval")
from recon.evaluate import harness  # noqa: E402

DOCUMENTS = {"analogies": "afcd5b8060379cba", "last_word": "920aefde94756fc9"}  # start of the SHA-256 of their JSON
QUIET = Execution("cpu", progress=False)


@pytest.fixture(scope="module")
def small(tiny_folder):
    return models.load(tiny_folder)


def test_what_cannot_be_asked_is_refused(small, monkeypatch):
    unknown = "unknown task 'riddles'; bundled: analogies, last_word; on the Hub: boolq, rte, .*openbookqa"
    once = "one or more, each named once"
    monkeypatch.setattr("datasets.load_dataset", Mock(side_effect=ConnectionError("no route")))
    hub = ["analogies", "boolq"], "'boolq' cannot be had .*no route"
    for tasks, said in ((["riddles"], unknown), ([], once), (["boolq", "boolq"], once), hub):
        with pytest.raises(ReconError, match=said):
            zero_shot.zero_shot(*small, tasks, execution=QUIET)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ReconError, match=r"lm_eval.*pip install -e '.\[evaluation\]'"):
        zero_shot.zero_shot(*small, ["analogies"])


def random_pairs(count: int = 40, longest: int = 40) -> list[tuple[list[int], list[int]]]:
    """Pairs of many lengths; of every context, two continuations of one token and one of several that begins alike."""
    draw, pairs = random.Random(0), []
    for _ in range(count // 4):
        context = draw.choices(range(3, 99), k=draw.randint(1, longest))
        first, other = draw.sample(range(3, 99), 2)
        pairs += [(context, [first]), (context, [other]), (context, [first, *draw.choices(range(3, 99), k=draw.randint(1, 9))])]
        pairs.append((draw.choices(range(3, 99), k=draw.randint(1, longest)), draw.choices(range(3, 99), k=3)))
    draw.shuffle(pairs)
    return pairs


def plain(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One pair at a time, in float32, by the model's own forward."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
    targets = torch.tensor(continuation)
    return logits.log_softmax(-1).gather(1, targets[:, None]).sum().item(), torch.equal(logits.argmax(-1), targets)


def score(model, tokenizer, pairs, dtype="float32"):
    """Of each pair of token ids its log-likelihood, and whether it is the likeliest."""
    scorer = harness.Scorer(decompose(model), tokenizer, Execution("cpu", dtype))
    return scorer._loglikelihood_tokens([(None, *pair) for pair in pairs], disable_tqdm=True)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "mistral", "opt", "gpt2", "gpt_neox", "phi"])
def test_log_likelihoods_are_the_models_own(tiny, family, monkeypatch, small):
    monkeypatch.setattr(harness, "ELEMENTS", {"cpu": 99 * 100})  # 100 tokens a batch
    model, pairs = tiny(family), random_pairs()
    greedy = [(context, [int(model(torch.tensor([context])).logits[0, -1].argmax())]) for context, _ in pairs[:5]]
    found = score(model, small[1], pairs + greedy)
    (values, hits), (expected, expected_hits) = zip(*found), zip(*(plain(model, *pair) for pair in pairs + greedy))
    assert values == pytest.approx(expected, rel=1e-4, abs=1e-4) and hits == expected_hits
    assert all(hits[len(pairs) :]) and not all(hits)


def test_bfloat16_is_near_and_choices_do_not_tie(tiny, small):
    model, pairs = tiny("llama", std=0.1), random_pairs()
    found, single = score(model, small[1], pairs, "bfloat16"), [([5, 6, 7], [token]) for token in range(3, 99)]
    errors = [abs(value - plain(model, *pair)[0]) / len(pair[1]) for (value, _), pair in zip(found, pairs, strict=True)]
    assert 0 < statistics.fmean(errors) < 0.01
    assert len({value for value, _ in score(model, small[1], single, "bfloat16")}) == 96


def test_a_model_on_disk_gives_the_same_bits(small, tiny_folder):
    skeleton, stored, tokenizer = models.skeleton(tiny_folder)
    on_disk = decompose(skeleton, lazy=Lazy(skeleton, stored.read))
    one, other = (zero_shot.zero_shot(model, tokenizer, ["last_word"], 6, execution=QUIET) for model in (small[0], on_disk))
    assert one == other


def test_the_bundled_tasks_agree_with_lm_evals_own_model(small, monkeypatch):
    from lm_eval.api.metrics import mean_stderr
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(socket.socket, "connect", lambda self, address: pytest.fail(f"connected to {address}"))
    (model, tokenizer), names = small, list(zero_shot.BUNDLED)
    found = zero_shot.zero_shot(model, tokenizer, names, limit=12, execution=FLOAT32)["tasks"]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=5)
    expected = evaluate(lm=theirs, task_dict={"tasks": zero_shot.load(names)}, limit=12, bootstrap_iters=0)
    for name in names:
        assert found[name]["n"] == 12 and found[name]["version"] == 1.0
        assert found[name]["acc"] == expected["results"][name]["acc,none"]
        values = [sample["acc"] for sample in expected["samples"][name]]
        assert found[name]["acc_stderr"] == pytest.approx(mean_stderr(values))
    assert 0 < found["analogies"]["acc"] < 1
    assert found["last_word"]["perplexity"] == pytest.approx(expected["results"]["last_word"]["perplexity,none"], rel=1e-3)
    nats = [sample["perplexity"] for sample in expected["samples"]["last_word"]]
    error = found["last_word"]["perplexity"] * statistics.stdev(nats) / 12**0.5  # to first order
    assert found["last_word"]["perplexity_stderr"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("template", ["<bos> $A", "$A", "<bos> <bos> $A", "<bos> $A <eos>"])
def test_contexts_begin_as_the_tokenizer_begins_a_text(small, monkeypatch, template):
    model, tokenizer = small[0], dressed(small[1], template)
    front, seen = tokenizer.convert_tokens_to_ids(template.partition("$A")[0].split()), []

    def see(self, requests, **_):
        seen.extend(requests)
        return [(-1.0, False)] * len(requests)

    monkeypatch.setattr(harness.Scorer, "_loglikelihood_tokens", see)
    zero_shot.zero_shot(model, tokenizer, list(zero_shot.BUNDLED), limit=3, execution=QUIET)
    assert len(seen) == 3 * 4 + 3
    for (text_, word), context, continuation in seen:
        assert context == front + tokenizer(text_, add_special_tokens=False).input_ids
        assert context + continuation == front + tokenizer(text_ + word, add_special_tokens=False).input_ids


def test_it_is_quiet_leaves_everything_as_it_was_and_knows_its_documents(small, capfd, monkeypatch):
    model, tokenizer = small
    before, state = [parameter.clone() for parameter in model.parameters()], torch.get_rng_state()
    one, same, more = (zero_shot.zero_shot(model, tokenizer, ["analogies"], limit, execution=QUIET) for limit in (3, 3, 4))
    assert one == same and one["tasks"]["analogies"]["hash"] != more["tasks"]["analogies"]["hash"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state) and capfd.readouterr() == ("", "")
    zero_shot.zero_shot(model, tokenizer, ["analogies"], limit=3)
    assert "loglikelihood requests: 100%" in capfd.readouterr().err


def test_documents_are_those_that_records_were_measured_on():
    """And draws of a limit are fair: in the first 42 analogies, each of 14 sections occurs three times."""
    made = {name: getattr(documents, name)()["test"].to_list() for name in zero_shot.BUNDLED}
    assert {name: hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] for name, rows in made.items()} == DOCUMENTS
    assert set(Counter(row["section"] for row in made["analogies"][:42]).values()) == {3}
    evaluated = " ".join(" ".join(text.documents("wikipedia", "evaluation")).split())
    assert all(f"{row['text']} {row['word']}" in evaluated for row in made["last_word"])
