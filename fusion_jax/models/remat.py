"""Defines the rematerialisation policies: what a layer keeps for its backward pass.

| policy | kept | cost |
|---|---|---|
| none | everything | most memory |
| dots | results of matrix products and attention | recomputes elementwise work |
| attention | layer inputs and attention outputs | recomputes a forward pass of the matrix products |
| full | layer inputs | recomputes a whole forward pass |
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from fusion_jax.errors import check_choice

ATTENTION = "attention"  # the name that attention kernels give to what their backward passes need
# Kernels that give no names are recognised by their primitives.
_KERNELS = ("pallas_call", "dot_product_attention_fwd_wrapper")

_policies = jax.checkpoint_policies
_attention = _policies.save_from_both_policies(
    _policies.save_only_these_names(ATTENTION), lambda primitive, *_, **__: primitive.name in _KERNELS
)
POLICIES = {
    "none": None,
    "dots": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _attention),
    "attention": _attention,
    "full": _policies.nothing_saveable,
}


def remat(layer: Callable, policy: str) -> Callable:
    """Wraps a class of modules, or a function of one, for use inside a scan. Raises UserError for an unknown policy."""
    check_choice("remat=", policy, POLICIES)
    if policy == "none":
        return layer
    # Inside a scan XLA cannot undo the rematerialisation by common-subexpression elimination, so no barrier is needed.
    return nn.remat(layer, policy=POLICIES[policy], prevent_cse=False)
