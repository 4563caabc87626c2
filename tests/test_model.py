"""A directory -> a model ready to train, and back: the probe, errors, reference, generation."""

import json
import re
import shutil
from dataclasses import replace

import families
import pytest
import torch
import transformers as t
from conftest import make_tokenizer, tiny
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from nanoalign import InputError, packing
from nanoalign import model as model_file
from nanoalign.fast.miniature import miniature
from nanoalign.formats.mixture import OLD
from nanoalign.lora import LoRALinear
from nanoalign.losses import sigmoid
from nanoalign.model import generate, generation, make_policy, probe, sample, vocabulary
from nanoalign.packing import Example, packed
from nanoalign.run.flags import DPOConfig, SFTConfig, parse
from nanoalign.run.policy import load_policy, save_policy
from nanoalign.run.reference import reference_of
from nanoalign.tools import merge

TALK = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How are you?"}],
    [{"role": "user", "content": "Hello!"}],
]
SEQUENCES = [
    Example(list(range(3, 12)), [([20, 21, 22], [True] * 3), ([23, 24], [True] * 2)]),
    Example([30, 31], [([32, 33, 34, 35], [False, True, True, True])]),
]


def config(directory, *flags, kind=SFTConfig):
    flags = ["--model_name_or_path", str(directory), "--dataset_name", "any.jsonl", *flags]
    return parse(kind, [*flags, "--device", "cpu"], {})


def save_model(directory, model_config, tokenizer=None):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(model_config).save_pretrained(directory)
    (tokenizer or make_tokenizer()).save_pretrained(directory)
    return directory


# -------------------------------------------------------------------------------------- the probe

ACCEPTED = {  # kind: (config, what its head does beyond a product)
    "llama": (tiny(LlamaConfig), (1.0, None)),
    "qwen2": (tiny(Qwen2Config), (1.0, None)),
    "qwen3": (tiny(t.Qwen3Config), (1.0, None)),
    "gemma2": (tiny(t.Gemma2Config, sliding_window=8), (1.0, 30.0)),
    "mistral": (tiny(t.MistralConfig, sliding_window=8), (1.0, None)),
    "granite": (tiny(t.GraniteConfig, logits_scaling=8.0), (1 / 8, None)),
    "cohere": (tiny(t.CohereConfig, logit_scale=0.0625), (0.0625, None)),
    "qwen3_moe": (
        tiny(t.Qwen3MoeConfig, num_experts=64, num_experts_per_tok=4, moe_intermediate_size=96),
        (1.0, None),
    ),
    "phi": (tiny(t.PhiConfig), (1.0, None)),  # a bias, which the head's layer shows itself
}
SHARED = "its log-probs change if texts share a row"
LAYERS = "" if OLD else "its layers of kind linear_attention are not supported"
PLAIN = dict(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
REFUSED = {  # kind: (config, why)
    "falcon": (t.FalconConfig(**PLAIN), SHARED),
    "bloom": (t.BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4), SHARED),
    "mpt": (t.MptConfig(vocab_size=320, d_model=32, n_layers=2, n_heads=4), SHARED),
    "xglm": (
        t.XGLMConfig(vocab_size=320, d_model=32, num_layers=2, attention_heads=4, ffn_dim=64),
        SHARED,
    ),
    "gpt_neo": (
        t.GPTNeoConfig(
            vocab_size=320,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
        ),
        SHARED,
    ),
    "mamba": (t.MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2), LAYERS),
    "minimax": (tiny(t.MiniMaxConfig, **EXPERTS), LAYERS),
    "gpt_oss": (
        tiny(t.GptOssConfig, sliding_window=8, **EXPERTS),
        "its attention takes s_aux, which packing does not know",
    ),
    "llama4_text": (
        tiny(t.Llama4TextConfig, num_local_experts=2, intermediate_size_mlp=32),
        "it does not run on a packed row",
    ),
    "gemma3": (t.Gemma3Config(), "it reads more than text"),
}
if not OLD:  # its config calls a bool an int there
    REFUSED["phimoe"] = tiny(t.PhimoeConfig, sliding_window=8, **EXPERTS), SHARED
