"""The one seam to Keras's internals. Nothing outside this folder touches them.

What is relied upon, in Keras 3.13 to 3.15 on torch, and why:

- A variable's tensor is the `nn.Parameter` in `Variable._value`; its layer and
  every ancestor hold the *same* object in `_torch_params`. Sharding replaces
  the parameter's `.data` and so keeps every reference valid: `zero_grad`,
  `v.value.grad`, and torch optimizers made before.
- `Variable._shape` is what symbolic calls, `summary()` and checks see. It stays
  the full shape.
- Everything reads a weight through the property `Variable.value`. A sharded
  variable changes class to `ShardedVariable`, whose `value` is the full weight,
  whoever reads it. While a layer's `call` runs (Keras's own `current_call_ctx`)
  it is gathered at once; elsewhere it is a `FullWeight`, which is gathered when
  something computes with it, because training steps read `v.value.grad` of every
  weight and want no more. Keras's own `train_step` reads nothing else between `scale_loss` and
  `apply`, and is given shards there: `gradients.py`.
- Optimizers compute with shards: everything they read and assign comes by
  `BaseOptimizer.apply`. They make a slot with `add_variable_from_reference` and
  see their variables in `build`, and ask for their rate in
  `_get_current_learning_rate`. These are wrapped, once, for all optimizers; for
  variables that are not sharded the wrappers do nothing. Slots stand in lists
  beside `_trainable_variables`. `_backend_update_step` calls `update_step` for each
  variable (Keras's own elementwise optimizers replace it), `_backend_apply_gradients`
  calls `_clip_gradients`, and `LossScaleOptimizer.check_finite` decides on a step.
- `TorchLayer._track_variables` and `_post_track_variable` hand torch the tensors
  of a layer's variables; wrapped likewise, so that those are the shards.
- `Layer._layers`, `_trainable_variables`, `_non_trainable_variables` and
  `_seed_generators` are what a layer owns; an instance's `call` takes the place
  of its class's, its `compute_loss` sees what a step is fed.
- What `Layer.__call__` does before and after a `call` is told in `shortcuts.py`, which does
  without where it comes to nothing; what of a layer its `call` can go by in `likeness.py`.
- `Layer._losses`, `_loss_ids` and `_metrics` are what a call adds to, and a tensor's
  `_keras_mask` what it is given besides; trial calls put them back.
- A `Node` of a functional graph (`_operations`, `_inbound_nodes`) holds its constants.
- `EpochIterator` asks `data_adapters.get_data_adapter` what `x`, `y`, ... are, for
  `fit`, `evaluate`, `predict` and validation alike, and reads torch's batches by the
  adapter's `get_torch_dataloader`. `hook_data` wraps the first; with a distribution of
  several processes set, it refuses all but `tf.data`.
- Keras's attention asks `_can_use_flash_attention`, which `attention.py` answers on CPUs; what the
  compiler is told besides is in `compilation.py`.
- How files come to be written is told in `saving.py`, how callbacks are told of what happens in
  `callbacks.py`. Both are hooked once, with the first model that is parallelized or made under a
  distribution, and do as before for all models that the ranks do not hold together.
- How far `fit` has read its data is told in `positions.py`, which is hooked with the first
  `ShardedCheckpoint` that is made, and does nothing where there is none.
- What `keras_tp.enable` puts into Keras, and takes out again, is told in `distribution.py`.
- Symbolic calls run in a `StatelessScope` and a `SymbolicScope`, mostly on the
  meta device.
"""
