"""Which kinds of models train here: python tests/families.py [--write] [KIND ...]

Every kind that transformers' AutoModelForCausalLM knows is built tiny, with random weights, without
a network. It is refused by the probe, or it is EQUAL: a row of several texts gives the log-probs
and the gradients of transformers' own forward, text by text, in fp32. --write writes the table into
docs/families.md. A kind that is accepted and not equal is an error.
"""

import sys
from pathlib import Path

import torch
import transformers
from conftest import make_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from nanoalign import InputError
from nanoalign.fast.miniature import miniature
from nanoalign.lora import linear_names
from nanoalign.model import make_policy, probe
from nanoalign.packing import Example

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
MARK = "<!-- python tests/families.py --write -->"  # what follows it on the page is written
EQUAL, REFUSED, UNTRIED = "equal", "refused", "not tried"
KINDS = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
ELSEWHERE = {  # made for other tasks: encoders, and those with encoder and decoder
    *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    *modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}
SIZES = dict(
    vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
    initializer_range=0.2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4,
    num_experts_per_tok=2, moe_k=2, moe_topk=2, sliding_window=8, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16, n_group=1, topk_group=1,
    n_embd=64, n_layer=2, n_head=4, n_positions=512, d_model=64, ffn_dim=64,
)  # fmt: skip
PAIR = ["full_attention"] * 2
MORE = {  # what a kind needs beside them, or what makes it the kind that it is
    "bailing_hybrid": {"pad_token_id": 0},
    "dots1": {"n_shared_experts": 1},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gemma4_text": {"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
}
SHARED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
VARIANTS = {  # name: kind, settings
    "gemma4_text with shared keys": (
        "gemma4_text",
        {**MORE["gemma4_text"], **SHARED, "num_hidden_layers": 4},
    ),
    "granitemoehybrid, attention only": ("granitemoehybrid", {"layer_types": PAIR}),
    "phimoe without a window": ("phimoe", {"sliding_window": None}),
}
BATCH = [
    Example(list(range(3, 15)), [([*range(20, 40)], [True] * 20), ([9, 8, 7], [True] * 3)]),
    Example([30, 31], [([*range(40, 70)], [True, False] * 15)]),
]


def config_of(name: str):
    """A small config of a kind, by the settings that it has, with layers of each of its kinds."""
    kind, more = VARIANTS.get(name, (name, MORE.get(name, {})))
    make = CONFIG_MAPPING[kind]
    default = make()
    known = default.to_dict()
    sizes = {key: size for key, size in SIZES.items() if key in known}
    sizes |= {key: 0 for key in ("pad_token_id", "bos_token_id", "eos_token_id") if known.get(key)}
    if "kv_lora_rank" in known:  # each head has a key of its own, of two parts
        sizes |= {"num_key_value_heads": 4}
        sizes.pop("head_dim", None)
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or []))
    if len(kinds) > 1:
        sizes |= {"num_hidden_layers": len(kinds), "layer_types": kinds}
    try:
        return make(**(sizes | more))
    except Exception:  # its settings depend on each other; the probe makes it small
        return default


def by_text(model, batch) -> torch.Tensor:
    """log pi of each completion, by transformers' own forward of each text alone."""
    found = []
    for e in batch:
        for ids, mask in e.texts:
            text = torch.tensor([e.prompt + ids])
            logps = model(text, use_cache=False).logits[0, len(e.prompt) - 1 : -1].log_softmax(-1)
            logps = logps.gather(1, torch.tensor(ids)[:, None])[:, 0]
            found.append(logps[torch.tensor(mask)].sum())
    return torch.stack(found)


def gradient(model, logps) -> torch.Tensor:
    model.zero_grad()
    (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def verdict(name: str) -> tuple[str, str]:
    """-> EQUAL and what is to be known of it, or REFUSED and why, or UNTRIED."""
    try:
        config = config_of(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(miniature(config))
        if sum(p.numel() for p in model.parameters()) > 5e7:
            return UNTRIED, "no small model of the kind could be built"
        probe(AutoModelForCausalLM.from_config, config, "M")
    except InputError as error:
        why = str(error).rpartition("can't be trained here: ")[2]
        return REFUSED, why.partition("; docs/")[0].partition(" (")[0]
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")
        return UNTRIED, "no small model of the kind could be built"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    expected = by_text(model, BATCH)
    theirs = gradient(model, expected)
    policy = make_policy(model, make_tokenizer())
    got = policy(BATCH).logps
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-4), f"{name}: {got} for {expected}"
    ours = gradient(model, got)
    assert (ours - theirs).norm() < 1e-4 * theirs.norm(), f"{name}: gradients differ"
    notes = []
    try:
        linear_names(model)
    except InputError:
        notes.append("all weights only: it has no linear layers for LoRA")
    if {"router_aux_loss_coef", "aux_loss_coef"} & vars(model).keys():
        notes.append("a mixture of experts with its load-balancing loss")
    return EQUAL, ", ".join(notes) or "LoRA or all weights"


def listed(verdicts: dict[str, tuple[str, str]]) -> str:
    """What the page says of them."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, (found, note) in verdicts.items():
        if found != EQUAL and name in ELSEWHERE:
            found, note = REFUSED, "made for other tasks: an encoder, or encoder and decoder"
        groups.setdefault((found, note), []).append(f"`{name}`")
    versions = (
        f"transformers {transformers.__version__} and torch {torch.__version__.split('+')[0]}"
    )
    number = sum(found == EQUAL for found, _ in verdicts.values())
    lines = [f"With {versions}, {number} of {len(verdicts)} are equal.\n"]
    for verdict in (EQUAL, REFUSED, UNTRIED):
        lines += [f"## {verdict.capitalize()}\n", "| note | kinds |", "|---|---|"]
        for (found, note), names in sorted(groups.items()):
            if found == verdict:
                lines.append(f"| {note} | {', '.join(names)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    wanted = [word for word in sys.argv[1:] if word != "--write"] or sorted({*KINDS, *VARIANTS})
    verdicts = {}
    for name in wanted:
        verdicts[name] = verdict(name)
        print(name, *verdicts[name], sep=": ", flush=True)
    if "--write" in sys.argv:
        head, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
        PAGE.write_text(head + mark + "\n\n" + listed(verdicts), encoding="utf-8")


if __name__ == "__main__":
    main()
