"""Fields and values of `config.json` as published, by Hub id: bases, instruction-tuned, distilled, converted, old, new.

Factors of LongRoPE are made up, in their number; everything else that counts is as published.
"""

from __future__ import annotations

from typing import Any


def old(architecture: str, model_type: str, **fields: Any) -> dict[str, Any]:
    """Fields as transformers 4 wrote them for every model."""
    return dict(
        architectures=[architecture],
        model_type=model_type,
        initializer_range=0.02,
        torch_dtype="bfloat16",
        transformers_version="4.40.1",
        use_cache=True,
        **fields,
    )


def sizes(width: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, length: int) -> dict[str, int]:
    return dict(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=length,
    )


def remote(family: str, model: str) -> dict[str, Any]:
    """The field that names code which came with a model."""
    return dict(
        auto_map={
            "AutoConfig": f"configuration_{family}.{model}Config",
            "AutoModelForCausalLM": f"modeling_{family}.{model}ForCausalLM",
        }
    )


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


UNSLOTH = dict(unsloth_fixed=True, unsloth_version="2024.9")
FIVE = dict(dtype="bfloat16", transformers_version="5.2.0")  # written again by transformers 5
BITS = dict(quant_method="gptq", bits=4, group_size=128, desc_act=True)

# Llama, and models that are one by its class.
LLAMA1 = old(
    "LLaMAForCausalLM",
    "llama",
    bos_token_id=0,
    eos_token_id=1,
    hidden_act="silu",
    rms_norm_eps=1e-6,
    pad_token_id=-1,
    max_sequence_length=2048,
    **without(sizes(4096, 11008, 32, 32, 32, 32000, 2048), "num_key_value_heads", "max_position_embeddings"),
)
LLAMA2 = old(
    "LlamaForCausalLM",
    "llama",
    bos_token_id=1,
    eos_token_id=2,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    pretraining_tp=1,
    rope_scaling=None,
    tie_word_embeddings=False,
    **sizes(4096, 11008, 32, 32, 32, 32000, 4096),
)
LLAMA3 = LLAMA2 | dict(
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=128000,
    eos_token_id=128001,
    rope_theta=500000.0,
    **sizes(4096, 14336, 32, 32, 8, 128256, 8192),
)
LLAMA31_ROPE = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192, rope_type="llama3"
)
LLAMA31 = LLAMA3 | dict(
    eos_token_id=[128001, 128008, 128009], max_position_embeddings=131072, mlp_bias=False, rope_scaling=LLAMA31_ROPE
)
LLAMA32 = (
    LLAMA31
    | dict(head_dim=64, rope_scaling=LLAMA31_ROPE | dict(factor=32.0), tie_word_embeddings=True)
    | sizes(2048, 8192, 16, 32, 8, 128256, 131072)
)
TINY_LLAMA = LLAMA2 | dict(rope_theta=10000.0, **sizes(2048, 5632, 22, 32, 4, 32000, 2048))
SMOLLM = LLAMA3 | dict(
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
    mlp_bias=False,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    **sizes(576, 1536, 30, 9, 3, 49152, 2048),
)
SMOLLM2 = SMOLLM | dict(
    is_llama_config=True,
    rope_interleaved=False,
    rope_theta=100000,
    max_position_embeddings=8192,
    initializer_range=0.041666666666666664,
    **{"transformers.js_config": dict(kv_cache_dtype=dict(q4f16="float16", fp16="float16"))},
)
YARN = dict(factor=16.0, original_max_position_embeddings=4096, type="yarn", finetuned=True)
LLAMAS = {
    "decapoda-research/llama-7b-hf": LLAMA1,
    "huggyllama/llama-7b": LLAMA1
    | dict(
        architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=2048
    ),
    "lmsys/vicuna-7b-v1.5": LLAMA2 | dict(_name_or_path="vicuna-7b-v1.5", pad_token_id=0, max_length=4096, top_p=0.6),
    "meta-llama/Llama-2-7b-hf": LLAMA2 | dict(pad_token_id=0),
    "meta-llama/Llama-2-13b-hf (its first commit)": LLAMA2
    | dict(pad_token_id=0, pretraining_tp=2, **sizes(5120, 13824, 40, 40, 40, 32000, 2048)),
    "togethercomputer/LLaMA-2-7B-32K": LLAMA2
    | dict(rope_scaling=dict(factor=8.0, type="linear"), max_position_embeddings=32768)
    | remote("llama", "Llama"),
    "NousResearch/Yarn-Llama-2-7b-64k": LLAMA2
    | dict(rope_scaling=YARN, max_position_embeddings=65536, pad_token_id=0)
    | remote("llama_together_yarn", "Llama"),
    "codellama/CodeLlama-7b-Instruct-hf": LLAMA2
    | dict(rope_theta=1000000, vocab_size=32016, max_position_embeddings=16384),
    "01-ai/Yi-34B-Chat": LLAMA2
    | dict(pad_token_id=0, rope_theta=5000000.0, **sizes(7168, 20480, 60, 56, 8, 64000, 4096)),
    "deepseek-ai/deepseek-llm-7b-chat": LLAMA2 | dict(bos_token_id=100000, eos_token_id=100001, vocab_size=102400),
    "deepseek-ai/deepseek-coder-6.7b-instruct": LLAMA2
    | dict(
        rope_scaling=dict(factor=4.0, type="linear"), rope_theta=100000, vocab_size=32256, max_position_embeddings=16384
    ),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": TINY_LLAMA | dict(attention_bias=False),
    "Maykeye/TinyLLama-v0": LLAMA2 | dict(pad_token_id=0, **sizes(64, 256, 8, 16, 16, 32000, 2048)),
    "meta-llama/Meta-Llama-3-8B": LLAMA3,
    "princeton-nlp/Llama-3-Instruct-8B-SimPO": LLAMA3
    | dict(_name_or_path="meta-llama/Meta-Llama-3-8B-Instruct", use_cache=False),
    "gradientai/Llama-3-8B-Instruct-262k": LLAMA3 | dict(rope_theta=283461213.0, max_position_embeddings=262144),
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA31,
    "allenai/Llama-3.1-Tulu-3-8B-DPO": LLAMA31
    | dict(
        _name_or_path="allenai/Llama-3.1-Tulu-3-8B-SFT", eos_token_id=128009, pad_token_id=128256, vocab_size=128264
    ),
    "mlabonne/Meta-Llama-3.1-8B-Instruct-abliterated": LLAMA31 | dict(_name_or_path="meta-llama/Llama-3.1-8B-Instruct"),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": without(LLAMA31, "pad_token_id") | dict(eos_token_id=128001),
    "meta-llama/Llama-3.2-1B-Instruct": LLAMA32,
    "unsloth/Llama-3.2-1B-Instruct": LLAMA32 | UNSLOTH | dict(pad_token_id=128004),
    "meta-llama/Llama-3.3-70B-Instruct": LLAMA31 | dict(head_dim=128, **sizes(8192, 28672, 80, 64, 8, 128256, 131072)),
    "unsloth/phi-4": LLAMA3
    | UNSLOTH
    | dict(
        bos_token_id=100257,
        eos_token_id=100265,
        head_dim=128,
        original_max_position_embeddings=16384,
        rope_theta=250000,
        **sizes(5120, 17920, 40, 40, 10, 100352, 16384),
    ),
    "tiiuae/Falcon3-7B-Instruct": LLAMA3
    | dict(
        eos_token_id=11,
        head_dim=256,
        mlp_bias=False,
        rope_theta=1000042,
        activation="swiglu",
        **sizes(3072, 23040, 28, 12, 4, 131072, 32768),
    ),
    "HuggingFaceTB/SmolLM-135M": SMOLLM | dict(_name_or_path="HuggingFaceTB/cosmo2-135M-webinst-sc2"),
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2,
    "HuggingFaceTB/SmolLM2-135M-Instruct (written by transformers 5)": without(
        SMOLLM2, "rope_scaling", "rope_theta", "torch_dtype"
    )
    | FIVE
    | dict(rope_parameters=dict(rope_theta=100000, rope_type="default")),
}

