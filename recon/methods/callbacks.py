"""What users and the package itself attach to a pass: records, measurements along the way."""


class Callback:
    """Does nothing; override what you need.

    class Log(recon.Callback):
        def on_window(self, report):
            print(report.name, report.error_before, report.error_after)
    """

    def on_pruned(self, pruning) -> None:
        """After `recon.reconstruct` has pruned and fitted all windows in one pass; pruning: `recon.methods.prune.Pruning`."""

    def on_window(self, report) -> None:
        """After each window of `recon.reconstruct`; report: `recon.methods.reconstruct.WindowReport`."""

    def on_step(self, loss) -> None:
        """After each optimiser step of `recon.retrain`; loss: a tensor ()."""

    def on_merged(self) -> None:
        """After `recon.retrain` has merged LoRA into the weights, before the mask is applied again."""

    def on_done(self, record) -> None:
        """After `recon.run`, once the model is saved; record: `recon.study.record.RunRecord`."""
