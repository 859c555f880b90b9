"""Zero-shot accuracy by lm-eval (EleutherAI's Language Model Evaluation Harness, Gao et al.): its tasks, prompts and metrics."""

import contextlib
import hashlib
import io
import logging
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from recon.errors import ReconError, need
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.runtime.execution import Execution

BUNDLED = ("analogies", "last_word")  # described in recon/evaluate/tasks
# Task -> its folder among lm-eval's task files.
HUB = {"boolq": "super_glue", "rte": "glue", "hellaswag": "hellaswag", "winogrande": "winogrande"}
HUB |= {"arc_easy": "arc", "arc_challenge": "arc", "openbookqa": "openbookqa"}


def check_tasks(names: Sequence[str], decoder: Decoder | None = None) -> None:
    """Raises `ReconError` if a task is unknown or repeated, if there is none, if lm-eval is not installed, or if `decoder` is an
    encoder-decoder: tasks ask for the continuation of a text."""
    for name in names:
        if name not in BUNDLED and name not in HUB:
            raise ReconError(f"unknown task {name!r}; bundled: {', '.join(BUNDLED)}; on the Hub: {', '.join(HUB)}")
    if not names or len(set(names)) < len(names):
        raise ReconError(f"tasks must be one or more, each named once, not {list(names)}")
    need("lm_eval", "evaluation", "zero-shot tasks")
    if decoder and decoder.reading:
        raise ReconError(f"zero-shot tasks need a causal language model; {type(decoder.model).__name__} is an encoder-decoder")


def zero_shot(
    model: nn.Module | Decoder, tokenizer, tasks: Sequence[str], limit: int | None = None, *, execution: Execution | None = None
) -> dict:
    """Accuracy of `model` on `tasks` without examples in the prompt.

    tasks: names in `BUNDLED`, which need no Hub, or in `HUB`.
    limit: documents per task, the first ones; None takes all.
    execution: where and in what precision blocks run; default: where the model is. Logits have the precision of its parameters,
        as choices would tie in a lower one.

    Returns {"lm_eval_version": ..., "tasks": {task: {metric: value, metric + "_stderr": its standard error, "n": documents,
    "version": of the task, "hash": SHA-256 of the documents, prompts and targets}}}. Accuracies are between 0 and 1. Raises
    `ReconError` as `check_tasks` and `load`.
    """
    check_tasks(tasks, decoder := decompose(model))
    import lm_eval  # slow to import, and optional
    from lm_eval.evaluator import evaluate

    from recon.evaluate.harness import Scorer

    execution, logger = Execution.of(decoder, execution), logging.getLogger("lm_eval")
    with contextlib.ExitStack() as stack:
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        if not execution.progress:  # its progress bars cannot be switched off otherwise
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        loaded, scorer = load(tasks), Scorer(decoder, tokenizer, execution)
        said = evaluate(lm=scorer, task_dict={"tasks": loaded}, limit=limit, bootstrap_iters=0, log_samples=True)
    summaries = {name: _summary(said["results"][name], said["samples"][name], said["versions"][name]) for name in tasks}
    return {"lm_eval_version": lm_eval.__version__, "tasks": summaries}


def load(names: Iterable[str]) -> dict:
    """lm-eval's task objects by name, with their documents. Raises `ReconError` if documents cannot be loaded."""
    import lm_eval.tasks

    # Only the folders that are needed: reading all of lm-eval's task files takes a quarter of a minute.
    theirs = Path(lm_eval.tasks.__file__).parent
    folders = {theirs / HUB[name] if name in HUB else Path(__file__).parent / "tasks" for name in names}
    manager, loaded = lm_eval.tasks.TaskManager(include_path=sorted(folders), include_defaults=False), {}
    for name in names:
        try:
            loaded |= manager.load([name])["tasks"]
        except Exception as error:  # datasets, huggingface_hub and httpx each raise their own kinds
            raise ReconError(f"the documents of task {name!r} cannot be had ({type(error).__name__}: {error})") from error
        loaded[name].set_config(key="num_fewshot", value=0)
    return loaded


def _summary(metrics: dict, samples: list[dict], version: object) -> dict:
    """Metrics of one task with their standard errors, and a hash of the documents they were measured on."""
    summary = {}
    for key, value in metrics.items():
        metric, comma, _ = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            values = [sample[metric] for sample in samples]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            if metric == "perplexity" and error is not None:
                error *= value  # of exp(-mean), to first order; lm-eval would bootstrap, with one process per core
            summary |= {metric: value, f"{metric}_stderr": error}
    hashes = "".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples)  # as lm-eval
    return summary | {"n": len(samples), "version": version, "hash": hashlib.sha256(hashes.encode()).hexdigest()}
