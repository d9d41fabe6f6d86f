"""What becomes of every field of configs/base.py: it is HONOURED, INERT (does nothing here; the reason) or REFUSED (only its default will do; the reason).

Tables only; config.py applies them. A field is named by its dotted path and stands in exactly one of the three. A feature that lands moves its fields.
"""

import re
from collections.abc import Iterator


def paths(section: str, names: str) -> set[str]:
    return {f"{section}.{name}" for name in names.split()}


CHECKPOINTS, VISION, SCHED = "exp_manager.checkpoint_callback_params", "model.mm_cfg.vision_encoder", "model.optim.sched"

LLM_SHAPE = paths(
    "model",
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization layernorm_epsilon make_vocab_size_divisible_by "
    "override_vocab_size bias qkv_bias activation openai_gelu normalize_attention_scores rotary_percentage rotary_base seq_len_interpolation_factor "
    "scale_positional_embedding rope_scaling_factor rope_low_freq_factor rope_high_freq_factor rope_original_max_position_embeddings "
    "share_embeddings_and_output_weights mm_cfg.mm_mlp_adapter_type mm_cfg.use_im_start_end",
)
VISION_SHAPE = paths(
    VISION,
    "patch_dim crop_size hidden_size vision_select_layer vision_select_feature num_layers num_attention_heads ffn_hidden_size layernorm_epsilon hidden_act "
    "model_type class_token_length",
)
FP8 = paths("model", "fp8 fp8_e4m3 fp8_hybrid fp8_margin fp8_amax_history_len fp8_amax_compute_algo fp8_frozen_weights fp8_scaling")
ADAPTERS = {"model.peft.peft_scheme"} | paths("model.peft.lora_tuning", "adapter_dim alpha target_modules variant layer_selection")
ADAPTER_TRAINING = {"model.peft.projector_lr_factor"} | paths(
    "model.peft.lora_tuning", "adapter_dropout dropout_position column_init_method row_init_method"
)
ARCHITECTURE = LLM_SHAPE | VISION_SHAPE  # the shapes of the weights and what they mean: another value cannot resume a run; nor can one of ADAPTERS

HONOURED = (
    {"name", "restore_from_path", "trainer.deterministic"}
    | paths("evaluation", "task questions annotations image_folder every_validation batch_size max_new_tokens num_samples")
    | ARCHITECTURE
    | paths("trainer", "devices num_nodes precision max_epochs max_steps log_every_n_steps val_check_interval limit_val_batches gradient_clip_val")
    | paths("exp_manager", "explicit_log_dir exp_dir name version use_datetime_version create_tensorboard_logger create_checkpoint_callback")
    | paths("exp_manager", "resume_if_exists resume_ignore_no_checkpoint")
    | paths(CHECKPOINTS, "dirpath monitor mode save_top_k save_last every_n_train_steps")
    | paths("model", "precision micro_batch_size global_batch_size tensor_model_parallel_size fsdp_parallel_size sequence_parallel loss_reduction trainable")
    | paths("model", "pipeline_model_parallel_size virtual_pipeline_model_parallel_size pipeline_round_size")
    | paths("model", "restore_from_path seed encoder_seq_length no_seqlen_plus_one_input_tokens init_method_std use_scaled_init_method")
    | paths("model", "do_layer_norm_weight_decay fp32_residual_connection use_flash_attention activations_checkpoint_granularity")
    | paths("model", "activations_checkpoint_method activations_checkpoint_num_layers")
    | FP8
    | ADAPTERS
    | ADAPTER_TRAINING
    | {"model.peft.restore_from_path"}
    | paths("model.mm_cfg", "llm.from_pretrained llm.freeze llm.model_type pretrain_mm_mlp_adapter allow_random_frozen")
    | paths(VISION, "from_pretrained freeze")
    | paths("model.tokenizer", "library type model vocab_file merge_file sentencepiece_legacy additional_special_tokens")
    | paths("model.data", "data_path image_folder image_aspect_ratio conv_template dataloader_type num_workers validation on_bad_image max_bad_images")
    | {"model.data.concat_sampling_probabilities"}
    | paths("model.data", "buckets length_grouping cache_dir pixel_cache_gib max_media apply_exif_rotation compat sep_image_conv_front eod_mask_loss")
    | paths("model.optim", "name lr weight_decay betas eps grad_accum_dtype")
    | paths(SCHED, "name warmup_steps warmup_ratio constant_steps constant_ratio hold_steps hold_ratio min_lr max_steps power decay_rate d_model")
)

