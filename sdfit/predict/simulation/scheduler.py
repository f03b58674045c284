"""diffusers' `PNDMScheduler` as the checkpoint sets it, written out (see `sdfit.predict.simulation.pipeline`)."""

from __future__ import annotations

from sdfit.predict.simulation.meter import Meter
from sdfit.predict.simulation.tape import Tensor, empty

TRAINED_STEPS, TABLE_BYTES, TIMESTEP_BYTES = 1000, 4, 8
"""`num_train_timesteps`; bytes of an element of its table of alphas, in float32, and of a timestep."""


def unet_calls(num_inference_steps: int) -> int:
    """How often the UNet is called: the second step is taken twice."""
    return num_inference_steps + (num_inference_steps > 1)


class Scheduler:
    """The scheduler of one run of so many steps; it keeps tensors until the run is over."""

    def __init__(self, meter: Meter, num_inference_steps: int) -> None:
        self._meter = meter
        self.calls = unet_calls(num_inference_steps)
        self._alphas_cumprod: Tensor | None = None
        self._on_host = Tensor(meter, (), TABLE_BYTES, None)
        self._ets: list[Tensor] = []
        self._cur_sample: Tensor | None = None

    def add_noise(self, original_samples: Tensor, noise: Tensor) -> Tensor:
        """`add_noise`, at one timestep per sample."""
        batch = original_samples.shape[0]
        self._alphas_cumprod = empty(self._meter, (TRAINED_STEPS,), TABLE_BYTES)
        alphas_cumprod = self._alphas_cumprod.to(original_samples.each_bytes)
        timesteps = empty(self._meter, (batch,), TIMESTEP_BYTES)
        sqrt_alpha_prod = alphas_cumprod.new((batch,)) ** 0.5
        sqrt_alpha_prod = sqrt_alpha_prod.view(batch, 1, 1, 1)
        sqrt_one_minus_alpha_prod = (1 - alphas_cumprod.new((batch,))) ** 0.5
        sqrt_one_minus_alpha_prod = sqrt_one_minus_alpha_prod.view(batch, 1, 1, 1)
        noisy = sqrt_alpha_prod * original_samples + sqrt_one_minus_alpha_prod * noise
        del timesteps, alphas_cumprod
        return noisy

    def step(self, model_output: Tensor, counter: int, sample: Tensor) -> Tensor:
        """`step_plms` of the call with this number."""
        if counter != 1:
            self._ets = self._ets[-3:]
            self._ets.append(model_output)
        ets = self._ets
        if len(ets) == 1 and counter == 0:
            self._cur_sample = sample
        elif len(ets) == 1 and counter == 1:
            model_output = (model_output + ets[-1]) / 2
            assert self._cur_sample is not None
            sample = self._cur_sample
            self._cur_sample = None
        elif len(ets) == 2:
            model_output = (3 * ets[-1] - ets[-2]) / 2
        elif len(ets) == 3:
            model_output = (23 * ets[-1] - 16 * ets[-2] + 5 * ets[-3]) / 12
        else:
            model_output = (1 / 24) * (55 * ets[-1] - 59 * ets[-2] + 37 * ets[-3] - 9 * ets[-4])
        return self._prev_sample(sample, model_output, last=counter == self.calls - 1)

    def _prev_sample(self, sample: Tensor, model_output: Tensor, *, last: bool) -> Tensor:
        assert self._alphas_cumprod is not None
        alpha_prod_t = self._alphas_cumprod.view()
        alpha_prod_t_prev = self._on_host if last else self._alphas_cumprod.view()  # `final_alpha_cumprod`
        beta_prod_t = 1 - alpha_prod_t
        beta_prod_t_prev = 1 - alpha_prod_t_prev
        sample_coeff = (alpha_prod_t_prev / alpha_prod_t) ** 0.5
        model_output_denom_coeff = (
            alpha_prod_t * beta_prod_t_prev**0.5 + (alpha_prod_t * beta_prod_t * alpha_prod_t_prev) ** 0.5
        )
        return sample_coeff * sample - (alpha_prod_t_prev - alpha_prod_t) * model_output / model_output_denom_coeff
