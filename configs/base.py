"""Every field that NeMo documents for NeVA, under NeMo's name and nesting, with the values of NeMo's neva_config_v2.0.0.yaml (else of NeMo's code), and ours.

What each field does here, and which do nothing or are refused, is said in neva_jax/fields.py. Given up: sections without a fixed set of keys (the keyword
arguments of loggers, energon's data) are one leaf each. Types: no leaf is a list; a leaf that may be null is a placeholder; `object` leaves take several types.
"""

from ml_collections import ConfigDict, config_dict


def null(kind):
    """A leaf that is null until it is set."""
    return config_dict.placeholder(kind)


def any_of(value):
    """A leaf of several types, with its default."""
    return config_dict.FieldReference(value, field_type=object)


def get_config() -> ConfigDict:
    config = ConfigDict(
        {
            "name": "nemo_neva",  # the run's name
            "restore_from_path": null(str),  # a .nemo to start from
            "cluster_type": null(str),
            "trainer": trainer(),
            "evaluation": evaluation(),
            "exp_manager": exp_manager() | loggers() | {"checkpoint_callback_params": checkpoint_callback_params()},
            "model": parallelism() | architecture() | recomputation() | fusions() | precision() | miscellaneous(),
        }
    )
    config.model.update({"mm_cfg": mm_cfg(), "tokenizer": tokenizer(), "data": data(), "energon": energon(), "nsys_profile": nsys_profile()})
    config.model.update({"optim": optim(), "peft": peft()})
    return link(config)


def evaluation() -> dict:
    """Ours. questions: a file of `task` that is asked when training ends, and with every_validation at every validation too; annotations, image_folder: as of
    python -m neva_jax.evaluate (null: model.data.image_folder). num_samples: records of the validation that are asked, with their pictures, for TensorBoard."""
    return {
        "task": "exact_match", "questions": null(str), "annotations": null(tuple), "image_folder": null(str), "every_validation": False, "batch_size": 64,
        "max_new_tokens": 64, "num_samples": 4,
    }  # fmt: skip


def link(config: ConfigDict) -> ConfigDict:
    """NeMo's ${...}: a follower has its source's value until it is set itself; setting it leaves the source alone."""
    model = config.model
    model.precision = config.trainer.get_oneway_ref("precision")
    model.max_position_embeddings = model.get_oneway_ref("encoder_seq_length")
    model.fp8_frozen_weights = model.get_oneway_ref("fp8")
    model.data.conv_template = model.mm_cfg.llm.get_oneway_ref("model_type")
    model.data.micro_batch_size = model.get_oneway_ref("micro_batch_size")
    model.data.global_batch_size = model.get_oneway_ref("global_batch_size")
    sizes = model.get_oneway_ref("tensor_model_parallel_size") * model.get_ref("pipeline_model_parallel_size")
    config.exp_manager.checkpoint_callback_params.model_parallel_size = sizes
    config.exp_manager.resume_from_checkpoint = model.get_oneway_ref("resume_from_checkpoint")
    return config


def trainer() -> dict:
    return {
        "devices": any_of(1),  # GPUs a node; -1 or "auto": all
        "num_nodes": 1,
        "accelerator": "gpu",
        "precision": any_of("bf16"),  # bf16, bf16-mixed, 32
        "logger": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
        "max_epochs": -1,  # -1: no limit
        "max_steps": 4650,  # -1: no limit; also the length of the learning-rate schedule
        "log_every_n_steps": 10,
        "val_check_interval": any_of(100),  # steps, or a share (float) of an epoch
        "check_val_every_n_epoch": null(int),
        "limit_val_batches": any_of(50),  # global batches a validation, or a share (float); 0: no validation
        "limit_test_batches": any_of(500),
        "num_sanity_val_steps": 2,
        "accumulate_grad_batches": 1,
        "gradient_clip_val": 1.0,  # global L2 norm; 0 or null: off
        "benchmark": False,
        "enable_model_summary": False,
        "resume_from_checkpoint": null(str),
        "deterministic": False,  # ours: bit-identical runs on GPUs, slower
    }


