"""A byte-level BPE tokenizer made on the spot, in the variants that tests need: no network, no model."""

from __future__ import annotations

import functools

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["Human: is the sky blue? Assistant: yes, the sky is blue. no, it is green. the the sky sky"] * 8

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Ends the generation header with text that a finished answer lacks, as DeepSeek-R1's does.
THINKING = CHATML.replace("assistant\n", "assistant\n<think>\n")
# Writes BOS and ends each answer with EOS, as Llama 2's does; the header is the end of the user's turn.
BOS_AND_EOS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[' + m.content + ']' }}{% endif %}{% endfor %}"
)


@functools.cache
def _trained() -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=2,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def make_tokenizer(
    *, adds: str = "$A", pad: str | None = None, bos: str | None = "<bos>", template: str | dict[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens above.

    Args:
      adds: what it puts around a text, such as "<bos> $A <eos>".
      pad, bos: the tokens of these names; eos is <eos>.
      template: its chat template, or several by name.
    """
    backend = tokenizers.Tokenizer.from_str(_trained())
    ids = [(token, backend.token_to_id(token)) for token in SPECIALS]
    backend.post_processor = processors.TemplateProcessing(adds, None, ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="<eos>", pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer
