"""An adapter and its base -> one ordinary model that anything can open.

    python -m nanoalign.merge runs/dpo merged --dtype float32

W + scaling * B A becomes the weight, in fp32 and rounded once; token rows, modules that trained
whole and trained biases take their places. Then the adapter costs nothing at inference.

**A base in 4 bits.** An adapter that was trained on a 4-bit base has learned a change of the
ROUNDED weights, and part of what it learned is to make up for the rounding. So the merge is with
those: dequantize, add, save dense. It is exact, whereas the original bf16 weights plus the adapter
are a model that nobody trained or measured. Rounding the sum to 4 bits again would undo the changes
that are smaller than half a step, all that a gentle adapter has learned (experiments/merge_4bit.py
measures it), so it is never done here.

Training notes beside the adapter that its base was in 4 bits, and how. Adapters of other tools
don't say: --load_in_4bit does.

**A model in 4 bits.** Without an adapter, --load_in_4bit writes a model as transformers with
bitsandbytes writes it, in NF4: bytes that both read as they are.

    python -m nanoalign.merge MODEL four --load_in_4bit

**Ollama** doesn't read the chat template of a directory. A `Modelfile` beside the merged model says
in its language what prompts look like and what ends a reply.
"""

from argparse import BooleanOptionalAction
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

from nanoalign import InputError
from nanoalign.formats.bitsandbytes import save_4bit
from nanoalign.formats.files import from_pretrained
from nanoalign.formats.peft import add_adapter, load_adapter
from nanoalign.formats.templates import TEMPLATES
from nanoalign.formats.weights import load_lm, read_note
from nanoalign.lora import plain, tied
from nanoalign.run.command import command
from nanoalign.run.files import is_free, locked, rehearse, write_whole
from nanoalign.run.flags import Parser, add_flags
from nanoalign.run.policy import TRAINED_WITH, base_of, make_room, stop_at

SAMPLE = "The quick brown fox jumps over the lazy dog. Why is the sky blue? 2 + 2 = 4, 7 * 8 = 56."
MODELFILE = """\
# ollama create NAME -f Modelfile
# For an architecture that Ollama imports; otherwise FROM a .gguf of llama.cpp's converter.
FROM .
"""
GO = '''\
# ChatML as training wrote it, in Go's template language, without tools and thoughts.
TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
'''
NO_GO = """\
# Trained with a template that is not written here in Go's language: without a TEMPLATE line Ollama
# may write other prompts. Take the line from the page of the base model there.
"""
FLAGS = ("dtype", "bnb_4bit_quant_type", "use_bnb_nested_quant", "device", "trust_remote_code")


@torch.no_grad()
def merge_adapter(model: nn.Module, dtype: torch.dtype) -> None:
    """Merge what add_adapter added, in place; the model is dense afterwards, in `dtype`."""
    names = [name for name, module in model.named_modules() if hasattr(module, "merge")]
    for name in names:
        if not any(name.startswith(f"{outer}.") for outer in names):  # one may wrap another
            model.set_submodule(name, to_dtype(plain(model.get_submodule(name)), dtype))
    to_dtype(model, dtype)
    model.config.tie_word_embeddings = tied(model)  # a head that trained on its own is not


def to_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters only: a computed buffer (rotary frequencies) keeps its fp32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def modelfile(template: str | None, stops: list[str]) -> str:
    """What Ollama is told of a model that was trained with this template, and whose replies end
    with one of these tokens."""
    lines = [f'PARAMETER stop "{token}"\n' for token in stops]
    return "".join([MODELFILE, GO if template == "chatml" else NO_GO, *lines])


