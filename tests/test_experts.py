"""Mixtures of experts: the load-balancing loss, and experts in 4 bits."""

import pytest
import torch
import transformers as t
from conftest import make_tokenizer, tiny
from safetensors.torch import load_file, save_file
from scripts import call, metrics
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from nanoalign import InputError, nf4
from nanoalign.formats.bitsandbytes import save_4bit
from nanoalign.formats.mixture import OLD, Experts, balanced, load_balancing_loss, unstack
from nanoalign.formats.weights import freeze_linears, load_lm
from nanoalign.lora import LoRALinear
from nanoalign.model import probe
from nanoalign.packing import Example
from nanoalign.run.flags import DPOConfig, SFTConfig, parse
from nanoalign.run.policy import load_policy
from nanoalign.tools import merge

MIXTURES = {
    "mixtral": tiny(t.MixtralConfig, num_local_experts=4),
    "qwen3_moe": tiny(
        t.Qwen3MoeConfig, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=48
    ),
}
if not OLD:  # its config calls a bool an int there, which huggingface_hub no longer lets pass
    size = dict(num_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.02)
    MIXTURES["olmoe"] = tiny(t.OlmoeConfig, **size)
EACH = pytest.mark.parametrize("name", MIXTURES)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each of MIXTURES as a directory, with random weights."""
    home = tmp_path_factory.mktemp("mixtures")
    for name, config in MIXTURES.items():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(home / name)
        make_tokenizer().save_pretrained(home / name)
    return home


@EACH
@pytest.mark.parametrize("change", [[], [unstack]], ids=["dense", "unstacked"])
def test_the_probe_accepts_a_mixture(name, change):
    build = AutoModelForCausalLM.from_config
    assert probe(build, MIXTURES[name], name, *change) == (1.0, None)


def policy_of(directory, *flags):
    given = [f"--model_name_or_path={directory}", "--dataset_name=any.jsonl", "--device=cpu"]
    return load_policy(parse(SFTConfig, [*given, *flags], {}))


# -------------------------------------------------------------------------- the load-balancing loss


def test_the_loss_is_that_of_transformers():
    torch.manual_seed(0)
    logits = [torch.randn(50, 8, requires_grad=True) for _ in range(3)]
    theirs = load_balancing_loss_func(tuple(logits), 8, 3)
    ours = load_balancing_loss([z.softmax(-1) for z in logits], 3)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits)):
        torch.testing.assert_close(a, b)


def test_the_loss_is_k_where_all_experts_are_equally_busy_and_else_up_to_their_number():
    even = torch.eye(4)[torch.arange(8) % 4]  # tokens 0, 4 to expert 0, and so on
    assert load_balancing_loss([even], 1) == 1
    assert load_balancing_loss([even[:1].expand(8, 4)], 1) == 4
    skewed = torch.tensor([[0.6, 0.3, 0.1]] * 2)  # 3 * (1 * 0.6 + 1 * 0.3)
    assert load_balancing_loss([skewed], 2).item() == pytest.approx(2.7)


BATCH = [  # a prompt with two replies, one with one
    Example(list(range(3, 12)), [([20, 21, 22], [True] * 3), ([23, 24], [True] * 2)]),
    Example([30, 31], [([32, 33, 34, 35], [False, True, True, True])]),
]


def padded(batch):
    """The sequences as transformers has them -> ids, attention mask, labels (-100: not trained),
    and the mask of the tokens that a packed row has: a shared prompt once, no last token."""
    rows = []
    for e in batch:
        for i, (ids, mask) in enumerate(e.texts):
            labels = [-100] * len(e.prompt) + [x if on else -100 for x, on in zip(ids, mask)]
            counted = [i == 0] * len(e.prompt) + [True] * (len(ids) - 1) + [False]
            rows.append((e.prompt + ids, [1] * len(labels), labels, [int(x) for x in counted]))
    width = max(len(row[0]) for row in rows)
    pads = 0, 0, -100, 0
    return [
        torch.tensor([row[i] + [pads[i]] * (width - len(row[0])) for row in rows]) for i in range(4)
    ]


@EACH
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_row_has_the_loss_and_the_gradient_of_padded_sequences(name, checkpointing, models):
    """All weights train; transformers computes logits and router logits of padded rows."""
    flags = "--use_peft=false", f"--gradient_checkpointing={checkpointing}", "--dtype=float32"
    policy, config = policy_of(models / name, *flags), MIXTURES[name]

    def sft(batches):
        for batch in batches:
            scores = policy(batch)
            yield {"loss": (-scores.logps.sum(), sum(scores.tokens))}

    policy.lm.train()
    (sums,) = balanced(sft, policy.model, 0.5)([BATCH])
    loss, count = sums["loss"]
    loss.backward()

    model = AutoModelForCausalLM.from_pretrained(models / name, attn_implementation="eager").train()
    ids, attention, labels, counted = padded(BATCH)
    out = model(ids, attention_mask=attention, output_router_logits=True, use_cache=False)
    logits = [z.log() for z in out.router_logits] if OLD else out.router_logits
    experts = logits[0].shape[1], config.num_experts_per_tok
    aux = load_balancing_loss_func(tuple(logits), *experts, attention_mask=counted)
    nll = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    (nll + 0.5 * aux * count).backward()
    assert count == 8 and sums["aux_loss"][1] == 8
    torch.testing.assert_close(sums["aux_loss"][0] / 8, aux)
    torch.testing.assert_close(loss, nll + 0.5 * aux * 8)
    for (path, ours), theirs in zip(policy.model.named_parameters(), model.parameters()):
        error = (ours.grad - theirs.grad).norm()
        assert error < 1e-4 * theirs.grad.norm() + 1e-6, path


SMALL = dict(num_experts_per_tok=2, moe_intermediate_size=32)
OTHER_NAMES = {  # of the settings, of the coefficient; and another kind of router
    "jetmoe": tiny(t.JetMoeConfig, kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
}
if not OLD:
    OTHER_NAMES["granitemoe"] = tiny(t.GraniteMoeConfig, num_local_experts=4, num_experts_per_tok=3)
    ernie = dict(moe_num_experts=4, moe_k=3, moe_intermediate_size=32)
    OTHER_NAMES["ernie4_5_moe"] = tiny(t.Ernie4_5_MoeConfig, **ernie)
    OTHER_NAMES["minimax_m2"] = tiny(t.MiniMaxM2Config, num_local_experts=4, num_experts_per_tok=2)
WITHOUT = {
    "glm4_moe": tiny(t.Glm4MoeConfig, n_routed_experts=4, **SMALL),
    "dots1": tiny(
        t.Dots1Config, n_routed_experts=4, n_group=1, topk_group=1, n_shared_experts=1, **SMALL
    ),
}


@pytest.mark.parametrize("kind", OTHER_NAMES)
def test_the_loss_is_transformers_own_under_other_names(kind):
    """Of one text, as its own model computes it; the model's own coefficient is the default."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OTHER_NAMES[kind], attn_implementation="eager")
    for name in ("router_aux_loss_coef", "aux_loss_coef"):
        if name in vars(model):
            setattr(model, name, 0.25)
    ids = torch.arange(3, 33)[None]
    out = model(ids, labels=ids, output_router_logits=True, use_cache=False)
    plain = model(ids, labels=ids, use_cache=False)
    assert out.aux_loss > 0

    def sft(batches):
        for _ in batches:
            loss = model.get_decoder()(ids, use_cache=False).last_hidden_state.sum() * 0
            yield {"loss": (loss + plain.loss * 29, 29)}

    (sums,) = balanced(sft, model, None)([BATCH])
    torch.testing.assert_close(sums["aux_loss"][0] / 29, out.aux_loss.detach())
    torch.testing.assert_close(sums["loss"][0] / 29, out.loss)


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_mixture_that_transformers_balances_otherwise_gets_no_such_loss(kind):
    model = AutoModelForCausalLM.from_config(WITHOUT[kind])

    def method(batches):
        yield {}

    assert balanced(method, model, None) is balanced(method, model, 0.0) is method
    with pytest.raises(InputError, match=f"--router_aux_loss_coef 0.1: .* {kind} no load-bal"):
        balanced(method, model, 0.1)