INERT_GROUPS = (  # (section, names, reason)
    ("", "cluster_type", "the launcher's environment is read instead"),
    ("trainer", "accelerator", "JAX takes the devices it finds; JAX_PLATFORMS chooses among them"),
    ("trainer", "logger enable_checkpointing use_distributed_sampler", "belongs to PyTorch Lightning; loggers and checkpoints are under exp_manager"),
    ("trainer", "benchmark enable_model_summary", "belongs to PyTorch; what trains is printed at the start"),
    ("trainer", "limit_test_batches", "training has no test set"),
    ("trainer", "num_sanity_val_steps", "no validation runs before training"),
    ("exp_manager", "create_preemption_callback", "SIGTERM always saves the state and ends the run with exit code 143"),
    ("exp_manager", "files_to_copy", "nothing is copied; the resolved config is saved as config.json"),
    ("exp_manager", "log_step_timing", "step times are always in metrics.jsonl"),
    ("exp_manager", "log_tflops_per_sec_per_gpu", "throughput is always in metrics.jsonl"),
    ("exp_manager.step_timing_kwargs", "reduction sync_cuda buffer_size", "step times are measured in one way"),
    ("exp_manager", "log_local_rank_0_only log_global_rank_0_only", "there are no log files per process; logs go to standard error"),
    ("exp_manager", "resume_past_end", "a finished run that is started again only evaluates; raise trainer.max_steps to train on"),
    ("exp_manager", "disable_validation_on_resume", "a resumed run never begins with a validation"),
    ("exp_manager", "seconds_to_sleep", "nothing waits for other processes by sleeping"),
    ("exp_manager", "summary_writer_kwargs", "the TensorBoard writer takes no options"),
    ("exp_manager.wandb_logger_kwargs", "project name group resume id", "read only with create_wandb_logger"),
    *(("exp_manager", f"{logger}_kwargs", f"read only with create_{logger}") for logger in ("mlflow_logger", "clearml_logger", "neptune_logger")),
    ("exp_manager", "dllogger_logger_kwargs", "read only with create_dllogger_logger"),
    (
        "exp_manager.early_stopping_callback_params",
        "monitor mode min_delta patience verbose strict check_finite stopping_threshold divergence_threshold check_on_train_epoch_end log_rank_zero_only",
        "read only with create_early_stopping_callback",
    ),
    ("exp_manager", "straggler_detection_params", "read only with create_straggler_detection_callback"),
    ("exp_manager", "fault_tolerance", "read only with create_fault_tolerance_callback"),
    ("exp_manager.ema", "decay validate_original_weights every_n_steps cpu_offload", "read only with ema.enable"),
    (CHECKPOINTS, "filename prefix postfix auto_insert_metric_name", "checkpoints are directories named by their step"),
    (CHECKPOINTS, "every_n_epochs save_on_train_epoch_end", "checkpoints follow validations, or every_n_train_steps"),
    (CHECKPOINTS, "save_nemo_on_train_end", "writing .nemo files is not in this version"),
    (CHECKPOINTS, "model_parallel_size", "checkpoints do not depend on the mesh"),
    (CHECKPOINTS, "verbose async_save", "checkpoints are always announced, and always written in the background"),
    ("model", "fsdp_sharding_strategy fsdp_grad_reduce_dtype fsdp_sharded_checkpoint fsdp_use_orig_params", "belongs to PyTorch; see fsdp_parallel_size"),
    ("model", "mcore_gpt transformer_engine", "chooses a PyTorch implementation; names in .nemo files are recognised"),
    ("model", "pre_process post_process", "NeMo sets it by pipeline stage"),
    ("model", "apply_query_key_layer_scaling", "changes no number in bf16 and fp32"),
    ("model", "persist_layer_norm masked_softmax_fusion bias_dropout_add_fusion bias_activation_fusion apply_rope_fusion", "XLA fuses by itself"),
    ("model", "gradient_accumulation_fusion overlap_p2p_comm batch_p2p_comm sync_batch_comm ub_tp_comm_overlap ub_tp_comm_overlap_cfg", "belongs to CUDA"),
    ("model", "enable_cuda_graph onnx_safe use_cpu_initialization gc_interval apex_transformer_log_level", "belongs to PyTorch"),
    ("model", "async_grad_allreduce grad_allreduce_chunk_size_mb grad_div_ar_fusion gradient_as_bucket_view", "XLA schedules the reduction of gradients"),
    (
        "model",
        "dist_ckpt_format dist_ckpt_load_on_device dist_ckpt_parallel_save dist_ckpt_parallel_save_within_dp dist_ckpt_parallel_load "
        "dist_ckpt_torch_dist_multiproc dist_ckpt_assume_constant_structure dist_ckpt_parallel_dist_opt",
        "checkpoints are written by Orbax",
    ),
    ("model", "max_position_embeddings", "positions are rotary and have no table; encoder_seq_length says how long a record may be"),
    ("model", "num_micro_batches_with_partial_activation_checkpoints", "NeVA never read it"),
    ("model", "megatron_amp_O2", "masters of what trains are fp32 and frozen weights are stored in the compute dtype either way"),
    ("model", "native_amp_init_scale native_amp_growth_interval hysteresis", "read only with precision 16"),
    ("model.mm_cfg.lita", "lita_video_arch visual_token_format sample_frames", "read only with use_lita"),
    ("model.tokenizer", "delimiter", "read only by tabular tokenizers"),
    ("model.data", "micro_batch_size global_batch_size", "model.micro_batch_size and model.global_batch_size are read instead"),
    ("model.data", "lazy_preprocess sep_token_between_frames", "NeVA never read it"),
    ("model.data", "image_token_len", "the number of positions an image takes follows from crop_size, patch_dim and mm_mlp_adapter_type"),
    ("model.data", "crop_size", "model.mm_cfg.vision_encoder.crop_size is read instead"),
    ("model.data", "video_folder splice_single_frame num_frames", "read only with media_type video"),
    ("model.data", "num_time_tokens", "read only with use_lita"),
    ("model.data", "pad_samples_to_global_batch_size", "records left over begin the next epoch, and the end of a single pass is never padded"),
    ("model.energon", "data", "read only with use_energon"),
    ("model.nsys_profile", "start_step end_step ranks gen_shape", "read only with nsys_profile.enabled"),
    ("model.optim", "bucket_cap_mb overlap_grad_sync overlap_param_sync contiguous_grad_buffer grad_sync_dtype", "XLA schedules the reduction of gradients"),
    ("model.peft.lora_tuning", "position_embedding_strategy", "read only with weight_tying"),
)
INERT = {path: reason for section, names, reason in INERT_GROUPS for path in (paths(section, names) if section else {names})}

