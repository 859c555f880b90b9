"""Small networks that are trained here in seconds or minutes. For `recon`, the input of all of them is tokens.

An image of scikit-learn's digits is a sequence of 64 pixels, each one of 17 grey values. So a network that reads images has an
embedding, blocks and a head, like a language model. It also takes fewer pixels: the rest of the image is then empty. The other
networks read the text of `companion.ladder`.
"""

import copy
import math
from functools import cache, partial
from types import SimpleNamespace

import torch
from safetensors.torch import load_model, save_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM, PretrainedConfig, T5Config, T5ForConditionalGeneration

import recon
from companion import inside, ladder
from companion.publish import ROOT, whole

SIDE, PIXELS, GREYS, CLASSES = 8, 64, 17, 10
LENGTHS = {"Mamba": 32, "T5": 64, "Llama": ladder.LENGTH}  # tokens per sample, for networks that read text
GROUPS = 20  # of samples; their mean nats are kept, as those of text windows in other notebooks


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
    """A layer that mixes pixels, then an MLP on each pixel, both residual. A CNN's block has no norms, as `scaled` requires."""

    def __init__(self, mix: type, width: int):
        super().__init__()
        self.norms = nn.ModuleList((nn.Identity if mix is Convolution else nn.LayerNorm)(width) for _ in range(2))
        self.mix, self.mlp = mix(width), MLP(width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.mix(self.norms[0](hidden))
        return hidden + self.mlp(self.norms[1](hidden))


class Reader(nn.Module):
    """Embeddings of grey values and positions, residual blocks, and a head that predicts the digit from the mean over pixels."""

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
    """Makes the first `channels` of the residual stream `gamma` times as large, in place, to imitate massive activations.

    Weights that write to these channels are multiplied by gamma, and weights that read them are divided by it, so that the
    network computes the same function. This needs a network without norms.
    """
    factor = torch.ones(network.head.in_features)
    factor[:channels] = gamma
    with torch.no_grad():
        network.embedding.weight.mul_(factor)
        network.place.mul_(factor)
        network.head.weight.div_(factor)
        for block in network.blocks:
            block.mix.kernel.weight.div_(factor.repeat_interleave(9))  # in a patch, the nine places of a channel are adjacent
            block.mlp.up.weight.div_(factor)
            for matrix in (block.mix.kernel, block.mlp.down):
                matrix.weight.mul_(factor[:, None])
                matrix.bias.mul_(factor)
    return network


KINDS = {"MLP": partial(Reader, Across), "CNN": partial(Reader, Convolution), "ViT": partial(Reader, Attention)}
_MAMBA = {"hidden_size": 48, "state_size": 4, "num_hidden_layers": 4}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0, "dropout_rate": 0.0}
KINDS |= {
    "Mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=ladder.VOCABULARY, **_MAMBA)),
    "T5": lambda: T5ForConditionalGeneration(T5Config(vocab_size=ladder.VOCABULARY, **_T5)),
}


@cache
def data(kind: str) -> dict[str, tuple[Tensor, Tensor]]:
    """By split (training, calibration, held_out, evaluation): tokens (samples, length), and labels: digits, or zeros for text."""
    length = LENGTHS.get(kind.partition("-")[0])
    if length is None:
        found, order = load_digits(), torch.randperm(1797, generator=torch.Generator().manual_seed(0))
        tokens, labels = torch.tensor(found.data).long()[order], torch.tensor(found.target)[order]
        ends = {"training": (0, 744), "calibration": (744, 1000), "held_out": (1000, 1200), "evaluation": (1200, None)}
        return {name: (tokens[slice(*part)], labels[slice(*part)]) for name, part in ends.items()}
    folder = ladder.text(ROOT / ladder.FOLDER)
    text, tokenizer = str(folder / "held-out.jsonl"), AutoTokenizer.from_pretrained(folder)
    splits = {"calibration": ("calibration", 544), "held_out": ("validation", 64), "evaluation": ("evaluation", 128)}
    found = {name: recon.sample_tokens(text, split, tokenizer, n, ladder.LENGTH) for name, (split, n) in splits.items()}
    found["training"] = ladder.samples(8000, folder.parent)
    return {name: (tokens[:, :length], torch.zeros(len(tokens))) for name, tokens in found.items()}


