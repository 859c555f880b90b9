"""Whatever is refused says what, the value, and what is allowed: options by themselves and together, the command line,
models, samples and masks."""

import copy
import math

import pytest
import torch
from fixtures.families import small_model
from fixtures.models import FLOAT32, copied, make_model, random_tokens
from torch.utils.data import DataLoader

import recon
from recon import PruningConfig, ReconError, ReconstructionConfig, RetrainingConfig
from recon.cli import main
from recon.kernels.patterns import Pattern
from recon.methods.reorder import reorder_neurons
from recon.model.structure import BlockStructure, Structure

GRANULARITIES = ("layer", "0", "0-blocks", "-1", "1/3", "1.5", "02", "2-block", "Block", "block ", "half", "", None)
SUITED = "magnitude, random, wanda, ria$"
PATTERNS = ("1", "-0.1", "4:2", "2:2", "0:0", "2:4:8", "-2:4", "2.0:4", "half", "", None, math.nan)


@pytest.mark.parametrize(("name", "wrong", "allowed"), [
    ("criterion", "magic", "magnitude, none, random, wanda"),
    *(("criterion", wrong, "text") for wrong in (None, 1)),
    *(("samples", wrong, "a whole number from 1") for wrong in (0, 2.0, True, "3", None, math.nan)),
    *(("prune_samples", wrong, "a whole number from 0") for wrong in (-1, 0.5)),
    *(("learning_rate", wrong, "a number above 0") for wrong in (0, -1.0, "1", True, math.nan, math.inf)),
    *(("size_power", wrong, "a number from 0") for wrong in (-0.1, None)),
    *(("retrain_warmup", wrong, "a number from 0 to 1") for wrong in (-0.1, 1.1)),
    *(("sparsegpt_damping", wrong, "a number above 0 to 1") for wrong in (0, 1.1)),
    *(("roll_back", wrong, "True, False") for wrong in (1, "True", None)),
    *(("evaluation_texts", wrong, "a list of names") for wrong in (1, None, (1,))),
    ("revision", 3, "text, None"), ("model", None, "text"),
    ("preset", "quick", "fast, default, first-skipped, best, distil, paper, ebft, 3basil-tm"),
    *(("granularity", wrong, "half-block, block, quarter, model, <k>-blocks") for wrong in GRANULARITIES),
    *(("pattern", wrong, "a sparsity from 0") for wrong in PATTERNS),
])  # fmt: skip
def test_a_value_that_its_option_may_not_have(name, wrong, allowed):
    with pytest.raises(ReconError) as error:
        recon.RunSpec.of(**{name: wrong})
    said = str(error.value).replace("none, matrix, ", "")
    assert all(part in said for part in (name, str(wrong), f"allowed: {allowed}"))


