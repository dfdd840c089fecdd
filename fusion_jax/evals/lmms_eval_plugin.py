"""What lmms-eval reads through its entry point `lmms_eval.models`: the class's name, without loading JAX for others."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(model_id="fusion_jax", simple_class_path="fusion_jax.evals.lmms_eval_model.FusionModel")
