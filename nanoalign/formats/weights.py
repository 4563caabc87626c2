"""A directory, a hub id or a .gguf file -> a model of transformers that takes examples.

`load_lm` loads it dense, as transformers does, or with its linear layers frozen in few bits, in one
of FORMATS. Embeddings, norms and the head stay dense, as in bitsandbytes. The experts of a mixture
are linear layers here (mixture.py); bitsandbytes leaves them dense.

Loading a dense model to quantize it afterwards takes the memory that 4 bits should save. So the
model is built on the meta device, where parameters have a shape and no memory, and its tensors are
read from the files one by one: each is cast, packed and forgotten before the next one is read. Some
files hold other tensors than the model (GGUF, .bin, some kinds of models), and transformers
converts them. Then the dense model is loaded first, and a printed line says so.
"""

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from nanoalign import InputError, one_line
from nanoalign.formats import files
from nanoalign.formats.bitsandbytes import DTYPES, PACKED, STATE, from_bitsandbytes, is_nf4
from nanoalign.formats.mixture import in_model, unstack
from nanoalign.logps import PackedLM
from nanoalign.model import probe
from nanoalign.nf4 import FrozenLinear, NF4Linear

NOTE = "base_quantization.json"  # in an adapter's directory: how its base was frozen
FORMATS = {"nf4": NF4Linear}  # --bnb_4bit_quant_type
Freeze = Callable[[nn.Linear, str], FrozenLinear]  # the string names it in errors


def load_lm(
    name: str, *, dtype: str = "auto", device: str = "auto", train_all: bool = False,
    trust_remote_code: bool = False, load_in_4bit: bool = False, quant_type: str = "nf4",
    double_quant: bool = False,
) -> PackedLM:  # fmt: skip
    """A model of transformers on its device, after the probe (model.py).

    With `train_all` the weights are fp32, and products are computed in `dtype` (autocast). With
    `load_in_4bit` the linear layers are in FORMATS[quant_type]; in a model that was saved in NF4
    they always are. InputError names the file and the tensor at fault.
    """
    kind, options = FORMATS[quant_type], {"double_quant": True} if double_quant else {}
    if load_in_4bit and not options.keys() <= inspect.signature(kind).parameters.keys():
        raise InputError(f"--use_bnb_nested_quant: {quant_type} does not quantize its scales")
    config = files.from_pretrained(AutoConfig, name, trust_remote_code=trust_remote_code)
    in_few_bits = load_in_4bit or is_nf4(config)
    build = partial(AutoModelForCausalLM.from_config, trust_remote_code=trust_remote_code)
    scale, softcap = probe(build, config, name, unstack if in_few_bits else None)
    device = pick_device(device)
    dtype = dtype_of(dtype, name, config, device)
    if in_few_bits:
        if train_all:
            raise InputError(f"{name}: 4-bit weights can't train; leave out --use_peft false")
        freeze = partial(kind.from_linear, **options)
        model = load_frozen(name, config, dtype, device, freeze, trust_remote_code)
    else:
        held_in = torch.float32 if train_all else dtype
        model = load_dense(name, held_in, device, trust_remote_code)
    autocast = dtype if train_all and dtype != torch.float32 else None
    return PackedLM(model.to(device), scale, softcap, autocast)


def dtype_of(asked: str, name: str, config, device: torch.device) -> torch.dtype:
    """The dtype `asked` for. "auto" is the checkpoint's dtype, but float16 if that is bfloat16 and
    the card can't multiply it (NVIDIA's before Ampere). A printed line tells of such a card."""
    auto = asked == "auto"
    dtype = (getattr(config, "dtype", None) or torch.float32) if auto else getattr(torch, asked)
    if dtype == torch.bfloat16 and device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            way = "float16 is used" if auto else "emulated, slowly; --fp16 is for it"
            print(one_line(f"{name}: is in bfloat16, which this card can't multiply; {way}"))
            return torch.float16 if auto else dtype
    return dtype


def pick_device(name: str) -> torch.device:
    if name == "auto":
        found = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator() if found else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None


