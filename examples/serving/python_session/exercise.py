"""Call the classifier on the float and on the quantized file in turns.

cd examples/serving && python -m python_session.exercise JOB OUT
"""

from __future__ import annotations

import onnxruntime as ort
from python_session.serve import Classifier
from slices import Job, exercise


def main() -> None:
    """Both files through the same class."""
    job = Job.from_argv()
    predict = {side: Classifier(model) for side, model in job.models.items()}
    exercise(job, predict, f"onnxruntime {ort.__version__}")


if __name__ == "__main__":
    main()
