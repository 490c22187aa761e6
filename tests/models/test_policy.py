"""The engine against the plainest use of a model: every sequence by itself, log_softmax of the model's own logits."""

import copy
import random

import pytest
import torch
from families import ROWS, STREAM
from transformers import AutoModelForCausalLM

from dpo_lightning.data.collate import collate
from dpo_lightning.data.example import TokenizedExample
from dpo_lightning.models.policy import CausalPolicy, logit_constants, padded_rows
from dpo_lightning.models.seam import ATTENTION

TOLERANCE = 2e-5  # nats a token, fp32


def random_ids(rng, length):
    return [rng.randrange(5, 97) for _ in range(length)]


def random_examples(sizes):
    rng = random.Random(0)
    return [
        TokenizedExample(random_ids(rng, prompt), [random_ids(rng, response) for response in responses], row)
        for row, (prompt, responses) in enumerate(sizes, 1)
    ]


# Rows longer than every window; K = 3 with a response absent.
EXAMPLES = random_examples([(13, (7, 11, 4)), (5, (6, 9))])


def random_model(config):
    """A model in evaluation mode whose log-probabilities are far from flat, so that attention decides them."""
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def separate_logps(model, examples):
    """Log-probabilities of response tokens, one sequence at a time, by nothing of this package."""
    logps = []
    for example in examples:
        for response in example.response_ids:
            ids = torch.tensor(example.prompt_ids + response)
            predictions = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
            logps.append(predictions[len(example.prompt_ids) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(logps)


def gradients(model, logps):
    """Gradients of a sum with a weight of its own for every token, by name; absent where there is none."""
    model.zero_grad()
    (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(got, expected):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (got[name] - gradient).norm()
        assert error <= 1e-4 * gradient.norm() + 1e-5, f"{name}: {error} of {gradient.norm()}"


@pytest.fixture(scope="module")
def separately(tiny_config):
    """A function from the name of a family to a model of it, with log-probabilities and gradients of EXAMPLES."""
    made = {}

    def make(family):
        if family not in made:
            model = random_model(tiny_config(family))
            logps = separate_logps(model, EXAMPLES)
            made[family] = model, logps.detach(), gradients(model, logps)
        model, *expected = made[family]
        return copy.deepcopy(model), *expected

    return make


@pytest.mark.parametrize("family", STREAM + ROWS)
def test_log_probabilities_of_the_test_models_are_far_from_flat(family, separately):
    _, logps, _ = separately(family)
    assert logps.std() > 0.3  # or no wrong mask would show


@pytest.mark.parametrize(
    ("family", "layout"),
    [*((family, "stream") for family in STREAM), *((family, "rows") for family in STREAM + ROWS)],
)
def test_either_layout_equals_separate_sequences_and_so_do_its_gradients(family, layout, separately):
    model, expected, expected_gradients = separately(family)
    policy = CausalPolicy(model, layout)
    logps = policy(collate(EXAMPLES)).token
    torch.testing.assert_close(logps, expected, atol=TOLERANCE, rtol=0)
    assert_same_gradients(gradients(model, logps), expected_gradients)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_a_model_that_reads_streams_reads_padded_rows_too(family, separately):
    model, expected, _ = separately(family)
    CausalPolicy(model, "stream")
    assert model.config._attn_implementation == ATTENTION
    torch.testing.assert_close(CausalPolicy(model, "rows")(collate(EXAMPLES)).token, expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(separate_logps(model, EXAMPLES), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("layout", ["stream", "rows"])
def test_totals_are_sums_over_responses_and_zero_where_one_is_absent(layout, separately):
    model, expected, _ = separately("llama")
    logps = CausalPolicy(model, layout)(collate(EXAMPLES))
    a, b, c, d, e = (part.sum().item() for part in expected.split([7, 11, 4, 6, 9]))
    torch.testing.assert_close(logps.total, torch.tensor([[a, b, c], [d, e, 0.0]]), atol=2e-4, rtol=0)
    assert logps.length.tolist() == [[7, 11, 4], [6, 9, 0]]
    assert logps.total[1, 2] == 0


@pytest.mark.parametrize("layout", ["stream", "rows"])
@pytest.mark.parametrize(
    "sizes",
    [
        [(9, (5,)), (1, (1,)), (4, (8,))],  # K = 1, no prefix anywhere
        [(1, (1, 1))],
        [(3, (1, 9, 2, 4)), (8, (2,)), (1, (5, 1, 7))],  # ragged K, an example with one response between
    ],
    ids=["one response", "single tokens", "ragged"],
)
def test_batches_of_any_shape_equal_separate_sequences(sizes, layout, separately):
    examples = random_examples(sizes)
    model, _, _ = separately("mistral")
    with torch.no_grad():
        expected = separate_logps(model, examples)
        logps = CausalPolicy(model, layout)(collate(examples)).token
    torch.testing.assert_close(logps, expected, atol=TOLERANCE, rtol=0)


def test_no_example_depends_on_its_neighbours(separately):
    model, _, _ = separately("llama")
    policy = CausalPolicy(model, "stream")
    with torch.no_grad():
        alone = torch.cat([policy(collate([example])).total[:, :2] for example in EXAMPLES])
        together = policy(collate(EXAMPLES)).total[:, :2]
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["stream", "rows"])
def test_autocast_gives_fp32_log_probabilities_near_the_exact_ones(layout, separately):
    model, expected, _ = separately("llama")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logps = CausalPolicy(model, layout)(collate(EXAMPLES))
    assert logps.total.dtype == torch.float32
    exact = torch.stack([part.sum() for part in expected.split([7, 11, 4, 6, 9])])
    torch.testing.assert_close(logps.total[logps.length > 0], exact, atol=0.5, rtol=0)


@pytest.mark.parametrize("layout", ["stream", "rows"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "qwen3"])
def test_activation_checkpointing_recomputes_and_changes_no_gradient(family, layout, separately):
    model, expected, expected_gradients = separately(family)
    runs = []
    last = [module for module in model.modules() if type(module).__name__.endswith("MLP")][-1]
    last.register_forward_pre_hook(lambda *_: runs.append(1))
    model.activation_checkpointing_enable({"use_reentrant": False})
    policy = CausalPolicy(model, layout).train()
    logps = policy(collate(EXAMPLES)).token
    assert len(runs) == 1
    torch.testing.assert_close(logps, expected, atol=TOLERANCE, rtol=0)
    assert_same_gradients(gradients(model, logps), expected_gradients)
    assert len(runs) == 2  # once more in backward


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt_oss"])
def test_a_policy_generates_what_the_plain_model_does(family, separately):
    model, _, _ = separately(family)
    rng = random.Random(1)
    short, long = random_ids(rng, 4), random_ids(rng, 9)  # longer than the window, once continued
    prompts = {
        "input_ids": torch.tensor([[0] * 5 + short, long]),
        "attention_mask": torch.tensor([[0] * 5 + [1] * 4, [1] * 9]),
    }
    # No token twice: some random models would otherwise say one forever, whatever they attend to.
    greedy = {"do_sample": False, "min_new_tokens": 12, "max_new_tokens": 12, "no_repeat_ngram_size": 1}
    expected = model.generate(**prompts, **greedy)
    CausalPolicy(model, "stream")
    assert model.config._attn_implementation == ATTENTION
    assert torch.equal(model.generate(**prompts, **greedy), expected)


def test_padded_rows_by_hand():
    batch = collate([TokenizedExample([10, 11], [[20, 21], [30]], 1), TokenizedExample([12], [[40, 41, 42]], 2)])
    rows, mask, source = padded_rows(batch)
    assert batch.input_ids[rows].tolist() == [[10, 11, 20, 21], [10, 11, 30, 10], [12, 40, 41, 42]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert source.tolist() == [1, 2, 5, 8, 9, 10]  # flat positions in three rows of four


@pytest.mark.parametrize(
    ("family", "constants", "expected"),
    [
        ("llama", {}, (1.0, None)),
        ("cohere2", {"logit_scale": 0.0625}, (0.0625, None)),
        ("granite", {"logits_scaling": 8.0}, (0.125, None)),
        ("gemma2", {"final_logit_softcapping": 30.0}, (1.0, 30.0)),
        ("gemma3_text", {}, (1.0, None)),
    ],
)
def test_constants_between_head_and_logits(family, constants, expected, tiny_config):
    config = copy.deepcopy(tiny_config(family))
    for name, value in constants.items():
        setattr(config, name, value)
    assert logit_constants(config) == expected