@pytest.mark.parametrize(("given", "words"), [
    ({"granularty": "block"}, "'granularty'.*allowed: .*granularity, "),
    ({"solver": "exact"}, "solver exact.*granularity matrix, not 'half-block'"),
    ({"solver": "exact", "granularity": "matrix", "loss": "cosine"}, "solver exact.*loss 'cosine'"),
    ({"adapter": "lora", "solver": "exact", "granularity": "matrix"}, "adapter 'lora'.*solver adamw"),
    ({"adapter": "lora", "train": "all"}, "adapter 'lora'.*train matrices"),
    ({"criterion": "sparsegpt", "mask_refinement": 3}, f"mask_refinement is 3.*'sparsegpt'.*{SUITED}"),
    ({"evaluation_texts": ()}, "evaluation_texts is empty"),
    ({"evaluation_texts": ("news", "code", "news")}, "evaluation_texts .* names a text twice"),
    ({"criterion": "flap", "pattern": "2:4"}, "pattern is '2:4'.*flap.*such as 0.2"),
    ({"criterion": "wanda-sp", "scope": "row"}, "scope is 'row'.*wanda-sp.*allowed: auto"),
    ({"reorder_neurons": True, "pattern": "0.6"}, "reorder_neurons is True with pattern '0.6'; allowed: False, or N:M"),
    ({"allocation": "dlp", "pattern": "2:4"}, "allocation is 'dlp' with pattern '2:4'; allowed: uniform, or a sparsity"),
    ({"allocation": "measured", "criterion": "flap"}, "allocation is 'measured'.*flap.*allowed: uniform"),
    ({"weighting": "fisher", "criterion": "none"}, "weighting is 'fisher' with criterion 'none'; allowed: none"),
    ({"weighting": "fisher", "criterion": "admm", "pattern": "2:4"}, "'fisher' with pattern '2:4'; allowed: none, or"),
    ({"weighting": "fisher", "scope": "row"}, "weighting is 'fisher' with scope 'row'; allowed: none, or scope matrix"),
    ({"pruned": "there", "pattern": "0.6"}, "pattern is '0.6', but the mask is read from the pruned model 'there'"),
    ({"stream": "maybe"}, "stream is 'maybe'; allowed: auto, yes, no"),
    ({"save_dtype": "int8", "save": "there"}, "save_dtype is 'int8'; allowed: float32, bfloat16, float16"),
    ({"save_dtype": "float16"}, "save_dtype is 'float16', but no folder to save to"),
    ({"save_format": "packed"}, "save_format is 'packed', but no folder to save to"),
    ({"executor": "dask"}, "'dask'.*serial, ray"),
    ({"force": "yes"}, "force is 'yes'"),
])  # fmt: skip
def test_options_that_have_no_meaning_alone_or_together(given, words):
    ask = recon.RunOptions if given.keys() <= vars(recon.RunOptions()).keys() else recon.RunSpec.of
    with pytest.raises(ReconError, match=words):
        ask(**given)


