"""Takes a model apart: finds by running it how it is built, and checks that its pieces give its own output.

No architecture is known here by name. The blocks are the largest list of modules that run, and what is in them is found by watching
and silencing their children; see `recon.model.groups` and `recon.model.halves`.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from recon.errors import ReconError
from recon.model.decoder import Decoder
from recon.model.encoder_decoder import EncoderDecoder
from recon.model.groups import find_matrices
from recon.model.halves import find_halves
from recon.model.modules import distance, kind_of, probe_tokens, replaced, tolerance
from recon.model.skeleton import Lazy, made_up
from recon.model.structure import BlockStructure, Output, Structure

log = logging.getLogger("recon")


def decompose(model: nn.Module | Decoder, like: Decoder | None = None, lazy: Lazy | None = None) -> Decoder:
    """The `Decoder` of a causal LM, or of an encoder-decoder. A `Decoder` is returned as it is.

    Args:
        model: a model from transformers, in evaluation mode.
        like: a decoder of the same architecture, whose structure is taken over instead of being found anew. A pruned copy of a
            model has its structure, but cannot be relied on to show it.
        lazy: where `model` is a skeleton, its parameters, which are in memory only while they are needed. The structure is then
            found with random weights, in one block of each kind.

    Raises:
        ReconError: no list of blocks is found, the model is not causal, or its blocks do not give its own output.
    """
    if isinstance(model, Decoder):
        return model
    kind = EncoderDecoder if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else Decoder
    if like:
        # Arguments that an encoder-decoder's blocks are called with may be computed from its own weights.
        return kind(model, like.structure, lazy, like.calls if kind is Decoder else None)
    draft = kind(model, lazy=lazy)
    run = None if lazy else lambda: draft.run(probe_tokens(model))
    draft.structure = Structure(tuple(find_blocks(model, run, within) for within in draft.stack_owners))
    with draft.experts_apart(), torch.no_grad():
        _Discovery(draft).find()
    return kind(model, draft.structure, lazy)


def find_blocks(model: nn.Module, run: Callable[[], object] | None, within: str = "") -> str:
    """Path of the `nn.ModuleList` with the most parameters among those whose members run.

    run: runs the model; None: all lists are taken to run.
    within: path of the module that the list must be in.

    Raises:
        ReconError: `run` fails, or there is no such list whose members run once each; names the lists there are.
    """
    inside = ((name, module) for name, module in model.named_modules() if name.startswith(within))
    lists = {name: module for name, module in inside if isinstance(module, nn.ModuleList) and len(module)}
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in lists.items()}
    ran = Counter({} if run else {name: len(children) for name, children in lists.items()})
    with contextlib.ExitStack() as hooks:
        for name, child in [(name, child) for name, children in lists.items() for child in children]:
            hooks.callback(child.register_forward_pre_hook(lambda m, args, name=name: ran.update([name])).remove)
        try:
            if lists and run:
                run()
        except Exception as error:  # a model may raise anything where it needs more than text
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
            raise ReconError(
                f"{type(model).__name__} does not run on tokens alone ({said}); models of text are supported"
            ) from error
    path = max((name for name in lists if ran[name]), key=sizes.__getitem__, default=None)
    if path is None or ran[path] != len(lists[path]):
        largest = sorted(lists, key=sizes.__getitem__, reverse=True)[:5]
        described = "; ".join(
            f"{name!r}, {len(lists[name])} x {type(lists[name][0]).__name__}, {sizes[name]:,} parameters, run {ran[name]} times"
            for name in largest
        )
        raise ReconError(
            f"{type(model).__name__} cannot be taken apart: its blocks have to be a torch.nn.ModuleList, and each of its blocks has to "
            f"run once in a forward pass; it has {described or 'no such list'}"
        )
    return path


class _Discovery:
    """Finds the structure of a model whose lists of blocks are known.

    originals: index of a block -> the first block that is built alike, which alone is looked at. In a model with its own weights
        every block is looked at.
    found: what is known so far, by index of a block that is looked at.
    """

    def __init__(self, decoder: Decoder):
        self.decoder, self.model = decoder, decoder.model
        first: dict[tuple, int] = {}
        blocks = enumerate(decoder.blocks)
        self.originals = [first.setdefault(kind_of(block), index) if decoder.lazy else index for index, block in blocks]
        self.found = {index: BlockStructure() for index in sorted(set(self.originals))}

    def find(self) -> None:
        """Finds the structure; of a skeleton with random weights, in blocks of each kind while the others are by-passed."""
        if self.decoder.lazy is None:
            return self._find()
        lazy, blocks = self.decoder.lazy, self.decoder.blocks
        parameters = [*self.decoder.ends.values(), *(p for index in self.found for p in blocks[index].parameters())]
        bypassed = {blocks[i]: partial(self.decoder.bypass, i) for i, original in enumerate(self.originals) if i != original}
        with lazy.reading(made_up(lazy.parameters)), lazy.present(parameters), replaced(bypassed):
            self._find()

    def _find(self) -> None:
        decoder, tokens = self.decoder, probe_tokens(self.model)
        expected = self._find_outputs(tokens)
        self._check_apart()
        self._find_embedding(tokens)
        self._check_causal(tokens, expected)
        self._check_composition(tokens.flip(1)[:, 1:])
        hidden = decoder.embed(tokens)
        decoder.call(hidden)  # made before anything is watched
        for index, original in enumerate(self.originals):
            if index == original:
                self._note(index, **find_matrices(decoder, index, hidden))
                if decoder.divisible:
                    self._note(index, halves=find_halves(decoder, index, hidden))
                hidden = decoder.run_block(index, hidden)
            else:
                hidden = decoder.skip_block(index, hidden)
        if dense := decoder.dense_modules:
            log.warning(
                "%d matrices of %s do not run as modules of their own on text alone and stay dense: %s",
                len(dense), type(self.model).__name__, ", ".join(dense[:3]) + (", ..." if len(dense) > 3 else ""),
            )  # fmt: skip

    def _note(self, index: int, **found) -> None:
        """Adds what was `found` to the structure of block `index`, and of all that are built alike."""
        self.found[index] = replace(self.found[index], **found)
        blocks = tuple(self.found[original] for original in self.originals)
        self.decoder.structure = replace(self.decoder.structure, blocks=blocks)

    def _find_outputs(self, tokens: Tensor) -> Tensor:
        """Notes what blocks return beside hidden states; returns the model's logits for `tokens`."""
        ran = []

        def see(index, block, args, kwargs, output):
            ran.append(index)
            self._note(index, output=Output.of(output, args[1:], kwargs))

        with contextlib.ExitStack() as hooks:
            for index in self.found:
                hook = self.decoder.blocks[index].register_forward_hook(partial(see, index), with_kwargs=True)
                hooks.callback(hook.remove)
            logits = self.decoder.run(tokens).logits
        if ran != list(self.found):
            stacks = ", ".join(self.decoder.structure.stacks)
            raise ReconError(f"the blocks at {stacks} ran in the order {ran} in one forward pass, not one after another")
        return logits

    def _find_embedding(self, tokens: Tensor) -> None:
        """Notes the parameters outside the blocks whose modules run before the first block."""
        found, owners = set(), {}
        for name in self.decoder.ends:
            owners.setdefault(name.rpartition(".")[0], []).append(name)
        with contextlib.ExitStack() as hooks:
            for path, names in owners.items():
                module = self.model.get_submodule(path)
                hooks.callback(module.register_forward_pre_hook(lambda m, a, names=names: found.update(names)).remove)
            self.decoder.embed(tokens)
        self.decoder.structure = replace(self.decoder.structure, embedding=frozenset(found))

    def _check_apart(self) -> None:
        owners: dict[nn.Parameter, str] = {}
        for path, block in zip(self.decoder.names, self.decoder.blocks, strict=True):
            for name, parameter in block.named_parameters():
                owner = owners.setdefault(parameter, f"{path}.{name}")
                if not owner.startswith(f"{path}."):
                    raise ReconError(
                        f"blocks of {type(self.model).__name__} share weights: {owner!r} is '{path}.{name}' too; what is adapted for "
                        "one block would change another, so each must have its own"
                    )

    def _check_causal(self, tokens: Tensor, expected: Tensor) -> None:
        other = tokens.clone()
        other[:, -1] = (tokens[:, -1] + 1) % self.model.config.get_text_config().vocab_size
        early, again = expected[:, :-1].float(), self.decoder.run(other).logits[:, :-1].float()
        # The tolerance is small: shapes and kernels are the same, so a causal model gives nearly the same bits, and little may leak.
        if (early - again).abs().max() > tolerance(expected) / 100 * early.abs().max():
            kind = type(self.model).__name__
            raise ReconError(f"{kind} is not a causal language model: changing the last token changes the predictions before it")

    def _check_composition(self, tokens: Tensor) -> None:
        """Checks that the pieces give the model's logits, on other tokens than those that the blocks' outputs were noted for."""
        decoder = self.decoder
        expected = decoder.run(tokens).logits
        wrong = "do not give the model's own output"
        try:
            hidden = decoder.embed(tokens)
            for index, original in enumerate(self.originals):
                hidden = decoder.run_block(index, hidden) if index == original else decoder.skip_block(index, hidden)
            gap = distance(decoder.logits(decoder.predicted(tokens), decoder.predicted(hidden)), expected)
            # Weights that are NaN are refused elsewhere, by name.
            if gap <= tolerance(expected) or not expected.isfinite().all():
                return
        except Exception as error:  # a model that is built otherwise may raise anything
            wrong = f"fail ({type(error).__name__}: {error})"
        where = " and ".join(map(repr, decoder.structure.stacks))
        kinds = ", ".join(sorted({type(block).__name__ for block in decoder.blocks}))
        raise ReconError(
            f"{type(self.model).__name__} cannot be taken apart: its {len(decoder.blocks)} blocks at {where} ({kinds}), run one "
            f"after another, {wrong}. What one block returns has to be all that the next depends on, beside what is the same for all "
            "tokens; here something else passes between them"
        )
