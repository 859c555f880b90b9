"""The windows of a causal LM: what runs in them, and which matrices and parameters they hold."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from recon.errors import ReconError
from recon.model import experts
from recon.model.blocks import Blocks, Stop
from recon.model.matrices import Matrix
from recon.model.structure import OTHER, Halves
from recon.model.windows import Window, canonical, partition


class Decoder(Blocks):
    """A causal LM whose windows can be run, watched and trained one at a time. Made by `recon.decompose`."""

    reading = ""  # how a sample is divided before the model reads it, in words
    divisible = True  # whether blocks may be divided
    stack_owners = ("",)  # paths of the modules that hold a list of blocks each

    # --- running windows ------------------------------------------------------------------------------------------

    def forward(self, window: Window, hidden: Tensor) -> Tensor:
        """Output of `window` for its input `hidden` (batch, length, input width).

        For windows made of blocks or halves, both are the residual stream; for a window of matrices that share an input,
        the output is the concatenation of their outputs.
        """
        if window.matrices:
            return torch.cat([self.model.get_submodule(name)(hidden) for name in window.matrices], dim=-1)
        for index in window.blocks:
            silenced = self.halves[index].silenced(window.half) if window.half else {}
            hidden = self.run_block(index, hidden, silenced)
        return hidden

    @torch.no_grad()
    def inputs(self, window: Window, hidden: Tensor) -> Tensor:
        """Input of `window`, (batch, length, input width).

        hidden: input of its first block (or half), (batch, length, hidden).
        """
        if not window.matrices:
            return hidden
        caught = []

        def stop(module, args):
            caught.append(args[0])
            raise Stop

        handle = self.model.get_submodule(window.matrices[0]).register_forward_pre_hook(stop)
        try:
            with contextlib.suppress(Stop):
                self.run_block(window.blocks[0], hidden)
        finally:
            handle.remove()
        # Some blocks (OPT's) flatten batch and length into one axis.
        return caught[0].reshape(*hidden.shape[:2], -1)

    @contextlib.contextmanager
    def watching(self, window: Window, see: Callable[[tuple[str, ...], Tensor], None]) -> Iterator[None]:
        """Context in which `see(group, input)` is called whenever a group of the window's matrices reads its input."""
        wanted = self.matrices(window)
        with contextlib.ExitStack() as stack:
            for index in window.blocks:
                for group in self.groups[index]:
                    if group[0] in wanted and wanted[group[0]].expert is None:
                        module = self.model.get_submodule(group[0])
                        handle = module.register_forward_pre_hook(lambda m, args, group=group: see(group, args[0]))
                        stack.callback(handle.remove)
            stack.enter_context(experts.watching(wanted, see))
            yield

    def using(self, window: Window, weights: dict[str, Tensor]) -> contextlib.AbstractContextManager:
        """Context in which experts of `window` that are multiplied alone use `weights` instead. It can be entered more than once.

        weights: by matrix name, laid out as stored.
        """
        return experts.using(self.matrices(window), weights)

    def loaded(self, window: Window) -> contextlib.AbstractContextManager:
        """Context in which everything that it takes to run `window` is in memory."""
        return self.present(tensor for tensor in self.needed(window) if isinstance(tensor, nn.Parameter))

    def needed(self, window: Window) -> list[Tensor]:
        """The parameters and buffers that it takes to run `window`: those of its blocks, except in silenced children."""
        if window.matrices:
            return list(self.parameters(window).values())
        found = []
        for index in window.blocks:
            silenced = self.halves[index].children[OTHER[window.half]] if window.half else ()
            block = self.blocks[index]
            for name, tensor in (*block.named_parameters(), *block.named_buffers()):
                if name.partition(".")[0] not in silenced:
                    found.append(tensor)
        return found

    # --- what is in a window --------------------------------------------------------------------------------------

    @property
    def groups(self) -> list[list[tuple[str, ...]]]:
        """Of each block, the full names of its matrices in the order in which they run; those of a group read the same input."""
        blocks = zip(self.names, self.structure.blocks, strict=True)
        return [[tuple(f"{path}.{name}" for name in group) for group in block.groups] for path, block in blocks]

    @property
    def halves(self) -> list[Halves | str]:
        """Of each block its halves, or why it does not divide."""
        return [block.halves for block in self.structure.blocks]

    @property
    def dense_modules(self) -> list[str]:
        """Full names of linear modules in the blocks that are not pruned."""
        return [f"{path}.{name}" for path, block in zip(self.names, self.structure.blocks, strict=True) for name in block.dense]

    def windows(self, granularity: str) -> list[Window]:
        """The windows of the model at `granularity`, in the order in which they are adapted.

        Raises:
            ReconError: `granularity` is unknown, too large for the model, or the blocks do not divide so.
        """
        granularity = canonical(granularity)
        if granularity == "matrix":
            self._refuse_experts()
            return [
                Window(range(index, index + 1), matrices=group, ends_block=group == groups[-1])
                for index, groups in enumerate(self.groups)
                for group in groups
            ]
        if granularity == "half-block":
            self._refuse_undivided()
            return [
                Window(range(i, i + 1), half=half, parallel=halves.layout == "parallel", ends_block=half == "mlp")
                for i, halves in enumerate(self.halves)
                for half in ("attention", "mlp")
            ]
        return [Window(blocks) for blocks in partition(granularity, len(self.blocks))]

    def _refuse_undivided(self) -> None:
        for index, halves in enumerate(self.halves):
            if isinstance(halves, str):
                kind = type(self.blocks[index]).__name__
                raise ReconError(
                    f"half-block windows do not fit this model: block {index} ({kind}) {halves}; "
                    "use granularity block (or k-blocks, quarter, model, matrix)"
                )

    def _refuse_experts(self) -> None:
        name = next((name for name, matrix in self.matrices().items() if matrix.routed), None)
        if name:
            raise ReconError(
                f"matrix windows do not fit this model: {type(self.model).__name__} has experts, such as {name!r}, each of which reads "
                "tokens of its own; use half-block, block or a larger granularity"
            )

    def parameters(self, window: Window) -> dict[str, nn.Parameter]:
        """The parameters of `window`, by full name: matrices, norms and biases that its output depends on."""
        if window.matrices:
            return {
                f"{name}.{suffix}": parameter
                for name in window.matrices
                for suffix, parameter in self.model.get_submodule(name).named_parameters()
            }
        return {
            f"{self.names[index]}.{suffix}": parameter
            for index in window.blocks
            for suffix, parameter in self.blocks[index].named_parameters()
            if not window.half or self.halves[index].has(window.half, suffix)
        }

    def trained(self, window: Window, what: str) -> dict[str, nn.Parameter]:
        """The parameters of `window` that are trained, by full name: its "matrices" with their biases, or "all"."""
        parameters = self.parameters(window)
        if what == "all":
            return parameters
        wanted = {name for m in self.matrices(window).values() for name in (m.parameter_name, m.bias_name)}
        return {name: p for name, p in parameters.items() if name in wanted}

    def matrices(self, window: Window | None = None) -> dict[str, Matrix]:
        """The prunable matrices of `window` (default: of all blocks), by name, in the order in which they run."""
        found = {}
        for index in window.blocks if window else range(len(self.blocks)):
            known = (
                matrix.within(self.names[index], self.blocks[index]) for matrix in self.structure.blocks[index].matrices.values()
            )
            found |= {matrix.name: matrix for matrix in known}
        if window and window.matrices:
            return {name: found[name] for name in window.matrices}
        if window and window.half:
            inside = self.parameters(window)
            return {name: matrix for name, matrix in found.items() if matrix.parameter_name in inside}
        return found

    def weights(self, window: Window | None = None) -> list[nn.Parameter]:
        """The parameters that hold the matrices of `window` (default: of all blocks)."""
        return list(dict.fromkeys(matrix.parameter for matrix in self.matrices(window).values()))
