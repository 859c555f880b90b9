"""The model card of a saved model."""

from pathlib import Path

from recon.study.record import RunRecord
from recon.study.spec import RunOptions

CARD = """---
base_model: {model}
library_name: transformers
tags: [pruned, sparse, reconstruction]
---

# {name}: pruned {pattern} with {criterion}, reconstructed at {granularity} granularity

An ordinary checkpoint with exact zeros: it loads with the `from_pretrained` of transformers and needs no special kernel.
Method: local reconstruction after pruning, arXiv 2510.14444.

| | |
|---|---|
| base model | {model} {revision} |
| weights of the base model ("dense") | {dense} |
| criterion, pattern | {criterion}, {pattern} |
| sparsity of the pruned matrices, as counted | {sparsity:.4f} |
| reconstruction | granularity {granularity}, propagation {propagation}, solver {solver}, start {start}, loss {loss} |
| calibration | {calibration} |
| weights | {rounding} |
| licence | that of the base model |

| perplexity (lower is better) | dense | pruned | this model |
|---|---|---|---|
{rows}

Protocol: {evaluation}

Made by:

```
{command}
```
"""


def write_card(folder: Path, record: RunRecord, options: RunOptions) -> None:
    """Writes the model card to `folder`, from the record."""
    spec, metrics, dtype = record.spec, record.metrics, options.save_dtype
    rows = [
        f"| {text} | {values['dense_perplexity']:.2f} | {values['pruned_perplexity']:.2f} | {values['perplexity']:.2f} |"
        for text, values in metrics["by_text"].items()
    ]
    external = {"criterion": f"the mask of {spec['pruned']}", "pattern": metrics.get("pattern")} if spec["pruned"] else {}
    rounding = "float32" if dtype == "float32" else f"rounded to {dtype}; everything here was measured before, in float32"
    said = spec | external | {"name": Path(spec["model"]).name, "revision": spec["revision"] or ""}
    said |= {"sparsity": metrics["sparsity"], "rows": "\n".join(rows), "rounding": rounding}
    said |= {name: record.protocol[name] for name in ("dense", "calibration", "evaluation")}
    card = CARD.format(**said, command=options.command or "recon.run(...) from Python")
    (folder / "README.md").write_text(card, encoding="utf-8")