def exp_manager() -> dict:
    return {
        "explicit_log_dir": null(str),  # the run's directory itself
        "exp_dir": null(str),  # else exp_dir/name/version; null: ./nemo_experiments
        "name": "nemo_neva",
        "version": null(str),
        "use_datetime_version": True,
        "resume_if_exists": True,
        "resume_past_end": False,
        "resume_ignore_no_checkpoint": True,
        "resume_from_checkpoint": null(str),  # follows model.resume_from_checkpoint
        "create_checkpoint_callback": True,
        "create_early_stopping_callback": False,
        "early_stopping_callback_params": {
            "monitor": "val_loss",
            "mode": "min",
            "min_delta": 0.001,
            "patience": 10,
            "verbose": True,
            "strict": True,
            "check_finite": True,
            "stopping_threshold": null(float),
            "divergence_threshold": null(float),
            "check_on_train_epoch_end": null(bool),
            "log_rank_zero_only": False,
        },
        "create_preemption_callback": True,
        "files_to_copy": null(tuple),
        "log_step_timing": True,
        "step_timing_kwargs": {"reduction": "mean", "sync_cuda": False, "buffer_size": 1},
        "log_local_rank_0_only": False,
        "log_global_rank_0_only": False,
        "disable_validation_on_resume": True,
        "ema": {"enable": False, "decay": 0.9999, "validate_original_weights": False, "every_n_steps": 1, "cpu_offload": False},
        "max_time_per_run": null(str),
        "seconds_to_sleep": 5.0,
        "create_straggler_detection_callback": False,
        "straggler_detection_params": null(object),
        "create_fault_tolerance_callback": False,
        "fault_tolerance": null(object),
        "log_tflops_per_sec_per_gpu": True,
    }


def loggers() -> dict:
    return {
        "create_tensorboard_logger": True,
        "summary_writer_kwargs": null(object),
        "create_wandb_logger": False,
        "wandb_logger_kwargs": {"project": null(str), "name": null(str), "group": null(str), "resume": null(object), "id": null(str)},
        "create_mlflow_logger": False,
        "mlflow_logger_kwargs": null(object),
        "create_dllogger_logger": False,
        "dllogger_logger_kwargs": null(object),
        "create_clearml_logger": False,
        "clearml_logger_kwargs": null(object),
        "create_neptune_logger": False,
        "neptune_logger_kwargs": null(object),
    }


def checkpoint_callback_params() -> dict:
    return {
        "dirpath": null(str),  # null: checkpoints/ in the run's directory
        "filename": "megatron_clip--{val_loss:.2f}-{step}-{consumed_samples}",
        "monitor": "val_loss",  # what the best checkpoints are best in
        "mode": "min",
        "save_top_k": 10,  # -1: all, 0: none
        "save_last": True,
        "every_n_train_steps": null(int),  # null: after each validation
        "every_n_epochs": 1,
        "train_time_interval": null(str),
        "save_on_train_epoch_end": False,
        "save_weights_only": False,
        "save_best_model": False,
        "always_save_nemo": False,
        "save_nemo_on_train_end": True,
        "model_parallel_size": 1,  # follows tensor x pipeline parallel size
        "verbose": True,
        "auto_insert_metric_name": True,
        "prefix": null(str),
        "postfix": ".nemo",
        "async_save": False,
    }


def parallelism() -> dict:
    return {
        "precision": any_of("bf16"),  # follows trainer.precision
        "micro_batch_size": 16,  # records a device (a tensor x pipeline group of them) reads at once
        "global_batch_size": 128,  # records an optimizer step; a multiple of micro_batch_size x data parallel size
        "rampup_batch_size": null(tuple),
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,  # stages: devices that share the layers out, and pass micro-batches on
        "virtual_pipeline_model_parallel_size": null(int),  # stages a device; more make less idle time and more traffic
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "sequence_parallel": False,  # with tensor parallelism: norms and residuals are split over the sequence
        "fsdp_parallel_size": 1,  # ours: weights, gradients and optimizer state are split over so many of the data parallel devices
        "pipeline_round_size": null(int),  # ours: micro-batches a pipelined gradient; null: 4 x stages, or the most below that divides what there is
        "fsdp": False,
        "fsdp_sharding_strategy": "full",
        "fsdp_grad_reduce_dtype": "fp32",
        "fsdp_sharded_checkpoint": False,
        "fsdp_use_orig_params": False,
        "loss_reduction": "global_token_mean",  # ours; NeMo 1.x: microbatch_mean
        "trainable": null(object),  # ours: rows (pattern of paths, learning-rate factor, weight decay or null); null: as the freeze fields say
    }