@command("nanoalign.merge")
def main(argv: list[str] | None = None) -> None:
    """Write base + adapter to a directory, dense, in --dtype (auto: that of the base)."""
    parser = Parser(prog="nanoalign.merge", allow_abbrev=False, description=__doc__)
    parser.add_argument(
        "adapter_name_or_path", metavar="adapter", help="directory of an adapter; a model"
    )
    parser.add_argument("directory", type=Path, help="where the merged model goes")
    parser.add_argument("--model_name_or_path", help="another base than it names")
    parser.add_argument("--load_in_4bit", action=BooleanOptionalAction, help="base was in 4 bits")
    add_flags(parser, *FLAGS)
    args = parser.parse_args(argv)
    if not is_free(args.directory):
        raise InputError(f"{args.directory}: not empty")
    with locked(args.directory):
        adapter = args.adapter_name_or_path
        if args.load_in_4bit and not (Path(adapter) / "adapter_config.json").exists():
            write_4bit(args, adapter, args.directory)
        else:
            merge(args, adapter, args.directory)


def write_4bit(args, name: str, directory: Path) -> None:
    """The model `name` in NF4, to a directory that bitsandbytes reads."""
    if args.model_name_or_path or args.bnb_4bit_quant_type != "nf4":
        fault = "--model_name_or_path" if args.model_name_or_path else "--bnb_4bit_quant_type"
        raise InputError(f"{fault}: {name} is no adapter, and is written in NF4 as it is")
    trust = {"trust_remote_code": args.trust_remote_code}
    how = {"dtype": args.dtype, "device": args.device, "double_quant": args.use_bnb_nested_quant}
    model = load_lm(name, load_in_4bit=True, **how, **trust).model
    tokenizer = from_pretrained(AutoTokenizer, name, **trust)

    def write(place):
        save_4bit(model, place)
        tokenizer.save_pretrained(place)

    write_whole(directory, write, into=True)
    print(f"saved in {directory}, in NF4")


@torch.no_grad()
def merge(args, adapter: str, directory: Path) -> None:
    base, with_tokenizer, lora = base_of(args)
    note = read_note(adapter)
    trust = {"trust_remote_code": args.trust_remote_code}
    tokenizer = from_pretrained(AutoTokenizer, with_tokenizer, **trust)

    if args.load_in_4bit:  # in the dtype that the weights were rounded from, whatever is written
        kind, double_quant = args.bnb_4bit_quant_type, args.use_bnb_nested_quant
        base_format = {"load_in_4bit": True, "quant_type": kind, "double_quant": double_quant}
    elif note and args.load_in_4bit is None:
        base_format = {"load_in_4bit": True, **note}
    else:
        base_format = {"dtype": args.dtype}
    model = load_lm(base, device=args.device, **trust, **base_format).model
    dtype = model.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    make_room(model, tokenizer, lora, adapter)
    if dtype == torch.float32:
        to_dtype(model, dtype)  # computes in it; 4-bit weights remain what they were
    add_adapter(model, lora)
    load_adapter(model, lora, adapter)
    model.eval()
    template = tokenizer.init_kwargs.get(TRAINED_WITH)
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if template in [*TEMPLATES]:  # otherwise another tool trained the adapter
        stops = TEMPLATES[template](tokenizer).stop_ids
    stop_at(model, stops)
    for_ollama = modelfile(template, tokenizer.convert_ids_to_tokens(stops))

    def write(place, weights=None):
        model.save_pretrained(place, state_dict=weights)
        tokenizer.save_pretrained(place)
        (place / "Modelfile").write_text(for_ollama, encoding="utf-8")

    rehearse(directory, partial(write, weights={}))
    ids = torch.tensor([tokenizer(SAMPLE)["input_ids"]], device=model.device)
    before = model(ids, use_cache=False).logits[0].float()  # (T, V)
    merge_adapter(model, dtype)
    change = (model(ids, use_cache=False).logits[0].float() - before).abs().max()
    write_whole(directory, write, into=True)
    print(
        f"largest change of a logit on {len(before)} sample tokens: {change:.2g}; "
        f"the largest logit is {before.abs().max():.3g}"
    )
    print(f"saved in {directory}, dense in {str(dtype).removeprefix('torch.')}")


if __name__ == "__main__":
    main()
