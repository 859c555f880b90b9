"""How one window is fitted to its task: exact least squares, gradient descent on its weights, or on adapters around them."""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from recon.errors import ReconError
from recon.kernels.gradient_descent import Trained, trained
from recon.kernels.least_squares import masked_least_squares
from recon.kernels.losses import get_loss, position_weights
from recon.methods.adapters import adapted
from recon.methods.problem import Problem
from recon.methods.propagation import Task, mean_product
from recon.methods.training import train
from recon.model.matrices import factors, stored
from recon.model.modules import requiring_gradients
from recon.model.windows import Window
from recon.runtime.seeds import generator


class WindowFit:
    """Fits windows of a problem's student in place, so that they match their task; weights that masks drop stay exact zeros."""

    def __init__(self, problem: Problem):
        self.teacher, self.student, self.masks = problem.teacher, problem.student, problem.masks
        self.config, self.split, self.seed, self.execution = problem.config, problem.split, problem.seed, problem.execution

    def __call__(self, window: Window, task: Task, parameters: dict[str, nn.Parameter]) -> tuple[int, list[float]]:
        """Fits the window's `parameters`, by full name; returns how many elements were trained, and the loss of each step.

        Raises `ReconError` naming the window, where memory does not suffice for one sample at a time.
        """
        config, matrices = self.config, self.student.matrices(window)
        with self.execution.holding(self.student, window, parameters.values()):
            if task.grams:
                self._solve_exactly(window, task)
            if config.solver == "exact":
                return _elements(parameters.values()), []
            if config.adapter == "none":
                return _elements(parameters.values()), self._train_matrices(window, task, parameters)
        random = generator(self.seed, "adapters", window.name)
        with adapted(matrices.values(), self.masks, config.adapter, config.rank, random) as low_rank:
            found = [each.parameter for each in low_rank.values()]
            with self.execution.holding(self.student, window, found):
                return _elements(found), self._descend(window, task, list(low_rank.values()))

    @torch.no_grad()
    def _solve_exactly(self, window: Window, task: Task) -> None:
        """Sets each matrix of the window to its masked least-squares solution; see `recon.kernels.least_squares`."""
        dense, count, column = self.teacher.matrices(window), self.split.calibration, 0
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
                    wanted = task.targets[:count, :, column : column + rows].float()
                    cross = mean_product(wanted if bias is None else wanted - bias, task.inputs[:count])
                elif bias is not None:
                    # Weights alone are fitted, to the dense matrix's product: a bias that pruning put there would come on top.
                    bias.copy_(torch.zeros_like(bias) if dense_bias is None else dense_bias)
                mask, iterations = self.masks[name].to(gram.device), self.config.exact_iterations
                matrix.weight.copy_(masked_least_squares(matrix.weight, mask, gram, cross.to(gram.device), iterations))
                column += rows

    def _train_matrices(self, window: Window, task: Task, parameters: dict[str, nn.Parameter]) -> list[float]:
        """Trains `parameters` of the window, by full name; those of its matrices keep their zeros."""
        matrices, device = self.student.matrices(window), self.execution.device
        # Experts' slices of one parameter that are multiplied one by one: each is a parameter of its own, in the same memory, as the
        # gradient of the parameter that holds them all would be made anew, in full, for every expert.
        alone = {name: matrix for name, matrix in matrices.items() if matrix.expert is not None and matrix.alone}
        leaves = {name: nn.Parameter(matrix.part.detach()) for name, matrix in alone.items()}
        holders = {matrix.parameter_name for matrix in alone.values()}
        rest = [parameter for name, parameter in parameters.items() if name not in holders]
        masks = dict(stored({name: matrix for name, matrix in matrices.items() if name not in alone}, self.masks, device))
        masks |= {leaf: factors(alone[name].oriented(self.masks[name]), device) for name, leaf in leaves.items()}
        using = self.student.using(window, leaves) if alone else contextlib.nullcontext()
        with requiring_gradients(rest):
            return self._descend(window, task, trained([*rest, *leaves.values()], masks), using)

    def _descend(self, window: Window, task: Task, parameters: list[Trained], using=contextlib.nullcontext()) -> list[float]:
        """Trains `parameters` by gradient descent on calibration samples; `using`: a context to run the window in."""
        config, count = self.config, self.split.calibration
        inputs, targets = task.inputs[:count], task.targets[:count]
        weights = position_weights(*inputs.shape[:2], targets.device, skip=config.skip_first)
        data = [inputs, targets, weights]
        chunks = config.chunks_of(window, self.split.length)  # more steps at the same work, where tokens are not mixed
        data = [each.unflatten(1, (chunks, -1)).flatten(0, 1) for each in data]
        loss, variance = get_loss(config.loss), task.variance.to(self.execution.device)

        def distance(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
            with self.execution, using:
                output = self.student.forward(window, x)
            return (loss(output.flatten(2), y.flatten(2), variance) * weight).mean()  # a token may have several vectors

        random, schedule = generator(self.seed, "shuffle", window.name), config.schedule(count, window)
        try:
            return train(distance, data, parameters, schedule, random, self.execution)
        except ReconError as error:
            raise ReconError(f"window {window.name!r}: {error}") from error


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
