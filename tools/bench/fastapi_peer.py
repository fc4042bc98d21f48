"""The peer of the benchmarks, and a common way to serve explanations: FastAPI and Captum.

It is written like public examples: torchvision's eager model, ``IntegratedGradients(model).attribute`` in a thread for
each request, attributions as a JSON list of floats.

    uvicorn tools.bench.fastapi_peer:app --port 8100
"""

from __future__ import annotations

import asyncio
import io

import torch
from captum.attr import IntegratedGradients
from fastapi import FastAPI, Request
from PIL import Image
from torchvision import transforms

from tools.classifiers.loading import load_source

N_STEPS = 50

app = FastAPI()
source = load_source("shapes")
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = source.module.eval().to(device)
integrated_gradients = IntegratedGradients(model)
transform = transforms.Compose(
    [
        transforms.Resize(source.preprocessing.resize),
        transforms.CenterCrop(source.preprocessing.crop),
        transforms.ToTensor(),
        transforms.Normalize(source.preprocessing.mean, source.preprocessing.std),
    ]
)


async def read_image(request: Request) -> torch.Tensor:
    image = Image.open(io.BytesIO(await request.body())).convert("RGB")
    return transform(image).unsqueeze(0).to(device)


def predict(pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(pixels).softmax(dim=1)[0]


@app.post("/classify")
async def classify(request: Request) -> dict:
    probabilities = await asyncio.to_thread(predict, await read_image(request))
    best = int(probabilities.argmax())
    return {"label": source.labels[best], "probability": float(probabilities[best])}


@app.post("/explain")
async def explain(request: Request) -> dict:
    pixels = await read_image(request)
    probabilities = await asyncio.to_thread(predict, pixels)
    best = int(probabilities.argmax())
    attributions, delta = await asyncio.to_thread(
        integrated_gradients.attribute, pixels, target=best, n_steps=N_STEPS, return_convergence_delta=True
    )
    return {
        "label": source.labels[best],
        "probability": float(probabilities[best]),
        "attributions": attributions[0].tolist(),
        "convergence_delta": float(delta[0]),
    }
