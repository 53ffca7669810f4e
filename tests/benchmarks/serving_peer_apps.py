"""Servers that people write around a diffusers pipeline: `python serving_peer_apps.py threads|async|ray MODEL PORT`.

They answer as ours does, with PNGs in base64. `ray` is Ray Serve's Stable Diffusion example: an ingress that awaits a
deployment with the pipeline.
"""

import base64
import io
import signal
import sys
import threading
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel


class Body(BaseModel):
    """What is asked for."""

    prompt: str
    seed: int


class Drawer:
    """The student by diffusers' SanaPipeline, its text by the encoder that it was trained with."""

    def __init__(self, model: str) -> None:
        import torch
        from diffusers import DiffusionPipeline

        from fewstep.runtime.text import load_text_encoder

        absent = {"text_encoder": None, "tokenizer": None}
        self._torch, self._encode = torch, load_text_encoder()
        self._pipeline: Any = DiffusionPipeline.from_pretrained(model, local_files_only=True, **absent)
        self._pipeline.set_progress_bar_config(disable=True)
        self._size = self._pipeline.transformer.config.sample_size * self._pipeline.vae_scale_factor

    def draw(self, prompt: str, seed: int) -> Any:
        """One image."""
        states = self._encode([prompt])
        return self._pipeline(
            prompt_embeds=states["encoder_hidden_states"],
            prompt_attention_mask=states["encoder_attention_mask"],
            negative_prompt=None,
            use_resolution_binning=False,
            height=self._size,
            width=self._size,
            num_inference_steps=1,
            guidance_scale=1.0,
            generator=self._torch.Generator().manual_seed(seed),
        ).images[0]


def answer(image: Any) -> dict[str, list[dict[str, str]]]:
    """An image as OpenAI's clients expect it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}]}


def plain(model: str, threads: bool) -> FastAPI:
    """One global pipeline, called in the event loop or in FastAPI's threads; it bears one call at a time."""
    app, drawer, alone = FastAPI(), Drawer(model), threading.Lock()

    def in_thread(body: Body) -> Any:
        with alone:
            return answer(drawer.draw(body.prompt, body.seed))

    async def in_loop(body: Body) -> Any:
        return answer(drawer.draw(body.prompt, body.seed))

    app.post("/v1/images/generations")(in_thread if threads else in_loop)
    return app


def serve_on_ray(model: str, port: int) -> None:
    """Two deployments, as in the example; one replica, since there is one pipeline in the others as well."""
    import ray
    from ray import serve

    app = FastAPI()

    @serve.deployment
    @serve.ingress(app)
    class Ingress:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        @app.post("/v1/images/generations")
        async def generate(self, body: Body) -> Any:
            return answer(await self.handle.draw.remote(body.prompt, body.seed))

    # Ray would call the pipeline from several threads at once, and it bears one call at a time.
    options = {"ray_actor_options": {"num_cpus": 1}, "max_ongoing_requests": 1}
    drawing = serve.deployment(Drawer).options(**options)  # type: ignore[attr-defined]
    ray.init("local", include_dashboard=False, object_store_memory=2**28)
    serve.start(http_options={"port": port})
    serve.run(Ingress.bind(drawing.bind(model)))  # type: ignore[attr-defined]
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    ended.wait()
    serve.shutdown()
    ray.shutdown()


def main() -> None:
    """Serve until a signal ends it."""
    kind, model, port = sys.argv[1:]
    if kind == "ray":
        serve_on_ray(model, int(port))
        return
    import uvicorn

    uvicorn.run(plain(model, kind == "threads"), port=int(port), log_level="warning")


if __name__ == "__main__":
    main()