def test_a_pass_without_gradient_is_not_asked_for_router_logits(models):
    policy, asked = policy_of(models / "qwen3_moe"), []

    def dpo(batches):
        for batch in batches:
            with torch.no_grad(), policy.reference():
                policy.lm(batch)
            yield {"loss": (-policy(batch).logps.sum(), 1)}

    def note(module, args, kwargs, output):
        asked.append((kwargs["output_router_logits"], output.router_logits is not None))

    policy.model.get_decoder().register_forward_hook(note, with_kwargs=True)
    for sums in balanced(dpo, policy.model, None)([BATCH[:1], BATCH[1:]]):
        assert "aux_loss" in sums
    assert asked == [(False, False), (True, True)] * 2
    aux = [sums["aux_loss"][0] for sums in balanced(dpo, policy.model, 1.0)([BATCH, BATCH[1:]])]
    (alone,) = balanced(dpo, policy.model, 1.0)([BATCH[1:]])
    assert aux[1] == alone["aux_loss"][0] != aux[0]  # each row's is its own
    del asked[4:]
    with torch.no_grad():
        (sums,) = balanced(dpo, policy.model, None)([BATCH])
    assert "aux_loss" not in sums and asked[4:] == [(False, False)] * 2


@EACH
def test_a_run_of_each_method(name, models, data, no_curves, tmp_path, capsys):
    """The first step's loss has the coefficient times aux in it; the model's own is the default,
    and 0 leaves it out."""
    steps = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4, "device": "cpu"}
    steps |= {"dtype": "float32", "learning_rate": 1e-3, "disable_dropout": True}
    for method in ("dpo",) if name != "mixtral" else ("sft", "dpo", "kto"):
        first = {}
        for coef in (None, 0.0, 3.0):
            output = tmp_path / f"{method}{coef}"
            given = {"router_aux_loss_coef": coef, "output_dir": output, **steps}
            given |= {"model_name_or_path": models / name, "dataset_name": data / f"{method}.jsonl"}
            call(method, given)
            lines = [line for line in metrics(output) if "loss" in line]
            assert len(lines) == 2
            first[coef] = lines[0]
        own = MIXTURES[name].router_aux_loss_coef
        assert "aux_loss" not in first[0.0]
        for coef, weight in ((None, own), (3.0, 3.0)):
            aux = first[coef]["aux_loss"]
            assert MIXTURES[name].num_experts_per_tok * 0.9 < aux < 8
            assert first[coef]["loss"] - first[0.0]["loss"] == pytest.approx(weight * aux, abs=1e-5)
        said = capsys.readouterr().out
        assert said.count(f"the loss has {own:g} times the routers'") == 1
        assert said.count("the loss has ") == 2


