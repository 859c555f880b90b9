"""Zero-shot accuracy: lm-eval's tasks, prompts and metrics, on log-likelihoods computed here.

lm-eval (Gao et al., the EleutherAI Language Model Evaluation Harness) makes the requests, pairs of a context and a
continuation, cuts them into tokens and turns their log-likelihoods into metrics.
"""

import contextlib
import hashlib
import importlib.util
import io
import logging
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from recon.errors import ReconError
from recon.kernels.likelihood import negative_log_likelihood
from recon.model.decoder import Decoder
from recon.runtime.execution import Execution
from recon.runtime.store import MemoryStore

BUNDLED = {
    "analogies": "word analogies, four choices (Mikolov et al. 2013; bundled in the gensim wheel)",
    "last_word": "the last word of a Wikipedia passage that holds it before, as in LAMBADA (Paperno et al. 2016; bundled)",
}
HUB = {  # task -> the folder of lm-eval's task files that it is in
    "boolq": "super_glue",
    "rte": "glue",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
}
PADDING = 8  # texts are filled up to a multiple of this many tokens, so that there are few lengths
CHUNK = 2**16  # tokens whose activations exist at once
SLICE = 256  # tokens whose logits exist at once


def check_tasks(names: Sequence[str]) -> None:
    """Raises `ReconError` for unknown or repeated tasks, for none at all, and where lm-eval is not installed."""
    for name in names:
        if name not in BUNDLED and name not in HUB:
            raise ReconError(f"unknown task {name!r}; bundled: {', '.join(BUNDLED)}; on the hub: {', '.join(HUB)}")
    if not names or len(set(names)) < len(names):
        raise ReconError(f"tasks must be one or more, each named once, not {list(names)}")
    if importlib.util.find_spec("lm_eval") is None:
        raise ReconError("zero-shot tasks need lm-eval, which is not installed: pip install 'recon[evaluation]'")


def check_model(decoder: Decoder) -> None:
    """Raises `ReconError` for a model that does not simply continue a text: an encoder-decoder."""
    if decoder.reading:
        raise ReconError(f"zero-shot tasks need a causal language model; {type(decoder.model).__name__} is an encoder-decoder")


def zero_shot(
    model: nn.Module | Decoder,
    tokenizer,
    tasks: Sequence[str],
    limit: int | None = None,
    compute_dtype: str = "auto",
    device: torch.device | str | None = None,
    progress: bool = True,
    store: MemoryStore | None = None,
    phase: str = "zero-shot",
) -> dict:
    """Accuracy of `model` on `tasks` without examples in the prompt.

    Args:
        tasks: names in `BUNDLED`, which need no hub, or in `HUB`.
        limit: documents per task, the first ones; None takes all.
        compute_dtype: of the blocks' products; the logits are float32, as rounded ones would tie.
        device: where to compute; default: where the model is.
        work: where there is room for activations, and which texts are finished already under the name `phase`; default: memory, and none.

    Returns:
        {"lm_eval_version": ..., "tasks": {task: {metric: value, metric + "_stderr": its standard error, "n": documents,
        "version": of the task, "hash": SHA-256 of the documents, prompts and targets}}}. Accuracies are shares of one.

    Raises:
        ReconError: as `check_tasks`; a limit below 1; a task whose documents cannot be had.
    """
    check_tasks(tasks)
    if limit is not None and limit < 1:
        raise ReconError(f"limit must be at least 1 document per task, or None for all, not {limit}")
    import lm_eval
    from lm_eval.evaluator import evaluate

    with _quiet():
        loaded = _load(tasks)
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    check_model(decoder)
    execution = Execution(device or decoder.device, compute_dtype, store)
    # lm-eval draws bars of its own on stderr, which cannot be turned off; ours is bound to the real one.
    with tqdm(desc="zero-shot", unit="block", disable=not progress) as bar, _quiet(), contextlib.redirect_stderr(io.StringIO()):
        scorer = _scorer(tokenizer, lambda pairs: log_likelihoods(decoder, pairs, execution, bar, phase))
        found = evaluate(lm=scorer, task_dict={"tasks": loaded}, limit=limit, bootstrap_iters=0, log_samples=True)
    summaries = {name: _summary(found["results"][name], found["samples"][name], found["versions"][name]) for name in tasks}
    return {"lm_eval_version": lm_eval.__version__, "tasks": summaries}


def mean_accuracy(result: dict) -> float:
    """Mean over the tasks of what `zero_shot` returned of their accuracies ("acc"), each task counting once."""
    return statistics.fmean(task["acc"] for task in result["tasks"].values())