# Mistral and Mixtral.
MISTRAL = old(
    "MistralForCausalLM",
    "mistral",
    bos_token_id=1,
    eos_token_id=2,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=4096,
    tie_word_embeddings=False,
    **sizes(4096, 14336, 32, 32, 8, 32000, 32768),
)
MISTRAL3 = MISTRAL | dict(attention_dropout=0.0, rope_theta=1000000.0, sliding_window=None, vocab_size=32768)
MIXTRAL = MISTRAL | dict(
    architectures=["MixtralForCausalLM"],
    model_type="mixtral",
    attention_dropout=0.0,
    num_experts_per_tok=2,
    num_local_experts=8,
    output_router_logits=False,
    rope_theta=1000000.0,
    router_aux_loss_coef=0.02,
    sliding_window=None,
)
MISTRALS = {
    "mistralai/Mistral-7B-v0.1": MISTRAL,
    "HuggingFaceH4/zephyr-7b-beta": MISTRAL | dict(_name_or_path="zephyr-7b-sft-full", pad_token_id=2),
    "NousResearch/Yarn-Mistral-7b-64k": MISTRAL
    | dict(
        max_sequence_length=65536,
        rope_scaling=YARN | dict(factor=8.0, original_max_position_embeddings=8192),
        sliding_window=65536,
    )
    | remote("mistral_yarn", "Mistral"),
    "mistralai/Mistral-7B-Instruct-v0.2": MISTRAL3 | dict(vocab_size=32000),
    "mistralai/Mistral-7B-Instruct-v0.3": MISTRAL3,
    "mistralai/Mistral-Nemo-Instruct-2407": MISTRAL3
    | dict(head_dim=128, **sizes(5120, 14336, 40, 32, 8, 131072, 1024000)),
    "mistralai/Ministral-8B-Instruct-2410": MISTRAL3
    | dict(head_dim=128, rope_theta=100000000.0, sliding_window=32768, **sizes(4096, 12288, 36, 32, 8, 131072, 32768)),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": MIXTRAL,
    "NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO": MIXTRAL
    | dict(
        _name_or_path="Nous-Hermes-2-Mixtral-8x7B-SFT", eos_token_id=32000, vocab_size=32002, router_jitter_noise=0.0
    ),
}

