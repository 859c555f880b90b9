"""How one window is fitted to its task: exact least squares, gradient descent on its weights, or on adapters around them."""

import contextlib

import torch
from torch import Tensor, nn

from recon.errors import ReconError
from recon.kernels.gradient_descent import Curve
from recon.kernels.least_squares import masked_least_squares
from recon.kernels.losses import get_loss
from recon.methods.adapters import adapted
from recon.methods.problem import Problem
from recon.methods.propagation import Task, mean_product
from recon.methods.training import train
from recon.model.matrices import Matrix, stored
from recon.model.modules import requiring_gradients
from recon.model.windows import Window
from recon.runtime.seeds import generator

# Larger windows take smaller steps: the learning rate is divided by this power of their number of halves. Undivided, or divided
# by the square root of the number of blocks, windows of 2 to 4 blocks of SmolLM2 get worse on held-out text; divided by the
# number itself (power 1), all 30 blocks as one window learn too little.
SLOWING = 0.75


class WindowFit:
    """Fits windows of a problem's student in place, so that they match their task; weights that masks drop stay exact zeros."""

    def __init__(self, problem: Problem):
        self.teacher, self.student, self.masks = problem.teacher, problem.student, problem.masks
        self.config, self.split, self.seed, self.execution = problem.config, problem.split, problem.seed, problem.execution

    def __call__(self, window: Window, task: Task, parameters: dict[str, nn.Parameter]) -> tuple[int, Curve]:
        """Fits the window's `parameters`, by full name; returns how many elements were trained, and how that went.

        Raises `ReconError` naming the window, where memory does not suffice for one sample at a time.
        """
        matrices, config = self.student.matrices(window), self.config
        with self.execution.holding(self.student, window, parameters.values()):
            if task.grams:
                self._solve_exactly(window, task)
            if config.solver == "exact":
                return _elements(parameters), Curve([], [])
            if config.adapter == "none":
                return _elements(parameters), self._descend(window, task, parameters, matrices)
        random = generator(self.seed, "adapters", window.name)
        with adapted(matrices.values(), self.masks, config.adapter, config.rank, random) as low_rank:
            with self.execution.holding(self.student, window, low_rank.values()):
                return _elements(low_rank), self._descend(window, task, low_rank, {})

    @torch.no_grad()
    def _solve_exactly(self, window: Window, task: Task) -> None:
        """Sets each matrix of the window to its masked least-squares solution; see `recon.kernels.least_squares`."""
        dense, read, column = self.teacher.matrices(window), self.split.exact(self.config.exact_samples), 0
        with self.teacher.loaded(window):
            for name, matrix in self.student.matrices(window).items():
                if name not in task.grams:  # an expert that too few tokens are sent to
                    continue
                rows = matrix.weight.shape[0]
                gram = task.grams[name].to(matrix.weight.device)
                cross = dense[name].weight.to(gram.device) @ gram
                bias, dense_bias = (getattr(m.module, "bias", None) for m in (matrix, dense[name]))
                if window.matrices and self.config.propagation == "mixed":
                    # Targets are not the dense matrix's answer to these inputs, so their product is formed from both.
                    wanted = task.targets[:read, :, column : column + rows].float()
                    cross = mean_product(wanted if bias is None else wanted - bias, task.inputs[:read])
                elif bias is not None:
                    # Weights alone are fitted, to the dense matrix's product: a bias that pruning put there would come on top.
                    bias.copy_(torch.zeros_like(bias) if dense_bias is None else dense_bias)
                mask, iterations = self.masks[name].to(gram.device), self.config.exact_iterations
                matrix.weight.copy_(masked_least_squares(matrix.weight, mask, gram, cross.to(gram.device), iterations))
                column += rows

    def _descend(self, window: Window, task: Task, parameters: dict[str, nn.Parameter], masked: dict[str, Matrix]) -> Curve:
        """Trains `parameters` by gradient descent on calibration samples; those of the matrices `masked` keep their zeros."""
        config, device = self.config, self.execution.device
        count = self.split.calibration
        inputs, targets = task.inputs[:count], task.targets[:count]
        if config.chunks > 1 and (window.matrices or window.half == "mlp"):
            inputs, targets = (t.unflatten(1, (config.chunks, -1)).flatten(0, 1) for t in (inputs, targets))
        # Experts' slices of one parameter that are multiplied one by one: each is a parameter of its own, in the same memory, as the
        # gradient of the parameter that holds them all would be made anew, in full, for every expert.
        alone = {name: matrix for name, matrix in masked.items() if matrix.expert is not None and matrix.alone}
        leaves = {name: nn.Parameter(matrix.part.detach()) for name, matrix in alone.items()}
        holders = {matrix.parameter_name for matrix in alone.values()}
        rest = [parameter for name, parameter in parameters.items() if name not in holders]
        masks = stored({name: matrix for name, matrix in masked.items() if name not in alone}, self.masks, device)
        masks += [(leaf, alone[name].oriented(self.masks[name]).to(device)) for name, leaf in leaves.items()]
        using = self.student.using(window, leaves) if alone else contextlib.nullcontext()
        loss, scale = get_loss(config.loss), _scale(targets) if config.loss == "mse" else 1.0

        def distance(x: Tensor, y: Tensor) -> Tensor:
            with self.execution, using:
                output = self.student.forward(window, x)
            return loss(output, y) / scale

        random, schedule = generator(self.seed, "shuffle", window.name), config.schedule.scaled(window.halves**-SLOWING)
        try:
            with requiring_gradients(rest):
                return train(distance, [inputs, targets], [*rest, *leaves.values()], masks, schedule, random, self.execution)
        except ReconError as error:
            raise ReconError(f"window {window.name!r}: {error}") from error


def _scale(targets: Tensor) -> float:
    """The mean square of the targets: divided by it, AdamW's epsilon means the same for windows of any size of activations."""
    norm = torch.linalg.vector_norm(targets, dtype=torch.float32)  # unlike squares, it needs no room for all targets again
    return max(norm.item() ** 2 / targets.numel(), 1e-30)


def _elements(parameters: dict[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())