def nats(network: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """The negative log-likelihood of each sample, (samples,): of its digit or, for text, the mean over its predicted tokens.

    In an encoder-decoder, the encoder reads the first half of a sample, and the decoder predicts the second.
    """
    if isinstance(network, Reader):
        return F.cross_entropy(network(tokens).logits, labels, reduction="none")
    read = {}
    if network.config.is_encoder_decoder:
        read["input_ids"], tokens = tokens.chunk(2, 1)
    logits = network(**read, **{"decoder_input_ids" if read else "input_ids": tokens}).logits
    return F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none").mean(1)


@torch.no_grad()
def told(network: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """`nats` of many samples, 64 at a time."""
    return torch.cat([nats(network, *part) for part in zip(tokens.split(64), labels.split(64))])


def trained(kind: str, seed: int, steps: int) -> nn.Module:
    """The trained network of a kind; kept under build/, and trained only if it is not there.

    "Llama-4" is the ladder's rung of four blocks. It is one network for all seeds: they only decide which samples are drawn.
    """
    name, _, blocks = kind.partition("-")
    if name == "Llama":
        rung = ladder.Rung(int(blocks), 32 * int(blocks), steps)
        return recon.load(str(ladder.train(rung, ROOT / ladder.FOLDER)))[0]
    path = ROOT / "build" / "networks" / f"{kind}-{seed}-{steps}.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network, random = KINDS[kind](), torch.Generator().manual_seed(seed)
        if not path.is_file():
            tokens, labels = data(kind)["training"]
            optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
            for _ in range(steps):
                batch = torch.randint(len(tokens), (32,), generator=random)
                nats(network, tokens[batch], labels[batch]).mean().backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            with whole(path) as part:
                save_model(network, part)
    load_model(network, path)
    return network.eval()


def thinned(network: nn.Module, share: float) -> nn.Module:
    """Adds dynamic sparsity: for each token, the `share` of a matrix W's inputs x_j with the smallest |x_j| ||W_j|| is set to
    zero (W_j: column j). This is Wanda's score with one token as calibration, and a column's norm in place of one weight."""

    def largest(module: nn.Linear, inputs: tuple[Tensor]) -> Tensor:
        score = inputs[0].detach().abs() * module.weight.detach().norm(dim=0)
        lost = round(share * score.shape[-1])
        return inputs[0] * (score > score.kthvalue(lost, -1, keepdim=True).values)

    for name in recon.decompose(network).matrices():
        network.get_submodule(name).register_forward_pre_hook(largest)
    return network


def fitted(
    kind: str, seed: int, steps: int, pruning: dict, reconstruction: dict, split: str = "evaluation",
    gamma: float = 1.0, samples: int = 32, part: str = "", dynamic: float = 0.0
) -> dict:  # fmt: skip
    """One cell: trains, prunes and reconstructs a network. Returns nats (`GROUPS`,) of each state and, for images, accuracies.

    pruning, reconstruction: options; if pruning is empty, nothing is pruned. split: data to evaluate on. gamma: see `scaled`.
    samples: number for calibration; the result's "calibration" is the mean nats on them. part: only parameters whose names
    begin with it are pruned and reconstructed; the rest stays dense. dynamic: a share, see `thinned`.
    """
    dense, everything = trained(kind, seed, steps), data(kind)
    dense = scaled(dense, gamma) if gamma != 1 else dense
    pruned, (tokens, labels) = copy.deepcopy(dense), everything["calibration"]
    drawn = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:samples]
    read, kept = tokens[drawn], {name: value for name, value in dense.state_dict().items() if not name.startswith(part)}
    if pruning:
        recon.prune(pruned, read, recon.PruningConfig(**pruning), seed=seed, execution=inside.QUIET)
    pruned.load_state_dict(kept, strict=False)
    pruned = thinned(pruned, dynamic) if dynamic else pruned
    # By default, a window takes as many steps as there are samples, and none is rolled back. First pixels are like any other.
    usual = {"chunks": 1, "batch_size": 4, "epochs": 4, "size_power": 0.0, "matrix_rate": 1.0, "roll_back": False}
    usual["first_position"] = "full" if isinstance(dense, Reader) else "skipped"
    config = recon.ReconstructionConfig(**usual | reconstruction)
    fit = copy.deepcopy(pruned)
    masks = {name: m.weight != 0 for name, m in recon.decompose(fit, like=recon.decompose(dense)).matrices().items()}
    recon.reconstruct(fit, dense, read, config, masks=masks, seed=seed, execution=inside.QUIET)
    fit.load_state_dict(kept, strict=False)
    row: dict = {"calibration": {}}
    for state, network in {"dense": dense, "pruned": pruned, "reconstructed": fit}.items():
        row[f"own_{state}"] = [each.mean().item() for each in told(network, *everything[split]).chunk(GROUPS)]
        row["calibration"][state] = told(network, read, labels[drawn]).mean().item()
        if isinstance(network, Reader):
            with torch.no_grad():
                found = network(everything[split][0]).logits.argmax(-1) == everything[split][1]
            row[f"accuracy, {state}"] = found.float().mean().item()
    return row


def ranks(kind: str, seed: int, steps: int) -> dict:
    """`companion.inside.effective_ranks` of a network, on its calibration samples."""
    return inside.effective_ranks(recon.decompose(trained(kind, seed, steps)), data(kind)["calibration"][0])