def test_a_dense_model_has_nothing_to_balance(model_dir, capsys):
    policy = policy_of(model_dir)

    def method(batches):
        yield {}

    for coef in (None, 0.0, 0.1):
        assert balanced(method, policy.model, coef) is method
    assert (
        capsys.readouterr().out.count("--router_aux_loss_coef has nothing to do in this run") == 1
    )


# ------------------------------------------------------------------------------- experts in 4 bits

IDS = torch.arange(3, 43)[None]


def load_4bit(directory, double=False):
    how = dict(device="cpu", load_in_4bit=True, double_quant=double)
    return load_lm(str(directory), dtype="float32", **how).model


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def same(model, other):
    mine, others = model.state_dict(), other.state_dict()
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[name], others[name]) for name in mine)
    assert torch.equal(logits(model), logits(other))


@EACH
def test_streaming_gives_what_quantizing_a_loaded_model_gives(name, models, capsys):
    streamed = load_4bit(models / name)
    assert "loaded first" not in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(models / name)
    freeze_linears(loaded, torch.device("cpu"))
    same(streamed, loaded)


def round_by_definition(model, double):
    """In transformers' dense model, each linear layer but the head and each matrix of each expert
    to NF4 and back, as nf4.py defines it -> the bytes of each."""
    codes, head = {}, model.get_output_embeddings()

    def to_nf4_and_back(weight, name):
        codes[name], absmax = nf4.quantize(weight)
        if double:
            absmax = nf4.double_dequantize(*nf4.double_quantize(absmax))
        weight.data.copy_(nf4.dequantize(codes[name], absmax, weight.shape, weight.dtype))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head and ".lora_" not in name:
            to_nf4_and_back(module.weight, name)
        elif name.endswith(".experts"):
            for e, (gate_up, down) in enumerate(zip(module.gate_up_proj, module.down_proj)):
                gate, up = gate_up.chunk(2)
                for layer, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                    to_nf4_and_back(weight, f"{name}.{e}.{layer}")
    return codes


