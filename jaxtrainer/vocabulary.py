"""Lightning's words that have no place here, and what to write instead; for error messages.

Imports nothing of the package.
"""

from __future__ import annotations

_TRANSFORM = "write it into an Optax transform in `configure_optimizers`"
_LOGGER = (
    "`self.log` reaches the loggers; in a hook on the host there are `run.log_image`, "
    "`run.log_histogram` and `run.log_text` too."
)
_MODES = "a step gets the model in the mode it needs, and nothing is switched"

IN_THE_STEP = {
    "backward": "return the loss from `training_step`, and its gradients are taken",
    "on_before_backward": "write it into `training_step`",
    "on_after_backward": _TRANSFORM,
    "on_before_optimizer_step": _TRANSFORM,
    "on_before_zero_grad": "there are no gradient buffers to clear",
    "optimizer_zero_grad": "there are no gradient buffers to clear",
    "on_validation_model_zero_grad": "there are no gradient buffers to clear",
    "on_before_batch_transfer": "transform the batch in the loader",
    "transfer_batch_to_device": "batches of any pytree are placed as `mesh=` says",
    "on_after_batch_transfer": "pass `device_transform=` to the loader (`data.on_device`)",
    "optimizer_step": _TRANSFORM,
    "lr_scheduler_step": "pass the schedule to the optimizer: `optax.adam(schedule)`",
    "configure_gradient_clipping": "pass `Trainer(gradient_clip_val=...)`, or chain `optax.clip`",
    "on_validation_model_eval": _MODES,
    "on_validation_model_train": _MODES,
    "on_test_model_eval": _MODES,
    "on_test_model_train": _MODES,
    "on_predict_model_eval": _MODES,
    "on_predict_model_train": _MODES,
}
"""Hooks that a compiled step cannot call."""

RENAMED = {
    "on_epoch_start": "on_train_epoch_start",
    "on_epoch_end": "on_train_epoch_end",
    "on_batch_start": "on_train_batch_start",
    "on_batch_end": "on_train_batch_end",
    "on_keyboard_interrupt": "on_exception",
    "training_epoch_end": "on_train_epoch_end",
    "validation_epoch_end": "on_validation_epoch_end",
    "test_epoch_end": "on_test_epoch_end",
    "predict_epoch_end": "on_predict_epoch_end",
}
"""Hooks that have another name here."""

OF_THE_MODULE = {
    "trainer": "`self.run` has the counters, limits and metrics of the run.",
    "current_epoch": "Write `self.run.epoch`.",
    "global_step": "Write `self.run.global_step`.",
    "logger": _LOGGER,
    "loggers": _LOGGER,
    "hparams": "Hyper-parameters are plain attributes: `self.learning_rate = learning_rate`.",
    "save_hyperparameters": "Assign them: `self.learning_rate = learning_rate`. A checkpoint never "
    "calls a constructor, so that none is saved.",
    "device": "Arrays are where `Trainer(mesh=...)` puts them; a step needs no device.",
    "global_rank": "Write `jax.process_index()`.",
    "local_rank": "Write `jax.process_index()`; a process may have several devices.",
    "all_gather": "A step sees the whole batch, on all devices: reduce it with `jnp`.",
    "manual_backward": "Write `loss, model = self.minimize(loss_fn, model)`, or take gradients "
    "and pass them to `self.apply_gradients`.",
    "optimizers": "Their names are enough: `self.minimize(loss_fn, model, 'generator')`.",
    "toggle_optimizer": "`self.minimize` differentiates the parameters of its optimiser only.",
    "untoggle_optimizer": "`self.minimize` differentiates the parameters of its optimiser only.",
    "toggled_optimizer": "`self.minimize` differentiates the parameters of its optimiser only.",
    "clip_gradients": "Clip in the optimiser: `optax.chain(optax.clip_by_global_norm(1.0), ...)`.",
    "freeze": "Return `Optimizer(optax.adam(1e-3), wrt='head')` from `configure_optimizers`: what "
    "no optimiser owns is frozen.",
    "unfreeze": "Pass `callbacks=[BackboneFinetuning(backbone=..., unfreeze_at_epoch=10)]`.",
    "lr_schedulers": "A schedule belongs to the optimiser: `optax.adam(schedule)`.",
    "print": "On the host `run.notice(text)` shows a line; in a step use `jax.debug.print`.",
    "example_input_array": "Shapes come from the first batch.",
    "to_onnx": "Export `module.model`, e.g. with `jax.export`.",
}
"""Attributes of a LightningModule."""

OF_THE_TRAINER = {
    "accelerator": "JAX takes the GPU or TPU it finds; the variable JAX_PLATFORMS chooses.",
    "devices": "Pass `mesh={'data': number_of_devices}`; all of them is the default, and "
    "`sharding=` says what each of them holds.",
    "num_nodes": "Start it with `jaxtrainer launch` or SLURM; the mesh spans all processes.",
    "strategy": "Write `sharding='ddp'`, which is the default, or `sharding='fsdp'`; for tensor "
    "parallelism `mesh={'data': 2, 'model': 4}` with rules, `sharding={'*/up/kernel': "
    "jax.P(None, 'model')}`.",
    "enable_checkpointing": "Checkpoints are made by a `Checkpoint` in `callbacks`, if any.",
    "enable_model_summary": "Pass `callbacks=[ModelSummary()]`.",
    "enable_autolog_hparams": "Hyper-parameters are the module's attributes; nothing is logged.",
    "benchmark": "XLA chooses its kernels when it compiles.",
    "inference_mode": "Evaluation takes no gradients, so that nothing is kept for them.",
    "use_distributed_sampler": "Give every process the same loader: each takes the "
    "rows of its own devices.",
    "profiler": "Pass `callbacks=[Profiler()]`; timings by phase are in `result.timings`.",
    "detect_anomaly": "Pass `callbacks=[NonFinite()]`: it finds the batch and the line.",
    "barebones": "Without callbacks nothing runs but the step; the bar is turned off by "
    "`enable_progress_bar=False`.",
    "plugins": "There are none: `precision=` and `mesh=` say what they would.",
    "sync_batchnorm": "Statistics are those of the whole batch, on any number of devices.",
    "reload_dataloaders_every_n_epochs": "A loader is iterated anew each epoch: yield other "
    "batches from its `__iter__`.",
    "suggest_integrations": "Nothing is suggested.",
    "model_registry": "Copy the directory that a `Checkpoint` has written.",
}
"""Options of Lightning's Trainer."""

OF_THE_CALLS = {
    "train_dataloaders": "Write `train_loader=`.",
    "train_dataloader": "Write `train_loader=`.",
    "val_dataloaders": "Write `val_loader=`.",
    "val_dataloader": "Write `val_loader=`.",
    "dataloaders": "Write `loader=`.",
    "model": "Write `module=`.",
    "weights_only": "A checkpoint holds arrays and JSON, and nothing in it is executed.",
}
"""Arguments of `fit`, `validate`, `test` and `predict`."""
