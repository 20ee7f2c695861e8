"""Does training learn more than the spread of seeds? ``python benchmarks/seeds.py``"""

from _job import held_out, train, write

SEEDS = (0, 1, 2)


def main() -> None:
    """The default job with three seeds; held-out loss before and after each."""
    lines = [
        "`python benchmarks/seeds.py`: 60 steps as in `make train`, 2 CPU ranks. Nats per token.",
        "",
        "| seed | base | after | change |",
        "|---|---|---|---|",
    ]
    afters = []
    for seed in SEEDS:
        options = ["--max_steps", "60", "--eval_every", "0", "--seed", str(seed)]
        before, after = held_out(train(*options))
        afters.append(after)
        lines.append(
            f"| {seed} | {before:.4f} | {after:.4f} | {100 * (after / before - 1):+.1f}% |"
        )
    spread = max(afters) - min(afters)
    lines += [
        "",
        f"Spread of the three: {spread:.4f} nats; smallest gain: {before - max(afters):.4f}.",
    ]
    write("seeds.md", "\n".join(lines))


if __name__ == "__main__":
    main()
