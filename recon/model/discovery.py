"""Decomposes a model: runs it to find how it is built, and checks that its parts, run one by one, give its own output.

No architecture is known here by name. The blocks are the largest list of modules that run; for their parts see `blocks`.
"""

import contextlib
from collections import Counter
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from recon.errors import ReconError, check_kind, log
from recon.model.blocks import find_halves, find_matrices, find_shared
from recon.model.decoder import Decoder
from recon.model.encoder_decoder import EncoderDecoder
from recon.model.modules import distance, kind_of, probe_tokens, replaced, tolerance, watched
from recon.model.skeleton import Lazy
from recon.model.structure import BlockStructure, Structure


def decompose(model: nn.Module | Decoder, like: Decoder | None = None, lazy: Lazy | None = None) -> Decoder:
    """The `Decoder` of a causal LM, or of an encoder-decoder. A `Decoder` is returned as it is.

    model: from transformers, or any module that takes `input_ids` and `use_cache`, gives `logits`, and has a `config` with the
        `vocab_size`. It is changed: put in evaluation mode, and set to multiply by each expert's matrices one by one.
    like: a decoder of the same architecture, whose structure is reused: that of a pruned copy may be impossible to find.
    lazy: the parameters of a skeleton. The structure is then found with random weights, from the first block of each kind.

    Raises `ReconError` if no list of blocks is found, its blocks do not give its own output, or its weights are not in memory.
    """
    if isinstance(model, Decoder):
        return model
    check_kind("model", model, nn.Module)
    if hasattr(model, "peft_config"):
        raise ReconError(f"{type(model).__name__} holds adapters of peft; merge them first (merge_and_unload)")
    if lazy is None and any(parameter.is_meta for parameter in model.parameters()):
        raise ReconError(f"weights of {type(model).__name__} are not in memory; load it without device_map, or use --stream yes")
    model.eval()
    kind = EncoderDecoder if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else Decoder
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    if like:
        # Arguments of an encoder-decoder's blocks may be computed from its own weights, so they are not reused.
        return kind(model, like.structure, lazy, like.calls if kind is Decoder else None)
    draft = kind(model, lazy=lazy)
    owners = (model.get_encoder(), model.get_decoder()) if kind is EncoderDecoder else (model,)
    paths = {module: name for name, module in model.named_modules()}
    with torch.no_grad():
        draft.structure = Structure(tuple(find_blocks(draft, paths[owner]) for owner in owners))
        _find_structure(draft)
    return kind(model, draft.structure, lazy)


def find_blocks(decoder: Decoder, within: str = "") -> str:
    """Path of the largest `nn.ModuleList` (by parameters) in the module at `within` whose members run; each must run once."""
    model, kind = decoder.model, type(decoder.model).__name__
    inside = ((name, module) for name, module in model.named_modules() if name.startswith(within))
    lists = {name: module for name, module in inside if isinstance(module, nn.ModuleList) and len(module)}
    by_size = sorted(lists, key=lambda name: sum(map(Tensor.numel, lists[name].parameters())), reverse=True)
    children, ran = {(name, index): child for name, children in lists.items() for index, child in enumerate(children)}, Counter()
    with watched(children, lambda key, args, kwargs: ran.update([key[0]])):
        try:
            for name in by_size if decoder.lazy else ():  # weights stay on disk: each pass ends at the first block
                if within or Decoder(model, Structure((name,)), decoder.lazy).observe(probe_tokens(model), 0):
                    return name
            if lists and not decoder.lazy:
                decoder.run(probe_tokens(model))
        except Exception as error:  # a model may raise any error if it needs more than text
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
            raise ReconError(f"{kind} does not run on tokens alone ({said}); models of text are supported") from error
    path = next((name for name in by_size if ran[name]), None)
    if path is None or ran[path] != len(lists[path]):
        known = "; ".join(f"{name!r}, {len(children)} modules, run {ran[name]} times" for name, children in lists.items())
        asked = "its blocks have to be a torch.nn.ModuleList, and each of its blocks has to run once in a forward pass"
        raise ReconError(f"{kind} cannot be decomposed: {asked}; it has {known or 'no such list'}")
    return path