LATER = "this version does not have it"
REFUSED_GROUPS = (  # (section, names, sentence)
    ("trainer", "accumulate_grad_batches", "accumulation follows from global_batch_size / (micro_batch_size x data parallel size)"),
    ("trainer", "check_val_every_n_epoch", "validations are counted in steps; set trainer.val_check_interval"),
    ("trainer", "resume_from_checkpoint", "a run resumes from its own newest checkpoint; weights of another are taken by restore_from_path"),
    ("exp_manager", "resume_from_checkpoint", "a run resumes from its own newest checkpoint; weights of another are taken by restore_from_path"),
    ("model", "resume_from_checkpoint", "a run resumes from its own newest checkpoint; weights of another are taken by restore_from_path"),
    ("exp_manager", "create_wandb_logger create_mlflow_logger create_dllogger_logger", "metrics go to metrics.jsonl and TensorBoard only"),
    ("exp_manager", "create_clearml_logger create_neptune_logger", "metrics go to metrics.jsonl and TensorBoard only"),
    ("exp_manager", "create_early_stopping_callback ema.enable max_time_per_run", LATER),
    ("exp_manager", "create_straggler_detection_callback create_fault_tolerance_callback", LATER),
    (CHECKPOINTS, "save_weights_only", "a checkpoint always holds the whole state, so that it can be resumed"),
    (CHECKPOINTS, "train_time_interval", "checkpoints are counted in steps; set every_n_train_steps"),
    (CHECKPOINTS, "save_best_model", "the best checkpoints are kept by save_top_k"),
    (CHECKPOINTS, "always_save_nemo", "writing .nemo files is not in this version"),
    ("model", "rampup_batch_size context_parallel_size expert_model_parallel_size", LATER),
    ("model", "fsdp", "sharding of weights and optimizer state is set by model.fsdp_parallel_size"),
    ("model", "num_moe_experts moe_router_topk moe_aux_loss_coeff moe_grouped_gemm moe_token_dispatcher_type", "models with experts are not in this version"),
    ("model", "position_embedding_type", "positions are rotary"),
    ("model", "hidden_dropout attention_dropout ffn_dropout", "there is no dropout"),
    ("model", "transformer_block_type headscale attention_type", "only NeMo's legacy models have it"),
    ("model", "window_size", "attention sees the whole record; where model.encoder_seq_length is within the window, that is the same"),
    ("model", "rotary_interleaved", "rotation uses the two halves of a head, as Hugging Face's Llama does"),
    ("model", "fp16_lm_cross_entropy", "cross-entropy is computed in fp32"),
    ("model", "activations_checkpoint_layers_per_pipeline", "all pipeline stages run one program, and each is computed again whole"),
    ("model", "fp8_interval", "scales follow their amaxes at every step"),
    ("model", "reduce_amax", "an amax is always that of the whole tensor, over all devices, so that the mesh changes no number"),
    ("model", "use_emha", "NeMo does not support it either"),
    ("model", "megatron_legacy", "weights in Megatron's first layout of q, k and v cannot be read"),
    ("model", "reset_lr reset_lr_steps", "a resumed run continues its schedule; start a new run from the weights with model.restore_from_path"),
    (VISION, "from_hf", "towers are read from Hugging Face's layout"),
    ("model.mm_cfg", "use_lita", LATER),
    ("model.data", "packed_sequence", LATER),
    ("model.data", "is_multimodal", "records without an image are read as they are"),
    ("model.data", "media_type", "media are images in this version"),
    ("model.data", "validation_drop_last", "NeMo does not support it either"),
    ("model.energon", "use_energon", LATER),
    ("model.nsys_profile", "enabled", LATER),
    (SCHED, "cycle", LATER),
    ("model.peft.lora_tuning", "weight_tying", "every layer has adapters of its own"),
)
REFUSED = {path: sentence for section, names, sentence in REFUSED_GROUPS for path in paths(section, names)}

