"""A causal LM as embed -> blocks -> head, found by structure; block halves; windows.

No architecture is known here by name. The blocks are found by shape, each is called with what the model itself calls it
with, and a half-block is the block with its other half silenced, so that the model's own forward always runs. What was
found is checked against the model's own output when a `Decoder` is made.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from recon.errors import ReconError
from recon.model.discovery import (
    Returned,
    distance,
    find_blocks,
    first,
    kind_of,
    mixes_tokens,
    placeholder_tokens,
    probe_tokens,
    replaced,
    requiring_gradients,
    silent,
    tolerance,
)
from recon.model.experts import FusedProducts, Product, _expert, _routed, fused_parameters
from recon.model.matrices import Matrix, _fused
from recon.model.skeleton import Lazy, made_up
from recon.model.windows import Window, canonical, partition

log = logging.getLogger("recon")
SHAPES = 64  # of batches that are known what blocks are called with for
_OTHER = {"attention": "mlp", "mlp": "attention"}


class Stop(Exception):
    """Ends a forward pass once what was wanted has been captured."""


@dataclass(frozen=True)
class Halves:
    """How one block divides: the names of its children with weights that mix tokens, and of those that do not."""

    layout: str  # "sequential": the MLP reads the attention half's output; "parallel": both read the block's input
    children: dict[str, tuple[str, ...]]  # "attention" | "mlp" -> child names


class Decoder:
    """The blocks of a causal LM, callable one window at a time; of an encoder-decoder it makes an `EncoderDecoder`.

    Args:
        model: a causal LM from transformers, in evaluation mode.
        like: a decoder of the same architecture whose structure is taken over instead of being found anew (a pruned
            copy of a model has its structure, but is a poor thing to find it by).
        lazy: where `model` is a skeleton, its parameters, brought into memory for as long as something here needs them. The
            structure is then found with made-up weights, and blocks of one kind are taken to be built as the first of them.

    Raises:
        ReconError: no list of blocks is found, the model is not causal, or the blocks do not compose to its output.
    """

    reading = ""  # what becomes of a sample before the model reads it, in words
    # What is found out about a model's structure, which holds for all that are built like it.
    FOUND = ("stacks", "_outputs", "halves", "_silence", "groups", "_matrices", "dense_modules", "_embedding", "_half_parameters")

    def __new__(cls, model: nn.Module, *args, **kwargs):
        if cls is Decoder and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            from recon.model.encoder_decoder import EncoderDecoder as cls  # which builds on this class
        return super().__new__(cls)

    def __init__(self, model: nn.Module, like: "Decoder | None" = None, lazy: Lazy | None = None):
        self.model = model
        self.lazy = lazy
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_experts_implementation"):
                # Each expert's product is then one of its own, with its tokens alone, and can be seen.
                module.config._experts_implementation = "eager"
        if like:
            vars(self).update({name: vars(like)[name] for name in self.FOUND})
        else:
            self.stacks = self._find_stacks()
        self.blocks = nn.ModuleList(block for path in self.stacks for block in model.get_submodule(path))
        self.names = [f"{path}.{index}" for path in self.stacks for index in range(len(model.get_submodule(path)))]
        self._calls: dict[tuple, list[tuple[tuple, dict]]] = self._calls_of(like) if like else {}
        if not like and lazy:
            self._discover_skeleton()
        elif not like:
            self._discover(range(len(self.blocks)))

    def _find_stacks(self) -> list[str]:
        """The paths of the lists of blocks, in the order in which they are computed."""
        return [find_blocks(self.model, None if self.lazy else lambda: self.run(probe_tokens(self.model)))]

    @property
    def path(self) -> str:
        """Path of the list of blocks, of the last where there are several."""
        return self.stacks[-1]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def max_length(self) -> int | None:
        """The longest sequence, in tokens, that the model was made for, where its configuration tells."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    # --- running the model piece by piece -------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Input of the first block for `tokens` (batch, length): (batch, length, hidden)."""
        caught = []

        def stop(hidden, *args, **kwargs):
            caught.append(hidden)
            raise Stop

        with self.loaded_embedding(), replaced({self.blocks[0]: stop}), contextlib.suppress(Stop):
            self.run(tokens)
        return caught[0]

    @torch.no_grad()
    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What the model makes of `hidden` (batch, length, hidden), the last block's output: (batch, length, vocabulary).

        The model's own forward runs with its blocks by-passed, so final norms, scalings and soft caps are the model's own.
        `tokens` (batch, length) give the shape only.
        """
        stubs = {block: partial(self._bypass, index) for index, block in enumerate(self.blocks)}
        last = len(self.blocks) - 1
        stubs[self.blocks[last]] = lambda h, *a, **k: self._bypass(last, hidden, *a, **k)
        with self.loaded_head(), replaced(stubs):
            return self.run(tokens).logits

    def forward(self, window: Window, hidden: Tensor) -> Tensor:
        """Output of `window` for its input `hidden` (batch, length, input width).

        For windows made of blocks or halves, both are the residual stream; for a window of matrices that share an input,
        the output is their outputs side by side.
        """
        if window.matrices:
            return torch.cat([self.model.get_submodule(name)(hidden) for name in window.matrices], dim=-1)
        for index in window.blocks:
            hidden = self._run_block(index, hidden, window.half)
        return hidden

    @torch.no_grad()
    def inputs(self, window: Window, hidden: Tensor) -> Tensor:
        """Input of `window`, (batch, length, input width).

        `hidden` (batch, length, hidden) is the input of its first block (or half).
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
                self._run_block(window.blocks[0], hidden)
        finally:
            handle.remove()
        # Some blocks (OPT's) flatten batch and length into one axis on the way.
        return caught[0].reshape(*hidden.shape[:2], -1)

    @contextlib.contextmanager
    def watching(self, window: Window, see: Callable[[tuple[str, ...], Tensor], None]) -> Iterator[None]:
        """While active, `see(group, input)` is called whenever a group of the window's matrices reads its input."""
        wanted = self.matrices(window)
        fused = _fused(wanted)
        with contextlib.ExitStack() as stack:
            for index in window.blocks:
                for group in self.groups[index]:
                    if group[0] in wanted and wanted[group[0]].expert is None:
                        module = self.model.get_submodule(group[0])
                        handle = module.register_forward_pre_hook(lambda m, args, group=group: see(group, args[0]))
                        stack.callback(handle.remove)
            if fused:
                stack.enter_context(FusedProducts(fused, lambda name, found: see((_expert(name, found.expert),), found.x)))
            yield

    def using(self, window: Window, weights: dict[str, Tensor]) -> contextlib.AbstractContextManager:
        """Context, to be entered any number of times, in which the experts of `window` that are `alone` are multiplied by `weights` instead.

        weights: by matrix name, laid out as stored.
        """
        return FusedProducts(_fused(self.matrices(window)), use=lambda name, expert: weights[_expert(name, expert)])

    def _run_block(self, index: int, hidden: Tensor, half: str | None = None) -> Tensor:
        args, kwargs = self._call(hidden)[index]
        stubs = {}
        if half:
            for child in self.halves[index].children[_OTHER[half]]:
                module = self.blocks[index].get_submodule(child)
                stubs[module] = partial(self._silence[index][child], module)
        with replaced(stubs):
            return first(self.blocks[index](hidden, *args, **kwargs))

    def _bypass(self, index: int, hidden: Tensor, *args, **kwargs):
        """`hidden` as the block `index` would return it, were it called with `args` and `kwargs` as well."""
        output = self._outputs[index]
        return hidden if output is None else output.beside(hidden, args, kwargs)

    def _passed_by(self, index: int, hidden: Tensor) -> Tensor:
        """What the model makes of the residual stream `hidden` (batch, length, hidden) where it by-passes the block `index`."""
        return hidden

    def run(self, tokens: Tensor):
        """What the whole model returns for `tokens` (batch, length): its logits are those of `predicted(tokens)`."""
        return self.model(input_ids=tokens.to(self.device), use_cache=False)

    def predicted(self, sequence: Tensor) -> Tensor:
        """The part of tokens, or of a residual stream, (batch, length, ...) that the model has logits for: all of it."""
        return sequence

    def _call(self, hidden: Tensor) -> list[tuple[tuple, dict]]:
        """What the model passes to each block beside `hidden`: positions, rotary embeddings, masks.

        As samples are not padded and those of a batch are of equal length, it depends only on the shape (batch, length), so one copy
        per shape and device is kept. It is had by running the model with by-passed blocks, which costs next to nothing.
        """
        shape = tuple(hidden.shape[:2])
        if (shape, hidden.device) not in self._calls:
            calls: list[tuple[tuple, dict]] = []

            def bypass(h, *args, **kwargs):
                calls.append((args, kwargs))
                if len(calls) == len(self.blocks):
                    raise Stop
                return self._bypass(len(calls) - 1, h)

            tokens = placeholder_tokens(self.model, shape)
            with (
                self.loaded_embedding(),
                replaced(dict.fromkeys(self.blocks, bypass)),
                contextlib.suppress(Stop),
                torch.no_grad(),
            ):
                self.run(tokens)
            # The block may be elsewhere than the model's ends.
            self._keep_call(hidden, tree_map_only(Tensor, lambda tensor: tensor.to(hidden.device), calls))
        return self._calls[shape, hidden.device]

    def _calls_of(self, like: "Decoder") -> dict[tuple, list[tuple[tuple, dict]]]:
        """What the blocks of `like` are known to be called with, where these blocks are called with the same."""
        return like._calls

    def forget(self) -> None:
        """Forgets what blocks are called with: to be called when weights have changed that it may be computed from."""
        self._calls = {}

    def _keep_call(self, hidden: Tensor, calls: list[tuple[tuple, dict]]) -> None:
        if len(self._calls) >= SHAPES:
            self._calls.pop(next(iter(self._calls)))
        self._calls[tuple(hidden.shape[:2]), hidden.device] = calls

    # --- weights that are in memory only while they are needed ----------------------------------------------------

    def loaded(self, window: Window) -> contextlib.AbstractContextManager:
        """Context in which all that it takes to run `window` is in memory. A model that is not a skeleton always is."""
        return self._present(tensor for tensor in self.needed(window) if isinstance(tensor, nn.Parameter))

    def loaded_embedding(self) -> contextlib.AbstractContextManager:
        """As `loaded`, for what comes before the first block."""
        return self._present(self._embedded)

    def loaded_head(self) -> contextlib.AbstractContextManager:
        """As `loaded`, for what comes after the last block."""
        # The embedding may go by a name under which nothing runs.
        skipped = set(self._embedded).difference(self.head_weights())
        return self._present(p for name, p in self._ends.items() if name not in self._embedding and p not in skipped)

    def _present(self, parameters: Iterable[nn.Parameter]) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.lazy is None else self.lazy.present(parameters)

    @property
    def _embedded(self) -> list[nn.Parameter]:
        """The parameters outside the blocks that have a part in what the first block reads."""
        return [self._ends[name] for name in self._ends if name in self._embedding]

    @functools.cached_property
    def _ends(self) -> dict[str, nn.Parameter]:
        """The parameters outside the blocks, by full name; those that are tied under each of their names."""
        inside, named = tuple(f"{path}." for path in self.stacks), self.model.named_parameters(remove_duplicate=False)
        return {name: parameter for name, parameter in named if not name.startswith(inside)}

    def needed(self, window: Window) -> list[Tensor]:
        """The parameters and buffers that it takes to run `window`: those of its blocks, but for what is silenced in them."""
        if window.matrices:
            return list(self.parameters(window).values())
        found = []
        for index in window.blocks:
            silenced = self.halves[index].children[_OTHER[window.half]] if window.half else ()
            block = self.blocks[index]
            for name, tensor in (*block.named_parameters(), *block.named_buffers()):
                if name.partition(".")[0] not in silenced:
                    found.append(tensor)
        return found

    # --- windows and what is in them ------------------------------------------------------------------------------

    def windows(self, granularity: str) -> list[Window]:
        """The windows of the model at `granularity`, in the order in which they are adapted.

        Raises `ReconError` for an unknown granularity, one that the model is too small for, and for halves of blocks
        that do not divide.
        """
        granularity = canonical(granularity)
        if granularity == "matrix":
            self._refuse_experts()
            windows = []
            for index, groups in enumerate(self.groups):
                for number, group in enumerate(groups):
                    last = number == len(groups) - 1
                    windows.append(Window(range(index, index + 1), matrices=group, ends_block=last))
            return windows
        if granularity == "half-block":
            self._refuse_undivided()
            return [
                Window(range(i, i + 1), half=half, parallel=self.halves[i].layout == "parallel", ends_block=half == "mlp")
                for i in range(len(self.blocks))
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
        for index, groups in enumerate(self.groups):
            for name in (name for group in groups for name in group):
                if self._matrices[name].routed:
                    raise ReconError(
                        f"matrix windows do not fit this model: block {index} ({type(self.blocks[index]).__name__}) has experts, "
                        f"such as {name!r}, each of which reads tokens of its own; use half-block, block or a larger granularity"
                    )

    def trained(self, window: Window, what: str) -> dict[str, nn.Parameter]:
        """The parameters of `window` that are trained, by full name: its "matrices" with their biases, or "all"."""
        parameters = self.parameters(window)
        if what == "all":
            return parameters
        wanted = {name for m in self.matrices(window).values() for name in (m.parameter_name, m.bias_name)}
        return {name: p for name, p in parameters.items() if name in wanted}

    def weights(self, window: Window | None = None) -> list[nn.Parameter]:
        """The parameters that hold the matrices of `window` (default: of all blocks)."""
        return list(dict.fromkeys(matrix.parameter for matrix in self.matrices(window).values()))

    def head_weights(self) -> list[nn.Parameter]:
        """The stored weight of the output head, which may be the embedding's as well; empty where there is none."""
        head = self.model.get_output_embeddings()
        return [] if head is None else [head.weight]

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
            if not window.half or self._in_half(index, window.half, suffix)
        }

    def _in_half(self, index: int, half: str, suffix: str) -> bool:
        # Pruning may have given a matrix a bias that it did not have when the halves were found; it goes with its weight.
        known = self._half_parameters[index][half]
        return suffix in known or (suffix.endswith(".bias") and f"{suffix.removesuffix('bias')}weight" in known)

    def matrices(self, window: Window | None = None) -> dict[str, Matrix]:
        """The prunable matrices of `window` (default: of all blocks), by name, in the order in which they run."""
        chosen = window.blocks if window else range(len(self.blocks))
        names = [name for index in chosen for group in self.groups[index] for name in group]
        if window and window.matrices:
            names = list(window.matrices)
        elif window and window.half:
            inside = self.parameters(window)
            names = [name for name in names if self._matrices[name].parameter_name in inside]
        found = (self._matrices[name] for name in names)
        # Where the structure was found on another model, its matrices are that model's.
        return {m.name: replace(m, module=self.model.get_submodule(m.module_name)) for m in found}

    # --- finding the structure ------------------------------------------------------------------------------------

    def _discover_skeleton(self) -> None:
        """Finds the structure with made-up weights, in one block of each kind while the others are by-passed."""
        first: dict[object, int] = {}
        originals = [first.setdefault(kind_of(block), index) for index, block in enumerate(self.blocks)]
        bypassed = {b: partial(self._bypass, o) for i, (b, o) in enumerate(zip(self.blocks, originals, strict=True)) if i != o}
        parameters = list(self._ends.values())
        parameters += [parameter for index in set(originals) for parameter in self.blocks[index].parameters()]
        with self.lazy.reading(made_up(self.lazy.parameters)), self.lazy.present(parameters), replaced(bypassed):
            self._discover(originals)

    @torch.no_grad()
    def _discover(self, originals: Sequence[int]) -> None:
        """Finds the structure. Block i is taken to be built as block `originals[i]`, which is i itself where it is looked at."""
        tokens = probe_tokens(self.model)
        chosen = [index for index, original in enumerate(originals) if index == original]
        ran, handles = [], []
        self._outputs: dict[int, Returned | None] = {}

        def see(index, block, args, kwargs, output):
            ran.append(index)
            self._outputs[index] = Returned.of(output, args[1:], kwargs)

        for index in chosen:
            handles.append(self.blocks[index].register_forward_hook(partial(see, index), with_kwargs=True))
        try:
            expected = self.run(tokens).logits
        finally:
            for handle in handles:
                handle.remove()
        if ran != chosen:
            raise ReconError(
                f"the blocks at {', '.join(self.stacks)} ran in the order {ran} in one forward pass, not one after another"
            )
        self._outputs |= {index: self._outputs[original] for index, original in enumerate(originals)}
        self._check_apart()
        self._find_embedding(tokens)
        self._check_causal(tokens, expected)
        self._check_composition(tokens.flip(1)[:, 1:], originals)
        self.halves: list[Halves | str] = []
        self._silence: list[dict[str, Callable]] = []
        self._half_parameters: list[dict[str, frozenset[str]]] = []
        self.groups: list[list[tuple[str, ...]]] = []
        self._matrices: dict[str, Matrix] = {}
        self.dense_modules: list[str] = []
        hidden = self.embed(tokens)
        self._call(hidden)  # made before anything watches
        for index, original in enumerate(originals):
            if index == original:
                self.groups.append(self._find_groups(index, hidden))
                self._find_halves(index, hidden)
                hidden = self._run_block(index, hidden)
            else:
                self._build_like(index, original)
                hidden = self._passed_by(index, hidden)
        self._calls.clear()  # what blocks were called with may come of made-up weights
        if self.dense_modules:
            some = ", ".join(self.dense_modules[:3]) + (", ..." if len(self.dense_modules) > 3 else "")
            log.warning(
                "%d matrices of %s do not run as modules of their own on text alone and stay dense: %s",
                len(self.dense_modules), type(self.model).__name__, some,
            )  # fmt: skip

    def _build_like(self, index: int, original: int) -> None:
        """Takes over what was found of the block `original` for the block `index`."""
        theirs, ours = f"{self.names[original]}.", f"{self.names[index]}."
        self.groups.append([tuple(ours + name.removeprefix(theirs) for name in group) for group in self.groups[original]])
        for found in (self.halves, self._silence, self._half_parameters):
            found.append(found[original])
        self.dense_modules += [ours + name.removeprefix(theirs) for name in self.dense_modules if name.startswith(theirs)]
        for matrix in [matrix for name, matrix in self._matrices.items() if name.startswith(theirs)]:
            name, module = (ours + path.removeprefix(theirs) for path in (matrix.name, matrix.module_name))
            self._matrices[name] = replace(matrix, name=name, module=self.model.get_submodule(module))

    def _find_embedding(self, tokens: Tensor) -> None:
        """Notes the parameters outside the blocks that have a part in what the first block reads."""
        self._embedding, handles = set(), []
        owners: dict[str, list[str]] = {}
        for name in self._ends:
            owners.setdefault(name.rpartition(".")[0], []).append(name)
        for path, names in owners.items():
            hook = self.model.get_submodule(path).register_forward_pre_hook(
                lambda m, a, names=names: self._embedding.update(names)
            )
            handles.append(hook)
        try:
            self.embed(tokens)
        finally:
            for handle in handles:
                handle.remove()

    def _find_passed_on(self, tokens: Tensor, originals: Sequence[int]) -> None:
        """Notes what other blocks are called with comes of in some: nothing, where it comes of none; see `_call`."""

    def _check_apart(self) -> None:
        owners: dict[nn.Parameter, str] = {}
        for index, block in enumerate(self.blocks):
            for name, parameter in block.named_parameters():
                first_name = owners.setdefault(parameter, f"{self.names[index]}.{name}")
                if not first_name.startswith(f"{self.names[index]}."):
                    raise ReconError(
                        f"blocks of {type(self.model).__name__} share weights: {first_name!r} is '{self.names[index]}.{name}' too; what is "
                        "adapted for one block would change another, so each must have its own"
                    )

    def _check_causal(self, tokens: Tensor, expected: Tensor) -> None:
        other = tokens.clone()
        other[:, -1] = (tokens[:, -1] + 1) % self.model.config.get_text_config().vocab_size
        early, again = expected[:, :-1].float(), self.run(other).logits[:, :-1].float()
        # Same shapes, same kernels: a causal model answers with the same bits, or nearly; leakage can be small, though.
        if (early - again).abs().max() > tolerance(expected) / 100 * early.abs().max():
            kind = type(self.model).__name__
            raise ReconError(f"{kind} is not a causal language model: changing the last token changes the predictions before it")

    def _check_composition(self, tokens: Tensor, originals: Sequence[int]) -> None:
        # Other tokens than those that blocks were seen to return something for, lest that be what makes it come out right.
        expected = self.run(tokens).logits
        wrong = "do not give the model's own output"
        try:
            self._find_passed_on(probe_tokens(self.model), originals)
            hidden = self.embed(tokens)
            for index, original in enumerate(originals):
                hidden = self._run_block(index, hidden) if index == original else self._passed_by(index, hidden)
            # Weights that are NaN are for others to refuse, by name.
            gap = distance(self.logits(self.predicted(tokens), self.predicted(hidden)), expected)
            if gap <= tolerance(expected) or not expected.isfinite().all():
                return
        except Exception as error:  # whatever a model may raise that is not made for this
            wrong = f"fail ({type(error).__name__}: {error})"
        where = " and ".join(map(repr, self.stacks))
        kinds = ", ".join(sorted({type(block).__name__ for block in self.blocks}))
        raise ReconError(
            f"{type(self.model).__name__} cannot be taken apart: its {len(self.blocks)} blocks at {where} ({kinds}), run one "
            f"after another, {wrong}. What one block returns has to be all that the next depends on, beside what is the same for all "
            "tokens; here something else passes between them"
        )

    def _find_groups(self, index: int, hidden: Tensor) -> list[tuple[str, ...]]:
        """The block's matrices in the order in which they run, grouped where they read the very same input."""
        block, prefix = self.blocks[index], f"{self.names[index]}."
        modules = {f"{prefix}{n}": m for n, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        fused = {f"{prefix}{name}": parameter for name, parameter in fused_parameters(block).items()}
        kind = f"block {index} ({type(block).__name__})"
        tokens = hidden.shape[:-1].numel()
        groups: list[list[str]] = []
        ran: dict[str, int] = {}  # by name, how many tokens it read
        inputs: list[Tensor | None] = []
        products: dict[str, list[Product]] = {}

        def note(name: str, x: Tensor) -> None:
            if name in ran:
                raise ReconError(f"{kind} runs the matrix {name!r} more than once in one forward pass; it must run once")
            ran[name] = x.shape[:-1].numel()
            if inputs and inputs[-1] is x:
                groups[-1].append(name)
            else:
                inputs.append(x)
                groups.append([name])

        def note_product(name: str, product: Product) -> None:
            if name not in products:
                # Experts that the probe's tokens do not reach are there all the same.
                groups.extend([_expert(name, expert)] for expert in range(product.experts))
                inputs.append(None)
            products.setdefault(name, []).append(product)

        with contextlib.ExitStack() as stack:
            for name, module in modules.items():
                hook = module.register_forward_pre_hook(lambda m, args, name=name: note(name, args[0]))
                stack.callback(hook.remove)
            with FusedProducts(fused, note_product):
                self._run_block(index, hidden)
        for name, parameter in fused.items():
            if name not in products and sum(size > 1 for size in parameter.shape) > 2:
                raise ReconError(
                    f"{kind} holds the fused weight {name!r} of shape {tuple(parameter.shape)}, but no matrix product with a part of "
                    "it was seen, as there must be for it to be pruned expert by expert"
                )
        routed = _routed(prefix, modules, ran)
        experts = {name: products[name][0].experts for name in products} | {name: len(alike) for name, alike in routed.items()}
        gates = self._gates(prefix, modules, experts)
        for name in [name for name in routed if name not in ran]:
            # After one that is alike and did run.
            at = max(number for number, group in enumerate(groups) if set(group) & set(routed[name]))
            groups.insert(at + 1, [name])
        for name, module in modules.items():
            read = ran.get(name, 0)
            if name in routed:
                read = sum(ran.get(other, 0) for other in routed[name]) / len(routed[name])
            turned = isinstance(module, Conv1D)
            self._matrices[name] = Matrix(name, module, transposed=turned, share=read / tokens, routed=name in routed)
        for name, found in products.items():
            owner, _, attribute = name.rpartition(".")
            share = sum(len(product.x) for product in found) / (experts[name] * tokens)
            for expert in range(experts[name]):
                matrix = Matrix(
                    _expert(name, expert), self.model.get_submodule(owner), attribute, expert, experts[name],
                    found[0].transposed, share, routed=True, alone=all(product.alone for product in found),
                )  # fmt: skip
                self._matrices[matrix.name] = matrix
        # Modules that never run as such, whose input is therefore not seen, stay dense.
        self.dense_modules += [name for name in modules if name not in ran and name not in gates and name not in routed]
        return [tuple(kept) for group in groups if (kept := [name for name in group if name not in gates])]

    def _gates(self, prefix: str, modules: dict[str, nn.Module], experts: dict[str, int]) -> set[str]:
        """Of the `modules` of a block, by name, those that decide how much each expert has to say; they stay dense.

        They are in the child of the block that the experts are in, and have an output for each, or one for all.

        experts: by name of what holds an expert, or several, how many there are.
        """
        found = set()
        for name, count in experts.items():
            child = name.removeprefix(prefix).partition(".")[0]
            for other, module in modules.items():
                outputs = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
                if other.startswith(f"{prefix}{child}.") and other not in experts and outputs in (1, count):
                    found.add(other)
        return found

    def _find_halves(self, index: int, hidden: Tensor) -> None:
        """Divides block `index` by silencing, and keeps the division only if the halves give the block back."""
        block = self.blocks[index]
        children, silence = self._probe_children(index, hidden)
        self._silence.append(silence)
        self._half_parameters.append({})
        if not all(children.values()):
            missing = " and ".join(f"no {half}" for half, names in children.items() if not names)
            self.halves.append(f"has {missing} child with weights of its own")
            return
        whole = self._run_block(index, hidden)
        self.halves.append(Halves("sequential", children))
        try:
            attention = self._run_block(index, hidden, "attention")
            sequential = distance(self._run_block(index, attention, "mlp"), whole, hidden)
            parallel = distance(attention + self._run_block(index, hidden, "mlp") - hidden, whole, hidden)
        except Exception as error:  # whatever a block may raise that is not made for silent children
            self.halves[index] = f"does not run with one half silenced ({type(error).__name__}: {error})"
            return
        if sequential > tolerance(whole) and parallel > tolerance(whole):
            self.halves[index] = (
                "does not divide into an attention half and an MLP half (with one silenced after the other, its output is off by "
                f"{min(sequential, parallel):.0%}), as where the residual is added inside the sub-module"
            )
            return
        if sequential > tolerance(whole):
            self.halves[index] = Halves("parallel", children)
        for half in children:
            parameters = dict(block.named_parameters())
            with torch.enable_grad(), requiring_gradients(parameters.values()):
                output = self._run_block(index, hidden.detach(), half)
                weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
                gradients = torch.autograd.grad((output * weights).sum(), list(parameters.values()), allow_unused=True)
            used = (name for name, g in zip(parameters, gradients, strict=True) if g is not None and g.any())
            self._half_parameters[index][half] = frozenset(used)
        # A norm that both halves of a parallel block read is trained with the first alone: the second, fitted later,
        # would spoil what the first was fitted to.
        self._half_parameters[index]["mlp"] -= self._half_parameters[index]["attention"]
        # What no half's output depends on here, such as experts that the probe's tokens do not reach, goes with its child.
        reached = frozenset().union(*self._half_parameters[index].values())
        for half, names in children.items():
            rest = (name for name in parameters if name not in reached and name.partition(".")[0] in names)
            self._half_parameters[index][half] |= frozenset(rest)

    def _probe_children(self, index: int, hidden: Tensor) -> tuple[dict[str, tuple[str, ...]], dict[str, Callable]]:
        """Which children with matrices mix tokens (attention) and which do not (MLP), and a silent stand-in for each."""
        block = self.blocks[index]
        named = {n: c for n, c in block.named_children() if any(p.ndim >= 2 for p in c.parameters())}
        seen: dict[str, tuple[tuple, dict, object]] = {}
        handles = [
            child.register_forward_hook(lambda m, a, k, out, name=name: seen.update({name: (a, k, out)}), with_kwargs=True)
            for name, child in named.items()
        ]
        try:
            self._run_block(index, hidden)
        finally:
            for handle in handles:
                handle.remove()
        mixes = {name: mixes_tokens(named[name], args, kwargs) for name, (args, kwargs, _) in seen.items()}
        children = {
            "attention": tuple(name for name, mixing in mixes.items() if mixing),
            "mlp": tuple(name for name, mixing in mixes.items() if not mixing),
        }
        return children, {name: silent(args, kwargs, out) for name, (args, kwargs, out) in seen.items()}


def check_length(decoder: Decoder, length: int) -> None:
    """Raises `ReconError` where sequences of `length` tokens are longer than the model was made for."""
    longest = decoder.max_length
    if longest is not None and length > longest:
        raise ReconError(f"sequence length {length} is more than the {longest} tokens that the model was made for")
