"""Named rematerialisation policies: what a layer keeps for its backward pass.

| policy | kept | cost |
|---|---|---|
| none | everything | most memory |
| dots | results of matrix products and attention | elementwise work again |
| attention | layer inputs and attention outputs | one forward of the matrix products again |
| full | layer inputs | one whole forward again |
"""

import flax.linen as nn
import jax

from fusion_jax.errors import check_choice

ATTENTION = "attention"  # name of what attention kernels keep for their backward passes
# Kernels that name nothing themselves are kept by what they are.
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


def remat(module: type[nn.Module], policy: str) -> type[nn.Module]:
    """`module` wrapped for use inside a scan. Raises UserError for an unknown policy name."""
    check_choice("remat=", policy, POLICIES)
    if policy == "none":
        return module
    # Inside a scan XLA cannot undo the rematerialisation by common-subexpression elimination, so no barrier is needed.
    return nn.remat(module, policy=POLICIES[policy], prevent_cse=False)
