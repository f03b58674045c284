"""diffusers' `StableDiffusionImg2ImgPipeline.__call__`, written out: what it does with memory between its modules' calls.

A transcription of diffusers 0.42.1 (`pipeline_stable_diffusion_img2img.py`, `scheduling_pndm.py`, `image_processor.py`) in
tensors of `sdfit.predict.simulation.tape`: the same operations in the same order, bound to the same names in the same order, because
what Python lets go of, and when, is what the card gets back, and when. Options that sdfit has no field for are left out.
``tests/predict/simulation`` holds it against the pipeline itself, event by event.
"""

from __future__ import annotations

from sdfit.predict.simulation.modules import IMAGE_CHANNELS, TEXT_CHANNELS, Modules
from sdfit.predict.simulation.programs import PICTURE
from sdfit.predict.simulation.scheduler import Scheduler
from sdfit.predict.simulation.tape import Tensor, concatenated, empty
from sdfit.predict.simulation.vae import Vae
from sdfit.workload import CHUNK_TOKENS

ID_BYTES, PICTURE_BYTES = 8, 4
"""Of a token or a timestep, and of the feature extractor's pictures, per element."""


class Img2Img:
    """One call of the pipeline.

    Parameters
    ----------
    modules : Modules
    num_inference_steps : int
    """

    def __init__(self, modules: Modules, num_inference_steps: int) -> None:
        self.modules, self.workload, self.each_bytes = modules, modules.workload, modules.each_bytes
        self.vae, self.scheduler = Vae(modules), Scheduler(modules.meter, num_inference_steps)
        self.beginning = 0
        """How many events came before the image."""

    def empty(self, *shape: int, each_bytes: int | None = None) -> Tensor:
        """A tensor that comes to the card, or is made there."""
        return empty(self.modules.meter, shape, self.each_bytes if each_bytes is None else each_bytes)

    def run(self) -> None:
        """Call the pipeline as `sdfit.backends.pipeline.call_arguments` says; embeddings of long prompts are the caller's."""
        workload = self.workload
        given: list[Tensor | None] = [None, None]
        if workload.prompt_length > CHUNK_TOKENS:
            shape = (workload.batch_size, workload.prompt_length, TEXT_CHANNELS)
            given = [self.empty(*shape) if wanted else None for wanted in (True, workload.guided)]
        self._call(*given)
        given.reverse()  # of a dict the first value goes first, of a list the last

    def _call(self, prompt_embeds: Tensor | None, negative_prompt_embeds: Tensor | None) -> None:
        prompt_embeds, negative_prompt_embeds = self._encode_prompt(prompt_embeds, negative_prompt_embeds)
        if negative_prompt_embeds is not None:
            prompt_embeds = concatenated([negative_prompt_embeds, prompt_embeds], 0)
        latents = self._prepare_latents()
        for step in range(self.scheduler.calls):
            latent_model_input = concatenated([latents] * 2, 0) if self.workload.guided else latents
            noise_pred = self.modules.unet(latent_model_input, prompt_embeds)
            if self.workload.guided:
                half = (noise_pred.shape[0] // 2, *noise_pred.shape[1:])
                noise_pred_uncond, noise_pred_text = noise_pred.view(*half), noise_pred.view(*half)
                noise_pred = noise_pred_uncond + self.workload.guidance_scale * (noise_pred_text - noise_pred_uncond)
            latents = self.scheduler.step(noise_pred, step, latents)
        scaled = latents / 1
        image = self.vae.decode(scaled)
        del scaled
        self._run_safety_checker(image)
        self._postprocess(image)
        del image

    def _encode_prompt(
        self, prompt_embeds: Tensor | None, negative_prompt_embeds: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        batch, guided = self.workload.batch_size, self.workload.guided
        if prompt_embeds is None:
            prompt_embeds = self.modules.text_encoder(self.empty(batch, CHUNK_TOKENS, each_bytes=ID_BYTES))[0]
        prompt_embeds = prompt_embeds.like()  # repeated once per image
        if guided and negative_prompt_embeds is None:
            negative_prompt_embeds = self.modules.text_encoder(self.empty(batch, CHUNK_TOKENS, each_bytes=ID_BYTES))[0]
        if guided:
            assert negative_prompt_embeds is not None
            negative_prompt_embeds = negative_prompt_embeds.like()
        return prompt_embeds, negative_prompt_embeds

    def _prepare_latents(self) -> Tensor:
        workload = self.workload
        self.beginning = self.modules.meter.count
        image = self.empty(workload.batch_size, IMAGE_CHANNELS, workload.effective_height, workload.effective_width)
        init_latents = self.vae.encode(image)
        init_latents = 1 * init_latents
        init_latents = concatenated([init_latents], 0)
        noise = self.empty(*init_latents.shape)
        init_latents = self.scheduler.add_noise(init_latents, noise)
        return init_latents

    def _run_safety_checker(self, image: Tensor) -> None:
        if not self.workload.safety_checker:
            return
        _denormalised(image)
        batch = image.shape[0]
        pictures = self.empty(batch, IMAGE_CHANNELS, PICTURE, PICTURE, each_bytes=PICTURE_BYTES)
        self.modules.safety_checker(pictures.to(self.each_bytes))

    def _postprocess(self, image: Tensor) -> None:
        images = [_denormalised(image.view(*image.shape[1:])) for _ in range(image.shape[0])]
        image = images[0].new((len(images), *images[0].shape))
        del images


def _denormalised(images: Tensor) -> Tensor:
    return (images * 0.5 + 0.5).like()
