"""Options of TRL by name, with the fields and flags that stand for them here: for errors and docs/from_trl.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Equivalent(NamedTuple):
    """The place of an option of TRL here."""

    ours: str  # fields, `section.field` or `section.field=value`, and flags, separated by spaces; empty: there is none
    note: str  # a clause on the difference or, where there is nothing to set, on why


_MODEL = {
    "model": ("model.path", "a local folder or a Hub id, not a loaded model"),
    "model_name_or_path": ("model.path", "a local folder or a Hub id"),
    "ref_model": ("", "that which training starts from; another one's log-probs may be columns"),
    "processing_class": ("tokenizer.path", "that of model.path unless it is set"),
    "model_init_kwargs": ("model.dtype model.param_dtype model.attention", "its dtype and attn_implementation"),
    "dtype": ("model.param_dtype model.dtype", "the type that parameters are held in, and that of computing"),
    "torch_dtype": ("model.param_dtype model.dtype", "of older releases, as dtype"),
    "attn_implementation": ("model.attention", "chosen by platform"),
    "model_revision": ("model.path", "the newest revision of a Hub id; of another, the folder that hf download wrote"),
    "trust_remote_code": ("", "code that comes with a model is never run; docs/families.md lists what is supported"),
    "router_aux_loss_coef": (
        "train.router_balance",
        "0 unless it is set, where TRL takes the weight in the model's config.json; over answer tokens, not over all",
    ),
    "disable_dropout": ("", "there is no dropout"),
    "peft_config": (
        "lora.rank lora.alpha lora.targets lora.rank_stabilised",
        "its r, lora_alpha, target_modules and use_rslora; adapters are on all linear layers of the blocks, "
        "unless lora.targets selects among them; no dropout",
    ),
    "use_peft": ("lora.rank", "adapters train where it is above 0"),
    "lora_r": ("lora.rank", ""),
    "lora_alpha": ("lora.alpha", "twice the rank unless it is set"),
    "lora_dropout": ("", "there is no dropout; TRL's script has 0.05"),
    "lora_target_modules": ("lora.targets", "a regular expression of module names; all linear layers unless it is set"),
    "lora_target_parameters": ("lora.targets", "adapters stand beside linear layers, not in tensors of experts"),
    "lora_modules_to_save": ("", "embeddings and head stay as they are beside adapters"),
    "lora_task_type": ("", "models are causal language models"),
    "use_rslora": ("lora.rank_stabilised=true", ""),
    "use_dora": ("", "adapters have no magnitudes of their own"),
    "bnb_4bit_quant_type": ("lora.base=nf4", ""),
    "bnb_4bit_quant_storage": ("", "4-bit numbers are stored as such"),
    "use_bnb_nested_quant": ("", "scales are not quantized"),
    "quantization_config": ("lora.base", "int8 or nf4, of the frozen matrices beside adapters"),
    "load_in_8bit": ("lora.base=int8", "beside adapters"),
    "load_in_4bit": ("lora.base=nf4", "beside adapters"),
    "use_liger_kernel": ("", "the head never holds all logits, and XLA fuses what those kernels fuse"),
    "liger_kernel_config": ("", "as use_liger_kernel"),
    "use_cache": ("", "training has no cache of keys and values"),
    "neftune_noise_alpha": ("", "no noise is added to embeddings"),
}  # fmt: skip

_DATA = {
    "train_dataset": ("data.train", "files or a Hub id with a split, not a loaded data set"),
    "eval_dataset": ("data.eval", "files or a Hub id with a split; several by name, helpful=a.jsonl,harmless=b.jsonl"),
    "dataset_name": ("data.train", "written owner/name:split"),
    "dataset_config": ("data.train", "written owner/name:config:split"),
    "dataset_streaming": ("", "data are read once, tokenized and kept on disk"),
    "dataset_train_split": ("data.train", "written after the id, owner/name:split"),
    "dataset_test_split": ("data.eval", "written after the id, owner/name:split"),
    "max_length": (
        "data.max_length data.max_prompt_length",
        "the longest prompt with either answer; a prompt gives way first, down to data.max_prompt_length, which TRL "
        "does not have; None is not accepted",
    ),
    "max_prompt_length": ("data.max_prompt_length", "of older releases"),
    "max_completion_length": (
        "data.max_length data.max_prompt_length",
        "of older releases; an answer has what the prompt leaves",
    ),
    "truncation_mode": (
        "data.truncate_prompt",
        "which end of the prompt is kept; TRL cuts prompt and answer as one, so keep_start cuts the answer. Here the "
        "prompt gives way first, and conversations lose whole exchanges",
    ),
    "pad_token": ("", "padding has no token of its own, and none is needed"),
    "padding_free": ("", "pairs are always packed into rows"),
    "pad_to_multiple_of": ("data.row_length", "rows have one length, chosen from the data unless it is set"),
    "dataset_num_proc": ("", "the number of processes is chosen; tokenized data are kept in data.cache_dir"),
    "data_collator": ("", "pairs are laid out and packed by data/layout.py"),
    "remove_unused_columns": ("data.columns", "columns that nothing reads are named; data.columns leaves them out"),
    "dataloader_drop_last": ("", "batches are always full; one may span two epochs"),
    "dataloader_num_workers": ("", "batches are made ahead of time by a thread"),
    "dataloader_prefetch_factor": ("", "as dataloader_num_workers"),
    "dataloader_pin_memory": ("", "as dataloader_num_workers"),
    "dataloader_persistent_workers": ("", "as dataloader_num_workers"),
    "dataloader_multiprocessing_context": ("", "as dataloader_num_workers"),
    "dataloader_in_order": ("", "batches are the same in every run with the same seed"),
    "train_sampling_strategy": ("data.shuffle", "random is true, sequential is false; lengths are grouped by packing"),
    "group_by_length": ("", "of older releases; packing puts pairs of different lengths into one row"),
    "length_column_name": ("", "lengths are counted"),
    "label_names": ("", "columns have fixed names; data.columns maps others"),
    "ignore_data_skip": ("", "a resumed run reads the batches that follow, without reading those before"),
    "assistant_only_loss": (
        "data.turns",
        "an option of SFTConfig; on: in an answer of several turns the assistant's are scored",
    ),
}

_OBJECTIVE = {
    "loss_type": ("loss.name", "the same names; several as one text, sigmoid*0.8,sft*0.2; docs/objectives.md has more"),
    "loss_weights": ("loss.name", "weights stand in the name, as in sigmoid*0.8,sft*0.2"),
    "beta": ("loss.beta", "0.1 for most losses unless it is set, 5 for sigmoid_norm, 0.001 for sppo_hard"),
    "label_smoothing": (
        "loss.label_smoothing",
        "sigmoid and sigmoid_norm smooth too (conservative DPO), where TRL ignores it; 0.1 for robust unless set",
    ),
    "discopop_tau": ("loss.tau", ""),
    "f_divergence_type": ("loss.divergence", "the same names"),
    "f_alpha_divergence_coef": ("loss.divergence_alpha", "1 minus TRL's number, in (0, 1)"),
    "ld_alpha": ("loss.ld_alpha", ""),
    "use_weighting": ("loss.wpo", ""),
    "reference_free": ("loss.name", "of older releases; losses without a reference are simpo, cpo, orpo and sft"),
    "rpo_alpha": ("loss.nll_weight", "of older releases"),
    "precompute_ref_log_probs": ("", "always on; the reference runs once and its log-probs are stored"),
    "precompute_ref_batch_size": ("reference.microbatch_rows", "rows, not pairs; chosen unless it is set"),
    "precompute_ref_eval_batch_size": (
        "reference.microbatch_rows",
        "of older releases; rows, not pairs; chosen unless it is set",
    ),
    "sync_ref_model": (
        "reference.sync_steps",
        "the number of steps; pairs until the next sync are scored anew",
    ),
    "ref_model_sync_steps": ("reference.sync_steps", "0 is never"),
    "ref_model_mixup_alpha": ("reference.mixup_alpha", "1, a copy of the policy, unless it is set; 0.6 in TRL"),
    "label_smoothing_factor": ("", "of cross-entropy; for DPO there is loss.label_smoothing"),
}

_OPTIMIZATION = {
    "per_device_train_batch_size": (
        "train.batch_pairs",
        "pairs of an update over all devices, so TRL's number times gradient_accumulation_steps times devices",
    ),
    "gradient_accumulation_steps": ("train.batch_pairs", "the pairs of an update; microbatches are chosen to fit"),
    "auto_find_batch_size": ("train.microbatch_rows", "chosen from the data and the device's memory"),
    "average_tokens_across_devices": ("", "means have one denominator over all microbatches and devices"),
    "num_train_epochs": ("train.epochs", "1 unless it is set, where TRL has 3"),
    "max_steps": ("train.steps", ""),
    "learning_rate": ("optimizer.learning_rate", "1e-6, as in TRL"),
    "lr_scheduler_type": (
        "optimizer.schedule",
        "constant, linear or cosine, with warm-up and a floor; others are not offered",
    ),
    "lr_scheduler_kwargs": ("optimizer.min_lr_rate", "its min_lr_rate; schedules have no further options"),
    "warmup_steps": ("optimizer.warmup_steps optimizer.warmup_ratio", "a number of updates, or a share of all"),
    "warmup_ratio": ("optimizer.warmup_ratio", "of older releases"),
    "optim": (
        "optimizer.name",
        "adamw, adafactor, rmsprop, lion or sgd; moments are float32",
    ),
    "optim_args": ("optimizer.b1 optimizer.b2 optimizer.eps", ""),
    "optimizers": ("optimizer.name", "from Python make_train_step takes any optax transformation"),
    "optim_target_modules": ("", "of GaLore and APOLLO, which are not offered"),
    "weight_decay": ("optimizer.weight_decay", "of matrices only, as in transformers"),
    "adam_beta1": ("optimizer.b1", ""),
    "adam_beta2": ("optimizer.b2", ""),
    "adam_epsilon": ("optimizer.eps", ""),
    "max_grad_norm": ("optimizer.clip_norm", "0 is no clipping"),
    "seed": ("seed", "0 unless it is set, where TRL has 42; the order of another library is another order"),
    "data_seed": (
        "seed",
        "one seed, for the order of the data, the first values of adapters, and the rounding of bfloat16 parameters",
    ),
    "full_determinism": ("", "a run repeats bit for bit on the same hardware"),
}

_PRECISION = {
    "bf16": (
        "model.dtype",
        "auto is bfloat16 on accelerators and float32 on CPUs; losses, log-softmax and gradient sums are float32",
    ),
    "fp16": ("model.dtype", "float16 is not offered, since gradients of the head underflow; use bfloat16"),
    "bf16_full_eval": ("model.dtype", "evaluation computes as training does"),
    "fp16_full_eval": ("model.dtype", "evaluation computes as training does"),
    "tf32": ("", "XLA's default for float32 on the device"),
    "gradient_checkpointing": ("model.remat", "dots, block or offload; none is without"),
    "gradient_checkpointing_kwargs": ("model.remat", ""),
    "activation_checkpointing": ("model.remat", "dots, block or offload; none is without"),
    "activation_checkpointing_kwargs": ("model.remat", ""),
    "activation_offloading": ("model.remat=offload", ""),
    "torch_compile": ("", "everything is compiled"),
    "torch_compile_backend": ("", "everything is compiled by XLA"),
    "torch_compile_mode": ("", "everything is compiled by XLA"),
    "torch_empty_cache_steps": ("", "memory is planned when a program is compiled"),
    "use_cpu": ("", "set the environment variable JAX_PLATFORMS=cpu"),
}

_RECORDS = {
    "output_dir": ("--workdir", "metrics, checkpoints, reference and export lie in it; gs:// and s3:// too"),
    "run_name": ("--workdir", "a run has the name of its folder"),
    "logging_dir": ("--workdir", "of older releases; metrics.jsonl lies in it"),
    "logging_steps": ("log.every_steps", "1 unless it is set; each line is of one batch, not a mean of several"),
    "logging_strategy": ("log.every_steps", "by steps"),
    "logging_first_step": ("", "the first update has a line"),
    "logging_nan_inf_filter": ("", "a loss that is not finite is shown as it is"),
    "log_level": ("", "one level"),
    "log_level_replica": ("", "the first process alone prints"),
    "log_on_each_node": ("", "the first process alone prints"),
    "disable_tqdm": ("", "bars are for terminals alone; elsewhere there are plain lines"),
    "report_to": ("log.tensorboard log.wandb", "metrics.jsonl is always written"),
    "project": ("log.wandb", "the project of Weights & Biases"),
    "trackio_space_id": ("log.tensorboard log.wandb", "Trackio is not offered"),
    "trackio_bucket_id": ("log.tensorboard log.wandb", "Trackio is not offered"),
    "trackio_static_space_id": ("log.tensorboard log.wandb", "Trackio is not offered"),
    "include_num_input_tokens_seen": ("", "tokens_real in metrics.jsonl is that of one batch"),
    "skip_memory_metrics": ("profile.steps", "a trace for XProf"),
    "debug": ("profile.steps", "a trace for XProf"),
    "callbacks": ("hooks", "a function of step and metrics, which changes nothing; eval.patience stops early"),
    "compute_metrics": ("", "eval.jsonl has loss, rewards and log-probs; hooks gets them too"),
}  # fmt: skip

_EVALUATION = {
    "do_train": ("", "the command says it, dpo-jax train"),
    "do_eval": ("data.eval", "data.eval is evaluated before the first update and after the last"),
    "do_predict": ("", "the command says it, dpo-jax evaluate"),
    "eval_strategy": ("eval.every_steps", "by steps"),
    "eval_steps": ("eval.every_steps", "a number of updates, no ratio; 0 is only before and after training"),
    "eval_on_start": ("", "always on; the first line of eval.jsonl is of the untrained model"),
    "eval_delay": ("eval.every_steps", "evaluations are evenly spaced; the first cannot be delayed"),
    "per_device_eval_batch_size": ("", "rows of evaluation are chosen as those of training are"),
    "eval_accumulation_steps": ("", "only sums are kept"),
    "eval_do_concat_batches": ("", "only sums are kept"),
    "eval_use_gather_object": ("", "only sums are kept"),
    "batch_eval_metrics": ("", "only sums are kept"),
    "prediction_loss_only": ("", "only sums are kept"),
    "include_for_metrics": ("", "only sums are kept"),
    "save_strategy": ("checkpoint.every_steps", "by steps"),
    "save_steps": ("checkpoint.every_steps", "the last step is always saved"),
    "save_total_limit": ("checkpoint.keep", "2 unless it is set, where TRL keeps all"),
    "save_only_model": ("", "a checkpoint has all that a resumed run needs; dpo-jax export writes the model alone"),
    "save_on_each_node": ("", "each process writes its share into one folder"),
    "enable_jit_checkpoint": ("", "on SIGTERM a run saves its state and ends with status 75"),
    "resume_from_checkpoint": ("--workdir", "the same command goes on from the newest checkpoint"),
    "overwrite_output_dir": ("--workdir", "of older releases; a finished run is not overwritten"),
    "restore_callback_states_from_checkpoint": ("", "there are no callbacks with a state"),
    "load_best_model_at_end": ("checkpoint.best", "the best state is kept besides the newest, and exported"),
    "metric_for_best_model": ("checkpoint.best", "as in eval/rewards/accuracies:max"),
    "greater_is_better": ("checkpoint.best", "max or min after the metric"),
    "push_to_hub": ("export.push_to_hub", "names the repository; once, at the end"),
    "hub_model_id": ("export.push_to_hub", "owner/name"),
    "hub_strategy": ("", "the export is uploaded once, at the end"),
    "hub_token": ("", "set the environment variable HF_TOKEN"),
    "hub_private_repo": ("export.hub_private", ""),
    "hub_always_push": ("", "as hub_strategy"),
    "hub_revision": ("", "the main branch"),
    "generate_during_eval": ("", "of older releases; nothing is generated; load export/ with transformers or vLLM"),
}

_DEVICES = {
    "fsdp": ("mesh.fsdp", "on by default, over all devices"),
    "fsdp_config": ("mesh.fsdp mesh.rules", ""),
    "deepspeed": ("mesh.fsdp mesh.tensor mesh.replica", "parameters and optimizer state are sharded as with ZeRO-3"),
    "parallelism_config": ("mesh.fsdp mesh.tensor mesh.replica", "no sharding of positions"),
    "accelerator_config": ("mesh.fsdp mesh.tensor mesh.replica", "no launcher; start the same command on every host"),
    "local_rank": ("--process --processes --coordinator", "found on TPU hosts, under SLURM and Open MPI"),
    "ignore_bias_buffers": ("", "there are no buffers"),
    "ddp_find_unused_parameters": ("", "XLA sums what there is to sum"),
    "ddp_bucket_cap_mb": ("", "XLA schedules communication"),
    "ddp_broadcast_buffers": ("", "there are no buffers"),
    "ddp_static_graph": ("", "the graph is compiled"),
    "ddp_backend": ("", "XLA's own"),
    "ddp_timeout": ("", "processes notice within a minute that one has ended"),
}

# By section of docs/from_trl.md.
SECTIONS: Mapping[str, Mapping[str, Equivalent]] = {
    title: {name: Equivalent(*each) for name, each in names.items()}
    for title, names in (
        ("model", _MODEL),
        ("data", _DATA),
        ("objective", _OBJECTIVE),
        ("optimization", _OPTIMIZATION),
        ("precision", _PRECISION),
        ("records", _RECORDS),
        ("evaluation", _EVALUATION),
        ("devices", _DEVICES),
    )
}
OPTIONS: Mapping[str, Equivalent] = {name: each for names in SECTIONS.values() for name, each in names.items()}


def remedy(name: str, typed: Callable[[str], str] = str) -> str:
    """Returns a sentence on an option of TRL, empty if `name` is none.

    Args:
      typed: how a field, such as "loss.beta" or "model.remat=offload", is written where the name was found.
    """
    if name not in OPTIONS:
        return ""
    ours, note = OPTIONS[name]
    fields = [each if each.startswith("--") else typed(each) for each in ours.split()]
    if not fields:
        return f"TRL's {name} has nothing to set here: {note}."
    return f"TRL's {name} is {' and '.join(fields)} here{f': {note}' if note else ''}."
