"""Results of before cells were values, into `FOLDER/EXPERIMENT/SCALE/NAME.json`: python -m tools.move_results FOLDER

Before, a file lay in FOLDER as EXPERIMENT.NAME.json, with settings of its experiment's own. What was measured stays
as it is, to the last digit; data hash and training, which stood among the measures, go to the settings. The name and
the settings of before are kept in the provenance, under `before`.
"""

import sys
from pathlib import Path
from typing import Any

from moemla import complexity, results
from moemla.cells import DEFAULTS, Cell, model_config, train_config
from moemla.config import ModelConfig
from moemla.results import Result

EXPERIMENTS = {"chapter05": "latent-cost"}
VOCAB_SIZE, MAX_SEQ_LEN = 4096, 512  # of all trained runs
SMALL = 300  # stories of a smoke run


def moved(old: Result) -> Result:
    """The same run as a result of a cell; AssertionError where the old file says what the cell does not."""
    settings, measures = old.settings, dict(old.measures)
    if old.experiment == "bench":
        cell = _bench(settings)
    else:
        data, training = measures.pop("data_hash"), measures.pop("training", None)
        cell = _cell(old.experiment, settings, data, training)
        if "parameters" in measures:
            assert complexity.parameters(cell.model).total == measures["parameters"], old.name
        for name, value in (training or {}).items():
            assert cell.settings["train"][name] == value, (old.name, name)
        for name in cell.settings["train"] or {}:
            assert name not in settings or cell.settings["train"][name] == settings[name], (old.name, name)
    before = {"file": f"{old.experiment}.{old.name}.json", "settings": settings}
    return results.of(cell, measures, old.provenance | {"before": before})


def _cell(experiment: str, settings: dict[str, Any], data: str, training: dict[str, Any] | None) -> Cell:
    part, variant = settings.get("part"), settings.get("variant")
    tags: dict[str, Any] = {"text": settings["data"]}
    scale = "smoke" if settings["stories"] == SMALL else "cpu"
    known = dict(experiment=EXPERIMENTS.get(experiment, experiment), scale=scale, data=data)
    if part == "counted":
        return Cell(**known, tags=tags | dict(arm=part, part=part))
    assert training is not None
    tags |= dict(variant=variant, scored=settings.get("scored"))
    tags["arm"] = variant if part != "rate" else f"{variant}-{training['steps']}steps"
    if part:
        tags["part"] = part
    model = model_config(settings["size"], variant, vocab_size=VOCAB_SIZE, max_seq_len=MAX_SEQ_LEN)
    return Cell(**known, tags=tags, model=model, train=train_config(**training))


def _bench(settings: dict[str, Any]) -> Cell:
    from moemla.bench import cell_of

    chosen = {name: value for name, value in settings.items() if name not in ("what", "device", "config")}
    config = ModelConfig.from_dict(settings["config"])
    assert set(config.to_dict()) - {"backend"} == set(DEFAULTS["model"])
    return cell_of(settings["what"], settings["device"], config, chosen)


def main(folder: str | Path = results.FOLDER) -> int:
    """Moves them all, and writes the tables."""
    folder = Path(folder)
    old = sorted(folder.glob("*.*.json"))
    places = set()
    for path in old:
        result = moved(results.read(path))
        new = results.write(result, folder)
        places.add((result.experiment, result.settings["scale"]))
        path.unlink()
        print(f"{path.name} -> {new.relative_to(folder)}")
    for experiment, scale in sorted(places):
        results.write_table(results.load(folder, experiment, scale), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