BUILD = AutoModelForCausalLM.from_config


@pytest.mark.parametrize("kind", ACCEPTED)
def test_the_probe_accepts(kind):
    model_config, (scale, softcap) = ACCEPTED[kind]
    before = model_config.to_dict()
    got_scale, got_softcap = probe(BUILD, model_config, kind)
    assert abs(got_scale - scale) < 1e-6 and got_softcap == softcap
    assert model_config.to_dict() == before  # it looks at a copy


@pytest.mark.parametrize("kind", REFUSED)
def test_the_probe_refuses(kind):
    """In one line that says why, and what else there is."""
    model_config, why = REFUSED[kind]
    with pytest.raises(InputError, match=re.escape(f"M: {kind} can't be trained here: {why}")) as e:
        probe(BUILD, model_config, "M")
    assert str(e.value).endswith("; docs/families.md lists models that can")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["bloom", "gpt_oss", "mamba"])
def test_a_notebook_and_the_command_line_refuse_alike(kind, tmp_path):
    save_model(tmp_path, REFUSED[kind][0])
    model, said = AutoModelForCausalLM.from_pretrained(tmp_path), []
    with pytest.raises(InputError) as error:
        make_policy(model, make_tokenizer(), r=4)
    said.append(str(error.value))
    with pytest.raises(InputError) as error:
        load_policy(config(tmp_path))
    assert said == [str(error.value)] and str(tmp_path) in said[0]


@pytest.mark.parametrize("r", [4, None])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "cohere"])
def test_a_notebook_s_policy_is_that_of_the_command_line(kind, r, tmp_path):
    """The log-probs of transformers' own forward, with the head's scale and cap."""
    save_model(tmp_path, ACCEPTED[kind][0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = []
    with torch.no_grad():
        for e in SEQUENCES:
            for ids, mask in e.texts:
                text = torch.tensor([e.prompt + ids])
                logps = model(text).logits[0, len(e.prompt) - 1 : -1].log_softmax(-1)
                logps = logps.gather(1, torch.tensor(ids)[:, None])[:, 0]
                expected.append(logps[torch.tensor(mask)].sum())
    policy = make_policy(model, make_tokenizer(), r)
    torch.testing.assert_close(policy(SEQUENCES).logps, torch.stack(expected))
    theirs = load_policy(config(tmp_path, f"--use_peft={r is not None}"))
    assert (policy.lm.scale, policy.lm.softcap) == (theirs.lm.scale, theirs.lm.softcap)
    assert torch.equal(policy(SEQUENCES).logps, theirs(SEQUENCES).logps)


def test_a_notebook_trains_what_the_command_line_trains(tmp_path):
    """LoRA at alpha / r, with rows for markers that the tokenizer lacks; or all weights, and then
    there is no reference in them."""
    save_model(tmp_path, tiny(LlamaConfig), make_tokenizer(["<|endoftext|>"]))
    for r, flags in ((4, ["--lora_r=4"]), (None, ["--use_peft=false"])):
        model = AutoModelForCausalLM.from_pretrained(tmp_path).requires_grad_(False)
        ours = make_policy(model, make_tokenizer(["<|endoftext|>"]), r)
        theirs = load_policy(config(tmp_path, *flags))
        mine, other = (
            {name: p.shape for name, p in policy.model.named_parameters() if p.requires_grad}
            for policy in (ours, theirs)
        )
        assert mine == other and any("trainable_tokens" in name for name in mine) == (r == 4)
        layers = [m for m in ours.model.modules() if isinstance(m, LoRALinear)]
        assert {layer.scaling for layer in layers} == ({16 / 4} if r else set())
        assert (ours.reference is None) == (theirs.reference is None) == (r is None)


def test_a_vocabulary_may_skip_ids():
    words = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=words)
    assert vocabulary(tokenizer) == 8 and len(tokenizer) == 2


def test_a_notebook_trains_all_weights_in_fp32(tmp_path):
    """Those of a bfloat16 model would not move by a small step; it computes in bfloat16."""
    save_model(tmp_path, tiny(LlamaConfig, dtype=torch.bfloat16))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    policy = make_policy(model, make_tokenizer())
    theirs = load_policy(config(tmp_path, "--use_peft=false"))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in policy.model.parameters())
    assert policy.lm.autocast == theirs.lm.autocast == torch.bfloat16
    assert torch.equal(policy(SEQUENCES).logps, theirs(SEQUENCES).logps)
    products = []
    layer = policy.model.get_decoder().layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, args, y: products.append(y.dtype))
    assert policy.lm.hidden(packing.pack(SEQUENCES)).dtype == torch.bfloat16 == products[0]


