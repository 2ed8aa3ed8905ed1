"""A classifier behind NVIDIA Triton: the server that nvidia-pytriton ships, its python backend, onnxruntime inside.

python -m triton_server.serve model.onnx 8000
"""

from __future__ import annotations

import sys

import numpy as np
from python_session.serve import Classifier
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def main() -> None:
    """Serve until stopped."""
    classifier = Classifier(sys.argv[1])

    @batch
    def infer(rows: np.ndarray) -> list[np.ndarray]:
        return [classifier(rows)]

    config = TritonConfig(
        http_address="127.0.0.1", http_port=int(sys.argv[2]), allow_grpc=False, allow_metrics=False, log_verbose=0
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="classifier",
            infer_func=infer,
            inputs=[Tensor(name="rows", dtype=np.float32, shape=classifier.row_shape)],
            outputs=[Tensor(name="scores", dtype=np.float32, shape=(-1,))],
            config=ModelConfig(max_batch_size=8, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        )
        triton.serve()


if __name__ == "__main__":
    main()
