"""Adds the model ``d2obench`` to lm-evaluation-harness, so that any of its tasks can run under any policy.

::

    python -m d2obench.bridges.lm_eval --model d2obench \\
        --model_args pretrained=embedded,policy=d2o,budget=0.2 --tasks hellaswag --limit 20

The harness has no hook by which an installed package could add a model to its own ``lm_eval`` command. This command
therefore calls :func:`register` and then runs the harness's command line, with all of its options. In your own program,
call ``register()`` and then ``lm_eval.simple_evaluate(model="d2obench", …)``. The model itself is
:class:`d2obench.bridges.lm_eval_model.CompressedLM`.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from d2obench.errors import D2OBenchError, UsageError

NAME = "d2obench"


def register() -> None:
    """Makes ``d2obench`` a model name of the harness; its module is imported only when the model is used.

    Raises:
        UsageError: the harness is not installed.
    """
    if find_spec("lm_eval") is None:
        remedy = "install it: pip install 'd2obench[lm-eval]'"
        raise UsageError("this command needs lm-evaluation-harness", remedy=remedy)
    import lm_eval.models  # noqa: F401  # the harness registers its own models only while the registry is empty
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target="d2obench.bridges.lm_eval_model:CompressedLM")


def main() -> int:
    """Runs the harness's command line; a D2OBenchError is printed as one line, as the command ``d2obench`` does."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except D2OBenchError as problem:
        print(f"d2obench: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
