"""Explains why the tensors of a checkpoint are not those of its model: the cause in one line, and a few names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from dpo_jax.types import InputError, listed

# Parts of names that wrappers of modules add, and the wrapper.
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "module.": "DistributedDataParallel or DeepSpeed",
    "base_model.model.": "PEFT",
    "base_layer.": "PEFT",
}
WRAPPER = re.compile(rf"(?<![^.])({'|'.join(map(re.escape, WRAPPERS))})")
UNKNOWN = "Compare config.json with the checkpoint; weights merged or saved by another tool may need converting first."


class Faults(NamedTuple):
    """Differences between the tensors of a checkpoint and those of its model."""

    missing: dict[tuple[str, ...], str]  # {possible names: shape}
    wrong: dict[str, str]  # {name: what its shape or type is, and should be}
    empty: list[str]  # names among `wrong` of tensors without any number
    unexpected: dict[str, str]  # {name: shape}

    @property
    def text(self) -> str:
        """Returns the differences, a few of each kind."""
        kinds = (
            [f"missing {' or '.join(names)} {shape}" for names, shape in self.missing.items()],
            [f"{name} {words}" for name, words in self.wrong.items()],
            [f"unexpected {name} {shape}" for name, shape in self.unexpected.items()],
        )
        return "; ".join(listed(kind, separator="; ") for kind in kinds if kind)


class Renaming(NamedTuple):
    """A change of names that gives a model its missing tensors."""

    names: dict[str, str]  # {name in the file: name in the model}
    fault: str  # follows "N names"
    code: str  # of Python: the new name of k

    @property
    def remedy(self) -> str:
        """Returns the ways out."""
        return (
            "Save the causal language model itself, without a wrapper; or rename the tensors in each file f, with "
            f"safetensors.torch: save_file({{{self.code}: v for k, v in load_file(f).items()}}, f, {{'format': 'pt'}})."
        )


def explain(
    faults: Faults, find: Callable[[Mapping[str, str]], Faults], *, place: str, adapter_remedy: str
) -> InputError:
    """Returns the error for a checkpoint whose tensors are not those of its model.

    Args:
      find: from {name in the file: another name}, the differences that are left when tensors are renamed so.
      adapter_remedy: where no cause is known; not empty where the tensors are those of an adapter.
    """
    causes, remedies = [], []
    if any("flat_param" in name for name in faults.unexpected):
        causes.append(
            f"FSDP has flattened the tensors of each module into one, such as {next(iter(faults.unexpected))}"
        )
        remedies.append("Save again with a full state dict (StateDictType.FULL_STATE_DICT).")
        faults = Faults({}, {}, [], {})
    merged = bool(adapter_remedy) or not any(".lora_" in name for name in faults.unexpected)
    if not merged:
        causes.append("the file holds an adapter that was not merged")
        remedies.append("Load it with PEFT, and save what merge_and_unload() returns.")
    if change := renaming(faults):
        name = next(iter(change.names))
        causes.append(f"{len(change.names)} names {change.fault}, such as {name} for {change.names[name]}")
        remedies += [change.remedy] * merged
        faults = find(change.names)
    if faults.empty:
        causes.append(
            f"{len(faults.empty)} tensors, such as {faults.empty[0]}, are empty, as in DeepSpeed ZeRO-3's parts"
        )
        remedies.append(
            "Save again with stage3_gather_16bit_weights_on_model_save in DeepSpeed's configuration, or run "
            "zero_to_fp32.py, which is beside DeepSpeed's own checkpoint."
        )
    explained = {*faults.empty, *(name for name in faults.unexpected if ".lora_" in name and not merged)}
    rest = faults._replace(
        wrong={name: words for name, words in faults.wrong.items() if name not in explained},
        unexpected={name: shape for name, shape in faults.unexpected.items() if name not in explained},
    )
    return InputError(
        place,
        got="; ".join([*causes, rest.text] if rest.text else causes),
        expected=f"exactly the tensors that {'adapter_config.json' if adapter_remedy else 'config.json'} describes",
        remedy=" ".join(remedies) or adapter_remedy or UNKNOWN,
    )


def renaming(faults: Faults) -> Renaming | None:
    """Returns the parts that unexpected names have too much or too little; None if missing names differ otherwise.

    Wrappers add parts anywhere; the rest of a name may have a prefix too many, or lack one.
    """
    missing = {name for names in faults.missing for name in names}
    wholes = {name[dot.end() :]: name for name in missing for dot in re.finditer(r"\.", name)}
    unwrapped = {name: WRAPPER.sub("", name) for name in faults.unexpected}

    def prefixes(name: str) -> tuple[str, str] | None:
        """Returns the prefix that the name of a missing tensor lacks, and the one that it has too many."""
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        surplus = next((name[:start] for start in starts if name[start:] in missing), None)
        if surplus is None:
            return (wholes[name].removesuffix(name), "") if name in wholes else None
        return "", surplus

    found = Counter(filter(None, map(prefixes, unwrapped.values()))).most_common(1)
    if not found:
        return None
    (lacks, surplus), _ = found[0]
    renamed = {name: lacks + inner.removeprefix(surplus) for name, inner in unwrapped.items()}
    names = {name: new for name, new in renamed.items() if new in missing}
    wrappers = {part: WRAPPERS[part] for part in WRAPPERS if any(part in WRAPPER.findall(name) for name in names)}
    fault = [f"have {' and '.join(f'{part} (of {tool})' for part, tool in wrappers.items())} in them"] * bool(wrappers)
    fault += [f"have {surplus} before them"] * bool(surplus) + [f"lack {lacks} before them"] * bool(lacks)
    code = "k" + "".join(f".replace({part!r}, '')" for part in wrappers)
    code += f".removeprefix({surplus!r})" if surplus else ""
    if lacks:  # other tensors, such as a head, may have the name they should
        starts = tuple(dict.fromkeys(f"{renamed[name].removeprefix(lacks).partition('.')[0]}." for name in names))
        code = f"{lacks!r} * k.startswith({starts!r}) + {code}"
    return Renaming(names, " and ".join(fault), code)
