"""A recipe comes back from plain data as it was, and plain data chooses no code to run."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from dataclasses import dataclass, fields

import pytest
import torch

import dpo_lightning
from dpo_lightning import losses, references
from dpo_lightning.errors import UsageError
from dpo_lightning.losses import (
    AOTLoss,
    AOTUnpairedLoss,
    APODownLoss,
    APOZeroLoss,
    BCOPairLoss,
    CPOLoss,
    DiscoPOPLoss,
    DPOLoss,
    DPOPositiveLoss,
    EXOPairLoss,
    FDPOLoss,
    HingeLoss,
    IPOLoss,
    LDDPOLoss,
    LengthNormalizedDPOLoss,
    MixedLoss,
    NCAPairLoss,
    NLLLoss,
    ORPOLoss,
    PlackettLuceLoss,
    PreferenceLoss,
    RDPOLoss,
    RobustDPOLoss,
    SimPOLoss,
    SoftmaxDPOLoss,
    SPPOHardLoss,
    TDPO1Loss,
    TDPO2Loss,
    UnlikelihoodLoss,
    Weighted,
    WPOLoss,
)
from dpo_lightning.models import spec
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.models.spec import PolicySpec
from dpo_lightning.recipes import from_plain, to_plain
from dpo_lightning.references import AdaptersOff, Cached, FrozenCopy, Reference, Synced

# Every recipe with every field away from its default.
RECIPES = [
    (DPOLoss(beta=0.3, label_smoothing=0.2), PreferenceLoss),
    (RobustDPOLoss(beta=0.3, label_smoothing=0.2), PreferenceLoss),
    (IPOLoss(tau=0.3, length_normalized=True), PreferenceLoss),
    (HingeLoss(beta=0.3), PreferenceLoss),
    (SimPOLoss(beta=2.5, gamma=0.5), PreferenceLoss),
    (PlackettLuceLoss(beta=0.3), PreferenceLoss),
    (SoftmaxDPOLoss(beta=0.3), PreferenceLoss),
    (LengthNormalizedDPOLoss(beta=0.3, label_smoothing=0.2), PreferenceLoss),
    (RDPOLoss(beta=0.3, label_smoothing=0.2, alpha=0.5), PreferenceLoss),
    (LDDPOLoss(beta=0.3, label_smoothing=0.2, ld_alpha=0.3), PreferenceLoss),
    (EXOPairLoss(beta=0.3, label_smoothing=0.2), PreferenceLoss),
    (DiscoPOPLoss(beta=0.3, tau=0.3), PreferenceLoss),
    (FDPOLoss(beta=0.3, divergence="alpha", alpha=0.3), PreferenceLoss),
    (NCAPairLoss(beta=0.3), PreferenceLoss),
    (BCOPairLoss(beta=0.3), PreferenceLoss),
    (SPPOHardLoss(beta=0.3), PreferenceLoss),
    (APOZeroLoss(beta=0.3), PreferenceLoss),
    (APODownLoss(beta=0.3), PreferenceLoss),
    (DPOPositiveLoss(beta=0.2, lambda_=5.0), PreferenceLoss),
    (AOTLoss(beta=0.3, label_smoothing=0.2), PreferenceLoss),
    (AOTUnpairedLoss(beta=0.3, label_smoothing=0.2), PreferenceLoss),
    (WPOLoss(beta=0.3, label_smoothing=0.2, max_weight=1.0), PreferenceLoss),
    (TDPO1Loss(beta=0.3), PreferenceLoss),
    (TDPO2Loss(beta=0.3, alpha=0.3), PreferenceLoss),
    (ORPOLoss(lambda_=0.3), PreferenceLoss),
    (CPOLoss(beta=0.3, alpha=0.3, length_normalized=False), PreferenceLoss),
    (NLLLoss(length_normalized=False), PreferenceLoss),
    (UnlikelihoodLoss(alpha=0.3), PreferenceLoss),
    (
        MixedLoss(
            losses=[
                Weighted(loss=DPOLoss(beta=0.3), weight=0.8),
                Weighted(loss=MixedLoss(losses=[Weighted(loss=NLLLoss(), weight=0.3)])),
            ]
        ),
        PreferenceLoss,
    ),
    (FrozenCopy(path="some/model", revision="v1", dtype="bfloat16", quantize="8bit", offload=True), Reference),
    (AdaptersOff(), Reference),
    (Cached(dir="some/folder", path="some/model", revision="v1"), Reference),
    (Synced(alpha=1.0, interval=512), Reference),
    (
        PolicySpec(
            path="some/model",
            lora=LoRA(rank=4, alpha=8.0, target_modules=["q_proj"], options={"use_dora": True}),
            quantize="4bit",
        ),
        PolicySpec,
    ),
    (
        PolicySpec(
            path="some/model",
            revision="v1",
            tokenizer="some/tokenizer",
            dtype="bfloat16",
            random_init=True,
            layout="rows",
            activation_checkpointing=True,
            compile=True,
            dropout=True,
            trust_remote_code=True,
            allow_pickle=True,
        ),
        PolicySpec,
    ),
]


@dataclass(frozen=True, kw_only=True)
class Foreign(PreferenceLoss):
    """A loss of somebody else's, with a recipe in it."""

    beta: float = 1.0
    reference: Reference | None = None

    def __call__(self, policy, reference):
        raise NotImplementedError

    def rewards(self, policy, reference):
        raise NotImplementedError


