"""Integrations that let other tools run a model under a policy.

``lm_eval`` registers the model with lm-eval, and ``lm_eval_model`` is that model, imported when lm-eval uses it. Only
``cli`` and the other tool import this package; it imports ``tasks`` and what stands below.
"""
