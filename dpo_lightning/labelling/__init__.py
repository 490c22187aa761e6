"""From samples to preferences."""

from dpo_lightning.labelling.choice import Choice
from dpo_lightning.labelling.command import label
from dpo_lightning.labelling.groups import Group, group
from dpo_lightning.labelling.labellers import BradleyTerry, ByJudge, ByScorer, Label, Labeller, Labels, as_labeller

__all__ = [
    "BradleyTerry",
    "ByJudge",
    "ByScorer",
    "Choice",
    "Group",
    "Label",
    "Labeller",
    "Labels",
    "as_labeller",
    "group",
    "label",
]