def plain(class_path: str, **init_args) -> dict:
    return {"class_path": class_path, "init_args": init_args}


def concrete(module) -> set[type]:
    classes = (cls for _, cls in inspect.getmembers(module, inspect.isclass))
    return {cls for cls in classes if issubclass(cls, (PreferenceLoss, Reference)) and not inspect.isabstract(cls)}


def test_the_list_of_recipes_is_complete():
    assert {type(recipe) for recipe, _ in RECIPES} == {*concrete(losses), *concrete(references), PolicySpec}
    for kind in {type(recipe) for recipe, _ in RECIPES}:
        for field in fields(kind):  # some go only one without the other
            values = [getattr(recipe, field.name) for recipe, _ in RECIPES if type(recipe) is kind]
            assert any(value != field.default for value in values), (kind, field.name)


@pytest.mark.parametrize(("recipe", "base"), RECIPES, ids=lambda value: getattr(value, "__name__", None))
def test_a_recipe_comes_back(recipe, base, tmp_path):
    data = to_plain(recipe)
    public = [f"{module.__name__}.{type(recipe).__name__}" for module in (losses, references, spec)]
    assert data["class_path"] in public  # where users import it from, wherever the file lies
    assert from_plain(json.loads(json.dumps(data)), base) == recipe
    torch.save(data, tmp_path / "hyperparameters")
    back = from_plain(torch.load(tmp_path / "hyperparameters", weights_only=True), base)
    assert back == recipe
    assert type(back) is type(recipe)


@pytest.mark.parametrize(("recipe", "base"), RECIPES, ids=lambda value: getattr(value, "__name__", None))
def test_a_recipe_is_handed_through(recipe, base):
    assert from_plain(recipe, base) is recipe


@pytest.mark.parametrize("value", [3, 0.1, "text", True, None, [1, 2]])
def test_plain_values_stay_as_they_are(value):
    assert to_plain(value) == value
    assert type(to_plain(value)) is type(value)


def test_arguments_alone_make_the_base():
    assert from_plain({"path": "some/model", "dropout": True}, PolicySpec) == PolicySpec(
        path="some/model", dropout=True
    )