FEW = {
    "equal": ["llama", "gemma2", "cohere2", "granite", "mixtral", "deepseek_v3", "afmoe", "gpt2"],
    "refused": ["bloom", "gpt_oss", "mamba", "falcon_h1", "llama4_text", "gemma3", "stablelm"],
}


def test_the_page_of_families_is_true():
    """In a few places here; python tests/families.py --write tries them all."""
    page = families.PAGE.read_text(encoding="utf-8").partition(families.MARK)[2]
    if f"With transformers {t.__version__} " not in page:
        pytest.skip("the page is of another transformers")
    for found, names in FEW.items():
        part = page.partition(f"## {found.capitalize()}")[2].partition("##")[0]
        for name in names:
            assert families.verdict(name)[0] == found and f"`{name}`" in part, name


def test_the_text_model_of_a_larger_one_trains_by_itself(tmp_path):
    """By the snippet on the page of families: Gemma 3 with its eyes."""
    text = tiny(t.Gemma3TextConfig, sliding_window=8, pad_token_id=0)
    eyes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    eyes |= dict(image_size=28, patch_size=14)
    whole = t.Gemma3Config(text_config=text.to_dict(), vision_config=eyes, image_token_index=310)
    torch.manual_seed(0)
    model = t.Gemma3ForConditionalGeneration(whole).eval()
    model.save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    refused(tmp_path / "whole", "it reads more than text.*docs/families.md")
    snippet = families.PAGE.read_text(encoding="utf-8").split("```")[1].removeprefix("python")
    exec(snippet, {"MODEL": tmp_path / "whole", "DIRECTORY": tmp_path / "text"})
    ids = torch.arange(3, 30)[None]
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert torch.equal(alone(ids).logits, model(ids).logits)
    assert load_policy(config(tmp_path / "text"))(SEQUENCES).logps.shape == (3,)


def test_lora_on_a_model_without_linear_layers_is_refused(tmp_path):
    """GPT-2's are Conv1D. All its weights can train."""
    gpt2 = t.GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    save_model(tmp_path, gpt2)
    refused(tmp_path, "has no linear layers for LoRA; --use_peft false trains all its weights")
    refused(tmp_path, "no linear layers", "--lora_target_modules", "c_attn")
    with pytest.raises(InputError, match="no linear layers"):
        make_policy(AutoModelForCausalLM.from_pretrained(tmp_path), make_tokenizer(), r=4)
    assert load_policy(config(tmp_path, "--use_peft=false"))(SEQUENCES).logps.shape == (3,)


def test_the_probe_finds_a_head_that_nobody_knows():
    """Here a cap, under no name in the config."""

    def build(small):
        def cap(module, args, output):
            output.logits = 30 * torch.tanh(output.logits / 30)
            return output

        model = BUILD(small)
        model.register_forward_hook(cap)
        return model

    with pytest.raises(InputError, match=SHARED):
        probe(build, tiny(LlamaConfig), "M")


@pytest.mark.parametrize("kind, forgotten", [("mistral", "sliding_window"), ("gemma2", "softcap")])
def test_the_probe_finds_what_attention_forgets(kind, forgotten, monkeypatch):
    def forgetful(*given, **how):
        return packing.packed_attention(*given, **how | {forgotten: None})

    t.AttentionInterface.register("forgetful", forgetful)
    monkeypatch.setattr(model_file, "packed", lambda: "forgetful")
    with pytest.raises(InputError, match=SHARED):
        probe(BUILD, ACCEPTED[kind][0], "M")


