"""Small networks that are trained here in seconds; to `recon`, all of them read tokens.

An image of scikit-learn's digits is a sequence of 64 pixels, each one of 17 grey values: a network that reads it is an embedding,
blocks and a head, as a language model is. They take fewer pixels as well, as images whose rest is empty.
"""

import copy
import math
import os
from functools import cache, partial
from types import SimpleNamespace

import torch
from safetensors.torch import load_model, save_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM, PretrainedConfig

import recon
from companion import inside
from companion.publish import ROOT

SIDE, PIXELS, GREYS, CLASSES = 8, 64, 17, 10
CALIBRATION = 256  # samples of training data that nothing is trained on
GROUPS = 20  # of samples whose mean is kept: the windows of other notebooks


class MLP(nn.Module):
    """Two matrices with a nonlinearity between them, on the last axis."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(hidden)))


class Across(MLP):
    """An MLP over the pixels of each channel, as in an MLP-Mixer (Tolstikhin et al. 2021)."""

    def __init__(self, width: int):
        super().__init__(PIXELS)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(F.pad(hidden.mT, (0, PIXELS - hidden.shape[1]))).mT[:, : hidden.shape[1]]


class Convolution(nn.Module):
    """A 3x3 convolution, as a matrix that reads the patch around each pixel."""

    def __init__(self, width: int):
        super().__init__()
        self.unfold, self.kernel = nn.Unfold(3, padding=1), nn.Linear(9 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = math.ceil(hidden.shape[1] / SIDE)
        image = F.pad(hidden.mT, (0, rows * SIDE - hidden.shape[1])).unflatten(2, (rows, SIDE))
        return self.kernel(self.unfold(image).mT[:, : hidden.shape[1]])


class Attention(nn.Module):
    """Attention from each pixel to all, in 4 heads, as in a vision transformer (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = self.qkv(hidden).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """What mixes pixels, then an MLP on each, both residual. A CNN's has no norms, so that `scaled` is possible."""

    def __init__(self, mix: type, width: int):
        super().__init__()
        self.norms = nn.ModuleList((nn.Identity if mix is Convolution else nn.LayerNorm)(width) for _ in range(2))
        self.mix, self.mlp = mix(width), MLP(width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.mix(self.norms[0](hidden))
        return hidden + self.mlp(self.norms[1](hidden))


class Reader(nn.Module):
    """Embedding of pixels and places, residual blocks, and a head that tells the digit from the mean over pixels."""

    def __init__(self, mix: type, width: int = 32, blocks: int = 4):
        super().__init__()
        self.config = PretrainedConfig(vocab_size=GREYS, max_position_embeddings=PIXELS)
        self.embedding, self.place = nn.Embedding(GREYS, width), nn.Parameter(torch.randn(PIXELS, width))
        self.blocks = nn.ModuleList(Block(mix, width) for _ in range(blocks))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits (batch, classes) for images (batch, pixels)."""
        hidden = self.embedding(input_ids) + self.place[: input_ids.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return SimpleNamespace(logits=self.head(hidden.mean(1)))


def scaled(network: Reader, gamma: float, channels: int = 2) -> Reader:
    """The same function, with the first `channels` of what blocks hand on `gamma` times as large: massive activations.

    What writes to these channels is multiplied by gamma, and what reads them divided. Only a network without norms allows this.
    """
    factor = torch.ones(network.head.in_features)
    factor[:channels] = gamma
    with torch.no_grad():
        network.embedding.weight.mul_(factor)
        network.place.mul_(factor)
        network.head.weight.div_(factor)
        for block in network.blocks:
            block.mix.kernel.weight.div_(factor.repeat_interleave(9))  # a patch holds the nine places of a channel side by side
            block.mlp.up.weight.div_(factor)
            for matrix in (block.mix.kernel, block.mlp.down):
                matrix.weight.mul_(factor[:, None])
                matrix.bias.mul_(factor)
    return network


KINDS = {"MLP": partial(Reader, Across), "CNN": partial(Reader, Convolution), "ViT": partial(Reader, Attention)}
_MAMBA = {"vocab_size": 512, "hidden_size": 48, "state_size": 4, "num_hidden_layers": 4}
KINDS |= {"Mamba": lambda: MambaForCausalLM(MambaConfig(**_MAMBA))}


@cache
def data(kind: str) -> dict[str, tuple[Tensor, Tensor]]:
    """What a network reads, (samples, length), and the digits to tell, by split: training, held_out, evaluation.

    Text, for Mamba, has no labels, and a small vocabulary of its own.
    """
    if kind != "Mamba":
        found, order = load_digits(), torch.randperm(1797, generator=torch.Generator().manual_seed(0))
        tokens, labels = torch.tensor(found.data).long()[order], torch.tensor(found.target)[order]
        parts = {"training": slice(1000), "held_out": slice(1000, 1200), "evaluation": slice(1200, None)}
        return {name: (tokens[part], labels[part]) for name, part in parts.items()}
    _, tokenizer = recon.load("smollm2-135m")
    text = tokenizer.batch_decode(recon.sample_tokens("wikipedia", "calibration", tokenizer, 500, 512))
    own = tokenizer.train_new_from_iterator(text, _MAMBA["vocab_size"])
    splits = {"training": ("calibration", 8000), "held_out": ("validation", 100), "evaluation": ("evaluation", 500)}
    found = {name: recon.sample_tokens("wikipedia", split, own, count, 32) for name, (split, count) in splits.items()}
    return {name: (tokens, torch.zeros(len(tokens))) for name, tokens in found.items()}


def nats(network: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """The negative log-likelihood of each sample's digit or, of text, the mean over its predicted tokens; (samples,)."""
    if isinstance(network, Reader):
        return F.cross_entropy(network(tokens).logits, labels, reduction="none")
    return F.cross_entropy(network(tokens).logits[:, :-1].mT, tokens[:, 1:], reduction="none").mean(1)


def trained(kind: str, seed: int, steps: int) -> nn.Module:
    """The network of a kind, trained on all of its data but the last `CALIBRATION` samples; kept under build/."""
    path = ROOT / "build" / "networks" / f"{kind}-{seed}-{steps}.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network, random = KINDS[kind](), torch.Generator().manual_seed(seed)
        if not path.is_file():
            tokens, labels = (each[:-CALIBRATION] for each in data(kind)["training"])
            optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
            for _ in range(steps):
                batch = torch.randint(len(tokens), (32,), generator=random)
                nats(network, tokens[batch], labels[batch]).mean().backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            path.parent.mkdir(parents=True, exist_ok=True)
            save_model(network, part := path.with_suffix(f".{os.getpid()}"))
            os.replace(part, path)
    load_model(network, path)
    return network.eval()


def fitted(
    kind: str, seed: int, steps: int, pruning: dict, reconstruction: dict, split: str = "evaluation", gamma: float = 1.0
) -> dict:
    """One cell: a network of its own, trained, pruned and reconstructed; nats (`GROUPS`,) of each state, and accuracies.

    pruning, reconstruction: options. split: what is predicted. gamma: see `scaled`.
    """
    dense, everything = trained(kind, seed, steps), data(kind)
    dense = scaled(dense, gamma) if gamma != 1 else dense
    execution, pruned = recon.Execution("cpu", "float32", progress=False), copy.deepcopy(dense)
    drawn = torch.randperm(CALIBRATION, generator=torch.Generator().manual_seed(seed))[:32]
    samples = everything["training"][0][-CALIBRATION:][drawn]
    masks = recon.prune(pruned, samples, recon.PruningConfig(**pruning), seed=seed, execution=execution).masks
    # All windows take 32 steps at a searched rate; none is rolled back. An image's first pixel is like any other.
    usual = {"chunks": 1, "batch_size": 4, "epochs": 4, "size_power": 0.0, "matrix_rate": 1.0, "roll_back": False}
    config = recon.ReconstructionConfig(**usual | {"skip_first": not isinstance(dense, Reader)} | reconstruction)
    fit = copy.deepcopy(pruned)
    recon.reconstruct(fit, dense, samples, config, masks=masks, seed=seed, execution=execution)
    (tokens, labels), row = everything[split], {}
    with torch.no_grad():
        for state, network in {"dense": dense, "pruned": pruned, "reconstructed": fit}.items():
            row[f"own_{state}"] = [each.mean().item() for each in nats(network, tokens, labels).chunk(GROUPS)]
            if isinstance(network, Reader):
                row[f"accuracy, {state}"] = (network(tokens).logits.argmax(-1) == labels).float().mean().item()
    return row


def ranks(kind: str, seed: int, steps: int) -> dict:
    """`companion.inside.effective_ranks` of a network."""
    return inside.effective_ranks(recon.decompose(trained(kind, seed, steps)), data(kind)["training"][0][-CALIBRATION:])