def refuse(arguments, capsys) -> str:
    """What a call of the command line that must fail says on stderr, on one line."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    return " ".join(said.err.replace("│", " ").split())


@pytest.mark.parametrize("words, message", [
    ("walk", "walk"), ("run --sample 3", "--sample"), ("run --samples many", "many"), ("plan --stream perhaps", "stream"),
    ("run --text no-such.txt", "no-such.txt"), ("reconstruct --dense gpt-17", "--pruned"),
    ("reconstruct --dense gpt-17 --pruned gpt-18 --preset alps", "which changes nothing in the pruned model"),
    ("plan --memory nan", "memory is nan; allowed: a number of GiB above 0"),
    ("pack no-such-folder out", "'no-such-folder' holds no model*.safetensors to pack"),
    ("run --granularity thirds", "recon: granularity is 'thirds'; allowed: none, matrix, half-block"),
    ("run --samples 100000", "100000 samples of 32 tokens are more than the calibration split"),
    ("run --sequence-length 300 --samples 2", "sequence length 300 is more than the 256 tokens"),
    ("run --address 10.0.0.1:6379", "address '10.0.0.1:6379' is that of a Ray cluster"),
    ("run --executor ray --propagation mixed", "side by side under mixed propagation"),
    ("bench --blocks 0", "blocks is 0; allowed: a whole number from 1"),
    ("assets --models smollm2-135m gpt-17", "model 'gpt-17'; allowed: all, or some of smollm2-135m, gemma3-270m"),
])  # fmt: skip
def test_bad_input_on_the_command_line(small, words, message, capsys):
    command, *rest = words.split()
    assert message in refuse([command, *(small if command == "run" else []), *rest], capsys)


@pytest.mark.parametrize("option, place, said", [
    ("--record", "file/inside/out", "cannot be written"), ("--save", "file/inside/out", "cannot be written"),
    ("--save", "", "exists and is not an empty folder"), ("--record", "file", "file' cannot be read: missing, unknown"),
    ("--record", "{model}/out.json", "out.json' is in the folder of the model"),
])  # fmt: skip
def test_a_place_that_cannot_be_written_before_anything_is_computed(small, option, place, said, tmp_path, capsys):
    (tmp_path / "file").write_text("{}")
    refused_later = ["--pattern", "2:5"]  # once the model is here
    assert said in refuse(["run", *small, option, str(tmp_path / place.format(model=small[1])), *refused_later], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "{}"


@pytest.fixture(scope="module")
def pair(dense):
    """A dense model of two blocks, and its half, as decoders."""
    student = copied(dense)
    recon.prune(student, config=PruningConfig("magnitude"), execution=FLOAT32)
    return dense, student


def broken(decoder, name, value):
    """The decoder with one weight that is no number."""
    model = copy.deepcopy(decoder.model)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    return model


def with_adapters():
    model = make_model("llama")
    model.peft_config = {}  # as peft's models have
    return model


UNDIVIDED = r"whole heads and neurons of Bloom.* cannot be removed, single weights can: a block does not divide"
UP, NORM = "model.layers.1.mlp.up_proj", "model.layers.1.input_layernorm.weight"
TOKENS = random_tokens(2, 12)


def prune(model, samples=TOKENS, **given):
    return recon.prune(model, samples, PruningConfig(**given), execution=FLOAT32)


def fit(dense, student, samples=TOKENS, call=None, **given):
    return recon.reconstruct(student, dense, samples, ReconstructionConfig(**given), execution=FLOAT32, **(call or {}))


def kept(student):
    return {name: matrix.weight != 0 for name, matrix in student.matrices().items()}


def retrain(student, method="full", samples=TOKENS, **call):
    return recon.retrain(student, samples, RetrainingConfig(method), execution=FLOAT32, **call)


@pytest.mark.parametrize(("call", "words"), [
    (lambda d, s: prune(d, [{"input_ids": [1, 2], "attention_mask": [1, 0]}]), "padded"),
    (lambda d, s: recon.perplexity(d, TOKENS[:, :1]), "tokens to predict are .*2, 1"),
    (lambda d, s: recon.perplexity(make_model("t5"), TOKENS[:, :2]), "tokens to predict are .*2, 2.*one window of 3"),
    (lambda d, s: prune(d, None), "'wanda' weighs activations and needs calibration samples"),
    (lambda d, s: prune(d, None, criterion="magnitude", mask_refinement=2), "'magnitude' with mask refinement weighs"),
    (lambda d, s: prune(d, None, criterion="flap", pattern="0.2"), "'flap'.*needs calibration samples"),
    (lambda d, s: prune(d, pattern="3:5"),
     r"layers\.0\.self_attn\.q_proj has 32 input columns, which do not divide into the groups of 5"),
    (lambda d, s: prune(broken(d, f"{UP}.weight", math.nan), None, criterion="magnitude"), f"{UP}'.*NaN"),
    (lambda d, s: prune(broken(d, NORM, math.inf)), "input of 'model.layers.1.*NaN or infinite"),
    (lambda d, s: prune(make_model("bloom"), criterion="wanda-sp", pattern="0.2"), UNDIVIDED),
    (lambda d, s: prune(make_model("mixtral"), criterion="flap", pattern="0.2"), "expert's; whole heads and neurons"),
    (lambda d, s: prune(small_model("xlstm"), criterion="wanda-sp", pattern="0.2"), "out_proj' reads .* columns, not None heads"),
    (lambda d, s: prune(make_model("t5"), criterion="flap", pattern="0.2"), "of T5.* cannot be removed.*a block was not divided"),
    (lambda d, s: prune(d, random_tokens(2, 65)), "sequence length 65 is more than the 64 tokens"),
    (lambda d, s: prune(d, pattern="2:4", reorder_neurons=True), "reorder_neurons is True.*reorder.reorder_neurons"),
    (lambda d, s: fit(d, s, granularity="none"), "granularity none"),
    (lambda d, s: fit(d, s, random_tokens(2, 65)), "sequence length 65 is more than the 64 tokens"),
    (lambda d, s: fit(d, s, random_tokens(2, 1)), "calibration samples are of 1 token"),
    (lambda d, s: fit(d, s, call={"held_out": random_tokens(2, 8)}), "held-out samples of 8 tokens are not as long"),
    (lambda d, s: fit(d, s, call={"held_out": []}), "held-out samples are"),
    (lambda d, s: fit(d, s, call={"masks": {}}), r"mask of '.*0.self_attn.q_proj' is missing; it must be of shape \(32, 32\)"),
    (lambda d, s: fit(d, s, call={"masks": {**kept(s), UP: 0.3 * kept(s)[UP]}}), f"mask of '{UP}' .*other values than True"),
    (lambda d, s: fit(d, s, call={"masks": {**kept(s), "head": kept(s)[UP]}}), "mask of 'head' is of no matrix"),
    (lambda d, s: fit(d, s, call={"masks": prune(copied(d), criterion="magnitude")}), "masks is Pruning.*allowed: dict"),
    (lambda d, s: fit(d, copied(d)), "model: 0.00% of its matrices is zero"),
    (lambda d, s: recon.prune(s, TOKENS, execution="cpu"), "execution is 'cpu', of type str; allowed: Execution"),
    (lambda d, s: recon.prune("folder", TOKENS), "model is 'folder', of type str; allowed: Module"),
    (lambda d, s: recon.run({"model": "folder"}), "spec is .*, of type dict; allowed: RunSpec"),
    (lambda d, s: recon.run_study([{"model": "folder"}], "records"), "spec is .*, of type dict; allowed: RunSpec"),
    (lambda d, s: fit(d, copy.deepcopy(s.model).bfloat16()), "'model.embed_tokens.weight' is torch.bfloat16.*float32"),
    (lambda d, s: fit(copy.deepcopy(d.model).bfloat16(), s), "'model.embed_tokens.weight' is torch.bfloat16.*float32"),
    (lambda d, s: fit(d, make_model("llama", num_hidden_layers=1)), "pruned model's 'model.layers.1.* is missing"),
    (lambda d, s: fit(make_model("mixtral"), make_model("mixtral"), adapter="lora"), "one expert's part of a parameter"),
    (lambda d, s: fit(d, s, call={"pruning": PruningConfig(), "masks": {}}), "both masks and pruning"),
    (lambda d, s: fit(d, s, call={"pruning": PruningConfig(statistics="sparse")}), "statistics sparse.*recon.prune"),
    (lambda d, s: fit(d, s, call={"pruning": PruningConfig("flap", "0.2")}), "'flap' weighs heads and neurons"),
    (lambda d, s: fit(d, s, propagation="sparse", call={"pruning": PruningConfig()}), "sparse propagation"),
    (lambda d, s: fit(d, s, call={"pruning": PruningConfig("wanda++")}), "'wanda\\+\\+' weighs gradients"),
    (lambda d, s: fit(d, s, call={"pruning": PruningConfig(prune_samples=3)}), r"samples \(3\) than reconstruction \(2\)"),
    (lambda d, s: retrain(s, "none"), "retrain is 'none'"),
    (lambda d, s: recon.retrain(s, TOKENS, RetrainingConfig("full", "distil")), "'distil'.*`dense`"),
    (lambda d, s: retrain(s, samples=random_tokens(2, 65)), "sequence length 65 is more than the 64"),
    (lambda d, s: retrain(s, samples=random_tokens(2, 1)), "of 1 tokens there is none to predict"),
    (lambda d, s: retrain(make_model("t5"), samples=random_tokens(2, 2)), "of 2 tokens there is none to predict"),
    (lambda d, s: retrain(s, masks={}), "mask of 'model.layers.0.self_attn.q_proj' is missing"),
    (lambda d, s: retrain(copy.deepcopy(s.model).half()), "is torch.float16"),
    (lambda d, s: retrain(make_model("mixtral"), "lora"), "one expert's part"),
    (lambda d, s: retrain(small_model("olmo"), "norms"), "norms and biases, of which the model has none"),
    (lambda d, s: prune(d, "text"), "calibration samples are 'text' .*allowed: tokens"),
    (lambda d, s: prune(d, []), r"calibration samples are \[\] .*non-empty"),
    (lambda d, s: prune(d, [[1, 2], [1, 2, 3]]), "Expected size 2 but got size 3"),
    (lambda d, s: prune(d, [{"tokens": [1]}]), r"calibration samples are \[{'tokens'.*'input_ids'"),
    (lambda d, s: prune(d, torch.zeros(2, 3)), r"\(2, 3\) of torch.float32"),
    (lambda d, s: prune(d, DataLoader(TOKENS.tolist(), batch_size=2)), "may be columns, as torch collates lists"),
    (lambda d, s: prune(d, DataLoader([*TOKENS], batch_size=2, collate_fn=list)), "make each batch one tensor"),
    (lambda d, s: prune(d, prune_samples=3), "calibration samples are 2, and 3 are asked for"),
    (lambda d, s: recon.retrain(s, TOKENS, RetrainingConfig("full", retrain_samples=3)), "are 2, and 3 are asked for"),
    (lambda d, s: prune(d, torch.zeros(2, 3, 4, dtype=torch.int64)), r"\(2, 3, 4\)"),
    (lambda d, s: prune(d, None, criterion="magnitude", allocation="measured"), "allocation measured weighs activations"),
    (lambda d, s: prune(d, None, criterion="magnitude", weighting="fisher"), "weighting fisher weighs activations"),
    (lambda d, s: prune(d, TOKENS[:1], allocation="measured"), "is 'measured' with 1 calibration"),
    (lambda d, s: prune(d, TOKENS + 10**6), "samples hold token 10.*; the model knows 0 to"),
    (lambda d, s: fit(d, s, TOKENS - 10**6), "samples hold token -.*; the model knows 0 to"),
    (lambda d, s: retrain(s, samples=TOKENS + 10**6), "samples hold token 10.*; the model knows 0 to"),
    (lambda d, s: fit(d, d), "model and dense share parameters, such as 'model.embed_tokens.weight'"),
    (lambda d, s: fit(copy.copy(d.model), d), "model and dense share parameters"),
    (lambda d, s: recon.perplexity(copy.deepcopy(d.model).half(), TOKENS, execution=recon.Execution("cpu", "bfloat16")),
     "float16, which a CPU cannot round to bfloat16"),
    (lambda d, s: recon.reconstruct(s, d, TOKENS, recon.PruningConfig()), "config is .*; allowed: Reconstruct"),
    (lambda d, s: recon.reconstruct(s, d, TOKENS, pruning=PruningConfig(), execution=recon.Execution(loop=print)), "workers fit"),
    (lambda d, s: recon.prune(d, TOKENS, ReconstructionConfig()), "config is .*; allowed: PruningConfig"),
    (lambda d, s: recon.retrain(s, TOKENS, d), "config is .*type Decoder; allowed: RetrainingConfig"),
    (lambda d, s: recon.retrain(s, TOKENS, RetrainingConfig("full", "distil"), dense=s.model), "model and dense share param"),
    (lambda d, s: recon.retrain(s, TOKENS, RetrainingConfig("full", "distil"), dense=make_model("llama", vocab_size=120)),
     "dense predicts 120 tokens, and model 99"),
    (lambda d, s: prune(make_model("llama").to("meta")), "weights of LlamaForCausalLM are not in memory"),
    (lambda d, s: prune(make_model("llama").model), "LlamaModel gives no logits; load it with its head"),
    (lambda d, s: prune(with_adapters()), "holds adapters of peft"),
    (lambda d, s: reorder_neurons(recon.decompose(make_model("mixtral")), TOKENS, Pattern.parse("2:4"), FLOAT32), "expert's"),
    (lambda d, s: reorder_neurons(d, TOKENS, Pattern.parse("3:7"), FLOAT32), "down_proj has 64 input columns.* groups of 7"),
    (lambda d, s: recon.perplexity(make_model("bert"), TOKENS), "BertLMHeadModel is not a causal language model"),
    (lambda d, s: retrain(make_model("bert")), "BertLMHeadModel is not a causal language model"),
    (lambda d, s: recon.perplexity(d, random_tokens(1, 65)), "sequence length 65 is more than the 64 tokens"),
    (lambda d, s: recon.load_masks("no-such-file"), "masks cannot be read from 'no-such-file'"),
    (lambda d, s: recon.Decoder(d.model, Structure(d.structure.stacks, (BlockStructure(),) * 2)).windows("matrix"),
     "matrix windows do not fit Llama.*block 0 has no matrix"),
])  # fmt: skip
def test_models_samples_and_masks_that_do_not_fit(pair, call, words):
    before = [value.clone() for decoder in pair for value in decoder.model.state_dict().values()]
    with pytest.raises(ReconError, match=words):
        call(*pair)
    after = [value for decoder in pair for value in decoder.model.state_dict().values()]
    assert all(torch.equal(value, was) for value, was in zip(after, before, strict=True))
