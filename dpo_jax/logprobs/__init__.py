"""Log-probabilities of answer tokens from hidden states, without an array of all their logits.

`completions` scores the tokens of packed rows and sums them by completion, with its backward pass; `vocabulary` holds
the head, its parts and how it is sharded.
"""

from dpo_jax.logprobs.completions import SUMS, completion_logps, score_tokens, sum_by_slot

__all__ = ["SUMS", "completion_logps", "score_tokens", "sum_by_slot"]