@torch.no_grad()
def log_likelihoods(
    decoder: Decoder,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    execution: Execution,
    bar: tqdm | None = None,
    phase: str = "zero-shot",
) -> list[tuple[float, bool]]:
    """Of each pair of a context and a continuation (token ids, neither empty): log p(continuation | context) in nats, and
    whether greedy decoding would give the continuation.

    Contexts that are too long for the model are cut from the left. What is the beginning of something else that the model
    has to read is not read twice: the choices of one token share their context's pass. What the execution's work has finished of `phase`, the
    answers to so many texts, is not computed again.
    """
    longest = decoder.max_length or 2**31
    asked: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)  # what the model reads -> (pair, end of its part)
    for number, (context, continuation) in enumerate(pairs):
        if len(continuation) > longest:
            raise ReconError(f"a continuation of {len(continuation)} tokens is more than the model's {longest}")
        text = tuple([*context, *continuation][-longest - 1 : -1])
        asked[text].append((number, len(text)))
    last = ()
    for text in sorted(asked, reverse=True):  # right after whatever it is the beginning of
        if last[: len(text)] == text:
            asked[last] += asked.pop(text)
        else:
            last = text
    by_length: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for text in asked:
        by_length[min(-(-len(text) // PADDING) * PADDING, longest)].append(text)
    chunks = []
    for length, texts in sorted(by_length.items()):
        size = max(1, CHUNK // length)
        chunks += [(length, texts[start : start + size]) for start in range(0, len(texts), size)]
    windows = decoder.windows("block")
    if bar is not None:
        bar.reset(total=len(chunks) * len(windows))
    exact = Execution(execution.device, "float32")
    finished = execution.store.finished(phase)
    answers = {number: (likelihood, hit) for chunk in finished for number, likelihood, hit in chunk}
    if bar is not None:
        bar.update(len(finished) * len(windows))
    for length, texts in chunks[len(finished) :]:
        # Filled up on the right: under causal attention that changes nothing for what stands before.
        tokens = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])
        stream = execution.embed(decoder, tokens)
        for window in windows:
            with execution.holding(decoder, window):
                stream = execution.run(lambda hidden, window=window: decoder.forward(window, hidden), stream)
            if bar is not None:
                bar.update()
        spans = [(number, row, end, pairs[number][1]) for row, text in enumerate(texts) for number, end in asked[text]]
        states = torch.cat([stream[row, end - len(continuation) : end] for _, row, end, continuation in spans])
        targets = torch.tensor([token for *_, continuation in spans for token in continuation])
        with exact.holding_ends(decoder):
            losses, hits = _score(decoder, states.to(exact.device), targets.to(exact.device))
        sizes = [len(continuation) for *_, continuation in spans]
        found = [
            (number, -loss.sum().item(), bool(hit.all()))
            for (number, *_), loss, hit in zip(spans, losses.split(sizes), hits.split(sizes), strict=True)
        ]
        answers |= {number: (likelihood, hit) for number, likelihood, hit in found}
        execution.store.finish(phase, found)
    return [answers[number] for number in range(len(pairs))]


def _score(decoder: Decoder, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target (tokens,) after its state (tokens, hidden), and whether it is the likeliest."""
    losses, hits = [], []
    for part, following in zip(states.split(SLICE), targets.split(SLICE)):
        logits = decoder.logits(following[:, None], part[:, None])[:, 0]
        losses.append(negative_log_likelihood(logits, following).double().cpu())
        hits.append((logits.argmax(-1) == following).cpu())
    return torch.cat(losses), torch.cat(hits)


def _scorer(tokenizer, score: Callable[[list[tuple[list[int], list[int]]]], list[tuple[float, bool]]]):
    """A language model in lm-eval's sense that tokenises as lm-eval does and asks `score` for log-likelihoods."""
    from lm_eval.api.model import TemplateLM

    class Scorer(TemplateLM):
        @property
        def eot_token_id(self):
            return tokenizer.eos_token_id

        @property
        def prefix_token_id(self):
            return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

        def tok_encode(self, string, add_special_tokens=None, **_):
            special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return tokenizer.encode(string, **special)

        def loglikelihood(self, requests, disable_tqdm=True):
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests, **_):
            return score([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests, **_):
            raise NotImplementedError("none of the tasks asks for it")

        def generate_until(self, requests, **_):
            raise NotImplementedError("none of the tasks asks for it")

    return Scorer()


def _load(names: Sequence[str]) -> dict:
    """lm-eval's task objects by name, with their documents."""
    import lm_eval.tasks

    # Only the folders that are needed: to read all of lm-eval's task files takes a quarter of a minute.
    theirs = Path(lm_eval.tasks.__file__).parent
    folders = {name: theirs / HUB[name] if name in HUB else Path(__file__).parent / "tasks" for name in names}
    manager = lm_eval.tasks.TaskManager(include_path=sorted(set(folders.values())), include_defaults=False)
    loaded = {}
    for name in names:
        try:
            loaded |= manager.load([name])["tasks"]
        except ReconError:
            raise
        except Exception as error:  # datasets, huggingface_hub and httpx each raise their own kinds
            raise ReconError(
                f"the documents of task {name!r} cannot be had from the hub ({type(error).__name__}: {error}); "
                f"{' and '.join(BUNDLED)} need no hub"
            ) from error
        loaded[name].set_config(key="num_fewshot", value=0)
    return loaded


def _summary(metrics: dict, samples: list[dict], version: object) -> dict:
    """What one task says: metrics with their standard errors, and what they were measured on."""
    summary = {}
    for key, value in metrics.items():
        metric, comma, _ = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            values = [sample[metric] for sample in samples]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            if metric == "perplexity" and error is not None:
                error *= value  # of exp(-mean), to first order; lm-eval would resample, in as many processes as there are cores
            summary |= {metric: value, f"{metric}_stderr": error}
    hashes = "".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples)
    digest = hashlib.sha256(hashes.encode()).hexdigest()  # of what lm-eval's own tracker hashes
    return summary | {"n": len(samples), "version": version, "hash": digest}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves only errors of lm-eval's remarks."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