def mm_cfg() -> dict:
    return {
        "llm": {
            "from_pretrained": null(str),  # a .nemo, a Hugging Face directory or a run: the language model's weights
            "freeze": True,
            "model_type": "llama_2",  # names the media tokens, and the conversation template unless data.conv_template is set
        },
        "vision_encoder": {
            "from_pretrained": null(str),  # a Hugging Face name or directory
            "from_hf": True,
            "patch_dim": 14,
            "crop_size": (224, 224),
            "hidden_size": 1024,
            "vision_select_layer": -2,  # -1: after the last block, -2: after the last but one
            "vision_select_feature": "patch",  # patch drops the class token, cls_patch keeps it
            "class_token_length": 1,  # 0 for SigLIP
            "freeze": True,
            "model_type": null(str),  # clip_vision_model or siglip_vision_model; null: what the weights are, and CLIP without any
            "num_layers": 24,  # ours, as the four below: a tower built without a checkpoint
            "num_attention_heads": 16,
            "ffn_hidden_size": 4096,
            "layernorm_epsilon": 1e-5,
            "hidden_act": "quick_gelu",
        },
        "pretrain_mm_mlp_adapter": null(str),  # the projector's weights
        "mm_mlp_adapter_type": "linear",  # identity, linear, mlp{N}x_gelu, mlp_downsample, mlp_downsample_rowmajor
        "use_im_start_end": False,
        "use_lita": False,
        "lita": {"lita_video_arch": "temporal_spatial_pool", "visual_token_format": "v1", "sample_frames": 4},
        "allow_random_frozen": False,  # ours: a frozen part without weights is an error unless True
    }


def architecture() -> dict:
    return {
        "mcore_gpt": False,
        "encoder_seq_length": 4096,
        "max_position_embeddings": 4096,  # follows encoder_seq_length
        "position_embedding_type": "rope",
        "num_layers": 40,
        "hidden_size": 5120,
        "ffn_hidden_size": 13824,
        "num_attention_heads": 40,
        "num_query_groups": null(int),  # null: as many as heads
        "kv_channels": null(int),  # null: hidden_size / num_attention_heads
        "init_method_std": 0.014,
        "use_scaled_init_method": True,  # output projections: init_method_std / sqrt(2 num_layers)
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "apply_query_key_layer_scaling": True,
        "normalization": "rmsnorm",  # rmsnorm, layernorm, layernorm1p
        "layernorm_epsilon": 1e-5,
        "do_layer_norm_weight_decay": False,
        "make_vocab_size_divisible_by": 128,
        "override_vocab_size": null(int),
        "pre_process": True,
        "post_process": True,
        "bias": False,
        "qkv_bias": False,
        "activation": "fast-swiglu",
        "openai_gelu": False,
        "headscale": False,
        "transformer_block_type": "pre_ln",
        "normalize_attention_scores": True,
        "rotary_percentage": 1.0,  # the share of a head's dimensions that is rotated
        "rotary_base": 10000.0,
        "rotary_interleaved": False,
        "seq_len_interpolation_factor": null(float),
        "scale_positional_embedding": False,  # Llama 3.1's scaling, with the four numbers below (ours)
        "rope_scaling_factor": 8.0,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_original_max_position_embeddings": 8192,
        "attention_type": "multihead",
        "window_size": null(tuple),
        "share_embeddings_and_output_weights": False,
        "fp32_residual_connection": False,
        "num_moe_experts": null(int),
        "moe_router_topk": 2,
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": False,
        "moe_token_dispatcher_type": null(str),
    }


