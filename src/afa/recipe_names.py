"""Keys of other trainers, and what they are called in recipes here."""

from __future__ import annotations

from collections.abc import Collection

#: names in kohya's scripts, SimpleTuner and diffusers' training scripts, by the key of a recipe;
#: a name may stand for several keys, of which a section has one
_ELSEWHERE = {
    "experts": ("models", "checkpoints", "pretrained_model_name_or_path"),
    "folder": (
        *("path", "data_dir", "image_dir", "image_directory", "train_data_dir"),
        *("instance_data_dir", "validation_dir"),
    ),
    "dataset": ("dataset_name", "train_data", "hub_dataset"),
    "caption_column": ("text_column",),
    "file_column": ("image_column", "filename_column"),
    "repeats": ("num_repeats", "dataset_repeats"),
    "buckets": ("bucket", "enable_bucket", "bucketing", "aspect_ratio_buckets"),
    "crop": ("center_crop", "random_crop", "crop_style"),
    "flip": ("random_flip", "flip_aug"),
    "limit": ("max_train_samples",),
    "cache": ("cache_latents", "cache_latents_to_disk", "vae_cache"),
    "cache_folder": ("cache_dir", "cache_dir_vae"),
    "num_workers": ("dataloader_num_workers", "max_data_loader_n_workers"),
    "num_steps": ("steps", "max_steps", "train_steps", "max_train_steps", "num_inference_steps"),
    "batch_size": ("train_batch_size",),
    "learning_rate": ("lr", "unet_lr"),
    "learning_rate_schedule": ("scheduler", "lr_scheduler"),
    "num_warmup_steps": ("lr_warmup_steps", "warmup_steps"),
    "caption_dropout": ("caption_dropout_rate", "caption_dropout_probability"),
    "min_snr_gamma": ("snr_gamma",),
    "velocity_loss": ("v_pred_like_loss",),
    "ema_decay": ("use_ema",),
    "expert_dtype": ("mixed_precision",),
    "checkpoint_every": (
        *("checkpointing_steps", "save_every_n_steps", "save_steps"),
        "checkpoint_step_interval",
    ),
    "keep_checkpoints": ("checkpoints_total_limit", "save_total_limit", "save_last_n_steps"),
    "trackers": ("report_to", "log_with"),
    "num_samples": ("num_eval_images", "validation_split_num"),
    "every": ("validation_steps", "eval_steps_interval", "sample_every_n_steps", "interval"),
    "prompts": ("prompt", "validation_prompt", "validation_prompts", "sample_prompts"),
    "guidance": ("guidance_scale", "cfg_scale", "validation_guidance"),
}
#: names of a training's length in epochs
_EPOCHS = ("epoch", "epochs", "num_epochs", "max_train_epochs", "num_train_epochs")


def hint_for(key: str, known: Collection[str]) -> str | None:
    """Describe the key of a section that another trainer calls `key`, or None if there is none."""
    if key in _EPOCHS and "num_steps" in known:
        return "count steps instead of epochs, with 'num_steps'"
    found = (own for own, names in _ELSEWHERE.items() if key in names and own in known)
    return next((f"it is '{own}' here" for own in found), None)