def test_the_probe_finds_texts_of_one_example_that_see_each_other(monkeypatch):
    """The second text of its first example, 6 tokens of prompt and 7 of the first text on."""

    def leaks(*given, geometry, **how):
        runs = [(depth and 12, new) for depth, new in geometry.runs]
        return packing.packed_attention(*given, geometry=replace(geometry, runs=runs), **how)

    t.AttentionInterface.register("leaks", leaks)
    monkeypatch.setattr(model_file, "packed", lambda: "leaks")
    with pytest.raises(InputError, match=SHARED):
        probe(BUILD, ACCEPTED["llama"][0], "M")


def test_the_probe_leaves_the_generator_of_random_numbers_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    probe(BUILD, tiny(LlamaConfig), "llama")
    assert torch.equal(torch.rand(3), expected)


def test_the_probe_starts_no_gpu(monkeypatch):
    """Nor does it seed one: what the CPU's generator goes back to, a GPU's would not."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: 1 / 0)
    probe(BUILD, tiny(LlamaConfig), "llama")


def test_the_probe_s_copy_of_a_mixture_is_small():
    """Of 128 experts of a model that has 235 billion weights, say."""
    width = dict(hidden_size=4096, num_attention_heads=64, num_key_value_heads=4, head_dim=128)
    experts = dict(num_experts=128, moe_intermediate_size=1536, num_experts_per_tok=8)
    with torch.device("meta"):
        small = miniature(t.Qwen3MoeConfig(**width, **experts))
        model = AutoModelForCausalLM.from_config(small)
    assert sum(p.numel() for p in model.parameters()) < 2e8  # attention alone: 1.4e8


# ---------------------------------------------------------------------------------- what is wrong


def drop_tensor(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def reshape_tensor(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(60, 32)


def poison_tensor(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")


@pytest.mark.parametrize(
    "change, words",
    [
        (drop_tensor, "missing keys .*layers.1.mlp.up_proj"),
        (reshape_tensor, None),
        (poison_tensor, "layers.1.mlp.up_proj.* NaN"),
    ],
)
def test_weights_that_are_not_those_of_the_config(change, words, model_dir, tmp_path):
    directory = shutil.copytree(model_dir, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    refused(directory, words)


def refused(directory, words, *flags):
    with pytest.raises(InputError, match=words) as error:
        load_policy(config(directory, *flags))
    assert "\n" not in str(error.value) and str(directory) in str(error.value)


def test_directories_that_are_no_models(model_dir, tmp_path):
    refused(tmp_path / "nothing", None)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", None)

    no_config = shutil.copytree(model_dir, tmp_path / "no_config")
    (no_config / "config.json").unlink()
    refused(no_config, None)
    (no_config / "config.json").write_text("{")
    refused(no_config, None)

    no_weights = shutil.copytree(model_dir, tmp_path / "no_weights")
    (no_weights / "model.safetensors").unlink()
    refused(no_weights, "model.safetensors")
    whole = (tmp_path / model_dir / "model.safetensors").read_bytes()
    for length in (0, 5, len(whole) // 2):
        (no_weights / "model.safetensors").write_bytes(whole[:length])
        refused(no_weights, None)


def test_a_tokenizer_larger_than_the_embeddings(tmp_path):
    save_model(tmp_path, tiny(LlamaConfig, vocab_size=200))
    refused(tmp_path, "the tokenizer has 300 ids, the embeddings 200 rows")


def test_an_adapter_is_no_model(model_dir, tmp_path):
    save_policy(load_policy(config(model_dir)), tmp_path)
    refused(tmp_path, "is an adapter; give it as --adapter_name_or_path")


def test_a_device_that_is_not_there(model_dir):
    cfg = config(model_dir)
    for cfg.device in ("abacus", "cuda:99"):
        with pytest.raises(InputError, match=f"--device {cfg.device}: ") as error:
            load_policy(cfg)
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------ generation


@pytest.fixture(scope="module")
def policy(model_dir):
    """With an adapter that is no longer new."""
    policy = load_policy(config(model_dir))
    disturb(policy, 0.05)
    return policy


def disturb(policy, size):
    """A few steps' worth of change in everything that trains."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.lm.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn_like(p))


