"""Load a model of MLflow as a stranger does, and predict its example: a program, which ends with 0 or names the reason.

It runs in a process of its own, where neither this package nor anything that the caller has loaded can help.
"""

import math
import sys


def main(uri: str) -> None:
    # A machine that serves the model does not have this package.
    sys.modules["resnet_dist"] = None  # type: ignore[assignment]
    import mlflow

    model = mlflow.pyfunc.load_model(uri)
    if model.input_example is None:
        raise ValueError("it has no input example to predict")
    for row in model.predict(model.input_example).to_dict("records"):
        values = row["probabilities"]
        if not row["classes"] or not all(math.isfinite(value) and 0 <= value <= 1 for value in values):
            raise ValueError(f"it predicts {values[:3]} for its example")


if __name__ == "__main__":
    main(sys.argv[1])
