"""DPO's theorem: the loss of a reward's preferences is least at the policy that maximises this reward under a KL
constraint (arXiv:2305.18290, Eq. 4 and 7).

The policy is autoregressive over three tokens, small enough that every completion can be listed; preferences are those
of a whole population under a known reward, without sampling; so the optimum is known in closed form and training has to
arrive there, not near it.
"""

import itertools

import pytest
import torch
from torch import nn

from dpo_lightning.batch import Logps
from dpo_lightning.losses import (
    DPOLoss,
    FDPOLoss,
    PlackettLuceLoss,
    RDPOLoss,
    RobustDPOLoss,
    SoftmaxDPOLoss,
)

END, MAX_LENGTH, NUM_PROMPTS, BETA = 2, 3, 2, 0.5
WORDS = range(END)
# Completions end with the end token or at three tokens: of 1, 2 and 3 tokens, 15 in all.
COMPLETIONS = [(*words, END) for count in range(MAX_LENGTH) for words in itertools.product(WORDS, repeat=count)]
COMPLETIONS += list(itertools.product(WORDS, repeat=MAX_LENGTH))
PREFIXES = [words for count in range(MAX_LENGTH) for words in itertools.product(WORDS, repeat=count)]


class TabularPolicy(nn.Module):
    """Logits of the next token for every prompt and every beginning of a completion."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def log_probabilities(self):
        """Of every completion, shape (prompts, completions)."""
        token = self.logits.log_softmax(-1)
        return torch.stack(
            [
                sum(token[:, PREFIXES.index(words[:place]), word] for place, word in enumerate(words))
                for words in COMPLETIONS
            ],
            dim=1,
        )

    def forward(self, prompt, ranking):
        """Log-probabilities of completions in an order, as a batch of preferences has them."""
        length = torch.tensor([len(words) for words in COMPLETIONS])
        return Logps(self.log_probabilities()[prompt[:, None], ranking], length[ranking])


def random(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


REFERENCE = TabularPolicy(random(NUM_PROMPTS, len(PREFIXES), 3, seed=0)).requires_grad_(False)
REWARD = random(NUM_PROMPTS, len(COMPLETIONS), seed=1)
LENGTHS = torch.tensor([float(len(words)) for words in COMPLETIONS], dtype=torch.float64)


def population(num_responses):
    """Every prompt with every order of that many completions: prompts (B,), rankings (B, K) and their rewards."""
    orders = torch.tensor(list(itertools.permutations(range(len(COMPLETIONS)), num_responses)))
    prompt = torch.arange(NUM_PROMPTS).repeat_interleave(len(orders))
    ranking = orders.repeat(NUM_PROMPTS, 1)
    return prompt, ranking, REWARD[prompt[:, None], ranking]


def first_is_best(rewards):
    """Bradley-Terry, and its softmax for more than two."""
    return rewards.softmax(1)[:, 0]


def plackett_luce(rewards):
    tails = [rewards[:, place:].softmax(1)[:, 0] for place in range(rewards.shape[1])]
    return torch.stack(tails).prod(0)


def flipped(rewards, rate=0.2):
    right = first_is_best(rewards)
    return (1 - rate) * right + rate * (1 - right)


def trained(loss, probability=first_is_best, num_responses=2):
    """The policy at the minimum of the expected loss over a population."""
    prompt, ranking, rewards = population(num_responses)
    weight = probability(rewards)
    reference = REFERENCE(prompt, ranking)
    policy = TabularPolicy(REFERENCE.logits.clone())
    optimizer = torch.optim.LBFGS(
        policy.parameters(), max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = (weight * loss(policy(prompt, ranking), reference)).sum() / weight.sum()
        value.backward()
        return value

    optimizer.step(closure)
    return policy.requires_grad_(False)


def optimum(reward, beta):
    """pi_ref(y | x) exp(r(x, y) / beta) / Z(x)."""
    return (REFERENCE.log_probabilities() + reward / beta).softmax(1)


def total_variation(policy, target):
    return ((policy.log_probabilities().exp() - target).abs().sum(1) / 2).max().item()


def implicit_rewards(loss, policy):
    """Of every completion of every prompt, shape (prompts, completions)."""
    prompt, everything = torch.arange(NUM_PROMPTS), torch.arange(len(COMPLETIONS)).expand(NUM_PROMPTS, -1)
    return loss.rewards(policy(prompt, everything), REFERENCE(prompt, everything))


def up_to_a_constant(rewards):
    return rewards - rewards.mean(1, keepdim=True)


def test_the_completions_are_all_there_are():
    assert len(COMPLETIONS) == len(set(COMPLETIONS)) == 15
    torch.testing.assert_close(REFERENCE.log_probabilities().exp().sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("loss", "probability", "num_responses"),
    [
        (DPOLoss(beta=BETA), first_is_best, 2),
        (RobustDPOLoss(beta=BETA, label_smoothing=0.2), flipped, 2),
        (PlackettLuceLoss(beta=BETA), plackett_luce, 3),
        (SoftmaxDPOLoss(beta=BETA), first_is_best, 3),
        (FDPOLoss(beta=BETA, divergence="reverse_kl"), first_is_best, 2),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_training_ends_at_the_optimal_policy_and_finds_the_reward(loss, probability, num_responses):
    target = optimum(REWARD, BETA)
    assert total_variation(REFERENCE, target) > 0.3  # there is a way to go
    policy = trained(loss, probability, num_responses)
    assert total_variation(policy, target) < 1e-4
    found = up_to_a_constant(implicit_rewards(loss, policy))
    torch.testing.assert_close(found, up_to_a_constant(REWARD), atol=1e-3, rtol=0)


def test_a_length_penalty_ends_at_the_optimum_of_the_penalised_reward():
    loss = RDPOLoss(beta=BETA, alpha=0.4)
    policy = trained(loss)
    assert total_variation(policy, optimum(REWARD - 0.4 * LENGTHS, BETA)) < 1e-4
    assert total_variation(policy, optimum(REWARD, BETA)) > 0.1
    # Preferences are of the whole reward, so that is what the loss finds.
    found = up_to_a_constant(implicit_rewards(loss, policy))
    torch.testing.assert_close(found, up_to_a_constant(REWARD), atol=1e-3, rtol=0)


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon", "alpha"])
def test_other_divergences_find_the_reward_with_another_policy(divergence):
    loss = FDPOLoss(beta=BETA, divergence=divergence)
    policy = trained(loss)
    found = up_to_a_constant(implicit_rewards(loss, policy))
    torch.testing.assert_close(found, up_to_a_constant(REWARD), atol=1e-3, rtol=0)
    assert total_variation(policy, optimum(REWARD, BETA)) > 0.02


@pytest.mark.parametrize(
    ("loss", "probability"),
    [
        (DPOLoss(beta=2 * BETA), first_is_best),  # the optimum of another constraint
        (DPOLoss(beta=BETA), flipped),  # labels with noise that the loss does not know of
        (DPOLoss(beta=BETA, label_smoothing=0.2), first_is_best),  # noise that is not there
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_another_beta_or_other_labels_end_elsewhere(loss, probability):
    assert total_variation(trained(loss, probability), optimum(REWARD, BETA)) > 0.05