def test_greedy_replies_are_those_of_transformers(policy):
    replies = generate(policy, TALK, max_new_tokens=12)
    policy.model.set_attn_implementation("eager")
    policy.model.eval()
    for messages, reply in zip(TALK, replies):
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        ids = policy.tokenizer(text + "<|im_start|>assistant\n", return_tensors="pt").input_ids
        stop = policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
        out = policy.model.generate(
            ids, max_new_tokens=12, do_sample=False, eos_token_id=stop, pad_token_id=stop
        )
        new = out[0, ids.shape[1] :]
        assert reply == policy.tokenizer.decode(new, skip_special_tokens=True)
    policy.model.set_attn_implementation(packed())
    assert len(set(replies)) == 3 and all(replies)


def test_a_reply_does_not_depend_on_its_batch(policy):
    together = generate(policy, TALK, max_new_tokens=12)
    assert together == [generate(policy, [m], max_new_tokens=12)[0] for m in TALK]


def test_sampling_follows_the_seed_and_training_goes_on_after_it(policy):
    def replies(seed):
        torch.manual_seed(seed)
        return generate(policy, TALK, max_new_tokens=12, temperature=1.0)

    expected = policy.lm.eval()(SEQUENCES).logps
    policy.lm.train()
    assert replies(0) == replies(0) != replies(1)
    assert policy.model.training
    policy.lm(SEQUENCES).logps.sum().backward()
    policy.lm.zero_grad()
    assert torch.equal(policy.lm.eval()(SEQUENCES).logps, expected)  # packed attention again


def test_generation_has_no_dropout(tmp_path):
    """Though the model is training before and after."""
    save_model(tmp_path, tiny(LlamaConfig, attention_dropout=0.9))
    policy, replies = load_policy(config(tmp_path)), []
    for training in (True, False):
        policy.lm.train(training)
        replies.append(generate(policy, TALK, max_new_tokens=12))
        assert policy.model.training is training
    assert replies[0] == replies[1]


def slowly(policy, prompt, n, temperature, top_p):
    """One reply by definition: at each step all of it goes through the model once more."""
    stops, new = policy.template.stop_ids, []
    while len(new) < n and not set(new) & set(stops):
        logits = policy.model(torch.tensor([prompt + new]), use_cache=False).logits[0, -1]
        if temperature == 0:
            new.append(int(logits.argmax()))
            continue
        p = (logits / temperature).softmax(-1).tolist()
        nucleus, total = [], 0.0  # the likeliest tokens, until they have top_p together
        for token in sorted(range(len(p)), key=lambda token: -p[token]):
            if total < top_p:
                nucleus.append(token)
                total += p[token]
        q = torch.tensor([[p[i] / total if i in nucleus else 0.0 for i in range(len(p))]])
        new.append(int(torch.multinomial(q, 1)))
    return new


PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
HOW = [(0, 1.0), (1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.6), (1.0, 0.2), (0.7, 0.6)]


def test_a_reply_is_sampled_by_definition(policy):
    """Token by token: greedy is argmax, and temperature and top_p do what they are defined to."""
    found = []
    for how in HOW:
        for prompt in PROMPTS:
            torch.manual_seed(3)
            found.append(sample(policy, [prompt], 8, *how)[0])
            torch.manual_seed(3)
            with generation(policy), torch.no_grad():
                assert found[-1] == slowly(policy, prompt, 8, *how), how
    replies = [found[i : i + 3] for i in range(0, len(found), 3)]
    assert all(a != b for i, a in enumerate(replies) for b in replies[:i])


