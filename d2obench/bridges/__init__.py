"""Integrations that let other tools run a model under a policy; each imports its tool only when it is used."""