# Qwen.
QWEN2 = old(
    "Qwen2ForCausalLM",
    "qwen2",
    attention_dropout=0.0,
    bos_token_id=151643,
    eos_token_id=151645,
    hidden_act="silu",
    max_window_layers=28,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    sliding_window=131072,
    tie_word_embeddings=False,
    use_sliding_window=False,
    **sizes(3584, 18944, 28, 28, 4, 152064, 32768),
)
QWEN25_HALF = QWEN2 | dict(
    max_window_layers=24, sliding_window=32768, tie_word_embeddings=True, **sizes(896, 4864, 24, 14, 2, 151936, 32768)
)
R1_QWEN = QWEN2 | dict(
    eos_token_id=151643, max_position_embeddings=131072, rope_theta=10000, sliding_window=4096, use_mrope=False
)
QWEN3 = QWEN2 | dict(
    architectures=["Qwen3ForCausalLM"],
    model_type="qwen3",
    attention_bias=False,
    head_dim=128,
    max_window_layers=36,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=None,
    **sizes(4096, 12288, 36, 32, 8, 151936, 40960),
)
QWEN3_MOE = QWEN3 | dict(
    architectures=["Qwen3MoeForCausalLM"],
    model_type="qwen3_moe",
    decoder_sparse_step=1,
    max_window_layers=48,
    mlp_only_layers=[],
    moe_intermediate_size=768,
    norm_topk_prob=True,
    num_experts=128,
    num_experts_per_tok=8,
    output_router_logits=False,
    router_aux_loss_coef=0.001,
    **sizes(2048, 6144, 48, 32, 4, 151936, 40960),
)
CHUNKS = dict(chunk_size=262144, local_size=8192, original_max_position_embeddings=262144)
QWENS = {
    "Qwen/Qwen1.5-1.8B-Chat": QWEN25_HALF
    | dict(max_window_layers=21, tie_word_embeddings=False, **sizes(2048, 5504, 24, 16, 16, 151936, 32768)),
    "Qwen/Qwen2-7B-Instruct": QWEN2,
    "Qwen/Qwen2.5-0.5B": QWEN25_HALF | dict(eos_token_id=151643, use_mrope=False),
    "Qwen/Qwen2.5-0.5B-Instruct": QWEN25_HALF,
    "Qwen/Qwen2.5-3B-Instruct": QWEN25_HALF
    | dict(max_window_layers=70, **sizes(2048, 11008, 36, 16, 2, 151936, 32768)),
    "Qwen/Qwen2.5-7B-Instruct-1M": QWEN2
    | dict(
        dual_chunk_attention_config=CHUNKS,
        max_position_embeddings=1010000,
        rope_theta=10000000.0,
        sliding_window=1010000,
    ),
    "Qwen/Qwen2.5-Math-7B": QWEN2
    | dict(eos_token_id=151643, max_position_embeddings=4096, rope_theta=10000, sliding_window=4096, use_mrope=False),
    "Qwen/Qwen2.5-Coder-7B-Instruct": QWEN2,
    "unsloth/Qwen2.5-7B-Instruct": QWEN2 | UNSLOTH | dict(pad_token_id=151654, rope_scaling=None, sliding_window=None),
    "huihui-ai/Qwen2.5-7B-Instruct-abliterated-v2": QWEN2 | dict(_name_or_path="Qwen/Qwen2.5-7B-Instruct"),
    "Qwen/QwQ-32B": QWEN2 | dict(max_window_layers=64, **sizes(5120, 27648, 64, 40, 8, 152064, 40960)),
    "Qwen/Qwen2.5-7B-Instruct (with YaRN, as its card says)": QWEN2
    | dict(rope_scaling=dict(factor=4.0, original_max_position_embeddings=32768, type="yarn")),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": R1_QWEN,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": R1_QWEN
    | dict(max_window_layers=21, **sizes(1536, 8960, 28, 12, 2, 151936, 131072)),
    "Qwen/Qwen3-8B": QWEN3,
    "Qwen/Qwen3-0.6B": QWEN3
    | dict(max_window_layers=28, tie_word_embeddings=True, **sizes(1024, 3072, 28, 16, 8, 151936, 40960)),
    "Qwen/Qwen3-4B-Instruct-2507": QWEN3
    | dict(rope_theta=5000000, tie_word_embeddings=True, **sizes(2560, 9728, 36, 32, 8, 151936, 262144)),
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": QWEN3
    | dict(
        max_position_embeddings=131072,
        rope_scaling=dict(
            attn_factor=0.8782488562869419, factor=4.0, original_max_position_embeddings=32768, rope_type="yarn"
        ),
    ),
    "Qwen/Qwen3-8B (written by transformers 5)": without(QWEN3, "rope_theta", "rope_scaling", "torch_dtype")
    | FIVE
    | dict(
        layer_types=["full_attention"] * 36,
        pad_token_id=None,
        rope_parameters=dict(rope_theta=1000000, rope_type="default"),
    ),
    "Qwen/Qwen3-30B-A3B": QWEN3_MOE,
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": QWEN3_MOE
    | dict(
        intermediate_size=5472,
        max_position_embeddings=262144,
        max_window_layers=28,
        qkv_bias=False,
        rope_theta=10000000,
        router_aux_loss_coef=0.0,
        shared_expert_intermediate_size=0,
        use_qk_norm=True,
    ),
}