@pytest.mark.parametrize(
    "wants",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": [*range(100)]},
        {"begin_suppress_tokens": [*range(100)]},
        {"bad_words_ids": [[i] for i in range(100)]},
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"forced_eos_token_id": 4},
        {"forced_bos_token_id": 4},
        {"stop_strings": ["a", "e"]},
        {"min_new_tokens": 6},
        {"max_length": 3},
        {"max_new_tokens": 2},
        {"eos_token_id": [*range(150)]},
        {"do_sample": True, "temperature": 3.0, "top_k": 2, "top_p": 0.5, "min_p": 0.4},
        {"do_sample": True, "typical_p": 0.2, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
        {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
        {"use_cache": False, "cache_implementation": "static"},
        {"guidance_scale": 3.0, "renormalize_logits": True},
    ],
    ids=lambda wants: next(iter(wants)),
)
def test_the_model_s_own_generation_config_has_no_say(wants, policy, monkeypatch):
    def replies():
        torch.manual_seed(0)
        return [sample(policy, PROMPTS, 8, temperature) for temperature in (0, 1.0)]

    expected, own = replies(), t.GenerationConfig(**wants)
    monkeypatch.setattr(policy.model, "generation_config", own)
    assert replies() == expected and policy.model.generation_config is own


def test_a_reply_ends_where_it_ends(policy, monkeypatch):
    """Not where the longest of its batch does; and each can be decoded by itself."""
    torch.manual_seed(0)
    stops = [*policy.template.stop_ids, *range(200, 300)]  # a third of all ids end a reply
    monkeypatch.setattr(policy.template, "stop_ids", stops)
    found = sample(policy, PROMPTS * 20, 8, 1.0)
    for ids in found:
        assert not set(ids[:-1]) & set(stops) and (len(ids) == 8 or ids[-1] in stops)
    assert len({len(ids) for ids in found}) > 3


def test_no_conversations_get_no_replies(policy):
    assert generate(policy, []) == []


def test_learned_positions_have_an_end(tmp_path):
    """Rotary ones have none."""
    size = dict(ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=40)
    save_model(tmp_path, tiny(t.OPTConfig, **size))
    policy = load_policy(config(tmp_path))
    assert len(sample(policy, [[5] * 35], 6)[0]) == 6
    with pytest.raises(InputError, match="a prompt of 35 tokens and 7 new ones: .* has 40 learned"):
        sample(policy, [[5] * 35, [6]], 7)
    save_model(tmp_path, tiny(LlamaConfig, max_position_embeddings=40))
    assert sample(load_policy(config(tmp_path)), [[5] * 35], 7)


# ------------------------------------------------------------------------------- there and back


def test_full_fine_tuning_saves_a_model_of_transformers(model_dir, tmp_path):
    policy = load_policy(config(model_dir, "--use_peft", "false"))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in policy.lm.parameters())
    disturb(policy, 0.02)
    save_policy(policy, tmp_path)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    policy.model.eval().set_attn_implementation(policy.attention)
    assert torch.equal(reopened(ids).logits, policy.model(ids).logits)
    assert t.AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|im_end|>"
    load_policy(config(tmp_path))  # and here again


@pytest.mark.parametrize("end", [2, [2], None])
@pytest.mark.parametrize("how", ["all weights", "merged", "merged, of another tool"])
def test_transformers_own_generate_stops_where_a_reply_ends(how, end, tmp_path):
    """The base may know another end of a text, and keeps it."""
    tokenizer = make_tokenizer(("<|im_end|>", "<|im_start|>", "<|endoftext|>"))
    base = save_model(tmp_path / "base", tiny(LlamaConfig, eos_token_id=end), tokenizer)
    directory = tmp_path / "saved"
    save_policy(load_policy(config(base, f"--use_peft={how != 'all weights'}")), directory)
    if how != "all weights":
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        if how != "merged":
            del settings["nanoalign_template"]
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        merge.main([str(directory), str(tmp_path / "merged"), "--device=cpu"])
        directory = tmp_path / "merged"
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.generation_config.eos_token_id == ([0, 2] if end else [0])
    assert model.config.eos_token_id == ([0, 2] if end == [2] else 0)
    model.lm_head.weight.data.zero_()  # all tokens as likely, and the first is taken: <|im_end|>
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=8).tolist() == [[5, 6, 0]]


