"""Draw the pictures of docs/concepts/, except the calibration figure of `mutual_information.py`.

python pipelines/pictures.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from diagrams import SKETCHES
from evidence import open_figure, save_svg

from medim.files import write_text


def compute_binary_entropy(p: np.ndarray) -> np.ndarray:
    """Compute the entropy of a coin in bits."""
    entropy: np.ndarray = -p * np.log2(p) - (1 - p) * np.log2(1 - p)
    return entropy


def draw_channels(path: Path) -> None:
    """Draw the entropy of a coin and the information that two channels transmit."""
    p = np.linspace(1e-6, 1 - 1e-6, 200)
    with open_figure(1, 2, (3.2, 2.4)) as (figure, panels):
        coin, channel = panels.flat
        coin.plot(p, compute_binary_entropy(p))
        coin.set(title="A coin", xlabel="probability of heads", ylabel="entropy, bits")
        channel.plot(p, 1 - compute_binary_entropy(p), label="flips a bit")
        channel.plot(p, 1 - p, "--", label="erases a bit")
        channel.set(title="A channel", xlabel="share of bits disturbed", ylabel="information, bits", ylim=(-0.05, 1.35))
        channel.legend(frameon=False)
        save_svg(figure, path)


def draw_linsker(path: Path) -> None:
    """Draw the gain of two different units over two equal units, and their best angle, as functions of the noise."""
    r, noise = 0.5, np.geomspace(0.02, 20, 200)
    copy = np.log2(1 + 2 * (1 + r) / noise) / 2
    differ = np.log2((1 + (1 + r) / noise) * (1 + (1 - r) / noise)) / 2
    angle = np.degrees(np.arccos(np.minimum(1, noise * r / (1 - r**2))))
    with open_figure(1, 2, (3.2, 2.4)) as (figure, panels):
        panels[0, 0].plot(noise, differ - copy)
        panels[0, 0].axhline(0, color="grey", linewidth=0.6)
        panels[0, 0].axvline((1 - r**2) / (2 * r), color="grey", linestyle="--", linewidth=0.8)
        panels[0, 0].set(title="Gain of two different units over two copies", ylabel="bits")
        panels[0, 1].plot(noise, angle)
        panels[0, 1].set(title="The best angle between two units", ylabel="degrees", yticks=(0, 30, 60, 90))
        for axes in panels.flat:
            axes.set(xscale="log", xlabel="noise (variance of one input: 1)")
        save_svg(figure, path)


def main() -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    out = parser.parse_args().out
    for sketch in SKETCHES:
        write_text(out / f"{sketch.__name__.replace('_', '-')}.svg", str(sketch()))
    draw_channels(out / "channels.svg")
    draw_linsker(out / "linsker.svg")


if __name__ == "__main__":
    main()
