"""The code that MLflow runs to serve a logged model.

It is stored with the model and must not import resnet_dist, so it repeats a few file names and formulas.
"""

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from safetensors.torch import load_file


class ImageClassifier(mlflow.pyfunc.PythonModel):
    """Maps uint8 images (N, H, W, C) to float32 probabilities (N, classes): the softmax of the logits."""

    def load_context(self, context: Any) -> None:
        # A copy of resnet_dist/model that is stored beside the weights; it exists once the model is logged.
        from resnet_dist_model import build_model

        folder = Path(context.artifacts["checkpoint"])
        manifest = json.loads((folder / "checkpoint.json").read_text())
        self.data = manifest["recipe"]["data"]
        options = {name: value for name, value in manifest["recipe"]["model"].items() if name != "init_from"}
        self.model = build_model(
            **options, in_channels=self.data["channels"], num_classes=len(manifest["classes"])
        )
        self.model.load_state_dict(load_file(folder / "model.safetensors"))
        self.model.eval()

    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> np.ndarray:
        pixels = torch.as_tensor(np.asarray(model_input)).permute(0, 3, 1, 2).float() / 255
        mean = torch.tensor(self.data["mean"])[None, :, None, None]
        std = torch.tensor(self.data["std"])[None, :, None, None]
        images = (pixels - mean) / std
        with torch.inference_mode():
            logits = self.model(images)
            if self.data.get("eval_flip"):  # Repeats resnet_dist.train.evaluate.logits_of.
                logits = (logits + self.model(images.flip(-1))) / 2
            probabilities: np.ndarray = logits.softmax(dim=1).numpy()
        return probabilities


mlflow.models.set_model(ImageClassifier())