def load_dense(name: str, dtype: torch.dtype, device="cpu", trust_remote_code=False) -> nn.Module:
    """The model as transformers loads it. InputError for what transformers would only warn of."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        files.read_index(name, index)  # checks the shards that it names
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # refused below, by name
    model, info = files.from_pretrained(AutoModelForCausalLM, name, **options)
    if str(name).endswith(".gguf"):  # the weights are dense now, and can be saved
        model.hf_quantizer = None
        vars(model.config).pop("quantization_config", None)
    faults = [f"missing keys in the weights: {key}" for key in sorted(info["missing_keys"])]
    for key, found, expected in sorted(info["mismatched_keys"]):
        faults.append(f"{key}: shape {tuple(found)}, expected {tuple(expected)}")
    named = model.to(device).named_parameters()  # on a GPU the search for NaN is quick
    faults += [f"{key} holds NaN or infinity" for key, t in named if not files.is_finite(t)]
    if faults:
        raise InputError(f"{name}: {faults[0]}")
    if extra := info["unexpected_keys"]:
        text = f"{len(extra)} tensors are not the model's and left out, e.g. {min(extra)}"
        print(one_line(f"{name}: {text}"))
    return model.requires_grad_(False)  # until load_policy says what trains


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers to freeze in few bits: all linear layers but the output head."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and m is not head}


def frozen_layers(model: nn.Module) -> dict[str, FrozenLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, FrozenLinear)}


def load_frozen(name, config, dtype, device, freeze: Freeze, trust_remote_code) -> nn.Module:
    """The model with its linear layers frozen, streamed from its files if that can be. All other
    weights are in `dtype`; a frozen layer's weights are rounded to it."""
    if in_nf4 := is_nf4(config):
        del config.quantization_config  # transformers would ask for bitsandbytes
    elif getattr(config, "quantization_config", None):
        raise InputError(f"{name}: quantized already, and not by bitsandbytes in NF4")
    model = skeleton(config, dtype, trust_remote_code)
    unstack(model)
    stored = in_model(files.stored_tensors(name), config.model_type)
    keys_of = {}  # {tensor: its names in the model}; a tied tensor has two
    for key, tensor in model.state_dict(keep_vars=True).items():
        keys_of.setdefault(tensor, []).append(key)
    reason = mismatch(model, keys_of, stored)
    if reason and in_nf4:
        raise InputError(f"{name}: can't be read in 4 bits: it {reason}")
    if reason:
        text = "so the dense model is loaded first and then quantized"
        print(one_line(f"{name}: {reason}; {text}"))
        model = load_dense(name, dtype, trust_remote_code=trust_remote_code)
        freeze_linears(model, device, freeze)
    else:
        stream(model, keys_of, stored, device, freeze)
        if files.local_file(name, "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(name)
    layers = list(frozen_layers(model).values())
    if not layers:
        raise InputError(f"{name}: has no linear layers to hold in 4 bits")
    frozen = sum(m.in_features * m.out_features for m in layers)
    bits = 8 * sum(b.nbytes for m in layers for b in m.buffers()) / frozen
    kind = type(layers[0]).__name__.removesuffix("Linear").upper()
    share = frozen / all_weights(model)
    where = f"{share:.0%} of all weights are {len(layers)} linear layers in {kind}"
    print(f"{where}: {bits:.2f} bits per parameter")
    return model.requires_grad_(False).eval()


def all_weights(model: nn.Module) -> int:
    """The number of weights; model.parameters() does not list those in few bits."""
    frozen = sum(m.in_features * m.out_features for m in frozen_layers(model).values())
    return frozen + sum(p.numel() for p in model.parameters())


def freeze_linears(model: nn.Module, device, freeze: Freeze = NF4Linear.from_linear) -> None:
    """Freeze the linear layers of a dense model, those of experts too, one by one, in place."""
    unstack(model)
    for name, linear in linears(model).items():
        model.set_submodule(name, freeze(linear.to(device), f"{name}.weight"))


def skeleton(config, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The model with its parameters on the meta device. Buffers (rotary frequencies, say) are in no
    file and must be computed, so only parameters go to meta, when a module registers them."""

    def to_meta(module, name, parameter):
        return parameter if parameter.is_meta else nn.Parameter(parameter.to("meta"))

    hook, kind = register_module_parameter_registration_hook(to_meta), AutoModelForCausalLM
    try:
        return kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    finally:
        hook.remove()


def mismatch(model: nn.Module, keys_of: dict, stored: dict[str, files.Stored]) -> str | None:
    """What in the files differs from the skeleton, if transformers may know to convert it; None if
    nothing does.

    Tensors that are only missing, or only too many, raise an InputError. Buffers in the files don't
    count. A tied tensor may have either of its names.
    """
    if not stored:
        return "has no safetensors files"
    missing = [keys[0] for keys in keys_of.values() if stored.keys().isdisjoint(keys)]
    packed = {name + suffix for name in linears(model) for suffix in PACKED}
    computed = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    extra = sorted(stored.keys() - packed.union(*keys_of.values()))
    extra = [key for key in extra if key.rpartition(".")[2] not in computed]
    if missing and extra:
        return f"has {extra[0]} and not {missing[0]}"
    if missing:
        raise InputError(f"{next(iter(stored.values())).path.parent}: no file holds {missing[0]}")
    if extra:
        raise InputError(f"{stored[extra[0]]} is not in the model")


def stream(model: nn.Module, keys_of: dict, stored: dict, device, freeze) -> None:
    """Fill a skeleton, tensor by tensor, and freeze its linear layers. From files in bitsandbytes'
    layout the layers in NF4 are taken as they are, and no others are frozen."""
    packed = [name for name in linears(model) if name + STATE in stored]
    frozen = packed or list(linears(model))
    for like, keys in keys_of.items():
        if keys[0].removesuffix(".weight") in frozen:
            continue  # read below
        first = None
        for key in filter(stored.get, keys):
            tensor = files.read_tensor(stored[key], device, like)
            if tensor.is_floating_point() and not files.is_finite(tensor):
                raise InputError(f"{stored[key]} holds NaN or infinity")
            if first is not None and not torch.equal(tensor, first):
                raise InputError(f"{stored[key]} differs from what config.json ties it to")
            first = tensor
        for name, _, leaf in (key.rpartition(".") for key in keys):
            setattr(model.get_submodule(name), leaf, first)
    for name in frozen:
        linear, key = model.get_submodule(name), f"{name}.weight"
        if packed:
            where = f"{stored[name + STATE].path}: "  # errors show these names
            keys = [name + suffix for suffix in PACKED if name + suffix in stored]
            tensors = {where + key: files.read_tensor(stored[key], device) for key in keys}
            layer = from_bitsandbytes(tensors, where + name, linear.weight.shape)
            layer.bias = linear.bias
        else:
            linear.weight = files.read_tensor(stored[key], device, linear.weight)
            layer = freeze(linear, str(stored[key]))
            linear.weight = None  # free it, whoever holds the old layer
        model.set_submodule(name, layer)


def write_note(model: nn.Module, directory: Path) -> None:
    """Write beside an adapter how its base was frozen, if it was.

    An adapter is trained to fit the rounding of its base, so a merge must use the same. It is a
    file of its own because PEFT warns of keys in adapter_config.json that it does not know.
    """
    path, layer = Path(directory) / NOTE, next(iter(frozen_layers(model).values()), None)
    if layer is None:
        return path.unlink(missing_ok=True)  # an older adapter's, which is overwritten
    note = {
        "bnb_4bit_quant_type": next(name for name, kind in FORMATS.items() if type(layer) is kind),
        "bnb_4bit_use_double_quant": vars(layer).get("double_quant", False),
        "dtype": str(layer.dtype).removeprefix("torch."),
    }
    path.write_text(json.dumps(note, indent=2) + "\n")


def read_note(directory: str | Path) -> dict | None:
    """The note as load_lm's quant_type, double_quant and dtype; None if there is none."""
    path = Path(directory) / NOTE
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        kind, dtype = note["bnb_4bit_quant_type"], note["dtype"]
        FORMATS[kind], DTYPES[dtype]
        double_quant = bool(note["bnb_4bit_use_double_quant"])
        return {"quant_type": kind, "double_quant": double_quant, "dtype": dtype}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not what was written here: {error!r}") from None


def format_for(adapter: str | None, quant_type: str, double_quant: bool) -> dict:
    """load_lm's quant_type and double_quant for an adapter's base: those of the adapter's note, or
    else the flags. InputError if flags were set and the note says otherwise."""
    asked = {"quant_type": quant_type, "double_quant": double_quant}
    note = adapter and read_note(adapter) or asked
    if quant_type not in ("nf4", note["quant_type"]) or double_quant > note["double_quant"]:
        raise InputError(f"{adapter}: trained on another base than the flags ask for: {note}")
    return {key: note[key] for key in asked}