# Gemma.
GEMMA = old(
    "GemmaForCausalLM",
    "gemma",
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=2,
    eos_token_id=1,
    pad_token_id=0,
    head_dim=256,
    hidden_act="gelu",
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=10000.0,
    **sizes(2048, 16384, 18, 8, 1, 256000, 8192),
)
GEMMA2 = without(GEMMA, "rope_scaling") | dict(
    architectures=["Gemma2ForCausalLM"],
    model_type="gemma2",
    attn_logit_softcapping=50.0,
    cache_implementation="hybrid",
    final_logit_softcapping=30.0,
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=256,
    sliding_window=4096,
    **sizes(2304, 9216, 26, 8, 4, 256000, 8192),
)
GEMMA3 = without(GEMMA2, "hidden_act") | dict(
    architectures=["Gemma3ForCausalLM"],
    model_type="gemma3_text",
    attn_logit_softcapping=None,
    eos_token_id=[1, 106],
    final_logit_softcapping=None,
    rope_local_base_freq=10000,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=512,
    sliding_window_pattern=6,
    **sizes(1152, 6912, 26, 4, 1, 262144, 32768),
)
GEMMAS = {
    "google/gemma-2b": GEMMA,
    "google/gemma-7b-it": GEMMA
    | dict(
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        **sizes(3072, 24576, 28, 16, 16, 256000, 8192),
    ),
    "google/gemma-1.1-2b-it": GEMMA | dict(hidden_act="gelu_pytorch_tanh", hidden_activation=None),
    "google/gemma-2-2b-it": GEMMA2 | dict(eos_token_id=[1, 107]),
    "google/gemma-2-2b-jpn-it": without(GEMMA2, "hidden_act") | dict(dtype="bfloat16", query_pre_attn_scalar=224),
    "google/gemma-2-9b": GEMMA2 | dict(sliding_window_size=4096, **sizes(3584, 14336, 42, 16, 8, 256000, 8192)),
    "google/gemma-2-27b": GEMMA2
    | dict(
        _attn_implementation="eager",
        head_dim=128,
        query_pre_attn_scalar=144,
        sliding_window_size=4096,
        **sizes(4608, 36864, 46, 32, 16, 256000, 8192),
    ),
    "princeton-nlp/gemma-2-9b-it-SimPO": GEMMA2
    | dict(_name_or_path="google/gemma-2-9b-it", use_cache=False, **sizes(3584, 14336, 42, 16, 8, 256000, 8192)),
    "google/gemma-3-1b-it": GEMMA3,
    "google/gemma-3-270m-it": without(GEMMA3, "cache_implementation", "sliding_window_pattern")
    | dict(
        _sliding_window_pattern=6,
        eos_token_id=1,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
        rope_local_base_freq=10000.0,
        rope_theta=1000000.0,
        use_bidirectional_attention=False,
        **sizes(640, 2048, 18, 4, 1, 262144, 32768),
    ),
}

