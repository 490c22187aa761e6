"""Lay a run that was killed and went on over one that was not: python docs/plot_resume.py WHOLE RESUMED PICTURE."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from plot_run import curve
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def loaded(path, name="train/loss"):
    return curve(EventAccumulator(str(path)).Reload(), name)


def main(whole, resumed, picture):
    figure, (losses, differences) = plt.subplots(
        2, 1, figsize=(7, 4.6), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    steps, values = loaded(whole)
    losses.plot(steps, values, color="tab:blue", lw=5, alpha=0.35, label="never stopped")
    parts = [loaded(file) for file in sorted(Path(resumed).glob("events*"))]
    parts = [part for part in parts if part[0]]
    for number, (at, found) in enumerate(parts, start=1):
        losses.plot(at, found, ".-", color=f"C{number}", label=f"process {number}: steps {at[0] + 1} to {at[-1] + 1}")
    losses.set(ylabel="training loss, nats", title="A run that was killed and went on, over one that never stopped")
    losses.legend(frameon=False)
    expected = dict(zip(steps, values, strict=True))
    for number, (at, found) in enumerate(parts, start=1):
        distance = [value - expected[step] for step, value in zip(at, found, strict=True)]
        differences.plot(at, distance, ".-", color=f"C{number}")
    differences.set(xlabel="optimizer step", ylabel="difference")
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
