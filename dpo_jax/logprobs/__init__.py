"""Log-probabilities of answer tokens, without an array of all their logits."""

from dpo_jax.logprobs.completions import SUMS, completion_logps, score_tokens, sum_by_slot

__all__ = ["SUMS", "completion_logps", "score_tokens", "sum_by_slot"]
