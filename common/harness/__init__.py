"""Everything that a run needs and that is not mathematics: tasks, data, environments, the run folder, pictures.

Algorithm files import from here. A name is fetched from its module when it is first asked for, so that one module
alone (`python -m common.harness.tasks`) starts without the others.
"""

import importlib

MODULES = {
    "datasets": ("load_dataset", "setup"),
    "environments": ("Evaluator",),
    "records": ("Behaviour", "Dataset", "Loss"),
    "run": ("Run", "load_run"),
    "tasks": ("Preset", "RewardRule"),
}


def __getattr__(name: str):
    for module, names in MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