@EACH
@pytest.mark.parametrize("double", [False, True])
def test_experts_are_our_nf4_bit_for_bit_and_compute_what_the_dense_model_does(
    name, double, models
):
    """Logits, and the gradient that LoRA on attention gets through the experts."""
    flags = "--load_in_4bit", f"--use_bnb_nested_quant={double}", "--dtype=float32"
    ours, theirs = policy_of(models / name, *flags).model, policy_of(models / name).model
    codes = round_by_definition(theirs, double)
    frozen = {n: m for n, m in ours.named_modules() if isinstance(m, nf4.NF4Linear)}
    assert frozen.keys() == codes.keys() and len(frozen) > 8 + 2 * 3 * 3
    assert all(torch.equal(frozen[n].packed, codes[n]) for n in frozen)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        for layer in (m for m in model.modules() if isinstance(m, LoRALinear)):
            torch.nn.init.normal_(layer.lora_A.weight, std=0.1)
            torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
        model.eval().set_attn_implementation("eager")
        out = model(IDS, use_cache=False).logits
        out.log_softmax(-1)[0, :, 5].sum().backward()
        results.append([out, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) == 1 + 16  # A and B of q, k, v, o in two layers, and of no expert
    for a, b in zip(*results):
        assert (a - b).norm() < 1e-5 * b.norm()


@EACH
def test_a_mixture_saved_in_4_bits_opens_again(name, models, tmp_path):
    model = load_4bit(models / name, double=True)
    save_4bit(model, tmp_path)
    same(load_lm(str(tmp_path), device="cpu").model, model)
    if name == "mixtral":  # as transformers 4 and bitsandbytes wrote it
        names = {
            ".mlp.": ".block_sparse_moe.",
            "gate_proj": "w1",
            "up_proj": "w3",
            "down_proj": "w2",
        }
        old, file = {}, tmp_path / "model.safetensors"
        for key, tensor in load_file(file).items():
            for new, before in names.items():
                key = key.replace(new, before)
            old[key] = tensor.clone()
        save_file(old, file, metadata={"format": "pt"})
        same(load_lm(str(tmp_path), device="cpu").model, model)


def test_a_mixture_of_bitsandbytes_has_dense_experts_and_opens_here(tmp_path):
    pytest.importorskip("bitsandbytes")
    size = dict(hidden_size=64, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
    wide = tiny(t.Qwen3MoeConfig, **size, head_dim=16)
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "dense")
    how = t.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    how = {"quantization_config": how, "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **how).train()
    theirs.save_pretrained(tmp_path / "four")
    ours = load_lm(str(tmp_path / "four"), device="cpu").model
    frozen = {n for n, m in ours.named_modules() if isinstance(m, nf4.NF4Linear)}
    assert len(frozen) == 8 and not any(".experts." in n for n in frozen)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)


def test_a_wrong_expert_is_named_as_its_file_names_it(models, tmp_path):
    AutoModelForCausalLM.from_pretrained(models / "mixtral").save_pretrained(tmp_path)
    key, file = (
        "model.layers.1.block_sparse_moe.experts.2.w3.weight",
        tmp_path / "model.safetensors",
    )
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    tensors[key][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"model.safetensors: {key}: holds NaN"):
        load_4bit(tmp_path)


@EACH
def test_train_in_4_bits_and_merge(name, models, data, no_curves, tmp_path):
    """The merged directory is an ordinary model of transformers that computes what was trained."""
    given = {"model_name_or_path": models / name, "dataset_name": data / "dpo.jsonl"}
    given |= {"output_dir": tmp_path / "adapter", "load_in_4bit": True, "max_steps": 2}
    call("dpo", given | {"learning_rate": 0.05, "device": "cpu", "logging_steps": 1})
    assert "aux_loss" in metrics(tmp_path / "adapter")[0]
    merge.main([str(tmp_path / "adapter"), str(tmp_path / "merged"), "--device", "cpu"])
    flags = [f"--adapter_name_or_path={tmp_path / 'adapter'}", "--load_in_4bit", "--device=cpu"]
    policy = load_policy(parse(DPOConfig, [*flags, "--dataset_name=any.jsonl"], {}))
    assert any(isinstance(m, Experts) for m in policy.model.modules())
    policy.model.eval().set_attn_implementation("eager")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    torch.testing.assert_close(logits(merged), logits(policy.model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), logits(load_4bit(models / name)), atol=1e-2)