# GPT-2, GPT-J, GPT-NeoX.
HEADS = dict(
    summary_activation=None,
    summary_first_dropout=0.1,
    summary_proj_to_labels=True,
    summary_type="cls_index",
    summary_use_proj=True,
)
GPT2 = HEADS | dict(
    architectures=["GPT2LMHeadModel"],
    model_type="gpt2",
    activation_function="gelu_new",
    attn_pdrop=0.1,
    bos_token_id=50256,
    embd_pdrop=0.1,
    eos_token_id=50256,
    initializer_range=0.02,
    layer_norm_epsilon=1e-5,
    n_ctx=1024,
    n_embd=768,
    n_head=12,
    n_layer=12,
    n_positions=1024,
    resid_pdrop=0.1,
    task_specific_params={"text-generation": dict(do_sample=True, max_length=50)},
    vocab_size=50257,
)
NAMES = dict(id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
GPTJ = without(GPT2, "n_ctx") | dict(
    architectures=["GPTJForCausalLM"],
    model_type="gptj",
    attn_pdrop=0.0,
    embd_pdrop=0.0,
    gradient_checkpointing=False,
    n_embd=4096,
    n_head=16,
    n_inner=None,
    n_layer=28,
    n_positions=2048,
    resid_pdrop=0.0,
    rotary=True,
    rotary_dim=64,
    scale_attn_weights=True,
    tie_word_embeddings=False,
    tokenizer_class="GPT2Tokenizer",
    transformers_version="4.18.0.dev0",
    use_cache=True,
    vocab_size=50400,
)
NEOX = old(
    "GPTNeoXForCausalLM",
    "gpt_neox",
    bos_token_id=0,
    eos_token_id=0,
    hidden_act="gelu",
    layer_norm_eps=1e-5,
    rotary_emb_base=10000,
    rotary_pct=0.25,
    tie_word_embeddings=False,
    use_parallel_residual=True,
    **without(sizes(2560, 10240, 32, 32, 32, 50304, 2048), "num_key_value_heads"),
)
GPTS = {
    "openai-community/gpt2": GPT2,
    "openai-community/gpt2-medium": GPT2
    | dict(n_embd=1024, n_head=16, n_layer=24, n_special=0, predict_special_tokens=True),
    "distilbert/distilgpt2": GPT2 | NAMES | dict(_num_labels=1, n_layer=6),
    "microsoft/DialoGPT-medium": GPT2
    | dict(n_embd=1024, n_head=16, n_layer=24, task_specific_params=dict(conversational=dict(max_length=1000))),
    "cerebras/Cerebras-GPT-111M": without(GPT2, "n_ctx")
    | dict(activation_function="gelu", attn_pdrop=0.0, embd_pdrop=0.0, n_inner=3072, n_layer=10, n_positions=2048)
    | dict(resid_pdrop=0.0, scale_attn_weights=True),
    "codeparrot/codeparrot": GPT2
    | dict(n_embd=1600, n_head=25, n_inner=None, n_layer=48, reorder_and_upcast_attn=True)
    | dict(scale_attn_by_inverse_layer_idx=True, scale_attn_weights=True, vocab_size=32768),
    "rinna/japanese-gpt2-medium": GPT2
    | dict(n_embd=1024, n_head=16, n_inner=4096, n_layer=24, tokenizer_class="T5Tokenizer", vocab_size=32000),
    "EleutherAI/gpt-j-6b": GPTJ,
    "togethercomputer/GPT-JT-6B-v1": GPTJ | dict(_name_or_path="EleutherAI/gpt-j-6B", torch_dtype="float16"),
    "nomic-ai/gpt4all-j": GPTJ | dict(use_cache=False, vocab_size=50401),
    "EleutherAI/pythia-2.8b": NEOX,
    "EleutherAI/pythia-160m (written by transformers 4.44)": NEOX
    | dict(attention_bias=True, attention_dropout=0.0, classifier_dropout=0.1, hidden_dropout=0.0, rope_scaling=None),
    "EleutherAI/gpt-neox-20b": NEOX
    | dict(attention_probs_dropout_prob=0, hidden_act="gelu_fast", hidden_dropout_prob=0)
    | without(sizes(6144, 24576, 44, 64, 64, 50432, 2048), "num_key_value_heads"),
    "databricks/dolly-v2-3b": NEOX
    | dict(custom_pipelines={"text-generation": dict(impl="instruct_pipeline.InstructionTextGenerationPipeline")})
    | dict(vocab_size=50280),
    "togethercomputer/RedPajama-INCITE-Chat-3B-v1": NEOX
    | dict(rotary_pct=1.0, use_parallel_residual=False, vocab_size=50432),
    "stabilityai/stablelm-tuned-alpha-3b": NEOX | dict(max_position_embeddings=4096, vocab_size=50688),
    "EleutherAI/polyglot-ko-1.3b": NEOX
    | dict(num_steps="global_step213000", rotary=True, rotary_dim=64, rotary_pct=0.5),
}

# Phi-3, OLMo 2, OLMoE, SmolLM3.
PHI3 = old(
    "Phi3ForCausalLM",
    "phi3",
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=1,
    embd_pdrop=0.0,
    eos_token_id=32000,
    hidden_act="silu",
    original_max_position_embeddings=4096,
    pad_token_id=32000,
    resid_pdrop=0.0,
    rms_norm_eps=1e-5,
    rope_scaling=None,
    rope_theta=10000.0,
    sliding_window=2047,
    tie_word_embeddings=False,
    **sizes(3072, 8192, 32, 32, 32, 32064, 4096),
    **remote("phi3", "Phi3"),
)
LONG = dict(long_factor=[1.08 + i for i in range(48)], short_factor=[1.0 + i / 100 for i in range(48)])
PHI35 = PHI3 | dict(max_position_embeddings=131072, rope_scaling=LONG | dict(type="longrope"), sliding_window=262144)
PHI4_MINI = PHI35 | dict(
    bos_token_id=199999,
    eos_token_id=199999,
    full_attn_mod=1,
    interpolate_factor=1,
    lm_head_bias=False,
    mlp_bias=False,
    num_attention_heads=24,
    num_key_value_heads=8,
    pad_token_id=199999,
    partial_rotary_factor=0.75,
    tie_word_embeddings=True,
    vocab_size=200064,
)
OLMO2 = old(
    "Olmo2ForCausalLM",
    "olmo2",
    attention_bias=False,
    attention_dropout=0.0,
    eos_token_id=100257,
    hidden_act="silu",
    pad_token_id=100277,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=500000,
    tie_word_embeddings=False,
    **sizes(4096, 11008, 32, 32, 32, 100352, 4096),
)
OLMOE = OLMO2 | dict(
    architectures=["OlmoeForCausalLM"],
    model_type="olmoe",
    clip_qkv=None,
    eos_token_id=50279,
    norm_topk_prob=False,
    num_experts=64,
    num_experts_per_tok=8,
    output_router_logits=False,
    pad_token_id=1,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    router_aux_loss_coef=0.01,
    **sizes(2048, 1024, 16, 16, 16, 50304, 4096),
)
SMOLLM3 = LLAMA3 | dict(
    architectures=["SmolLM3ForCausalLM"],
    model_type="smollm3",
    eos_token_id=128012,
    layer_types=["full_attention"] * 36,
    max_window_layers=28,
    mlp_bias=False,
    no_rope_layer_interval=4,
    no_rope_layers=[1, 1, 1, 0] * 9,
    pad_token_id=128004,
    pretraining_tp=2,
    rms_norm_eps=1e-6,
    rope_theta=5000000.0,
    sliding_window=None,
    tie_word_embeddings=True,
    use_sliding_window=False,
    **sizes(2048, 11008, 36, 16, 4, 128256, 65536),
)
OTHERS = {
    "microsoft/Phi-3-mini-4k-instruct": PHI3 | dict(_name_or_path="Phi-3-mini-4k-instruct"),
    "microsoft/Phi-3-mini-128k-instruct (its first commit)": PHI35 | dict(rope_scaling=LONG | dict(type="su")),
    "microsoft/Phi-3-medium-4k-instruct": PHI3 | sizes(5120, 17920, 40, 40, 10, 32064, 4096),
    "microsoft/Phi-3.5-mini-instruct": PHI35 | dict(_name_or_path="Phi-3.5-mini-instruct"),
    "microsoft/Phi-4-mini-instruct": PHI4_MINI | dict(_name_or_path="Phi-4-mini-instruct"),
    "microsoft/phi-4": without(PHI3, "auto_map")
    | dict(bos_token_id=100257, eos_token_id=100265, original_max_position_embeddings=16384, pad_token_id=100349)
    | dict(rope_theta=250000, sliding_window=None, **sizes(5120, 17920, 40, 40, 10, 100352, 16384)),
    "allenai/OLMo-2-1124-7B": OLMO2,
    "allenai/OLMo-2-1124-7B-DPO": OLMO2
    | dict(_name_or_path="allenai/OLMo-2-1124-7B-SFT", bos_token_id=100257, use_cache=False),
    "allenai/OLMoE-1B-7B-0924-Instruct": OLMOE | dict(_name_or_path="allenai/OLMoE-1B-7B-0924-SFT", use_cache=False),
    "HuggingFaceTB/SmolLM3-3B": SMOLLM3,
}

READ = LLAMAS | MISTRALS | QWENS | GEMMAS | GPTS | OTHERS

# Published files that ask for other mathematics, and the field that does.
REFUSED = {
    "TheBloke/Llama-2-7B-Chat-GPTQ": (LLAMA2 | dict(quantization_config=BITS), "quantization_config"),
    "unsloth/Llama-3.2-1B-Instruct-bnb-4bit": (
        LLAMA32 | UNSLOTH | dict(quantization_config=dict(quant_method="bitsandbytes", load_in_4bit=True)),
        "quantization_config",
    ),
    "RLHFlow/ArmoRM-Llama3-8B-v0.1": (
        LLAMA3 | dict(architectures=["LlamaForRewardModelWithGating"], num_labels=19),
        "architectures",
    ),
    "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2": (
        LLAMA31 | NAMES | dict(architectures=["LlamaForSequenceClassification"]),
        "architectures",
    ),
    "Alibaba-NLP/gte-Qwen2-7B-instruct": (QWEN2 | remote("qwen", "Qwen2") | dict(is_causal=False), "is_causal"),
    "intfloat/e5-mistral-7b-instruct": (MISTRAL | dict(architectures=["MistralModel"]), "architectures"),
    "ibm-granite/granite-3.1-2b-instruct": (
        LLAMA3
        | dict(architectures=["GraniteForCausalLM"], model_type="granite", attention_multiplier=0.015625)
        | dict(embedding_multiplier=12.0, logits_scaling=8.0, mlp_bias=False, residual_multiplier=0.22),
        "model_type",
    ),
}
