"""Make one ordinary model of an adapter and its base.

    python -m nanoalign.merge runs/dpo merged --dtype float32

Each weight becomes W + scaling * B A. The sum is computed in fp32 and rounded once. Trained token
vectors, biases and other modules replace the old ones. So the adapter costs nothing at inference.

A base in 4 bits: the adapter was trained on the rounded weights, and a part of what it has learned
makes up for the rounding. So the merge adds the change to the rounded weights, and saves the sum
without quantization. This is exactly the model that was trained. With the original weights it would
be another. The sum is not rounded to 4 bits again. That would undo all changes smaller than half a
step, and often everything learned is that small (experiments/merge_4bit.py measures it).

Our training writes a note beside the adapter if its base was in 4 bits. Other tools do not, so
--load_in_4bit says it.

A model in 4 bits: if MODEL is not an adapter, --load_in_4bit saves it in NF4 as transformers with
bitsandbytes does.

    python -m nanoalign.merge MODEL four --load_in_4bit

Ollama does not read the chat template of a model directory. For it a `Modelfile` beside the merged
model has the template and the ends of a reply.
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
# If Ollama can't import this model, convert it with llama.cpp and name the .gguf here.
FROM .
"""
GO = '''\
# The ChatML of the training, in Go's template language, without tools and thoughts.
TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
'''
NO_GO = """\
# The template of the training is not available in Go's template language. Copy the TEMPLATE line
# from the base model's page at Ollama, or the prompts may differ from those of the training.
"""
FLAGS = ("dtype", "bnb_4bit_quant_type", "use_bnb_nested_quant", "device", "trust_remote_code")


@torch.no_grad()
def merge_adapter(model: nn.Module, dtype: torch.dtype) -> None:
    """Merge everything that add_adapter added, in place. All weights are in `dtype` afterwards."""
    names = [name for name, module in model.named_modules() if hasattr(module, "merge")]
    for name in names:
        if not any(name.startswith(f"{outer}.") for outer in names):  # `plain` merges inner ones
            model.set_submodule(name, to_dtype(plain(model.get_submodule(name)), dtype))
    to_dtype(model, dtype)
    model.config.tie_word_embeddings = tied(model)  # not any more, if only the head was trained


def to_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert parameters. Buffers stay as they are: rotary frequencies need fp32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def modelfile(template: str | None, stops: list[str]) -> str:
    """The Modelfile of a model that was trained with this template. `stops` end a reply."""
    lines = [f'PARAMETER stop "{token}"\n' for token in stops]
    return "".join([MODELFILE, GO if template == "chatml" else NO_GO, *lines])


@command("nanoalign.merge")
def main(argv: list[str] | None = None) -> None:
    """Merge an adapter into its base, or write a model in 4 bits."""
    parser = Parser(prog="nanoalign.merge", allow_abbrev=False, description=__doc__)
    parser.add_argument(
        "adapter_name_or_path", metavar="adapter", help="directory of an adapter, or a model"
    )
    parser.add_argument("directory", type=Path, help="a new directory for the merged model")
    parser.add_argument("--model_name_or_path", help="a base instead of the one that it names")
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
    """Write the model `name` in NF4 to a directory that bitsandbytes reads."""
    if args.model_name_or_path or args.bnb_4bit_quant_type != "nf4":
        fault = "--model_name_or_path" if args.model_name_or_path else "--bnb_4bit_quant_type"
        raise InputError(f"{fault}: {name} is no adapter, and is written in NF4 as it is")
    trust = {"trust_remote_code": args.trust_remote_code}
    options = dict(dtype=args.dtype, device=args.device, double_quant=args.use_bnb_nested_quant)
    model = load_lm(name, load_in_4bit=True, **options, **trust).model
    tokenizer = from_pretrained(AutoTokenizer, name, **trust)

    def write(path):
        save_4bit(model, path)
        tokenizer.save_pretrained(path)

    write_whole(directory, write, into=True)
    print(f"saved in {directory}, in NF4")


@torch.no_grad()
def merge(args, adapter: str, directory: Path) -> None:
    base, with_tokenizer, lora = base_of(args)
    note = read_note(adapter)
    trust = {"trust_remote_code": args.trust_remote_code}
    tokenizer = from_pretrained(AutoTokenizer, with_tokenizer, **trust)

    if args.load_in_4bit:  # not in args.dtype: the weights were rounded from the base's dtype
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
        to_dtype(model, dtype)  # to compute in it; 4-bit weights do not change
    add_adapter(model, lora)
    load_adapter(model, lora, adapter)
    model.eval()
    template = tokenizer.init_kwargs.get(TRAINED_WITH)
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if template in [*TEMPLATES]:  # it is not, if another tool trained the adapter
        stops = TEMPLATES[template](tokenizer).stop_ids
    stop_at(model, stops)
    for_ollama = modelfile(template, tokenizer.convert_ids_to_tokens(stops))

    def write(path, weights=None):
        model.save_pretrained(path, state_dict=weights)
        tokenizer.save_pretrained(path)
        (path / "Modelfile").write_text(for_ollama, encoding="utf-8")

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
