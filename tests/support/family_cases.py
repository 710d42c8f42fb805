"""Small models of every family: one with the default of every option, others with every option moved."""

PAD = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
SMALL = PAD | dict(
    vocab_size=41,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
)
GROUPED = SMALL | dict(num_key_value_heads=2, rms_norm_eps=1e-2, head_dim=12)
GPT = PAD | dict(vocab_size=41, n_embd=32, n_layer=4, n_head=4, n_positions=64)
SLIDING = dict(use_sliding_window=True, sliding_window=5)
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]


def rope(kind="default", **parameters):
    return dict(rope_parameters={"rope_type": kind, "rope_theta": 50.0} | parameters)


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
EXPERTS = dict(num_experts=5, num_experts_per_tok=2)
FAR_AND_NEAR = dict(
    rope_parameters={
        "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    }
)
# For Phi-3 with 12 dimensions in a head, of which half are rotated.
LONG = dict(short_factor=[1.0, 1.5, 2.0], long_factor=[2.0, 3.0, 4.0])

CASES = {
    "llama-plain": ("llama", SMALL),
    "llama-all": (
        "llama",
        GROUPED
        | dict(attention_bias=True, mlp_bias=True, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True)
        | rope(),
    ),
    "llama-llama3": ("llama", SMALL | rope("llama3", **LLAMA3)),
    "llama-linear": ("llama", SMALL | rope("linear", factor=4.0)),
    "llama-dynamic": ("llama", SMALL | dict(max_position_embeddings=16) | rope("dynamic", factor=4.0)),
    "llama-yarn": ("llama", SMALL | rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama-yarn-all": (
        "llama",
        SMALL
        | rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=8.0,
            beta_slow=0.5,
            mscale=0.7,
            mscale_all_dim=0.3,
            truncate=False,
        ),
    ),
    "llama-yarn-attention": (
        "llama",
        SMALL | rope("yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=0.8),
    ),
    "mistral-plain": ("mistral", SMALL),
    "mistral-all": ("mistral", GROUPED | dict(sliding_window=5, hidden_act="gelu", tie_word_embeddings=True) | rope()),
    "qwen2-plain": ("qwen2", SMALL),
    "qwen2-all": ("qwen2", GROUPED | SLIDING | dict(max_window_layers=2, tie_word_embeddings=True) | rope()),
    "qwen3-plain": ("qwen3", SMALL | dict(head_dim=12)),
    "qwen3-all": ("qwen3", GROUPED | SLIDING | dict(attention_bias=True, layer_types=MIXED) | rope()),
    "gemma-plain": ("gemma", SMALL | dict(head_dim=12)),
    "gemma-all": (
        "gemma",
        GROUPED | dict(attention_bias=True, hidden_act="gelu", tie_word_embeddings=False) | rope(),
    ),
    "gemma2-plain": ("gemma2", SMALL | dict(head_dim=12)),
    "gemma2-all": (
        "gemma2",
        GROUPED
        | dict(
            attention_bias=True,
            hidden_activation="silu",
            query_pre_attn_scalar=7,
            sliding_window=5,
            final_logit_softcapping=3.0,
            attn_logit_softcapping=2.0,
            layer_types=MIXED,
        )
        | rope(),
    ),
    "gemma3_text-plain": ("gemma3_text", SMALL | dict(head_dim=12)),
    "gemma3_text-all": (
        "gemma3_text",
        GROUPED
        | dict(
            attention_bias=True,
            query_pre_attn_scalar=7,
            sliding_window=5,
            final_logit_softcapping=3.0,
            layer_types=MIXED,
            tie_word_embeddings=False,
        )
        | FAR_AND_NEAR,
    ),
    "gpt2-plain": ("gpt2", GPT),
    "gpt2-all": (
        "gpt2",
        GPT
        | dict(
            n_inner=48,
            activation_function="relu",
            layer_norm_epsilon=1e-2,
            scale_attn_weights=False,
            scale_attn_by_inverse_layer_idx=True,
            tie_word_embeddings=False,
        ),
    ),
    "gpt_neox-plain": ("gpt_neox", {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "gpt_neox-all": (
        "gpt_neox",
        {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
        | dict(
            use_parallel_residual=False,
            layer_norm_eps=1e-2,
            attention_bias=False,
            hidden_act="relu",
            tie_word_embeddings=True,
        )
        | rope("linear", factor=2.0, partial_rotary_factor=0.5),
    ),
    "gptj-plain": ("gptj", GPT | dict(rotary_dim=8)),
    "gptj-all": (
        "gptj",
        GPT | dict(n_inner=48, rotary_dim=4, activation_function="relu", layer_norm_epsilon=1e-2),
    ),
    "phi3-plain": ("phi3", SMALL),
    "phi3-all": (
        "phi3",
        SMALL
        | dict(num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-2, sliding_window=5, hidden_act="gelu")
        | dict(tie_word_embeddings=True)
        | rope(partial_rotary_factor=0.5),
    ),
    "phi3-longrope": (
        "phi3",
        SMALL
        | dict(hidden_size=48, original_max_position_embeddings=16)
        | rope("longrope", partial_rotary_factor=0.5, **LONG),
    ),
    "olmo2-plain": ("olmo2", SMALL),
    "olmo2-all": ("olmo2", GROUPED | dict(attention_bias=True, hidden_act="gelu", tie_word_embeddings=True) | rope()),
    "smollm3-plain": ("smollm3", SMALL),
    "smollm3-all": (
        "smollm3",
        GROUPED
        | SLIDING
        | dict(attention_bias=True, mlp_bias=True, no_rope_layers=[1, 0, 0, 1], layer_types=MIXED)
        | dict(tie_word_embeddings=False)
        | rope(),
    ),
    "mixtral-plain": ("mixtral", SMALL | dict(num_local_experts=4)),
    "mixtral-all": (
        "mixtral",
        GROUPED | dict(num_local_experts=5, num_experts_per_tok=3, sliding_window=5, tie_word_embeddings=True) | rope(),
    ),
    "qwen3_moe-plain": ("qwen3_moe", SMALL | EXPERTS | dict(moe_intermediate_size=24)),
    "qwen3_moe-all": (
        "qwen3_moe",
        GROUPED
        | SLIDING
        | EXPERTS
        | dict(moe_intermediate_size=24, attention_bias=True, norm_topk_prob=True, tie_word_embeddings=True)
        | rope(),
    ),
    "olmoe-plain": ("olmoe", SMALL | EXPERTS),
    "olmoe-all": (
        "olmoe",
        SMALL
        | EXPERTS
        | dict(num_key_value_heads=2, rms_norm_eps=1e-2, attention_bias=True, clip_qkv=0.7, norm_topk_prob=True)
        | dict(tie_word_embeddings=True)
        | rope(),
    ),
}
