"""Made-up records whose truth is known, and the verdict on a claim from them."""

import random
from dataclasses import asdict

from recon.claims import judge
from recon.spec import RunRecord, RunSpec

WINDOWS, DAMAGE = 30, 0.8


def record(recovered=0.4, seed=0, noise=0.002, damage=DAMAGE, hash="w", text_seed=0, held_out=None, flops=None, **spec):
    """A record of a run that recovers this share of `damage`, in nats, up to `noise` per seed and per window."""
    spec = asdict(RunSpec()) | spec | {"seed": seed}
    # Noise differs between runs, is the same in every process, and stays what it is when an option is added.
    plain = asdict(RunSpec())
    draw = random.Random(repr((sorted(item for item in spec.items() if item[1] != plain[item[0]]), recovered)))
    dense = [3 + 0.3 * random.Random(f"{text_seed} {window}").gauss(0, 1) for window in range(WINDOWS)]
    shift = draw.gauss(0, noise)
    repaired = [nll + damage * (1 - recovered) + shift + draw.gauss(0, noise) for nll in dense]
    nll = {"dense": dense, "pruned": [value + damage for value in dense], "repaired": repaired}
    metrics = {"by_text": {spec["evaluation_texts"][0]: {"nll_per_window": nll}}}
    if held_out is not None:
        metrics["held_out_perplexity"] = held_out
    key = f"{draw.getrandbits(64):016x}"
    protocol = {"token_hashes": {f"evaluation {spec['evaluation_texts'][0]}": hash}}
    found = RunRecord(spec, key, "done", None, metrics, {"reconstruct": 1.0}, protocol=protocol)
    found.environment = {"compute_dtype": "bfloat16", "device": "cpu", "threads": 2}
    found.flops = flops or {}
    return found


def seeds(recovered=0.4, count=3, **options):
    return [record(recovered, seed=seed, **options) for seed in range(count)]


def verdict_on(claim, records, **options):
    [found] = [verdict for verdict in judge(records, **options) if verdict.claim == claim]
    return found
