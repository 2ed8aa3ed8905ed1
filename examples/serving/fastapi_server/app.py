"""A classifier behind HTTP: POST rows of float32 as bytes, get scores and labels as JSON.

MODEL=model.onnx uvicorn fastapi_server.app:app
"""

from __future__ import annotations

import os

import numpy as np
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from python_session.serve import Classifier

app = FastAPI()
classifier = Classifier(os.environ["MODEL"])


@app.post("/predict")
async def predict(request: Request) -> dict[str, list]:
    """Scores and the best label of each row."""
    rows = np.frombuffer(await request.body(), "<f4").reshape(-1, *classifier.row_shape)
    scores = await run_in_threadpool(classifier, rows)
    return {"scores": scores.tolist(), "labels": scores.argmax(1).tolist()}
