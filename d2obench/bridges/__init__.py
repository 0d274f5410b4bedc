"""Ways for other tools to run a model under a policy; each imports its tool only when it is used."""
