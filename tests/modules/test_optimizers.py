"""The default optimizer is fused where that can be, and gradients are clipped for every optimizer and precision."""

import pytest
import small_runs
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from small_runs import trained, trainer


def adamw(fused):
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0, fused=fused)


def fitted(tiny_llama, tmp_path, module=None, **kwargs):
    torch.manual_seed(0)
    module = module or small_runs.module(tiny_llama)
    fit = trainer(tmp_path, max_steps=4, **kwargs)
    fit.fit(module, small_runs.data(tiny_llama))
    return fit, trained(module)


CLIPPING = {
    "none": {},
    "norm": {"gradient_clip_val": 0.1},
    "value": {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"},
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("clipping", CLIPPING)
def test_fused_adamw_trains_as_the_plain_one_does(tiny_llama, tmp_path, precision, clipping):
    kwargs = {"precision": precision, **CLIPPING[clipping]}
    fit, found = fitted(tiny_llama, tmp_path, **kwargs)
    assert fit.optimizers[0].defaults["fused"] is True
    plain = small_runs.module(tiny_llama, lr=None, optimizer=adamw(fused=False))
    _, expected = fitted(tiny_llama, tmp_path, plain, **kwargs)
    atol = 2e-5 if precision == "32-true" else 2e-3  # four steps move a weight by up to 4e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


class Norms(small_runs.Callback):
    """Norm and largest entry of the gradients as the optimizer sees them."""

    def __init__(self):
        self.norms, self.largest = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        gradients = torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None])
        self.norms.append(gradients.norm().item())
        self.largest.append(gradients.abs().max().item())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_clipping_does_clip(tiny_llama, tmp_path, precision, fused):
    for clipping, kwargs in CLIPPING.items():
        norms = Norms()
        module = small_runs.module(tiny_llama, lr=None, optimizer=adamw(fused))
        fitted(tiny_llama, tmp_path, module, precision=precision, callbacks=[norms], **kwargs)
        if clipping == "none":
            assert min(norms.norms) > 0.2
        elif clipping == "norm":
            assert norms.norms == pytest.approx([0.1] * 4, rel=1e-2)
        else:
            assert norms.largest == pytest.approx([1e-4] * 4, rel=1e-2)


def test_under_fp16_the_default_is_not_fused_and_can_be_clipped(tiny_llama, tmp_path):
    norms = Norms()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    fit, _ = fitted(tiny_llama, tmp_path, plugins=plugin, gradient_clip_val=0.1, callbacks=[norms])
    assert fit.optimizers[0].defaults["fused"] is False
    assert norms.norms == pytest.approx([0.1] * 4, rel=1e-2)


def test_a_checkpoint_of_the_plain_optimizer_goes_on_under_the_fused_one(tiny_llama, tmp_path):
    plain = small_runs.module(tiny_llama, lr=None, optimizer=adamw(fused=False))
    whole = small_runs.saving(tmp_path, plain, small_runs.data(tiny_llama))
    module = small_runs.module(tiny_llama)
    rest = small_runs.fit(tmp_path, module, small_runs.data(tiny_llama), ckpt_path=tmp_path / "step=3.ckpt", seed=1)
    assert rest.values == pytest.approx(whole.values[3:], rel=1e-5)
    torch.testing.assert_close(trained(module), trained(plain), rtol=0, atol=2e-5)
