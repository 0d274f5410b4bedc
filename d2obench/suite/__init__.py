"""What is asked for, as the user writes it.

``definition`` reads a suite from TOML, with its targets, and ``grammar`` parses the text of one axis: a shape, a
budget, a policy with parameters. Imported by every package above; imports ``metric``, ``record`` and ``errors``, and no
torch.
"""
