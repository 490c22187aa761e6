"""Draw a run from its TensorBoard logs: python docs/plot_run.py runs/quickstart/version_0 docs/quickstart.png."""

import sys

import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def curve(events, name):
    scalars = events.Scalars(name)
    return [point.step for point in scalars], [point.value for point in scalars]


def main(run, picture):
    events = EventAccumulator(run)
    events.Reload()
    figure, (shares, losses) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    # The policy before training: margins are 0, and a tie counts one half.
    steps, accuracy = curve(events, "val/rewards/accuracies")
    shares.plot([0, *steps], [0.5, *accuracy], "o-", label="validation accuracy of implicit rewards")
    shares.plot(*curve(events, "samples/positive"), "s-", label="positive reviews among held-out samples")
    shares.set(xlabel="optimizer step", ylabel="share", ylim=(0.4, 1.02), title="What the policy prefers and writes")
    shares.legend(loc="lower right", frameon=False)
    losses.plot(*curve(events, "train/loss"), label="training loss")
    losses.axhline(0.6931, color="grey", lw=0.8, ls=":", label="log 2: policy = reference")
    losses.set(xlabel="optimizer step", ylabel="nats", title="DPO loss, and distance from the reference")
    kl = losses.twinx()
    kl.plot(*curve(events, "samples/kl"), "s-", color="tab:green", label="KL to the reference")
    kl.set(ylabel="KL, nats a review", ylim=(0, None))
    lines = [line for axis in (losses, kl) for line in axis.get_lines()]
    losses.legend(lines, [str(line.get_label()) for line in lines], loc="center right", frameon=False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