FOLLOWERS = paths("model.data", "conv_template micro_batch_size global_batch_size") | {f"{CHECKPOINTS}.model_parallel_size"}
FOLLOWERS |= {"model.precision", "model.fp8_frozen_weights", "model.max_position_embeddings", "exp_manager.resume_from_checkpoint"}
NULLABLE = {
    "trainer.gradient_clip_val",
    "trainer.limit_val_batches",
    "model.data.image_aspect_ratio",
    "exp_manager.name",
    f"{CHECKPOINTS}.filename",
    f"{SCHED}.warmup_steps",
    f"{SCHED}.constant_steps",
}

INITS = ("xavier", "normal", "kaiming", "zero")
PRECISIONS = ("bf16", "bf16-mixed", 32)
OPTIMIZERS = "fused_adam adamw megatron_fused_adam distributed_fused_adam mcore_distributed_optim adam sgd"
SCHEDULES = (
    "CosineAnnealing WarmupPolicy WarmupHoldPolicy WarmupAnnealing SquareAnnealing SquareRootAnnealing InverseSquareRootAnnealing T5InverseSquareRootAnnealing "
    "NoamAnnealing NoamHoldAnnealing PolynomialDecayAnnealing PolynomialHoldDecayAnnealing"
)
ACTIVATIONS = "fast-swiglu swiglu fast-geglu geglu fast-reglu reglu gelu approx-gelu squared-relu"