def _find_structure(decoder: Decoder) -> None:
    """Finds the structure of a model whose lists of blocks are known. Only the first of blocks built alike is examined."""
    model, blocks, lazy, tokens = decoder.model, decoder.blocks, decoder.lazy, probe_tokens(decoder.model)
    kinds: dict[tuple, int] = {}
    originals = [kinds.setdefault(kind_of(block), index) for index, block in enumerate(blocks)]
    known = {index: BlockStructure() for index in kinds.values()}

    def note(index: int, **what) -> None:
        known[index] = replace(known[index], **what)
        decoder.structure = replace(decoder.structure, blocks=tuple(known[original] for original in originals))

    def note_output(index: int, args: tuple, kwargs: dict, output) -> None:
        if index in known and isinstance(output, tuple | list):
            names = {id(value): name for name, value in (*enumerate(args[1:]), *kwargs.items()) if isinstance(value, Tensor)}
            found = ((names.get(id(value)), value) for value in output[1:])
            note(index, beside=tuple((name, value if name is None else None) for name, value in found))

    with contextlib.ExitStack() as stack:
        running = range(len(blocks))
        if lazy:
            running = sorted(known)
            stack.enter_context(lazy.made_up())
            stack.enter_context(lazy.present([*decoder.ends.values(), *(p for i in known for p in blocks[i].parameters())]))
            stack.enter_context(replaced({blocks[i]: partial(decoder.bypass, i) for i in range(len(blocks)) if i not in known}))
        note(0)
        with watched({index: blocks[index] for index in running}, after=note_output):
            if (expected := getattr(decoder.run(tokens), "logits", None)) is None:
                raise ReconError(f"{type(model).__name__} gives no logits; load it with its head, as by recon.load")
        _check_apart(decoder)
        # Parameters outside the blocks whose modules run before the first block.
        owners, embedding = {name: model.get_submodule(name.rpartition(".")[0]) for name in decoder.ends}, set()
        with watched(owners, lambda name, args, kwargs: embedding.add(name)):
            decoder.embed(tokens)
        causal, shared = _is_causal(decoder, tokens, expected), find_shared(decoder)
        decoder.structure = replace(decoder.structure, embedding=frozenset(embedding), shared=shared, causal=causal)
        _check_composition(decoder, tokens.flip(1)[:, 1:], running)
        hidden = decoder.embed(tokens)
        decoder.call(hidden)  # finds the blocks' arguments before anything is watched
        for index in range(len(blocks)):
            if index in known:
                note(index, **find_matrices(decoder, index, hidden))
                if not isinstance(decoder, EncoderDecoder):
                    note(index, halves=find_halves(decoder, index, hidden))
            hidden = decoder.run_block(index, hidden) if index in running else decoder.skip_block(index, hidden)
    dense = [f"{path}.{name}" for path, block in zip(decoder.names, decoder.structure.blocks) for name in block.dense]
    if dense:
        said = "%d matrices of %s do not run as modules of their own on text alone and stay dense, such as %s"
        log.warning(said, len(dense), type(model).__name__, dense[0])


def _check_apart(decoder: Decoder) -> None:
    owners: dict[nn.Parameter, str] = {}
    for path, block in zip(decoder.names, decoder.blocks):
        for name, parameter in block.named_parameters():
            if not (owner := owners.setdefault(parameter, f"{path}.{name}")).startswith(f"{path}."):
                what = f"blocks of {type(decoder.model).__name__} share weights: {owner!r} is '{path}.{name}' too"
                raise ReconError(f"{what}; what is adapted for one block would change another, so each must have its own")


def _is_causal(decoder: Decoder, tokens: Tensor, expected: Tensor) -> bool:
    if expected.shape[:2] != decoder.predicted(tokens).shape:  # such as one prediction for all tokens
        return False
    other = tokens.clone()
    other[:, -1] = (tokens[:, -1] + 1) % decoder.model.config.get_text_config().vocab_size
    early, again = expected[:, :-1].float(), decoder.run(other).logits[:, :-1].float()
    # The tolerance is small: shapes and kernels are the same, so a causal model gives nearly the same bits.
    return not (early - again).abs().max() > tolerance(expected) / 100 * early.abs().max()  # NaN is refused elsewhere


def _check_composition(decoder: Decoder, tokens: Tensor, running: range | list[int]) -> None:
    """Checks that the parts give the model's logits, on tokens other than those with which the structure was found."""
    expected = decoder.run(tokens).logits
    wrong = "do not give the model's own output"
    try:
        hidden = decoder.embed(tokens)
        for index in range(len(decoder.blocks)):
            hidden = decoder.run_block(index, hidden) if index in running else decoder.skip_block(index, hidden)
        gap = distance(decoder.logits(decoder.predicted(tokens), decoder.predicted(hidden)), expected)
        if gap <= tolerance(expected) or not expected.isfinite().all():  # weights that are NaN are refused elsewhere, by name
            return
    except Exception as error:  # a model that is built differently may raise any error
        wrong = f"fail ({type(error).__name__}: {error})"
    stacks = " and ".join(map(repr, decoder.structure.stacks))
    what = f"{type(decoder.model).__name__} cannot be decomposed: its {len(decoder.blocks)} blocks at {stacks}"
    raise ReconError(
        f"{what}, run one after another, {wrong}. What one block returns has to be all that the next depends on, beside what is "
        "the same for all tokens; here something else passes between them"
    )