def test_new_markers_start_as_the_mean_of_the_old_rows(tmp_path):
    save_model(tmp_path, tiny(LlamaConfig, vocab_size=300), make_tokenizer(["<|endoftext|>"]))
    old, policy = load_file(tmp_path / "model.safetensors"), load_policy(config(tmp_path))
    new = policy.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert new == [300, 301] and policy.model.config.vocab_size == 302
    embedding, head = policy.model.get_input_embeddings(), policy.model.get_output_embeddings()
    for table, name in ((embedding, "model.embed_tokens.weight"), (head, "lm_head.weight")):
        assert table.weight.shape == (302, 32)
        assert torch.allclose(table.weight[new], old[name].mean(0).expand(2, -1), atol=1e-6)


# --------------------------------------------------------------------------------- the reference


@pytest.fixture(scope="module")
def reference_cases(model_dir, tmp_path_factory):
    """Every way in which something trains beside new LoRA layers: flags of a policy."""
    home = tmp_path_factory.mktemp("reference")
    qwen = save_model(home / "qwen", tiny(Qwen2Config))  # with biases
    plain = save_model(home / "plain", tiny(LlamaConfig), make_tokenizer(["<|endoftext|>"]))
    before = load_policy(config(model_dir))
    disturb(before, 0.05)
    save_policy(before, home / "adapter")
    return {
        "new": (model_dir, ()),
        "continued": (model_dir, ("--adapter_name_or_path", str(home / "adapter"))),
        "biases": (qwen, ("--lora_bias", "all")),
        "head": (model_dir, ("--lora_modules_to_save", "lm_head")),
        "markers": (plain, ()),
    }


def no_sequences():
    raise AssertionError("nothing is precomputed with LoRA")


def reference_logps(cfg, policy, everything=no_sequences):
    """examples -> their reference log-probs, asked for as one batch."""
    reference = reference_of(cfg, policy, sigmoid, everything)
    return lambda examples: reference([examples])[0]


@pytest.mark.parametrize("case", ["new", "continued", "biases", "head", "markers"])
def test_the_reference_is_the_policy_as_it_was(case, reference_cases):
    directory, flags = reference_cases[case]
    cfg = config(directory, *flags, kind=DPOConfig)
    policy = load_policy(cfg)
    reference = reference_logps(cfg, policy)
    policy.lm.train()
    start = policy.lm(SEQUENCES).logps.detach()
    assert torch.allclose(reference(SEQUENCES), start, atol=1e-5)
    for size in (0.02, 0.05):
        disturb(policy, size)
        now = policy.lm(SEQUENCES).logps
        assert torch.allclose(reference(SEQUENCES), start, atol=1e-5)
        assert torch.equal(policy.lm(SEQUENCES).logps, now)  # it came back as it had been
        assert (now - start).abs().max() > 1e-2
    assert policy.lm.training and not reference(SEQUENCES).requires_grad
    now.sum().backward()


def test_the_reference_computes_the_very_rows_that_it_is_asked_for(model_dir, monkeypatch):
    """In bfloat16 a product's last bits depend on how many rows it has: cut into other rows, the
    same reply differs by more than a nat, and policy and reference do not start equal."""
    cfg = config(model_dir, "--max_row_tokens", "10", kind=DPOConfig)
    policy = load_policy(cfg)
    rows, whole = [], policy.lm.forward
    monkeypatch.setattr(policy.lm, "forward", lambda row: rows.append(row) or whole(row))
    batches = [SEQUENCES, SEQUENCES[:1] * 5, SEQUENCES[1:]]
    logps = reference_of(cfg, policy, sigmoid, no_sequences)(batches)
    assert rows == batches and [len(values) for values in logps] == [3, 10, 1]