CHOICES = {  # honoured fields with a fixed set of values
    "evaluation.task": ("captions", "vqav2", "gqa", "textvqa", "scienceqa", "pope", "mme", "exact_match"),
    "trainer.precision": PRECISIONS,
    "model.precision": PRECISIONS,
    f"{CHECKPOINTS}.mode": ("min", "max"),
    "model.fp8_scaling": ("delayed", "current"),
    "model.fp8_amax_compute_algo": ("most_recent", "max"),
    "model.loss_reduction": ("global_token_mean", "microbatch_mean"),
    "model.normalization": ("rmsnorm", "layernorm", "layernorm1p"),
    "model.activation": tuple(ACTIVATIONS.split()),
    "model.activations_checkpoint_granularity": (None, "selective", "full"),
    "model.activations_checkpoint_method": (None, "uniform", "block"),
    f"{VISION}.vision_select_feature": ("patch", "cls_patch"),
    f"{VISION}.model_type": (None, "clip_vision_model", "clip", "siglip_vision_model", "siglip"),
    f"{VISION}.hidden_act": ("quick_gelu", "gelu", "gelu_pytorch_tanh"),
    "model.tokenizer.library": ("sentencepiece", "huggingface", "megatron"),
    "model.data.image_aspect_ratio": ("square", "pad", None),
    "model.data.dataloader_type": ("cyclic", "single"),
    "model.data.compat": ("exact", "nemo_v2.0.0", "nemo_v1.23.0", "llava"),
    "model.data.on_bad_image": ("raise", "skip"),
    "model.optim.name": tuple(OPTIMIZERS.split()),
    "model.optim.grad_accum_dtype": ("fp32", "bf16"),
    f"{SCHED}.name": tuple(SCHEDULES.split()),
    "model.peft.peft_scheme": (None, "lora"),
    "model.peft.lora_tuning.variant": ("nemo", "canonical"),
    "model.peft.lora_tuning.dropout_position": ("pre", "post"),
    "model.peft.lora_tuning.column_init_method": INITS,
    "model.peft.lora_tuning.row_init_method": INITS,
}

LORA_TARGETS = {  # NeMo's names, and Hugging Face's -> projections of a layer, or further names
    "attention_qkv": ("q", "k", "v"), "attention_dense": ("o",), "mlp_fc1": ("gate", "up"), "mlp_fc2": ("down",),
    "attention": ("attention_qkv", "attention_dense"), "mlp": ("mlp_fc1", "mlp_fc2"), "all": ("attention", "mlp"),
} | {f"{name}_proj": (name,) for name in ("q", "k", "v", "o", "gate", "up", "down")}  # fmt: skip

LLAMAS = ("llama_2", "llama_3", "mistral", "v1")
LLAMA = {"model.mm_cfg.llm.model_type": LLAMAS, "model.data.conv_template": LLAMAS, "model.normalization": ("rmsnorm",)}  # what each shows itself by
NVGPT = {"model.mm_cfg.llm.model_type": ("nvgpt",), "model.normalization": ("layernorm1p",), "model.tokenizer.library": ("megatron",)}

FP16 = "; fp16 needs a loss scaler, which this version does not have, and bf16 needs none"
HINTS = {
    "trainer.precision": FP16,
    "model.precision": FP16,
    "model.data.image_aspect_ratio": "; keep and anyres are only in neva_jax.data.image.ImageProcessor(aspect=...): keep's size varies with the picture and "
    "CLIP's position table takes one (NeMo's own tower fails on it), and merging anyres's tiles needs LLaVA-NeXT's image_newline, not in this version",
    "model.peft.peft_scheme": "; ptuning, ia3, adapter, mlp_head and the other schemes of NeMo's map are not in this version; qlora's purpose, a small frozen "
    "base, is served by lora with model.fp8=True and model.fp8_frozen_weights=True; several schemes at once are not either",
    "model.activation": "; fast- says how NeMo stores two matrices and changes no number",
}