MODULE = """
from dataclasses import dataclass
from dpo_lightning.losses import DPOLoss

@dataclass(frozen=True, kw_only=True)
class Later(DPOLoss):
    gamma: float = 0.0
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Two modules that nobody has imported: ``stranger``, and ``later`` in this package."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(dpo_lightning, "__path__", [*dpo_lightning.__path__, str(tmp_path)])
    for name in ("stranger", "later"):
        (tmp_path / f"{name}.py").write_text(MODULE)
    yield
    for name in ("stranger", "later", "dpo_lightning.later"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("modules")
def test_a_module_of_this_package_is_imported_when_needed():
    back = from_plain(plain("dpo_lightning.later.Later", beta=0.3, gamma=0.5), PreferenceLoss)
    assert (type(back).__name__, back.beta, back.gamma) == ("Later", 0.3, 0.5)


@pytest.mark.usefixtures("modules")
def test_a_foreign_class_is_taken_once_its_module_is_imported():
    data = plain("stranger.Later", beta=0.3, gamma=0.5)
    with pytest.raises(UsageError) as caught:
        from_plain(data, PreferenceLoss)
    assert "stranger" not in sys.modules
    assert str(caught.value) == (
        "The checkpoint was made with stranger.Later, which is not an imported subclass of PreferenceLoss. Import "
        "stranger before loading, or pass your own object to load_from_checkpoint."
    )
    stranger = importlib.import_module("stranger")
    assert from_plain(data, PreferenceLoss) == stranger.Later(beta=0.3, gamma=0.5)
    assert to_plain(stranger.Later(beta=0.3, gamma=0.5)) == plain(
        "stranger.Later", beta=0.3, gamma=0.5, label_smoothing=0.0
    )


@pytest.mark.parametrize(
    "class_path",
    [
        "dpo_lightning.references.FrozenCopy",  # ours, but no loss
        "dpo_lightning.losses.PairwiseLoss",  # a loss, but no recipe
        "dpo_lightning.losses.NoSuchLoss",
        "dpo_lightning.no_such_module.DPOLoss",
        "no_such_module.DPOLoss",
        "DPOLoss",
        "subprocess.Popen",
        "os.system",
        "builtins.eval",
    ],
)
def test_what_is_no_recipe_of_the_right_kind_is_refused(class_path):
    with pytest.raises(
        UsageError, match=f"made with {class_path}, which is not an imported subclass of PreferenceLoss"
    ):
        from_plain(plain(class_path), PreferenceLoss)


def test_a_recipe_in_a_recipe_comes_back():
    recipe = Foreign(beta=0.3, reference=FrozenCopy(path="some/model"))
    data = to_plain(recipe)
    others = {"revision": None, "dtype": None, "quantize": None, "offload": False}
    assert data["init_args"]["reference"] == plain("dpo_lightning.references.FrozenCopy", path="some/model", **others)
    assert from_plain(json.loads(json.dumps(data)), PreferenceLoss) == recipe


def test_a_recipe_in_a_recipe_chooses_no_code_to_run(tmp_path):
    marker = tmp_path / "ran"
    data = to_plain(Foreign())
    data["init_args"]["reference"] = plain("subprocess.Popen", args=["touch", str(marker)])
    with pytest.raises(UsageError, match=r"made with subprocess\.Popen, which is not an imported dataclass"):
        from_plain(data, PreferenceLoss)
    assert not marker.exists()


def test_recipes_in_a_list_in_a_recipe_choose_no_code_to_run_either(tmp_path):
    marker = tmp_path / "ran"
    data = to_plain(MixedLoss(losses=[Weighted(loss=DPOLoss())]))
    data["init_args"]["losses"][0]["init_args"]["loss"] = plain("subprocess.Popen", args=["touch", str(marker)])
    with pytest.raises(UsageError, match=r"made with subprocess\.Popen, which is not an imported dataclass"):
        from_plain(data, PreferenceLoss)
    assert not marker.exists()


@pytest.mark.parametrize(("value", "name"), [("dpo", "str"), (0.1, "float"), (None, "NoneType"), (DPOLoss, "ABCMeta")])
def test_what_is_no_recipe_at_all_is_refused(value, name):
    with pytest.raises(
        UsageError, match=rf"Expected a PreferenceLoss, got {name}: .*; give an object of that class or"
    ):
        from_plain(value, PreferenceLoss)
