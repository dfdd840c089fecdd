"""Provides the entry point `lmms_eval.models`, which names the model class without importing JAX."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(model_id="fusion_jax", simple_class_path="fusion_jax.interop.lmms_eval_model.FusionModel")