POSITIVE = (
    paths("trainer", "num_nodes log_every_n_steps")
    | paths("model", "micro_batch_size global_batch_size tensor_model_parallel_size fsdp_parallel_size encoder_seq_length num_layers")
    | paths("model", "pipeline_model_parallel_size virtual_pipeline_model_parallel_size pipeline_round_size")
    | paths("model", "hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels init_method_std layernorm_epsilon")
    | paths("model", "make_vocab_size_divisible_by override_vocab_size rotary_base seq_len_interpolation_factor activations_checkpoint_num_layers")
    | paths("model", "rope_scaling_factor rope_low_freq_factor rope_high_freq_factor rope_original_max_position_embeddings")
    | paths(VISION, "patch_dim hidden_size num_layers num_attention_heads ffn_hidden_size layernorm_epsilon")
    | paths("model.data", "max_media max_bad_images pixel_cache_gib")
    | paths(SCHED, "max_steps d_model")
    | {f"{CHECKPOINTS}.every_n_train_steps", "model.optim.eps", "evaluation.batch_size", "evaluation.max_new_tokens"}
    | paths("model.peft.lora_tuning", "adapter_dim alpha")
)
NOT_NEGATIVE = (
    paths("model.optim", "lr weight_decay")
    | paths(SCHED, "warmup_steps constant_steps hold_steps min_lr power decay_rate")
    | {"trainer.gradient_clip_val", "model.data.num_workers", "model.seed", "evaluation.num_samples", "model.peft.projector_lr_factor"}
)


def traps(get: dict) -> Iterator[str]:
    """What harms a model without a word, in a config {path: value} whose values are right by themselves: a sentence each."""
    llama, nvgpt = ([f"{path} {get[path]}" for path, values in signs.items() if get[path] in values] for signs in (LLAMA, NVGPT))
    if get["model.tokenizer.library"] == "sentencepiece" and get["model.tokenizer.model"] is not None:
        llama.append("a sentencepiece tokenizer")
    rotary, crop, tower = get["model.rotary_percentage"], get[f"{VISION}.crop_size"], get[f"{VISION}.from_pretrained"]
    if llama and rotary != 1:
        yield f"model.rotary_percentage is {rotary}, beside {', '.join(llama)}: Llama, Vicuna and Mistral weights need 1.0; NVGPT has 0.5"
    if llama and nvgpt:
        half = f"half NVGPT ({', '.join(nvgpt)}), half Llama ({', '.join(llama)})"
        yield f"the config is {half}: NeMo's finetuning files hold NVGPT's numbers; set all to what the weights are"
    size = re.search(r"-(224|336|384)/?$", tower or "")
    if size and int(size[1]) != crop[0]:
        yield f"{VISION}.crop_size is {crop}, and from_pretrained is {tower}, whose name says {size[1]} pixels; set it to ({size[1]}, {size[1]})"


def idle(get: dict) -> dict[str, str]:
    """{path: reason} of honoured fields that do nothing beside the others of a config {path: value}."""
    found = {}
    if get["model.peft.peft_scheme"] is None:
        fields = ADAPTERS | ADAPTER_TRAINING | {"model.peft.restore_from_path"}
        found |= dict.fromkeys(fields - {"model.peft.peft_scheme"}, "read only with peft_scheme")
    elif not get["model.peft.lora_tuning.adapter_dropout"]:
        found["model.peft.lora_tuning.dropout_position"] = "read only with adapter_dropout"
    if not get["model.fp8"]:
        found |= dict.fromkeys(FP8 - {"model.fp8"}, "read only with fp8")
    elif get["model.fp8_scaling"] != "delayed":
        found |= dict.fromkeys(paths("model", "fp8_amax_history_len fp8_amax_compute_algo"), "read only with fp8_scaling delayed")
    return found


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value) -> bool:
    return _number(value) and isinstance(value, int)


def _row(value) -> bool:
    """A row of model.trainable."""
    return isinstance(value, tuple) and len(value) == 3 and isinstance(value[0], str) and _number(value[1]) and (value[2] is None or _number(value[2]))