def recomputation() -> dict:
    return {
        # What the backward pass computes again. null: nothing that takes a GEMM; selective: attention's core; full: whole layers, where memory is short.
        "activations_checkpoint_granularity": null(str),
        # Of full: uniform (groups of num_layers; 1 is best) or block (the first num_layers; where the language model trains, parts of its stack are copied).
        "activations_checkpoint_method": null(str),
        "activations_checkpoint_num_layers": null(int),  # null: 1
        "num_micro_batches_with_partial_activation_checkpoints": null(int),
        "activations_checkpoint_layers_per_pipeline": null(int),  # only null
    }


def fusions() -> dict:
    return {
        "use_flash_attention": True,
        "persist_layer_norm": True,
        "masked_softmax_fusion": True,
        "bias_dropout_add_fusion": False,
        "bias_activation_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "overlap_p2p_comm": False,
        "batch_p2p_comm": True,
        "use_cpu_initialization": False,
        "onnx_safe": False,
        "megatron_legacy": False,
        "transformer_engine": False,
        "use_emha": False,
        "async_grad_allreduce": False,
        "grad_allreduce_chunk_size_mb": 125,
        "grad_div_ar_fusion": True,
        "gradient_as_bucket_view": True,
        "ub_tp_comm_overlap": False,
        "ub_tp_comm_overlap_cfg": null(object),
        "sync_batch_comm": False,
        "enable_cuda_graph": False,
        "gc_interval": 0,
        "dist_ckpt_format": null(str),
        "dist_ckpt_load_on_device": null(bool),
        "dist_ckpt_parallel_save": null(bool),
        "dist_ckpt_parallel_save_within_dp": null(bool),
        "dist_ckpt_parallel_load": null(bool),
        "dist_ckpt_torch_dist_multiproc": null(int),
        "dist_ckpt_assume_constant_structure": null(bool),
        "dist_ckpt_parallel_dist_opt": null(bool),
    }


def precision() -> dict:
    return {
        "megatron_amp_O2": True,
        "native_amp_init_scale": 4294967296,
        "native_amp_growth_interval": 1000,
        "hysteresis": 2,
        "fp16_lm_cross_entropy": False,
        "fp8": False,  # the GEMMs of the language model's layers in float8: e4m3 forward, e5m2 gradients
        "fp8_e4m3": False,  # gradients in e4m3 too
        "fp8_hybrid": False,  # what fp8 means without fp8_e4m3
        "fp8_margin": 0,  # powers of two left free above the largest number seen
        "fp8_interval": 1,
        "fp8_amax_history_len": 1,  # steps that an amax is remembered
        "fp8_amax_compute_algo": "most_recent",  # which of them a scale follows: most_recent, max
        "reduce_amax": True,
        "fp8_frozen_weights": False,  # ours, follows fp8: frozen weights are stored in e4m3, half the memory; False: quantised every step
        "fp8_scaling": "delayed",  # ours: scales follow past steps (delayed), or each tensor's own amax (current)
    }


def miscellaneous() -> dict:
    return {
        "restore_from_path": null(str),  # a .nemo or a run: the weights a finetuning starts from
        "resume_from_checkpoint": null(str),
        "seed": 1234,
        "apex_transformer_log_level": 30,
        "no_seqlen_plus_one_input_tokens": False,
        "reset_lr": False,
        "reset_lr_steps": False,
    }


def tokenizer() -> dict:
    return {
        "library": "sentencepiece",  # sentencepiece, huggingface, megatron
        "type": null(str),  # huggingface: a directory; megatron: a directory, GPT2BPETokenizer or GPTSentencePieceTokenizer
        "model": null(str),  # sentencepiece: the .model file
        "vocab_file": null(str),  # megatron's GPT2BPETokenizer: vocab.json, and merge_file merges.txt
        "merge_file": null(str),
        "delimiter": null(str),
        "sentencepiece_legacy": False,  # True: text is cut at additional_special_tokens, which get the ids behind the vocabulary; False: they must be pieces
        "additional_special_tokens": null(object),  # a sequence, or {"additional_special_tokens": a sequence, "pad_token": a text, ...}
    }


