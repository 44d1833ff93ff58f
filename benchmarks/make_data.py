"""Makes the datasets of docs/data.md, without a network.

    python benchmarks/make_data.py                  # lists them
    python benchmarks/make_data.py hopper-medium    # makes edp/hopper/medium-v1
    python benchmarks/make_data.py all

They go where Minari keeps its datasets: ~/.minari/datasets, or MINARI_DATASETS_PATH. One that is there is only checked.
A run makes its own: `python algorithms/edp_iql.py --dataset-id edp/hopper/medium-v1`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository's common/, whatever is installed
import common.harness.process  # noqa: F401, I001  first: from here on a signal leaves no traceback
from dataclasses import dataclass
from typing import Literal

import tyro

from common.harness.datasets import load_dataset, resolve_task
from common.recipes import RECIPES

NAMES = {dataset_id.partition("/")[2].rpartition("-v")[0].replace("/", "-"): dataset_id for dataset_id in RECIPES}


@dataclass(frozen=True)
class Args:
    """Make datasets without a network, or list them."""

    names: tyro.conf.Positional[tuple[Literal[(*NAMES, "all")], ...]] = ()
    """what to make; none: list them"""


def main(args: Args) -> None:
    for name, dataset_id in NAMES.items():
        recipe = RECIPES[dataset_id]
        if not args.names:
            print(f"{name:<27}{dataset_id:<35}{recipe.num_steps:>7,} steps {recipe.megabytes:>4} MB")
        elif {name, "all"} & set(args.names):
            crc = load_dataset(resolve_task("", dataset_id), "none")[1].statistics["crc32"]
            told = "as it should be" if crc == recipe.crc32 else f"not {recipe.crc32}: other versions, or another CPU"
            print(f"CRC of the arrays {crc}, {told}.\n", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