RULES = {  # {path: (what holds for every value but null, in words)}
    **{path: (lambda v: v > 0, "more than 0") for path in POSITIVE},
    **{path: (lambda v: v >= 0, "0 or more") for path in NOT_NEGATIVE},
    **{path: (lambda v: 0 <= v <= 1, "a share from 0 to 1") for path in paths(SCHED, "warmup_ratio constant_ratio hold_ratio")},
    **{path: (lambda v: v == -1 or v > 0, "more than 0, or -1 for no limit") for path in paths("trainer", "max_steps max_epochs")},
    "trainer.devices": (lambda v: v in (-1, "auto") or (_whole(v) and v > 0), "a number of GPUs a node, or -1 for all; CUDA_VISIBLE_DEVICES says which"),
    "trainer.val_check_interval": (lambda v: _number(v) and v > 0 and (_whole(v) or v <= 1), "a number of steps, or a share of an epoch such as 0.5"),
    "trainer.limit_val_batches": (lambda v: _number(v) and v >= 0 and (_whole(v) or v <= 1), "a number of global batches, or a share such as 0.5"),
    f"{CHECKPOINTS}.save_top_k": (lambda v: v >= -1, "a number of checkpoints, 0 for none or -1 for all"),
    "model.num_layers": (lambda v: 0 < v <= 1000, "a number of layers, at most 1000"),
    "model.override_vocab_size": (lambda v: 0 < v <= 10_000_000, "a number of tokens, at most ten million"),
    f"{VISION}.class_token_length": (lambda v: v in (0, 1), "1, or 0 for a tower without a class token"),
    "model.fp8_margin": (lambda v: 0 <= v <= 8, "a whole number from 0 to 8: so many powers of two are left free above the largest number seen"),
    "model.fp8_amax_history_len": (lambda v: 1 <= v <= 4096, "a number of steps from 1 to 4096"),
    "model.rotary_percentage": (lambda v: 0 < v <= 1, "a share above 0, at most 1"),
    "model.trainable": (lambda v: isinstance(v, tuple) and all(map(_row, v)), "rows (path pattern, learning-rate factor, weight decay or None)"),
    "model.mm_cfg.mm_mlp_adapter_type": (
        lambda v: re.fullmatch(r"identity|linear|mlp[1-9]\d*x_gelu|mlp_downsample(_rowmajor)?", v),
        "identity, linear, mlp{N}x_gelu such as mlp2x_gelu, mlp_downsample or mlp_downsample_rowmajor",
    ),
    f"{VISION}.crop_size": (lambda v: len(v) == 2 and v[0] == v[1] and _whole(v[0]) and v[0] > 0, "two equal numbers of pixels, such as (224, 224)"),
    "model.optim.betas": (lambda v: len(v) == 2 and all(_number(b) and 0 <= b < 1 for b in v), "two numbers from 0 to below 1, such as (0.9, 0.95)"),
    "model.peft.lora_tuning.adapter_dropout": (lambda v: 0 <= v < 1, "a share from 0 to below 1"),
    "model.peft.lora_tuning.target_modules": (
        lambda v: len(v) > 0 and all(isinstance(name, str) and name in LORA_TARGETS for name in v),
        f"names among {', '.join(LORA_TARGETS)}",
    ),
    "model.peft.lora_tuning.layer_selection": (
        lambda v: len(v) > 0 and all(_whole(n) and n > 0 for n in v) and len(v) == len(set(v)),
        "numbers of layers, the lowest being 1, such as (1, 12)",
    ),
    "model.data.data_path": (lambda v: isinstance(v, str) or (isinstance(v, tuple) and all(isinstance(p, str) for p in v)), "the path of a .json file"),
    "model.data.concat_sampling_probabilities": (
        lambda v: all(_number(p) and p >= 0 for p in v) and 0 < sum(v) < float("inf"),
        "a number of 0 or more for each file of model.data.data_path, not all 0, such as (0.7, 0.3)",
    ),
    "model.data.validation": (lambda v: isinstance(v, str) or (isinstance(v, float) and 0 < v < 1), "a path, or a share of the records such as 0.01"),
    "model.data.buckets": (
        lambda v: isinstance(v, tuple) and len(v) > 0 and all(_whole(n) and n > 0 for n in v) and list(v) == sorted(set(v)),
        "growing numbers of tokens, such as (512, 1024, 2048)",
    ),
}