def data() -> dict:
    return {
        "data_path": null(object),  # a .json or .jsonl file of conversations, or several: '(a.json, b.json)'
        "image_folder": null(str),  # a directory or a .tar
        "image_aspect_ratio": "square",  # square crops, as LLaVA's null does; pad adds borders
        "conv_template": "llama_2",  # follows mm_cfg.llm.model_type; NeMo's templates, and LLaVA's as llava:v1, ... (data/conversation.py)
        "dataloader_type": "cyclic",  # cyclic: shuffled epochs; single: one pass in the file's order (several files: again and again, to the run's end)
        "num_workers": 8,
        "micro_batch_size": 16,  # follows model.micro_batch_size
        "global_batch_size": 128,  # follows model.global_batch_size
        "packed_sequence": False,
        "concat_sampling_probabilities": null(tuple),  # of several files: each one's share of what is drawn; null: equal shares; counts of records: each once
        "lazy_preprocess": True,
        "is_multimodal": True,
        "media_type": "image",
        "sep_image_conv_front": False,
        "image_token_len": 256,
        "crop_size": null(tuple),
        "video_folder": null(str),
        "splice_single_frame": null(str),
        "num_frames": -1,
        "num_time_tokens": 100,
        "sep_token_between_frames": False,
        "eod_mask_loss": False,
        "validation_drop_last": True,
        "pad_samples_to_global_batch_size": False,
        "compat": "exact",  # ours, as all below; exact, or an original with its defects: nemo_v2.0.0, nemo_v1.23.0, llava
        "validation": null(object),  # a .json file, or the share (float) of the training records that is held out; null: no validation
        "on_bad_image": "raise",  # raise, skip
        "max_bad_images": 100,  # skip stops the run at so many
        "buckets": null(object),  # token lengths that batches are padded to; null: chosen from the data
        "length_grouping": True,  # records of like length share a batch
        "cache_dir": null(str),  # where indexes and prepared pictures are kept; null: ~/.cache/neva_jax
        "pixel_cache_gib": null(float),  # prepared pictures are kept in cache_dir, all files of them together at most so large; null: none are kept
        "max_media": null(int),  # images a record may have; null: any number
        "apply_exif_rotation": False,  # pictures are turned as their EXIF says; LLaVA and NeMo never do
    }


def energon() -> dict:
    return {"use_energon": False, "data": null(object)}


def nsys_profile() -> dict:
    return {"enabled": False, "start_step": 10, "end_step": 10, "ranks": (0,), "gen_shape": False}


def optim() -> dict:
    return {
        "name": "fused_adam",
        "lr": 2e-3,
        "weight_decay": 0.0,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "grad_accum_dtype": "fp32",  # ours: fp32 sums are added to in place; beside bf16 sums the gradients of a micro-batch stand, in fp32
        "bucket_cap_mb": null(float),
        "overlap_grad_sync": null(bool),
        "overlap_param_sync": null(bool),
        "contiguous_grad_buffer": null(bool),
        "grad_sync_dtype": null(str),
        "sched": {
            "name": "CosineAnnealing",
            "warmup_steps": 140,
            "warmup_ratio": null(float),  # instead of warmup_steps: a share of max_steps
            "constant_steps": 0,
            "constant_ratio": null(float),
            "hold_steps": null(int),
            "hold_ratio": null(float),
            "min_lr": 2e-5,
            "max_steps": null(int),  # null: trainer.max_steps
            "power": 1.0,  # polynomial schedules
            "cycle": False,
            "decay_rate": 0.5,  # NoamHoldAnnealing
            "d_model": null(int),  # NoamAnnealing
        },
    }


def peft() -> dict:
    return {
        "peft_scheme": null(str),
        "restore_from_path": null(str),
        "projector_lr_factor": 0.1,  # ours: NeMo's fixed ratio
        "lora_tuning": {
            "adapter_dim": 32,
            "alpha": null(float),  # null: adapter_dim
            "adapter_dropout": 0.0,
            "dropout_position": "post",
            "column_init_method": "xavier",
            "row_init_method": "zero",
            "target_modules": ("attention_qkv",),
            "layer_selection": null(tuple),
            "variant": "nemo",
            "weight_tying": False,
            "position_embedding_strategy": null(str),
        },
    }
