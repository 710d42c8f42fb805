"""A language model from a Hugging Face folder, for scripts and notebooks: log-probs of answers and hidden states."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import ArrayLike, Float, PyTree
from transformers import PreTrainedTokenizerBase

from dpo_jax import config as fields
from dpo_jax import losses, sharding
from dpo_jax.data import marks
from dpo_jax.data.formats import render
from dpo_jax.data.layout import collate
from dpo_jax.data.tokenize import Outcome, TokenizationRules, encode, load_tokenizer
from dpo_jax.hf import checkpoints, folders
from dpo_jax.models.config import DecoderConfig
from dpo_jax.parallel import ModelOptions, Placement, make_hidden_fn, model_sharding, split_params
from dpo_jax.run import programs, state
from dpo_jax.run.choices import trainable_of
from dpo_jax.run.inputs import Source
from dpo_jax.runtime.files import Path
from dpo_jax.runtime.reading import copied
from dpo_jax.runtime.xla import COMPILER_OPTIONS
from dpo_jax.scoring import score_pairs
from dpo_jax.types import Encoded, InputError, Row, listed

Message: TypeAlias = Mapping[str, object]  # with `role` and `content`, as for `tokenizer.apply_chat_template`
SHORTEST = 64  # tokens; programs for shorter texts take as many

Text: TypeAlias = str | Sequence[Message]


class Compiled(NamedTuple):
    """Programs for batches of one shape."""

    scoring: programs.Programs
    hidden: Callable[[PyTree, PyTree, ArrayLike], jax.Array]  # (params, rows [A, ...], microbatch) -> [R, S, D]


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A decoder with its parameters on a device mesh, and its tokenizer."""

    path: Path  # Hugging Face folder that it is from
    config: DecoderConfig
    params: PyTree  # nested dict of arrays, see `models.config`
    tokenizer: PreTrainedTokenizerBase
    mesh: Mesh
    _programs: Callable[[np.ndarray], Compiled]  # for pairs of these lengths

    def logps(self, prompts: Sequence[Text], answers: Sequence[Text]) -> Float[np.ndarray, "N"]:
        """Returns the log-probability of each answer after its prompt, in nats, summed over the answer's tokens.

        They are the numbers that a run computes of the same texts: text starts with the tokenizer's BOS, if it has one,
        and an answer ends in EOS, which counts; messages are written by the chat template, and the turns of the
        assistant count.

        Args:
          prompts, answers: N texts, or N lists of messages. An answer to messages may be text.
        Raises: InputError for an empty answer, and for what does not fit into the positions of the model.
        """
        encoded = self._encode(prompts, answers)
        lengths = np.array([each.lengths for each in encoded]).reshape(-1, 3)
        found = np.zeros(len(encoded), np.float32)
        if not encoded:
            return found
        built, _ = self._programs(lengths)
        for part in score_pairs(functools.partial(built.score, self.params), encoded, lengths, shape=built.score_shape):
            found[part.indices] = part.logps[:, 0]
        return found

    def hidden(self, prompts: Sequence[Text], answers: Sequence[Text]) -> list[Float[np.ndarray, "tokens D"]]:
        """Returns the final hidden states, normalized, of all tokens of each prompt and its answer, as the head reads.

        Args:
          prompts, answers: as for `logps`.
        Returns: for each, an array [tokens, D] in float32; the tokens are those of `token_ids`.
        """
        # The last token of a sequence takes no position in a row, so one more is put at the end.
        end = np.zeros(1, np.int32)
        sequences = [Encoded(ids, end, end[:0]) for ids in self.token_ids(prompts, answers)]
        found: list[np.ndarray] = []
        if not sequences:
            return found
        built, hidden_fn = self._programs(np.array([each.lengths for each in sequences]))
        for start in range(0, len(sequences), built.score_shape.pairs):
            part = sequences[start : start + built.score_shape.pairs]
            batch = collate(part, None, built.score_shape)
            on_mesh = sharding.put(batch, self.mesh)
            states = [np.asarray(hidden_fn(self.params, on_mesh.rows, i)) for i in range(int(batch.count))]
            for pair, each in enumerate(part):
                micro, row, entry = np.argwhere(batch.rows.slot == 2 * pair)[0]
                after = batch.rows.source[micro, row, entry] + 1
                found.append(states[micro][row, after - len(each.prompt) : after].astype(np.float32))
        return found

    def token_ids(self, prompts: Sequence[Text], answers: Sequence[Text]) -> list[np.ndarray]:
        """Returns the token ids of each prompt and its answer, as one sequence."""
        encoded = self._encode(prompts, answers)
        return [np.concatenate([each.prompt, marks.unmark(each.chosen)]) for each in encoded]

    def _encode(self, prompts: Sequence[Text], answers: Sequence[Text]) -> list[Encoded]:
        if isinstance(prompts, str) or isinstance(answers, str) or len(prompts) != len(answers):
            raise InputError(
                "prompts, answers",
                got="a single text"
                if isinstance(prompts, str) or isinstance(answers, str)
                else "lists of other lengths",
                expected="a list of prompts and a list of as many answers",
                remedy="Put single ones into lists.",
            )
        rows = [
            Row(f"pair {i}", {"prompt": _plain(prompt), "completion": _plain(answer), "label": True})
            for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        pairs = [pair for row in rows for pair in render(row, format="unpaired", tokenizer=self.tokenizer)]
        room = self.config.max_positions
        outcomes = encode(pairs, self.tokenizer, TokenizationRules(self.config.vocab_size, room, room - 1, "keep_end"))
        for pair, outcome in zip(pairs, outcomes, strict=True):
            if isinstance(outcome, InputError):
                raise outcome
            if not isinstance(outcome, Outcome) or outcome.prompt_cut or any(outcome.answer_cuts):
                expected = f"at most {room} tokens, the positions of the model"
                raise InputError(pair.place, got="too long", expected=expected, remedy="Shorten it.")
            left_out = [*pair.omissions, *outcome.omissions]
            if left_out:
                parts = listed([each.part for each in left_out])
                expected = "text that chat template and tokenizer write whole"
                raise InputError(pair.place, got=f"{parts} is left out", expected=expected, remedy="Leave it out.")
        return [outcome.encoded for outcome in outcomes if isinstance(outcome, Outcome)]


def load(
    path: str | Path,
    *,
    adapter: str | Path = "",
    dtype: str = "auto",
    param_dtype: str = "float32",
    replica: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[object] | None = None,
) -> LanguageModel:
    """Loads a language model onto the devices, as a run does.

    Args:
      path: Hugging Face folder or Hub id, such as the `export/` of a run.
      adapter: PEFT folder or Hub id of an adapter, which is added to the model.
      dtype: in which it computes: auto (bfloat16, on a CPU float32), float32 or bfloat16.
      param_dtype: of its parameters, float32 or bfloat16.
      replica, fsdp, tensor: sizes of the mesh's axes, see `config.Mesh`; -1: all devices that are left.
      devices: of the mesh; None: all.
    Raises: InputError for a folder that is no model, or of a family that is not supported.
    """
    chosen = fields.Config(
        model=fields.Model(path=str(path), dtype=dtype, param_dtype=param_dtype),
        mesh=fields.Mesh(replica=replica, fsdp=fsdp, tensor=tensor),
        lora=fields.Lora(path=str(adapter)),
    )
    folder = folders.resolve(path, "path")
    model, _ = checkpoints.read_config(folder)
    checkpoints.check_weights(folder, model)
    checkpoints.check_tokenizer(folder)
    trainable = trainable_of(chosen, checkpoints.family_table(folder, model)[0], model)
    used = None if devices is None else [*devices]
    compiled: dict[int, Compiled] = {}

    def programs_for(lengths: np.ndarray) -> Compiled:
        # As if every text were as long as the longest, rounded up to a power of two: few programs serve all calls.
        longest = int(lengths.sum(1).max())
        rounded = max(longest, min(model.max_positions, max(SHORTEST, 1 << (longest - 1).bit_length())))
        if rounded not in compiled:
            objective, alike = losses.make_loss("sft"), np.array([[rounded - 2, 2, 0]])
            built = programs.make_programs(chosen, objective, model, alike, trainable=trainable, devices=used)
            compiled[rounded] = Compiled(built, _make_hidden(built))
        return compiled[rounded]

    built, _ = programs_for(np.array([[1, 1, 0]]))
    adapter_folder = folders.resolve(adapter, "adapter") if adapter else None
    params = state.load_params(Source(folder, adapter_folder, 0), built)
    return LanguageModel(
        folder, model, params, load_tokenizer(str(copied(folder, folders.is_small))), built.mesh, programs_for
    )


def _plain(text: Text) -> object:
    """Returns messages as lists of dicts, as they are read from a file; text as it is."""
    return text if isinstance(text, str) else [dict(message) for message in text]


def _make_hidden(built: programs.Programs) -> Callable[[PyTree, PyTree, ArrayLike], jax.Array]:
    options = ModelOptions(built.dtype, built.remat, built.attention, built.trainable.adapters)
    placement = Placement(built.mesh, built.rules)
    hidden_fn = make_hidden_fn(built.model, options, placement.platform, model_sharding(built.model, placement))

    def hidden(params: PyTree, rows: PyTree, microbatch: ArrayLike) -> jax.Array:
        return hidden_fn(split_params(params, None, None), jax.tree.map(lambda x: x[microbatch], rows))[0]

    return jax.jit(hidden, out_shardings=sharding.replicated(built.mesh), compiler_options=COMPILER_OPTIONS)