def test_disabled_dropout_is_disabled_everywhere(tmp_path):
    """In the model's attention and in an adapter that was trained with dropout, too."""
    model = save_model(tmp_path / "model", tiny(LlamaConfig, attention_dropout=0.5))
    with_dropout = load_policy(config(model, "--lora_dropout", "0.5"))  # SFT keeps dropout
    disturb(with_dropout, 0.05)
    save_policy(with_dropout, tmp_path / "adapter")
    flags = ("--adapter_name_or_path", str(tmp_path / "adapter"))
    for kind, alike in ((SFTConfig, False), (DPOConfig, True)):
        lm = load_policy(config(model, *flags, kind=kind)).lm
        training, evaluating = lm.train()(SEQUENCES).logps, lm.eval()(SEQUENCES).logps
        assert torch.allclose(training, evaluating, atol=1e-5) is alike


def test_another_model_as_the_reference(model_dir, tmp_path):
    save_model(tmp_path / "other", tiny(Qwen2Config))
    flags = ("--ref_model_name_or_path", str(tmp_path / "other"))
    cfg = config(model_dir, *flags, kind=DPOConfig)
    policy = load_policy(cfg)
    expected = load_policy(config(tmp_path / "other")).lm(SEQUENCES).logps
    got = reference_logps(cfg, policy)(SEQUENCES)
    assert torch.allclose(got, expected, atol=1e-5) and not got.requires_grad
    assert (got - policy.lm(SEQUENCES).logps).abs().min() > 1e-3

    save_model(tmp_path / "small", tiny(Qwen2Config, vocab_size=290))
    cfg.ref_model_name_or_path = str(tmp_path / "small")
    with pytest.raises(InputError, match="small: has fewer tokens than the policy"):
        reference_of(cfg, policy, sigmoid, no_sequences)


def test_a_loss_without_a_reference_loads_and_computes_none(model_dir, monkeypatch):
    cfg = config(model_dir, "--ref_model_name_or_path", "nowhere", kind=DPOConfig)
    policy = load_policy(cfg)
    monkeypatch.setattr(policy.lm, "forward", no_sequences)
    reference = reference_of(cfg, policy, lambda policy, beta: ..., no_sequences)
    assert [logps.tolist() for logps in reference([SEQUENCES, SEQUENCES[1:]])] == [[0] * 3, [0]]
    with pytest.raises(InputError, match="nowhere"):
        reference_of(cfg, policy, sigmoid, no_sequences)


def test_full_fine_tuning_keeps_a_table(model_dir):
    cfg = config(model_dir, "--use_peft", "false", kind=DPOConfig)
    policy = load_policy(cfg)
    start = policy.lm(SEQUENCES).logps.detach()
    reference = reference_logps(cfg, policy, lambda: SEQUENCES * 2)
    disturb(policy, 0.05)
    assert torch.equal(reference(SEQUENCES[::-1]), start[[2, 0, 1]])
    second = replace(SEQUENCES[0], texts=SEQUENCES[0].texts[1:])
    assert torch.equal(reference([second]), start[1:2])


# ------------------------------------------------------------------------------------------ GGUF


def test_a_gguf_file(model_dir, tmp_path):
    """The same weights from a GGUF file give the same log-probs."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    write_gguf(gguf, model_dir, path)
    policy, expected = load_policy(config(path)), load_policy(config(model_dir))
    assert torch.allclose(policy.lm(SEQUENCES).logps, expected.lm(SEQUENCES).logps, atol=1e-4)

    whole = load_policy(config(path, "--use_peft", "false"))
    save_policy(whole, tmp_path / "saved")
    saved = load_policy(config(tmp_path / "saved"))
    assert torch.equal(saved.lm(SEQUENCES).logps, whole.lm(SEQUENCES).logps)

    path.write_bytes(b"GGUF")
    refused(path, None)


def write_gguf(gguf, model_dir, path):
    """A Llama and its byte-level tokenizer, as llama.cpp writes them: query and key rows permuted
    from halves to pairs of the rotary embedding."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    c, tensors = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)

    tokenizer = json.loads((make_tokenizer().backend_tokenizer).to_str())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    tokens += [f"[{i}]" for i in range(len(tokens), c.vocab_size)]
    special = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(special)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, tensor in tensors.items():
        for part, heads in (("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads)):
            if part in name:
                halves = tensor.view(heads, 2, -1, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
